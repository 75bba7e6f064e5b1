"""Load data sets of the hub."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

from fastadapt.errors import UserError

_COMMIT = re.compile(r"[0-9a-f]{40}")


@cache
def load_hub(name: str, subset: str | None, split: str, revision: str | None) -> Any:
    """Return a dataset of the hub. A process loads it once, since each look-up may be slow.

    Without a connection, ``datasets`` loads the newest version in its cache, whatever the revision.

    Raises:
        UserError: the dataset cannot be loaded, or it is another commit than ``revision``.
    """
    import datasets

    with reading_hub(name, split, revision):
        config = () if subset is None else (subset,)
        rows = datasets.load_dataset(name, *config, split=split, revision=revision)
    commit = commit_of(rows)
    if revision is None or commit in (None, revision):
        return rows
    if _COMMIT.fullmatch(revision):
        raise UserError(
            f"data source {name!r}: expected revision {revision}, and the cache of datasets holds "
            f"{commit}; connect to the hub, or set data.revision to that commit"
        )
    if datasets.config.HF_HUB_OFFLINE:
        warnings.warn(
            f"data source {name!r}: offline, commit {commit} is read from the cache of datasets, "
            f"whether or not it is revision {revision!r}; data.revision may name the commit",
            UserWarning,
            stacklevel=2,
        )
    return rows


def commit_of(rows: Any) -> str | None:
    """Return the commit of a dataset that ``datasets`` loaded from the hub; None if unknown.

    ``datasets`` names the folder of a dataset's files in its cache after the commit.
    """
    folders = {Path(file["filename"]).parent.name for file in rows.cache_files}
    commits = [name for name in folders if _COMMIT.fullmatch(name)]
    return commits[0] if len(folders) == len(commits) == 1 else None


def hub_errors() -> tuple[type[Exception], ...]:
    """Return the errors with which the hub's client and ``datasets`` fail to read from the hub."""
    import datasets
    from huggingface_hub.errors import HfHubHTTPError, HTTPError, OfflineModeIsEnabled

    # Without a connection: an HTTPError of the hub's HTTP client, or an OSError of datasets.
    client: tuple[type[Exception], ...] = (HfHubHTTPError, HTTPError, OfflineModeIsEnabled)
    return (*client, datasets.exceptions.DatasetsError, OSError)


@contextmanager
def reading_hub(name: str, split: str, revision: str | None) -> Iterator[None]:
    """Raise errors of the hub and of ``datasets`` while opening a dataset as ``UserError``."""
    # ValueError: an unknown split or configuration. RuntimeError: a dataset with a script.
    failures: tuple[type[Exception], ...] = (*hub_errors(), ValueError, RuntimeError)
    try:
        yield
    except failures as error:
        raise UserError(
            f"data source {name!r}: no such file or folder, and loading a dataset of this name "
            f"from the hub (split {split!r}, revision {revision or 'main'!r}) failed: "
            f"{_reason(error)}"
        ) from None


def _reason(error: Exception) -> str:
    """Return why a dataset of the hub cannot be loaded, and what to do, in one line."""
    from datasets.config import HF_HUB_OFFLINE

    lines = str(error).splitlines() or [type(error).__name__]
    if isinstance(error, ValueError) and "onfig" in lines[0]:
        choices = " ".join(lines[:2])  # then follows an example in Python
        return f"{choices}; choose one with data.subset (other commands: --subset)"
    if isinstance(error, RuntimeError) and "script" in lines[0]:
        copy = "data.revision: refs/convert/parquet"
        return f"{lines[0]}. Give the hub's copy of its rows as Parquet ({copy}), or its files"
    if isinstance(error, ConnectionError):
        offline = "HF_HUB_OFFLINE is set, and the" if HF_HUB_OFFLINE else "The"
        return (
            f"{lines[0]}. {offline} cache of datasets does not hold it. Connect to the hub, or "
            "give a local file or folder"
        )
    return lines[0]
