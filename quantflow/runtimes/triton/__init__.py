"""The triton runtime: an int8 program on a GPU, by kernels of our own.

`devices` says what can run here and imports neither Triton nor a kernel; `runner` is a program on a card, `lower` its
nodes as calls, `layers` and `operators` what is called, the other modules kernels, which know tiles and codes only.
"""
