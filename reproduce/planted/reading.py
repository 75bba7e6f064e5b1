"""Read texts through base and target: states, predictions, and what enters output matrices.

N positions of all texts, V tokens, D width. Positions are counted over all texts; the last of each
text predicts nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from reproduce.planted.differences import Text

_BATCH = 64


@dataclass(frozen=True)
class Reading:
    """What a model does on the texts.

    Attributes:
        log_p: float32 ``[N, V]``, the prediction after each position.
        states: float32 ``[N, D]``, the residual stream after each layer.
        inputs: float32 ``[N, F]``, what enters the output matrix of each layer's MLP.
    """

    log_p: Tensor
    states: list[Tensor]
    inputs: list[Tensor]


@dataclass(frozen=True)
class Positions:
    """The positions of the texts.

    Attributes:
        first: position of each text's first word.
        token, following: int64 ``[N]``, the token and the one after it; -1 after the last.
        written: bool ``[N]``, the positions whose next word a model writes.
        planted: bool ``[K, N]``, those whose next word is planted, by difference.
    """

    first: list[int]
    token: Tensor
    following: Tensor
    written: Tensor
    planted: Tensor


def locate(texts: Sequence[Text], vocabulary: dict[str, int], n_differences: int) -> Positions:
    """Return the positions of texts."""
    first: list[int] = []
    token: list[int] = []
    following: list[int] = []
    written: list[bool] = []
    marks: list[tuple[int, int]] = []
    for text in texts:
        n, ids = len(token), [vocabulary[word] for word in text.words]
        first.append(n)
        token += ids
        following += [*ids[1:], -1]
        written += [text.start <= t + 1 < len(ids) for t in range(len(ids))]
        marks += [(number, n + t) for t, number in text.planted.items()]
    planted = torch.zeros(n_differences, len(token), dtype=torch.bool)
    for number, position in marks:
        planted[number, position] = True
    return Positions(
        first, torch.tensor(token), torch.tensor(following), torch.tensor(written), planted
    )


@torch.no_grad()
def read(model: Any, texts: Sequence[Text], vocabulary: dict[str, int]) -> Reading:
    """Read texts through a Qwen2 model of the embedded pair."""
    layers = model.model.layers
    states: list[list[Tensor]] = [[] for _ in layers]
    inputs: list[list[Tensor]] = [[] for _ in layers]
    log_p: list[Tensor] = []
    seen: dict[tuple[str, int], Tensor] = {}

    def note(name: str, layer: int) -> Any:
        def hook(_: Any, given: Any, out: Any) -> None:
            seen[name, layer] = given[0] if name == "input" else out

        return hook

    handles = [layer.register_forward_hook(note("state", i)) for i, layer in enumerate(layers)]
    handles += [
        layer.mlp.down_proj.register_forward_hook(note("input", i))
        for i, layer in enumerate(layers)
    ]
    for start in range(0, len(texts), _BATCH):
        rows = [[vocabulary[word] for word in t.words] for t in texts[start : start + _BATCH]]
        longest = max(map(len, rows))
        # Causal attention: padding on the right needs no mask, and is dropped.
        ids = torch.tensor([row + [0] * (longest - len(row)) for row in rows])
        real = torch.tensor([[t < len(row) for t in range(longest)] for row in rows])
        logits = model(input_ids=ids, use_cache=False).logits
        log_p.append(logits[real].float().log_softmax(-1))
        for i in range(len(layers)):
            states[i].append(seen["state", i][real])
            inputs[i].append(seen["input", i][real])
    for handle in handles:
        handle.remove()
    return Reading(torch.cat(log_p), [torch.cat(s) for s in states], [torch.cat(s) for s in inputs])
