"""The logit lens, compared with float64, and the texts of tokens."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from organism_runs import make_run

from fastadapt.errors import RunError
from fastadapt.evaluation.models_under_test import ModelSet
from fastadapt.features.collect import CollectConfig, collect
from fastadapt.features.store import logit_lens as logit_lens
from fastadapt.features.store.logit_lens import lens, token_strings
from fastadapt.models.pretrained import load_tokenizer
from fastadapt.organism import resolve


@pytest.mark.parametrize("demeaned", [True, False])
@pytest.mark.parametrize("chunk", [1, 100, 2**25])
def test_both_ends_against_float64(
    demeaned: bool, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logit_lens, "_CHUNK_ENTRIES", chunk)
    head, rows = torch.randn(50, 8), torch.randn(7, 8)
    ids, logits = lens(head, rows, demeaned=demeaned)
    exact = rows.double() @ head.double().T
    if demeaned:
        exact -= exact.mean(1, keepdim=True)
    assert ids.shape == logits.shape == (7, 2, 10)
    for unit, of_unit in enumerate(exact):
        order = of_unit.argsort(descending=True)
        assert ids[unit, 0].tolist() == order[:10].tolist()
        assert ids[unit, 1].tolist() == order.flip(0)[:10].tolist()
    torch.testing.assert_close(logits.flatten(1), exact.gather(1, ids.flatten(1)).float())


def test_equal_logits_are_ordered_by_token() -> None:
    """A decoder row of zeros has equal logits, so both lists begin with the first tokens."""
    ids, logits = lens(torch.randn(30, 4), torch.zeros(2, 4))
    assert not logits.any()
    assert ids.tolist() == [[list(range(10))] * 2] * 2
    few, _ = lens(torch.tensor([[1.0], [3.0], [3.0]]), torch.ones(1, 1))
    assert few.tolist() == [[[1, 2, 0], [0, 1, 2]]]


@pytest.mark.parametrize("value", [torch.nan, torch.inf, 1e38])
@pytest.mark.parametrize("of_head", [True, False])
def test_logits_that_are_not_finite_are_refused(value: float, of_head: bool) -> None:
    """Such logits have no order. The last value is finite but overflows in the products."""
    head, rows = torch.randn(30, 4), torch.randn(2, 4)
    head[3, 1] = rows[1, 2] = 1e3
    (head if of_head else rows)[0] = value
    with pytest.raises(RunError, match="a logit of the lens is NaN or infinite"):
        lens(head, rows * 50)


def test_strings_are_as_in_a_text() -> None:
    tokenizer = load_tokenizer(resolve("organism/target"), None, False)
    ids = tokenizer("wait , 4 + 5 = 9", add_special_tokens=False)["input_ids"]
    strings = token_strings(tokenizer, len(tokenizer) + 3)
    assert "".join(strings[i] for i in ids).strip() == "wait , 4 + 5 = 9"
    assert strings[-3:] == [f"<{len(tokenizer) + i}>" for i in range(3)]
    assert all(strings)


@pytest.mark.parametrize("demeaned", [True, False])
def test_a_store_records_the_settings_of_the_lens(tmp_path: Path, demeaned: bool) -> None:
    run = make_run(tmp_path / "run", n_features=5, l0=2.0)
    store = collect(run, None, CollectConfig(n=3, demeaned=demeaned))
    assert store is not None
    assert store.manifest["lens"] == {"demeaned": demeaned, "final_norm": False}
    model: Any = ModelSet.open([run], device="cpu").model
    ids, logits = lens(model.head, model.adapters[2].W_dec.detach(), demeaned=demeaned)
    rows = store.read("lens", layer=2).to_pylist()
    strings = store.read("tokens")["string"].to_pylist()
    for feature, row in enumerate(rows):
        assert row["promoted"] == ids[feature, 0].tolist()
        assert row["suppressed_logits"] == logits[feature, 1].tolist()
        assert row["promoted_tokens"] == [strings[i] for i in row["promoted"]]
        assert row["suppressed_tokens"] == [strings[i] for i in row["suppressed"]]
