"""The arguments that a model passes to its blocks, recorded from one call of its own forward.

They are passed to a block many times: once per stream, and again where a backward pass recomputes
it. An argument that a call changes would therefore make a later call wrong without an error. So
only arguments that no call can change are recorded; a cache of keys and values, under any keyword,
is replaced by None, and anything else is refused by name.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import version
from inspect import signature
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastadapt.errors import RunError
from fastadapt.models.pretrained import Paths

#: Types that hold no state. A tensor could be changed in place: fastadapt.models.self_check looks.
_CONSTANT = (type(None), bool, int, float, complex, str, bytes, torch.dtype, torch.device, Tensor)


@contextmanager
def record_module_inputs(*modules: nn.Module) -> Iterator[list[Tensor]]:
    """Yield a list to which every call of the modules, inside the context, adds its first input."""
    seen: list[Tensor] = []
    handles = [
        module.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].detach()))
        for module in modules
    ]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


class BlockInputs(NamedTuple):
    """What the model's own forward gives its first block, and the arguments of every block."""

    hidden: Tensor
    arguments: list[dict[str, Any]]


class _Recorder(nn.Module):
    """Stands where a block stood for one call of the decoder, with the block's attributes."""

    def __init__(self, block: nn.Module, record: Callable[..., Tensor]) -> None:
        super().__init__()
        self.stands_for = block  # a part of the decoder still, where it is looked for
        self._record = record

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.stands_for, name)

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return self._record(hidden_states, *args, **kwargs)


def versions() -> str:
    """The sentence that names both versions, for errors that a newer transformers can cause."""
    return (
        f"This is transformers {version('transformers')} with fastadapt {version('fastadapt')}; "
        "pyproject.toml names the versions of transformers that were tested."
    )


def _stateless(name: str, value: Any, owner: str) -> Any:
    """``value`` if no call can change it, None for a cache.

    Raises:
        RunError: it is of another type.
    """
    from transformers.cache_utils import Cache

    if isinstance(value, Cache):
        return None
    if isinstance(value, tuple) and type(value) in (tuple, torch.Size):
        return tuple(_stateless(name, item, owner) for item in value)
    if isinstance(value, _CONSTANT):
        return value
    kind = type(value)
    raise RunError(
        f"{owner} passes its blocks an argument {name!r} of type {kind.__module__}."
        f"{kind.__qualname__}, which may hold state: a block is called several times with the same "
        f"arguments, and a later call would see what an earlier one left. {versions()}"
    )


def _cache_keyword(decoder: nn.Module) -> str:
    """The keyword of a decoder's cache: ``cache`` from transformers 5.24 on."""
    accepted = signature(type(decoder).forward).parameters
    return "cache" if "cache" in accepted else "past_key_values"


def record_inputs(
    model: nn.Module, paths: Paths, input_ids: Tensor, attention_mask: Tensor | None
) -> BlockInputs:
    """See :meth:`fastadapt.models.replacement.ReplacementModel.block_inputs`."""
    from transformers import DynamicCache

    arguments: list[dict[str, Any]] = []

    def record(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if args:
            raise RunError(
                f"{type(model).__name__} passes {len(args) + 1} positional arguments to its "
                f"blocks; only the hidden states are expected to be positional. {versions()}"
            )
        if not arguments:
            embeddings.append(hidden_states)
        owner = type(model).__name__
        arguments.append({name: _stateless(name, value, owner) for name, value in kwargs.items()})
        return hidden_states

    embeddings: list[Tensor] = []
    decoder = getattr(model, paths.decoder)
    blocks = getattr(decoder, paths.layers)
    # Others stand in for the blocks, not only for their forwards: no hook of a block, such as the
    # one that gathers its weights from other ranks, has anything to do here.
    setattr(decoder, paths.layers, nn.ModuleList(_Recorder(block, record) for block in blocks))
    try:
        decoder(
            input_ids=input_ids,
            attention_mask=attention_mask,
            # Without a cache transformers asks the device whether sequences are packed.
            use_cache=False,
            **{_cache_keyword(decoder): DynamicCache()},
        )
    finally:
        setattr(decoder, paths.layers, blocks)
    return BlockInputs(embeddings[0], arguments)
