"""Push a run to the hub: adapters, settings, summary and model card, in one commit."""

from __future__ import annotations

import os
import re
from collections.abc import Collection
from dataclasses import dataclass
from fnmatch import fnmatch
from typing import Any

from fastadapt.errors import UserError
from fastadapt.hub.card import model_card
from fastadapt.hub.contents import read_shared
from fastadapt.hub.download import SHARED, locate
from fastadapt.hub.errors import hub_errors
from fastadapt.hub.names import check_repository
from fastadapt.hub.paths import check_private

_CARD = "README.md"
#: Files that a repository may have before a run is pushed to it.
_OURS = (*SHARED, _CARD, ".gitattributes")
_LICENSE = re.compile("[a-z0-9][a-z0-9.-]*")


@dataclass(frozen=True)
class Pushed:
    """A run on the hub.

    Attributes:
        repository: name of the repository.
        commit: commit that holds the run.
        url: address of the repository.
    """

    repository: str
    commit: str
    url: str


def push(
    run: str | os.PathLike[str],
    repository: str,
    *,
    private: bool | None = None,
    license: str | None = None,
    target: str | None = None,
    base: str | None = None,
    tokenizer: str | None = None,
) -> Pushed:
    """Push a finished run of transcoders to the Hugging Face hub.

    The repository is created if it does not exist. The files of a run that it holds are replaced,
    in one commit: a reader gets the earlier run or the new one.

    Args:
        run: folder of a run, or of adapters.
        repository: ``owner/name``.
        private: whether a new repository is private; None: the owner's default.
        license: the hub's name of the adapters' licence, such as ``apache-2.0``.
        target, base, tokenizer: hub ids in place of local folders, with or without ``@revision``;
            their present commits are recorded.

    Raises:
        UserError: the run cannot be shared (:func:`fastadapt.hub.contents.read_shared`); a file
            would name the home folder or the run's folder of this machine; the repository holds
            other files, is public though ``private`` is true, or may not be written.
        RunError: the upload was interrupted.
    """
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, constants

    from fastadapt import __version__

    check_repository(repository)
    if license is not None and not _LICENSE.fullmatch(license := license.lower()):
        raise UserError(f"license: expected a name such as apache-2.0, got {license!r:.80}")
    api = HfApi(library_name="fastadapt", library_version=__version__)

    def commit_of(model: str, revision: str | None) -> str:
        with hub_errors(model, revision):
            return str(api.model_info(model, revision=revision).sha)

    names = {"target": target, "base": base, "tokenizer": tokenizer}
    folder = locate(run).folder
    shared = read_shared(folder, names, commit_of)
    files = {**shared.files, _CARD: model_card(shared, repository, license).encode()}
    check_private(files, folder)
    with hub_errors(repository, writing=True):
        present = _present(api, repository, private)
        if present is None:
            api.create_repo(repository, private=private)
        operations: list[Any] = [
            CommitOperationAdd(path_in_repo=name, path_or_fileobj=content)
            for name, content in files.items()
        ]
        operations += [
            CommitOperationDelete(path_in_repo=name)
            for name in sorted(present or ())
            if name not in files and name != ".gitattributes"
        ]
        commit = api.create_commit(
            repository, operations, commit_message=f"Push a run with fastadapt {__version__}"
        )
    return Pushed(repository, commit.oid, f"{constants.ENDPOINT}/{repository}")


def _present(api: Any, repository: str, private: bool | None) -> Collection[str] | None:
    """Return the names of a repository's files; None if the repository does not exist.

    Raises:
        UserError: the repository holds files that are not a run's, or is public and ``private`` is
            true.
    """
    from huggingface_hub.errors import RepositoryNotFoundError

    try:
        info = api.model_info(repository)
    except RepositoryNotFoundError:
        return None
    names = {file.rfilename for file in info.siblings or ()}
    if foreign := sorted(n for n in names if not any(fnmatch(n, ours) for ours in _OURS)):
        raise UserError(
            f"{repository} holds files that are not a run's ({', '.join(foreign[:3])}); nothing "
            "was changed. Give a new name"
        )
    if private and not info.private:
        raise UserError(
            f"{repository} is public; nothing was uploaded. Make it private on the hub, give a new "
            "name, or leave out --private"
        )
    return names
