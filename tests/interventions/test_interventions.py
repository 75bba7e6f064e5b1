"""Ablation, isolation and addition to the target have exactly the documented effect."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

from fastadapt.adapter.module import AdapterConfig, TranscoderAdapter
from fastadapt.errors import UserError
from fastadapt.features.store.sets import FeatureSet
from fastadapt.interventions import Intervention, ablate, only, onto_target, scale_features
from fastadapt.models.replacement import ReplacementModel

L, F = 3, 24
IDS = torch.tensor([[5, 9, 23, 7, 31, 8, 11, 3], [2, 30, 12, 4, 4, 19, 6, 33]])
GREEDY = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
ACTIVATIONS = {
    "relu": AdapterConfig(F),
    "topk": AdapterConfig(F, "topk", k=4),
    "batch_topk": AdapterConfig(F, "batch_topk", k=4.5),
    "jumprelu": AdapterConfig(F, "jumprelu", bandwidth=0.4, initial_threshold=0.15),
}
#: A different number of features in each layer, and none in one layer.
PAIRS = [(0, 0), (0, 5), (0, 23), *((2, i) for i in range(0, 24, 2))]


def feature_set(pairs: list[tuple[int, int]] = PAIRS) -> FeatureSet:
    return FeatureSet.from_pairs(pairs, adapter="0" * 64, shape=(L, F), expression="hand")


@pytest.fixture
def make_model(make_pair: Callable) -> Callable[..., ReplacementModel]:
    """``make_model(activation, dtype, ...)``: a pair with random adapters in ``eval()`` mode."""

    def make(
        activation: str = "relu", dtype: str = "float32", implementation: str = "auto"
    ) -> ReplacementModel:
        config = replace(ACTIVATIONS[activation], implementation=implementation)
        model = ReplacementModel.create(make_pair("qwen2", dtype), config)
        generator = torch.Generator().manual_seed(3)
        with torch.no_grad():
            for p in model.adapters.parameters():
                p.add_(0.3 * torch.randn(p.shape, generator=generator).to(p.dtype))
            adapter: Any
            for adapter in model.adapters:
                if activation == "jumprelu":
                    adapter.threshold.abs_()
                if activation == "batch_topk":
                    adapter.update_threshold(torch.tensor(0.3))
        model.eval().requires_grad_(False)
        return model

    return make


@torch.no_grad()
def logits(model: ReplacementModel, adapters: nn.ModuleList | None = None) -> torch.Tensor:
    if adapters is not None:
        model.set_adapters(adapters)
    return model(IDS).logits


def without_rows(adapter: TranscoderAdapter, rows: list[int]) -> TranscoderAdapter:
    """Return a smaller adapter without the rows of these features."""
    retained = [i for i in range(F) if i not in rows]
    small = TranscoderAdapter(
        adapter.d_in, replace(adapter.config, n_features=len(retained)), dtype=adapter.W_enc.dtype
    )
    tensors = {
        name: tensor[retained] if name != "b_dec" and tensor.ndim else tensor
        for name, tensor in adapter.state_dict().items()
    }
    small.load_state_dict(tensors)
    return small.eval().requires_grad_(False)


def snapshot(model: ReplacementModel) -> list[torch.Tensor]:
    return [tensor.clone() for tensor in model.state_dict().values()]


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize(
    ("dtype", "implementation", "bound"),
    [
        ("float32", "reference", 1e-6),
        ("float32", "sparse", 1e-6),
        ("float64", "reference", 1e-13),
        ("float64", "sparse", 1e-13),
    ],
)
def test_an_ablated_feature_was_never_there(
    activation: str, dtype: str, implementation: str, bound: float, make_model: Callable
) -> None:
    model = make_model(activation, dtype, implementation)
    whole, features = model.adapters, feature_set()
    full = logits(model)
    removed = nn.ModuleList(
        without_rows(adapter, features.rows(layer)) for layer, adapter in enumerate(whole)
    )
    never = logits(model, removed)
    ablated = logits(model, ablate(whole, features))
    scale = never.abs().max()
    assert (ablated - never).abs().max() <= bound
    assert (full - never).abs().max() > 1e-2 * scale  # the set matters


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_only_the_empty_set_is_the_hybrid_with_b_dec(activation: str, make_model: Callable) -> None:
    """The whole adapter and the hybrid are the controls; nothing else may be empty."""
    model = make_model(activation)
    whole, full = model.adapters, logits(model)
    with model.mode("hybrid"):
        hybrid = logits(model)
    with torch.no_grad(), scale_features(model, ~feature_set([]), 0.0):
        live = model(IDS).logits
    bias = logits(model, only(whole, feature_set([])))
    assert torch.equal(bias, live)
    for mlp, adapter in zip(model.mlps, whole, strict=True):
        mlp.base.register_forward_hook(lambda *call, b=adapter.b_dec: call[2] + b)
    with model.mode("hybrid"):
        expected = logits(model)
    torch.testing.assert_close(bias, expected, rtol=0, atol=1e-6)
    assert all((bias - other).abs().max() > 1e-2 for other in (full, hybrid))


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_an_ablated_feature_never_fires(
    activation: str, training: bool, make_model: Callable
) -> None:
    model = make_model(activation)
    features = feature_set()
    x = 3 * torch.randn(2, 50, model.d_model)
    adapter: Any
    for layer, adapter in enumerate(ablate(model.adapters, features).train(training)):
        rows = features.rows(layer)
        _, aux = adapter(x)
        assert not aux.stats.feature_counts[rows].any()
        assert aux.stats.feature_counts.any()
        assert not adapter.encode(x)[..., rows].any()
        if activation == "jumprelu":  # an ablated feature is no inactive code either
            bare = without_rows(adapter, rows).train(training)
            assert aux.stats.n_codes == bare(x)[1].stats.n_codes


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_a_set_and_the_rest_are_the_whole(activation: str, make_model: Callable) -> None:
    model = make_model(activation, "float64")
    features = feature_set()
    x = torch.randn(2, 20, model.d_model, dtype=torch.float64)
    parts = only(model.adapters, features), only(model.adapters, ~features)
    for adapter, one, others in zip(model.adapters, *parts, strict=True):
        whole, apart = adapter(x)[0], one(x)[0] + others(x)[0] - adapter.b_dec
        if activation != "topk":
            torch.testing.assert_close(apart, whole, rtol=1e-13, atol=1e-13)
    # For every activation, only(~S) equals ablate(S).
    for mine, theirs in zip(parts[1], ablate(model.adapters, features), strict=True):
        for name, tensor in mine.state_dict().items():
            assert torch.equal(tensor, theirs.state_dict()[name]), name
    assert torch.equal(logits(model, parts[1]), logits(model, ablate(model.adapters, features)))


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_what_is_changed_is_the_rows_and_nothing_else(
    activation: str, make_model: Callable
) -> None:
    model = make_model(activation)
    before = snapshot(model)
    features = feature_set()
    old: Any
    new: Any
    for layer, (old, new) in enumerate(
        zip(model.adapters, ablate(model.adapters, features), strict=True)
    ):
        rows = features.rows(layer)
        retained = [i for i in range(F) if i not in rows]
        for name in ("W_enc", "b_enc", "W_dec"):
            assert not getattr(new, name)[rows].any()
            assert torch.equal(getattr(new, name)[retained], getattr(old, name)[retained])
        assert torch.equal(new.b_dec, old.b_dec)
    for old, new in zip(model.adapters, onto_target(model.adapters, features, -0.5), strict=True):
        assert not new.b_dec.any()
        rows = features.rows(list(model.adapters).index(old))
        assert torch.equal(new.W_dec[rows], -0.5 * old.W_dec[rows])
        assert torch.equal(new.W_enc[rows], old.W_enc[rows])
    assert all(map(torch.equal, before, snapshot(model)))


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_onto_the_target_with_scale_0_is_the_target(
    activation: str, dtype: str, make_model: Callable
) -> None:
    model = make_model(activation, dtype)
    with model.mode("target"):
        target = logits(model)
        written = model.generate(IDS, **GREEDY)
    with scale_features(model, feature_set(), 0.0, onto="target"):
        assert torch.equal(logits(model), target)
        assert torch.equal(model.generate(IDS, **GREEDY), written)
        with model.mode("hybrid"):  # the hybrid is the target, since the base is the target
            assert torch.equal(logits(model), target)
    with scale_features(model, feature_set(), -0.5, onto="target"):
        assert not torch.equal(logits(model), target)


@torch.no_grad()
def test_onto_the_target_is_the_target_with_the_set_added(make_model: Callable) -> None:
    """Compare with forward hooks on the target's MLPs that add the formula."""
    model = make_model("relu", "float64")
    features, whole = feature_set(), model.adapters
    with scale_features(model, features, -0.5, onto="target"):
        live = logits(model)
    hooks = []
    for layer, mlp in enumerate(model.mlps):

        def add(_module: Any, inputs: Any, output: Any, layer: Any = layer) -> Any:
            adapter, rows = whole[layer], features.rows(layer)
            a = (inputs[0] @ adapter.W_enc[rows].T + adapter.b_enc[rows]).relu()
            return output - 0.5 * a @ adapter.W_dec[rows]

        hooks.append(mlp.target.register_forward_hook(add))
    with model.mode("target"):
        torch.testing.assert_close(logits(model), live, rtol=1e-12, atol=1e-12)
    for hook in hooks:
        hook.remove()


