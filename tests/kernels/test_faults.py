"""Faults in a kernel's source, each of which executing the compiled kernel must report.

The tests run where compiled kernels are executed (see :mod:`executed`), and are skipped elsewhere.
"""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

import executed
import pytest
import torch
from device_code import copy_of

from fastadapt.kernels.transcoder import (
    CodeLayout,
    transcoder,
    triton_codes,
    triton_encode,
    triton_sums,
)

pytestmark = pytest.mark.skipif(executed.STAGE is None, reason="needs FASTADAPT_IR")

#: By title: module, function, text, its replacement, and the report.
FAULTS: dict[str, tuple[ModuleType, str, str, str, str]] = {
    "a store without a mask": (
        triton_sums,
        "sum_by_token",
        "tl.store(out_ptr + row * E + columns, total.to(out_ptr.dtype.element_ty), mask=inside)",
        "tl.store(out_ptr + row * E + columns, total.to(out_ptr.dtype.element_ty))",
        r"writes \d+ element\(s\) past the end of the tensor passed as `out_ptr`",
    ),
    "a load without a mask": (
        triton_encode,
        "mark",
        "z = tl.load(values_ptr + place, mask=inside, other=0.0)",
        "z = tl.load(values_ptr + place)",
        r"reads \d+ element\(s\) past the end of the tensor passed as `values_ptr`",
    ),
    "two programs that write the same sums": (
        triton_codes,
        "count_columns",
        "index = block * F + features\n    tl.store(blocks_ptr",
        "index = features\n    tl.store(blocks_ptr",
        r"program instances .* both touch element \d+ of `blocks_ptr`",
    ),
    "an output in the memory of an input": (
        triton_sums,
        "decode_sums",
        "out = table_FE.new_empty(N, E)",
        "out = table_FE.detach()[:N]",
        r"program instances .* both touch element \d+ of `(out|table)_ptr`",
    ),
    "an index that is read and never written": (
        triton_codes,
        "scan",
        "            tl.store(piece_offsets_ptr, 0)\n",
        "",
        r"kernel `sum_further_pieces`.* reads \d+ element\(s\)",
    ),
}


def step() -> None:
    """Run forward and backward: 300 tokens, and three features that are active on all of them."""
    N, D, E, F = 300, 8, 20, 320
    draw = torch.Generator().manual_seed(0)
    b_enc = torch.full((F,), -100.0)
    b_enc[[0, 33, 319]] = 100.0
    leaves = [
        torch.randn(N, D, generator=draw),
        torch.randn(F, D, generator=draw),
        b_enc,
        torch.randn(F, E, generator=draw),
        torch.randn(E, generator=draw),
    ]
    leaves = [leaf.requires_grad_() for leaf in leaves]
    plan = CodeLayout(dense=False, capacity=4 * N)
    result = transcoder(*leaves, activation="relu", plan=plan, implementation="triton")
    (result.out.square().sum() + result.penalty).backward()


@pytest.mark.usefixtures("poison")
def test_without_a_fault_nothing_is_reported() -> None:
    step()


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("title", FAULTS)
def test_a_fault_is_reported(title: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from ttsem.sanitize import KernelFault

    module, name, old, new, report = FAULTS[title]
    copy = copy_of(module, old, new, tmp_path)
    monkeypatch.setattr(module, name, getattr(copy, name))
    with pytest.raises(KernelFault, match=report):
        step()
