"""Errors of the hub as messages."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from fastadapt.errors import RunError, UserError

_LOG_IN = "log in (hf auth login) or set HF_TOKEN"


@contextmanager
def hub_errors(
    repository: str, revision: str | None = None, *, tried: str = "", writing: bool = False
) -> Iterator[None]:
    """Raise errors of the hub's client as one sentence about ``repository``.

    Args:
        repository: name of the repository.
        revision: the revision that was asked for.
        tried: what was looked up before, such as "no such folder, and ".
        writing: whether the calls write to the repository.

    Raises:
        UserError: the repository or the revision does not exist or may not be read, or the token
            may not write.
        RunError: the connection failed, or the hub answered with another error.
    """
    from huggingface_hub import constants
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HTTPError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    hub = constants.ENDPOINT
    try:
        yield
    except (UserError, RunError):
        raise
    except GatedRepoError as error:
        raise UserError(
            f"{repository}: its owner grants access on request; ask at {hub}/{repository}, then "
            f"{_LOG_IN}"
        ) from error
    except RepositoryNotFoundError as error:
        raise UserError(
            f"{repository}: {tried}no repository of this name on {hub}, or a private one that your "
            f"token may not read; check the name, or {_LOG_IN}"
        ) from error
    except RevisionNotFoundError as error:
        raise UserError(
            f"{repository} has no revision {revision!r}; give a branch, tag or commit of "
            f"{hub}/{repository}/commits/main"
        ) from error
    except (LocalEntryNotFoundError, OfflineModeIsEnabled) as error:
        raise UserError(
            f"{repository}: {tried}{hub} cannot be reached, and the hub's cache "
            f"({constants.HF_HUB_CACHE}) does not hold it; connect, or give a local folder"
        ) from error
    except HfHubHTTPError as error:
        status = error.response.status_code
        if status == 401:
            raise UserError(f"{repository}: {hub} does not know your token; {_LOG_IN}") from error
        if status == 403:
            raise UserError(
                f"{repository}: your token may not write there; give a repository of your own, or "
                "a token with write access"
            ) from error
        raise RunError(_failed(repository, f"{hub} answered {status}", writing)) from error
    except (HTTPError, RuntimeError) as error:  # RuntimeError: an upload of large files
        raise RunError(_failed(repository, _reason(error), writing)) from error


def is_unreachable(error: BaseException) -> bool:
    """Return whether an error of the client says that no connection was made in time.

    A connection that broke is another error.
    """
    while (cause := error.__cause__ or error.__context__) is not None:
        error = cause
    broken = isinstance(error, ConnectionError) and not isinstance(error, ConnectionRefusedError)
    return isinstance(error, OSError) and not broken


def _failed(repository: str, reason: str, writing: bool) -> str:
    if not writing:
        return f"{repository}: {reason}. Run the same command again."
    return (
        f"{repository}: the upload was interrupted ({reason}). The repository is as before, or "
        "complete; run the same command again."
    )


def _reason(error: BaseException) -> str:
    """Return the text of the first cause of an error, in one line."""
    while error.__cause__ is not None:
        error = error.__cause__
    return " ".join(str(error).split())[:200].rstrip(".") or type(error).__name__
