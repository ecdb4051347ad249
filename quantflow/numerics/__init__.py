"""The one formula of quantization, the ranges it needs (observers), and how errors are measured."""
