"""Find a run: a folder, or a repository of the hub, whose files are downloaded."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from fastadapt.adapter.files import CARD, PATTERNS
from fastadapt.errors import UserError
from fastadapt.hub.errors import hub_errors, is_unreachable
from fastadapt.hub.names import is_local, split_revision
from fastadapt.io.names import has_file, typed_path
from fastadapt.training.run_dir import ADAPTER, CONFIG, SUMMARY

#: Files of a run in a repository. No other file is downloaded.
SHARED = (*(f"{ADAPTER}/{name}" for name in PATTERNS), CONFIG, SUMMARY, *PATTERNS)

_TIMEOUT = 5.0  # seconds until a hub without an answer counts as out of reach


@dataclass(frozen=True)
class Located:
    """Where a run is.

    Attributes:
        folder: its folder; of a repository, that of the hub's cache.
        name: the folder as typed, or the name of the repository.
        commit: commit of the repository; None for a folder.
    """

    folder: Path
    name: str
    commit: str | None = None


def locate(run: str | os.PathLike[str], revision: str | None = None) -> Located:
    """Return the folder of a run; download the run if it is a repository of the hub.

    A name that could be a path is never looked up on the hub, see
    :func:`fastadapt.hub.names.is_local`. With HF_HUB_OFFLINE, or if the hub does not answer within
    seconds, the run is that of the hub's cache. Only adapters, configuration and summary are
    downloaded, into the hub's cache.

    Args:
        run: a folder, ``owner/name`` or ``owner/name@revision``.
        revision: branch, tag or commit of the repository; its main branch by default.

    Raises:
        UserError: ``revision`` is given for a folder, or twice; the repository or the revision
            does not exist, may not be read, or holds no run.
        RunError: the download failed.
    """
    if is_local(run):
        folder = typed_path(run, "run")
        if revision is not None:
            raise UserError(f"revision: expected none for the folder {run}, got {revision!r}")
        return Located(folder, str(run))
    repository, typed = split_revision(str(run))
    if revision is not None and typed not in (None, revision):
        raise UserError(f"revision: expected that of {run}, got {revision!r}; give one of them")
    folder = _download(repository, revision or typed)
    if not has_file(folder / ADAPTER / CARD) and not has_file(folder / CARD):
        raise UserError(
            f"{repository}: expected a run (fastadapt push), got a repository without "
            f"{ADAPTER}/{CARD} at commit {folder.name[:12]}"
        )
    return Located(folder, repository, folder.name)


def _is_reachable(repository: str, revision: str | None) -> bool:
    """Return whether the hub answers, after one try: the client itself tries for half a minute."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HTTPError, OfflineModeIsEnabled

    try:
        HfApi().model_info(repository, revision=revision, timeout=_TIMEOUT)
    except OfflineModeIsEnabled:
        return False
    except HfHubHTTPError:
        return True  # an answer, which the download gets, too
    except HTTPError as error:
        return not is_unreachable(error)
    return True


def _download(repository: str, revision: str | None) -> Path:
    from huggingface_hub import snapshot_download

    from fastadapt import __version__

    with hub_errors(repository, revision, tried="no such folder, and "):
        folder = snapshot_download(
            repository,
            revision=revision,
            allow_patterns=list(SHARED),
            local_files_only=not _is_reachable(repository, revision),
            library_name="fastadapt",
            library_version=__version__,
        )
    return Path(folder)
