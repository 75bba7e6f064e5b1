"""Select training and validation texts from a source in a single pass.

A source is any that training reads: conversations of any number of turns, prompts with responses,
plain text, or token ids. The output has a column ``messages``, ``text`` or ``input_ids``, from
which training reads the same tokens and labels as from the source.

The pass stores, for each domain, only the candidates that can still be drawn, and counts the tokens
of these only (:mod:`fastadapt.data.prepare.candidate_store`). After the pass,
:mod:`fastadapt.data.prepare.selection` draws the splits. They are written as Parquet in the order
of the draw, with a manifest. Every byte is a function of the source, the settings and the versions
of the libraries.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from threading import Event
from typing import Any

from fastadapt.data.layouts import Kind
from fastadapt.data.prepare import output_folder
from fastadapt.data.prepare.candidate_store import RESUME_ADVICE, CandidateStore
from fastadapt.data.prepare.filter_pass import OPTIONAL, FilterPass, Record, Sink
from fastadapt.data.prepare.selection import (
    EVERY_ROW,
    NO_END,
    NO_THINK,
    OTHER_DOMAIN,
    SPLITS,
    Candidate,
    PrepareConfig,
    Selection,
    Shortlist,
    draw,
    length_histogram,
)
from fastadapt.data.prepare.source_stream import SourceStream
from fastadapt.data.tokenised import RowTokeniser
from fastadapt.errors import UserError
from fastadapt.io.atomic import digest, disk_errors, replacing

_GROUP_BYTES = 1 << 24  # bytes of text in a row group of the output files


def prepare(
    config: PrepareConfig,
    *,
    resume: bool = False,
    overwrite: bool = False,
    trust_remote_code: bool = False,
    sink: Sink | None = None,
    stop: Event | None = None,
) -> Record:
    """Select conversations and write them to the folder ``config.output``.

    Args:
        config: source, quotas and filters.
        resume: resume the unfinished selection in the folder, or verify a finished one.
        overwrite: remove the selection in the folder first.
        trust_remote_code: run Python code that comes with the tokenizer.
        sink: called with ``{"kind": "read", "rows", "kept", "fraction"}`` while reading and
            ``{"kind": "write", "done", "of"}`` while writing.
        stop: set this event to stop within the next 1000 rows. ``resume`` continues from there.

    Returns:
        The manifest, with ``interrupted: False`` and ``output``. If ``stop`` was set:
        ``interrupted: True``, the number of ``rows`` read, and ``output``.

    Raises:
        UserError: the source, the tokenizer or the folder cannot be used, or a domain cannot fill
            its quota (rows read so far are saved: resume with ``allow_fewer``).
        RunError: the disk is full, or the hub stopped answering.
    """
    from fastadapt.models.pretrained import load_tokenizer

    report = sink or (lambda _: None)
    with output_folder.open_output(config.output, resume=resume, overwrite=overwrite) as folder:
        stream = _open(config)
        tokenizer = load_tokenizer(config.tokenizer, None, trust=trust_remote_code)
        tokeniser = RowTokeniser(tokenizer, config.family, markers=config.markers)
        settings = {**_settings(config, stream, tokenizer), "family": tokeniser.form.spec}
        if resume:
            output_folder.check_same(folder, settings)
            manifest = output_folder.read_manifest(folder)
            if manifest is not None:
                output_folder.verify(folder, manifest)
                output_folder.clean(folder)
                return {**manifest, "interrupted": False, "output": str(folder)}
        else:
            output_folder.begin(folder, settings)
        shortlist = Shortlist(_limits(config))
        with CandidateStore(folder / output_folder.WORK, config.seed, shortlist) as store:
            if not FilterPass(config, stream, store, shortlist, tokeniser).run(report, stop):
                return {"interrupted": True, "rows": store.read, "output": str(folder)}
            selection = draw(shortlist, config.quotas())
            if selection.missing and not config.allow_fewer:
                raise UserError(_shortage(config, selection, store, shortlist))
            files = _write(folder, selection, store, stream.layout.kind, report)
            manifest = {
                "format": output_folder.FORMAT,
                "schema_version": output_folder.SCHEMA_VERSION,
                "settings": settings,
                "source": stream.hashed(),
                "counts": _counts(config, selection, store),
                "files": files,
            }
        output_folder.finish(folder, manifest)
    return {**manifest, "interrupted": False, "output": str(folder)}


def _open(config: PrepareConfig) -> SourceStream:
    """Open the source; raise ``UserError`` if it lacks what the settings need."""
    stream = SourceStream(config.where, optional=OPTIONAL)
    if config.has_domains and "domain" not in stream.columns:
        listed = ", ".join(map(repr, stream.columns))
        raise UserError(
            f"data source {config.source!r}: no column 'domain'; the columns are {listed}. Pass "
            f"--shares {EVERY_ROW} to draw from all rows"
        )
    if stream.layout.kind == "token ids" and config.thinking == "required":
        raise UserError(
            f"data source {config.source!r} holds token ids, of which the reasoning is unknown; "
            "pass --thinking any to take every row"
        )
    return stream


def _limits(config: PrepareConfig) -> dict[str, int]:
    """Return, by domain, how many candidates the pass stores."""
    quotas = config.quotas()
    wanted = {d: sum(quotas[split][d] for split in SPLITS) for d in quotas["train"]}
    return {domain: math.ceil(config.reserve * n) + 64 for domain, n in wanted.items()}


def _settings(config: PrepareConfig, stream: SourceStream, tokenizer: Any) -> Record:
    """Return everything that determines the selection, as JSON."""
    from importlib.metadata import version

    values = dataclasses.asdict(config)
    for name in ("output", "source", "allow_fewer"):
        del values[name]
    backend = getattr(tokenizer, "backend_tokenizer", None)
    definition = backend.to_str() if backend else repr(sorted(tokenizer.get_vocab().items()))
    systems = stream.layout.system_columns
    return {
        **values,
        **({"system_columns": list(systems)} if systems else {}),
        "source": stream.identity,
        "tokenizer_sha256": hashlib.sha256(definition.encode()).hexdigest(),
        "fastadapt": version("fastadapt"),
    }


def _write(
    folder: Path, selection: Selection, store: CandidateStore, kind: Kind, report: Sink
) -> Record:
    """Write the rows of each split to its Parquet file, atomically.

    Returns:
        By file, its size, SHA-256 and rows.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    turn = pa.struct([("role", pa.string()), ("content", pa.string())])
    column = {"text": ("text", pa.string()), "token ids": ("input_ids", pa.list_(pa.int64()))}
    schema = pa.schema(
        [
            column.get(kind, ("messages", pa.list_(turn))),
            ("domain", pa.string()),
            ("source", pa.string()),
            ("difficulty", pa.int64()),
            ("tokens", pa.int32()),
            ("row", pa.int64()),
        ]
    )
    done, total = 0, sum(map(len, selection.splits.values()))
    files: Record = {}
    for split, name in output_folder.FILES.items():
        taken = selection.splits[split]
        with (
            disk_errors(folder / name, RESUME_ADVICE),
            replacing(folder / name) as staged,
            pq.ParquetWriter(
                staged, schema, compression="zstd", use_dictionary=["domain", "source"]
            ) as writer,
        ):
            for group in _groups(taken):
                rows = [{**store.text(c), "tokens": c.tokens, "row": c.row} for c in group]
                writer.write_table(pa.Table.from_pylist(rows, schema=schema))
                done += len(group)
                report({"kind": "write", "done": done, "of": total})
        size, sha256 = digest(folder / name)
        files[name] = {"rows": len(taken), "bytes": size, "sha256": sha256}
    return files


