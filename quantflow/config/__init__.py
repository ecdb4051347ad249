"""From YAML and the command line to a Recipe; the only folder that imports Hydra or OmegaConf."""
