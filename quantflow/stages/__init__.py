"""The stages: each a function from the previous product to its own."""