def _groups(candidates: Sequence[Candidate]) -> Iterator[list[Candidate]]:
    """Split candidates into row groups of about ``_GROUP_BYTES``."""
    group: list[Candidate] = []
    size = 0
    for candidate in candidates:
        group.append(candidate)
        size += candidate.unpacked
        if size >= _GROUP_BYTES:
            yield group
            group, size = [], 0
    if group:
        yield group


def _counts(config: PrepareConfig, selection: Selection, store: CandidateStore) -> Record:
    quotas = config.quotas()
    domains = list(quotas["train"])
    splits = {}
    for split in SPLITS:
        taken = selection.splits[split]
        tokens = [c.tokens for c in taken]
        splits[split] = {
            "conversations": {d: sum(c.domain == d for c in taken) for d in domains},
            "wanted": quotas[split],
            "prompts": len({c.prompt for c in taken}),
            "tokens": sum(tokens),
            "longest": max(tokens, default=0),
            "with_markers": sum(c.marked for c in taken),
            "lengths": length_histogram(tokens, config.max_tokens),
        }
    left_out = store.counts["left_out"]
    filters = [OTHER_DOMAIN] * config.has_domains
    filters += [NO_THINK, NO_END] * (config.thinking == "required")
    reasons = [*filters, *sorted(left_out.keys() - {*filters})]
    return {
        "rows": store.read,
        "domains": {d: store.counts["domains"][d] for d in domains},
        "left_out_of_source": {reason: left_out[reason] for reason in reasons},
        "left_out_of_drawn": {d: dict(sorted(selection.left_out[d].items())) for d in domains},
        **splits,
    }


def _shortage(
    config: PrepareConfig, selection: Selection, store: CandidateStore, shortlist: Shortlist
) -> str:
    quotas = config.quotas()
    lacks = ", ".join(
        f"{split} lacks {n:,} of {quotas[split][domain]:,} {domain}"
        for split, lacking in selection.missing.items()
        for domain, n in lacking.items()
    )
    short = {domain for lacking in selection.missing.values() for domain in lacking}
    drawn = sum((selection.left_out[d] for d in sorted(short)), start=store.counts["left_out"])
    reasons = "; ".join(f"{reason}: {n:,}" for reason, n in drawn.items() if n)
    advice = (
        "Raise --reserve and start again with --overwrite."
        if short & shortlist.full
        else "Lower --train, --validation or the share (with --overwrite), or accept fewer "
        "conversations with --resume --allow_fewer."
    )
    return (
        f"data source {config.source!r} does not fill the quotas: {lacks}. Left out of its "
        f"{store.read:,} rows: {reasons or 'none'}. {advice}"
    )
