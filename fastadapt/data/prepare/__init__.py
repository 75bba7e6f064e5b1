"""Training and validation sets out of a source of conversations, in one reading of it.

The source streams by; of each domain only the candidates that can still be drawn are kept, on the
disk (``fastadapt.data.prepare.candidate_store``), and only their tokens are counted. At its end the
splits are drawn (``fastadapt.data.prepare.selection``) and written as Parquet in the order of the
draw, with a manifest. Every byte written follows from source, settings and the versions of the
libraries alone.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from threading import Event
from typing import Any

from fastadapt.data.prepare import output_folder as outdir
from fastadapt.data.prepare.candidate_store import GO_ON, Spool
from fastadapt.data.prepare.filter_pass import CARRIED, REQUIRED, Reading, Record, Sink
from fastadapt.data.prepare.selection import (
    MALFORMED,
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
from fastadapt.data.prepare.source_stream import Stream
from fastadapt.data.rendering import holds_markers, render
from fastadapt.data.sources import COLUMN
from fastadapt.data.tokens import check_markers
from fastadapt.errors import UserError
from fastadapt.io.atomic import digest, disk_errors, replacing

_GROUP_BYTES = 1 << 24  # text in a row group of the files written


def prepare(
    config: PrepareConfig,
    *,
    resume: bool = False,
    overwrite: bool = False,
    trust_remote_code: bool = False,
    sink: Sink | None = None,
    stop: Event | None = None,
) -> Record:
    """Select conversations as configured, into the folder ``config.output``.

    Args:
        config: what to select.
        resume: go on with the unfinished selection in that folder; a finished one is verified.
        overwrite: remove the selection in that folder first.
        trust_remote_code: run Python code that comes with the tokenizer.
        sink: called with ``{"kind": "read", "rows", "kept", "fraction"}`` while reading and
            ``{"kind": "write", "done", "of"}`` while writing.
        stop: set it to end within the next 1000 rows; resume goes on there.

    Returns:
        The manifest, with ``interrupted: False`` and ``output``; or ``interrupted: True``, ``rows``
        and ``output``, if it was told to stop.

    Raises:
        UserError: the source, the tokenizer or the folder is not as it must be, or a domain cannot
            fill its quota (the reading is kept: resume with ``allow_fewer``).
        RunError: no space, or the hub stopped answering.
    """
    from fastadapt.models.pretrained import load_tokenizer

    tell = sink or (lambda _: None)
    with outdir.open_output(config.output, resume=resume, overwrite=overwrite) as folder:
        stream = Stream(
            config.source,
            split=config.split,
            revision=config.revision,
            required=REQUIRED,
            optional=CARRIED,
        )
        tokenizer = load_tokenizer(config.tokenizer, None, trust=trust_remote_code)
        check_markers(tokenizer, config.family)
        settings = _settings(config, stream, tokenizer)
        if resume:
            outdir.check_same(folder, settings)
            manifest = outdir.read_manifest(folder)
            if manifest is not None:
                outdir.verify(folder, manifest)
                outdir.clean(folder)
                return {**manifest, "interrupted": False, "output": str(folder)}
        else:
            outdir.begin(folder, settings)
        shortlist = Shortlist(_limits(config))
        with Spool(folder / outdir.WORK, config.seed, shortlist) as spool:
            reading = Reading(config, stream, spool, shortlist, tokenizer)
            if not reading.run(tell, stop):
                return {"interrupted": True, "rows": spool.read, "output": str(folder)}
            selection = draw(shortlist, config.quotas())
            if selection.missing and not config.allow_fewer:
                raise UserError(_shortage(config, selection, spool, shortlist))
            files, with_markers = _write(folder, selection, spool, config.family, tell)
            manifest = {
                "format": outdir.FORMAT,
                "schema_version": outdir.SCHEMA_VERSION,
                "settings": settings,
                "source": stream.hashed(),
                "counts": _counts(config, selection, spool, with_markers),
                "files": files,
            }
        outdir.finish(folder, manifest)
    return {**manifest, "interrupted": False, "output": str(folder)}


def _limits(config: PrepareConfig) -> dict[str, int]:
    """Candidates to keep of each domain."""
    quotas = config.quotas()
    wanted = {d: sum(quotas[split][d] for split in SPLITS) for d in quotas["train"]}
    return {domain: math.ceil(config.reserve * n) + 64 for domain, n in wanted.items()}


def _settings(config: PrepareConfig, stream: Stream, tokenizer: Any) -> Record:
    """What the selection follows from."""
    from importlib.metadata import version

    values = dataclasses.asdict(config)
    for name in ("output", "source", "allow_fewer"):
        del values[name]
    backend = getattr(tokenizer, "backend_tokenizer", None)
    described = backend.to_str() if backend else repr(sorted(tokenizer.get_vocab().items()))
    return {
        **values,
        "source": stream.identity,
        "tokenizer_sha256": hashlib.sha256(described.encode()).hexdigest(),
        "fastadapt": version("fastadapt"),
    }


def _write(
    folder: Path, selection: Selection, spool: Spool, family: str, tell: Sink
) -> tuple[Record, dict[str, int]]:
    """Both files, each whole or not at all: sizes, hashes and rows; by split, rows with markers."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    turn = pa.struct([("from", pa.string()), ("value", pa.string())])
    schema = pa.schema(
        [
            (COLUMN, pa.list_(turn)),
            ("domain", pa.string()),
            ("source", pa.string()),
            ("difficulty", pa.int64()),
            ("tokens", pa.int32()),
            ("row", pa.int64()),
        ]
    )
    done, of = 0, sum(map(len, selection.splits.values()))
    files: Record = {}
    with_markers = dict.fromkeys(outdir.FILES, 0)
    for split, name in outdir.FILES.items():
        taken = selection.splits[split]
        with (
            disk_errors(folder / name, GO_ON),
            replacing(folder / name) as staged,
            pq.ParquetWriter(
                staged, schema, compression="zstd", use_dictionary=["domain", "source"]
            ) as writer,
        ):
            for group in _groups(taken):
                rows = [{**spool.text(c), "tokens": c.tokens, "row": c.row} for c in group]
                texts = [render(row[COLUMN], family) for row in rows]
                with_markers[split] += sum(holds_markers(text, family) for text in texts)
                writer.write_table(pa.Table.from_pylist(rows, schema=schema))
                done += len(group)
                tell({"kind": "write", "done": done, "of": of})
        size, sha256 = digest(folder / name)
        files[name] = {"rows": len(taken), "bytes": size, "sha256": sha256}
    return files, with_markers


