"""Reads and writes files of sampled responses, from which an interrupted sampling is resumed.

A file is JSONL with three kinds of records: ``settings`` (first line: settings that determine the
tokens), ``response`` (one per finished request, in the order of finishing) and ``speed`` (one per
call that ended or was stopped). Opening a file removes an incomplete last line; all other lines
are only appended.
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
_RESUME_ADVICE = (
    "Finished responses are intact. Run the same command again, without --overwrite, to resume."
)
Finish = Literal["eos", "length", "degenerate", "stop"]
Key = tuple[str, int]
_Record = TypeVar("_Record", "Response", "Speed")


@dataclass(frozen=True)
class Request:
    """One repetition of a prompt to be answered.

    Attributes:
        id: id of the prompt, unique in a file.
        prompt: token ids, including BOS; no token is added.
        repetition: index of the repetition, from 0.
    """

    id: str
    prompt: tuple[int, ...]
    repetition: int = 0

    @property
    def key(self) -> Key:
        """Id and repetition of the request, which identify it in a file."""
        return self.id, self.repetition


@dataclass(frozen=True)
class Response:
    """The response to a request.

    Attributes:
        id, repetition: id and repetition of the request.
        seed: seed of the request's random numbers, see
            :func:`fastadapt.evaluation.generation.gumbel.request_seed`.
        prompt_tokens: ids of the prompt.
        tokens: ids of the response, including the end-of-sequence token, or all tokens up to the
            end of the first degenerate window.
        text: text before ``cut`` or the stop string, without special tokens.
        finish: reason of the end: ``eos``; ``length`` for the token budget or the context;
            ``degenerate``; or ``stop`` for a stop string.
        cut: tokens before the first degenerate window; None without one.
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
        """Id and repetition of the request, which identify it in a file."""
        return self.id, self.repetition

    @property
    def scored_tokens(self) -> int:
        """Number of tokens before the cut or the end-of-sequence token, whichever comes first."""
        if self.cut is not None:
            return self.cut
        return len(self.tokens) - (self.finish == "eos")


@dataclass(frozen=True)
class Speed:
    """Number of generated tokens and seconds of generation, without loading and warm-up."""

    tokens: Count
    seconds: NonNegative
    batching: str

    @property
    def tokens_per_second(self) -> float:
        """Generated tokens per second; 0 if no time was measured."""
        return self.tokens / self.seconds if self.seconds else 0.0


class ResponseFile:
    """A file of responses, open for appending; see :func:`open_responses`.

    Attributes:
        path: path of the file.
        finished: responses by id and repetition.
        speeds: records of earlier calls.
    """

    def __init__(self, path: Path, settings: Mapping[str, Any]) -> None:
        self.path = path
        self.finished: dict[Key, Response] = {}
        self.speeds: list[Speed] = []
        settings = json.loads(json.dumps({"kind": "settings", "schema": SCHEMA, **settings}))
        size = self._load(settings)
        self._file = open_appended(path)
        self._file.truncate(size)
        if not size:
            self._write(settings)

    def _load(self, settings: Mapping[str, Any]) -> int:
        """Read the existing records; return the number of bytes of complete lines."""
        size = 0
        for number, record, end in _records(self.path) if has_file(self.path) else ():
            size = end
            where, kind = f"{self.path}, line {number}", record.pop("kind", None)
            if (kind == "settings") != (number == 1) or kind not in KINDS:
                wanted = "a file of responses" if number == 1 else "a response or a speed"
                raise UserError(f"{where}: expected {wanted}, got a record of kind {kind!r:.40}")
            if kind == "settings":
                _compare(self.path, record, {k: v for k, v in settings.items() if k != "kind"})
            elif kind == "response":
                response = _parse(Response, record, where)
                if response.key in self.finished:
                    raise UserError(
                        f"{where}: a second response with id and repetition {response.key}; "
                        "delete this line"
                    )
                self.finished[response.key] = response
            else:
                self.speeds.append(_parse(Speed, record, where))
        return size

    def add(self, response: Response) -> None:
        """Append a finished response to the file."""
        self.finished[response.key] = response
        self._write({"kind": "response", **asdict(response)})

    def add_speed(self, speed: Speed) -> None:
        """Append the speed of this call, and sync the file to the disk."""
        self.speeds.append(speed)
        self._write({"kind": "speed", **asdict(speed)})
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Close the file; no response can be added afterwards."""
        self._file.close()

    def _write(self, record: Mapping[str, Any]) -> None:
        left = memoryview((json.dumps(record, ensure_ascii=False) + "\n").encode())
        with disk_errors(self.path, _RESUME_ADVICE):
            while left:
                left = left[self._file.write(left) :]


def lock_file(path: Path) -> Path:
    """Return the path of the lock file that exists beside ``path`` while a process samples.

    The file of responses itself is not locked, since a locked file cannot be read on Windows.
    """
    return path.with_name(f"{path.name}.lock")


@contextmanager
def open_responses(path: Path, settings: Mapping[str, Any]) -> Iterator[ResponseFile]:
    """Open or create the file of responses at ``path``, locked for this process.

    Args:
        path: path of the file.
        settings: settings that determine the tokens; JSON values.

    Raises:
        UserError: the file has responses of other settings, or is not a file of responses.
        RunError: the file cannot be written, or another process samples into it.
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
        raise RunError(
            f"{path}: another process is sampling into this file; wait until it ends"
        ) from None
    except OSError as error:
        raise RunError(cannot_write(path, error, _RESUME_ADVICE)) from error


def read_responses(path: Path) -> list[Response]:
    """Return the responses of a file, in the order in which they finished.

    Raises:
        UserError: the file does not exist, or is not a file of responses.
    """
    if not has_file(path):
        raise UserError(f"{path} does not exist; sample responses into it first")
    return [
        _parse(Response, record, f"{path}, line {number}")
        for number, record, _ in _records(path)
        if record.get("kind") == "response"
    ]


def _records(path: Path) -> Iterator[tuple[int, dict[str, Any], int]]:
    """Yield each line's number, record and end (a byte offset), without an incomplete last line."""
    size = 0
    with open_regular(path) as file:
        for number, line in enumerate(file, start=1):
            if not line.endswith(b"\n"):
                return
            record = parse_line(line, f"{path}, line {number}")
            if not isinstance(record, dict):
                raise UserError(f"{path}, line {number}: expected a JSON object")
            size += len(line)
            yield number, record, size


def _parse(kind: type[_Record], record: Mapping[str, Any], where: str) -> _Record:
    """Check a record against its class, which is also its schema, and convert it."""
    check(record, kind, where)
    return kind(**{field.name: record[field.name] for field in fields(kind)})


def _compare(path: Path, stored: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    for name in {**wanted, **stored}:
        if not same(stored.get(name), wanted.get(name)):
            raise UserError(
                f"{path} holds responses of other settings: {name} was {stored.get(name)!r}, and "
                f"is now {wanted.get(name)!r}; sample into another file, or delete this one"
            )
