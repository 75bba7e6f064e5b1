"""The contents of a run directory, as functions on runs take them."""

from __future__ import annotations

from dataclasses import dataclass

from fastadapt.evaluation.models_under_test import ModelSet
from fastadapt.features.store.store import Store
from fastadapt.models.pair import ModelPair
from fastadapt.models.replacement import ReplacementModel
from fastadapt.training.config import TrainConfig


@dataclass(frozen=True)
class RunContents:
    """The contents of a run directory.

    Attributes:
        models: the run under the name ``run``, with the pair's base, hybrid and target.
        store: the features that ``fastadapt features collect`` has written into the run, or None.
        config: the run's configuration; None for a folder of adapters without one.
    """

    models: ModelSet
    store: Store | None
    config: TrainConfig | None

    @property
    def model(self) -> ReplacementModel:
        """The replacement model with the run's adapters, in ``eval()``; frozen.

        The weights are loaded when this property is first read.

        Raises:
            UserError: a model of the pair cannot be loaded.
        """
        return self.models.model

    @property
    def pair(self) -> ModelPair:
        """The pair of the run: the target, the base's MLPs and the tokenizer."""
        return self.model.pair
