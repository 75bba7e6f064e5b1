"""Find the folders of a set in which each layer has a folder, and join them to one set."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from fastadapt.adapter.coder_files import CoderSet, describe_coder
from fastadapt.adapter.files import MAX_LAYERS
from fastadapt.errors import UserError
from fastadapt.io.names import has_file


def find_folders(path: Path, *files: str) -> list[Path]:
    """Return the folder itself, or its subfolders, that hold all of the files.

    Raises:
        UserError: none does, or there are more than any model has layers.
    """
    if all(has_file(path / name) for name in files):
        return [path]
    below = sorted(entry for entry in path.iterdir() if entry.is_dir()) if path.is_dir() else []
    found_in = [folder for folder in below if all(has_file(folder / name) for name in files)]
    if not found_in:
        raise UserError(
            f"{path}: expected a folder with {' and '.join(files)}, or with such a folder per layer"
        )
    if len(found_in) > MAX_LAYERS:
        raise UserError(f"{path}: expected at most {MAX_LAYERS} folders, got {len(found_in)}")
    return found_in


def one_shape(sets: Sequence[CoderSet], path: Path) -> CoderSet:
    """Join sets of one layer each, in the order of the layers.

    Raises:
        UserError: two are of the same layer, or they differ in class, settings, widths or hooks.
    """
    first, layers = sets[0], {}
    for each in sets:
        (layer, read) = next(iter(each.layers.items()))
        if layer >= MAX_LAYERS:
            raise UserError(f"{path}: expected layers below {MAX_LAYERS:,}, got layer {layer:,}")
        if layer in layers:
            raise UserError(
                f"{path}: expected one SAE or transcoder per layer, got two of layer {layer}; "
                "read their folders one by one"
            )
        if (describe_coder(each.empty), each.hooks, each.model, each.metadata) != (
            describe_coder(first.empty),
            first.hooks,
            first.model,
            first.metadata,
        ):
            raise UserError(
                f"{path}: layer {layer} differs from layer {next(iter(first.layers))} in "
                "architecture, settings, widths, hooks or models; read their folders one by one"
            )
        layers[layer] = read
    return replace(first, layers=dict(sorted(layers.items())))
