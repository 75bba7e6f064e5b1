"""The page for authors of other libraries: its code runs, and it lists every argument."""

from __future__ import annotations

import inspect
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from fastadapt.kernels import transcoder as op
from fastadapt.kernels.transcoder import transcoder

PAGE = (Path(__file__).parents[2] / "docs/library.md").read_text(encoding="utf-8")


def test_the_code_runs(capsys: pytest.CaptureFixture[str]) -> None:
    names: dict[str, Any] = {}
    blocks = re.findall(r"^```python\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
    assert len(blocks) == 5
    for code in blocks:
        exec(compile(code, "docs/library.md", "exec"), names)
    assert all(t.grad is not None for t in names["inputs"])
    (share,) = re.findall(r"(\d+)% of the dense", capsys.readouterr().out)
    assert 5 <= int(share) <= 10  # 16 codes of 20 bytes, of 1024 entries of 4 bytes, and offsets
    assert not names["plan"].dense
    assert torch.equal(names["again"].out, names["result"].out)
    assert names["dense_activations"].shape == (4, 128, 1024)


def test_the_tables_list_every_argument_and_result() -> None:
    rows = re.findall(r"^\| (`\w+`(?:, `\w+`)*) \|", PAGE, re.MULTILINE)
    listed = [name for row in rows for name in re.findall(r"\w+", row)]
    for name in (*inspect.signature(transcoder).parameters, *op.TranscoderOutput._fields):
        assert name in listed, name


def test_what_is_public_is_there() -> None:
    """The interface of other libraries: additions are a decision, removals break them."""
    assert op.__all__ == [
        "ACTIVATIONS",
        "IMPLEMENTATIONS",
        "L1",
        "PENALTIES",
        "SAVED_OPS",
        "SMALL_ENTRIES",
        "CodeLayout",
        "Penalty",
        "SparseCodes",
        "TranscoderOutput",
        "TranscoderStats",
        "plan_for",
        "should_save",
        "transcode",
        "transcoder",
    ]
    positional = ("x", "W_enc", "b_enc", "W_dec", "b_dec")
    for function in (transcoder, op.transcode):
        parameters = inspect.signature(function).parameters
        assert tuple(parameters)[:5] == positional
        for name, parameter in list(parameters.items())[5:]:
            assert parameter.kind is parameter.KEYWORD_ONLY, name
            assert parameter.default is not parameter.empty, name
