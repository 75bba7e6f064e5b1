"""AdamW on fp32 masters, a schedule that is a pure function of the step, and clipping.

With bfloat16 parameters of magnitude 0.01 to 0.017 half the spacing of neighbouring numbers is
3e-5, so the small updates of a cosine's tail round to nothing. The masters here are fp32 copies
that take the update; the working copies are rounded from them after every step.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from fastadapt.errors import UserError

_WIDE = (torch.float32, torch.float64)
#: Bytes per element of an 8-bit moment: a code, and its share of a scale per 256 elements.
MOMENT_BYTES = 1 + 4 / 256


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW (arXiv 1711.05101), its schedule, and how many sequences make a step.

    Args:
        lr: learning rate at the end of the warm-up.
        betas: decay of the first and second moment, each in [0, 1).
        eps: added to the root of the second moment.
        weight_decay: decoupled weight decay, per unit of learning rate.
        clip: largest norm of the gradient over all adapters; larger ones are scaled down to it.
        warmup: share of the steps in which the rate rises linearly, in [0, 1].
        batch_size: sequences per forward and backward pass.
        accumulation: passes per optimiser step; the gradient averages over their sequences.
        epochs: passes over the training data.
        max_steps: stop, and end the schedule, after so many optimiser steps.
        masters: keep fp32 copies of parameters of lower precision.
        moments: ``full``, in the masters' precision, or ``8bit`` (torchao, extra ``lowmem``).
        stochastic_rounding: round updated bfloat16 parameters up or down at random, so that small
            updates count on average; in place of masters (torchao, extra ``lowmem``).
    """

    lr: float = 8e-4
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.0
    clip: float = 1.0
    warmup: float = 0.05
    batch_size: int = 1
    accumulation: int = 1
    epochs: int = 1
    max_steps: int | None = None
    masters: bool = True
    moments: str = "full"
    stochastic_rounding: bool = False

    def __post_init__(self) -> None:
        _require(self.lr > 0 and math.isfinite(self.lr), "lr", "a positive number", self.lr)
        fine = len(self.betas) == 2 and all(0 <= beta < 1 for beta in self.betas)
        _require(fine, "betas", "two numbers in [0, 1)", self.betas)
        _require(self.eps > 0 and math.isfinite(self.eps), "eps", "a positive number", self.eps)
        _require(self.weight_decay >= 0, "weight_decay", "0 or more", self.weight_decay)
        _require(self.clip > 0, "clip", "a positive number (.inf for none)", self.clip)
        _require(0 <= self.warmup <= 1, "warmup", "a share of the steps in [0, 1]", self.warmup)
        for name in ("batch_size", "accumulation", "epochs"):
            value = getattr(self, name)
            _require(value >= 1, name, "1 or more", value)
        _require(self.moments in ("full", "8bit"), "moments", "full or 8bit", self.moments)
        fine = not (self.stochastic_rounding and self.masters)
        _require(fine, "stochastic_rounding", "masters false beside it", self.stochastic_rounding)
        if self.max_steps is not None:
            _require(self.max_steps >= 1, "max_steps", "1 or more, or null", self.max_steps)

    @property
    def low_memory(self) -> bool:
        """Whether torchao's AdamW is wanted."""
        return self.moments == "8bit" or self.stochastic_rounding


def _require(fine: bool, name: str, expected: str, got: object) -> None:
    if not fine:
        raise UserError(f"optimizer.{name}: expected {expected}, got {got!r}")


def learning_rate(step: int, steps: int, config: OptimizerConfig) -> float:
    """Rate of update ``step`` (0-based) out of ``steps``.

    With ``w = round(warmup * steps)``: ``lr (step + 1) / (w + 1)`` for the first ``w`` updates (so
    the very first is not wasted on a rate of 0), then ``lr (1 + cos(pi p)) / 2`` with
    ``p = (step - w) / (steps - w)``, which would reach 0 at ``step = steps``.
    """
    warm = round(config.warmup * steps)
    if step < warm:
        return config.lr * (step + 1) / (warm + 1)
    return config.lr * (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm))) / 2


