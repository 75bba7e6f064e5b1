"""Linear layers with a low-rank part, and modules that share the weights in which they agree.

A target that is a PEFT folder holds its base's weights once: each changed linear layer is a
:class:`LowRankLinear`, whose ``weight`` is the parameter of the base's layer.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

#: Entry of a target's configuration: rank and kind of its low-rank parts, by part of a block. The
#: rank is 0 for a weight that the target's folder holds as a whole.
RANKS = "fastadapt_low_rank"


class LowRankLinear(nn.Linear):
    """Linear layer ``(W x + B A x) · g + b`` on the weight of another layer.

    ``g``, one factor per output, is present for DoRA only. Close to 1, it needs more bits than 16:
    its dtype is float32 at least. All parameters are frozen.

    Args:
        layer: the layer whose weight is shared, ``W [out, in]``.
        lora_A: ``A [r, in]``, with the adapter's scaling.
        lora_B: ``B [out, r]``.
        bias: ``b [out]``, or None.
        gain: ``g [out]``, or None.

    Example:
        >>> layer = nn.Linear(3, 2, bias=False)
        >>> low = LowRankLinear(layer, torch.ones(1, 3), torch.ones(2, 1))
        >>> low.weight is layer.weight, torch.equal(low.merged(), layer.weight + 1)
        (True, True)
    """

    lora_A: Tensor  # noqa: N815
    lora_B: Tensor  # noqa: N815
    gain: Tensor | None

    def __init__(
        self,
        layer: nn.Linear,
        lora_A: Tensor,
        lora_B: Tensor,
        bias: Tensor | None = None,
        gain: Tensor | None = None,
    ) -> None:
        super().__init__(layer.in_features, layer.out_features, bias=False, device="meta")
        self.weight = layer.weight
        parts = {"bias": bias, "lora_A": lora_A, "lora_B": lora_B, "gain": gain}
        for name, tensor in parts.items():
            frozen = None if tensor is None else nn.Parameter(tensor.detach(), requires_grad=False)
            self.register_parameter(name, frozen)

    def forward(self, x: Tensor) -> Tensor:
        low = F.linear(x, self.lora_A)
        out = self.scaled(F.linear(x, self.weight) + F.linear(low, self.lora_B))
        return out if self.bias is None else out + self.bias

    def scaled(self, out: Tensor) -> Tensor:
        """Return outputs ``[..., out]`` times ``g``, in their dtype."""
        return out if self.gain is None else (out * self.gain).to(out.dtype)

    @property
    def is_plain(self) -> bool:
        """Whether the low-rank part adds nothing, as B = 0 before the training of an adapter."""
        adds = bool(self.lora_A.any()) and bool(self.lora_B.any())
        gain = None if self.gain is None else self.gain.to(self.weight.dtype)
        return not adds and (gain is None or bool((gain == 1).all()))

    @torch.no_grad()
    def merged(self) -> Tensor:
        """Return the weight ``[out, in]`` of the plain layer that computes the same.

        Sums are computed in float32 at least, then rounded to the dtype of ``weight``.
        """
        wide = torch.promote_types(self.weight.dtype, torch.float32)
        A, B, W = (t.to(wide) for t in (self.lora_A, self.lora_B, self.weight))
        out = W + B @ A
        if self.gain is not None:
            out *= self.gain.to(wide)[:, None]
        return out.to(self.weight.dtype)


def dora_gain(weight: Tensor, lora_A: Tensor, lora_B: Tensor, magnitude: Tensor) -> Tensor:
    """Return DoRA's factor of each output, in float32 at least.

    It is ``magnitude`` over the norm of the output's row of W + B A.
    """
    wide = torch.promote_types(weight.dtype, torch.float32)
    merged = weight.to(wide) + lora_B.to(wide) @ lora_A.to(wide)
    return magnitude.to(wide) / torch.linalg.norm(merged, dim=1)


def sharing_copy(module: nn.Module) -> nn.Module:
    """Return a copy of a module that shares its matrices; vectors, such as biases, are copied."""
    memo: dict[int, Any] = {id(p): p for p in module.parameters() if p.ndim > 1}
    return copy.deepcopy(module, memo)


def attach_ranks(block: nn.Module, ranks: Mapping[str, tuple[int, bool]]) -> None:
    """Add low-rank parts without values to linear layers of a block, for estimates of memory.

    Args:
        block: a block, on the meta device or of fake tensors.
        ranks: rank, and whether the layer is DoRA, by name in the block. A layer of rank 0 gets a
            weight of its own.
    """
    for name, (rank, dora) in ranks.items():
        layer: Any = block.get_submodule(name)
        if rank == 0:
            layer.weight = nn.Parameter(torch.empty_like(layer.weight), requires_grad=False)
            continue
        A = layer.weight.new_empty(rank, layer.in_features)
        B = layer.weight.new_empty(layer.out_features, rank)
        wide = torch.promote_types(layer.weight.dtype, torch.float32)
        gain = layer.weight.new_empty(layer.out_features, dtype=wide) if dora else None
        block.set_submodule(name, LowRankLinear(layer, A, B, layer.bias, gain))


def merged_state(
    module: nn.Module, besides: str = ""
) -> Iterator[tuple[str, Callable[[], Tensor]]]:
    """Yield names and readers of the tensors that a checkpoint of a module holds.

    Low-rank parts are merged, tied weights occur once, and buffers are those that are stored.

    Args:
        module: a module.
        besides: a part of the names to leave out.
    """
    low = {name: part for name, part in module.named_modules() if isinstance(part, LowRankLinear)}
    seen: set[int] = set()
    for name, parameter in module.named_parameters(remove_duplicate=False):
        owner, _, part = name.rpartition(".")
        if (besides and besides in name) or (id(parameter) in seen and owner not in low):
            continue
        seen.add(id(parameter))
        if owner not in low or part == "bias":
            yield name, partial(torch.detach, parameter)
        elif part == "weight":
            yield name, low[owner].merged
    stored = module.state_dict().keys()
    for name, buffer in module.named_buffers():
        if name in stored and not (besides and besides in name):
            yield name, partial(torch.detach, buffer)


def shared_names(first: nn.Module, second: nn.Module) -> list[str]:
    """Return the names of the parameters of ``second`` that are parameters of ``first`` too."""
    ours = {id(parameter) for parameter in first.parameters()}
    return [name for name, parameter in second.named_parameters() if id(parameter) in ours]


def share(first: nn.Module, second: nn.Module, names: Collection[str]) -> None:
    """Replace the named parameters of ``second`` by those of ``first`` with the same names."""
    for name in names:
        set_parameter(second, name, first.get_parameter(name))


def share_parameter(module: nn.Module, name: str, other: str) -> None:
    """Tie a parameter of a module to another parameter of the module."""
    set_parameter(module, name, module.get_parameter(other))


def set_parameter(module: nn.Module, name: str, parameter: nn.Parameter) -> None:
    """Replace the named parameter of a module or of one of its parts."""
    owner, _, part = name.rpartition(".")
    setattr(module.get_submodule(owner), part, parameter)


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Return whether two tensors have the same dtype, shape and bits.

    Example:
        >>> same_bits(torch.tensor([0.0]), torch.tensor([-0.0]))
        False
    """
    if (a.dtype, a.shape, a.device) != (b.dtype, b.shape, b.device):
        return False
    whole = {2: torch.int16, 4: torch.int32, 8: torch.int64}[a.dtype.itemsize]
    return torch.equal(a.contiguous().view(whole), b.contiguous().view(whole))
