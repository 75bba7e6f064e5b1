"""Interventions saved: a run's adapter, changed, as a run of its own, with its history.

Generation, ``fastadapt eval``, ``fastadapt export`` and serving take it as any other. One put onto
the target has a pair whose base *is* the target, so its replacement is the target with the scaled
set, and its hybrid the target.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from fastadapt.adapter.files import adapters_of, read_transcoders, write_adapters
from fastadapt.errors import UserError
from fastadapt.evaluation.runs import read_pair
from fastadapt.features.store.sets import FeatureSet
from fastadapt.features.store.store import adapter_digest
from fastadapt.interventions import Intervention, check_fit
from fastadapt.io.atomic import half_filled, unstaged, writing_folder
from fastadapt.io.documents import read_yaml
from fastadapt.io.names import has_file, typed_path

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
    """Save what an intervention makes of a run's adapter: a run of its own, whole or not at all.

    ``output`` holds ``adapter/``, whose ``fastadapt.json`` has the history under
    ``metadata.interventions`` (one entry per intervention, the oldest first); ``config.yaml``, the
    source's pair and data, where it has them; and ``set.json``, the set. A run that was changed
    before takes sets of the adapter that it came from: a feature keeps its number.

    Args:
        run: folder of a run, or of adapters.
        output: a new folder.
        features: of the run's adapter.
        intervention: what is done.
        overwrite: replace what an earlier intervention wrote there; where anything else is in the
            folder, nothing is.

    Returns:
        ``output``.

    Raises:
        UserError: no such run, an empty set, one of another adapter, or a folder in use.
        RunError: the folder cannot be written.
    """
    source = adapters_of(run)
    layers, card = read_transcoders(source, "an intervention")
    metadata = card["metadata"]
    digest, history = adapter_digest(source), list(metadata.get("interventions") or [])
    if features.not_empty().adapter not in {digest, *(step["adapter"] for step in history)}:
        raise UserError(
            f"{features.label} is of another adapter than {source}; select it from the features of "
            "this run"
        )
    check_fit(features, len(layers), card["adapter"].features)
    config = _config_of(source, metadata)
    told = {key: value for key, value in metadata.items() if key != "measured"}  # no longer so
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
        told |= {
            "base": metadata["target"],
            "revisions": {"target": revision, "base": revision},
        }
    told["interventions"] = [*history, step]
    out = typed_path(output, "--output")
    _check_output(out, source, overwrite=overwrite)
    made = (intervention.apply(read(), features.rows(layer)) for layer, read in enumerate(layers))
    with writing_folder(out, last=SET) as staged:
        (staged / _ADAPTER).mkdir()
        write_adapters(made, staged / _ADAPTER, told)
        if config is not None:
            text = yaml.safe_dump(config, sort_keys=False, allow_unicode=True)
            (staged / _CONFIG).write_text(text, encoding="utf-8")
        features.write(staged / SET)
    return out


def _config_of(source: Path, metadata: Mapping[str, Any]) -> dict[str, Any] | None:
    """Pair and data of a run's ``config.yaml``; None of bare adapters, which have none."""
    read_pair(source, metadata)  # that it can be told, and is the one that the adapters name
    path = source.parent / _CONFIG
    if source.name != _ADAPTER or not has_file(path):
        return None
    config = read_yaml(path, dict[str, Any])
    return {name: config[name] for name in ("pair", "data") if name in config}


def _check_output(out: Path, source: Path, *, overwrite: bool) -> None:
    held = {path.name for path in out.iterdir()} if out.is_dir() else set()
    if not held and not (out.exists() and not out.is_dir()):
        return
    if half_filled(out):
        held = {name for name in held if unstaged(name) is None} | {SET}
        overwrite = True
    if other := sorted(held - {SET, _CONFIG, _ADAPTER}) or [out.name] * (SET not in held):
        raise UserError(
            f"{out} holds something that no intervention wrote ({other[0]}); nothing in it was "
            "touched. Give a new folder."
        )
    if os.path.realpath(out) in map(os.path.realpath, (source, source.parent)):
        raise UserError(f"{out} is the run that is changed; give a new folder")
    if not overwrite:
        raise UserError(
            f"{out} holds an intervention already. Replace it (--overwrite), or give a new folder."
        )
