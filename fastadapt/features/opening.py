"""The run that a store of features was collected from."""

from __future__ import annotations

from pathlib import Path

from fastadapt.errors import UserError
from fastadapt.evaluation.students import Students
from fastadapt.features.store import Store, adapter_digest


def students_of(store: Store, *, dtype: str | None = None, device: str | None = None) -> Students:
    """A store's run, opened: the one around it, or else where the manifest says that it is.

    Args:
        store: of features.
        dtype, device: of the pair, in place of the run's settings.

    Raises:
        UserError: the run is not there, or its adapter is not the one that was collected.
    """
    around = store.folder.resolve().parent
    source = around if (around / "adapter" / "fastadapt.json").is_file() else None
    run = Path(store.manifest["run"]) if source is None else source
    students = Students.open([run], ["run"], dtype=dtype, device=device)
    if adapter_digest(students.folder("run")) != store.manifest["adapter"]:
        raise UserError(
            f"{store.folder}: these features are of another adapter than {run} has now; collect "
            "them again (fastadapt features collect --overwrite)"
        )
    return students
