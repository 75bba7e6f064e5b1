"""Reader of run directories: records by kind, final numbers, comparison table."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from typing_extensions import TypedDict

from fastadapt.io.documents import (
    Count,
    DocumentError,
    Finite,
    check,
    parse_yaml,
    read_bytes,
    read_json,
)
from fastadapt.io.names import has_file, inside
from fastadapt.reporting.formatting import number, percent
from fastadapt.training.config import Trained
from fastadapt.training.run_dir import CONFIG, METRICS, SUMMARY, Record, read_records

#: Name of the trained part in tables, by ``run.trains``.
TRAINED = {
    "transcoder": "adapter",
    "mlp": "tuned MLPs",
    "norms": "refit norms",
    "bias": "biases",
    "lora": "low-rank updates",
}


_Value = Finite | None
_PerLayer = list[_Value] | None


class Histograms(TypedDict, total=False):
    """Number of features per bin of density (share of tokens on which one fires), per layer."""

    log10_edges: list[Finite]
    counts: list[list[Count]]


class Measures(TypedDict, total=False):
    """Types of the displayed values of a record or a summary; other keys are ignored."""

    adapter_kind: Trained
    loss: _Value
    kl: _Value
    kl_adapter: _Value
    kl_hybrid: _Value
    kl_recovered_vs_hybrid: _Value
    top1_error: _Value
    top1_error_adapter: _Value
    top1_error_hybrid: _Value
    nmse: _Value
    nmse_token: _Value
    nmse_mean: _Value
    nmse_mean_hybrid: _Value
    nmse_per_layer: _PerLayer
    nmse_per_layer_hybrid: _PerLayer
    bridge_adapter_to_target: _Value
    bridge_target_to_adapter: _Value
    sparsity: _Value
    sparsity_weight: _Value
    l0: _Value
    l0_mean: _Value
    l0_per_layer: _PerLayer
    dead_per_layer: _PerLayer
    n_dead_per_layer: _PerLayer
    dead_window: Count | None
    feature_density_histogram: Histograms | None
    lr: _Value
    grad_norm: _Value
    tokens_per_s: _Value
    tokens: Count | None
    wall_s: _Value
    step: Count
    steps: Count
    versions: dict[str, Any] | None


@dataclass
class RunLog:
    """Contents of a run directory; parts of an unfinished run may be empty.

    Attributes:
        folder: the run directory.
        train, evals: one record per step, in order of steps.
        events: all other records, in order of writing.
        summary: contents of ``summary.json``; empty before the end of the run.
        config: ``config.yaml`` as text.
    """

    folder: Path
    train: list[Record] = field(default_factory=list)
    evals: list[Record] = field(default_factory=list)
    events: list[Record] = field(default_factory=list)
    summary: Record = field(default_factory=dict)
    config: str = ""

    @property
    def result(self) -> Record:
        """Final numbers: the summary or, before it exists, the last evaluation."""
        start = next((event for event in self.events if event["kind"] == "start"), {})
        kind = {key: start[key] for key in ("adapter_kind",) if key in start}
        return {**kind, **(self.evals[-1] if self.evals else {}), **self.summary}

    @property
    def dead_window(self) -> int | None:
        """``run.dead_window`` in training tokens; None if neither file records it."""
        window = self.summary.get("dead_window")
        window = self._setting("run", "dead_window") if window is None else window
        return window if isinstance(window, int) else None

    @property
    def sparsity(self) -> float | None:
        """``objective.sparsity``; None if the configuration does not record it."""
        weight = self._setting("objective", "sparsity")
        return float(weight) if isinstance(weight, int | float) else None

    @property
    def target_l0(self) -> float | None:
        """``objective.l0``; None if the run has no target."""
        target = self._setting("objective", "l0")
        return float(target) if isinstance(target, int | float) else None

    def _setting(self, component: str, key: str) -> Any:
        try:
            return parse_yaml(self.config, CONFIG)[component][key]
        except (DocumentError, LookupError, TypeError):  # no such key, or no such file
            return None

    @property
    def dead_in_training(self) -> list[int]:
        """Per layer, features that fired on none of the last `dead_window` training tokens.

        Empty before the run has trained on that number of tokens.
        """
        counted = (r for r in (self.summary, *reversed(self.train)) if r.get("dead_per_layer"))
        last = next(counted, {})
        window, tokens = self.dead_window, last.get("tokens")
        if window is None or tokens is None or tokens < window:
            return []
        dead: list[int] = last["dead_per_layer"]
        return dead


def read_run(run_dir: str | Path) -> RunLog:
    """Read a run directory. If a step was recorded twice, its last record counts.

    Raises:
        FileNotFoundError: `run_dir` is not a directory.
        DocumentError: the summary or a record holds a value of the wrong type.
        UserError: the configuration is a link to a file outside the run.
    """
    folder = Path(run_dir)
    if not folder.is_dir():
        raise FileNotFoundError(f"run_dir: expected a run directory, got {str(run_dir)!r}")
    run = RunLog(folder)
    steps: dict[str, dict[int, Record]] = {"train": {}, "eval": {}}
    for record in read_records(folder / METRICS):
        check(record, Measures, f"{folder / METRICS}: {record['kind']} {record['step']}")
        if record["kind"] in steps:
            steps[record["kind"]][record["step"]] = record
        else:
            run.events.append(record)
    run.train = [steps["train"][s] for s in sorted(steps["train"])]
    run.evals = [steps["eval"][s] for s in sorted(steps["eval"])]
    run.summary = read_summary(folder / SUMMARY)
    if has_file(folder / CONFIG):
        config = read_bytes(inside(folder, CONFIG, source=str(folder)))
        run.config = config.decode("utf-8", errors="replace")
    return run


def read_summary(path: Path) -> Record:
    """Return the contents of ``summary.json``; empty if the file does not exist.

    Raises:
        DocumentError: a value has the wrong type.
    """
    summary: Record = read_json(path, Measures) if has_file(path) else {}
    return summary


def comparison(result: Record, *, layers: bool = True) -> tuple[list[str], list[list[str]]]:
    """Return head and rows of the table that compares hybrid, trained part and target.

    The target's errors are 0 by definition.

    Args:
        result: a summary or an evaluation record.
        layers: add a row with the NMSE of each layer.
    """

    def row(name: str, hybrid: str, adapter: str, show: Any = number) -> list[str]:
        return [name, show(result.get(hybrid)), show(result.get(adapter)), show(0)]

    rows = [
        row("KL, nats per token", "kl_hybrid", "kl_adapter"),
        row("top-1 error", "top1_error_hybrid", "top1_error_adapter", percent),
        row("NMSE, mean", "nmse_mean_hybrid", "nmse_mean"),
    ]
    hybrid = result.get("nmse_per_layer_hybrid") or []
    adapter = result.get("nmse_per_layer") or []
    for i in range(max(len(hybrid), len(adapter)) if layers else 0):
        name = "NMSE of the embedding" if i == 0 else f"NMSE after layer {i - 1}"
        rows.append([name, number(value_at(hybrid, i)), number(value_at(adapter, i)), "0"])
    kind = result.get("adapter_kind", "transcoder")  # absent in runs of older versions
    if kind == "transcoder":
        rows.append(["L0 per layer", "–", number(result.get("l0_mean")), "–"])
    return ["", "hybrid", TRAINED[kind], "target"], rows


def value_at(values: list[Any] | None, index: int) -> Any:
    """Return ``values[index]``, or None where it does not exist."""
    return values[index] if values and index < len(values) else None
