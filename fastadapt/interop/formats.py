"""The table of formats for sets of coders: how each is recognised, written and read.

A format's module has ``write(coders, folder)``, which refuses what the format's reader would run as
something else, and ``read(path)``. Both are called with a :class:`CoderSet`.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

from fastadapt import __version__
from fastadapt.adapter.coder_files import CoderSet, read_coders, save_coders
from fastadapt.adapter.files import CARD, PATTERNS, adapters_of
from fastadapt.errors import UserError
from fastadapt.io.atomic import writing_folder
from fastadapt.io.documents import Name, check
from fastadapt.io.names import has_file, typed_path
from fastadapt.models.huggingface.checkpoint import RECORD, Kind, check_output

if TYPE_CHECKING:
    from fastadapt.interop.thresholds import Fit


@dataclass(frozen=True)
class Format:
    """A format for sets of coders.

    Attributes:
        module: module below ``fastadapt.interop``.
        markers: files of which one is in a folder of the format, or in its subfolders.
        patterns: names in a folder that is written.
        loading: Python code that loads all ``{layers}`` of a set from ``{folder}``.
        has_topk: whether the format has transcoders with TopK.
        splice: further code, for adapters and transcoders with a skip.
        notes: module with ``notes(folder)``, sentences about a written layer.
    """

    module: str
    markers: tuple[str, ...]
    patterns: tuple[str, ...]
    loading: str
    has_topk: bool = True
    splice: str = ""
    notes: str = ""

    def holds(self, path: Path) -> bool:
        """Return whether a folder is of this format, as far as the names of its files show."""
        return any(has_file(path / name) for name in self.markers) or any(
            next(path.glob(f"*/{name}"), None) is not None for name in self.markers
        )

    def read(self, path: Path) -> CoderSet:
        """Read a set, one layer at a time."""
        coders: CoderSet = import_module(f"fastadapt.interop.{self.module}").read(path)
        return coders

    def write(self, coders: CoderSet, folder: Path) -> None:
        """Write a set into an existing folder."""
        import_module(f"fastadapt.interop.{self.module}").write(coders, folder)


#: Formats by the names that the commands use.
FORMATS = {
    "saelens": Format(
        "saelens",
        ("sae_weights.safetensors",),
        ("layer_*",),
        "from sae_lens import SAE; "
        "saes = [SAE.load_from_disk({folder!r} + f'/layer_{{i}}') for i in {layers}]",
        splice="; from fastadapt.interop.saelens import attach; attach(model, saes)",
        notes="saelens_splice",
    ),
    "sparsify": Format(
        "sparsify",
        ("sae.safetensors",),
        ("*.[0-9]*",),
        "from sparsify import SparseCoder; coders = SparseCoder.load_many({folder!r}, local=True)",
    ),
    "circuit-tracer": Format(
        "transcoder_sets",
        ("layer_0.safetensors",),
        ("config.yaml", "layer_*.safetensors"),
        "from circuit_tracer.utils.caching import load_transcoders_from_cache as load; "
        "transcoders, config = load({folder!r})",
        has_topk=False,
    ),
    "dictionary-learning": Format(
        "dictionary_learning",
        ("ae.safetensors", "ae.pt"),
        ("layer_*",),
        "from safetensors.torch import load_file; "
        "state_dicts = [load_file({folder!r} + f'/layer_{{i}}/ae.safetensors') for i in {layers}]",
    ),
}


def export_coders(
    source: str | os.PathLike[str],
    folder: str | os.PathLike[str],
    name: str,
    *,
    model: str | None = None,
    store: str | os.PathLike[str] | None = None,
    overwrite: bool = False,
) -> tuple[str, dict[int, Fit]]:
    """Write a run, or a folder of adapters, transcoders or SAEs, in another project's format.

    Args:
        source: the run or folder.
        folder: a new or empty folder, or with ``overwrite`` an export in one of
            :data:`FORMATS`.
        name: name of the format in :data:`FORMATS`.
        model: name of the model to record, if it is not the one that the source names.
        store: features of a run of the same target, on whose texts thresholds are fitted in place
            of TopK; by default those of the source.
        overwrite: replace an export once the new one is complete.

    Returns:
        Python code that loads the export, with notes on further lines; and, for transcoders with
        TopK in a format without it, what the fitted thresholds cost in each layer.

    Raises:
        UserError: the format cannot hold the coders without a change of what they compute, or the
            folder holds other files.
        RunError: the folder cannot be written; it is left as it was.
    """
    form, out = FORMATS[name], typed_path(folder, "--output")
    path = adapters_of(source)
    patterns = (name for each in FORMATS.values() for name in each.patterns)
    require_output(out, (RECORD, *patterns), "set of coders", overwrite=overwrite)
    coders = read_coders(path)
    if model is not None:
        check(model, Name, "--target")
        coders = replace(coders, model=model)
    fits: dict[int, Fit] = {}
    if coders.empty.config.activation == "topk" and not (form.has_topk or coders.is_additive):
        from fastadapt.interop.thresholds import fit

        coders, fits = fit(coders, source, store)
    with writing_folder(out, last=RECORD) as staged:
        form.write(coders, staged)
        _record(staged / RECORD, name, coders)
    layers = list(coders.layers)
    every = range(len(layers)) if layers == list(range(len(layers))) else layers
    loading = form.loading.format(folder=str(out.resolve()), layers=every)
    if coders.is_additive or getattr(coders.empty, "W_skip", None) is not None:
        loading += form.splice
    if form.notes:
        notes = import_module(f"fastadapt.interop.{form.notes}").notes(out / f"layer_{layers[0]}")
        loading = "\n".join([loading, *notes])
    return loading, fits


def require_output(folder: Path, patterns: Sequence[str], kind: Kind, *, overwrite: bool) -> None:
    """Raise ``UserError`` unless the folder is new, empty, or with ``overwrite`` an earlier result.

    Args:
        folder: the folder, which need not exist.
        patterns: names in a result.
        kind: kind of the result.
        overwrite: accept a result.
    """
    try:
        check_output(folder, overwrite=overwrite, patterns=patterns, kind=kind)
    except UserError as error:
        raise UserError(f"--output: {error}") from None


def _record(path: Path, name: str, coders: CoderSet) -> None:
    facts = {
        "schema_version": 1,
        "format": name,
        "fastadapt": __version__,
        "model": coders.model,
        "layers": list(coders.layers),
        "hooks": {role: dict(hook) for role, hook in coders.hooks._asdict().items()},
    }
    path.write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")


# --- import ---------------------------------------------------------------------------------------


def find_format(path: Path, names: Sequence[str] = tuple(FORMATS)) -> str:
    """Return the name of the format of a folder.

    Raises:
        UserError: it is of none, of several, or of this library's own.
    """
    for folder in (path, path / "adapter"):
        if has_file(folder / CARD):
            raise UserError(
                f"{folder} is a folder of this library; load it with fastadapt.load_adapters"
            )
    if has_file(path / "W_enc_0.safetensors"):
        raise UserError(
            f"{path} is a cross-layer transcoder, which no folder of this library holds; read it "
            "with fastadapt.interop.cross_layer.read_cross_layer_set"
        )
    held = [name for name in names if FORMATS[name].holds(path)] if path.is_dir() else []
    if len(held) != 1:
        markers = {marker for name in names for marker in FORMATS[name].markers}
        kind = f"the files of {' and '.join(held)}" if held else "no such file"
        raise UserError(
            f"{path}: expected a folder, or one with a folder per layer, with one of "
            f"{', '.join(sorted(markers))}; got {kind}. Give the folder, and --format if it has "
            "several"
        )
    return held[0]


def import_coders(
    path: str | os.PathLike[str],
    folder: str | os.PathLike[str],
    name: str = "auto",
    *,
    model: str | None = None,
    overwrite: bool = False,
) -> CoderSet:
    """Read a folder of another project, and write it in this library's format.

    Args:
        path: the folder.
        folder: a new or empty folder, or with ``overwrite`` an earlier import.
        name: name of the format in :data:`FORMATS`; ``auto``: the one that the files show.
        model: name of the model to record, if the files name none or another one.
        overwrite: replace an earlier import once the new one is complete.

    Returns:
        The set that was read.

    Raises:
        UserError: the folder is of another format, or holds what this library does not compute.
        RunError: the folder cannot be written; it is left as it was.
    """
    source, out = typed_path(path, "path"), typed_path(folder, "--output")
    if model is not None:
        check(model, Name, "--model")
    if not source.is_dir():
        raise UserError(
            f"{path}: no such folder; download a repository of the hub into a folder first "
            f"(hf download {path} --local-dir FOLDER)"
        )
    require_output(out, PATTERNS, "import", overwrite=overwrite)
    name = find_format(source) if name == "auto" else name
    coders = FORMATS[name].read(source)
    imported = {"imported": {"format": name, "path": str(source.resolve())}}
    coders = replace(coders, model=model or coders.model, metadata={**coders.metadata, **imported})
    save_coders(coders, out)
    return coders
