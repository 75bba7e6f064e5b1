"""A run directory read back: its records by kind, its final numbers, and the table of them."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from fastadapt.training.rundir import CONFIG, METRICS, SUMMARY, Record, read_records
from fastadapt.wording import number, percent

#: What the numbers of `..._adapter` are of, by `adapter.kind`.
TRAINED = {"transcoder": "adapter", "mlp": "tuned MLPs", "norms": "refit norms"}


@dataclass
class Run:
    """What a run directory holds, each part as far as it got.

    Attributes:
        folder: the run directory.
        train, evals: one record per step, in order of steps.
        events: every other record, in order of writing.
        summary: ``summary.json``, empty before the end of the run.
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
        """The final numbers: of the summary, or of the last evaluation of a run without one."""
        start = next((event for event in self.events if event["kind"] == "start"), {})
        kind = {key: start[key] for key in ("adapter_kind",) if key in start}
        return {**kind, **(self.evals[-1] if self.evals else {}), **self.summary}

    @property
    def dead_window(self) -> int | None:
        """``run.dead_window`` in training tokens, None where the directory does not tell it."""
        window = self.summary.get("dead_window")
        if window is None:
            try:
                window = yaml.safe_load(self.config)["run"]["dead_window"]
            except (yaml.YAMLError, LookupError, TypeError):  # no such key, or no such file
                return None
        return window if isinstance(window, int) else None

    @property
    def dead_in_training(self) -> list[int]:
        """Per layer, features that fired on none of the last `dead_window` training tokens.

        Empty while fewer tokens than the window were seen, when none can have been silent for it.
        """
        counted = (r for r in (self.summary, *reversed(self.train)) if r.get("dead_per_layer"))
        last = next(counted, {})
        window, tokens = self.dead_window, last.get("tokens")
        if window is None or tokens is None or tokens < window:
            return []
        dead: list[int] = last["dead_per_layer"]
        return dead


def read_run(run_dir: str | Path) -> Run:
    """Reads a run directory; a step that was recorded twice counts as recorded last.

    Raises:
        FileNotFoundError: `run_dir` is not a directory.
    """
    folder = Path(run_dir)
    if not folder.is_dir():
        raise FileNotFoundError(f"run_dir: expected a run directory, got {str(run_dir)!r}")
    run = Run(folder)
    steps: dict[str, dict[int, Record]] = {"train": {}, "eval": {}}
    for record in read_records(folder / METRICS):
        if record["kind"] in steps:
            steps[record["kind"]][record["step"]] = record
        else:
            run.events.append(record)
    run.train = [steps["train"][s] for s in sorted(steps["train"])]
    run.evals = [steps["eval"][s] for s in sorted(steps["eval"])]
    if (folder / SUMMARY).is_file():
        run.summary = json.loads((folder / SUMMARY).read_text(encoding="utf-8"))
    if (folder / CONFIG).is_file():
        run.config = (folder / CONFIG).read_text(encoding="utf-8")
    return run


def comparison(result: Record) -> tuple[list[str], list[list[str]]]:
    """The table hybrid / what was trained / target, head and rows, of a summary or evaluation.

    The target is what the others are measured against, so its errors are 0 by definition.
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
    for i in range(max(len(hybrid), len(adapter))):
        name = "NMSE of the embedding" if i == 0 else f"NMSE after layer {i - 1}"
        rows.append([name, number(at(hybrid, i)), number(at(adapter, i)), "0"])
    kind = result.get("adapter_kind", "transcoder")  # runs of old do not tell
    if kind == "transcoder":
        rows.append(["L0 per layer", "–", number(result.get("l0_mean")), "–"])
    return ["", "hybrid", TRAINED[kind], "target"], rows


def at(values: list[Any] | None, index: int) -> Any:
    """`values[index]`, None where there is none."""
    return values[index] if values and index < len(values) else None
