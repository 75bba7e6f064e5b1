"""Adapters of two stages of a fine-tuning: ``python -m reproduce.stages``.

The earlier stage is the embedded pair's target, the later one :mod:`reproduce.stages.target`. Of
each seed, adapters of the later stage are trained from new weights and from those of the earlier
stage's adapters (``run.init_from``), and compared with the latter feature by feature.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from statistics import mean
from threading import Event
from typing import Any, NamedTuple

from fastadapt.cli.console import print_table, quiet_transformers
from fastadapt.errors import UserError
from reproduce.command import run

#: Settings of all runs: TopK, 4 active features of 512.
SETTINGS = {
    "adapter.k": 4,
    "run.eval_every": 0,
    "run.checkpoint_every": 50,
    "run.report": False,
    "run.threads": 1,
}
SEEDS = (42, 1, 2)


class Arm(NamedTuple):
    """Adapters of one stage.

    Attributes:
        name: folder of its runs.
        words: the arm in the table.
        steps: steps of training.
        lr: learning rate.
        continues: whether they begin as those of the earlier stage.
    """

    name: str
    words: str
    steps: int
    lr: float = 8e-3
    continues: bool = False


EARLIER = Arm("earlier", "earlier stage", 300)
LATER = (
    Arm("new", "later stage, new weights", 300),
    Arm("new-half", "later stage, new weights", 150),
    Arm("continued", "later stage, begun as the earlier", 150, continues=True),
    Arm("continued-slowly", "later stage, begun as the earlier", 150, 8e-4, continues=True),
)


class Reached(NamedTuple):
    """What a run reached: KL before and after training, and how far features stayed."""

    kl_start: float
    kl: float
    same_examples: float | None = None
    encoder: float | None = None
    decoder: float | None = None


def main(argv: list[str]) -> int:
    """Train, collect and compare what is missing; print the table; return the exit code."""
    from fastadapt.cli.progress import resume_hint, stoppable

    options = _options(argv)
    quiet_transformers()
    results: dict[Arm, list[Reached]] = {arm: [] for arm in (EARLIER, *LATER)}
    with stoppable() as (stop, progress):
        for seed in SEEDS[: options.seeds]:
            for arm, reached in results.items():
                got = _finish(options.out, arm, seed, progress, stop)
                if got is None:
                    print(f"Stopped; finished steps are saved in {options.out}.")
                    print(resume_hint())
                    return 0
                reached.append(got)
    _write(options.out, results)
    return 0


def _options(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m reproduce.stages",
        description="Train adapters of two stages of a fine-tuning of the embedded pair, and "
        "compare their features by number. The same command resumes after a stop.",
    )
    parser.add_argument("--out", type=Path, default=Path("runs/stages"), help="folder to write")
    parser.add_argument("--seeds", type=int, default=len(SEEDS), help="number of seeds")
    options = parser.parse_args(argv)
    if not 1 <= options.seeds <= len(SEEDS):
        raise UserError(f"--seeds: expected 1 to {len(SEEDS)}, got {options.seeds}")
    return options


def _finish(
    out: Path, arm: Arm, seed: int, progress: Callable[[str, int, int], None], stop: Event
) -> Reached | None:
    """Train, collect and compare the run of an arm; None if stopped."""
    from fastadapt.features.collect import CollectConfig, collect
    from fastadapt.training.run_dir import METRICS, read_records

    folder, earlier = (out / f"seed{seed}" / name for name in (arm.name, EARLIER.name))
    if not _train(out, folder, arm, seed, progress, stop):
        return None
    if collect(folder, None, CollectConfig(), stop=stop) is None:
        return None
    kls = [r["kl_adapter"] for r in read_records(folder / METRICS) if r["kind"] == "eval"]
    if arm == EARLIER:
        return Reached(kls[0], kls[-1])
    return Reached(kls[0], kls[-1], *_compared(earlier, folder))


def _train(
    out: Path,
    folder: Path,
    arm: Arm,
    seed: int,
    progress: Callable[[str, int, int], None],
    stop: Event,
) -> bool:
    """Train the run of an arm, or resume it; return whether it is finished."""
    from fastadapt.cli.train import read_configs
    from fastadapt.io.names import has_file
    from fastadapt.training.config import from_dict
    from fastadapt.training.run_dir import CONFIG, SUMMARY
    from fastadapt.training.trainer import train
    from reproduce.stages.target import build

    target = out / "target"
    if not has_file(target / "config.json"):
        progress("tuning the later target", 0, 1)
        build(target)
    if has_file(folder / SUMMARY):
        return True
    values = read_configs(["organism", "best"])
    typed: dict[str, Any] = {
        **SETTINGS,
        "optimizer.max_steps": arm.steps,
        "optimizer.lr": arm.lr,
        "run.seed": seed,
        "run.output": str(folder),
    }
    if arm != EARLIER:
        typed["pair.target"] = str(target)
    if arm.continues:
        typed["run.init_from"] = str(folder.parent / EARLIER.name)
    for key, value in typed.items():
        section, name = key.split(".")
        values[section][name] = value

    def show(record: dict[str, Any]) -> None:
        if record["kind"] == "train":
            progress(f"seed {seed}: {arm.name}", record["step"], arm.steps)

    resume = has_file(folder / CONFIG)
    summary = train(from_dict(values), resume=resume, sinks=[show], stop=stop)
    return not summary["interrupted"]


def _compared(earlier: Path, later: Path) -> list[float]:
    """Return medians over the features that are active in both: of examples, and of cosines."""
    import numpy as np

    from fastadapt.features.comparison import compare

    rows = compare(earlier, later).rows
    both = (rows["density"].to_numpy() > 0) & (rows["other_density"].to_numpy() > 0)
    columns = ("same_examples", "encoder_cosine", "decoder_cosine")
    return [float(np.median(rows[name].to_numpy()[both])) for name in columns]


def _write(out: Path, results: dict[Arm, list[Reached]]) -> None:
    from fastadapt.io.atomic import disk_errors, replacing
    from fastadapt.reporting.formatting import number, percent
    from fastadapt.reporting.tables import Table, as_markdown

    rows = []
    for arm, reached in results.items():
        measures = [
            [value for value in column if value is not None]
            for column in zip(*reached, strict=True)
        ]
        start, end, same, *cosines = (mean(column) if column else None for column in measures)
        by_seed = ", ".join(number(each.kl) for each in reached)
        shown = ("–" if cosine is None else f"{cosine:.2f}" for cosine in cosines)
        kls = number(start), number(end), by_seed
        rows.append([arm.words, str(arm.steps), f"{arm.lr:g}", *kls, percent(same), *shown])
    head = ["adapters", "steps", "rate", "KL at the start", "KL", "… by seed", "same examples"]
    table = Table(
        "Two stages of a fine-tuning",
        [*head, "cosine of encoders", "of decoders"],
        rows,
        "Means over seeds. KL in nats on held-out texts, to the target of the stage. Same examples "
        "and cosines are medians over the features that are active in both, against the earlier "
        "stage's features of the same seed and numbers.",
    )
    path = out / "tables.md"
    with disk_errors(path), replacing(path) as staged:
        staged.write_text(as_markdown([table]), encoding="utf-8")
    print(table.title)
    print_table(table.head, table.rows)
    print(table.note)
    print(f"tables: {path.resolve()}")


if __name__ == "__main__":
    run(main)
