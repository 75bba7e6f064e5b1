"""Run elementwise operations inside transformers' frozen modules as fused kernels.

RMSNorms, the gated product of MLPs, and the rotary embedding of attention call
:mod:`fastadapt.kernels.frozen` where its kernels run: on a GPU, in 16 or 32 bits. Everywhere else a
module's own forward runs. Modules keep their class, parameters and hooks, and no forward of a model
is copied here.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from inspect import signature
from types import FunctionType, MethodType
from typing import Any, Literal

import torch
from torch import Tensor, nn

from fastadapt.kernels.frozen import DTYPES, gated, rms_norm, rope, runs
from fastadapt.models.adapted_mlp import has_hooks
from fastadapt.models.architectures import Paths

#: ``auto``: fused where the kernels run. ``off``: the modules' own operations. ``triton`` and
#: ``reference`` select an implementation on every device, for plans and tests.
Implementation = Literal["auto", "off", "triton", "reference"]

#: transformers' names of activations that :func:`fastadapt.kernels.frozen.gated` computes.
_ACTIVATIONS = {"silu": "silu", "swish": "silu", "gelu_pytorch_tanh": "gelu_tanh"}
_DEPRECATION = "transformers.utils.deprecation"
_ROTARY = "apply_rotary_pos_emb"  # the function's name in every model of transformers


class FusedBlocks:
    """Fused operations of one model's frozen modules, and the switch for all of them.

    Copies of the model share the switch.

    Attributes:
        implementation: which implementation runs, see :data:`Implementation`.
        fused: names of the kinds of modules that were fused, of ``norms, mlps, rotary``.
    """

    def __init__(self, implementation: Implementation = "auto") -> None:
        self.implementation: Implementation = implementation
        self.fused: set[str] = set()
        self._attention: dict[type[nn.Module], FunctionType | None] = {}

    def __deepcopy__(self, memo: dict[int, Any]) -> FusedBlocks:
        """Return the switch itself, which the forwards of copied modules read too."""
        return self

    def plan_for(self, device_type: str, dtype: torch.dtype) -> None:
        """Select what ``auto`` selects on a device, for fake tensors that stand for tensors there.

        Args:
            device_type: ``cuda`` or another type of torch.
            dtype: dtype of the frozen weights.
        """
        if self.implementation == "auto":
            runs_there = device_type == "cuda" and dtype in DTYPES
            self.implementation = "triton" if runs_there else "off"

    @contextmanager
    def off(self) -> Iterator[None]:
        """Run the modules' own operations inside the context."""
        before, self.implementation = self.implementation, "off"
        try:
            yield
        finally:
            self.implementation = before

    def fuse(self, decoder: nn.Module, base_mlps: nn.ModuleList, config: Any, paths: Paths) -> None:
        """Fuse the modules of a decoder and the MLPs of its base.

        Modules are recognised by the names of transformers' classes and by the configuration's
        activation. A module whose forward was replaced is left as it is.

        Args:
            decoder: embeddings, blocks and last norm of the target.
            base_mlps: the base's MLPs.
            config: transformers' configuration of the target.
            paths: names of the architecture's parts, and its formula of norms.
        """
        name = getattr(config, "hidden_activation", None) or getattr(config, "hidden_act", None)
        for module in [*decoder.modules(), *base_mlps.modules()]:
            kind = type(module).__name__
            if "forward" in vars(module):
                continue
            if kind.endswith("RMSNorm") and hasattr(module, "weight"):
                module.forward = MethodType(self._norm(paths), module)
                self.fused.add("norms")
            elif kind.endswith("MLP") and name in _ACTIVATIONS and hasattr(module, "down_proj"):
                module.forward = MethodType(self._mlp(_ACTIVATIONS[name]), module)
                self.fused.add("mlps")
            elif kind.endswith("Attention") and paths.rotates_halves:
                forward = self._attention_forward(type(module))
                if forward is not None:
                    module.forward = MethodType(forward, module)
                    self.fused.add("rotary")

    def _replaces(self, x: Tensor) -> bool:
        """Return whether kernels replace a module's operations on ``x``."""
        if self.implementation == "auto":
            return runs(x)
        return self.implementation != "off"

    def _norm(self, paths: Paths) -> Any:
        def forward(norm: Any, x: Tensor) -> Tensor:
            weight = norm.weight
            trains = weight.requires_grad and torch.is_grad_enabled()
            if trains or weight.dtype != x.dtype or not self._replaces(x):
                return _own_forward(norm, x)
            eps = norm.variance_epsilon if hasattr(norm, "variance_epsilon") else norm.eps
            return rms_norm(
                x,
                weight,
                eps,
                offset=paths.norm_offset,
                rounds_first=paths.norm_rounds_first,
                implementation=self.implementation,
            )

        return forward

    def _mlp(self, activation: str) -> Any:
        def forward(mlp: Any, x: Tensor) -> Tensor:
            joint = hasattr(mlp, "gate_up_proj")  # Phi-3: one product, cut into halves
            if has_hooks(mlp.activation_fn if joint else mlp.act_fn) or not self._replaces(x):
                return _own_forward(mlp, x)
            if joint:
                gate, up = mlp.gate_up_proj(x).chunk(2, dim=-1)
            else:
                gate, up = mlp.gate_proj(x), mlp.up_proj(x)
            hidden = gated(gate, up, activation, implementation=self.implementation)
            out: Tensor = mlp.down_proj(hidden)
            return out

        return forward

    def _attention_forward(self, kind: type[nn.Module]) -> FunctionType | None:
        """Return a class's forward with another rotary embedding among its globals.

        transformers' attention calls a function of its module by name. The module itself must not
        change, since other models use it too.
        """
        if kind in self._attention:
            return self._attention[kind]
        plain: Any = kind.forward
        # transformers 5.24 renames an argument in a wrapper, for callers of earlier versions alone.
        while getattr(plain, "__globals__", {}).get("__name__") == _DEPRECATION:
            plain = plain.__wrapped__
        if not isinstance(plain, FunctionType) or _ROTARY not in plain.__code__.co_names:
            self._attention[kind] = None
            return None
        unfused: Any = plain.__globals__[_ROTARY]
        # With the package kernels installed, the function is a module.
        arguments = list(signature(getattr(unfused, "forward", unfused)).parameters)
        if arguments[:4] != ["q", "k", "cos", "sin"]:  # Gemma 4
            self._attention[kind] = None
            return None
        casts = _casts(unfused)

        def rotary(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *more: Any, **named: Any) -> Any:
            default = not more and not named and (casts or cos.dtype == q.dtype)
            if not default or not self._replaces(q):
                return unfused(q, k, cos, sin, *more, **named)
            return rope(q, k, cos, sin, implementation=self.implementation)

        # torch.compile takes the globals of a function with this name from the module itself.
        names = {name: value for name, value in plain.__globals__.items() if name != "__name__"}
        forward = FunctionType(
            plain.__code__,
            names | {_ROTARY: rotary},
            plain.__name__,
            plain.__defaults__,
            plain.__closure__,
        )
        forward.__kwdefaults__ = plain.__kwdefaults__
        self._attention[kind] = forward
        return forward


def _own_forward(module: nn.Module, x: Tensor) -> Tensor:
    """Run the forward of a module's class."""
    forward: Any = type(module).forward
    out: Tensor = forward(module, x)
    return out


def _casts(rotary: Any) -> bool:
    """Return whether a rotary embedding returns q's dtype for angles in float32 (OLMo 2)."""
    q = torch.zeros(1, 1, 1, 2, dtype=torch.float16)
    angle = torch.zeros(1, 1, 2)
    return bool(rotary(q, q, angle, angle)[0].dtype == q.dtype)
