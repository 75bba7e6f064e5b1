"""What a model hands to its blocks: told by its own forward, run with blocks that only record."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor, nn

from fastadapt.pretrained import Paths


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


def record_inputs(
    model: nn.Module, paths: Paths, input_ids: Tensor, attention_mask: Tensor | None
) -> BlockInputs:
    """See :meth:`fastadapt.models.ReplacementModel.block_inputs`."""
    from transformers import DynamicCache

    arguments: list[dict[str, Any]] = []

    def record(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if args:
            raise TypeError(
                f"{type(model).__name__} passes {len(args) + 1} positional arguments to "
                "its blocks; only the hidden states are expected to be positional"
            )
        if not arguments:
            embeddings.append(hidden_states)
        arguments.append({**kwargs, "past_key_values": None})
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
            past_key_values=DynamicCache(),
            use_cache=False,
        )
    finally:
        setattr(decoder, paths.layers, blocks)
    return BlockInputs(embeddings[0], arguments)
