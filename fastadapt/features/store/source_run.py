"""The run that a store of features was collected from."""

from __future__ import annotations

import os

from fastadapt.adapter.files import adapter_digest
from fastadapt.errors import UserError
from fastadapt.evaluation.models_under_test import ModelSet
from fastadapt.features.store.schema import MANIFEST
from fastadapt.features.store.store import Store
from fastadapt.io.names import has_file, typed_path


def students_of(
    store: Store,
    run: str | os.PathLike[str] | None = None,
    *,
    dtype: str | None = None,
    device: str | None = None,
    attention: str | None = None,
    trust_remote_code: bool = False,
) -> ModelSet:
    """Open the run that a store was collected from.

    Args:
        store: the store of features.
        run: folder of the run; by default the one that contains the store, or else the one that
            the manifest names.
        dtype: dtype of the pair; by default the dtype that the features were collected in.
        device, attention: override the run's settings of the pair.
        trust_remote_code: run Python code that comes with the models.

    Raises:
        UserError: the run does not exist, or its adapter is not the one that was collected.
    """
    if run is None:
        around = store.folder.resolve().parent
        inside = has_file(around / "adapter" / "fastadapt.json")
        key = f"{store.folder / MANIFEST}: run"
        run = around if inside else typed_path(store.manifest["run"], key)
    dtype = dtype or store.manifest["pair"].get("dtype")
    students = ModelSet.open(
        [run],
        ["run"],
        dtype=dtype,
        device=device,
        attention=attention,
        trust_remote_code=trust_remote_code,
    )
    if adapter_digest(students.folder("run")) != store.manifest["adapter"]:
        raise UserError(
            f"{store.folder}: these features were collected from other adapters than {run} has "
            "now; collect the features again (fastadapt features collect --overwrite)"
        )
    return students
