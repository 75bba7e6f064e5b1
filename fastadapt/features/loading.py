"""A finished run, opened for analysis in Python."""

from __future__ import annotations

import os
from dataclasses import dataclass

from fastadapt.evaluation.models_under_test import ModelSet
from fastadapt.features.store.schema import MANIFEST
from fastadapt.features.store.store import Store, adapter_digest
from fastadapt.io.names import has_file, typed_path
from fastadapt.models.pair import ModelPair
from fastadapt.models.replacement import ReplacementModel
from fastadapt.training.config import TrainConfig, load_config


@dataclass(frozen=True)
class LoadedRun:
    """The contents of a run directory.

    Attributes:
        model: the replacement model with the run's adapters, in ``eval()``; frozen.
        store: the features that ``fastadapt features collect`` has written into the run, or None.
        config: the run's configuration; None for a folder of adapters without one.
        models: the run under the name ``run``, with the pair's base, hybrid and target.
    """

    model: ReplacementModel
    store: Store | None
    config: TrainConfig | None
    models: ModelSet

    @property
    def pair(self) -> ModelPair:
        """The pair of the run: the target, the base's MLPs and the tokenizer."""
        return self.model.pair


def load_run(
    path: str | os.PathLike[str],
    *,
    dtype: str | None = None,
    device: str | None = None,
    attention: str | None = None,
    trust_remote_code: bool = False,
) -> LoadedRun:
    """Open a finished run: models, adapters, collected features, configuration.

    Args:
        path: folder of a run, or of adapters.
        dtype, device, attention: settings of the pair in place of the run's.
        trust_remote_code: run Python code that comes with the models.

    Returns:
        The run. ``run.model.features("a text")`` gives the active features of every layer.

    Raises:
        UserError: no finished run in the folder, a damaged file, or features that were collected
            from other adapters.

    Example::

        run = load_run("runs/organism")
        layers = run.model.features("tom has 3 apples")
    """
    folder = typed_path(path, "run")
    students = ModelSet.open(
        [folder],
        ["run"],
        dtype=dtype,
        device=device,
        attention=attention,
        trust_remote_code=trust_remote_code,
    )
    store = None
    if has_file(folder / "features" / MANIFEST):
        store = Store.open(folder, adapter=adapter_digest(students.folder("run")))
    config = folder / "config.yaml"
    settings = load_config(config) if has_file(config) else None
    return LoadedRun(students.model, store, settings, students)
