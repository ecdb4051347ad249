"""The fastest int8 model within limits, and what int8 costs each layer."""
