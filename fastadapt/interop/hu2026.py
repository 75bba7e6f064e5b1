"""The checkpoints published with arXiv 2602.20904: read, written, and turned into adapters alone.

They are full Qwen2 checkpoints (``Qwen2ForCausalLMWithTranscoder``): attention, norms, embeddings
and head of the target, MLPs of the base, and beside each MLP ``transcoder_enc.{weight [F, D], bias
[F]}`` and ``transcoder_dec.{weight [D, F], bias [D]}``, whose decoder lies the other way round than
ours. That is the replacement: the target's own MLPs are not among it, so whoever wants the target
mode names the target too.

Nothing is ever in memory twice: tensors are read one at a time, and written one shard at a time.
F features, D width.
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
    adapters_of,
    published_config,
    published_tensors,
    write_published,
)
from fastadapt.models.hf_checkpoint import (
    CONFIG,
    SHARD_BYTES,
    Lazy,
    adapter_tensors,
    check_output,
    lazy_tensors,
    read_json,
    replacement_tensors,
)
from fastadapt.models.pair import DTYPES, check_configs, choose_attention, choose_device
from fastadapt.models.pretrained import (
    ARCHITECTURES,
    load_causal_lm,
    load_mlps,
    load_tokenizer,
    model_config,
)
from fastadapt.models.replacement import ModelPair, PairConfig, PairMismatchError, ReplacementModel


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
    """A published checkpoint as a replacement model, its adapters frozen in no way.

    Args:
        source: the checkpoint: a local folder or a hub id.
        target: the fine-tuned model that it was made from, of which the MLPs are read, and whose
            other weights are compared with the checkpoint's. Without it there is no target mode
            (and no objective): calls in it are a :class:`UserError`.
        revision, target_revision: branch, tag or commit on the hub.
        dtype: of all weights (``bfloat16``, ``float32``, ...); the checkpoint's if not given.
        attention, device: as in :class:`PairConfig`.

    Raises:
        UserError: no such checkpoint, or one that lacks a tensor or has one too many.
        PairMismatchError: the target is another model than the checkpoint was made from.
    """
    config = published_config(source, revision)
    held = published_tensors(source, revision)
    stored = str(config.dtype or torch.float32).removeprefix("torch.")
    pair = PairConfig(
        target or source,
        source,
        target_revision if target else revision,
        revision,
        dtype=dtype or stored,
    )
    on, wide = choose_device(device), DTYPES[pair.dtype]
    paths = ARCHITECTURES["qwen2"]
    model = load_causal_lm(
        source,
        revision,
        device=on,
        dtype=wide,
        attention=choose_attention(attention, on, wide, paths.attention)[0],
        trust=False,
        role="checkpoint",
        besides=held,
    )
    blocks = model.model.layers
    base_mlps = nn.ModuleList(block.mlp for block in blocks)
    own: Any = [None] * len(blocks)
    if target is not None:
        theirs = model_config(target, target_revision, trust=False)
        check_configs(theirs, config)
        _check_shared(target, target_revision, lazy_tensors(source, revision, "checkpoint"))
        own = load_mlps(
            target, target_revision, theirs, device=on, dtype=wide, trust=False, role="target"
        )
    for block, mlp in zip(blocks, own, strict=True):
        block.mlp = mlp
    adapters = nn.ModuleList(
        adapter.to(device=on, dtype=wide) for adapter in adapters_of(source, config, held)
    )
    tokens, at = (source, revision) if target is None else (target, target_revision)
    return ReplacementModel(
        ModelPair(
            target=model,
            base_mlps=base_mlps,
            tokenizer=load_tokenizer(tokens, at, trust=False),
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
        model: its adapters are ReLU ones.
        folder: new or empty, or with ``overwrite`` an export and nothing else.
        like: a published checkpoint of which ``config.json``, the division into shards, tokenizer
            and generation settings are kept: what was read from it and not changed is written as
            the same bytes. Else they follow from the model's own and ``shard_bytes``.
        shard_bytes: of a shard at most.
        overwrite: replace an export that is there, once the new one is on the disk.

    Raises:
        UserError: an architecture or activation that the format cannot say, or a folder in use.
        RunError: the folder cannot be written; it is as it was.
    """
    first = model.adapters[0]
    if not isinstance(first, TranscoderAdapter):
        kind = getattr(first, "kind", type(first).__name__)
        raise UserError(
            f"the published format is for transcoder adapters; this model's are of kind {kind!r}"
        )
    untied = {name for name, _ in model.model.named_parameters()}
    write_published(
        folder,
        {
            name.replace(".mlp.base.", ".mlp."): partial(_itself, tensor)
            for name, tensor in model.model.state_dict().items()
            if name in untied and ".mlp.target." not in name
        },
        model.model.config.to_diff_dict(),
        first,
        companions=model.pair.config.target,
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
    """Write the adapters of a published checkpoint, by themselves, in this library's format.

    ``target`` and ``base`` are recorded as the pair that they belong to; without a base it is the
    checkpoint itself, which holds the base's MLPs. ``folder`` and ``overwrite`` as in :func:`save`.
    """
    check_output(Path(folder), overwrite=overwrite)
    config = published_config(source, revision)
    held = published_tensors(source, revision)
    commit = getattr(config, "_commit_hash", None)
    metadata = {
        "target": target,
        "base": base or source,
        "revisions": {"target": None, "base": None if base else commit},
        "published": {"checkpoint": source, "revision": commit},
    }
    save_adapters(adapters_of(source, config, held), folder, metadata)


def from_adapters(
    adapters: str | Path,
    folder: str | Path,
    *,
    target: str,
    base: str,
    revisions: Mapping[str, str | None] | None = None,
    like: str | None = None,
    shard_bytes: float = SHARD_BYTES,
    overwrite: bool = False,
) -> None:
    """Write a folder of adapters and the pair that they belong to as a published checkpoint.

    Works on files alone. ``folder``, ``like``, ``overwrite`` and errors as in :func:`save`.
    """
    at = revisions or {}
    layers, _ = read_transcoders(adapters, "the published format")
    config = read_json(target, CONFIG, at.get("target"))
    if len(layers) != config.get("num_hidden_layers"):
        raise UserError(
            f"{adapters}: {len(layers)} layers of adapters, but target {target} has "
            f"{config.get('num_hidden_layers')}"
        )
    tensors = replacement_tensors(target, base, at)
    tensors |= adapter_tensors(layers, ARCHITECTURES["qwen2"])
    write_published(
        folder,
        tensors,
        config,
        layers[0](),
        companions=target,
        revision=at.get("target"),
        like=like,
        shard_bytes=shard_bytes,
        overwrite=overwrite,
    )


def _check_shared(target: str, revision: str | None, held: Mapping[str, Lazy]) -> None:
    """Compare all that a checkpoint should have of its target, the precision aside."""
    differing = []
    for name, read in lazy_tensors(target, revision, "target").items():
        if ".mlp." in name:
            continue
        theirs = held[name]() if name in held else None
        if theirs is None or not torch.equal(read().to(theirs.dtype), theirs):
            differing.append(name)
    if differing:
        raise PairMismatchError(
            f"target {target} is not the model that the checkpoint was made from: "
            f"{len(differing)} of the weights that they should share differ: {differing[:3]}"
        )


def _itself(tensor: Tensor) -> Tensor:
    return tensor.detach().cpu()
