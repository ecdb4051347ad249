"""From a recipe to a measured int8 model: the source, the stages in their order, what they come to.

source    the float side of a run: model and data
run       what every step of one run is given
order     the stages, top to bottom
parts     a model that is quantized in parts: which, and each through the stages
composed  what int8 parts make together: verified, measured
steps     stages that take more than one call
measure   float beside int8: accuracy, layers, benchmark
results   what the results say, and the model that carries them
"""
