"""Responses as they finish, in a file from which an interrupted sampling goes on.

A JSONL file of three kinds of records: ``settings`` (first: what the tokens depend on),
``response`` (one per finished request, in the order of finishing) and ``speed`` (one per sampling
that ended or was told to stop). A line that a kill cut short is dropped; nothing else is ever
changed.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal, TypeVar

from fastadapt.errors import RunError, UserError
from fastadapt.io.atomic import cannot_write, disk_errors, locked, make_folder, open_appended
from fastadapt.io.documents import Count, NonNegative, check, parse_line, same
from fastadapt.io.files import open_regular
from fastadapt.io.names import has_file

SCHEMA = 1
KINDS = ("settings", "response", "speed")
_GO_ON = "What was sampled before is intact: run the same command again."
Finish = Literal["eos", "length", "degenerate", "stop"]
Key = tuple[str, int]
_Record = TypeVar("_Record", "Response", "Speed")


@dataclass(frozen=True)
class Request:
    """A prompt to be answered, one repetition of it.

    Attributes:
        id: names the prompt among those of a file.
        prompt: its token ids, BOS included; nothing is added to them.
        repetition: 0, 1, ... of the same prompt.
    """

    id: str
    prompt: tuple[int, ...]
    repetition: int = 0

    @property
    def key(self) -> Key:
        return self.id, self.repetition


@dataclass(frozen=True)
class Response:
    """What was sampled for a request.

    Attributes:
        id, repetition: the request's.
        seed: the request's own, of which its random numbers are a function.
        prompt_tokens: ids of the prompt.
        tokens: ids of the response, the end-of-sequence token included where there is one, and all
            up to the end of the degenerate window where there is one.
        text: the response as text, up to ``cut`` or the stop string, without special tokens.
        finish: ``eos``; ``length``, the budget or the context was used up; ``degenerate``; or
            ``stop``, a stop string came.
        cut: tokens before the first degenerate window, None where there is none.
    """

    id: str
    repetition: Count
    seed: int
    prompt_tokens: list[Count]
    tokens: list[Count]
    text: str
    finish: Finish
    cut: Count | None

    @property
    def key(self) -> Key:
        return self.id, self.repetition

    @property
    def scored_tokens(self) -> int:
        """Length of what is scored: up to the cut, the end-of-sequence token not counted."""
        if self.cut is not None:
            return self.cut
        return len(self.tokens) - (self.finish == "eos")


@dataclass(frozen=True)
class Speed:
    """Tokens generated and the seconds of generation alone, loading and warming up left out."""

    tokens: Count
    seconds: NonNegative
    batching: str

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.seconds if self.seconds else 0.0


class ResponseFile:
    """The file, open for adding to; see :func:`open_responses`."""

    def __init__(self, path: Path, settings: Mapping[str, Any]) -> None:
        self.path = path
        self.finished: dict[Key, Response] = {}
        self.speeds: list[Speed] = []
        settings = json.loads(json.dumps({"kind": "settings", "schema": SCHEMA, **settings}))
        kept = self._take_up(settings)
        self._file = open_appended(path)
        self._file.truncate(kept)
        if not kept:
            self._write(settings)

    def _take_up(self, settings: Mapping[str, Any]) -> int:
        """Read what there is; the bytes of its whole lines."""
        whole = 0
        for number, record, end in _records(self.path) if has_file(self.path) else ():
            whole = end
            where, kind = f"{self.path}, line {number}", record.pop("kind", None)
            if (kind == "settings") != (number == 1) or kind not in KINDS:
                wanted = "a file of responses" if number == 1 else "a response or a speed"
                raise UserError(f"{where}: expected {wanted}, got kind {kind!r:.40}")
            if kind == "settings":
                _compare(self.path, record, {k: v for k, v in settings.items() if k != "kind"})
            elif kind == "response":
                response = _made(Response, record, where)
                if response.key in self.finished:
                    raise UserError(f"{where}: the response {response.key} is there twice")
                self.finished[response.key] = response
            else:
                self.speeds.append(_made(Speed, record, where))
        return whole

    def add(self, response: Response) -> None:
        """Write a finished response."""
        self.finished[response.key] = response
        self._write({"kind": "response", **asdict(response)})

    def add_speed(self, speed: Speed) -> None:
        """Write how fast the sampling was that ends here, and see to it that all is on the disk."""
        self.speeds.append(speed)
        self._write({"kind": "speed", **asdict(speed)})
        os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()

    def _write(self, record: Mapping[str, Any]) -> None:
        left = memoryview((json.dumps(record, ensure_ascii=False) + "\n").encode())
        with disk_errors(self.path, _GO_ON):
            while left:
                left = left[self._file.write(left) :]


def lock_file(path: Path) -> Path:
    """Return the lock file of a file of responses, which lies beside it while a process samples.

    The responses themselves are no lock: on Windows, no one could read a locked file.
    """
    return path.with_name(f"{path.name}.lock")


@contextmanager
def open_responses(path: Path, settings: Mapping[str, Any]) -> Iterator[ResponseFile]:
    """The file of responses at ``path``, for this process alone.

    Raises:
        UserError: it holds responses of other settings, or is no such file.
        RunError: it cannot be written, or another process samples into it.
    """
    lock = lock_file(path)
    try:
        make_folder(path.parent)
        with locked(lock):
            try:
                file = ResponseFile(path, settings)
                try:
                    yield file
                finally:
                    file.close()
            finally:
                lock.unlink(missing_ok=True)
    except BlockingIOError:
        raise RunError(f"{path}: another process samples into this file") from None
    except OSError as error:
        raise RunError(cannot_write(path, error, _GO_ON)) from error


def read_responses(path: Path) -> list[Response]:
    """The responses of a file, in the order in which they finished."""
    if not has_file(path):
        raise UserError(f"{path}: no such file of responses")
    return [
        _made(Response, record, f"{path}, line {number}")
        for number, record, _ in _records(path)
        if record.get("kind") == "response"
    ]


def _records(path: Path) -> Iterator[tuple[int, dict[str, Any], int]]:
    """Line, record, and the bytes up to its end; a last line that was cut short is left out."""
    place = 0
    with open_regular(path) as file:
        for number, line in enumerate(file, start=1):
            if not line.endswith(b"\n"):
                return
            record = parse_line(line, f"{path}, line {number}")
            if not isinstance(record, dict):
                raise UserError(f"{path}, line {number}: expected a JSON object")
            place += len(line)
            yield number, record, place


def _made(kind: type[_Record], record: Mapping[str, Any], where: str) -> _Record:
    """A record as its class, which is also its schema."""
    check(record, kind, where)
    return kind(**{field.name: record[field.name] for field in fields(kind)})


def _compare(path: Path, found: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    for name in {**wanted, **found}:
        if not same(found.get(name), wanted.get(name)):
            raise UserError(
                f"{path} holds responses of other settings: {name} was {found.get(name)!r}, and is "
                f"now {wanted.get(name)!r}; sample into another file, or delete this one"
            )
