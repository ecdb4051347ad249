"""The range that loses the least information."""

from __future__ import annotations

import torch

from quantflow.numerics.observers.distribution import ZERO_BIN, AbstractDistributionObserver

#: Levels the kept bins are merged into: one sign of int8 for |x|, all 8 bits for signed values.
SYMMETRIC_LEVELS = 128
AFFINE_LEVELS = 256
#: Thresholds tried, about; they are evenly spaced and end at the largest |x|.
THRESHOLDS = 512


class EntropyObserver(AbstractDistributionObserver):
    """argmin over thresholds t of KL(P || Q): P is the histogram clipped to [-t, t], Q the same in few levels.

    symmetric: on the histogram of |x|. affine: on that of x, and an end of the data inside [-t, t] stays there.
    The bin at zero takes its larger neighbour's count: a ReLU's zeros are coded exactly and would drown the
    rest (as in NVIDIA's pytorch-quantization).

    Source: Migacz, "8-bit inference with TensorRT", GTC 2017; ONNX Runtime's entropy calibration.
    """

    def range(self) -> tuple[float, float]:
        self._require_observed()
        counts, zero, levels = self.distribution.counts.to(torch.float64), ZERO_BIN, AFFINE_LEVELS
        if self.is_symmetric:
            counts = counts[ZERO_BIN:] + counts.flip(0)[ZERO_BIN:]
            zero, levels = 0, SYMMETRIC_LEVELS
        counts[zero] = torch.maximum(counts[zero - 1], counts[zero + 1]) if zero else counts[1]
        occupied = counts.nonzero().flatten().tolist() or [zero]
        first, last = min(occupied[0], zero), max(occupied[-1], zero)
        farthest = max(zero - first, last - zero)
        reach = torch.arange(farthest, 0, -max(farthest // THRESHOLDS, 1))
        start, stop = (zero - reach).clamp(min=first), (zero + reach + 1).clamp(max=last + 1)
        enough = stop - start >= levels
        if not enough.any():
            return self.distribution.low, self.distribution.high
        divergence = _divergence(counts, start[enough], stop[enough], levels)
        best = int(reach[enough][divergence.argmin()])
        return self.clip((best + 1) * self.distribution.width)


def _divergence(counts: torch.Tensor, start: torch.Tensor, stop: torch.Tensor, levels: int) -> torch.Tensor:
    """KL(P || Q) for every pair of bounds [start, stop), in nats.

    P holds what lies beyond the bounds in its outermost bins; a bin of Q holds the mean over its level's
    occupied bins, without what lies beyond. With [.] a sum over a level's bins and both normalised,

        KL = sum p log p - sum_levels [p] log([q] / [occupied])

    so a pair costs one look-up per level in prefix sums. A level that has only clipped values gives inf.

    Args:
        counts: float64, shape (bins,).
        start, stop: int64, shape (pairs,), at least `levels` apart.

    Returns:
        float64, shape (pairs,).
    """
    mass, entropy, occupied = (
        torch.nn.functional.pad(term.cumsum(0), (1, 0))
        for term in (counts, torch.special.xlogy(counts, counts), (counts > 0).double())
    )
    total = mass[-1]
    below, above = mass[start], total - mass[stop]
    outer = torch.stack([counts[start], counts[stop - 1]])
    piled = outer + torch.stack([below, above])
    gained = torch.special.xlogy(piled, piled) - torch.special.xlogy(outer, outer)
    p_log_p = entropy[stop] - entropy[start] + gained.sum(0)

    edges = start[:, None] + (stop - start)[:, None] * torch.arange(levels + 1) // levels
    q = mass[edges].diff(dim=1)
    p, holds = q.clone(), occupied[edges].diff(dim=1)
    for column, bound in ((0, below), (-1, above)):
        p[:, column] += bound
        holds[:, column] += ((outer[column] == 0) & (bound > 0)).double()
    q_bin = q / (holds * (mass[stop] - mass[start])[:, None]).clamp(min=1)
    p_log_q = torch.special.xlogy(p, q_bin).sum(1)
    divergence: torch.Tensor = (p_log_p - p_log_q) / total - total.log()
    return divergence
