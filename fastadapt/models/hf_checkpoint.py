"""Hugging Face checkpoints as files: tensors read one at a time, shards written one at a time.

No checkpoint is ever in memory whole: what is written is a mapping from names to calls that read.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from fnmatch import fnmatch
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

from torch import Tensor

from fastadapt.adapter.module import TranscoderAdapter
from fastadapt.errors import UserError
from fastadapt.io import documents
from fastadapt.io.atomic import half_filled, save_tensors, unstaged, writing_folder
from fastadapt.io.names import check_name, in_model, inside
from fastadapt.models.pretrained import (
    ARCHITECTURES,
    Paths,
    ShardIndex,
    fetch,
    model_config,
    reading,
    tensor_files,
)

#: Reads one tensor.
Lazy = Callable[[], Tensor]

CONFIG = "config.json"
INDEX = "model.safetensors.index.json"
#: Names of the files that an export writes, as patterns.
_EXPORTED = (CONFIG, INDEX, "model.safetensors", "model-*-of-*.safetensors")
#: Bytes of a shard at most, where it is not one tensor alone.
SHARD_BYTES = 5_000_000_000
#: What else belongs to a model and is copied as it is: settings of generation, tokenizer, template.
COMPANIONS = (
    "generation_config.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
)


def lazy_tensors(source: str, revision: str | None, role: str) -> dict[str, Lazy]:
    """Every tensor of a checkpoint by name, to be read when called; ``role`` is for messages."""
    from safetensors import safe_open

    tensors: dict[str, Lazy] = {}
    for file in tensor_files(source, revision).values():
        with reading(role, str(file)), safe_open(file, framework="pt") as shard:
            tensors |= {name: partial(_read, file, name, role) for name in shard.keys()}  # noqa: SIM118
    return tensors


def _read(file: Path, name: str, role: str) -> Tensor:
    from safetensors import safe_open

    with reading(role, str(file)), safe_open(file, framework="pt") as shard:
        tensor: Tensor = shard.get_tensor(name)
        return tensor


def replacement_tensors(
    target: str, base: str, revisions: Mapping[str, str | None] | None = None
) -> dict[str, Lazy]:
    """The tensors that a replacement model has beside its adapters, under the target's names.

    Those of the target, but for its MLPs, and in their place the base's.

    Raises:
        UserError: the two do not have the same MLPs.
    """
    at = revisions or {}
    config = model_config(target, at.get("target"), trust=False)
    model_config(base, at.get("base"), trust=False)  # refused where it is quantised
    paths = ARCHITECTURES[config.model_type]
    mlp = re.compile(rf"{paths.decoder}\.{paths.layers}\.\d+\.{paths.mlp}\.")
    ours = lazy_tensors(target, at.get("target"), "target")
    theirs = lazy_tensors(base, at.get("base"), "base")
    mlps = {name: tensor for name, tensor in theirs.items() if mlp.match(name)}
    if odd := sorted({name for name in ours if mlp.match(name)} - mlps.keys()):
        raise UserError(f"base {base}: {len(odd)} MLP weights are missing: {odd[:3]}")
    return {name: mlps.get(name, tensor) for name, tensor in ours.items()}


def adapter_tensors(
    layers: Sequence[Callable[[], TranscoderAdapter]], paths: Paths
) -> dict[str, Lazy]:
    """The tensors of adapters as ``...{layer}.mlp.adapter.{name}``; one layer is held at a time."""

    @lru_cache(maxsize=1)
    def layer(i: int) -> dict[str, Tensor]:
        return layers[i]().state_dict()

    def one(i: int, name: str) -> Tensor:
        return layer(i)[name]

    block = f"{paths.decoder}.{paths.layers}.{{}}.{paths.mlp}.adapter.{{}}"
    names = list(layer(0))
    return {
        block.format(i, name): partial(one, i, name) for i in range(len(layers)) for name in names
    }


def read_json(source: str, name: str, revision: str | None) -> dict[str, Any]:
    """A JSON file of a folder or hub repository, as it is."""
    file = fetch(source, name, revision)
    if file is None:
        raise UserError(f"{source}: {name} is missing")
    values: dict[str, Any] = documents.read_json(file, dict[str, Any], constants=True)
    return values


def write_checkpoint(
    folder: Path,
    tensors: Mapping[str, Lazy],
    config: str,
    *,
    companions: str,
    revision: str | None = None,
    index: str | None = None,
    shard_bytes: float = SHARD_BYTES,
    overwrite: bool = False,
) -> None:
    """Write a checkpoint, one shard in memory at a time, whole or not at all.

    ``config.json`` comes last.

    Args:
        folder: new or empty, or with ``overwrite`` an export; see :func:`check_output`.
        tensors: by name, in the order in which they are read.
        config: the text of ``config.json``.
        companions: the folder or hub id whose tokenizer, chat template and generation settings are
            copied, of ``revision``.
        index: the text of an index of shards, to write these very shards.
        shard_bytes: of a shard at most, where there is no index to follow.
        overwrite: replace an export that is there.

    Raises:
        UserError: the folder is in use, or a companion is a link that leads out of its model, is no
            regular file, or is too large.
        RunError: it cannot be written; it is as it was.
    """
    check_output(folder, overwrite=overwrite)
    with writing_folder(folder, last=CONFIG) as staged:
        for name in COMPANIONS:
            if (file := fetch(companions, name, revision)) is not None:
                (staged / name).write_bytes(documents.read_bytes(in_model(file, companions)))
        if index is None:
            _write_shards(staged, tensors, shard_bytes)
        else:
            _write_as_indexed(staged, tensors, index)
        (staged / CONFIG).write_text(config, encoding="utf-8")


def check_output(folder: Path, *, overwrite: bool) -> None:
    """Refuse a folder that an export may not replace.

    A folder that is new or empty may be written to, and one that a killed export half filled. With
    ``overwrite`` one may be replaced that holds an export and nothing else: a checkpoint that names
    adapters in its ``config.json``, or adapters that were read from a published checkpoint.

    Raises:
        UserError: it holds an export (without ``overwrite``), or something else.
    """
    from fastadapt.adapter.files import PATTERNS

    names = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
    if not names and not (folder.exists() and not folder.is_dir()):
        return
    patterns = (*_EXPORTED, *COMPANIONS, *PATTERNS)
    foreign = {name for name in names if not any(fnmatch(name, one) for one in patterns)}
    if half_filled(folder) and all(unstaged(name) == folder.resolve().name for name in foreign):
        return
    if foreign or not names or not _is_export(folder):
        raise UserError(f"{folder} is in use; give a new folder")
    if not overwrite:
        raise UserError(
            f"{folder} is in use; give a new folder, or replace the export in it (--overwrite)"
        )


def _is_export(folder: Path) -> bool:
    """Whether ``config.json`` or the card of adapters is as an export writes it."""
    from fastadapt.adapter.files import CARD
    from fastadapt.models.hf_classes import PREFIX

    config, card = (_object(folder / name) for name in (CONFIG, CARD))
    if str(config.get("model_type")).startswith(PREFIX) or "transcoder_n_features" in config:
        return True
    metadata = card.get("metadata")
    return isinstance(metadata, dict) and "published" in metadata


def _object(path: Path) -> dict[str, Any]:
    """The object in a JSON file; an empty one where there is none."""
    try:
        return dict(documents.read_json(path, dict[str, Any]))
    except UserError:
        return {}


def as_json(values: Mapping[str, Any]) -> str:
    """JSON in the form in which transformers writes it: sorted keys, two spaces, a last newline."""
    return json.dumps(values, indent=2, sort_keys=True) + "\n"


def _save(held: Mapping[str, Tensor], file: Path) -> None:
    save_tensors(held, file, {"format": "pt"})


def indexed_files(index: str, source: str) -> dict[str, str]:
    """Return the file of every tensor in an index of shards, each a safetensors file of its folder.

    Args:
        index: its text.
        source: of the text, for messages.

    Raises:
        UserError: it is no index, or names anything else.
    """
    files: dict[str, str] = documents.parse_json(index, source, ShardIndex)["weight_map"]
    for file in files.values():
        if not check_name(file, f"{source}: weight_map").endswith(".safetensors"):
            raise UserError(f"{source}: weight_map: expected a .safetensors file, got {file!r:.80}")
    return files


def _write_as_indexed(folder: Path, tensors: Mapping[str, Lazy], index: str) -> None:
    files = indexed_files(index, INDEX)
    if odd := sorted(tensors.keys() ^ files.keys()):
        raise UserError(f"{len(odd)} tensors are not both here and in the index: {odd[:3]}")
    for file in sorted(set(files.values())):
        path = inside(folder, file, source=f"{INDEX}: weight_map")
        _save({name: tensors[name]() for name in files if files[name] == file}, path)
    (folder / INDEX).write_text(index, encoding="utf-8")


def _write_shards(folder: Path, tensors: Mapping[str, Lazy], limit: float) -> None:
    """Shards of at most ``limit`` bytes; of several, an index, and names that say how many."""
    shards: list[list[str]] = []
    held: dict[str, Tensor] = {}
    total = size = 0

    def write() -> None:
        _save(held, folder / f"shard-{len(shards)}")
        shards.append(list(held))
        held.clear()

    for name, read in tensors.items():
        tensor = read()
        if held and size + tensor.nbytes > limit:
            write()
            size = 0
        held[name] = tensor
        size += tensor.nbytes
        total += tensor.nbytes
    write()
    if len(shards) == 1:
        (folder / "shard-0").rename(folder / "model.safetensors")
        return
    weight_map: dict[str, str] = {}
    for i, names in enumerate(shards):
        file = f"model-{i + 1:05}-of-{len(shards):05}.safetensors"
        (folder / f"shard-{i}").rename(folder / file)
        weight_map |= dict.fromkeys(names, file)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / INDEX).write_text(as_json(index), encoding="utf-8")
