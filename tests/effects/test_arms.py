"""Every model of a comparison, against models that are assembled by hand."""

from __future__ import annotations

import copy
import math
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch
from by_hand import ByHand, F, L, TinyRun, models_by_hand, random_adapters

from fastadapt.effects.activity import activity_of
from fastadapt.effects.arms import arms_of
from fastadapt.effects.run import load_run
from fastadapt.errors import UserError
from fastadapt.evaluation.contrast.measure import log_odds_of, read
from fastadapt.evaluation.faithfulness.texts import Text

SET = "0/3,1/0,1/7,2/11"
PAIRS = [(0, 3), (1, 0), (1, 7), (2, 11)]


def scaled(selected: float, others: float) -> Any:
    """Return the tiny run's adapters with their decoder rows scaled."""
    adapters = random_adapters()
    adapter: Any
    with torch.no_grad():
        for layer, adapter in enumerate(adapters):
            factors = torch.full((F, 1), others)
            factors[[i for other, i in PAIRS if other == layer]] = selected
            adapter.W_dec.mul_(factors)
    return adapters


def arms_by_hand(run: TinyRun) -> dict[str, Any]:
    models = models_by_hand(run, random_adapters())
    for name, factors in {
        "bias": (0.0, 0.0),
        f"ablate {SET}": (0.0, 1.0),
        f"only {SET}": (1.0, 0.0),
        f"{SET} × 2": (2.0, 1.0),
    }.items():
        models[name] = models_by_hand(run, scaled(*factors))["adapter"]
    onto = copy.deepcopy(models["target"])
    for block, adapter in zip(onto.model.layers, scaled(-0.5, 0.0), strict=True):
        torch.nn.init.zeros_(adapter.b_dec)
        block.mlp = ByHand(block.mlp, adapter)
    models[f"target + {SET} × -0.5"] = onto
    return models


def random_texts(seed: int) -> list[Text]:
    draw = torch.Generator().manual_seed(seed)
    return [
        Text(f"t{i}", torch.randint(3, 40, (n,), generator=draw).tolist(), 1)
        for i, n in enumerate((9, 5, 12))
    ]


def test_probabilities_equal_those_by_hand(
    tiny_run: TinyRun, tmp_path: Path, float64_clean: None
) -> None:
    run = load_run(tiny_run.folder, dtype="float64", device="cpu")
    texts = random_texts(2)
    sites, words = [(0, 2), (0, 7), (1, 4), (2, 0), (2, 11)], [5, 17]
    expected = arms_by_hand(tiny_run)
    arms = arms_of(run, [SET], base=True, factors=[2.0], scales=[-0.5], draws=0)
    assert {arm.name for arm in arms} == expected.keys()
    for arm in arms:
        (reader,) = arm.readers
        odds = read(reader, texts, sites, log_odds_of([words], "model"), tmp_path)
        assert odds is not None
        for (t, position), value in zip(sites, odds[:, 0].tolist(), strict=True):
            with torch.no_grad():
                logits = expected[arm.name](torch.tensor([texts[t].ids])).logits[0, position]
            weights = [math.exp(x) for x in logits.tolist()]
            p = math.fsum(weights[i] for i in words) / math.fsum(weights)
            assert abs(1 / (1 + math.exp(-value)) - p) < 1e-12, arm.name
    # The models differ, and an intervention leaves the run as it was.
    assert len({arm.readers[0].fingerprint for arm in arms}) == len(arms)
    assert [mlp.adapter for mlp in run.model.mlps] == list(run.model.adapters)


def test_activity_equals_that_by_hand(
    tiny_run: TinyRun, tmp_path: Path, float64_clean: None
) -> None:
    """Batches are padded; by hand, each text alone goes through the adapters' own formula."""
    run = load_run(tiny_run.folder, dtype="float64", device="cpu")
    texts = random_texts(3)
    sites = [(t, p) for t, text in enumerate(texts) for p in range(len(text.ids))]
    arms = arms_of(run, [SET], base=False, factors=[], scales=[], draws=0)
    (chosen,) = next(arm.members for arm in arms if arm.kind == "ablate")
    (reader,) = next(arm.readers for arm in arms if arm.name == "adapter")
    got = read(reader, texts, sites, activity_of(run.model, [chosen, ~chosen]), tmp_path)
    assert got is not None
    expected = []
    for text in texts:
        total = torch.zeros(len(text.ids), 2, dtype=torch.float64)
        with reader.opened() as model, ExitStack() as hooks:
            inputs: list[torch.Tensor] = []
            adapter: Any
            for adapter in run.model.adapters:
                handle = adapter.register_forward_pre_hook(
                    lambda _, x, into=inputs: into.append(x[0])
                )
                hooks.callback(handle.remove)
            with torch.no_grad():
                model(torch.tensor([text.ids]))
            for layer, (x, adapter) in enumerate(zip(inputs, run.model.adapters, strict=True)):
                a = (x[0] @ adapter.W_enc.T + adapter.b_enc).relu() * adapter.W_dec.norm(dim=1)
                is_chosen = torch.tensor([(layer, i) in chosen for i in range(a.shape[1])])
                total += torch.stack([a[:, is_chosen].sum(1), a[:, ~is_chosen].sum(1)], 1)
        expected.append(total)
    torch.testing.assert_close(got, torch.cat(expected), rtol=1e-12, atol=1e-12)
    assert (got[:, 0] > 0).any()


def test_references(tiny_run: TinyRun) -> None:
    run = load_run(tiny_run.folder, device="cpu")
    arms = arms_of(run, [SET], base=False, factors=[], scales=[-0.5], draws=0)
    assert {arm.name: (arm.reference, arm.features) for arm in arms} == {
        "target": (None, None),
        "hybrid": (None, None),
        "adapter": (None, None),
        "bias": (None, 0),
        f"ablate {SET}": ("adapter", 4),
        f"only {SET}": ("bias", 4),
        f"target + {SET} × -0.5": ("target", 4),
    }


@pytest.mark.parametrize(
    ("sets", "draws", "message"),
    [
        ([f"{L}/0"], 0, f"expected layers 0 to {L - 1} and features 0 to {F - 1}"),
        (["0/3"], 1, "run fastadapt features collect first, or pass --draws 0"),
        (["a/b"], 0, "expected a feature as LAYER/NUMBER"),
    ],
)
def test_impossible_sets(tiny_run: TinyRun, sets: list[str], draws: int, message: str) -> None:
    run = load_run(tiny_run.folder, device="cpu")
    with pytest.raises(UserError, match=message):
        arms_of(run, sets, base=False, factors=[], scales=[], draws=draws)
