from __future__ import annotations

from collections.abc import Callable
from typing import Any

import own_models
import torch

from quantflow.analysis.fused_graph import fused_graph


def test_it_says_which_kernel_reads_what(stages: Callable[..., Any]) -> None:
    torch.manual_seed(0)
    program = stages(own_models.net(), torch.randn(4, 3, 8, 8)).program
    graph = fused_graph(program)
    names = [*graph["inputs"], *(node["name"] for node in graph["nodes"])]
    by_name = {node["name"]: node for node in graph["nodes"]}
    assert graph["inputs"] == [program.inputs[0].name]
    assert by_name["stem.0"]["op"] == "conv_relu"
    assert by_name["block"]["op"] == "conv_sum_relu"
    assert [names[n] for n in by_name["block"]["reads"]] == ["stem.0"]
    assert {names[n] for n in graph["outputs"]} == {"head"}
    precisions = {node["precision"] for node in graph["nodes"]}
    assert {"int8", "between"} <= precisions
    for index, node in enumerate(graph["nodes"]):
        assert all(read < index + len(graph["inputs"]) for read in node["reads"])


def test_what_stays_float_is_marked(stages: Callable[..., Any]) -> None:
    program = stages(own_models.net(), torch.randn(4, 3, 8, 8), layers={"head": "float"}).program
    nodes = {node["name"]: node for node in fused_graph(program)["nodes"]}
    assert (nodes["head"]["op"], nodes["head"]["precision"]) == ("linear", "float")
