"""Memory of a training step, measured on fake tensors: no weight is read, no device is used.

The objective runs forward and backward at the true shapes, on a model of at most three layers.
:class:`LiveBytes` counts the tensors alive; the ops of :mod:`fastadapt.kernels` declare the
workspace that their code for the planned device allocates inside a call. With the cutoff at 1, the
earliest one that makes both bridges, every further layer adds the same bytes.

Two densities (shares of active entries) are measured, and the larger bytes count: dense products,
as in the first steps, and the highest density at which codes are stored. The estimate leaves out
the interpreter, libraries, and what an allocator holds beyond the tensors in it.

L layers.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastadapt.adapter.module import AdapterConfig
from fastadapt.batch import Batch
from fastadapt.kernels.linear_kl import autograd as linear_kl
from fastadapt.kernels.nmse import autograd as nmse
from fastadapt.kernels.transcoder import autograd as transcoder
from fastadapt.kernels.transcoder.codes import dense_share
from fastadapt.models.pair import DTYPES
from fastadapt.models.replacement import ReplacementModel
from fastadapt.objective import objective
from fastadapt.training.config import TrainConfig
from fastadapt.training.optimizer import MOMENT_BYTES
from fastadapt.training.planning.flops import Setup, fake_pair
from fastadapt.training.planning.live_bytes import LiveBytes

FP32 = 4  #: bytes
_LAYERS = 3  # of the measured model: the first, the first with both bridges, one more
_WORKSPACES: dict[Any, Callable[..., int]] = {
    **linear_kl.WORKSPACE_FORMULAS,
    **nmse.WORKSPACE_FORMULAS,
    **transcoder.WORKSPACE_FORMULAS,
}
_ops = torch.ops.fastadapt


@dataclass(frozen=True)
class StepMemory:
    """Bytes of a training step on each device.

    Attributes:
        parts: bytes by part, each at its own largest.
        phases: bytes alive at the worst moment of each phase.
        parameters: number of trained parameters, on all devices together.
        host_bytes: bytes of frozen weights in host memory (``pair.offload``).
        state_bytes: bytes of the weights and moments in one checkpoint.
        adapter_bytes: bytes of the trained weights in the pair's dtype.
    """

    parts: dict[str, int]
    phases: dict[str, int]
    parameters: int
    host_bytes: int
    state_bytes: int
    adapter_bytes: int

    @property
    def peak_bytes(self) -> int:
        """Bytes alive at the worst moment of a step."""
        return max(self.phases.values())


def step_memory(
    config: TrainConfig, target: Any, tokens: int, device: str, ranks: int = 1
) -> StepMemory:
    """Measure a training step on fake tensors, in about a second.

    Args:
        config: the run's configuration; ``objective.checkpoint`` must not be ``auto``.
        target: transformers' configuration of the target.
        tokens: number of tokens of the longest sequence.
        device: device type that the run is planned for, ``cuda`` or ``cpu``.
        ranks: number of devices that share the run.
    """
    optimizer, n_layers = config.optimizer, target.num_hidden_layers
    element = DTYPES[config.pair.dtype].itemsize
    by_density = _measure_both(config, target, tokens, device)
    one = by_density[0]

    has_masters = element < FP32 and optimizer.masters
    summed = FP32 if has_masters else element
    moment = MOMENT_BYTES if optimizer.moments == "8bit" else summed
    trained = one.trained + (n_layers - one.layers) * one.trained_layer
    block = one.frozen_block + one.mlp
    gathered = 4 * block * config.pair.offload  # two blocks, each beside its copy from the host
    if ranks > 1:
        gathered = 2 * (block + one.trained_layer * element)
    share = 0 if config.pair.offload else 1 / ranks
    weights = {
        "frozen target": one.whole + int(n_layers * one.frozen_block * share),
        "frozen base MLPs": int(n_layers * one.mlp * share),
        # Sharded adapters with masters are views of the masters.
        "adapters": 0 if ranks > 1 and has_masters else trained // ranks * element,
        "fp32 masters": trained // ranks * FP32 if has_masters else 0,
        "moments": int(2 * trained // ranks * moment),
        "gathered blocks": gathered,
    }
    gradient = one.trained_layer // ranks * summed
    # FSDP sums a layer's gradients in a whole copy of the summed dtype.
    reduced = one.trained_layer * summed if ranks > 1 else 0
    fixed, gradients = sum(weights.values()), n_layers * gradient
    earlier = gradients if optimizer.accumulation > ranks else 0  # of the micro-batches before

    def largest(name: str, layers: int = n_layers) -> int:
        return max(measured.extrapolate(layers, name) for measured in by_density)

    # In a backward pass gradients replace what the forward pass saved. The worst moment is in the
    # last layer or, where gradients take more, in the second or the first.
    backward = max(
        largest("backward", layers) + (earlier or (n_layers - layers + 1) * gradient)
        for layers in {1, min(2, n_layers), n_layers}
    )
    parts = {
        **weights,
        "gradients": gradients,
        "gradients of a layer, to be summed": reduced,
        "codes": largest("codes"),
        "saved for backward": max(
            m.extrapolate(n_layers, "saved") - m.extrapolate(n_layers, "codes") for m in by_density
        ),
        "one block, backward": max(m.bytes["backward"] - m.bytes["saved"] for m in by_density),
        "logits of a chunk": one.logits,
    }
    return StepMemory(
        parts={name: size for name, size in parts.items() if size},
        phases={
            "forward": fixed + earlier + largest("forward"),
            "head": fixed + earlier + largest("head"),
            "backward": fixed + backward + reduced,
            "update": fixed + gradients,
        },
        parameters=trained,
        host_bytes=n_layers * block * config.pair.offload,
        state_bytes=int(trained * (summed + 2 * moment)),
        adapter_bytes=trained * element,
    )


class _Measured(NamedTuple):
    """Measurements of a fake model's step, in bytes: sizes of weights, and bytes beside weights."""

    layers: int
    whole: int  # frozen weights outside the blocks
    frozen_block: int  # of one block, without the base's MLP
    mlp: int  # of one block
    trained: int  # in elements
    trained_layer: int  # in elements
    logits: int  # workspace of the head
    #: Peak of each phase; ``saved``, alive after the forward pass; ``codes``, part of ``saved``.
    bytes: dict[str, int]
    saved_layer: int
    codes_layer: int

    def extrapolate(self, layers: int, name: str) -> int:
        """Extrapolate ``bytes[name]`` from the measured model to one of ``layers`` layers."""
        more = self.codes_layer if name == "codes" else self.saved_layer
        return self.bytes[name] + (layers - self.layers) * more


