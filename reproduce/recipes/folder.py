"""The output folder of the recipes, which several processes may fill at once.

::

    settings.json                     marks the folder, and has the rules of measuring
    PAIR/RECIPE/VALUE/seedN/          a part, under a lock of its own
        training.json                 stands for what the run depends on
        run/                          its run, whose checkpoints are removed when it is measured
        measured.json                 what was measured
    recipes.json                      all numbers of the tables
    tables.md, PAIR.png, PAIR.svg     the tables, and KL against L0
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from functools import cache, cached_property
from pathlib import Path
from threading import Event
from time import process_time
from typing import Any

from fastadapt.errors import UserError
from fastadapt.io.atomic import digest_of_input, disk_errors, remove
from fastadapt.io.documents import read_json
from fastadapt.io.names import has_file
from fastadapt.io.workspace import Workspace
from fastadapt.models.sources.fingerprint import fingerprint
from fastadapt.organism import resolve
from fastadapt.training import run_dir
from fastadapt.training.config import TrainConfig
from fastadapt.training.logs.run_log import read_run
from fastadapt.training.trainer import train
from reproduce import parts
from reproduce.parts import MEASURED, SETTINGS, TABLES, StoppedError
from reproduce.recipes import measure
from reproduce.recipes.catalogue import Catalogue, Pair, Recipe, config_of, values_of
from reproduce.recipes.measure import Measured

RESULT, RUN, TRAINING = "recipes.json", "run", "training.json"


@dataclass(frozen=True)
class Part(parts.Part):
    """A recipe on a pair, with a value of the setting that moves L0, and a seed.

    Attributes:
        pair: name of the pair.
        settings: its settings.
        recipe: the recipe.
        value: of ``recipe["setting"]``.
        seed: seed of the training.
        is_judged: whether its features are judged.
    """

    pair: str
    settings: Pair
    recipe: Recipe
    value: float
    seed: int
    is_judged: bool

    @property
    def label(self) -> str:
        """The part in messages."""
        setting = f"{self.recipe['setting']} {self.value:g}"
        return f"{self.pair}, {self.recipe['name']}, {setting}, seed {self.seed}"

    @property
    def kind(self) -> str:
        """The parts of a pair take about the same time."""
        return self.pair

    @cached_property
    def values(self) -> dict[str, Any]:
        """The settings of the training, without defaults."""
        return values_of(self.settings, self.recipe, self.value, self.seed)

    @cached_property
    def config(self) -> TrainConfig:
        """The configuration of the training."""
        return config_of(self.values, self.folder / RUN)

    def check(self) -> None:
        """Raise ``UserError`` if the part cannot be trained as it is described."""
        try:
            self.config  # noqa: B018
        except UserError as error:
            raise UserError(f"{self.label}: {error}") from None

    @property
    def stamps(self) -> dict[str, str]:
        """What a result depends on: ``rules``, ``training`` and ``shared`` of :class:`Measured`."""
        pair, inputs = self.settings, _inputs(self.values["pair"], self.values["data"])
        shared = {key: pair[key] for key in ("config", "settings", "texts")}
        judged = pair["judged"] if self.is_judged else None
        return {
            "rules": _digest([measure.rules(), judged]),
            "training": _digest([self.values, inputs]),
            "shared": _digest([shared, inputs]),
        }

    def measured(self) -> Measured | None:
        """Return what was measured with the present rules and settings; None without it.

        Raises:
            UserError: the file is damaged.
        """
        stamps = self.stamps
        result: Measured | None = parts.read_measured(self.folder, Measured, stamps["rules"])
        if result is None or result["training"] != stamps["training"]:
            return None
        return result


def _digest(values: Any) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def _inputs(pair: Mapping[str, Any], data: Mapping[str, Any]) -> list[str]:
    """Return the fingerprints of a pair's models, and the digests of its texts."""
    return _read_inputs(pair["target"], pair["base"], data["train"], data["validation"])


@cache
def _read_inputs(target: str, base: str, train_data: str, validation: str) -> list[str]:
    models = [fingerprint(resolve(name), None) for name in (target, base)]
    texts = [digest_of_input(Path(resolve(name)))[1] for name in (train_data, validation)]
    return models + texts


