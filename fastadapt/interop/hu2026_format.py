"""Define the format of the checkpoints published with arXiv 2602.20904: names, shapes, config.

:mod:`fastadapt.interop.hu2026` is the public interface. F features, D width.
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
from fastadapt.models.huggingface.checkpoint import (
    CONFIG,
    INDEX,
    Companions,
    Lazy,
    as_json,
    companions_of,
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
    """Schema of the keys that the format adds to ``config.json``."""

    transcoder_n_features: Annotated[int, msgspec.Meta(ge=1, le=1 << 28)]
    transcoder_dec_bias: bool


def published_tensors(source: str, revision: str | None) -> dict[str, Lazy]:
    """Return, by tensor name, functions that read a checkpoint's adapter tensors."""
    tensors = lazy_tensors(source, revision, "checkpoint")
    return {name: read for name, read in tensors.items() if _ADAPTER.fullmatch(name)}


def published_config(source: str, revision: str | None) -> Any:
    """Return transformers' configuration of a published checkpoint.

    Raises:
        UserError: the checkpoint does not have the published format.
    """
    config = model_config(source, revision, trust=False)
    features = getattr(config, "transcoder_n_features", None)
    check(vars(config), PublishedKeys, f"{source}: {CONFIG}")
    if config.model_type != "qwen2" or features is None:
        raise UserError(
            f"{source}: expected a checkpoint of {ARCHITECTURE} with transcoder_n_features in its "
            f"config.json, got model_type={config.model_type!r}, transcoder_n_features={features!r}"
        )
    return config


def iter_adapters(
    source: str, config: Any, tensors: Mapping[str, Lazy]
) -> Iterator[TranscoderAdapter]:
    """Yield the adapters of a checkpoint layer by layer.

    Raises:
        UserError: a tensor is missing, unexpected, misshapen or not finite.
    """
    biased = bool(getattr(config, "transcoder_dec_bias", True))
    settings = AdapterConfig(n_features=config.transcoder_n_features, bias=biased)
    layers = [f"model.layers.{i}.mlp." for i in range(config.num_hidden_layers)]
    names = [name for name in NAMES if biased or name != "b_dec"]
    expected = {layer + NAMES[name] for layer in layers for name in names}
    if odd := sorted(expected ^ tensors.keys()):
        raise UserError(
            f"{source}: {len(odd)} transcoder tensors are missing, or belong to none of the "
            f"{len(layers)} layers of config.json (num_hidden_layers): {odd[:3]}"
        )
    sizes = f"hidden_size {config.hidden_size}, transcoder_n_features {settings.n_features}"
    for layer in layers:
        adapter = TranscoderAdapter(config.hidden_size, settings, device="meta")
        weights: dict[str, Tensor] = {}
        for name, empty in adapter.named_parameters():
            tensor = tensors[layer + NAMES[name]]()
            shape = empty.T.shape if name == "W_dec" else empty.shape
            check_tensor(
                tensor, f"{source} ({sizes})", layer + NAMES[name], shape=shape, finite=True
            )
            weights[name] = tensor.T.contiguous() if name == "W_dec" else tensor
        adapter.load_state_dict(weights, assign=True)
        yield adapter


def _transposed(read: Lazy) -> Tensor:
    return read().T


def check_writable(config: Mapping[str, Any], first: TranscoderAdapter) -> None:
    """Raise ``UserError`` if the published format cannot hold a model or its adapters."""
    if config.get("model_type") != "qwen2" or first.config.activation != "relu":
        raise UserError(
            "the format hu2026 needs a Qwen2 model with ReLU adapters; this is "
            f"{config.get('model_type')} with {first.config.activation}"
        )
    if not first.config.base_mlp:
        raise UserError(
            "the format hu2026 needs adapters beside the base's MLPs; these transcoders replace "
            "them (adapter.base_mlp is false)"
        )


def write_published(
    folder: str | Path,
    tensors: Mapping[str, Lazy],
    config: Mapping[str, Any],
    first: TranscoderAdapter,
    *,
    companions: Companions,
    like: str | None,
    shard_bytes: float,
    overwrite: bool = False,
) -> None:
    """Write ``tensors`` as a published checkpoint.

    Adapters have this library's names (``...mlp.adapter.W_enc``) in ``tensors``. ``first`` is the
    adapter of layer 0; :func:`check_writable` has accepted both. See
    :func:`fastadapt.interop.hu2026.save` for the other arguments and the errors.
    """
    biased, index, text = first.config.bias, None, None
    if like is not None:
        biased = bool(getattr(published_config(like, None), "transcoder_dec_bias", True))
        text = _text(like, CONFIG)
        # An index beside a single file remains from an earlier save and is ignored.
        single = fetch(like, "model.safetensors", None)
        index = _text(like, INDEX) if single is None else None
        if index is not None:
            indexed_files(index, f"{like}: {INDEX}")  # raises before files are written
        shard_bytes, companions = float("inf"), companions_of(like, like)
    if text is None:
        dtype = str(first.W_enc.dtype).removeprefix("torch.")
        values = {key: value for key, value in config.items() if key != "torch_dtype"}
        values |= {"architectures": [ARCHITECTURE], "dtype": dtype}
        values |= {"transcoder_n_features": first.n_features, "transcoder_dec_bias": biased}
        text = as_json(values)
    published: dict[str, Lazy] = {}
    for full_name, read in tensors.items():
        layer, separator, name = full_name.partition("adapter.")
        if not separator:
            published[full_name] = read
        elif name == "b_dec" and not biased:
            if torch.count_nonzero(read()):
                raise UserError(f"{like} has no decoder biases, but {full_name} is not zero")
        else:
            published[layer + NAMES[name]] = partial(_transposed, read) if name == "W_dec" else read
            if name == "W_dec" and biased and not first.config.bias:  # `like` has biases
                published[layer + NAMES["b_dec"]] = first.decoder_bias
    write_checkpoint(
        Path(folder),
        published,
        text,
        companions=companions,
        index=index,
        shard_bytes=shard_bytes,
        overwrite=overwrite,
    )


def _text(source: str, name: str) -> str | None:
    file = fetch(source, name, None)
    return None if file is None else read_text(in_model(file, source))
