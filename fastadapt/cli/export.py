"""`fastadapt export` and `fastadapt push`: convert a run to another format; share it on the hub."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from fastadapt.adapter.files import adapters_of
from fastadapt.errors import UserError
from fastadapt.io.names import typed_path
from fastadapt.models.hf_checkpoint import check_output
from fastadapt.models.sources.fingerprint import fingerprint, warn_of_changes
from fastadapt.models.trained_files import read_adapters
from fastadapt.organism import resolve

Format = Literal["huggingface", "hu2026", "adapters"]


def export(
    run: str,
    *,
    output: str,
    format: Format = "huggingface",
    target: str | None = None,
    base: str | None = None,
    overwrite: bool = False,
) -> int:
    """Write a run (or a folder of adapters) as one checkpoint, tensor by tensor; or read the
    adapters of a checkpoint published with arXiv 2602.20904 (--format adapters).

    Args:
        run: a run, adapters, or a checkpoint: a folder, or a hub id with --format adapters
        output: a new folder
        format: huggingface: for AutoModelForCausalLM, after `import fastadapt.serving`;
            hu2026: as published with arXiv 2602.20904; adapters: this library's own
        target: the target model, if it is not the one that the adapters name
        base: the base model, if it is not the one that the adapters name
        overwrite: replace an export in the folder, once the new one is complete
    """
    loading = convert(run, output, format, target=target, base=base, overwrite=overwrite)
    print(f"Load it with:  {loading}")
    return 0


def convert(
    source: str,
    output: str,
    format: Format = "huggingface",
    *,
    target: str | None = None,
    base: str | None = None,
    overwrite: bool = False,
) -> str:
    """Write ``source`` in ``format``; return Python code that loads the result.

    The arguments are those of `export`.

    Raises:
        UserError: the source does not exist, the pair is not known, or the folder is in use.
        RunError: the folder cannot be written; its contents are unchanged.
    """
    from fastadapt import serving
    from fastadapt.interop import hu2026

    out = typed_path(output, "--output")
    typed_path(source, "source")
    try:
        check_output(out, overwrite=overwrite)
    except UserError as error:
        raise UserError(f"--output: {error}") from None
    if format == "adapters":
        _check_apart(out, [source, target, base])
        hu2026.to_adapters(source, out, target=target, base=base, overwrite=overwrite)
        return f"import fastadapt; adapters, metadata = fastadapt.load_adapters({str(out)!r})"
    folder = adapters_of(source)
    metadata = read_adapters(folder)[1]["metadata"]
    pair = {"target": target, "base": base}
    revisions: dict[str, str | None] = {}
    for role, typed in pair.items():
        pair[role] = typed or metadata.get(role)
        if not isinstance(pair[role], str):
            raise UserError(f"{folder}: fastadapt.json names no {role}; give --{role}")
        if typed is None:
            revisions[role] = (metadata.get("revisions") or {}).get(role)
    _check_apart(out, [str(folder), str(pair["target"]), str(pair["base"])])
    named = {role: resolve(str(name)) for role, name in pair.items()}
    weights = {role: fingerprint(named[role], revisions.get(role)) for role in named}
    warn_of_changes(source, metadata.get("weights") or {}, weights, named)
    write = serving.export if format == "huggingface" else hu2026.from_adapters
    write(
        folder,
        out,
        target=resolve(str(pair["target"])),
        base=resolve(str(pair["base"])),
        revisions=revisions,
        tokenizer=metadata.get("tokenizer"),
        overwrite=overwrite,
    )
    if format == "hu2026":
        return f"from fastadapt.interop import hu2026; model = hu2026.load({str(out)!r})"
    imports = "import fastadapt.serving; from transformers import AutoModelForCausalLM"
    return f"{imports}; model = AutoModelForCausalLM.from_pretrained({str(out)!r})"


def _check_apart(output: Path, sources: Sequence[str | None]) -> None:
    """Raise ``UserError`` if the output folder is a source of the export."""
    for source in sources:
        if source is None:
            continue
        read = typed_path(resolve(source), "source")
        if os.path.realpath(read) == os.path.realpath(output):
            raise UserError(f"--output: {output} is read by this export; give a new folder")


def push(
    run: str,
    repository: str,
    *,
    private: bool = False,
    license: str | None = None,
    target: str | None = None,
    base: str | None = None,
    tokenizer: str | None = None,
) -> int:
    """Push a run's adapters to the Hugging Face hub, with its settings, its summary and a model
    card, in one commit. Checkpoints, features and the models' weights stay here.

    Args:
        run: folder of a finished run, or of adapters
        repository: OWNER/NAME; created if it does not exist
        private: create a private repository
        license: licence of the adapters, as the hub names it, such as apache-2.0
        target: hub id of the target, if the run names a local folder; OWNER/NAME or
            OWNER/NAME@REVISION, whose commit is recorded
        base: hub id of the base, likewise
        tokenizer: hub id of the tokenizer, likewise, without a revision
    """
    from fastadapt.hub.push import push as push_run

    pushed = push_run(
        run,
        repository,
        private=private or None,
        license=license,
        target=target,
        base=base,
        tokenizer=tokenizer,
    )
    print(f"pushed: {pushed.url}\ncommit: {pushed.commit}")
    print(f"Load it with:  fastadapt.load({pushed.repository!r}, revision={pushed.commit!r})")
    return 0
