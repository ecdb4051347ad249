"""Compile the Triton kernels for Intel's pvc down to machine code, on a machine that has no GPU.

    pip install --pre --no-deps --target DIR triton-xpu==3.3.0b1     (Python 3.11; it occupies the name `triton`)
    PYTHONPATH=DIR python tests/runtimes/triton_runtime/compile_for_intel.py

Needs `ocloc` (Debian: intel-opencl-icd). Every launch that the programs below make is compiled instead of run, with the
tile that is safe everywhere. Fails where one does not compile, where a convolution, linear or product has no int8
matrix instruction, or where registers spill. It stands in for a driver in two places only: where libsycl lies, and
which device is there.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import triton
import triton.backends.intel.driver as driver
from triton.backends import backends
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

from quantflow.ir.program import Program
from quantflow.runtimes.triton import devices, layers
from quantflow.schema import PRESETS
from quantflow.tasks.selftest import quantized_program, selftest_programs

driver.find_sycl = lambda include: (include, [tempfile.gettempdir()])
DEVICE = "pvc"
#: Kernels that multiply codes.
PRODUCTS = ("convolution", "matmul")
OPTIONS = {"num_warps": 8, "threads_per_warp": 16, "grf_mode": "large"}
_TYPES = {torch.int8: "*i8", torch.uint8: "*u8", torch.float32: "*fp32", torch.int32: "*i32", torch.int64: "*i64",
          torch.bfloat16: "*bf16", torch.float16: "*fp16"}  # fmt: skip
rows: dict[Any, dict[str, Any]] = {}


def compile_launch(self: JITFunction, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:  # noqa: ARG001
    """What a launch would compile, in place of it."""
    names = [parameter.name for parameter in self.params]
    given = dict(zip(names, args, strict=False)) | {k: v for k, v in kwargs.items() if k in names}
    signature, constants, attributes = {}, {}, {}
    for place, parameter in enumerate(self.params):
        value = given[parameter.name]
        # Triton 3.6 refuses that, this one does not.
        assert not (parameter.is_constexpr and parameter.do_not_specialize), f"{self.fn.__name__}: {parameter.name}"
        if parameter.is_constexpr:
            signature[parameter.name], constants[(place,)] = "constexpr", value
        elif isinstance(value, torch.Tensor):
            signature[parameter.name] = _TYPES[value.dtype]
            attributes[(place,)] = [["tt.divisibility", 16]]
        elif isinstance(value, int):
            signature[parameter.name] = "i32"
            if value % 16 == 0 and not parameter.do_not_specialize:
                attributes[(place,)] = [["tt.divisibility", 16]]
        else:
            signature[parameter.name] = "fp32"
    key = (self.fn.__name__, *signature.values(), *map(str, constants.values()), *attributes)
    if key not in rows:
        source = ASTSource(fn=self, signature=signature, constexprs=constants, attrs=attributes)
        flags = [names[place[0]] for place, value in constants.items() if value is True]
        rows[key] = {"kernel": self.fn.__name__, "flags": " ".join(flags), **machine_code(source)}


def machine_code(source: ASTSource) -> dict[str, Any]:
    """{"bytes", "matrix", "spills", "error"} of one kernel."""
    backend = backends["intel"].compiler
    arch = type("Arch", (), {"parse_device_arch": staticmethod(lambda _: DEVICE)})
    backend.__init__.__globals__["compile_module_from_src"] = lambda *_: arch
    backend.device_props = {DEVICE: {}}
    properties = dict(
        name=DEVICE, has_subgroup_matrix_multiply_accumulate=True, has_bfloat16_conversions=True,
        max_work_group_size=1024, max_num_sub_groups=64, sub_group_sizes=[16, 32], has_subgroup_2d_block_io=True,
    )  # fmt: skip
    compiled = triton.compile(source, target=GPUTarget("xpu", properties, 32), options=OPTIONS)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "kernel.spv")
        file.write_bytes(compiled.asm["spv"])
        command = ["ocloc", "compile", "-spirv_input", "-file", str(file), "-device", DEVICE]
        done = subprocess.run(
            [*command, "-options", "-cl-intel-256-GRF-per-thread"],
            cwd=folder,
            capture_output=True,
            text=True,
            check=False,
        )
        size = sum(path.stat().st_size for path in Path(folder).glob("*.bin"))
    log = done.stdout + done.stderr
    return {
        "bytes": size,
        "matrix": len(re.findall(r"intel_sub_group_i8_i8_matrix_mad_k32", compiled.asm["llir"])),
        "spills": sum(map(int, re.findall(r"spilled around (\d+)", log))),
        "error": "" if done.returncode == 0 and size else log.strip()[-300:],
    }


class Net(torch.nn.Module):
    """What the small programs lack: a stem on framed codes, residuals, groups, volumes, a layer norm with codes."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.a = torch.nn.Conv2d(3, 32, 7, 2, 3), torch.nn.Conv2d(32, 32, 3, padding=1)
        self.b, self.c = torch.nn.Conv2d(32, 32, 3, padding=1, groups=4), torch.nn.Conv3d(1, 4, 3, padding=1)
        self.norm, self.fc = torch.nn.LayerNorm(32), torch.nn.Linear(32, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.stem(x))
        x = torch.nn.functional.gelu(self.b(torch.relu(self.a(x) + x)) + x)
        rows = x.flatten(2).transpose(1, 2)
        return self.fc(self.norm(rows + rows.flip(1))).sum() + self.c(x.unsqueeze(1)).sum()