class AdapterOptimizer:
    """AdamW over named parameters, with fp32 masters where the parameters are of lower precision.

    Gradients are summed over backward passes: in the parameter itself where it is its own master,
    else in fp32 in the master, moved there as soon as each is made, so that neither precision nor
    memory is spent on a second set. Call :meth:`gradient_norm` and then either :meth:`step` or
    :meth:`discard`.

    Args:
        parameters: by name.
        config: rates, moments, clipping.
        lowest_threshold: what parameters called ``threshold`` are raised to after an update, so
            that no JumpReLU threshold stays at or below 0, where its feature is a plain ReLU.
    """

    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter],
        config: OptimizerConfig,
        lowest_threshold: float | None = None,
    ) -> None:
        self.config = config
        self.lowest_threshold = lowest_threshold
        self.parameters = dict(parameters)
        self.masters: dict[str, Tensor] = {}
        self._hooks = []
        for name, parameter in self.parameters.items():
            if parameter.dtype in _WIDE or not config.masters:
                self.masters[name] = parameter
                continue
            master = parameter.detach().float()
            self.masters[name] = master
            self._hooks.append(
                parameter.register_post_accumulate_grad_hook(_move_gradient_to(master))
            )
        self._adam = _adam(list(self.masters.values()), config)
        self.updates = 0
        self._set_moments({})

    @torch.no_grad()
    def gradient_norm(self) -> Tensor:
        """L2 norm of the summed gradient over all parameters: 0-d, fp32, on their device.

        Of sharded parameters, over all shares: every rank must call this.
        """
        norm = torch.nn.utils.get_total_norm(self._gradients())
        return norm.full_tensor() if isinstance(norm, DTensor) else norm

    @torch.no_grad()
    def step(self, rate: float, norm: Tensor) -> None:
        """Clip by ``norm`` (of :meth:`gradient_norm`), update with learning rate ``rate``, clear.

        Raises:
            RuntimeError: no backward pass came before.
        """
        self._gradients()
        nn.utils.clip_grads_with_norm_(self.masters.values(), self.config.clip, norm)
        group = self._adam.param_groups[0]
        group["lr"] = group["lr"].fill_(rate) if isinstance(group["lr"], Tensor) else rate
        self._adam.step()
        for name, master in self.masters.items():
            if self.lowest_threshold is not None and name.rpartition(".")[2] == "threshold":
                master.clamp_(min=self.lowest_threshold)
        self.updates += 1
        self._round_to_parameters()
        self.discard()

    def discard(self) -> None:
        """Drop the summed gradient without an update."""
        self._adam.zero_grad(set_to_none=True)
        for parameter in self.parameters.values():
            parameter.grad = None

    def detach(self) -> None:
        """Leave the parameters: gradients stay in them from now on."""
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()

    def tensors(self) -> dict[str, dict[str, Tensor]]:
        """Weights and moments for a checkpoint, by group (weights, exp_avg, exp_avg_sq) and name.

        The weights are the masters; working copies follow from them by rounding.
        """
        state = self._adam.state
        groups: dict[str, dict[str, Tensor]] = {"weights": dict(self.masters)}
        for moment in ("exp_avg", "exp_avg_sq"):
            groups[moment] = {}
            for name, m in self.masters.items():
                groups[moment] |= _plain_tensors(name, state[m][moment])
        return groups

    def scalars(self) -> dict[str, Any]:
        """JSON values for a checkpoint, beside :meth:`tensors`."""
        return {"updates": self.updates}

    @torch.no_grad()
    def load(self, tensors: Mapping[str, Mapping[str, Tensor]], scalars: Mapping[str, Any]) -> None:
        """Take back what :meth:`tensors` and :meth:`scalars` gave.

        Raises:
            UserError: a tensor is missing, extra, or of another shape or dtype (nothing changed).
        """
        for group, expected in self.tensors().items():
            _check_same(group, expected, tensors.get(group, {}))
        for name, master in self.masters.items():
            master.copy_(tensors["weights"][name])
        self.updates = int(scalars["updates"])
        self._set_moments(tensors)
        self._round_to_parameters()

    def _gradients(self) -> list[Tensor]:
        missing = [name for name, master in self.masters.items() if master.grad is None]
        if missing:
            raise RuntimeError(f"no gradient for {', '.join(missing)}: call backward() first")
        return [master.grad for master in self.masters.values() if master.grad is not None]

    def _set_moments(self, tensors: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Put AdamW's state in place at once, so that a checkpoint always has every tensor."""
        for name, master in self.masters.items():
            low = self.config.low_memory
            step = torch.tensor(float(self.updates), device=None if low else master.device)
            state = {"step": step}
            for moment in ("exp_avg", "exp_avg_sq"):
                value = (
                    _low_memory_moment(self._adam, master, moment)
                    if low
                    else torch.zeros_like(master, requires_grad=False)
                )
                for key, part in _plain_tensors(name, value).items() if tensors else ():
                    part.copy_(tensors[moment][key])
                state[moment] = value
            self._adam.state[master] = state

    @torch.no_grad()
    def _round_to_parameters(self) -> None:
        for name, parameter in self.parameters.items():
            if self.masters[name] is not parameter:
                parameter.copy_(self.masters[name])


def _adam(masters: list[Tensor], config: OptimizerConfig) -> Any:
    adam: dict[str, Any] = {
        name: getattr(config, name) for name in ("lr", "betas", "eps", "weight_decay")
    }
    if not config.low_memory:
        return torch.optim.AdamW(masters, **adam, fused=True)
    rounding = config.stochastic_rounding
    return _low_memory_adam(
        masters, eight_bit=config.moments == "8bit", stochastic_rounding=rounding, **adam
    )


def _low_memory_adam(
    parameters: Sequence[Tensor], *, eight_bit: bool, stochastic_rounding: bool, **adam: Any
) -> Any:
    """Return torchao's AdamW, with 8-bit moments or moments of the parameters' dtype.

    torchao compiles its update: the first one takes seconds, on a CPU with a C++ compiler.

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


def _low_memory_moment(adam: Any, master: Tensor, moment: str) -> Tensor:
    """Return torchao's zero moment: 8-bit from 4,096 elements on, else of the master's dtype."""
    value: Tensor = adam._new_buffer(master, moment == "exp_avg")
    return value


def _plain_tensors(name: str, value: Tensor) -> dict[str, Tensor]:
    """Return the plain tensors of a moment by name: itself, or 8-bit codes and their scales."""
    parts = {part: getattr(value, part, None) for part in ("codes", "scale")}
    named = {f"{name}.{part}": t for part, t in parts.items() if t is not None}
    return named or {name: value}


def _move_gradient_to(master: Tensor) -> Callable[[Tensor], None]:
    def move(parameter: Tensor) -> None:
        assert parameter.grad is not None
        if master.grad is None:
            master.grad = parameter.grad.to(master.dtype)
        else:
            master.grad += parameter.grad
        parameter.grad = None

    return move


def _check_same(group: str, expected: Mapping[str, Tensor], got: Mapping[str, Tensor]) -> None:
    problems = [f"{name} is missing" for name in expected.keys() - got.keys()]
    problems += [f"{name} is not of this run" for name in got.keys() - expected.keys()]
    for name in expected.keys() & got.keys():
        want, have = expected[name], got[name]
        if want.shape != have.shape or want.dtype != have.dtype:
            problems.append(
                f"{name}: expected {tuple(want.shape)} {want.dtype}, "
                f"got {tuple(have.shape)} {have.dtype}"
            )
    if problems:
        raise UserError(
            f"the checkpoint is of another shape ({group}): {'; '.join(sorted(problems)[:5])}. "
            "Resume with the configuration that the run was started with."
        )
