"""Small sets of coders with random weights, of which no two widths are equal."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import save_file

from fastadapt.adapter.coder import SparseCoder
from fastadapt.adapter.coder_files import CoderSet
from fastadapt.adapter.hooks import MLP_HOOKS, PLACES, Hooks
from fastadapt.adapter.module import AdapterConfig, TranscoderAdapter
from fastadapt.adapter.sae import SAE, Transcoder

D, F, D_OUT = 5, 7, 3
RESID_POST = Hooks(PLACES["resid_post"], PLACES["resid_post"])
SETTINGS: dict[str, dict[str, Any]] = {
    "relu": {},
    "topk": {"k": 2},
    "batch_topk": {"k": 2},
    "jumprelu": {"bandwidth": 0.25, "initial_threshold": 0.125},
}


def settings(activation: str, **more: Any) -> AdapterConfig:
    return AdapterConfig(F, activation, **SETTINGS[activation], **more)


def randomised(coder: SparseCoder, seed: int) -> SparseCoder:
    """Give random values to every tensor; thresholds are positive."""
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in coder.state_dict().items():
            values = torch.randn(tensor.shape, generator=draw)
            tensor.copy_(0.2 * values.abs() if name == "threshold" else values)
    return coder.eval()


def make_coder(kind: str, activation: str = "relu", *, square: bool = False, **more: Any) -> Any:
    """Return a module of a kind: ``sae``, ``subtracting sae``, ``transcoder``, ``skip``, ...

    ``mlp`` is a transcoder of a run with ``adapter.base_mlp`` false.
    """
    d_out = D if square else D_OUT
    if "sae" in kind:
        config = settings(activation, **more)
        return SAE(D, config, subtract_b_dec=kind == "subtracting sae")
    if kind in ("adapter", "mlp"):
        config = settings(activation, base_mlp=kind == "adapter", **more)
        return TranscoderAdapter(D, config, d_out=d_out)
    return Transcoder(D, settings(activation, **more), d_out, skip=kind == "skip")


def make_set(
    kind: str, activation: str = "relu", *, layers: Iterable[int] = (0, 1), **more: Any
) -> CoderSet:
    """Return a set of random coders of :func:`make_coder`."""
    coders = {i: randomised(make_coder(kind, activation, **more), i) for i in layers}
    hooks = RESID_POST if "sae" in kind else MLP_HOOKS
    return CoderSet.from_modules(
        coders, hooks, model="org/model", metadata={"architecture": "qwen2"}
    )


def weights_of(coders: CoderSet) -> dict[int, dict[str, torch.Tensor]]:
    return {layer: dict(coder.state_dict()) for layer, coder in coders.coders()}


def assert_equal(ours: CoderSet, again: CoderSet, *, but: tuple[str, ...] = ()) -> None:
    """Check classes, settings, layers, hooks, and every bit of every tensor."""
    assert type(again.empty) is type(ours.empty)
    for name, value in vars(ours.empty.config).items():
        assert name in but or getattr(again.empty.config, name) == value, name
    assert getattr(again.empty, "subtract_b_dec", None) == getattr(
        ours.empty, "subtract_b_dec", None
    )
    assert again.hooks == ours.hooks
    theirs = weights_of(again)
    for layer, weights in weights_of(ours).items():
        assert theirs[layer].keys() == weights.keys()
        for name, tensor in weights.items():
            assert theirs[layer][name].dtype == tensor.dtype
            assert torch.equal(theirs[layer][name], tensor), (layer, name)


def outputs(coders: CoderSet, x: torch.Tensor) -> dict[int, torch.Tensor]:
    """Return what each coder computes in ``eval()``, in float64 from the formula."""
    results = {}
    for layer, coder in coders.coders():
        w = {name: tensor.double() for name, tensor in coder.state_dict().items()}
        b_dec = w.get("b_dec", torch.zeros(coder.d_out, dtype=torch.float64))
        read = x.double() - (b_dec if getattr(coder, "subtract_b_dec", False) else 0)
        z = read @ w["W_enc"].T + w["b_enc"]
        if coder.config.activation == "topk":
            k = int(coder.config.k or 0)
            a = torch.zeros_like(z).scatter(1, z.topk(k).indices, z.topk(k).values).clamp(min=0)
        else:
            a = torch.where(z > w.get("threshold", torch.zeros(())).clamp(min=0), z, 0)
        out = a @ w["W_dec"] + b_dec
        results[layer] = out + (x.double() @ w["W_skip"].T if "W_skip" in w else 0)
    return results


def folder(tmp_path: Path, name: str = "set") -> Path:
    path = tmp_path / name
    path.mkdir()
    return path


def write_cross_layer(
    path: Path, *, layers: int = 3, optional: bool = True
) -> list[dict[str, torch.Tensor]]:
    """Write a cross-layer transcoder by hand; return its tensors by layer."""
    draw, written = torch.Generator().manual_seed(5), []
    for i in range(layers):
        shapes: dict[str, tuple[int, ...]] = {"W_enc": (F, D), "b_enc": (F,), "b_dec": (D,)}
        shapes |= {"threshold": (F,), "W_skip": (D, D)} if optional else {}
        tensors = {
            name: torch.randn(shape, generator=draw, dtype=torch.float64)
            for name, shape in {**shapes, "W_dec": (F, layers - i, D)}.items()
        }
        decoder = {f"W_dec_{i}": tensors["W_dec"]}
        save_file(decoder, path / f"W_dec_{i}.safetensors")
        encoder = {f"{name}_{i}": tensors[name] for name in shapes}
        save_file(encoder, path / f"W_enc_{i}.safetensors")
        written.append(tensors)
    config = {"model_kind": "cross_layer_transcoder", "model_name": "org/model"}
    config["feature_input_hook"] = "hook_resid_mid"
    (path / "config.yaml").write_text(yaml.safe_dump(config))
    return written
