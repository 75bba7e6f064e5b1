"""Save an intervention: the changed adapter of a run, as a new run with its history.

Generation, ``fastadapt eval``, ``fastadapt export`` and serving read the new run like any other. In
a run saved by ``onto-target``, the base of the pair *is* the target: the replacement is the target
with the scaled set, and the hybrid is the target.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml

from fastadapt.adapter.files import adapter_digest, adapters_of, read_transcoders, write_adapters
from fastadapt.errors import UserError
from fastadapt.evaluation.runs import read_pair
from fastadapt.features.store.sets import FeatureSet, pair_of
from fastadapt.interventions import Intervention, check_fit
from fastadapt.io.atomic import half_filled, unstaged, writing_folder
from fastadapt.io.documents import read_yaml
from fastadapt.io.names import has_file, typed_path
from fastadapt.models.sources.fingerprint import ENTRIES, fingerprints, warn_of_changes
from fastadapt.models.sources.peft_folder import find_peft
from fastadapt.organism import resolve

SET = "set.json"
_CONFIG, _ADAPTER = "config.yaml", "adapter"


def intervene(
    run: str | os.PathLike[str],
    output: str | os.PathLike[str],
    features: FeatureSet,
    intervention: Intervention,
    *,
    overwrite: bool = False,
) -> Path:
    """Apply an intervention to a run's adapter and save the result atomically as a new run.

    ``output`` holds ``adapter/``; ``config.yaml`` with the pair and data of the source, if it has
    them; and ``set.json``, the set. ``metadata.interventions`` in ``adapter/fastadapt.json`` is the
    history: one entry per intervention, the oldest first. Feature numbers do not change, so the set
    may also be of an adapter earlier in the history of ``run``.

    Args:
        run: folder of a run, or of adapters.
        output: a new folder.
        features: features of the run's adapter; the empty set for ``only`` keeps ``b_dec`` alone.
        intervention: kind and scale.
        overwrite: replace an earlier intervention in the folder. A folder with other files is
            refused nevertheless.

    Returns:
        ``output``.

    Raises:
        UserError: the run does not exist, the set is of another adapter or empty with a kind other
            than ``only``, the target is a PEFT folder and the kind ``onto-target``, or the folder
            is in use.
        RunError: the folder cannot be written.
    """
    source = adapters_of(run)
    layers, card = read_transcoders(source, "an intervention")
    metadata = card["metadata"]
    digest, history = adapter_digest(source), list(metadata.get("interventions") or [])
    known = {digest, *(step["adapter"] for step in history)}
    if intervention.checked(features).adapter not in known:
        raise UserError(
            f"{features.label} was selected from other adapters than those of {source}; select a "
            "set from the features of this run"
        )
    check_fit(features, len(layers), card["adapter"].features)
    if intervention.kind == "onto-target":
        _check_whole_target(source, metadata)
    _warn_of_changes(source, metadata)
    config = _config_of(source, metadata)
    # Measurements of the unchanged adapter do not apply to the changed one.
    metadata = {key: value for key, value in metadata.items() if key != "measured"}
    step: dict[str, Any] = {
        "kind": intervention.kind,
        "set": {"name": features.name, "made": features.expression, "size": len(features)},
        "sha256": features.digest(),
        "run": str(run),
        "adapter": digest,
    }
    if intervention.kind == "onto-target":
        step["scale"] = intervention.scale
        revision = (metadata.get("revisions") or {}).get("target")
        if config is not None:
            pair = config["pair"]
            pair |= {"base": pair["target"], "base_revision": pair.get("target_revision")}
        metadata |= {
            "base": metadata["target"],
            "revisions": {"target": revision, "base": revision},
        }
        for entry in ENTRIES.keys() & metadata.keys():
            if digest := metadata[entry].get("target"):
                metadata[entry] = {"target": digest, "base": digest}
    metadata["interventions"] = [*history, step]
    out = typed_path(output, "--output")
    _check_output(out, source, overwrite=overwrite)
    changed = (
        intervention.apply(read(), features.rows(layer)) for layer, read in enumerate(layers)
    )
    with writing_folder(out, last=SET) as staged:
        (staged / _ADAPTER).mkdir()
        write_adapters(changed, staged / _ADAPTER, metadata)
        if config is not None:
            text = yaml.safe_dump(config, sort_keys=False, allow_unicode=True)
            (staged / _CONFIG).write_text(text, encoding="utf-8")
        features.write(staged / SET)
    return out


def no_features(run: str | os.PathLike[str]) -> FeatureSet:
    """Return an empty set of a run's features; the intervention ``only`` on it leaves ``b_dec``.

    Raises:
        UserError: the run does not exist, or has no transcoders.
    """
    return replace(named_features(run, ()), expression="no feature", name="no features")


def named_features(run: str | os.PathLike[str], names: Sequence[str]) -> FeatureSet:
    """Return the features of a run with these names, such as ``2/17``; no store is read.

    Raises:
        UserError: the run does not exist, has no transcoders, or has no such feature.
    """
    source = adapters_of(run)
    layers, card = read_transcoders(source, "an intervention")
    return FeatureSet.from_pairs(
        map(pair_of, names),
        adapter=adapter_digest(source),
        shape=(len(layers), card["adapter"].features),
        expression=f"features {' '.join(names)}",
    )


def _check_whole_target(source: Path, metadata: Mapping[str, Any]) -> None:
    """Raise ``UserError`` if a target that can be read is a PEFT folder, which is no base."""
    pair = read_pair(source, metadata)
    try:
        peft = find_peft(resolve(pair.target), pair.target_revision)
    except UserError:  # the models need not be on this machine
        return
    if peft is not None:
        raise UserError(
            f"--onto-target makes the target its own base, and {pair.target} is a PEFT folder. "
            "fastadapt contrast and study add sets to such a target in memory; for a saved run, "
            "train on the merged model (peft: merge_and_unload)"
        )


def _warn_of_changes(source: Path, metadata: Mapping[str, Any]) -> None:
    """Warn if models that can be read are not those with which the adapters were trained."""
    recorded = metadata.get("weights") or {}
    pair = read_pair(source, metadata)
    names = {"target": pair.target, "base": pair.base}
    revisions = {"target": pair.target_revision, "base": pair.base_revision}
    folders = [role for role, name in names.items() if role in recorded and Path(name).is_dir()]
    now = fingerprints({role: (names[role], revisions[role]) for role in folders})
    warn_of_changes(str(source), metadata, now, names)


def _config_of(source: Path, metadata: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return ``pair`` and ``data`` of a run's ``config.yaml``; None for adapters without a run."""
    read_pair(source, metadata)  # raises if the pair is unknown or not that of the adapters
    path = source.parent / _CONFIG
    if source.name != _ADAPTER or not has_file(path):
        return None
    config = read_yaml(path, dict[str, Any])
    return {name: config[name] for name in ("pair", "data") if name in config}


def _check_output(out: Path, source: Path, *, overwrite: bool) -> None:
    names = {path.name for path in out.iterdir()} if out.is_dir() else set()
    if not names and not (out.exists() and not out.is_dir()):
        return
    if half_filled(out):  # a killed intervention may be replaced without --overwrite
        names = {name for name in names if unstaged(name) is None} | {SET}
        overwrite = True
    if other := sorted(names - {SET, _CONFIG, _ADAPTER}) or [out.name] * (SET not in names):
        raise UserError(
            f"{out} holds a file that no intervention wrote ({other[0]}); nothing in it was "
            "touched. Give a new folder."
        )
    if os.path.realpath(out) in map(os.path.realpath, (source, source.parent)):
        raise UserError(f"{out} is the source of the intervention; give a new folder")
    if not overwrite:
        raise UserError(
            f"{out} already holds an intervention. Replace it (--overwrite), or give a new folder."
        )
