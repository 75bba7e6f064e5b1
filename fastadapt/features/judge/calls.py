"""Answers of an endpoint, kept on disk by the content of the question."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fastadapt.io.atomic import disk_errors, make_folder, replacing


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
            held = json.loads(self._path(request).read_text(encoding="utf-8"))
        except (FileNotFoundError, ValueError):
            return None
        same = isinstance(held, dict) and held.get("request") == request
        return held["answer"] if same and isinstance(held.get("answer"), str) else None

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
        return self.folder / name[:2] / f"{name}.json"
