"""AdamW on fp32 master weights, with clipping and a schedule that is a pure function of the step.

For bfloat16 parameters of magnitude 0.01 to 0.017, half the spacing of neighbouring numbers is
3e-5. The small updates at the end of a cosine schedule would round to 0. Updates are therefore
applied to *masters*, which are fp32 copies. After every step the parameters are rounded from them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from fastadapt.errors import UserError, require

_WIDE = (torch.float32, torch.float64)
#: Bytes per element of an 8-bit moment: a code, and 1/256 of a 4-byte scale.
MOMENT_BYTES = 1 + 4 / 256


@dataclass(frozen=True)
class OptimizerConfig:
    """Settings of AdamW (arXiv 1711.05101), of its schedule, and of a step's batches.

    Args:
        lr: learning rate at the end of the warm-up.
        betas: decay of the first and second moment, each in [0, 1).
        eps: added to the root of the second moment.
        weight_decay: decoupled weight decay, per unit of learning rate.
        clip: largest norm of the gradient over all adapters; larger gradients are scaled down.
        warmup: share of the steps during which the rate rises linearly, in [0, 1].
        batch_size: sequences per forward and backward pass.
        accumulation: passes per optimiser step; the gradient averages over their sequences.
        epochs: passes over the training data.
        max_steps: number of optimiser steps after which training and schedule end, if epochs do not
            end earlier.
        masters: keep fp32 copies of parameters of lower precision.
        moments: ``full``, in the masters' precision, or ``8bit`` (torchao, extra ``lowmem``).
        stochastic_rounding: round updated bfloat16 parameters up or down at random, so that small
            updates count on average. It excludes ``masters`` (torchao, extra ``lowmem``).

    Raises:
        UserError: an impossible value.
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
        require(
            self.lr > 0 and math.isfinite(self.lr),
            "optimizer.lr",
            "a positive, finite number",
            self.lr,
        )
        fine = len(self.betas) == 2 and all(0 <= beta < 1 for beta in self.betas)
        require(fine, "optimizer.betas", "two numbers in [0, 1)", self.betas)
        require(
            self.eps > 0 and math.isfinite(self.eps),
            "optimizer.eps",
            "a positive, finite number",
            self.eps,
        )
        require(self.weight_decay >= 0, "optimizer.weight_decay", "0 or more", self.weight_decay)
        require(self.clip > 0, "optimizer.clip", "a positive number (.inf for none)", self.clip)
        require(
            0 <= self.warmup <= 1, "optimizer.warmup", "a share of the steps in [0, 1]", self.warmup
        )
        for name in ("batch_size", "accumulation", "epochs"):
            value = getattr(self, name)
            require(value >= 1, f"optimizer.{name}", "1 or more", value)
        require(self.moments in ("full", "8bit"), "optimizer.moments", "full or 8bit", self.moments)
        fine = not (self.stochastic_rounding and self.masters)
        require(
            fine,
            "optimizer.stochastic_rounding",
            "false, or masters false",
            self.stochastic_rounding,
        )
        if self.max_steps is not None:
            require(
                self.max_steps >= 1, "optimizer.max_steps", "1 or more, or null", self.max_steps
            )

    @property
    def low_memory(self) -> bool:
        """Whether the settings need torchao's AdamW."""
        return self.moments == "8bit" or self.stochastic_rounding


def learning_rate(step: int, steps: int, config: OptimizerConfig) -> float:
    """Return the learning rate of update ``step`` (0-based) of ``steps``.

    With ``w = round(warmup * steps)`` the rate is ``lr (step + 1) / (w + 1)`` for the first ``w``
    updates, of which none has rate 0. Then it is ``lr (1 + cos(pi p)) / 2`` with
    ``p = (step - w) / (steps - w)``, which would reach 0 at ``step = steps``.

    Example:
        >>> config = OptimizerConfig(lr=1.0, warmup=0.5)
        >>> [round(learning_rate(step, 4, config), 2) for step in range(4)]
        [0.33, 0.67, 1.0, 0.5]
    """
    warm = round(config.warmup * steps)
    if step < warm:
        return config.lr * (step + 1) / (warm + 1)
    return config.lr * (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm))) / 2


