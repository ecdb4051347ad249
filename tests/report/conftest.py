from __future__ import annotations

import math
from typing import Any

import pytest


@pytest.fixture
def results() -> dict[str, Any]:
    """Results with every section, as a run of a ResNet might leave them."""
    plan: list[dict[str, Any]] = [
        {
            "name": f"layer{i // 4 + 1}.{i % 4}.conv1",
            "op": "conv2d",
            "precision": "int8",
            "group": "conv_relu",
            "kernel": "onednn.qconv2d_pointwise",
            "qparams": {"dtype": "int8", "scale": 0.0214871, "zero_point": 0},
            "reason": "has an int8 kernel",
        }
        for i in range(8)
    ]
    plan.append({"name": "softmax", "op": "softmax", "precision": "float", "reason": "no int8 form", "kernel": None})
    return {
        "format": 1,
        "recipe": {
            "name": "resnet18_sym_int8",
            "description": "ResNet-18, symmetric int8",
            "hash": "8f3a",
            "overrides": ["device=cpu"],
            "settings": {"name": "resnet18_sym_int8", "seed": 0, "layers": {"fc": "float"}},
        },
        "verdict": "failed",
        "notices": ["weights are seeded random, not pretrained (no network): accuracy against labels means nothing"],
        "environment": {
            "quantflow": "0.1.0",
            "torch": "2.13.0+cpu",
            "python": "3.11.2",
            "cpu": "AMD EPYC",
            "isa": ["avx2", "avx512_vnni"],
            "cores": 2,
            "threads": 2,
        },
        "model": {
            "name": "resnet18",
            "weights_requested": "auto",
            "weights_used": "random",
            "parameters": 11_689_512,
            "float_bytes": 46_758_048,
        },
        "data": {"kind": "photos", "calibration": 64, "evaluation": 128, "sha256": "77aa"},
        "mode": "export",
        "device": "cpu",
        "runtime": {"requested": "auto", "chosen": "torch", "reason": "native is not built"},
        "plan": plan,
        "graph": {
            "inputs": ["x"],
            "nodes": [
                {"name": "x.quantize", "op": "quantize", "precision": "between", "reads": [0]},
                {"name": "layer1.0.conv1", "op": "conv_relu", "precision": "int8", "reads": [1]},
                {"name": "layer1.1.conv1", "op": "conv_sum_relu", "precision": "int8", "reads": [2, 1]},
                {"name": "softmax", "op": "softmax", "precision": "float", "reads": [3]},
            ],
            "outputs": [4],
        },
        "int8_proof": {
            "int8_layers": 21,
            "int8_layers_run": 21,
            "core_layers": 21,
            "coverage": 1.0,
            "output_differs": True,
        },
        "calibration": {"batches": 4, "samples": 64, "seconds": 3.21, "resumed": False},
        "warmup": {
            "time_to_first_result_s": 0.8,
            "steady_ms": 31.0,
            "iterations": 5,
            "sqnr_vs_reference_db": math.inf,
        },
        "accuracy": {
            "samples": 128,
            "batches": 8,
            "sqnr_db": 28.4123,
            "max_error": 0.31,
            "float_max_abs": 12.5,
            "agreement": 0.953125,
            "cosine_mean": 0.99931,
            "cosine_min": 0.99812,
            "nonfinite": {"float": 0, "int8": 0},
            "identical": False,
            "metric": {
                "name": "top1",
                "float": 0.6976,
                "int8": 0.6949,
                "drop": 0.0027,
                "standard_error": 0.004,
                "samples": 128,
            },
            "per_layer": [
                {"name": "conv1", "sqnr_db": 41.0, "max_error": 0.02},
                {"name": "layer1.1.conv1", "sqnr_db": 35.0, "max_error": 0.1, "own_sqnr_db": 22.5},
                {"name": "layer4.1.conv2", "sqnr_db": 24.0, "max_error": 0.4},
                {"name": "fc", "sqnr_db": 28.4, "max_error": 0.31},
                {"name": "layer1.0.conv1", "sqnr_db": math.nan, "max_error": math.inf},
            ],
            "histograms": [
                {
                    "name": "layer1.1.conv1",
                    "input": {"low": 0.0, "high": 6.0, "counts": [90, 9, 0, 1], "clip": [-5.1, 5.0], "clipped": 0.01},
                    "weight": {
                        "low": -0.4,
                        "high": 0.5,
                        "counts": [1, 7, 6, 2],
                        "clip": [-0.5, 0.5],
                        "clipped": 0.0,
                        "clip_narrowest": [-0.1, 0.1],
                    },
                }
            ],
        },
        "benchmark": {
            "threads": 2,
            "rounds": 7,
            "configs": [
                {
                    "batch_size": size,
                    "float": {"median_ms": 32.1 * size, "spread_ms": 0.8, "min_ms": 31.0, "throughput_per_s": 31.2},
                    "int8": {"median_ms": 6.4 * size, "spread_ms": 0.1, "min_ms": 6.2, "throughput_per_s": 156.0},
                    "speedup": 5.015,
                }
                for size in (1, 16)
            ],
            "per_layer": [
                {"name": "x.quantize", "op": "quantize", "kernel": "host.quantize", "ms": 0.05},
                {"name": "layer1.0.conv1", "op": "conv_relu", "kernel": "host.igemm", "ms": 0.25},
                {"name": "layer1.1.conv1", "op": "conv_sum_relu", "kernel": "host.igemm", "ms": 0.75},
            ],
            "size": {"float_bytes": 46_758_048, "int8_bytes": 11_812_345, "ratio": 0.2526},
            "peak_memory_bytes": 812_000_000,
        },
        "gates": [
            {"name": "min_sqnr_db", "limit": 20.0, "value": 28.4, "passed": True, "text": "28.4 dB >= 20 dB"},
            {"name": "min_speedup", "limit": 6.0, "value": 5.0, "passed": False, "text": "5.015x is not >= 6x"},
        ],
        "baseline": {
            "artifact": "outputs/before",
            "verdict": "passed",
            "accuracy": {"sqnr_db": 29.0, "agreement": 0.953125, "metric": {"name": "top1", "int8": 0.6959}},
            "benchmark": {
                "threads": 2,
                "configs": [{"batch_size": 1, "int8": {"median_ms": 8.0, "spread_ms": 0.1}, "speedup": 4.0}],
                "size": {"int8_bytes": 11_812_345},
            },
            "int8_proof": {"coverage": 0.95},
            "differences": ["threads: 4 there, 2 here"],
        },
        "algorithms": [
            {
                "name": "equalize",
                "settings": {"samples": 128},
                "seconds": 2.5,
                "model": {"samples": 16, "before_db": 17.07, "after_db": 17.5, "all_db": None},
                "measure": "spread",
                "layers": [{"layer": "conv1", "before": 9.0, "after": 2.0, "note": ""}],
                "skipped": [],
            },
            {
                "name": "gptq",
                "settings": {"samples": 64},
                "seconds": 14.0,
                "model": {"samples": 16, "before_db": 17.5, "after_db": 17.5, "all_db": 11.25},
                "measure": "SQNR",
                "layers": [],
                "skipped": [{"layer": "fc", "reason": "rolled back, because it makes the whole model worse"}],
            },
        ],
        "stages": [{"name": "capture", "seconds": 2.1}, {"name": "calibrate", "seconds": 3.2}],
    }
