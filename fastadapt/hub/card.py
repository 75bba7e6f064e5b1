"""The model card of a run: ``README.md`` of its repository."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import yaml

from fastadapt.hub.contents import SharedRun
from fastadapt.organism import NAMES
from fastadapt.reporting.formatting import number
from fastadapt.reporting.page import render
from fastadapt.reporting.tables import Table, as_markdown
from fastadapt.reporting.visible import visible
from fastadapt.training.logs.run_log import comparison

_TAGS = ["fastadapt", "transcoder", "model-diffing", "interpretability"]


def model_card(run: SharedRun, repository: str, license: str | None) -> str:
    """Return the text of a run's model card, in Markdown with the hub's YAML header.

    The results are those of ``summary.json``; without that file, the card has none.

    Args:
        run: the run.
        repository: name of its repository.
        license: the hub's name of a licence, such as ``apache-2.0``; None: not stated.
    """
    metadata = run.card["metadata"]
    pair = {role: str(metadata[role]) for role in ("target", "base")}
    header: dict[str, Any] = {"license": license} if license else {}
    if on_hub := [name for name in dict.fromkeys(pair.values()) if name not in NAMES]:
        header |= {"base_model": on_hub, "base_model_relation": "adapter"}
    header |= {"library_name": "fastadapt", "tags": _TAGS}
    tables = [_pair(metadata), _training(run)]
    if run.summary:
        head, rows = comparison(run.summary, layers=False)
        tables.append(Table("Results on held-out data", head, rows))
    from markupsafe import Markup

    return render(
        "model-card.md.j2",
        header=Markup(yaml.safe_dump(header, sort_keys=False)),  # names and tags, checked before
        repository=repository,
        description=visible(run.model.description),
        additive=run.card["additive"],
        pair=pair,
        tables=as_markdown(tables),
        license=license,
    )


def _pair(metadata: Mapping[str, Any]) -> Table:
    revisions, weights = metadata.get("revisions") or {}, metadata.get("weights") or {}
    rows = [
        [
            role,
            visible(str(metadata[role])),
            str(revisions.get(role) or "–"),
            str(weights.get(role) or "–")[:12],
        ]
        for role in ("target", "base")
    ]
    return Table("Pair", ["", "model", "commit", "weights, SHA-256"], rows)


def _origin(init_from: Mapping[str, str]) -> str:
    digest = f" (SHA-256 {init_from['adapter'][:12]})" if "adapter" in init_from else ""
    return f"the adapters of {init_from['run']}{digest}"


def _training(run: SharedRun) -> Table:
    metadata, adapter = run.card["metadata"], run.card["adapter"]
    objective = metadata.get("objective") or {}
    data = (run.config or {}).get("data") or {}
    sources = data.get("train") or "–"
    if not isinstance(sources, str):
        sources = ", ".join(str(source["source"]) for source in sources)
    tokens = run.summary.get("tokens")
    facts = {
        "trained": run.model.description,
        "layers × features": f"{run.card['n_layers']} × {adapter['n_features']:,}",
        "activation": adapter["activation"],
        **({"began as": _origin(metadata["init_from"])} if metadata.get("init_from") else {}),
        "training data": sources,
        "training tokens": number(tokens),
        "held-out data": data.get("validation") or "–",
        "λ": number(run.model.sparsity),
        "weight of the bridge": number(objective.get("bridge")),
        "weight of the NMSE": number(objective.get("nmse")),
        "seed": str(metadata.get("seed", "–")),
        "versions": ", ".join(
            f"{name} {version}" for name, version in (metadata.get("versions") or {}).items()
        )
        or "–",
    }
    return Table("Training", ["", ""], [[key, visible(str(value))] for key, value in facts.items()])
