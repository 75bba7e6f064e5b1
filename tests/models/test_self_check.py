"""The block-by-block traversal equals the model's own forward, or raises an error."""

from __future__ import annotations

from collections.abc import Callable
from types import MethodType
from typing import Any

import pytest
import torch
from torch import Tensor

from fastadapt.adapter.module import AdapterConfig
from fastadapt.batch import Batch
from fastadapt.errors import RunError
from fastadapt.models.architectures import ARCHITECTURES
from fastadapt.models.recompute import POLICIES
from fastadapt.models.replacement import Mode, ReplacementModel
from fastadapt.models.self_check import check_traversal
from fastadapt.objective import ObjectiveConfig, objective

IDS = torch.tensor([[5, 9, 23, 7, 31, 8], [3, 4, 8, 0, 0, 0]])
PADDED = Batch(IDS, IDS > 0, IDS)
WHOLE = Batch(IDS[:1], None, IDS[:1])
UNMASKED = PADDED._replace(passes_mask=False)
MODES = ("target", "hybrid", "replacement")


def model_of(pair: Any, kind: str = "transcoder", activation: str = "relu") -> ReplacementModel:
    more: dict[str, dict[str, Any]] = {
        "topk": {"k": 4},
        "batch_topk": {"k": 4},
        "jumprelu": {"bandwidth": 0.01, "initial_threshold": 0.01},
    }
    transcoder = AdapterConfig(24, activation=activation, **more.get(activation, {}))
    config: Any = transcoder if kind == "transcoder" else kind
    model = ReplacementModel.create(pair, config)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for p in model.adapters.parameters():
            p.add_(0.3 * torch.randn(p.shape, generator=generator, dtype=torch.float64))
    return model


def replace_forward(model: ReplacementModel, forward: Any) -> None:
    """Replace every block's forward by ``forward(original, hidden_states, **arguments)``."""
    for block in model.blocks:
        block.forward = MethodType(
            lambda _, *args, _original=block.forward, **kw: forward(_original, *args, **kw), block
        )


def pass_to_blocks(model: ReplacementModel, **more: Any) -> None:
    """Make the decoder pass more keyword arguments, as a release of transformers may."""
    decoder = getattr(model.model, model.paths.decoder)
    original = decoder.forward
    decoder.forward = MethodType(
        lambda _, *args, **kwargs: original(*args, **kwargs, **more), decoder
    )


