"""Compile every custom SYCL kernel for Intel GPUs and report its size and its register spills. Needs no GPU.

    python native/kernels_gpu_check.py --library LIBRARY [--devices dg2 pvc] [--json FILE] [--spirv FOLDER]

The library compiles its kernels to SPIR-V (`qf_sycl_write_kernels`, on the CPU device), `ocloc` of Debian's package
intel-opencl-icd compiles that to machine code. Exit code 0: every kernel builds and spills nothing; 1: not so; 2: a
tool or the library is missing.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ENTRY = "__sycl_kernel_"
#: `usage` in .ze_info of memory per thread that holds arrays which no register could be indexed for, or the stack: as
#: slow as a spill. Every other usage (spill_fill_space, or single_space for both) means spills.
PRIVATE = "private_space"


@dataclasses.dataclass
class Row:
    """One kernel on one device."""

    kernel: str
    device: str
    instructions: int | None = None
    simd: int | None = None
    registers: int | None = None
    spill_bytes: int = 0
    private_bytes: int = 0
    error: str | None = None

    @property
    def passes(self) -> bool:
        return self.error is None and self.spill_bytes == 0 and self.private_bytes == 0


class Missing(Exception):
    """A tool or a library that this check needs."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--library", type=Path, required=True, help="libquantflow_sycl.so")
    parser.add_argument("--devices", nargs="+", default=["dg2", "pvc"], help="as `ocloc compile --help` lists them")
    parser.add_argument("--json", type=Path, help="write the table here")
    parser.add_argument("--spirv", type=Path, help="keep the SPIR-V files here")
    arguments = parser.parse_args()
    try:
        with tempfile.TemporaryDirectory() as scratch:
            spirv = (arguments.spirv or Path(scratch) / "spirv").absolute()
            spirv.mkdir(parents=True, exist_ok=True)
            write_spirv(arguments.library, spirv)
            environment = with_disassembler(Path(scratch))
            rows = [
                check(file, device, Path(scratch), environment)
                for device in arguments.devices
                for file in sorted(spirv.glob("qf_*.spv"))
            ]
    except Missing as error:
        print(error, file=sys.stderr)
        return 2
    print(table(rows))
    failed = [row for row in rows if not row.passes]
    if arguments.json:
        report = {
            "ocloc": version(),
            "passed": not failed,
            "kernels": [dataclasses.asdict(row) | {"passes": row.passes} for row in rows],
        }
        arguments.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    print(f"{len(rows)} builds, {len(failed)} failed or spilling" + (f" (ocloc {version()})" if version() else ""))
    return 1 if failed or not rows else 0


