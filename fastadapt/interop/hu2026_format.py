"""The format of the checkpoints published with arXiv 2602.20904: names, shapes, configuration.

See :mod:`fastadapt.interop.hu2026`, which reads and writes them. F features, D width.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import msgspec
import torch
from torch import Tensor
from typing_extensions import TypedDict

from fastadapt.adapter.module import AdapterConfig, TranscoderAdapter
from fastadapt.errors import UserError
from fastadapt.io.documents import check, read_text
from fastadapt.io.names import in_model
from fastadapt.io.tensors import check_tensor
from fastadapt.models.hf_checkpoint import (
    CONFIG,
    INDEX,
    Lazy,
    as_json,
    indexed_files,
    lazy_tensors,
    write_checkpoint,
)
from fastadapt.models.pretrained import fetch, model_config

ARCHITECTURE = "Qwen2ForCausalLMWithTranscoder"
NAMES = {
    "W_enc": "transcoder_enc.weight",
    "b_enc": "transcoder_enc.bias",
    "W_dec": "transcoder_dec.weight",
    "b_dec": "transcoder_dec.bias",
}
_ADAPTER = re.compile(r"model\.layers\.\d+\.mlp\.transcoder_(enc|dec)\.(weight|bias)")


class PublishedKeys(TypedDict, total=False):
    """Keys of ``config.json`` that the format adds."""

    transcoder_n_features: Annotated[int, msgspec.Meta(ge=1, le=1 << 28)]
    transcoder_dec_bias: bool


def published_tensors(source: str, revision: str | None) -> dict[str, Lazy]:
    """The adapters' tensors of a checkpoint, by name."""
    tensors = lazy_tensors(source, revision, "checkpoint")
    return {name: read for name, read in tensors.items() if _ADAPTER.fullmatch(name)}


def published_config(source: str, revision: str | None) -> Any:
    """transformers' configuration of a checkpoint, which must be a published one."""
    config = model_config(source, revision, trust=False)
    features = getattr(config, "transcoder_n_features", None)
    check(vars(config), PublishedKeys, f"{source}: {CONFIG}")
    if config.model_type != "qwen2" or features is None:
        raise UserError(
            f"{source}: expected a checkpoint of {ARCHITECTURE} with transcoder_n_features in its "
            f"config.json, got model_type={config.model_type!r}, transcoder_n_features={features!r}"
        )
    return config


def adapters_of(source: str, config: Any, held: Mapping[str, Lazy]) -> Iterator[TranscoderAdapter]:
    """The adapters of a checkpoint, layer by layer; strict about names and shapes."""
    kind = AdapterConfig(n_features=config.transcoder_n_features)
    biased = bool(getattr(config, "transcoder_dec_bias", True))
    layers = [f"model.layers.{i}.mlp." for i in range(config.num_hidden_layers)]
    names = [name for name in NAMES if biased or name != "b_dec"]
    wanted = {layer + NAMES[name] for layer in layers for name in names}
    if odd := sorted(wanted ^ held.keys()):
        raise UserError(
            f"{source}: {len(odd)} tensors of the transcoders are missing, or not of the "
            f"{len(layers)} layers of config.json: {odd[:3]}"
        )
    for layer in layers:
        adapter = TranscoderAdapter(config.hidden_size, kind, device="meta")
        own: dict[str, Tensor] = {}
        for name, empty in adapter.named_parameters():
            if name not in names:
                own[name] = torch.zeros_like(own["b_enc"][:1]).expand(empty.shape).contiguous()
                continue
            tensor = held[layer + NAMES[name]]()
            shape = empty.T.shape if name == "W_dec" else empty.shape
            check_tensor(tensor, source, layer + NAMES[name], shape=shape, finite=True)
            own[name] = tensor.T.contiguous() if name == "W_dec" else tensor
        adapter.load_state_dict(own, assign=True)
        yield adapter


def _transposed(read: Lazy) -> Tensor:
    return read().T


def write_published(
    folder: str | Path,
    tensors: Mapping[str, Lazy],
    config: Mapping[str, Any],
    first: TranscoderAdapter,
    *,
    companions: str,
    like: str | None,
    shard_bytes: float,
    revision: str | None = None,
    overwrite: bool = False,
) -> None:
    """Write a checkpoint of ``tensors``, where adapters are still ``...mlp.adapter.W_enc`` etc."""
    if config.get("model_type") != "qwen2" or first.config.activation != "relu":
        raise UserError(
            "the published format is of Qwen2 models with ReLU adapters; this is "
            f"{config.get('model_type')} with {first.config.activation}"
        )
    biased, index, text = True, None, None
    if like is not None:
        biased = bool(getattr(published_config(like, None), "transcoder_dec_bias", True))
        text = _text(like, CONFIG)
        # An index beside a single file is left over from an earlier save.
        single = fetch(like, "model.safetensors", None)
        index = _text(like, INDEX) if single is None else None
        if index is not None:
            indexed_files(index, f"{like}: {INDEX}")  # before anything is written
        shard_bytes, companions, revision = float("inf"), like, None
    if text is None:
        dtype = str(first.W_enc.dtype).removeprefix("torch.")
        own = {key: value for key, value in config.items() if key != "torch_dtype"}
        own |= {"architectures": [ARCHITECTURE], "dtype": dtype}
        own |= {"transcoder_n_features": first.n_features, "transcoder_dec_bias": True}
        text = as_json(own)
    named: dict[str, Lazy] = {}
    for ours, read in tensors.items():
        layer, found, name = ours.partition("adapter.")
        if not found:
            named[ours] = read
        elif name == "b_dec" and not biased:
            if torch.count_nonzero(read()):
                raise UserError(f"{like} has no decoder biases, but {ours} is not zero")
        else:
            named[layer + NAMES[name]] = partial(_transposed, read) if name == "W_dec" else read
    write_checkpoint(
        Path(folder),
        named,
        text,
        companions=companions,
        revision=revision,
        index=index,
        shard_bytes=shard_bytes,
        overwrite=overwrite,
    )


def _text(source: str, name: str) -> str | None:
    file = fetch(source, name, None)
    return None if file is None else read_text(in_model(file, source))
