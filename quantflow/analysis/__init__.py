"""What the products say when they are looked at: costs of joins and layers, the fused graph, two artifacts compared."""