# --- live -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_live_is_what_is_saved(activation: str, make_model: Callable) -> None:
    model = make_model(activation)
    features, whole = feature_set(), model.adapters
    ablated = logits(model, ablate(whole, features))
    model.set_adapters(whole)
    with scale_features(model, features, 0.0):
        assert torch.equal(logits(model), ablated)
    with scale_features(model, ~features, 0.0):
        alone = logits(model)
    assert torch.equal(logits(model, only(whole, features)), alone)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_factors_scale_rows_of_the_decoder(activation: str, make_model: Callable) -> None:
    model = make_model(activation)
    before, weights = logits(model), snapshot(model)
    factors = {**{(0, i): -2.0 for i in range(8)}, (2, 1): 0.0, (2, 7): 0.5}
    with scale_features(model, factors):
        inside = logits(model)
        assert torch.equal(model.mlps[0].adapter.W_dec[3], -2 * weights_of(model, weights, 0)[3])
        assert model.mlps[1].adapter is model.adapters[1]
    assert not torch.equal(inside, before)
    assert torch.equal(logits(model), before)
    with scale_features(model, dict.fromkeys(factors, 1.0)):
        assert torch.equal(logits(model), before)


def weights_of(model: ReplacementModel, weights: list[torch.Tensor], layer: int) -> torch.Tensor:
    names = list(model.state_dict())
    return weights[names.index(f"adapters.{layer}.W_dec")]