def open_folder(folder: Path, *, is_new: bool, pairs: Sequence[str]) -> None:
    """Mark a new folder, or check an older one.

    Args:
        folder: the output folder.
        is_new: whether the folder may be new.
        pairs: names of all pairs.

    Raises:
        UserError: the folder has other files; or it is new, and may not be.
    """
    pictures = [f"{pair}.{suffix}" for pair in pairs for suffix in ("png", "svg")]
    files = (SETTINGS, RESULT, TABLES, *pictures)
    parts.open_folder(
        Workspace(folder, "--out", "writing to", files, marker=SETTINGS),
        {"training": "recipes", "measuring": measure.rules()},
        is_part=lambda name: name in pairs,
        clash="holds no recipes; give a new folder",
        is_new=is_new,
        noun="table of recipes",
    )


def parts_of(
    out: Path, catalogue: Catalogue, pairs: Sequence[str], recipes: Sequence[str], seeds: int
) -> list[Part]:
    """Return the parts of some pairs and recipes: all of the first seed, then of the next."""
    return [
        Part(
            out / pair / recipe["name"] / f"{value:g}" / f"seed{seed}",
            pair,
            catalogue["pairs"][pair],
            recipe,
            value,
            seed,
            seed <= catalogue["pairs"][pair]["judged"]["seeds"],
        )
        for seed in range(1, seeds + 1)
        for pair in pairs
        for recipe in catalogue["recipes"]
        if recipe["name"] in recipes
        for value in recipe["values"].get(pair, ())
    ]


def finish(
    commit: str | None, part: Part, progress: Callable[[str, int, int], None], stop: Event
) -> None:
    """Train and measure a part, and write the result.

    Args:
        commit: commit of the code; None if it is not known.
        part: the part, which this process holds.
        progress: called with (task, done, total).
        stop: event after which the next step raises :class:`StoppedError`.

    Raises:
        StoppedError: before it is finished.
    """
    run, config = part.folder / RUN, part.config
    cpu_s = _train(part, progress, stop)
    progress(f"{part.label}: measuring", 0, 1)
    model = measure.open_model(run)
    batches = measure.held_out_batches(model, config, part.settings["texts"])
    texts, fired = measure.outputs_of(model, batches)
    detection = None
    if part.is_judged:
        detection = measure.detection_of(run, model, config, part.settings["judged"], stop)
        if detection is None:
            raise StoppedError
    result = {
        **part.stamps,
        "pair": part.pair,
        "recipe": part.recipe["name"],
        "value": part.value,
        "seed": part.seed,
        "layers": model.n_layers,
        "features": fired.numel(),
        "silent": int((fired == 0).sum()),
        "dead": sum(read_run(run).dead_in_training),
        "texts": texts,
        "detection": detection,
        "cost": measure.cost_of(run, config, cpu_s),
        "commit": commit,
        "date": datetime.now(timezone.utc).date().isoformat(),
    }
    parts.write(part.folder / MEASURED, result, indent=None)
    remove(run / run_dir.CHECKPOINTS)


def _train(part: Part, progress: Callable[[str, int, int], None], stop: Event) -> float | None:
    """Train a part's run, or resume it; return the seconds of processor that it took.

    A run of other settings, weights or texts is removed first. A finished run is not repeated: its
    seconds are those of an older result, and None without one. They are None also of a training
    that was interrupted.

    Raises:
        StoppedError: before it is finished.
        RunError: the folder cannot be written.
    """
    run, stamp = part.folder / RUN, {"training": part.stamps["training"]}
    path = part.folder / TRAINING
    if not has_file(path) or read_json(path, dict[str, str]) != stamp:
        with disk_errors(part.folder):
            remove(part.folder / MEASURED)
            remove(run)
        parts.write(path, stamp)
    if has_file(run / run_dir.SUMMARY):
        return _recorded_seconds(part.folder)

    def show(record: dict[str, Any]) -> None:
        if record["kind"] == "train":
            progress(part.label, record["step"], steps[0])
        elif record["kind"] in ("start", "resume"):
            steps[0] = record["steps"]

    is_begun = has_file(run / run_dir.CONFIG)
    steps, began = [0], process_time()
    train(part.config, resume=is_begun, sinks=[show], stop=stop)
    if not has_file(run / run_dir.SUMMARY):
        raise StoppedError
    return None if is_begun else process_time() - began


def _recorded_seconds(folder: Path) -> float | None:
    path = folder / MEASURED
    if not has_file(path):
        return None
    recorded = read_json(path, dict[str, Any]).get("cost", {}).get("cpu_s")
    return recorded if isinstance(recorded, float) else None
