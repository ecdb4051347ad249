"""Recipes that these tests compose."""

from __future__ import annotations

from pathlib import Path

#: A name that ships.
RECIPE = "resnet18_sym_int8"

#: A file of the user's own.
PLAIN = """
# What mine is for
model: {kind: torchvision, name: resnet18, weights: random}
data: {kind: folder, path: photos, calibration: 8}
qconfig: {activation: {dtype: uint8, qscheme: affine, observer: mse}, weight: {granularity: per_tensor}}
mode: torchscript
device: {kind: cpu}
layers: {"layer4.*": float, fc: {weight: {observer: mse}}}
gates: {min_sqnr_db: 20}
"""


def write(folder: Path, name: str, text: str) -> Path:
    file = folder / name
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text)
    return file
