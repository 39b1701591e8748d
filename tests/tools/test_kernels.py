"""What `make test` says at its head of the machine it runs on."""

from __future__ import annotations

import pytest

from node.engine.kernels.kernel_probe import refusal
from node.engine.model.linear import KERNELS
from tools import kernels


def test_every_kernel_for_cpus_is_told_of_once_with_the_reason_where_it_does_not_run() -> None:
    lines = kernels.report()
    for name, kernel in KERNELS.items():
        told = [line for line in lines if name in line.replace(":", ",").replace(",", " ").split()]
        if kernel.attention:
            assert not told
            continue
        (line,) = told
        reason = refusal(kernel)
        assert (
            line.startswith("kernels that do not: ") and line.endswith(reason) if reason else line.startswith("kernels that run")
        )


def test_a_machine_without_a_compiler_is_told_of(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "native", lambda: None)
    monkeypatch.setattr(kernels, "absence", lambda: "no C compiler: looked for cc, gcc, clang")
    monkeypatch.setattr(kernels, "refusal", lambda kernel: "no C compiler" if kernel.compiled else "")
    monkeypatch.setattr(kernels, "compilers", list)
    lines = kernels.report()
    assert "C compilers: none" in lines
    assert "compiled kernel: none (no C compiler: looked for cc, gcc, clang)" in lines
    (missing,) = [line for line in lines if line.startswith("kernels that do not")]
    assert missing.startswith("kernels that do not: mesh-bf16, mesh-fp32,") and missing.endswith(": no C compiler")
