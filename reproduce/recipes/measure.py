"""Measure a trained run on held-out texts: KL, L0, dead features, detection score, cost."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from statistics import mean
from threading import Event
from typing import Any

import torch
from torch import Tensor
from typing_extensions import TypedDict

from fastadapt.batch import Batch, token_weights
from fastadapt.data.batches import collate
from fastadapt.data.mixtures import load_held_out
from fastadapt.evaluation.faithfulness.outputs import check_finite
from fastadapt.evaluation.models_under_test import ModelSet
from fastadapt.features.autointerp.activations import ModelActivations
from fastadapt.features.autointerp.describe import describe
from fastadapt.features.autointerp.examples import NothingToJudgeError
from fastadapt.features.autointerp.judges.settings import DescribeConfig
from fastadapt.features.autointerp.judges.without_llm import TokenJudge
from fastadapt.features.collect import CollectConfig, collect
from fastadapt.io.atomic import remove
from fastadapt.io.documents import Count, NonNegative, Positive, Sha256
from fastadapt.kernels.linear_kl import linear_kl
from fastadapt.models.replacement import ReplacementModel
from fastadapt.models.sources.pair_sources import Sources, planned_config
from fastadapt.models.traversal import Stream, final_norm, side_by_side
from fastadapt.training.config import TrainConfig
from fastadapt.training.logs.run_log import read_run
from fastadapt.training.planning.estimate import plan
from fastadapt.training.planning.flops import Setup, flops_per_step
from reproduce.parts import Stamp, digest_of_code
from reproduce.recipes.catalogue import Judged

STREAMS = (Stream("hybrid"), Stream("replacement"))
#: Examples of a feature that the judge sees, and texts of either label that score it.
SHOWN, LEAST_SHOWN, SCORED = 10, 3, 5


class Texts(TypedDict):
    """Sums over the held-out texts, one number each.

    ``tokens`` and ``predicted`` count tokens and predictions; ``kl`` and ``kl_hybrid`` are sums of
    KL(target ‖ model) in nats over the predictions; ``active`` counts the active features of all
    tokens and layers.
    """

    tokens: list[Positive]
    predicted: list[Positive]
    kl: list[NonNegative]
    kl_hybrid: list[NonNegative]
    active: list[Count]


class Detection(TypedDict):
    """Share of the scored texts that the judge labels rightly, over ``units`` features.

    ``accuracy`` is None if too few features have examples enough to be judged.
    """

    accuracy: NonNegative | None
    units: Count


class Cost(TypedDict):
    """Cost of a training.

    ``flops`` are those of all steps at the mean L0 of the training, ``peak_bytes`` the planned peak
    of memory. ``cpu_s`` are seconds of processor; None if the training was interrupted.
    """

    steps: Positive
    tokens: Positive
    flops: NonNegative
    cpu_s: NonNegative | None
    peak_bytes: Count


class Measured(Stamp):
    """What was measured of a part: ``measured.json``.

    ``training`` stands for the settings, weights and texts of the training, ``shared`` for those
    that all recipes of the pair share. Of ``features`` features of ``layers`` layers together,
    ``silent`` fire on no held-out token, and ``dead`` on none of the last training tokens
    (``run.dead_window``).
    """

    training: Sha256
    shared: Sha256
    pair: str
    recipe: str
    value: float
    seed: Count
    layers: Positive
    features: Positive
    silent: Count
    dead: Count
    texts: Texts
    detection: Detection | None
    cost: Cost
    commit: str | None
    date: str


@cache
def rules() -> str:
    """Return the SHA-256 of the rules of measuring, see :func:`~reproduce.parts.digest_of_code`."""
    return digest_of_code([__file__])


@torch.no_grad()
def outputs_of(model: ReplacementModel, batches: Sequence[Batch]) -> tuple[Texts, Tensor]:
    """Measure hybrid and replacement on batches of one text each.

    Returns:
        The sums over each text, and the number of tokens on which each feature fires, int64
        ``[L, F]``.

    Raises:
        RunError: a prediction is not finite.
    """
    texts: Texts = {"tokens": [], "predicted": [], "kl": [], "kl_hybrid": [], "active": []}
    fired = torch.zeros(model.n_layers, model.n_features, dtype=torch.int64)
    for number, batch in enumerate(batches):
        before = int(fired.sum())
        for passed in side_by_side(model, batch.to(model.device), STREAMS):
            h, students = passed.target, passed.students
            if (aux := passed.aux[1]) is not None:
                fired[passed.layer] += aux.stats.feature_counts.cpu()
        predicts = token_weights(batch).predictions > 0
        got = linear_kl(
            model.final_norm(h, "target")[predicts],
            [final_norm(model, s, to)[predicts] for s, to in zip(students, STREAMS, strict=True)],
            model.head,
            softcap=model.softcap,
        )
        check_finite("the run", got.token_kl, [str(number)])
        hybrid, replacement = got.token_kl.double().sum(1).clamp(min=0).tolist()
        texts["tokens"].append(int(batch.real.sum()))
        texts["predicted"].append(int(predicts.sum()))
        texts["kl"].append(replacement)
        texts["kl_hybrid"].append(hybrid)
        texts["active"].append(int(fired.sum()) - before)
    return texts, fired


def held_out_batches(model: ReplacementModel, config: TrainConfig, texts: int) -> list[Batch]:
    """Return the first held-out texts of a run's data, one to a batch."""
    context = model.model.config.get_text_config().max_position_embeddings
    data = replace(config.data, max_validation=texts)
    samples = load_held_out(data, model.pair.tokenizer, context)
    return [collate([samples[i]], 0) for i in range(len(samples))]


