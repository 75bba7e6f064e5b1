"""Damaged files of an evaluation: eval.json, speed.json, arrays, responses, rows, questions."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from threading import Event
from types import SimpleNamespace
from typing import Any

import pytest
import results
import torch
from damage import REMOVED, Damage, document, raw, sweep, variants

from fastadapt.errors import UserError
from fastadapt.evaluation.benchmarks.datasets import BENCHMARKS, questions
from fastadapt.evaluation.benchmarks.runner import Row, _write, read_rows
from fastadapt.evaluation.difference.locate import WhereConfig, WhereRequest, locate
from fastadapt.evaluation.difference.measure import DifferenceConfig
from fastadapt.evaluation.difference.parts import PARTS as PARTS_OF_MODELS
from fastadapt.evaluation.difference.report import difference_figures, difference_tables
from fastadapt.evaluation.difference.result import read_result
from fastadapt.evaluation.faithfulness.partial_results import PartialResults
from fastadapt.evaluation.faithfulness.prompts import held_out
from fastadapt.evaluation.folder import PARTS, read_part
from fastadapt.evaluation.generation.responses import (
    Response,
    Speed,
    open_responses,
    read_responses,
)
from fastadapt.evaluation.generation.throughput import SpeedConfig, measure_speed
from fastadapt.evaluation.runs import read_pair
from fastadapt.evaluation.statistics import BootstrapConfig
from fastadapt.models.pair import PairConfig
from fastadapt.reporting.figures import figures
from fastadapt.reporting.tables import as_latex, as_markdown, tables

FINGERPRINT = "ab" * 32


# --- eval.json and speed.json ---------------------------------------------------------------------

ABOUT = {"schema_version": 1, "fingerprints": {"target": "ab"}}


@pytest.fixture
def result() -> dict[str, Any]:
    """Return a result with one model of each kind and all parts."""
    written = {**results.synthetic_result(), **ABOUT}
    keep = {"l0_10%", "no-bridge"}
    written["students"] = [s for s in written["students"] if s["name"] in keep]
    for section in ("faithfulness", "partial"):
        written[section] = {n: v for n, v in written[section].items() if n in keep}
    written["speed"] = {
        "batch_size": 2, "prompt_tokens": 3, "new_tokens": 4, "rounds": 3, "device": "cpu",
        "models": {"target": {"tokens_per_s": 9.5, "overhead": 0.0}},
    }  # fmt: skip
    written["benchmarks"] = {"sums": {"target": {"sampled": results.measured(0.3)}}}
    return written


@pytest.mark.parametrize("part", PARTS)
def test_every_part_of_eval_json(part: Any, result: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "eval.json"
    sections = {
        "outputs": ("faithfulness", "order", "texts"),
        "partial": ("partial", "bridge", "texts"),
        "speed": ("speed",),
        "benchmarks": ("benchmarks", "benchmark_counts"),
    }[part]
    about = {name: result[name] for name in ("schema_version", "pair", "fingerprints", "settings")}
    new = {**about, **{k: result[k] for k in ("students", "level", "versions")}}
    path.write_text(json.dumps({**about, **{name: result[name] for name in sections}}))

    def read() -> dict[str, Any]:
        sections_read = read_part(tmp_path, part, new)
        written = {**new, **sections_read}
        if sections_read:
            json.dumps(written, allow_nan=False)
            shown = tables(written)
            as_markdown(shown), as_latex(shown), figures(written)
        return sections_read

    assert set(read()) == set(sections)

    def valid(damage: Damage, sections_read: dict[str, Any]) -> bool:
        if not sections_read:  # of other models or settings, or of other parts
            absent = damage.name == f"{part} removed"
            return absent or not damage.name.startswith(sections)
        # Accepted values must equal those of the document, with the same types.
        said = json.loads(damage.content or b"")
        same = all(sections_read[name] == said[name] for name in sections_read)
        return same and (damage.name.startswith("bit flip") or _possible(damage))

    sweep(path, variants(path), read, valid)


#: Valid values of keys, among the values that the generator writes.
_POSSIBLE: dict[str, tuple[object, ...]] = {
    **dict.fromkeys(("mean", "low", "high"), (None, -1, 0, 10**9, 1.5, 2**63, 2**64)),
    **dict.fromkeys(("n", "n_partial", "predicted", "positions"), (0, 10**9)),
    **dict.fromkeys(("l0", "tokens_per_s"), (None, 0, 10**9, 1.5, 2**63, 2**64)),
    **dict.fromkeys(("truncated", "degenerate"), (0,)),
    **dict.fromkeys(("above", "below", "without", "with", "device", "sums"), ("x", "12")),
    **dict.fromkeys(("batch_size", "prompt_tokens", "new_tokens", "rounds"), (10**9,)),
    "overhead": (-1, 0, 10**9, 1.5, 2**63, 2**64),
    **dict.fromkeys(("nmse_per_layer", "nmse_token_per_layer", "holds"), (None,)),
    **dict.fromkeys(("faithfulness", "domains", "partial", "models", "benchmarks"), ({},)),
    **dict.fromkeys(("order", "bridge"), ([], REMOVED)),
    "recovered": (None,),
    **dict.fromkeys(("l0_10%", "no-bridge", "math", "target", "sampled"), ({}, REMOVED)),
}


#: Valid values of keys of ``where.json``, among the values that the generator writes.
_POSSIBLE_WHERE: dict[str, tuple[object, ...]] = {
    **dict.fromkeys(("mean", "low", "high"), (None, -1, 0, 10**9, 1.5, 2**63, 2**64)),
    **dict.fromkeys(("stable_rank", "effective_rank"), (0, 10**9, 1.5, 2**63, 2**64)),
    **dict.fromkeys(("change", "gamma"), (None, 0, 10**9, 1.5, 2**63, 2**64)),
    "matrices": ({},),
    **dict.fromkeys(("kl", *PARTS_OF_MODELS), (-1, 0, 10**9, 1.5, 2**63, 2**64)),
    **dict.fromkeys(("p", "level"), (0,)),
    **dict.fromkeys(("position", "positions"), (0, 10**9, [], REMOVED)),
    **dict.fromkeys(("profile", "fastadapt", "torch", "transformers"), (REMOVED,)),
    **dict.fromkeys(("n", "predicted"), (10**9,)),
}


@pytest.mark.slow
def test_where_json(tiny_pair: Path, tmp_path: Path) -> None:
    pair = PairConfig(str(tiny_pair / "target"), str(tiny_pair / "base"), device="cpu")
    settings = WhereConfig(DifferenceConfig(positions=2), BootstrapConfig(resamples=200))
    request = WhereRequest(pair, None, "w5 w6 w7 w8", config=settings)
    assert locate(request, tmp_path, lambda *_: None, Event()) is not None
    path = tmp_path / "where.json"

    def read() -> dict[str, Any]:
        result_read = read_result(path)
        shown = difference_tables(result_read)
        as_markdown(shown), as_latex(shown), difference_figures(result_read)
        return result_read

    def valid(damage: Damage, result_read: dict[str, Any]) -> bool:
        same = result_read == json.loads(damage.content or b"")
        if damage.name.startswith("bit flip"):  # of a digit or a letter
            return same
        text = isinstance(damage.value, str) or damage.key in ("settings", "versions", "pair")
        values = _POSSIBLE_WHERE.get(damage.key, ())
        text = text or damage.keys[-2:-1] == ("matrices",)
        return same and (text or "settings" in damage.keys or _is_among(damage.value, values))

    sweep(path, variants(path), read, valid)


def _is_among(value: object, values: tuple[object, ...]) -> bool:
    return any(type(each) is type(value) and each == value for each in values)


def _possible(damage: Damage) -> bool:
    return _is_among(damage.value, _POSSIBLE.get(damage.key, ()))


@pytest.fixture
def measured_speed(tmp_path: Path) -> Callable[[], Any]:
    """Return a function that calls ``measure_speed`` and reads the saved measurements."""
    path = tmp_path / "speed.json"
    models = {name: {"tokens_per_s": 2.5, "overhead": 0.5} for name in ("target", "hybrid")}
    config = SpeedConfig(batch_size=2, prompt_tokens=3, new_tokens=4, rounds=3)
    device = f"cpu, {torch.get_num_threads()} threads"
    settings = {**vars(config), "device": device}
    prints = {"target": "a", "hybrid": "b"}
    content = {
        "facts": {**settings, "fingerprints": prints},
        "speed": {**settings, "models": models},
    }
    path.write_text(json.dumps(content, indent=1))

    class Anew(Exception):  # noqa: N818
        pass

    def embedding() -> Any:
        raise Anew

    class Model:
        device = torch.device("cpu")
        model = property(lambda self: embedding())

    students: Any = SimpleNamespace(runs=[], fingerprint=prints.get, model=Model())

    def read() -> Any:
        try:
            return measure_speed(students, path, config)
        except Anew:
            return "anew"

    assert read() == content["speed"]
    return read


def test_speed_json(measured_speed: Callable[[], Any], tmp_path: Path) -> None:
    path = tmp_path / "speed.json"

    def valid(damage: Damage, speed: Any) -> bool:
        if speed == "anew":
            return "fact" in damage.name or damage.name.startswith("bit flip")
        return damage.name.startswith("bit flip") or _possible(damage)

    sweep(path, variants(path), measured_speed, valid)


# --- arrays ---------------------------------------------------------------------------------------

ARRAYS: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {
    "kl": (torch.float32, (5,)),
    "agrees": (torch.bool, (5,)),
    "nmse": (torch.float32, (2, 2, 3)),
    "tokens": (torch.int64, (2,)),
}
SHAPES = [
    {"kl": 2, "agrees": 2, "nmse": 1, "tokens": 1},
    {"kl": 3, "agrees": 3, "nmse": 1, "tokens": 1},
]


def piece(i: int) -> dict[str, torch.Tensor]:
    return {
        name: torch.ones((SHAPES[i][name], *shape[1:]), dtype=dtype)
        for name, (dtype, shape) in ARRAYS.items()
    }


@pytest.mark.parametrize("whole", [True, False])
def test_arrays_of_a_student(whole: bool, tmp_path: Path) -> None:
    """Damage the file of all batches, or the file of one batch, from which a run resumes."""
    first = PartialResults(tmp_path, "a", FINGERPRINT, 2, ARRAYS)
    first.add(0, piece(0))
    path = next(first.whole.parent.rglob("*.safetensors"))
    if whole:
        first.add(1, piece(1))
        path = first.whole

    def read() -> dict[str, torch.Tensor]:
        if not whole:
            first.whole.unlink(missing_ok=True)
        parts = PartialResults(tmp_path, "a", FINGERPRINT, 2, ARRAYS)
        for part in parts.missing():  # as a run does
            parts.add(part, piece(part))
        return parts.read()

    cases = variants(path)
    for damage in cases:  # the generator writes tensors without a fingerprint
        if damage.content is not None and damage.key:
            object.__setattr__(damage, "content", _marked(damage.content))
    sweep(path, cases, read, _same_arrays, (path.name, "a-abababab"))


def _marked(content: bytes) -> bytes:
    """Return the bytes of a safetensors file with the fingerprint that a reader checks first."""
    size = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + size])
    header["__metadata__"] = {"fingerprint": FINGERPRINT}
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + content[8 + size :]


def _same_arrays(damage: Damage, arrays: dict[str, torch.Tensor]) -> bool:
    # The format has no checksum. "int64" and "bool" are the dtypes of two arrays.
    if damage.name == "folder":  # the part of the missing file is measured again
        expected = {name: torch.ones(shape, dtype=dtype) for name, (dtype, shape) in ARRAYS.items()}
        return all(torch.equal(arrays[name], expected[name]) for name in expected)
    kinds = {"int64": "tokens", "bool": "agrees"}
    if kinds.get(damage.value) == damage.key and damage.key:
        return True
    return damage.name.startswith("bit flip")


# --- responses and rows ---------------------------------------------------------------------------

RESPONSE = Response("0", 0, 7, [1, 2], [3, 4, 5], "three four", "eos", None)


def lines_of(path: Path, number: int) -> list[Damage]:
    """Return damages of one line, as a document and as bytes."""
    lines = path.read_bytes().splitlines(keepends=True)
    before, after = b"".join(lines[:number]), b"".join(lines[number + 1 :])
    line = lines[number].rstrip(b"\n")
    return [
        Damage(
            d.name, before + d.content.replace(b"\n", b" ") + b"\n" + after, d.key, d.value, d.keys
        )
        for d in (*document(line), *raw(line, 10))
        if d.content is not None
    ]


@pytest.mark.parametrize("number", [0, 1, 2])
def test_lines_of_responses(number: int, tmp_path: Path) -> None:
    path = tmp_path / "0.jsonl"
    settings = {"temperature": 0.5, "source": {"model": "target"}}
    with open_responses(path, settings) as file:
        file.add(RESPONSE)
        file.add_speed(Speed(3, 0.5, "static"))

    def read() -> list[Any]:
        with open_responses(path, settings) as file:
            entries = [*file.finished.values(), *file.speeds]
        read_responses(path)
        return entries

    possible: dict[str, tuple[Any, ...]] = {
        "id": ("x", "12"), "repetition": (10**9,), "text": ("x", "12"), "batching": ("x", "12"),
        "seed": (-1, 0, 10**9, 2**63, 2**64), "cut": (0, 10**9), "tokens": (0, 10**9, []),
        "prompt_tokens": ([], 0, 10**9), "seconds": (0, 10**9, 1.5, 2**63, 2**64),
    }  # fmt: skip

    def valid(damage: Damage, entries: list[Any]) -> bool:
        if damage.name.startswith("bit flip"):
            return True
        if damage.content and not damage.content.split(b"\n")[number].strip():
            return False
        # An entry of a list has the key of the list. The test below compares the tokens of a prompt
        # with the request.
        if damage.key.endswith("tokens") and damage.value is REMOVED and ".0" in damage.name:
            return True
        return any(
            type(value) is type(damage.value) and value == damage.value
            for value in possible.get(damage.key, ())
        )

    sweep(path, lines_of(path, number), read, valid)


def test_a_response_that_no_request_of_these_settings_has(tmp_path: Path) -> None:
    from fastadapt.evaluation.generation.gumbel import request_seed
    from fastadapt.evaluation.generation.sampling import Request, _check_old

    request = Request("0", (1, 2))
    seed = request_seed(0, "0", 0)

    def check(**changes: Any) -> None:
        old = {request.key: _with(**{"seed": seed, **changes})}
        _check_old([request], old, tmp_path / "0.jsonl", 0, {request.key: 4}, 6)

    check()
    for changes, reason in (
        ({"seed": seed + 1}, "seed: expected"),
        ({"tokens": []}, "tokens: expected 1 to 4, got 0"),
        ({"tokens": [1] * 5}, "tokens: expected 1 to 4, got 5"),
        ({"tokens": [6]}, "tokens: expected ids below 6, got 6"),
        ({"cut": 9}, "cut: expected at most 3, got 9"),
        ({"prompt_tokens": [1]}, "a different prompt"),
    ):
        with pytest.raises(UserError, match=rf"0\.jsonl.*{reason}"):
            check(**changes)


def _with(**changes: Any) -> Response:
    return Response(**{**vars(RESPONSE), **changes})


def test_rows_of_a_benchmark(tmp_path: Path) -> None:
    path = tmp_path / "sums.rows.jsonl"
    text = "so\u2028it is 4"
    _write([Row(f"q{i}", 0, True, "4", 12, "eos", None, 1, text) for i in (0, 1)], path)
    assert [row.text for row in read_rows(path)] == [text] * 2
    possible = {
        "question": ("x", "12"), "answer": ("x", "12"), "text": ("x", "12"),
        **dict.fromkeys(("repetition", "length_tokens", "hesitations", "cut"), (0, 10**9)),
    }  # fmt: skip

    def valid(damage: Damage, _: Any) -> bool:
        return damage.name.startswith("bit flip") or any(
            type(value) is type(damage.value) and value == damage.value
            for value in possible.get(damage.key, ())
        )

    cases = lines_of(path, 1)
    sweep(path, cases, lambda: read_rows(path), valid)
    sweep(path, list(raw(path.read_bytes())), lambda: read_rows(path), _cut_at_a_line(path))


def _cut_at_a_line(path: Path) -> Callable[[Damage, Any], bool]:
    content = path.read_bytes()
    whole = {content[:i] for i in range(len(content)) if content[:i].endswith(b"\n")}

    def valid(damage: Damage, _: Any) -> bool:
        return damage.content in (*whole, b"") or damage.name.startswith("bit flip")

    return valid


# --- questions ------------------------------------------------------------------------------------


@pytest.mark.parametrize("task", ["math500", "gpqa_diamond"])
def test_questions_of_the_user(task: str, tmp_path: Path) -> None:
    benchmark, path = BENCHMARKS[task], tmp_path / f"{task}.jsonl"
    columns = (*benchmark.columns, benchmark.solution)
    row = {column: f"{i} is 1?" for i, column in enumerate(columns)}
    path.write_text("".join(json.dumps(row) + "\n" for _ in range(3)))

    def read() -> list[Any]:
        return questions(task, family="r1-distill", data=str(tmp_path), few_shot=0, seed=0)

    def valid(damage: Damage, _: Any) -> bool:
        if damage.name == "empty" or damage.name.startswith(
            "bit flip"
        ):  # a missing row or other text
            return True
        if damage.key == benchmark.solution and (damage.value is None or damage.value is REMOVED):
            return True
        # Text and numbers are valid values; keys that are no columns are ignored.
        return damage.key != "" and type(damage.value) in (str, int, float)

    sweep(path, lines_of(path, 1), read, valid, (path.name, f"benchmark {task}, row 2"))
    sweep(
        path,
        list(raw(path.read_bytes())),
        read,
        lambda d, _: d.name.startswith(("bit flip", "cut")),
        (path.name, f"benchmark {task}"),
    )


# --- runs -----------------------------------------------------------------------------------------


def test_the_configuration_that_an_evaluation_reads(tmp_path: Path) -> None:
    (tmp_path / "adapter").mkdir()
    path = tmp_path / "config.yaml"
    pair = {"target": "t", "base": "b", "dtype": "float32"}
    data = {"validation": "v", "validation_split": "s", "revision": None, "family": "f"}
    path.write_text(json.dumps({"pair": pair, "data": data}))
    named = {"target": "t", "base": "b"}

    def read() -> None:
        read_pair(tmp_path / "adapter", named)
        held_out(tmp_path)

    possible = ("validation", "validation_split", "revision", "family", "dtype")

    def valid(damage: Damage, _: Any) -> bool:
        if damage.name.startswith("bit flip") or damage.name == "folder":
            return True
        optional = damage.key == "dtype" and damage.value is REMOVED
        none = damage.key == "revision" and damage.value is None
        return optional or none or (damage.key in possible and isinstance(damage.value, str))

    sweep(path, variants(path), read, valid, (path.name, "adapter", "dtype"))
