"""Final files of a run: adapters, summary and report."""

from __future__ import annotations

import dataclasses
import json
from importlib.metadata import version
from pathlib import Path
from typing import Any

from torch import nn

from fastadapt.adapter.files import CARD, PATTERNS, write_adapters
from fastadapt.io.atomic import disk_errors, replacing, writing_folder
from fastadapt.models.replacement import ModelPair
from fastadapt.training import run_dir
from fastadapt.training.config import TrainConfig

_MEASURED = (
    "kl_hybrid",
    "kl_adapter",
    "kl_recovered_vs_hybrid",
    "top1_error_hybrid",
    "top1_error_adapter",
    "nmse_mean",
    "l0_mean",
    "l0_per_layer",
    "sparsity_weight",
    "tokens",
)


def write(
    folder: Path,
    config: TrainConfig,
    pair: ModelPair,
    adapters: nn.ModuleList,
    counts: dict[str, Any],
) -> dict[str, Any]:
    """Write ``adapter/``, ``summary.json`` and, with ``run.report``, ``report.html``.

    Returns:
        The summary: the last evaluation in the log with ``counts`` of the training, and the path of
        the report.

    Raises:
        RunError: the folder cannot be written; resuming the run writes the missing files.
    """
    from fastadapt.training.report import write_report

    records = run_dir.read_records(folder / run_dir.METRICS)
    record = next(
        r for r in reversed(records) if r["kind"] == "eval" and r["step"] == counts["steps"]
    )
    origins = (r["init_from"] for r in records if r["kind"] == "start" and "init_from" in r)
    init_from = next(origins, None)
    if init_from is None and config.run.init_from is not None:
        init_from = {"run": config.run.init_from}  # the digest went with the log
    summary = {
        **{k: v for k, v in record.items() if k not in ("kind", "step", "wall_s")},
        "interrupted": False,
        "adapter_kind": config.run.trains,
        **counts,
        "output": str(folder),
        **pair.fingerprints,
        **versions(),
    }
    metadata = {
        "target": config.pair.target,
        "base": config.pair.base,
        "revisions": pair.revisions,
        **pair.fingerprints,
        "objective": dataclasses.asdict(config.objective),
        **({"tokenizer": config.pair.tokenizer} if config.pair.tokenizer else {}),
        "family": config.data.family,
        "architecture": pair.target.config.model_type,
        "seed": config.run.seed,
        **({"init_from": init_from} if init_from else {}),
        "measured": {name: summary[name] for name in _MEASURED if name in summary},
        "versions": versions()["versions"],
    }
    adapter = folder / run_dir.ADAPTER
    with writing_folder(adapter, last=CARD, ours=PATTERNS, advice=run_dir.RESUME_HINT) as staged:
        write_adapters(adapters, staged, metadata)
    summary = {**summary, "adapter": str(adapter)}
    path = folder / run_dir.SUMMARY
    with disk_errors(path, run_dir.RESUME_HINT), replacing(path) as staged:
        staged.write_text(json.dumps(summary, indent=2, allow_nan=False) + "\n", encoding="utf-8")
    return {**summary, "report": str(write_report(folder))} if config.run.report else summary


def versions() -> dict[str, dict[str, str]]:
    """Return ``{"versions": {package: version}}`` of the packages that results depend on."""
    packages = ("fastadapt", "torch", "transformers", "safetensors")
    return {"versions": {package: version(package) for package in packages}}