@pytest.mark.parametrize("batch", [WHOLE, PADDED, UNMASKED], ids=["whole", "padded", "unmasked"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_traversal_equals_the_models_own_forward(
    architecture: str, batch: Batch, make_pair: Callable[..., Any]
) -> None:
    model = model_of(make_pair(architecture))
    state = torch.get_rng_state()
    check_traversal(model, batch)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("dtype", ["float64", "bfloat16", "float16"])
def test_every_dtype(dtype: str, make_pair: Callable[..., Any]) -> None:
    check_traversal(model_of(make_pair("qwen2", dtype=dtype)), WHOLE)


@pytest.mark.parametrize("activation", ["topk", "batch_topk", "jumprelu"])
def test_every_activation(activation: str, make_pair: Callable[..., Any]) -> None:
    check_traversal(model_of(make_pair("qwen2"), activation=activation), PADDED)


@pytest.mark.parametrize("kind", ["mlp", "norms"])
def test_tuned_weights(kind: str, make_pair: Callable[..., Any]) -> None:
    check_traversal(model_of(make_pair("qwen2"), kind), PADDED)


def test_a_cache_is_replaced_by_none_under_any_keyword(make_pair: Callable[..., Any]) -> None:
    from transformers import DynamicCache

    model = model_of(make_pair("qwen2"))
    pass_to_blocks(model, memory=DynamicCache(), pairs=(1, (DynamicCache(), None)))
    for arguments in model.block_inputs(IDS, None).arguments:
        assert arguments["memory"] is None
        assert arguments["pairs"] == (1, (None, None))


class Log:
    """An object that blocks append to."""

    def __init__(self) -> None:
        self.states: list[Tensor] = []

    def append(self, hidden: Tensor) -> None:
        self.states.append(hidden)


STATEFUL = {"list": list, "object": Log, "dict": dict, "tuple": lambda: ([],), "set": set}


@pytest.mark.parametrize("make", STATEFUL.values(), ids=STATEFUL)
@pytest.mark.parametrize("mode", MODES)
def test_an_argument_that_may_hold_state_is_refused_by_name(
    mode: Mode, make: Callable[[], Any], make_pair: Callable[..., Any]
) -> None:
    model = model_of(make_pair("qwen2"))
    pass_to_blocks(model, seen=make())
    refused = r"passes its blocks an argument 'seen' of type .*transformers \d.* with fastadapt \d"
    with model.mode(mode), pytest.raises(RunError, match=refused):
        model.block_inputs(IDS, None)
    with pytest.raises(RunError, match=refused):
        check_traversal(model, PADDED)


@pytest.mark.parametrize("policy", POLICIES)
def test_a_block_that_appends_to_an_argument_raises_before_training(
    policy: str, make_pair: Callable[..., Any]
) -> None:
    model = model_of(make_pair("qwen2"))

    def append(original: Any, hidden_states: Tensor, *, seen: Log, **kwargs: Any) -> Tensor:
        seen.append(hidden_states)
        return original(hidden_states + sum(h.mean() for h in seen.states), **kwargs)

    replace_forward(model, append)
    pass_to_blocks(model, seen=Log())
    for cutoff in range(model.n_layers + 1):
        with pytest.raises(RunError, match="an argument 'seen' of type"):
            objective(model, PADDED, cutoff, ObjectiveConfig(checkpoint=policy))


def test_a_tensor_that_a_block_changes_in_place_is_named(make_pair: Callable[..., Any]) -> None:
    model = model_of(make_pair("qwen2"))

    def change(
        original: Any, hidden_states: Tensor, *, position_ids: Tensor, **kwargs: Any
    ) -> Tensor:
        position_ids += 0
        return original(hidden_states, position_ids=position_ids, **kwargs)

    replace_forward(model, change)
    with pytest.raises(RunError, match="changed its argument 'position_ids' in place"):
        check_traversal(model, PADDED)


@pytest.mark.parametrize("keyword", ["attention_mask", "position_embeddings"])
def test_a_renamed_keyword_is_caught(keyword: str, make_pair: Callable[..., Any]) -> None:
    """The decoder passes the old name; blocks called one by one get the argument's default."""
    model = model_of(make_pair("qwen2"))
    inside = [False]
    decoder = getattr(model.model, model.paths.decoder)
    decoder_forward = decoder.forward

    def decode(_: Any, *args: Any, **kwargs: Any) -> Any:
        inside[0] = True
        try:
            return decoder_forward(*args, **kwargs)
        finally:
            inside[0] = False

    def block(original: Any, hidden_states: Tensor, **kwargs: Any) -> Tensor:
        if not inside[0]:  # the argument's default, as after a rename
            value = kwargs[keyword]
            if keyword == "attention_mask":
                kwargs[keyword] = None if value is None else torch.ones_like(value)
            else:
                kwargs[keyword] = (torch.ones_like(value[0]), torch.zeros_like(value[1]))
        return original(hidden_states, **kwargs)

    check_traversal(model, PADDED)
    decoder.forward = MethodType(decode, decoder)
    replace_forward(model, block)
    with pytest.raises(RunError, match=r"in mode target: they differ by .* transformers \d"):
        check_traversal(model, PADDED)


def test_a_replayed_cache_is_caught(
    make_pair: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A renamed keyword once left one cache for all calls, to which every call appended."""
    from transformers import DynamicCache

    from fastadapt.models import block_inputs

    monkeypatch.setattr(block_inputs, "_stateless", lambda name, value, *_: value)
    model = model_of(make_pair("qwen2"))
    pass_to_blocks(model)
    record = model.block_inputs

    def recorded(ids: Tensor, mask: Tensor | None) -> block_inputs.BlockInputs:
        inputs = record(ids, mask)
        cache = DynamicCache()
        name = "cache" if "cache" in inputs.arguments[0] else "past_key_values"
        replayed = [{**arguments, name: cache} for arguments in inputs.arguments]
        return block_inputs.BlockInputs(inputs.hidden, replayed)

    monkeypatch.setattr(model, "block_inputs", recorded)
    with pytest.raises((RunError, RuntimeError)):
        check_traversal(model, WHOLE)


def test_only_a_bounded_part_of_a_batch_is_used(
    make_pair: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = model_of(make_pair("qwen2"))
    shapes = []
    record = model.block_inputs

    def recorded(ids: Tensor, mask: Tensor | None) -> Any:
        shapes.append(tuple(ids.shape))
        return record(ids, mask)

    monkeypatch.setattr(model, "block_inputs", recorded)
    monkeypatch.setattr("fastadapt.models.self_check.TOKENS", 4)
    check_traversal(model, Batch(IDS.repeat(3, 1), (IDS > 0).repeat(3, 1), IDS.repeat(3, 1)))
    assert shapes == [(2, 4)]
