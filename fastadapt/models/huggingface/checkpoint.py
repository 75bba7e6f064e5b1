"""Read the tensors of Hugging Face checkpoints one at a time, and write checkpoints shard by shard.

A checkpoint is passed as a mapping from tensor names to functions that read one tensor, so memory
holds at most one shard.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from fnmatch import fnmatch
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from fastadapt.adapter.module import TranscoderAdapter
from fastadapt.errors import UserError
from fastadapt.io import documents
from fastadapt.io.atomic import half_filled, save_tensors, unstaged, writing_folder
from fastadapt.io.names import check_name, in_model, inside
from fastadapt.models.architectures import ARCHITECTURES, MULTIMODAL, Paths
from fastadapt.models.pretrained import (
    ShardIndex,
    fetch,
    model_config,
    reading,
    stored_tensors,
    tensor_files,
)
from fastadapt.models.sources.low_rank import merged_state
from fastadapt.models.sources.peft_folder import PeftFolder, find_peft
from fastadapt.models.sources.peft_loading import load_pair, peft_config

#: A function that reads one tensor.
Lazy = Callable[[], Tensor]

CONFIG = "config.json"
INDEX = "model.safetensors.index.json"
#: Patterns of the names of the files that an export writes.
_EXPORTED = (CONFIG, INDEX, "model.safetensors", "model-*-of-*.safetensors")
#: File beside the contents of an export in another format, which says what they are.
RECORD = "fastadapt-export.json"
#: Kinds of exports, of which each is replaced by its own kind only.
Kind = Literal["checkpoint", "set of coders", "neuronpedia", "import"]
#: Largest size of a shard in bytes. A larger tensor gets a shard for itself.
SHARD_BYTES = 5_000_000_000
#: Source and revision of each file of :data:`COMPANIONS`.
Companions = Mapping[str, tuple[str, str | None]]
#: Files copied unchanged with a model: generation settings, tokenizer, chat template.
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
    """Return, by their names in the model, functions that read a language model's tensors.

    ``role`` names the checkpoint in errors.
    """
    places = stored_tensors(source, revision)
    return {name: partial(_read, place.file, place.name, role) for name, place in places.items()}


def _read(file: Path, name: str, role: str) -> Tensor:
    from safetensors import safe_open

    with reading(role, str(file)), safe_open(file, framework="pt") as shard:
        tensor: Tensor = shard.get_tensor(name)
        return tensor


def replacement_tensors(
    target: str, base: str, revisions: Mapping[str, str | None] | None = None
) -> dict[str, Lazy]:
    """Return readers of a replacement model's tensors, adapters excepted, under the target's names.

    The tensors are the target's, with the base's MLPs in place of the target's.

    Raises:
        UserError: the base lacks an MLP weight of the target, or a checkpoint is quantised.
    """
    revisions = revisions or {}
    peft = find_peft(target, revisions.get("target"))
    if peft is not None:
        return _merged_tensors(peft, base, revisions.get("base"))
    config = model_config(target, revisions.get("target"), trust=False)
    model_config(base, revisions.get("base"), trust=False)  # raises if the base is quantised
    paths = ARCHITECTURES[config.model_type]
    mlp = re.compile(rf"{paths.decoder}\.{paths.layers}\.\d+\.{paths.mlp}\.")
    tensors = lazy_tensors(target, revisions.get("target"), "target")
    base_tensors = lazy_tensors(base, revisions.get("base"), "base")
    mlps = {name: read for name, read in base_tensors.items() if mlp.match(name)}
    if missing := sorted({name for name in tensors if mlp.match(name)} - mlps.keys()):
        raise UserError(
            f"base {base}: {len(missing)} MLP weights are missing: {missing[:3]}. Give the model "
            "that the target was fine-tuned from"
        )
    return {name: mlps.get(name, read) for name, read in tensors.items()}


def _merged_tensors(peft: PeftFolder, base: str, revision: str | None) -> dict[str, Lazy]:
    """Return the tensors of :func:`replacement_tensors` for a PEFT target, merged into its base.

    The model is in host memory in the dtype of its base's configuration, and each changed weight
    is merged when it is read.
    """
    base_config = model_config(base, revision, trust=False)
    config = peft_config(peft, base, base_config, trust=False)
    paths = ARCHITECTURES[config.model_type]
    model, base_mlps = load_pair(
        peft,
        base,
        revision,
        config,
        device=torch.device("cpu"),
        dtype=base_config.dtype or torch.float32,
        attention="eager",
        trust=False,
    )
    blocks = getattr(getattr(model, paths.decoder), paths.layers)
    for block, mlp in zip(blocks, base_mlps, strict=True):
        setattr(block, paths.mlp, mlp)
    return dict(merged_state(model))


def target_values(
    target: str, base: str, revisions: Mapping[str, str | None] | None = None
) -> dict[str, Any]:
    """Return the contents of the target's ``config.json``, for a PEFT target from its base's.

    For a multimodal model, these are the values of its text model. The weights are downloaded,
    since they decide whether the head is tied. The contents of an architecture that is not
    supported are returned unchanged.

    Raises:
        UserError: a file is missing, or holds no JSON object.
    """
    revisions = revisions or {}
    peft = find_peft(target, revisions.get("target"))
    if peft is None:
        return _config_values(target, revisions.get("target"))
    values = _config_values(base, revisions.get("base"))
    if values.get("model_type") not in ARCHITECTURES:
        return values
    model = peft_config(peft, base, model_config(base, revisions.get("base"), False), trust=False)
    tied = model.tie_word_embeddings
    return {**values, "vocab_size": model.vocab_size, "tie_word_embeddings": tied}


def _config_values(source: str, revision: str | None) -> dict[str, Any]:
    values = read_json(source, CONFIG, revision)
    if values.get("model_type") not in (*ARCHITECTURES, *MULTIMODAL):
        return values
    model_config(source, revision, trust=False)  # raises if quantised, before a download
    tensor_files(source, revision)
    config = model_config(source, revision, trust=False)
    if values.get("model_type") not in MULTIMODAL:
        # The values may be wrong: readers would drop a head that is stored.
        return {**values, "tie_word_embeddings": config.tie_word_embeddings}
    text: dict[str, Any] = json.loads(config.to_json_string(use_diff=False))
    return text


def companions_of(
    target: str,
    base: str,
    revisions: Mapping[str, str | None] | None = None,
    tokenizer: str | None = None,
) -> dict[str, tuple[str, str | None]]:
    """Return where each file of :data:`COMPANIONS` comes from: the target, for a PEFT target partly
    its base.

    Args:
        target, base, revisions: the pair.
        tokenizer: folder or hub id of the tokenizer, if it is not the target's.
    """
    revisions = revisions or {}
    model = words = (target, revisions.get("target"))
    peft = find_peft(*model)
    if peft is not None:
        model = (base, revisions.get("base"))
        words = words if peft.has_tokenizer() else model
    if tokenizer is not None:
        words = (tokenizer, None)
    return {name: model if name == COMPANIONS[0] else words for name in COMPANIONS}


def adapter_tensors(
    layers: Sequence[Callable[[], TranscoderAdapter]], paths: Paths
) -> dict[str, Lazy]:
    """Return readers of adapters' tensors, named ``...{layer}.mlp.adapter.{name}``.

    Memory holds the tensors of one layer at a time.
    """

    @lru_cache(maxsize=1)
    def layer(i: int) -> dict[str, Tensor]:
        return layers[i]().state_dict()

    def read(i: int, name: str) -> Tensor:
        return layer(i)[name]

    block = f"{paths.decoder}.{paths.layers}.{{}}.{paths.mlp}.adapter.{{}}"
    names = list(layer(0))
    return {
        block.format(i, name): partial(read, i, name) for i in range(len(layers)) for name in names
    }


def read_json(source: str, name: str, revision: str | None) -> dict[str, Any]:
    """Read the object in a JSON file of a local folder or hub repository.

    Raises:
        UserError: the file is missing or holds no JSON object.
    """
    file = fetch(source, name, revision)
    if file is None:
        raise UserError(f"{source}: {name} is missing; give the folder or hub id of a checkpoint")
    values: dict[str, Any] = documents.read_json(file, dict[str, Any], constants=True)
    return values


def write_checkpoint(
    folder: Path,
    tensors: Mapping[str, Lazy],
    config: str,
    *,
    companions: Companions,
    index: str | None = None,
    shard_bytes: float = SHARD_BYTES,
    overwrite: bool = False,
) -> None:
    """Write a checkpoint shard by shard; a failure leaves ``folder`` as it was.

    ``config.json`` is written last.

    Args:
        folder: a new or empty folder, or with ``overwrite`` an export; see :func:`check_output`.
        tensors: readers by tensor name, called in this order.
        config: text of ``config.json``.
        companions: sources of tokenizer, chat template and generation settings, which are copied;
            see :func:`companions_of`.
        index: text of a shard index whose division into shards is reproduced.
        shard_bytes: largest size of a shard in bytes, if ``index`` is None.
        overwrite: replace an existing export.

    Raises:
        UserError: the folder holds other files, or a file to copy is a link that leads out of its
            model, is not a regular file, or is too large.
        RunError: the folder cannot be written.
    """
    check_output(folder, overwrite=overwrite)
    with writing_folder(folder, last=CONFIG) as staged:
        for name, (source, revision) in companions.items():
            if (file := fetch(source, name, revision)) is not None:
                (staged / name).write_bytes(documents.read_bytes(in_model(file, source)))
        if index is None:
            _write_shards(staged, tensors, shard_bytes)
        else:
            _write_as_indexed(staged, tensors, index)
        (staged / CONFIG).write_text(config, encoding="utf-8")


def check_output(
    folder: Path,
    *,
    overwrite: bool,
    patterns: Sequence[str] | None = None,
    kind: Kind = "checkpoint",
) -> None:
    """Raise if an export may not be written to ``folder``.

    A new folder, an empty one, and one left incomplete by a killed export are accepted. With
    ``overwrite``, a folder that holds nothing but an export of the same kind is accepted too.

    Args:
        folder: the folder, which need not exist.
        overwrite: accept an export.
        patterns: names in an export of the kind; by default those of a checkpoint.
        kind: kind of the export that is written.

    Raises:
        UserError: the folder holds an export (without ``overwrite``), one of another kind, or other
            files.
    """
    from fastadapt.adapter.files import PATTERNS

    names = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
    if not names and not (folder.exists() and not folder.is_dir()):
        return
    patterns = (*_EXPORTED, *COMPANIONS, *PATTERNS) if patterns is None else patterns
    foreign = {name for name in names if not any(fnmatch(name, p) for p in patterns)}
    if half_filled(folder) and all(unstaged(name) == folder.resolve().name for name in foreign):
        return
    held = export_kind(folder)
    if held not in (None, kind):
        raise UserError(
            f"{folder} holds an export of another kind: expected {kind}, got {held}; give a new "
            "folder"
        )
    if foreign or held is None:
        raise UserError(f"{folder} is neither an empty folder nor an export; give a new folder")
    if not overwrite:
        raise UserError(f"{folder} holds an export; give a new folder, or replace it (--overwrite)")


def export_kind(folder: Path) -> Kind | None:
    """Return the kind of the export in a folder, by the keys that an export writes.

    A checkpoint's ``config.json`` names adapters. Adapters that were read from a published
    checkpoint count as one, too.
    """
    from fastadapt.adapter.files import CARD
    from fastadapt.models.huggingface.classes import PREFIX

    config, card, record = (_object(folder / name) for name in (CONFIG, CARD, RECORD))
    if "format" in record:
        return "neuronpedia" if record["format"] == "neuronpedia" else "set of coders"
    metadata = card.get("metadata")
    if isinstance(metadata, dict) and "imported" in metadata:
        return "import"
    if str(config.get("model_type")).startswith(PREFIX) or "transcoder_n_features" in config:
        return "checkpoint"
    return "checkpoint" if isinstance(metadata, dict) and "published" in metadata else None


def _object(path: Path) -> dict[str, Any]:
    """Read the object in a JSON file; return an empty one if the file is absent or invalid."""
    try:
        return dict(documents.read_json(path, dict[str, Any]))
    except UserError:
        return {}


def as_json(values: Mapping[str, Any]) -> str:
    """Format JSON as transformers does: sorted keys, indented by two spaces, a final newline."""
    return json.dumps(values, indent=2, sort_keys=True) + "\n"


def _save(tensors: Mapping[str, Tensor], file: Path) -> None:
    save_tensors(tensors, file, {"format": "pt"})


def indexed_files(index: str, source: str) -> dict[str, str]:
    """Parse a shard index; return the name of each tensor's file.

    Args:
        index: text of the index.
        source: origin of the text, for error messages.

    Raises:
        UserError: the text is not a shard index, or names a file that is not a safetensors file of
            the index's folder.
    """
    files: dict[str, str] = documents.parse_json(index, source, ShardIndex)["weight_map"]
    for file in files.values():
        if not check_name(file, f"{source}: weight_map").endswith(".safetensors"):
            raise UserError(f"{source}: weight_map: expected a .safetensors file, got {file!r:.80}")
    return files


def _write_as_indexed(folder: Path, tensors: Mapping[str, Lazy], index: str) -> None:
    files = indexed_files(index, INDEX)
    if odd := sorted(tensors.keys() ^ files.keys()):
        raise UserError(
            f"{INDEX}: {len(odd)} tensors are only in the files or only in this index: {odd[:3]}"
        )
    for file in sorted(set(files.values())):
        path = inside(folder, file, source=f"{INDEX}: weight_map")
        _save({name: tensors[name]() for name in files if files[name] == file}, path)
    (folder / INDEX).write_text(index, encoding="utf-8")


def _write_shards(folder: Path, tensors: Mapping[str, Lazy], limit: float) -> None:
    """Write shards of at most ``limit`` bytes, and an index if the tensors need several.

    The number of shards is part of their names, so files are renamed when it is known.
    """
    shards: list[list[str]] = []
    pending: dict[str, Tensor] = {}
    total = size = 0

    def write() -> None:
        _save(pending, folder / f"shard-{len(shards)}")
        shards.append(list(pending))
        pending.clear()

    for name, read in tensors.items():
        tensor = read()
        if pending and size + tensor.nbytes > limit:
            write()
            size = 0
        pending[name] = tensor
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