class AdapterOptimizer:
    """AdamW over named parameters, with fp32 copies (masters) of parameters of lower precision.

    Gradients are summed over backward passes. A parameter of fp32 or fp64 is its own master and
    holds the sum itself. Otherwise a hook adds each gradient to the fp32 sum in the master and
    frees it, so that no second set of gradients exists. After the backward passes, call
    :meth:`gradient_norm` and then either :meth:`step` or :meth:`discard`.

    Args:
        parameters: parameters by name.
        config: settings of AdamW.
        lowest_threshold: lower bound of parameters named ``threshold`` after an update. A JumpReLU
            threshold at or below 0 would make its feature a ReLU.
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
        """Return the L2 norm of the summed gradient over all parameters: 0-d, on their device.

        The norm of sharded parameters is over all shards, and every rank must call this method.

        Raises:
            RuntimeError: a parameter has no gradient.
        """
        norm = torch.nn.utils.get_total_norm(self._gradients())
        return norm.full_tensor() if isinstance(norm, DTensor) else norm

    @torch.no_grad()
    def step(self, rate: float, norm: Tensor) -> None:
        """Clip the summed gradient, update the parameters and drop the gradient.

        Args:
            rate: learning rate.
            norm: result of :meth:`gradient_norm`.

        Raises:
            RuntimeError: a parameter has no gradient.
        """
        gradients = self._gradients()
        if _divides_gradients(self._adam, gradients):
            # The factor of clip_grads_with_norm_, inverted.
            self._adam.grad_scale = ((norm.float() + 1e-6) / self.config.clip).clamp_(min=1)
        else:
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
        """Remove the hooks from the parameters, which then keep their gradients."""
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()

    def tensors(self) -> dict[str, dict[str, Tensor]]:
        """Return the tensors of a checkpoint by group (weights, exp_avg, exp_avg_sq) and name.

        The weights are the masters, from which the parameters follow by rounding.
        """
        state = self._adam.state
        groups: dict[str, dict[str, Tensor]] = {"weights": dict(self.masters)}
        for moment in ("exp_avg", "exp_avg_sq"):
            groups[moment] = {}
            for name, m in self.masters.items():
                groups[moment] |= _plain_tensors(name, state[m][moment])
        return groups

    def scalars(self) -> dict[str, Any]:
        """Return the JSON values of a checkpoint."""
        return {"updates": self.updates}

    @torch.no_grad()
    def load(self, tensors: Mapping[str, Mapping[str, Tensor]], scalars: Mapping[str, Any]) -> None:
        """Restore the values of :meth:`tensors` and :meth:`scalars`.

        Raises:
            UserError: a tensor is missing, extra, or of a wrong shape or dtype. Nothing changes.
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
        """Create AdamW's state for every parameter, with the moments ``tensors``, or zeros."""
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


def _divides_gradients(adam: Any, gradients: Sequence[Tensor]) -> bool:
    """Return whether the fused update can clip, as it divides gradients by ``grad_scale``.

    On a GPU this replaces a pass that reads and writes all gradients by a write in the update. On
    a CPU the quotient would have other bits than the product with the factor. ``grad_scale`` is
    float32, too coarse for float64 gradients. Sharded gradients are clipped in a pass.
    """
    return isinstance(adam, torch.optim.AdamW) and all(
        g.device.type == "cuda" and g.dtype != torch.float64 and not isinstance(g, DTensor)
        for g in gradients
    )


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
            "optimizer.moments=8bit and optimizer.stochastic_rounding need torchao; install the "
            "extra: pip install 'fastadapt[lowmem]'"
        ) from error
    kind = optim.AdamW8bit if eight_bit else optim._AdamW
    return kind(list(parameters), bf16_stochastic_round=stochastic_rounding, **adam)


def _low_memory_moment(adam: Any, master: Tensor, moment: str) -> Tensor:
    """Return a moment of zeros, as torchao creates it for ``master``.

    With 8-bit moments: 8-bit if it has at least 4,096 elements and a multiple of 256, else in the
    dtype of ``master``.
    """
    value: Tensor = adam._new_buffer(master, moment == "exp_avg")
    return value


def _plain_tensors(name: str, value: Tensor) -> dict[str, Tensor]:
    """Return a moment's plain tensors by name: the moment itself, or 8-bit codes and scales."""
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
            f"the checkpoint's tensors do not match ({group}): {'; '.join(sorted(problems)[:5])}. "
            "Resume with the configuration with which the run was started."
        )
