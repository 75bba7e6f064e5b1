"""One process's part of collecting: a run opened, its texts read batch by batch, state kept."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from threading import Event
from typing import Any

import torch

from fastadapt.data.tokens import check_ids
from fastadapt.errors import RunError, UserError
from fastadapt.evaluation.faithfulness.prompts import held_out
from fastadapt.evaluation.generation.sampling import context_of, vocabulary_of
from fastadapt.evaluation.models_under_test import Students
from fastadapt.features.collect import folder as work
from fastadapt.features.collect import snapshots
from fastadapt.features.collect.config import CollectConfig, Shard
from fastadapt.features.collect.feature_stats import Tally
from fastadapt.features.collect.layer_codes import walk
from fastadapt.features.collect.snapshots import Cursor
from fastadapt.features.collect.texts import (
    Prepared,
    Source,
    Text,
    batch_of,
    batches_of,
    places_of,
    prepare,
    read_group,
)
from fastadapt.features.store.logit_lens import token_strings, write_lens, write_tokens
from fastadapt.features.store.schema import TEXTS, Kind
from fastadapt.features.store.store import adapter_digest
from fastadapt.features.store.units import Neurons, output_rows
from fastadapt.io.atomic import cannot_write
from fastadapt.io.names import typed_path
from fastadapt.io.parquet import open_parquet
from fastadapt.models.self_check import check_traversal

Progress = Callable[[int, int], None]
#: Settings that the source of the texts has, and one without part in what is collected.
_ELSEWHERE = ("data", "split", "n", "max_tokens", "snapshot_tokens")


@dataclass(frozen=True)
class Opened:
    """A run that features can be collected from, and what is told of it.

    Attributes:
        students: of the run alone.
        run: its folder, as given.
        source: of the texts.
        config: as given, ``neurons_per_token`` known where it is needed.
    """

    students: Students
    run: str
    source: Source
    config: CollectConfig

    @property
    def name(self) -> str:
        """Of the run."""
        return self.students.runs[0]

    def facts(self, shard: Shard) -> work.Facts:
        """What is collected, from what: equal where the result is."""
        pair = self.students.config
        settings = asdict(self.config)
        for name in _ELSEWHERE:
            del settings[name]
        return {
            "run": self.run,
            "adapter": adapter_digest(self.students.folder(self.name)),
            "models": self.students.fingerprint(self.name),
            "pair": {**pair.named, "dtype": pair.dtype},
            "data": {**asdict(self.source), "fingerprint": self.source.fingerprint()},
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
    """Read what a run says of itself and of its held-out texts; no weight is read yet.

    Raises:
        UserError: it is not finished, has no features, or does not say what is needed.
    """
    students = Students.open(
        [run],
        dtype=dtype,
        device=device,
        attention=attention,
        trust_remote_code=trust_remote_code,
    )
    student = students.students[students.runs[0]]
    if student.kind != "transcoder":
        raise UserError(
            f"{run}: what was trained here is of kind {student.kind!r}, which has no features; "
            "expected a run of transcoder adapters"
        )
    told = held_out(typed_path(run, "run"))
    source = config.data or (told and told.source)
    family = students.family or (told and told.family)
    if source is None or family is None:
        raise UserError(
            f"{run} does not say what it was validated on and how that was rendered: give the "
            "folder of a run, or conversations (--data)"
        )
    own = told if config.data is None else None
    if config.neurons_per_token is None and set(config.kinds) - {"adapter"}:
        if student.l0 is None:
            raise UserError(
                f"{run} does not say its L0: say how many neurons of a token count as active "
                "(--neurons_per_token)"
            )
        n = max(1, math.ceil(student.l0))
        config = CollectConfig(**{**asdict(config), "neurons_per_token": n})
    split, revision = (own.split, own.revision) if own else (config.split or "validation", None)
    found = Source(source, split, revision, family, config.n, config.max_tokens)
    return Opened(students, run, found, config)


def begin(
    opened: Opened, facts: work.Facts, shard: Shard, folder: Path, *, anew: bool = False
) -> Prepared:
    """Prepare the texts, the vocabulary and the logit lens, if that was not done before.

    What the folder held is removed once all of it is prepared: a mistake costs nothing.

    Args:
        opened: the run.
        facts: what is collected.
        shard: the part of the texts to prepare.
        folder: of the store.
        anew: prepare it in any case.

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
        # Asked for first, since a kind that cannot be collected should be known at once.
        for kind in opened.config.kinds:
            output_rows(model, kind, 0)
        tokenizer = model.pair.tokenizer
        longest = min(opened.source.max_tokens, context_of(model.model))
        to = staged / work.TEXTS
        prepared = prepare(opened.source, tokenizer, shard, to, max_tokens=longest)
        if prepared.texts == 0 and shard.n == 1:
            raise UserError(
                f"data source {opened.source.name!r}: all {prepared.read} conversations are longer "
                f"than {longest} tokens (--max_tokens, at most the model's context)"
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
) -> dict[Kind, Tally] | None:
    """Collect from the texts, going on where it was left; None where it was stopped before the end.

    Raises:
        RunError: an activation is not finite, or the folder cannot be written.
    """
    config, model = opened.config, opened.students.replacement(opened.name)
    tallies = tallies_of(opened, prepared)
    neurons: dict[Kind, list[Neurons]] = {
        kind: [
            Neurons(norms, config.neurons_per_token or 1)
            for norms in tallies[kind].norms.view(model.n_layers, -1)
        ]
        for kind in config.kinds
        if kind != "adapter"
    }
    state = folder / work.WORK / work.STATE
    cursor = snapshots.load(tallies, state)
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
            for i, some in enumerate(batches_of(members, config.batch_tokens)):
                done += len(some)
                if i < cursor.batch:
                    continue
                if not checked:
                    check_traversal(model, batch_of(some).to(model.device))
                    checked = True
                take(model, tallies, neurons, some, prepared.domains)
                tokens = sum(len(text.tokens) for text in some)
                unsaved += tokens
                cursor = Cursor(group, i + 1, cursor.tokens + tokens)
                if progress is not None:
                    progress(done, prepared.texts)
                stopped = stop is not None and stop.is_set()
                if unsaved >= config.snapshot_tokens or stopped:
                    snapshots.save(tallies, cursor, state)
                    unsaved = 0
                if stopped:
                    return None
            cursor = Cursor(group + 1, 0, cursor.tokens)
    snapshots.save(tallies, cursor, state)
    return tallies


