"""Commands that write, read and share files: `fastadapt export`, `import` and `push`."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal, get_args

from fastadapt.adapter.files import CARD, adapters_of
from fastadapt.errors import UserError
from fastadapt.io.names import has_file, typed_path
from fastadapt.models.huggingface.checkpoint import RECORD, check_output
from fastadapt.models.sources.fingerprint import fingerprints, warn_of_changes
from fastadapt.models.trained_files import read_adapters
from fastadapt.organism import resolve

if TYPE_CHECKING:
    from fastadapt.interop.thresholds import Fit

#: Formats of one checkpoint, which the pair is part of, and of coders alone.
Checkpoint = Literal["huggingface", "hu2026", "adapters"]
Coders = Literal["saelens", "sparsify", "circuit-tracer", "dictionary-learning"]
Format = Literal[
    "huggingface",
    "hu2026",
    "adapters",
    "saelens",
    "sparsify",
    "circuit-tracer",
    "dictionary-learning",
    "neuronpedia",
]


def export(
    run: str,
    *,
    output: str,
    format: Format = "huggingface",
    target: str | None = None,
    base: str | None = None,
    model_id: str | None = None,
    source_set: str | None = None,
    store: str | None = None,
    overwrite: bool = False,
) -> int:
    """Write a run (or a folder of adapters) as one checkpoint, tensor by tensor, or in a format of
    another project; or read the adapters of a checkpoint published with arXiv 2602.20904 (--format
    adapters).

    Args:
        run: a run, adapters, transcoders, SAEs, or a checkpoint: a folder, or a hub id with
            --format adapters
        output: a new folder
        format: huggingface: for AutoModelForCausalLM, after `import fastadapt.serving`;
            hu2026: as published with arXiv 2602.20904; adapters: this library's own;
            saelens, sparsify, circuit-tracer, dictionary-learning: transcoders and SAEs for these
            projects; neuronpedia: the features of a run, to upload
        target: the target model, if it is not the one that the adapters name
        base: the base model, if it is not the one that the adapters name
        model_id: neuronpedia: the model there
        source_set: neuronpedia: the set of sources there, which you have created
        store: circuit-tracer: a run of the same target with features, on whose texts thresholds
            are fitted in place of TopK, if the source has no features
        overwrite: replace an export of the same kind in the folder, once the new one is complete
    """
    _check_options(
        format, target=target, base=base, model_id=model_id, source_set=source_set, store=store
    )
    if format == "neuronpedia":
        return _to_neuronpedia(run, output, model_id, source_set, overwrite=overwrite)
    if format == "huggingface" or format == "hu2026" or format == "adapters":
        loading = convert(run, output, format, target=target, base=base, overwrite=overwrite)
        print(f"Load it with:  {loading}")
        return 0
    from fastadapt.interop.formats import export_coders

    loading, fits = export_coders(
        run, output, format, model=target, store=store, overwrite=overwrite
    )
    if fits:
        _print_fits(fits)
    print(f"Load it with:  {loading}")
    return 0


def import_(
    path: str,
    *,
    output: str,
    format: Literal["auto", Coders] = "auto",
    model: str | None = None,
    overwrite: bool = False,
) -> int:
    """Read SAEs or transcoders of another project, and write them as this library's.

    Args:
        path: a folder of the format, or a folder with one per layer
        output: a new folder
        format: auto: as the names of the files show
        model: the model that they belong to, if the files name none or another one
        overwrite: replace an earlier import in the folder, once the new one is complete
    """
    from fastadapt.adapter.coder_files import read_coders
    from fastadapt.interop.formats import import_coders
    from fastadapt.reporting.visible import visible

    coders = import_coders(path, output, format, model=model, overwrite=overwrite)
    first, *others = coders.layers
    layers = f"{len(coders.layers)} layers" if others else f"layer {first}"
    model_name = visible(coders.model or "a model without a name (name it: --model)")
    print(f"Read {layers} of {model_name}: {coders.empty}")
    print(
        f"Load it with:  import fastadapt; modules, metadata = fastadapt.load_adapters({output!r})"
    )
    kind = type(read_coders(output).empty).__name__
    call = "out, counts = module(x)" if kind == "TranscoderAdapter" else "out = module(x)"
    print(f"Each of modules is a fastadapt.{kind}:  {call}")
    return 0


def _check_options(format: Format, **options: str | None) -> None:
    """Raise ``UserError`` for an option that the format does not use."""
    checkpoints = get_args(Checkpoint)
    used = {
        "target": (*checkpoints, *get_args(Coders)),
        "base": checkpoints,
        "model_id": ("neuronpedia",),
        "source_set": ("neuronpedia",),
        "store": ("circuit-tracer",),
    }
    for name, value in options.items():
        if value is not None and format not in used[name]:
            raise UserError(
                f"--{name}: not used with --format {format}, only with {', '.join(used[name])}"
            )


def _to_neuronpedia(
    run: str, output: str, model_id: str | None, source_set: str | None, *, overwrite: bool
) -> int:
    from fastadapt.features.store.store import Store
    from fastadapt.interop import neuronpedia
    from fastadapt.interop.formats import require_output
    from fastadapt.io.atomic import writing_folder

    if model_id is None or source_set is None:
        missing = "--model_id" if model_id is None else "--source_set"
        raise UserError(
            f"{missing} is missing: neuronpedia needs the names of the model and of a set of "
            "sources there, which you have created"
        )
    out, store = typed_path(output, "--output"), Store.open(run)
    require_output(out, (RECORD, "layer_*"), "neuronpedia", overwrite=overwrite)
    with writing_folder(out, last=RECORD) as staged:
        written = neuronpedia.write(store, staged, model_id=model_id, source_set=source_set)
        neuronpedia.write_record(staged / RECORD, model_id=model_id, source_set=source_set)
    print(
        f"{written.features:,} features in {written.batches:,} batches; {written.silent:,} without "
        f"an example left out; {written.shortened:,} descriptions shortened"
    )
    first = min(out.glob("layer_*/*.json"))
    print(
        f"Upload each with:  curl -X POST {neuronpedia.ADDRESS} -H 'x-api-key: KEY' "
        f"-H 'Content-Type: application/json' --data @{first}"
    )
    return 0


def _print_fits(fits: Mapping[int, Fit]) -> None:
    from fastadapt.cli.console import print_table

    rows = [
        [
            str(layer),
            f"{fit.threshold:.4g}",
            f"{fit.topk:.2f}",
            f"{fit.jumprelu:.2f}",
            f"{fit.relu:.2f}",
            f"{fit.error:.3f}",
            f"{fit.relu_error:.3f}",
        ]
        for layer, fit in fits.items()
    ]
    print("TopK is replaced by JumpReLU, fitted and measured on texts of the run's features.")
    head = ["layer", "threshold", "L0, TopK", "L0, JumpReLU", "L0, ReLU"]
    print_table([*head, "error, JumpReLU", "error, ReLU"], rows)


def convert(
    source: str,
    output: str,
    format: Checkpoint = "huggingface",
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
        for place in (Path(source), Path(source) / "adapter"):
            if has_file(place / CARD):
                raise UserError(
                    f"{place} holds adapters in this library's format already; --format adapters "
                    "reads a checkpoint published with arXiv 2602.20904"
                )
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
    now = fingerprints({role: (named[role], revisions.get(role)) for role in named})
    warn_of_changes(source, metadata, now, named)
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
