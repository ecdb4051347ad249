from __future__ import annotations

import pytest
import torch
from torch import nn

from quantflow.errors import DataError
from quantflow.sources.data import Batch
from quantflow.sources.models import estimate_batchnorm


def test_statistics_are_the_average_over_the_batches() -> None:
    module = nn.Sequential(nn.BatchNorm2d(3), nn.Dropout()).eval()
    x = torch.randn(6, 3, 4, 5) * 3 + 2
    seen: list[tuple[int, int | None]] = []
    batches = [Batch((x[:3],)), Batch((x[3:],))]
    estimate_batchnorm(module, batches, lambda done, total: seen.append((done, total)))
    assert seen == [(1, 2), (2, 2)]
    means = torch.stack([part.mean((0, 2, 3)) for part in (x[:3], x[3:])])
    variances = torch.stack([part.var((0, 2, 3)) for part in (x[:3], x[3:])])
    torch.testing.assert_close(module[0].running_mean, means.mean(0))
    torch.testing.assert_close(module[0].running_var, variances.mean(0))
    assert module[0].momentum == 0.1
    assert not any(m.training for m in module.modules())


def test_a_deep_stack_of_random_layers_becomes_sane() -> None:
    torch.manual_seed(0)
    layers = [m for _ in range(12) for m in (nn.Linear(32, 32, bias=False), nn.BatchNorm1d(32), nn.ReLU())]
    module = nn.Sequential(*layers[:-1]).eval()
    x = torch.randn(64, 32) * 10
    assert module(x).std() < 0.05
    estimate_batchnorm(module, [Batch((x,))])
    assert module(x).std().item() == pytest.approx(1, abs=0.1)


def test_modes_are_restored_after_an_error() -> None:
    module = nn.Sequential(nn.BatchNorm1d(2), nn.Linear(2, 2)).eval()
    with pytest.raises(RuntimeError):
        estimate_batchnorm(module, [Batch((torch.zeros(4, 9),))])
    assert not module[0].training
    assert module[0].momentum == 0.1


def test_lonely_samples_are_left_out_of_larger_batches() -> None:
    module = nn.BatchNorm1d(2).eval()
    x = torch.randn(5, 2)
    estimate_batchnorm(module, [Batch((x[:4],)), Batch((x[4:],))])
    torch.testing.assert_close(module.running_mean, x[:4].mean(0))


def test_batches_that_say_nothing() -> None:
    with pytest.raises(DataError, match="no calibration batch"):
        estimate_batchnorm(nn.BatchNorm1d(2), [])
    with pytest.raises(DataError, match=r"data\.batch_size=2 or more"):
        estimate_batchnorm(nn.BatchNorm1d(2), [Batch((torch.zeros(1, 2),))])
    spatial = nn.BatchNorm2d(2).eval()
    estimate_batchnorm(spatial, [Batch((torch.ones(1, 2, 3, 3),))])
    assert spatial.running_mean.tolist() == [1.0, 1.0]