def write_spirv(library: Path, to: Path) -> None:
    """SPIR-V of all kernels, a file each. In a process of its own: SYCL's threads and caches stay out of this one."""
    script = (
        "import ctypes, sys\n"
        "error = ctypes.create_string_buffer(65536)\n"
        "write = ctypes.CDLL(sys.argv[1]).qf_sycl_write_kernels\n"
        "write.argtypes = [ctypes.c_char_p, ctypes.c_char_p, ctypes.c_size_t]\n"
        "if write(sys.argv[2].encode(), error, len(error)) != 0: sys.exit(error.value.decode())\n"
    )
    command = [sys.executable, "-c", script, str(library.absolute()), str(to)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise Missing(f"{library}: the kernels were not written: {done.stderr.strip()}")


def with_disassembler(scratch: Path) -> dict[str, str]:
    """The environment in which ocloc finds libiga64.so; Debian installs it as libiga64.so.1 only."""
    if shutil.which("ocloc") is None:
        raise Missing("ocloc is not installed: apt-get install intel-opencl-icd")
    (scratch / "iga").mkdir()
    listing = subprocess.run(["/sbin/ldconfig", "-p"], capture_output=True, text=True, check=False).stdout
    if found := re.search(r"libiga64\.so(?:\.\d+)? .*=> (\S+)", listing):
        (scratch / "iga" / "libiga64.so").symlink_to(found[1])
    return os.environ | {"LD_LIBRARY_PATH": f"{scratch / 'iga'}:{os.environ.get('LD_LIBRARY_PATH', '')}"}


def check(spirv: Path, device: str, scratch: Path, environment: dict[str, str]) -> Row:
    row = Row(spirv.stem, device)
    folder = scratch / device / spirv.stem
    folder.mkdir(parents=True)
    # The other container that ocloc writes tells nothing of spills.
    done = run(
        ["compile", "-spirv_input", "-file", str(spirv), "-device", device, "-out_dir", str(folder),
         "-output", spirv.stem, "-internal_options", "-cl-intel-allow-zebin"],
        environment,
    )  # fmt: skip
    binaries = sorted(folder.glob("*.bin"))
    if done.returncode != 0 or not binaries:
        row.error = (done.stdout + done.stderr).strip() or f"ocloc ended with {done.returncode}"
        return row
    dump = folder / "dump"
    dump.mkdir()
    done = run(["disasm", "-file", str(binaries[0]), "-device", device, "-dump", str(dump)], environment)
    info = dump / ".ze_info"
    if not info.exists():
        row.error = "ocloc disasm gave no .ze_info: " + (done.stdout + done.stderr).strip()
        return row
    text = info.read_text(encoding="utf-8")
    row.simd = first_number(text, "simd_size")
    row.registers = first_number(text, "grf_count")
    buffers = thread_memory(text)
    row.private_bytes = buffers.pop(PRIVATE, 0)
    row.spill_bytes = max(sum(buffers.values()), first_number(text, "spill_size") or 0)
    assembly = dump / f".text.{ENTRY}{spirv.stem}.asm"
    if not assembly.exists():
        row.error = "ocloc disasm gave no assembly (is libiga64 installed?)"
        return row
    row.instructions = instructions_in(assembly.read_text(encoding="utf-8"))
    return row


def run(command: list[str], environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["ocloc", *command], capture_output=True, text=True, check=False, env=environment)


def first_number(text: str, key: str) -> int | None:
    found = re.search(rf"\b{key}:\s*(\d+)", text)
    return int(found[1]) if found else None


def thread_memory(text: str) -> dict[str, int]:
    """Bytes per thread by usage, from .ze_info's `per_thread_memory_buffers`."""
    found: dict[str, int] = {}
    section = re.search(r"per_thread_memory_buffers:\s*\n((?:\s+(?:- )?\w+:\s.*\n)*)", text)
    for entry in re.split(r"\n\s+- ", "\n" + section[1]) if section else ():
        usage, size = re.search(r"\busage:\s*(\w+)", entry), re.search(r"\bsize:\s*(\d+)", entry)
        if usage and size:
            found[usage[1]] = found.get(usage[1], 0) + int(size[1])
    return found


def instructions_in(assembly: str) -> int:
    """Lines that are neither labels nor padding."""
    lines = (line.strip() for line in assembly.splitlines())
    return sum(1 for line in lines if line and not line.endswith(":") and not re.match(r"(nop|illegal|//)\b", line))


def version() -> str:
    done = subprocess.run(
        ["dpkg-query", "-W", "-f", "${Version}", "intel-opencl-icd"], capture_output=True, text=True, check=False
    )
    return done.stdout.strip()


def telling_line(text: str) -> str:
    lines = text.splitlines()
    return next((line for line in lines if "error" in line.lower()), lines[-1])[:100]


def table(rows: list[Row]) -> str:
    head = ("kernel", "device", "instructions", "SIMD", "registers", "spill B", "private B", "")
    body = [
        (
            row.kernel,
            row.device,
            *(("-" if v is None else str(v)) for v in (row.instructions, row.simd, row.registers)),
            str(row.spill_bytes),
            str(row.private_bytes),
            "" if row.passes else telling_line(row.error or "SPILLS"),
        )
        for row in rows
    ]
    widths = [max(len(line[i]) for line in (head, *body)) for i in range(len(head))]
    align = [str.ljust, str.ljust, *([str.rjust] * 5), str.ljust]
    return "\n".join(
        "  ".join(a(cell, width) for a, cell, width in zip(align, line, widths, strict=True)).rstrip()
        for line in (head, *body)
    )


if __name__ == "__main__":
    sys.exit(main())
