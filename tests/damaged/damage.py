"""Damage a file in many ways, and check what readers do with each variant.

:func:`variants` returns named variants of a file. :func:`sweep` runs a reader or a command on each
of them. A call ends well if, within the time limit, it accepts a valid variant or raises one error
whose message names the file.
"""

from __future__ import annotations

import copy
import io
import json
import os
import random
import re
import shutil
import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import load_file, save

from fastadapt.errors import RunError, UserError

PROOF = os.environ.get("FASTADAPT_PROOF") == "1"
DEPTH = 100_000
#: Offsets at which a file is truncated, and at which a bit is flipped.
RAW = 20 if PROOF else 8
#: Replacements of a value of a document. REMOVED removes its key.
REMOVED = object()
WRONG: tuple[object, ...] = (
    None, True, -1, 0, 10**9, 1.5, "x", "12", [], {}, 2**63, 2**64, REMOVED,
)  # fmt: skip
SECONDS = 20
#: Messages about a whole file, and messages of transformers and tokenizers. They name no key.
WHOLE = re.compile(
    r"SHA-256|has \d+ bytes|holds no selection|expected a run or a folder of adapters|the column |"
    r"mismatched keys|Padding_idx must|model type|KeyError|tokenizer of |tokenizers differ"
)


@dataclass(frozen=True)
class Damage:
    """One variant of a file.

    Attributes:
        name: name of the variant.
        content: bytes of the file; None for a folder in its place.
        key: last key of the replaced value of a document; empty for other damage.
        value: the new value.
        keys: all keys on the path to the value.
    """

    name: str
    content: bytes | None
    key: str = ""
    value: Any = None
    keys: tuple[str, ...] = ()

    def apply(self, path: Path) -> None:
        """Replace ``path`` by the variant."""
        if path.is_dir():
            shutil.rmtree(path)
        if self.content is None:
            path.unlink(missing_ok=True)
            path.mkdir()
        else:
            path.write_bytes(self.content)


