"""What this machine is, as results name it and as the kernels need to know."""

from __future__ import annotations

from pathlib import Path

import pytest

from quantflow.host import environment


@pytest.mark.parametrize(
    ("flags", "isa", "exact"),
    [
        ("fma avx2", ["avx2"], False),
        ("avx2 avx512f avx512bw avx512_bf16", ["avx2", "avx512f", "avx512_bf16"], False),
        ("avx2 avx_vnni", ["avx2", "avx_vnni"], True),
        ("avx2 avx512f avx512_vnni", ["avx2", "avx512f", "avx512_vnni"], True),
        ("amx_tile amx_int8", ["amx_int8"], True),
        ("", [], False),
    ],
)
def test_int8_products_are_exact_with_vnni_or_amx(
    flags: str, isa: list[str], exact: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text(f"processor : 0\nmodel name : Some CPU\nflags : {flags}\n")
    processor = environment._processor
    monkeypatch.setattr(environment, "_processor", lambda: processor(cpuinfo))
    assert environment.environment()["cpu"] == "Some CPU"
    assert environment.environment()["isa"] == environment.isa() == isa
    assert environment.has_exact_int8_products() is exact


def test_a_machine_that_does_not_say_what_it_is_has_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    processor = environment._processor
    monkeypatch.setattr(environment, "_processor", lambda: processor(tmp_path / "absent"))
    assert environment.isa() == []
    assert not environment.has_exact_int8_products()