def test_contexts_nest_and_everything_is_as_before(make_model: Callable) -> None:
    model = make_model()
    features, held = feature_set(), model.adapters
    modules = [(mlp.base, mlp.adapter) for mlp in model.mlps]
    before, weights = logits(model), snapshot(model)
    with scale_features(model, features, 0.5):
        once = logits(model)
        with scale_features(model, features, 0.5):
            twice = logits(model)
            with scale_features(model, feature_set([(1, 1)]), 3.0, onto="target"):
                onto = logits(model)
            assert torch.equal(logits(model), twice)
        assert torch.equal(logits(model), once)
    with scale_features(model, features, 0.25):
        assert torch.equal(logits(model), twice)
    with scale_features(model, feature_set([(1, 1)]), 3.0, onto="target"):
        assert torch.equal(logits(model), onto)
    with (
        pytest.raises(RuntimeError, match="inside"),
        scale_features(model, features, 0.0, onto="target"),
    ):
        raise RuntimeError("inside")
    assert torch.equal(logits(model), before)
    assert all(map(torch.equal, weights, snapshot(model)))
    assert model.adapters is held
    assert [(mlp.base, mlp.adapter) for mlp in model.mlps] == modules
    assert not any(p.requires_grad for p in model.parameters())


# --- bad input ------------------------------------------------------------------------------------


def test_what_cannot_be_done_is_told(make_model: Callable, make_pair: Callable) -> None:
    model = make_model()
    held, before = model.adapters, snapshot(model)
    small = FeatureSet.from_pairs([(0, 1)], adapter="0" * 64, shape=(L, F + 1), expression="other")
    bad = {
        "the set hand is empty": lambda: ablate(model.adapters, feature_set([])),
        "expected 3 layers of 24 features, those of the adapter, got 3 of 25": lambda: only(
            model.adapters, small
        ),
        "expected a finite number, got nan": lambda: onto_target(
            model.adapters, feature_set(), float("nan")
        ),
        "scale: expected none with only, got 0.5": lambda: Intervention("only", 0.5),
        "expected one of ablate, only, onto-target": lambda: Intervention("remove"),  # type: ignore[arg-type]
    }
    live: dict[str, tuple[Any, ...]] = {
        "the set hand is empty": (feature_set([]), 0.0),
        "those of the adapter, got 3 of 25": (small, 0.0),
        "a saved set has no factors": (feature_set(),),
        "expected none with factors per feature, got 0.0": ({(0, 1): 2.0}, 0.0),
        "got feature 24 of layer 0": ({(0, 24): 2.0},),
        "got feature -1 of layer 0": ({(0, -1): 2.0},),
        "got feature 0 of layer 3": ({(3, 0): 2.0},),
        "expected a finite factor": ({(0, 0): float("inf")},),
        "expected at least one feature": ({},),
    }
    for message, call in bad.items():
        with pytest.raises(UserError, match=message):
            call()
    for message, arguments in live.items():
        with pytest.raises(UserError, match=message), scale_features(model, *arguments):
            pass
    with (
        pytest.raises(UserError, match="onto: expected"),
        scale_features(model, feature_set(), 0.0, onto="hybrid"),  # type: ignore[arg-type]
    ):
        pass
    assert model.adapters is held
    assert all(map(torch.equal, before, snapshot(model)))
    norms = ReplacementModel.create(make_pair("qwen2"), "norms")
    with (
        pytest.raises(UserError, match="they have no features"),
        scale_features(norms, feature_set(), 0.0),
    ):
        pass
    with pytest.raises(UserError, match="they have no features"):
        ablate(norms.adapters, feature_set())


def test_random_sets_of_any_size(make_model: Callable) -> None:
    """Sets may hold no feature of a layer, all features of a layer, or all features but one."""
    model = make_model("topk", "float64")
    whole, draw = model.adapters, random.Random(0)
    every = [(layer, i) for layer in range(L) for i in range(F)]
    with model.mode("hybrid"):
        hybrid = logits(model)
    for size in (1, F, len(every) - 1, len(every)):
        features = feature_set(draw.sample(every, size))
        model.set_adapters(whole)
        with scale_features(model, features, 0.0):
            live = logits(model)
        assert torch.equal(logits(model, ablate(whole, features)), live)
    for adapter in whole:
        adapter.b_dec.zero_()
    assert torch.equal(logits(model, ablate(whole, feature_set(every))), hybrid)
