"""Answers of an endpoint, kept on disk by the content of the question."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from typing_extensions import TypedDict

from fastadapt.io.atomic import disk_errors, make_folder, replacing
from fastadapt.io.documents import DocumentError, read_json
from fastadapt.io.names import inside


class _Held(TypedDict):
    request: dict[str, Any]
    answer: str


class Calls:
    """A folder of answers, each in a file that is named after what was asked.

    A file holds what was asked and of whom beside the answer, and neither the endpoint's key nor
    what may be secret in its address. It is written as a whole or not at all; one that cannot be
    read counts as not there.

    Args:
        folder: made when the first answer is kept.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def get(self, request: Mapping[str, Any]) -> str | None:
        """The answer to a request, if it is kept."""
        try:
            held = read_json(self._path(request), _Held)
        except DocumentError:
            return None
        answer: str = held["answer"]
        return answer if held["request"] == request and _is_text(answer) else None

    def keep(
        self, request: Mapping[str, Any], answer: str, usage: Mapping[str, Any] | None = None
    ) -> None:
        """Keep an answer, and the tokens that the endpoint says it took.

        Raises:
            RunError: the folder cannot be written.
        """
        path = self._path(request)
        held = {"request": request, "answer": answer, "usage": usage}
        with disk_errors(path):
            make_folder(path.parent)
            with replacing(path) as staged:
                staged.write_text(json.dumps(held, ensure_ascii=False) + "\n", encoding="utf-8")

    def forget(self, requests: Sequence[Mapping[str, Any]]) -> None:
        """Drop the answers to some requests."""
        for request in requests:
            self._path(request).unlink(missing_ok=True)

    def _path(self, request: Mapping[str, Any]) -> Path:
        text = json.dumps(request, sort_keys=True, ensure_ascii=True, separators=(",", ":"))
        name = hashlib.sha256(text.encode()).hexdigest()
        return inside(self.folder, name[:2], f"{name}.json", source="kept answers")


def _is_text(answer: str) -> bool:
    try:
        answer.encode()
    except UnicodeEncodeError:  # half of a pair of surrogates, as no endpoint's answer has it
        return False
    return True