def raw(content: bytes, count: int = RAW, seed: int = 0) -> Iterator[Damage]:
    """Yield truncations and bit flips at ``count`` offsets, and files of other formats."""
    draw = random.Random(seed)
    offsets = sorted({len(content) * i // count for i in range(count)})
    yield from (Damage(f"cut at {offset}", content[:offset]) for offset in offsets if offset)
    for offset in sorted(draw.sample(range(len(content)), min(count, len(content)))):
        flipped = bytearray(content)
        flipped[offset] ^= 1 << draw.randrange(8)
        yield Damage(f"bit flip at {offset}", bytes(flipped))
    yield Damage("empty", b"")
    yield Damage("foreign", b"\x89PNG\r\n\x1a\n" + bytes(range(256)))
    yield Damage("not UTF-8", b"\xff\xfe" + content)
    yield Damage("folder", None)


def document(content: bytes, *, is_yaml: bool = False) -> Iterator[Damage]:
    """Yield wrong types at every key of a document, deep nesting, huge numbers and equal keys."""
    values = yaml.safe_load(content) if is_yaml else json.loads(content)
    for text in ("[", '{"a":'):
        yield Damage(f"nested {text}", (text * DEPTH).encode())
    yield Damage("nested closed", b"[" * DEPTH + b"]" * DEPTH)
    for name, number in (("5,000 digits", "1" * 5000), ("1e400", "1e400"), ("NaN", "NaN")):
        yield Damage(name, f'{{"a": {number}}}'.encode())
    if isinstance(values, dict) and values:
        first = next(iter(values))
        twice = json.dumps({first: values[first]})[1:-1]
        yield Damage("equal keys", f"{{{twice}, {twice}}}".encode())
    other: Any
    for other in (None, 3, "x", [], {}, [[]]):
        yield Damage(f"document is {other!r}", json.dumps(other).encode())
    for path in _paths(values):
        for wrong in WRONG:
            changed = _replaced(values, path, wrong)
            if changed == values and json.dumps(changed) == json.dumps(values):
                continue
            value = "removed" if wrong is REMOVED else repr(wrong)
            name = f"{'.'.join(map(str, path))} {value}"
            keys = tuple(k for k in path if isinstance(k, str))
            key = keys[-1] if keys else ""
            yield Damage(name, json.dumps(changed).encode(), key, wrong, keys)


def tensors(path: Path) -> Iterator[Damage]:
    """Yield wrong dtypes, shapes and values of every tensor of a safetensors file."""
    original = load_file(path)
    for name, tensor in original.items():
        odd: dict[str, torch.Tensor | None] = {
            "int8": torch.zeros(tensor.shape, dtype=torch.int8),
            "bool": torch.zeros(tensor.shape, dtype=torch.bool),
            "int64": torch.zeros(tensor.shape, dtype=torch.int64),
            "one more": torch.zeros((*tensor.shape, 1)),
            "empty": torch.zeros(0),
            "longer": torch.zeros([n + 1 for n in tensor.shape] or [2]),
            "removed": None,
        }
        for value in (float("nan"), float("inf")):
            if tensor.is_floating_point():
                bad = tensor.clone()
                bad.view(-1)[-1] = value
                odd[str(value)] = bad
        for kind, other in odd.items():
            changed = {k: v for k, v in {**original, name: other}.items() if v is not None}
            yield Damage(f"{name} {kind}", save(changed), name, kind)
    yield Damage("one tensor more", save({**original, "more": torch.zeros(1)}), "more")
    header = b"[" * DEPTH
    yield Damage("nested header", len(header).to_bytes(8, "little") + header)
    yield Damage("header of 2**63 bytes", (2**63).to_bytes(8, "little") + header)


def thinned(cases: list[Damage], most: int = 60) -> list[Damage]:
    """Return all cases in `make proof`, else about ``most`` evenly spaced cases."""
    return cases if PROOF else cases[:: -(-len(cases) // most)]


def variants(path: Path) -> list[Damage]:
    """Return all variants for the kind of file, which its suffix determines."""
    content = path.read_bytes()
    cases = list(raw(content))
    if path.suffix == ".safetensors":
        cases += tensors(path)
    elif path.suffix in (".json", ".yaml"):
        cases += document(content, is_yaml=path.suffix == ".yaml")
    return cases


class Overrun(BaseException):
    """A reader exceeded the time limit. Readers that catch ``Exception`` do not catch this."""


@contextmanager
def time_limit(seconds: int = SECONDS) -> Iterator[None]:
    """Raise :class:`Overrun` in the main thread if the context takes longer."""

    def stop(*_: object) -> None:
        raise Overrun(f"not done after {seconds} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def command(*argv: object) -> Callable[[], Any]:
    """Return a function that runs a command in this process and raises its printed error."""

    def run() -> None:
        from fastadapt.cli.main import main

        out, err = io.StringIO(), io.StringIO()
        with redirect_stdout(out), redirect_stderr(err):
            code = main([str(a) for a in argv])
        if code:
            assert code in (1, 2), code
            raise (RunError if code == 1 else UserError)(err.getvalue())
        assert "Traceback" not in err.getvalue(), err.getvalue()

    return run


def ends_well(
    call: Callable[[], Any],
    damage: Damage,
    path: Path,
    *,
    valid: Callable[[Damage, Any], bool],
    names: tuple[str, ...] = (),
) -> str | None:
    """Run ``call`` on a damaged file; return one line if the call does not end well, else None.

    Args:
        call: reads the file.
        damage: the variant in the file's place.
        path: path of the file.
        valid: return whether the variant may be accepted, given the result of ``call``.
        names: texts of which an error message must contain one; by default the file's name.
    """
    try:
        with time_limit():
            result = call()
    except (UserError, RunError) as error:
        text = str(error)
        if "Traceback" in text:
            return f"{damage.name}: a traceback is printed: {text[:300]}"
        if not any(name in text for name in names or (path.name,)):
            return f"{damage.name}: the message does not name {path.name}: {text[:300]}"
        if damage.keys and not any(key in text for key in damage.keys) and not WHOLE.search(text):
            return f"{damage.name}: the message names none of its keys: {text[:300]}"
        if len(text) > 4000:
            return f"{damage.name}: a message of {len(text)} characters"
        return None
    except (Exception, Overrun) as error:
        return f"{damage.name}: {type(error).__name__}: {str(error)[:200]}"
    return None if valid(damage, result) else f"{damage.name}: accepted: {str(result)[:200]}"


def sweep(
    path: Path,
    cases: Sequence[Damage],
    call: Callable[[], Any],
    valid: Callable[[Damage, Any], bool],
    names: tuple[str, ...] = (),
) -> None:
    """Check that ``call`` ends well, see :func:`ends_well`, with :func:`thinned` cases.

    The file is restored afterwards.
    """
    sound, wrong, cases = path.read_bytes(), [], thinned(list(cases))
    for damage in cases:
        path.parent.mkdir(exist_ok=True)
        damage.apply(path)
        wrong.append(ends_well(call, damage, path, valid=valid, names=names))
    path.parent.mkdir(exist_ok=True)
    Damage("sound", sound).apply(path)
    print(f"{len(cases)} damaged variants of {path.name}")
    failed = list(filter(None, wrong))
    assert not failed, f"{len(failed)} of {len(cases)}:\n" + "\n".join(failed)


# --- paths and values of documents ----------------------------------------------------------------


def _paths(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    if path:
        yield path
    if isinstance(value, dict):
        for key, child in value.items():
            yield from _paths(child, (*path, key))
    elif isinstance(value, list) and value:
        yield from _paths(value[0], (*path, 0))


def _replaced(values: Any, path: tuple[Any, ...], new: object) -> Any:
    changed = copy.deepcopy(values)
    parent = changed
    for key in path[:-1]:
        parent = parent[key]
    if new is REMOVED:
        del parent[path[-1]]
    else:
        parent[path[-1]] = new
    return changed