def detection_of(
    run: Path, model: ReplacementModel, config: TrainConfig, judged: Judged, stop: Event
) -> Detection | None:
    """Return how well rules over tokens tell where features fire; None if stopped.

    The store of features is written into the run, and removed.

    Raises:
        UserError, RunError: see :func:`~fastadapt.features.collect.collect`.
    """
    n, before, after = judged["texts"], judged["before"], judged["after"]
    store = collect(
        run,
        None,
        CollectConfig(n=n, max_tokens=config.data.max_tokens, before=before, after=after),
        overwrite=True,
        stop=stop,
    )
    if store is None:
        return None
    how = DescribeConfig(
        units=judged["units"],
        samples=("top",),
        shown=SHOWN,
        min_shown=LEAST_SHOWN,
        scored=SCORED,
        before=before,
        after=after,
        texts=n,
    )
    try:
        result = describe(store, TokenJudge(), how, ModelActivations(model), stop=stop)
    except NothingToJudgeError:
        return {"accuracy": None, "units": 0}
    finally:
        remove(store.folder)
    if result is None:
        return None
    scores: Any = result["detection"]["adapter"]["top"]
    return {"accuracy": scores["accuracy"]["mean"], "units": scores["units"]}


def cost_of(run: Path, config: TrainConfig, cpu_s: float | None) -> Cost:
    """Return the cost of a finished training.

    Args:
        run: folder of the run.
        config: its configuration, whose ``objective.checkpoint`` is not ``auto``.
        cpu_s: seconds of processor; None if they are not known.
    """
    log = read_run(run)
    summary, size = log.summary, config.optimizer.batch_size * config.optimizer.accumulation
    l0 = mean(mean(record["l0_per_layer"]) for record in log.train)
    length = max(2, round(summary["tokens"] / (summary["steps"] * size)))
    target = Sources.find(config.pair).configs(planned_config)[0]
    setup = Setup(
        target,
        config.pair,
        config.trained,
        config.objective,
        config.optimizer.batch_size,
        length,
    )
    step = flops_per_step(setup, target.num_hidden_layers, l0) * config.optimizer.accumulation
    return {
        "steps": summary["steps"],
        "tokens": summary["tokens"],
        "flops": step * summary["steps"],
        "cpu_s": cpu_s,
        "peak_bytes": plan(config).peak_bytes,
    }


def open_model(run: Path) -> ReplacementModel:
    """Load the pair of a finished run with its adapters, in ``eval()``."""
    return ModelSet.open([run], ["run"]).model
