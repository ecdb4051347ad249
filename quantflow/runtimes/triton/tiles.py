"""Tiles of the implicit GEMM: which are worth trying for a product, the most promising first.

A tile is (BM, BN, BK, GROUP, SPLIT, warps, stages), as a tuner keeps it.
"""

from __future__ import annotations

from quantflow.runtimes.triton.tuner import Way

#: BM, BN, BK, warps, stages.
_SHAPES = (
    (128, 64, 256, 4, 2), (64, 64, 256, 4, 2), (128, 128, 256, 4, 2), (256, 64, 256, 8, 2), (128, 256, 128, 8, 3),
    (128, 256, 64, 8, 4), (256, 128, 64, 8, 4), (128, 128, 128, 8, 3), (128, 128, 64, 4, 4),
    (128, 128, 64, 8, 4), (256, 64, 64, 8, 4), (128, 64, 128, 4, 4), (128, 64, 64, 4, 4), (128, 64, 64, 8, 4),
    (64, 128, 64, 8, 4), (64, 128, 128, 4, 4), (64, 128, 64, 4, 4), (64, 64, 128, 4, 4), (64, 64, 64, 4, 4),
    (128, 32, 64, 4, 4), (64, 32, 128, 4, 4), (32, 64, 128, 4, 4), (32, 32, 128, 4, 4), (16, 64, 256, 4, 4),
    (128, 128, 128, 4, 3), (64, 256, 64, 4, 4), (64, 256, 128, 4, 3), (64, 128, 128, 4, 3),
    (16, 128, 128, 4, 4), (16, 32, 256, 2, 4), (16, 64, 128, 4, 4), (16, 32, 128, 2, 4), (256, 64, 32, 8, 4),
    (128, 64, 32, 4, 4), (64, 64, 32, 4, 4), (64, 32, 32, 4, 4), (128, 32, 32, 4, 4), (128, 16, 32, 4, 4),
    (32, 32, 32, 4, 4), (16, 16, 32, 2, 2),
)  # fmt: skip
_SPLITS = (1, 2, 4, 8, 16)
#: How many are measured.
TRIED = 12
#: Fits where the least is known of the device: no register spills on Intel's, little shared memory.
SAFE: Way = (64, 64, 32, 4, 1, 4, 2)
_GROUP = 8
#: Of one multiprocessor of a recent card, as far as an order of candidates needs them: products per ns, bytes per ns
#: from the cache it shares, ns until a block's operands arrive, ns to start and finish a tile.
_PRODUCTS, _BYTES, _LATENCY, _START = 4000.0, 45.0, 250.0, 1500.0


def _power(value: int) -> int:
    return 1 << max(0, value - 1).bit_length()


def candidates(m: int, n: int, c: int, taps: int, groups: int, multiprocessors: int) -> list[Way]:
    """Ways for M x N results per group, each a sum over taps x C products; by a rough estimate of their time."""
    found: list[tuple[float, Way]] = []
    for bm, bn, bk, warps, stages in _SHAPES:
        if bm > max(16, _power(m)) or bn > max(16, _power(n)) or bk > max(32, _power(c)):
            continue
        tiles = -(-m // bm) * -(-n // bn) * groups
        blocks = taps * -(-c // bk)
        stages = min(stages, blocks + 1)
        for split in _SPLITS:
            if split > 1 and (blocks < 4 * split or tiles * split > 2 * multiprocessors):
                continue
            share = -(-blocks // split)
            per_block = max(bm * bn * bk / _PRODUCTS, (bm + bn) * bk / _BYTES)
            resident = max(1, min(8 // max(1, warps // 2), 200_000 // ((bm + bn) * bk * stages)))
            # Programs beside each other on a multiprocessor hide each other's waiting, not each other's work.
            waves = -(-tiles * split // (multiprocessors * resident))
            beside = min(resident, -(-tiles * split // multiprocessors))
            one = _START + share * max(per_block * beside, _LATENCY / min(stages, share)) + _LATENCY
            one += bm * bn * (4 * 2 if split > 1 else 1) / _BYTES + (2500 if split > 1 else 0)
            # Eight warps wait for each other longer than four.
            found.append((waves * one * (1.2 if warps > 4 else 1.0), (bm, bn, bk, _GROUP, split, warps, stages)))
    found.sort()
    chosen = [way for _, way in found[:TRIED]]
    return chosen or [SAFE]
