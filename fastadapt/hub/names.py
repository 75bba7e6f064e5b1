"""Names on the hub: ``owner/name``, or ``owner/name@revision``."""

from __future__ import annotations

import os
import re

from fastadapt.errors import UserError

_PART = r"[A-Za-z0-9_](?:[A-Za-z0-9._-]*[A-Za-z0-9_])?"
_REPOSITORY = re.compile(rf"{_PART}/{_PART}")
_MODEL = re.compile(rf"(?:{_PART}/)?{_PART}")  # models of the hub's first years have no owner
_REVISION = re.compile(r"[A-Za-z0-9][A-Za-z0-9._/-]*")
_LONGEST = 96  # characters of a name


def _is_name(text: str, form: re.Pattern[str]) -> bool:
    odd = ".." in text or "--" in text or text.endswith(".git")
    return form.fullmatch(text) is not None and not odd and len(text) <= _LONGEST


def split_revision(name: str) -> tuple[str, str | None]:
    """Return the parts of ``owner/name@revision``; None for a name without a revision.

    Example:
        >>> split_revision("ann/run@v2"), split_revision("ann/run")
        (('ann/run', 'v2'), ('ann/run', None))
    """
    repository, mark, revision = name.partition("@")
    return repository, revision if mark else None


def check_repository(name: str) -> str:
    """Return the name of a repository to write to.

    Raises:
        UserError: the name is not ``owner/name``.

    Example:
        >>> check_repository("run")
        Traceback (most recent call last):
        fastadapt.errors.UserError: expected a repository as OWNER/NAME, got 'run'
    """
    if not _is_name(name, _REPOSITORY):
        raise UserError(f"expected a repository as OWNER/NAME, got {name!r:.120}")
    return name


def is_local(run: str | os.PathLike[str]) -> bool:
    """Return whether a run's name is a path, which is never looked up on the hub.

    A text is a path unless it has the form ``owner/name`` or ``owner/name@revision``, nothing of
    that name exists, and ``owner`` is not a folder in the working directory.

    Example:
        >>> is_local("./runs"), is_local("/runs/x"), is_local("a/b/c"), is_local("ann/run@v2")
        (True, True, True, False)
    """
    if not isinstance(run, str):
        return True
    repository, revision = split_revision(run)
    if not _is_name(repository, _REPOSITORY):
        return True
    if revision is not None and not _REVISION.fullmatch(revision):
        return True
    return any(map(os.path.lexists, (run, repository, repository.partition("/")[0])))


def is_model(name: str) -> bool:
    """Return whether a name has the form of a model's hub id, and is no path on this machine.

    Example:
        >>> is_model("Qwen/QwQ-32B"), is_model("gpt2"), is_model("/models/a"), is_model("a/b/c")
        (True, True, False, False)
    """
    return _is_name(name, _MODEL) and not os.path.lexists(name)