def _groups(candidates: Sequence[Candidate]) -> Iterator[list[Candidate]]:
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


def _counts(
    config: PrepareConfig, selection: Selection, spool: Spool, with_markers: dict[str, int]
) -> Record:
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
            "with_markers": with_markers[split],
            "lengths": length_histogram(tokens, config.max_tokens),
        }
    reasons = (OTHER_DOMAIN, MALFORMED, NO_THINK, NO_END)
    return {
        "rows": spool.read,
        "domains": {d: spool.counts["domains"][d] for d in domains},
        "left_out_of_source": {r: spool.counts["left_out"][r] for r in reasons},
        "left_out_of_drawn": {d: dict(sorted(selection.left_out[d].items())) for d in domains},
        **splits,
    }


def _shortage(
    config: PrepareConfig, selection: Selection, spool: Spool, shortlist: Shortlist
) -> str:
    quotas = config.quotas()
    lacks = ", ".join(
        f"{split} lacks {n:,} of {quotas[split][domain]:,} {domain}"
        for split, lacking in selection.missing.items()
        for domain, n in lacking.items()
    )
    short = {domain for lacking in selection.missing.values() for domain in lacking}
    drawn = sum((selection.left_out[d] for d in sorted(short)), start=spool.counts["left_out"])
    why = "; ".join(f"{reason}: {n:,}" for reason, n in drawn.items() if n)
    advice = (
        "raise --reserve and begin again with --overwrite"
        if short & shortlist.full
        else "lower --train, --validation or the share (with --overwrite), or take what there is "
        "with --resume --allow_fewer"
    )
    return (
        f"data source {config.source!r} does not fill the quotas: {lacks}. Left out of its "
        f"{spool.read:,} rows: {why or 'none'}. Either {advice}."
    )
