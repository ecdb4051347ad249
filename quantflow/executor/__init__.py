"""From a recipe to a measured int8 model: the source, the stages in their order, what they come to."""
