"""Where the float model and its batches come from."""
