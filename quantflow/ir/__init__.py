"""The nouns that stages hand on: batch, graph, units, plan, program."""
