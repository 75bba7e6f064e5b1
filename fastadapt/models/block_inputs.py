"""Record the arguments that a model passes to its blocks, in one call of the model's own forward.

A block is called several times with the recorded arguments: once per stream, and again when a
backward pass recomputes the block. If a call changed an argument, later calls would silently be
wrong. Therefore only immutable values and tensors are recorded. A key-value cache is replaced by
None under any keyword. An argument of any other type raises an error that names the argument.
"""

from __future__ import annotations

from collections import UserDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from inspect import Parameter, signature
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastadapt.errors import RunError
from fastadapt.models.architectures import Paths

#: Types that hold no state. fastadapt.models.self_check detects in-place changes of tensors.
_CONSTANT = (type(None), bool, int, float, complex, str, bytes, torch.dtype, torch.device, Tensor)


@contextmanager
def record_module_inputs(*modules: nn.Module) -> Iterator[list[Tensor]]:
    """Yield a list; each call of a module inside the context appends its first input, detached."""
    inputs: list[Tensor] = []
    handles = [
        module.register_forward_pre_hook(lambda _, args: inputs.append(args[0].detach()))
        for module in modules
    ]
    try:
        yield inputs
    finally:
        for handle in handles:
            handle.remove()


class BlockInputs(NamedTuple):
    """Embeddings ``[B, T, D]`` passed to the first block, and every block's keyword arguments."""

    hidden: Tensor
    arguments: list[dict[str, Any]]


class _Recorder(nn.Module):
    """Replace a block during one call of the decoder, with the block's attributes."""

    def __init__(self, block: nn.Module, record: Callable[..., Tensor]) -> None:
        super().__init__()
        self.block = block  # registered, so that the block stays a submodule of the decoder
        self._record = record

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.block, name)

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return self._record(hidden_states, *args, **kwargs)


def versions() -> str:
    """Return advice with the versions in use, for errors that a newer transformers can cause."""
    return (
        f"This is transformers {version('transformers')} with fastadapt {version('fastadapt')}; "
        "install a version of transformers that was tested (pyproject.toml names them)."
    )


class Unread(UserDict[str, Any]):
    """Mapping in which a block leaves values that no later block reads; it stores none of them.

    Raises:
        RunError: a block reads a value.
    """

    def __setitem__(self, key: str, value: Any) -> None:
        """Drop the value."""

    def __missing__(self, key: str) -> Any:
        raise RunError(
            f"a block reads {key!r}, which an earlier block left for it; blocks are called one by "
            f"one, so this model cannot be used. {versions()}"
        )


def _stateless(name: str, value: Any, owner: str, unread: Sequence[str] = ()) -> Any:
    """Return ``value`` if it holds no state, None for a cache, :class:`Unread` for ``unread``.

    Raises:
        RunError: ``value`` has any other type.
    """
    from transformers.cache_utils import Cache

    if name in unread and isinstance(value, UserDict):
        return Unread()
    if isinstance(value, Cache):
        return None
    if isinstance(value, tuple) and type(value) in (tuple, torch.Size):
        return tuple(_stateless(name, item, owner) for item in value)
    if isinstance(value, _CONSTANT):
        return value
    kind = type(value)
    raise RunError(
        f"{owner} passes its blocks an argument {name!r} of type {kind.__module__}."
        f"{kind.__qualname__}, which may hold state. A block is called several times with the same "
        f"arguments, so changes by one call would reach later calls. {versions()}"
    )


def _cache_keyword(decoder: nn.Module) -> str:
    """Return the name of a decoder's cache argument: ``cache`` since transformers 5.24."""
    accepted = signature(type(decoder).forward).parameters
    return "cache" if "cache" in accepted else "past_key_values"


def _positional_names(block: nn.Module) -> list[str]:
    """Return the names of a block's arguments that may be positional, after the hidden states."""
    kinds = (Parameter.POSITIONAL_ONLY, Parameter.POSITIONAL_OR_KEYWORD)
    parameters = signature(type(block).forward).parameters.values()
    return [parameter.name for parameter in parameters if parameter.kind in kinds][2:]


def record_inputs(
    model: nn.Module,
    paths: Paths,
    input_ids: Tensor,
    attention_mask: Tensor | None,
    positions: Tensor | None = None,
) -> BlockInputs:
    """Record each block's arguments; see :meth:`.replacement.ReplacementModel.block_inputs`."""
    from transformers import DynamicCache

    arguments: list[dict[str, Any]] = []

    def record(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if not arguments:
            embeddings.append(hidden_states)
        owner = type(model).__name__
        if len(args) > len(positional):
            raise RunError(
                f"{owner} passes {len(args) + 1} positional arguments to its blocks, which have "
                f"names for {len(positional) + 1}. {versions()}"
            )
        named = {**dict(zip(positional, args, strict=False)), **kwargs}
        arguments.append(
            {name: _stateless(name, value, owner, paths.unread) for name, value in named.items()}
        )
        return hidden_states

    embeddings: list[Tensor] = []
    decoder = getattr(model, paths.decoder)
    blocks = getattr(decoder, paths.layers)
    positional = _positional_names(blocks[0])
    # Replace the blocks, not only their forwards: hooks of a block, such as FSDP's all-gather of
    # its weights, must not run.
    setattr(decoder, paths.layers, nn.ModuleList(_Recorder(block, record) for block in blocks))
    more: dict[str, Any] = {"position_ids": positions}
    if positions is None:
        # Without a cache, transformers synchronizes with the device to detect packed sequences.
        more = {_cache_keyword(decoder): DynamicCache()}
    try:
        decoder(input_ids=input_ids, attention_mask=attention_mask, use_cache=False, **more)
    finally:
        setattr(decoder, paths.layers, blocks)
    return BlockInputs(embeddings[0], arguments)
