"""The command line: what is typed, sweeps and their jobs, quantflow-validate."""
