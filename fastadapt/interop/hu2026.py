"""Read and write the checkpoints published with arXiv 2602.20904, and convert their adapters.

A published checkpoint is a full Qwen2 checkpoint (``Qwen2ForCausalLMWithTranscoder``). It holds
attention, norms, embeddings and head of the target, the MLPs of the base, and for each MLP
``transcoder_enc.{weight [F, D], bias [F]}`` and ``transcoder_dec.{weight [D, F], bias [D]}``. The
decoder weight is the transpose of this library's ``W_dec``. The target's MLPs are not stored, so
the mode ``target`` needs the target's checkpoint as well.

Tensors are read one at a time and written one shard at a time. F features, D width.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastadapt.adapter.files import read_transcoders, save_adapters
from fastadapt.adapter.module import TranscoderAdapter
from fastadapt.errors import UserError
from fastadapt.interop.hu2026_format import (
    check_writable,
    iter_adapters,
    published_config,
    published_tensors,
    write_published,
)
from fastadapt.models.architectures import ARCHITECTURES
from fastadapt.models.huggingface.checkpoint import (
    SHARD_BYTES,
    Lazy,
    adapter_tensors,
    check_output,
    companions_of,
    lazy_tensors,
    replacement_tensors,
    target_values,
)
from fastadapt.models.pair import DTYPES, choose_attention, choose_device
from fastadapt.models.pretrained import (
    load_causal_lm,
    load_mlps,
    load_tokenizer,
    model_config,
)
from fastadapt.models.replacement import ModelPair, PairConfig, PairMismatchError, ReplacementModel
from fastadapt.models.sources.checks import check_configs
from fastadapt.models.sources.low_rank import merged_state

__all__ = ["load"]


def load(
    source: str,
    target: str | None = None,
    *,
    revision: str | None = None,
    target_revision: str | None = None,
    dtype: str | None = None,
    attention: str = "auto",
    device: str = "auto",
) -> ReplacementModel:
    """Load a published checkpoint as a replacement model with trainable adapters.

    Args:
        source: the checkpoint: a local folder or a hub id.
        target: the fine-tuned model that the checkpoint was built from. Its MLPs are loaded, and
            its other weights are compared with the checkpoint's. If None, calls in the mode
            ``target`` (and the objective) raise :class:`UserError`.
        revision, target_revision: branch, tag or commit on the hub.
        dtype: dtype of all weights (``bfloat16``, ``float32``, ...); None is the checkpoint's.
        attention, device: as in :class:`PairConfig`.

    Raises:
        UserError: the checkpoint cannot be read, or a tensor is missing or unexpected.
        PairMismatchError: the checkpoint was not built from ``target``.
    """
    config = published_config(source, revision)
    tensors = published_tensors(source, revision)
    stored = str(config.dtype or torch.float32).removeprefix("torch.")
    pair = PairConfig(
        target or source,
        source,
        target_revision if target else revision,
        revision,
        dtype=dtype or stored,
    )
    place, weight_dtype = choose_device(device), DTYPES[pair.dtype]
    paths = ARCHITECTURES["qwen2"]
    model = load_causal_lm(
        source,
        revision,
        device=place,
        dtype=weight_dtype,
        attention=choose_attention(attention, place, weight_dtype, paths.attention)[0],
        trust=False,
        role="checkpoint",
        besides=tensors,
    )
    blocks = model.model.layers
    base_mlps = nn.ModuleList(block.mlp for block in blocks)
    target_mlps: Any = [None] * len(blocks)
    if target is not None:
        target_config = model_config(target, target_revision, trust=False)
        check_configs(target_config, config)
        _check_shared(target, target_revision, lazy_tensors(source, revision, "checkpoint"))
        target_mlps = load_mlps(
            target,
            target_revision,
            target_config,
            device=place,
            dtype=weight_dtype,
            trust=False,
            role="target",
        )
    for block, mlp in zip(blocks, target_mlps, strict=True):
        block.mlp = mlp
    adapters = nn.ModuleList(
        adapter.to(device=place, dtype=weight_dtype)
        for adapter in iter_adapters(source, config, tensors)
    )
    return ReplacementModel(
        ModelPair(
            target=model,
            base_mlps=base_mlps,
            tokenizer=load_tokenizer(pair.target, pair.target_revision, trust=False),
            config=pair,
            paths=paths,
            revisions={"base": getattr(config, "_commit_hash", None)},
        ),
        adapters,
    )


def save(
    model: ReplacementModel,
    folder: str | Path,
    like: str | None = None,
    *,
    shard_bytes: float = SHARD_BYTES,
    overwrite: bool = False,
) -> None:
    """Write a replacement model of a Qwen2 pair as a published checkpoint.

    Args:
        model: a replacement model with ReLU adapters.
        folder: a new or empty folder, or with ``overwrite`` an export.
        like: a published checkpoint whose ``config.json``, division into shards, tokenizer and
            generation settings are copied. A model loaded from this checkpoint and not changed is
            written as the same bytes. If None, these files derive from the model.
        shard_bytes: largest size of a shard in bytes, if ``like`` is None.
        overwrite: replace an existing export after the new one is on disk.

    Raises:
        UserError: the format does not support the architecture or activation, or the folder
            holds other files.
        RunError: the folder cannot be written; it is left as it was.
    """
    first = model.adapters[0]
    if not isinstance(first, TranscoderAdapter):
        kind = getattr(first, "kind", type(first).__name__)
        raise UserError(
            "the format hu2026 needs transcoder adapters; this model's adapters are of kind "
            f"{kind!r}"
        )
    config = model.model.config.to_diff_dict()
    check_writable(config, first)  # before the pair's files are looked up
    write_published(
        folder,
        {
            name.replace(".mlp.base.", ".mlp."): partial(_to_cpu, read)
            for name, read in merged_state(model.model, besides=".mlp.target.")
        },
        config,
        first,
        companions=companions_of(
            model.pair.config.target,
            model.pair.config.base,
            model.pair.revisions,
            model.pair.config.tokenizer,
        ),
        like=like,
        shard_bytes=shard_bytes,
        overwrite=overwrite,
    )


def to_adapters(
    source: str,
    folder: str | Path,
    *,
    revision: str | None = None,
    target: str | None = None,
    base: str | None = None,
    overwrite: bool = False,
) -> None:
    """Convert the adapters of a published checkpoint to this library's format.

    Args:
        source, revision: the published checkpoint.
        folder, overwrite: as in :func:`save`.
        target, base: the pair to record with the adapters. Without a base, the checkpoint itself is
            recorded, since it holds the base's MLPs.

    Raises:
        UserError: the checkpoint cannot be read, lacks a tensor, or the folder holds other
            files.
    """
    check_output(Path(folder), overwrite=overwrite)
    config = published_config(source, revision)
    tensors = published_tensors(source, revision)
    commit = getattr(config, "_commit_hash", None)
    metadata = {
        "target": target,
        "base": base or source,
        "revisions": {"target": None, "base": None if base else commit},
        "published": {"checkpoint": source, "revision": commit},
    }
    save_adapters(iter_adapters(source, config, tensors), folder, metadata)


def from_adapters(
    adapters: str | Path,
    folder: str | Path,
    *,
    target: str,
    base: str,
    revisions: Mapping[str, str | None] | None = None,
    tokenizer: str | None = None,
    like: str | None = None,
    shard_bytes: float = SHARD_BYTES,
    overwrite: bool = False,
) -> None:
    """Write a folder of adapters and their pair as a published checkpoint, from files only.

    Args:
        adapters: a folder written by :func:`fastadapt.save_adapters`.
        target, base: folders or hub ids of the pair.
        revisions: revisions with the keys ``target`` and ``base``.
        tokenizer: folder or hub id of the tokenizer, if it is not the target's.
        folder, like, shard_bytes, overwrite: as in :func:`save`, which also lists the errors.
    """
    revisions = revisions or {}
    layers, _ = read_transcoders(adapters, "the published format")
    config, first = target_values(target, base, revisions), layers[0]()
    check_writable(config, first)
    if len(layers) != config.get("num_hidden_layers"):
        raise UserError(
            f"{adapters}: expected one adapter per layer of target {target} "
            f"({config.get('num_hidden_layers')}), got {len(layers)}"
        )
    tensors = replacement_tensors(target, base, revisions)
    tensors |= adapter_tensors(layers, ARCHITECTURES["qwen2"])
    write_published(
        folder,
        tensors,
        config,
        first,
        companions=companions_of(target, base, revisions, tokenizer),
        like=like,
        shard_bytes=shard_bytes,
        overwrite=overwrite,
    )


def _check_shared(target: str, revision: str | None, published: Mapping[str, Lazy]) -> None:
    """Raise unless the weights outside the MLPs equal the target's, in the checkpoint's dtype."""
    differing = []
    for name, read in lazy_tensors(target, revision, "target").items():
        if ".mlp." in name:
            continue
        weight = published[name]() if name in published else None
        if weight is None or not torch.equal(read().to(weight.dtype), weight):
            differing.append(name)
    if differing:
        raise PairMismatchError(
            f"target {target} is not the model that the checkpoint was built from: "
            f"{len(differing)} of the weights that they should share differ: {differing[:3]}. "
            "Give the target that it was built from"
        )


def _to_cpu(read: Lazy) -> Tensor:
    return read().cpu()
