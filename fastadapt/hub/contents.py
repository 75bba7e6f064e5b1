"""Collect the files of a run that a repository holds, without what only this machine has.

Uploaded are ``adapter/``, ``config.yaml`` and ``summary.json``. Checkpoints, logs, features and the
models' weights are not.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from fastadapt.adapter.files import CARD, adapters_of, read_card, read_transcoders
from fastadapt.errors import UserError, require
from fastadapt.evaluation.runs import ComparedModel, RunFile
from fastadapt.hub.names import is_model, split_revision
from fastadapt.hub.paths import portable
from fastadapt.io.documents import read_yaml
from fastadapt.io.names import has_file
from fastadapt.organism import NAMES
from fastadapt.training.logs.run_log import read_summary
from fastadapt.training.run_dir import ADAPTER, CONFIG, SUMMARY, Record

ROLES = ("target", "base", "tokenizer")


@dataclass(frozen=True)
class SharedRun:
    """The files of a run for a repository, and what its model card says.

    Attributes:
        files: contents by name in the repository; a path for a file of weights.
        card: the contents of ``fastadapt.json``.
        config: the contents of ``config.yaml``; None without.
        summary: the contents of ``summary.json``; empty without.
        model: what was trained, and interventions after it.
    """

    files: dict[str, Path | bytes]
    card: Mapping[str, Any]
    config: Mapping[str, Any] | None
    summary: Record
    model: ComparedModel


def read_shared(
    run: str | os.PathLike[str],
    names: Mapping[str, str | None],
    commit_of: Callable[[str, str | None], str],
) -> SharedRun:
    """Read a finished run, and name its models so that others have them.

    A model's name is a hub id if the run recorded the model's commit. Paths of this machine, such
    as those of data, become the names of their files.

    Args:
        run: folder of a run, or of adapters.
        names: hub ids in place of the recorded models, by role, with or without a revision.
        commit_of: returns the commit of a model's revision on the hub.

    Raises:
        UserError: the run is not finished, is damaged, trained something other than transcoders, or
            its pair has a local folder for which ``names`` has no hub id, or its chat format has a
            path.
    """
    folder = adapters_of(run)
    layers, parsed = read_transcoders(folder, "pushing a run")
    in_run = folder.name == ADAPTER and has_file(folder.parent / CONFIG)
    config = read_yaml(folder.parent / CONFIG, RunFile) if in_run else None
    summary = read_summary(folder.parent / SUMMARY) if in_run else {}
    card = read_card(folder)
    _name_models(str(run), card["metadata"], config, names, commit_of)
    card, config, summary = map(portable, (card, config, summary))
    files: dict[str, Path | bytes] = {
        f"{ADAPTER}/layer_{i}.safetensors": folder / f"layer_{i}.safetensors"
        for i in range(len(layers))
    }
    files[f"{ADAPTER}/{CARD}"] = _json(card)
    if config is not None:
        files[CONFIG] = yaml.safe_dump(config, sort_keys=False, allow_unicode=True).encode()
    if summary:
        files[SUMMARY] = _json(summary)
    shown = {**parsed, "metadata": card["metadata"]}
    model = ComparedModel.from_card("run", folder.parent if in_run else folder, shown)
    return SharedRun(files, card, config, summary, model)


def _name_models(
    run: str,
    metadata: dict[str, Any],
    config: dict[str, Any] | None,
    names: Mapping[str, str | None],
    commit_of: Callable[[str, str | None], str],
) -> None:
    """Write hub ids and commits of the pair into the documents of a run.

    Raises:
        UserError: a model has no hub id.
    """
    pair = {} if config is None else config["pair"]
    revisions = dict(metadata.get("revisions") or {})
    for role in ROLES:
        recorded, typed = metadata.get(role) or pair.get(role), names.get(role)
        if typed is None:
            known = role == "tokenizer" or revisions.get(role) is not None
            if recorded or role != "tokenizer":
                _check_name(run, role, recorded or "", known)
            continue
        name, revision = split_revision(typed)
        _check_name(run, role, name, True)
        metadata[role] = name
        if config is not None:
            pair[role] = name
        if role == "tokenizer":
            require(revision is None, "--tokenizer", "a name without a revision", typed)
            continue
        revisions[role] = None if name in NAMES else commit_of(name, revision)
        if config is not None:
            pair[f"{role}_revision"] = revisions[role]
    metadata["revisions"] = revisions


def _check_name(run: str, role: str, name: str, known: bool) -> None:
    """Raise ``UserError`` unless others have a model; ``known``: it was read from the hub."""
    if name in NAMES or (known and is_model(name)):
        return
    where = (
        f", {name}, is a folder of this machine, or was not read from the hub"
        if name
        else (" has no name")
    )
    raise UserError(
        f"{run}: the {role}{where}. Give the hub id of the same weights (--{role} OWNER/NAME); "
        "upload the model first if it has none"
    )


def _json(values: Any) -> bytes:
    return (json.dumps(values, indent=2) + "\n").encode()
