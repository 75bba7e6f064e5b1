"""A linearized forward written independently of the rules: recorded coefficients are replayed.

It is linear in the leaves of a graph, so removing a leaf changes an output by the leaf's edge. Each
row of a batch removes one leaf, and no gradient is taken.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from fastadapt.adapter.module import AdapterConfig
from fastadapt.graphs.attribution import KINDS, Leaves
from fastadapt.models.replacement import ReplacementModel

IDS = torch.tensor([5, 9, 23, 7, 31, 8, 12])


def randomised(pair: Any, features: int = 12) -> ReplacementModel:
    """Return a replacement model with random adapters, and random biases in all linear layers."""
    model = ReplacementModel.create(pair, AdapterConfig(features)).eval()
    draw = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for p in model.adapters.parameters():
            p.add_(0.3 * torch.randn(p.shape, generator=draw).to(p))
        adapter: Any
        for adapter in model.adapters:
            adapter.b_enc.sub_(0.5)
        for module in [*model.blocks.modules(), *pair.base_mlps.modules()]:
            if isinstance(module, nn.Linear):
                bias = 0.1 * torch.randn(module.out_features, generator=draw)
                module.bias = nn.Parameter(bias.to(module.weight), requires_grad=False)
    return model


class Replay:
    """The blocks with the coefficients of one forward of ``ids`` in the mode ``stream``."""

    def __init__(self, model: ReplacementModel, ids: Tensor, stream: Any) -> None:
        self.model, self.stream = model, stream
        self.inputs = model.block_inputs(ids[None], None)
        self.bases = [mlp.base for mlp in model.mlps]
        self.constant: dict[int, Tensor] = {}  # queries and keys
        self.quotient: dict[int, Tensor] = {}  # output over input of norms
        self.outputs: dict[int, Tensor] = {}
        self.added: list[Tensor] = []  # per layer, what the MLP's output has beside the base's
        with self._hooked(self._record):
            self._run(self.inputs.hidden)

    def without_each(self, leaves: Leaves, errors: list[Tensor] | None) -> tuple[list[Tensor], Any]:
        """Return the MLP's inputs and the final state ``[1 + N, T, D]``; row 1 + i lacks leaf i."""
        n = 1 + len(leaves)
        embedding = self.inputs.hidden.repeat(n, 1, 1)
        self.now = [part.repeat(n, 1, 1) for part in self.added]
        self.biased: dict[tuple[str, int], list[tuple[int, int]]] = {}
        for i in range(len(leaves)):
            row, layer, position = 1 + i, int(leaves.layer[i]), int(leaves.position[i])
            kind = KINDS[int(leaves.kind[i])]
            if kind == "token":
                embedding[row, position] = 0
            elif kind in ("attention bias", "mlp bias"):
                self.biased.setdefault((kind.split()[0], layer), []).append((row, position))
            else:
                adapter: Any = self.model.adapters[layer]
                change = {
                    "feature": leaves.activation[i] * adapter.W_dec[leaves.feature[i]],
                    "decoder bias": adapter.b_dec,
                    "error": None if errors is None else errors[layer][position],
                }[kind]
                self.now[layer][row, position] -= change.detach()
        with self._hooked(self._play):
            return self._run(embedding)

    @torch.no_grad()
    def _run(self, hidden: Tensor) -> tuple[list[Tensor], Tensor]:
        self.given: list[Tensor] = []
        for layer, arguments in enumerate(self.inputs.arguments):
            hidden, _ = self.model.block(layer, hidden, arguments, self.stream)
        return list(self.given), self.model.final_norm(hidden, self.stream)

    @contextmanager
    def _hooked(self, hook: Any) -> Iterator[None]:
        with ExitStack() as stack:
            for module in getattr(self.model.model, self.model.paths.decoder).modules():
                if not isinstance(module, nn.ModuleList):
                    stack.callback(module.register_forward_hook(hook).remove)
            yield

    def _record(self, module: Any, args: Any, out: Any) -> None:
        if type(module).__name__ == "AdaptedMLP":
            self.added.append(out - module.base(args[0]))
        elif type(module).__name__.endswith("RMSNorm"):
            self.quotient[id(module)] = out / args[0]
        elif isinstance(out, Tensor):
            self.outputs[id(module)] = out

    def _play(self, module: Any, args: Any, out: Any) -> Any:
        if type(module).__name__ == "AdaptedMLP":
            self.given.append(args[0])
            layer = len(self.given) - 1
            return self._gated(module.base, args[0]) + self.now[layer]
        if type(module).__name__.endswith("RMSNorm"):
            return args[0] * self.quotient[id(module)]
        for layer, block in enumerate(self.model.blocks):
            attention: Any = block.self_attn
            if module in attention.modules() and isinstance(module, nn.Linear):
                for row, position in self.biased.get(("attention", layer), ()):
                    out[row, position] -= module.bias
                recorded = self.outputs[id(module)].expand_as(out)
                if module in (getattr(attention, "q_proj", 0), getattr(attention, "k_proj", 0)):
                    return recorded
                if module is getattr(attention, "qkv_proj", None):
                    width = self.model.d_model // 2  # two of four heads are keys and values
                    return torch.cat([recorded[..., :-width], out[..., -width:]], -1)
        for layer, base in enumerate(self.bases):
            if isinstance(module, nn.Linear) and module in base.modules():
                for row, position in self.biased.get(("mlp", layer), ()):
                    out[row, position] -= module.bias
        return out

    def _gated(self, mlp: Any, x: Tensor) -> Tensor:
        """Half of ``a · u0`` and half of ``a0 · u``, where ``a`` is linear in the gate."""
        if hasattr(mlp, "gate_up_proj"):
            gate, up = mlp.gate_up_proj(x).chunk(2, -1)
            gate0, up0 = self.outputs[id(mlp.gate_up_proj)].chunk(2, -1)
        else:
            gate, up = mlp.gate_proj(x), mlp.up_proj(x)
            gate0, up0 = self.outputs[id(mlp.gate_proj)], self.outputs[id(mlp.up_proj)]
        act0 = self.outputs[id(getattr(mlp, "act_fn", None) or mlp.activation_fn)]
        act = gate * act0 / gate0
        out: Tensor = mlp.down_proj((act * up0 + act0 * up) / 2)
        return out