class Attends(torch.nn.Module):
    """Attention from and to int8 linears, with a mask; in half precision it is a kernel."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.qkv, self.out = torch.nn.LayerNorm(64), torch.nn.Linear(64, 192), torch.nn.Linear(64, 64)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, length, width = x.shape
        q, k, v = self.qkv(self.norm(x)).reshape(batch, length, 3, 1, 64).permute(2, 0, 3, 1, 4).unbind(0)
        mask = (x.sum(-1) > 0)[:, None, None, :]
        y = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return x + self.out(y.transpose(1, 2).reshape(batch, length, width))


def programs() -> Iterator[tuple[str, Program]]:
    """A small program for each kernel, and nets in each way of coding activations."""
    kinds = ("linear", "conv", "depthwise", "fused", "quantize", "dequantize", "add", "mul", "matmul", "max_pool",
             "avg_pool")  # fmt: skip
    yield from ((key, program) for key, program in selftest_programs() if key.split()[0] in kinds)
    for name in ("sym_int8", "affine_uint8"):
        yield name, quantized_program(Net(), torch.randn(2, 3, 32, 32), PRESETS[name])
    yield "attention", quantized_program(Attends(), torch.randn(2, 48, 64))


def main() -> int:
    """0 if every kernel compiled as it must."""
    JITFunction.run = compile_launch
    torch.manual_seed(0)
    for tile in (layers.SAFE, (*layers.SAFE[:4], 4, *layers.SAFE[5:])):
        layers.SAFE = tile
        for name, program in programs():
            inputs = [torch.zeros([2 if not isinstance(s, int) else s for s in i.shape], dtype=getattr(torch, i.dtype))
                      for i in program.inputs]  # fmt: skip
            try:
                for floats in ("float32", "bfloat16"):
                    devices.build(program, "cpu", floats)(inputs)
            except Exception as error:  # noqa: BLE001 every kernel is listed
                failure = {"bytes": 0, "matrix": 0, "spills": 0, "error": f"{type(error).__name__}: {str(error)[:300]}"}
                rows[name] = {"kernel": name, "flags": "", **failure}
    print(f"{'kernel':24}{'bytes':>8}{'int8 matrix':>13}{'spills':>8}  flags")
    failed = 0
    for row in rows.values():
        no_matrix = row["kernel"] in PRODUCTS and not row["matrix"]
        failed += bool(row["error"] or no_matrix or row["spills"])
        why = row["error"] or ("NO INT8 MATRIX INSTRUCTION" if no_matrix else "SPILLS" if row["spills"] else "")
        print(f"{row['kernel']:24}{row['bytes']:8}{row['matrix']:13}{row['spills']:8}  {row['flags']} {why}")
    print(f"{len(rows)} kernels compiled for {DEVICE}, {failed} not as they must")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