class _StepBytes(LiveBytes):
    """Bytes of a step, with a peak for each phase.

    Attributes:
        phases: bytes at the worst moment of each phase.
        layers: after each layer's forward pass, the bytes alive, and the bytes of codes alive.
    """

    def __init__(self, workspaces: dict[Any, Callable[..., int]]) -> None:
        super().__init__(workspaces)
        self.phases: dict[str, int] = {}
        self.layers: list[tuple[int, int]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is _ops.linear_kl.default:
            self.end("forward")
        out = super().__torch_dispatch__(func, types, args, kwargs)
        if func is _ops.nmse.default:  # the objective calls it once after every layer
            self.layers.append((self.alive, self.alive_of(_ops.encode.default)))
        return out

    def end(self, phase: str) -> None:
        """Store the peak of a phase; start the next phase."""
        self.phases[phase], self.peak = self.peak, self.alive


def _measure_both(config: TrainConfig, target: Any, tokens: int, device: str) -> list[_Measured]:
    """Measure a step with dense products and, for transcoders, a step with codes."""
    pair, adapter, loss = replace(config.pair, offload=False), config.trained, config.objective
    dtype = DTYPES[pair.dtype]
    by_density: list[float | None] = [None]
    if isinstance(adapter, AdapterConfig):
        # "auto" follows the planned device, while the fake tensors are on the CPU.
        reference = adapter.implementation == "reference" or (
            adapter.implementation == "auto" and device == "cuda" and dtype == torch.float64
        )
        adapter = replace(adapter, implementation="reference" if reference else "sparse")
        F = adapter.features
        by_density = [F, dense_share(dtype, device) * F]
    if device == "cpu":
        loss = replace(loss, logits_dtype=None)
    setup = Setup(target, pair, adapter, loss, config.optimizer.batch_size, tokens)
    return [_measure(setup, device, codes_per_token) for codes_per_token in by_density]


@lru_cache(maxsize=64)
def _measure(setup: Setup, device: str, codes_per_token: float | None) -> _Measured:
    """Measure one step of a fake model of up to three layers, cutoff 1."""
    layers = min(_LAYERS, setup.target.num_hidden_layers)
    codes = None if codes_per_token is None else [codes_per_token] * layers
    shape = (setup.sequences, setup.tokens)
    with fake_pair(setup, layers) as pair:
        model = ReplacementModel.create(pair, setup.trained)
        model.fused.plan_for(device, DTYPES[setup.pair.dtype])
        ids = torch.zeros(shape, dtype=torch.int64)
        padding = torch.ones(shape, dtype=torch.bool) if setup.sequences > 1 else None
        for parameter in model.adapters.parameters():
            parameter.register_post_accumulate_grad_hook(_drop_gradient)
        with _StepBytes({op: partial(f, device) for op, f in _WORKSPACES.items()}) as live:
            for parameter in model.parameters():
                live.see(parameter.data)
            weights = live.peak = live.alive
            out = objective(model, Batch(ids, padding, ids), 1, setup.objective, codes)
            live.end("head")
            saved, of_codes = live.alive - weights, live.alive_of(_ops.encode.default)
            out.loss.backward()
            live.end("backward")
        mlp, block = _bytes(model.mlps[0].base), _bytes(model.blocks[0])
        trained = [sum(p.numel() for p in part.parameters()) for part in model.adapters]
        frozen_block = block - mlp - _bytes(model.adapters[0])
        whole = weights - _bytes(model.adapters) - layers * (frozen_block + mlp)
    behind = [(0, 0), *live.layers]
    saved_layer, codes_layer = (b - a for a, b in zip(*behind[-2:], strict=True))
    return _Measured(
        layers=layers,
        whole=whole,
        frozen_block=frozen_block,
        mlp=mlp,
        trained=sum(trained),
        trained_layer=trained[0],
        logits=live.workspace[_ops.linear_kl.default],
        bytes={"saved": saved, "codes": of_codes}
        | {phase: peak - weights for phase, peak in live.phases.items()},
        saved_layer=saved_layer,
        codes_layer=codes_layer,
    )


def _drop_gradient(parameter: Tensor) -> None:
    parameter.grad = None


def _bytes(module: nn.Module) -> int:
    return sum(p.nbytes for p in module.parameters())
