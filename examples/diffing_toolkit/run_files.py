"""Settings and results of a run of fastadapt, as values. Imports nothing of the two projects."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

#: What an agent reads of a feature in ``changes.json``.
_FEATURE = ("layer", "feature", "delta_kl", "contribution", "density", "region", "promoted")
_PLACE = ("before", "token", "following", "kl", "likely", "features")


def source_of(dataset: Any) -> dict[str, Any]:
    """Return a source of ``data.train`` for a ``DatasetConfig`` of the toolkit."""
    columns = dataset.messages_column if dataset.is_chat else dataset.text_column
    source = {"source": dataset.id, "split": dataset.split, "columns": columns}
    return source | ({"subset": dataset.subset} if dataset.subset else {})


def run_settings(
    target: str,
    base: str,
    datasets: Sequence[Any],
    output: str,
    settings: Mapping[str, Any],
) -> dict[str, Any]:
    """Return the configuration of a run, as ``fastadapt train FILE`` reads it.

    Args:
        target, base: local folders or hub ids of the two models; the target may be a LoRA's.
        datasets: ``DatasetConfig`` of the toolkit: one for each split of each data set. The first
            of each data set is trained on; the second of the first data set validates.
        output: folder of the run.
        settings: sections and their settings, which come before those that are made here.

    Raises:
        ValueError: no data set has a second split to validate on.
    """
    splits: dict[str, list[Any]] = {}
    for dataset in datasets:
        splits.setdefault(dataset.name, []).append(dataset)
    held_out = next((each[1] for each in splits.values() if len(each) > 1), None)
    if held_out is None:
        raise ValueError(
            "expected a data set with a training and a validation split, got "
            f"{sorted(splits) or 'no data set'}; switch one on in diffing.method.datasets"
        )
    validation = source_of(held_out)
    data = {
        "train": [source_of(each[0]) for each in splits.values()],
        "validation": validation["source"],
        "validation_split": validation["split"],
        "columns": validation["columns"],
    }
    if "subset" in validation:
        data["subset"] = validation["subset"]
    fixed: dict[str, Any] = {
        "pair": {"target": target, "base": base},
        "data": data,
        "run": {"output": output},
    }
    sections = fixed.keys() | settings.keys()
    return {name: fixed.get(name, {}) | dict(settings.get(name, {})) for name in sorted(sections)}


def overview(changes: Mapping[str, Any], *, features: int, positions: int) -> dict[str, Any]:
    """Return what an agent reads of ``changes.json``: numbers, features and positions.

    Args:
        changes: the document that ``fastadapt changes`` writes into a run.
        features: largest number of features, those whose removal costs most first.
        positions: largest number of positions at which the two MLPs disagree most.
    """
    return {
        "kl_to_finetuned_nats_per_token": {
            "finetuned_model_with_base_mlps": changes["kl"]["hybrid"],
            "with_the_features": changes["kl"]["adapter"],
        },
        "share_of_layers": [round(layer["share"], 3) for layer in changes["layers"]],
        "features": [_short(f, _FEATURE) for f in changes["features"][:features]],
        "disagreements": [_short(p, _PLACE) for p in changes["disagreements"][:positions]],
    }


def _short(values: Mapping[str, Any], names: Sequence[str]) -> dict[str, Any]:
    chosen = {name: values[name] for name in names}
    if examples := values.get("examples"):
        first = examples[0]
        chosen["example"] = f"{first['before']}[[{first['token']}]]{first['after']}"
    return chosen
