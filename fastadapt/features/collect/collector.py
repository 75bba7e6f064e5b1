"""Collect in one process: open a run, prepare its texts, pass them through the model in batches."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from threading import Event
from typing import Any

import torch

from fastadapt.adapter.files import adapter_digest
from fastadapt.data.tokens import check_ids
from fastadapt.errors import RunError, UserError
from fastadapt.evaluation.faithfulness.prompts import held_out
from fastadapt.evaluation.generation.sampling import context_of, vocabulary_of
from fastadapt.evaluation.models_under_test import ModelSet
from fastadapt.features.collect import folder as work
from fastadapt.features.collect import snapshots
from fastadapt.features.collect.config import CollectConfig, Shard
from fastadapt.features.collect.feature_stats import FeatureStats
from fastadapt.features.collect.layer_codes import record_outputs, walk
from fastadapt.features.collect.snapshots import Cursor
from fastadapt.features.collect.texts import (
    Prepared,
    Source,
    Text,
    batch_of,
    batches_of,
    locate_tokens,
    prepare,
    read_group,
)
from fastadapt.features.collect.topk_buffer import POSITION_BITS
from fastadapt.features.store.logit_lens import token_strings, write_lens, write_tokens
from fastadapt.features.store.schema import TEXTS, Kind
from fastadapt.features.store.units import Neurons, output_rows
from fastadapt.io.atomic import cannot_write
from fastadapt.io.names import typed_path
from fastadapt.io.parquet import open_parquet
from fastadapt.models.self_check import check_traversal

Progress = Callable[[int, int], None]
#: Settings that are facts of the data source, and one that does not change the result.
_ELSEWHERE = ("data", "split", "n", "max_tokens", "snapshot_tokens")


@dataclass(frozen=True)
class Opened:
    """A run to collect features from, with its texts and settings.

    Attributes:
        students: the models under test, of this run alone.
        run: folder of the run, as given.
        source: source of the texts.
        config: the settings, ``neurons_per_token`` filled in where neurons are collected.
    """

    students: ModelSet
    run: str
    source: Source
    config: CollectConfig

    @property
    def name(self) -> str:
        """Name of the run in the model set ``students``."""
        return self.students.runs[0]

    def facts(self, shard: Shard) -> work.Facts:
        """Return adapter, models, data and settings, which determine the store."""
        pair = self.students.config
        settings = asdict(self.config)
        for name in _ELSEWHERE:
            del settings[name]
        return {
            "run": self.run,
            "adapter": adapter_digest(self.students.folder(self.name)),
            "models": self.students.fingerprint(self.name),
            "pair": {**pair.named, "dtype": pair.dtype},
            "data": {**self.source.settings(), "fingerprint": self.source.fingerprint()},
            "settings": settings,
            "shard": list(shard),
        }


def open_run(
    run: str,
    config: CollectConfig,
    *,
    dtype: str | None,
    device: str | None,
    attention: str | None,
    trust_remote_code: bool,
) -> Opened:
    """Open a run and find its held-out data, without reading weights.

    Raises:
        UserError: the run is not finished, has no features, or lacks its data, family or L0.
    """
    students = ModelSet.open(
        [run],
        dtype=dtype,
        device=device,
        attention=attention,
        trust_remote_code=trust_remote_code,
    )
    student = students.compared[students.runs[0]]
    if student.kind != "transcoder":
        raise UserError(
            f"{run}: expected a run of transcoder adapters, got one of kind {student.kind!r}, "
            "which has no features"
        )
    recorded = held_out(typed_path(run, "run"))
    source = config.data or (recorded and recorded.source)
    family = students.family or (recorded and recorded.family)
    if source is None or family is None:
        raise UserError(
            f"no validation data or no chat format recorded in {run}; pass conversations (--data), "
            "or give the folder of a run"
        )
    if student.whole_mlp or "adapter" not in config.kinds:
        config = replace(config, scales=False)
    if config.neurons_per_token is None and set(config.kinds) - {"adapter"}:
        if student.l0 is None:
            raise UserError(
                f"no L0 recorded in {run}; pass the number of neurons of a token that count as "
                "active (--neurons_per_token)"
            )
        n = max(1, math.ceil(student.l0))
        config = replace(config, neurons_per_token=n)
    split = config.split or "validation"
    texts = Source(source, split, None, family, config.n, config.max_tokens)
    if recorded:
        texts = replace(texts, markers=recorded.markers)
    if recorded and config.data is None:
        texts = replace(
            texts,
            split=recorded.split,
            revision=recorded.revision,
            subset=recorded.subset,
            columns=recorded.columns,
            bad_rows=recorded.bad_rows,
        )
    return Opened(students, run, texts, config)


def begin(
    opened: Opened, facts: work.Facts, shard: Shard, folder: Path, *, anew: bool = False
) -> Prepared:
    """Prepare the texts, vocabulary and logit lens of a collection, unless an earlier call has.

    The folder's former contents are removed only after everything is prepared, so a mistake in
    the settings loses nothing.

    Args:
        opened: the run.
        facts: returned by :meth:`Opened.facts`.
        shard: the part of the texts to prepare.
        folder: folder of the store.
        anew: prepare even if an earlier call has.

    Raises:
        UserError: the source cannot be read, or none of its conversations is short enough.
    """
    before = None if anew else work.read_facts(folder)
    if before is not None:
        return Prepared(**before["prepared"])
    staged = folder / work.NEXT
    try:
        staged.mkdir(parents=True)
        model = opened.students.replacement(opened.name)
        # First of all: raises if the units of a kind cannot be collected.
        for kind in opened.config.kinds:
            output_rows(model, kind, 0)
        tokenizer = model.pair.tokenizer
        longest = min(opened.source.max_tokens, context_of(model.model))
        texts = staged / work.TEXTS
        prepared = prepare(opened.source, tokenizer, shard, texts, max_tokens=longest)
        if prepared.texts == 0 and shard.n == 1:
            raise UserError(
                f"data source {opened.source.name!r}: all {prepared.read} conversations are longer "
                f"than {longest} tokens; raise --max_tokens, up to the model's context, or pass "
                "shorter conversations (--data)"
            )
        strings = token_strings(tokenizer, len(model.head))
        write_tokens(strings, staged / "tokens.parquet")
        for kind in opened.config.kinds:
            target = staged / kind / "lens.parquet"
            write_lens(model, kind, strings, target, demeaned=opened.config.demeaned)
        units = {k: [model.n_layers, len(output_rows(model, k, 0))] for k in opened.config.kinds}
        work.write_facts(folder, {**facts, "prepared": asdict(prepared), "units": units})
        work.begin_anew(folder)
    except OSError as error:
        raise RunError(cannot_write(folder, error, "Run the same command again.")) from error
    finally:
        work.sweep(folder)
    return prepared


def gather(
    opened: Opened,
    prepared: Prepared,
    folder: Path,
    *,
    progress: Progress | None = None,
    stop: Event | None = None,
) -> dict[Kind, FeatureStats] | None:
    """Run the texts that follow the last snapshot through the model; return the statistics of all.

    Return None if ``stop`` was set.

    Raises:
        RunError: an activation is not finite, or the folder cannot be written.
    """
    config, model = opened.config, opened.students.replacement(opened.name)
    stats = empty_stats(opened, prepared)
    neurons: dict[Kind, list[Neurons]] = {
        kind: [
            Neurons(norms, config.neurons_per_token or 1)
            for norms in stats[kind].norms.view(model.n_layers, -1)
        ]
        for kind in config.kinds
        if kind != "adapter"
    }
    state = folder / work.WORK / work.STATE
    cursor = snapshots.load(stats, state)
    unsaved, done, checked = 0, 0, False
    texts = folder / work.WORK / work.TEXTS
    vocabulary = vocabulary_of(model.model)
    with open_parquet(texts, TEXTS) as file:
        for group in range(file.num_row_groups):
            if group < cursor.group:
                done += file.metadata.row_group(group).num_rows
                continue
            members = read_group(texts, file, group)
            for text in members:
                check_ids(torch.from_numpy(text.tokens), vocabulary, f"text {text.number}")
            for i, batch in enumerate(batches_of(members, config.batch_tokens)):
                done += len(batch)
                if i < cursor.batch:
                    continue
                if not checked:
                    check_traversal(model, batch_of(batch).to(model.device))
                    checked = True
                take(model, stats, neurons, batch, prepared.domains)
                tokens = sum(len(text.tokens) for text in batch)
                unsaved += tokens
                cursor = Cursor(group, i + 1, cursor.tokens + tokens)
                if progress is not None:
                    progress(done, prepared.texts)
                stopped = stop is not None and stop.is_set()
                if unsaved >= config.snapshot_tokens or stopped:
                    snapshots.save(stats, cursor, state)
                    unsaved = 0
                if stopped:
                    return None
            cursor = Cursor(group + 1, 0, cursor.tokens)
    snapshots.save(stats, cursor, state)
    return stats


def empty_stats(opened: Opened, prepared: Prepared) -> dict[Kind, FeatureStats]:
    """Return empty statistics for each kind of unit (features, neurons) that is collected."""
    model, config = opened.students.replacement(opened.name), opened.config
    stats = {}
    for kind in config.kinds:
        rows = [output_rows(model, kind, layer) for layer in range(model.n_layers)]
        shape = model.n_layers, len(rows[0])
        of_kind = FeatureStats(kind, shape, len(prepared.domains), config, model.device)
        norms = [torch.linalg.vector_norm(r, dim=1, dtype=torch.float32) for r in rows]
        of_kind.norms.copy_(torch.cat(norms))
        stats[kind] = of_kind
    return stats


def take(
    model: Any,
    stats: Mapping[Kind, FeatureStats],
    neurons: Mapping[Kind, Any],
    texts: list[Text],
    domains: list[str],
) -> None:
    """Run one batch through the model and add its codes to the statistics of each kind."""
    batch = batch_of(texts).to(model.device)
    config = next(iter(stats.values())).config
    tokens = locate_tokens(texts, domains, config, model.device)
    scales = stats["adapter"].scales if "adapter" in stats else None
    counted = batch.real.flatten() & (tokens.place & (2**POSITION_BITS - 1) > 0)
    try:
        with record_outputs(model) as outputs_of:
            for layer, codes in walk(model, batch, neurons):
                for kind, of_kind in stats.items():
                    of_kind.add(layer, codes[kind], tokens)
                if scales is not None:
                    decoder = output_rows(model, "adapter", layer)
                    scales.add(layer, codes["adapter"], outputs_of(layer), decoder, counted)
    except RunError as error:
        raise RunError(f"texts {texts[0].number} to {texts[-1].number}: {error}") from None
