"""AdamW in less memory, of torchao (extra ``lowmem``): 8-bit moments, stochastic rounding.

torchao compiles its update: the first one takes seconds, on a CPU with a C++ compiler.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from fastadapt.errors import UserError

#: Bytes per element of an 8-bit moment: a code, and its share of a scale per 256 elements.
MOMENT_BYTES = 1 + 4 / 256


def make(
    parameters: Sequence[Tensor], *, eight_bit: bool, stochastic_rounding: bool, **adam: Any
) -> Any:
    """torchao's AdamW, with 8-bit moments or of the parameters' precision; ``adam``: as of torch's.

    Raises:
        UserError: torchao is not installed.
    """
    try:
        from torchao import optim
    except ModuleNotFoundError as error:
        raise UserError(
            "optimizer.moments 8bit and optimizer.stochastic_rounding need torchao; install the "
            "extra: pip install 'fastadapt[lowmem]'"
        ) from error
    kind = optim.AdamW8bit if eight_bit else optim._AdamW
    return kind(list(parameters), bf16_stochastic_round=stochastic_rounding, **adam)


def zero_moment(adam: Any, master: Tensor, moment: str) -> Tensor:
    """What torchao would begin with: 8-bit for 4,096 elements and more, else the master's dtype."""
    value: Tensor = adam._new_buffer(master, moment == "exp_avg")
    return value


def stored(name: str, value: Tensor) -> dict[str, Tensor]:
    """The plain tensors that a moment consists of: itself, or 8-bit codes and their scales."""
    parts = {part: getattr(value, part, None) for part in ("codes", "scale")}
    named = {f"{name}.{part}": t for part, t in parts.items() if t is not None}
    return named or {name: value}