def tallies_of(opened: Opened, prepared: Prepared) -> dict[Kind, Tally]:
    """Empty ones, of every kind that is collected."""
    model, config = opened.students.replacement(opened.name), opened.config
    tallies = {}
    for kind in config.kinds:
        rows = [output_rows(model, kind, layer) for layer in range(model.n_layers)]
        shape = model.n_layers, len(rows[0])
        tally = Tally(kind, shape, len(prepared.domains), config, model.device)
        norms = [torch.linalg.vector_norm(r, dim=1, dtype=torch.float32) for r in rows]
        tally.norms.copy_(torch.cat(norms))
        tallies[kind] = tally
    return tallies


def take(
    model: Any,
    tallies: Mapping[Kind, Tally],
    neurons: Mapping[Kind, Any],
    texts: list[Text],
    domains: list[str],
) -> None:
    """Run one batch through the model, and every kind's codes into its tally."""
    batch = batch_of(texts).to(model.device)
    any_tally = next(iter(tallies.values()))
    at = places_of(texts, domains, any_tally.config, model.device)
    try:
        for layer, found in walk(model, batch, neurons):
            for kind, tally in tallies.items():
                tally.add(layer, found[kind], at)
    except RunError as error:
        raise RunError(f"texts {texts[0].number} to {texts[-1].number}: {error}") from None
