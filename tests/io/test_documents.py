"""JSON and YAML documents that are refused, with their messages."""

import os
import re
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from typing_extensions import NotRequired, TypedDict

from fastadapt.io.documents import (
    MAX_DEPTH,
    Count,
    DocumentError,
    Sha256,
    check,
    parse_json,
    parse_line,
    parse_yaml,
    read_json,
    read_yaml,
)


class Entry(TypedDict):
    bytes: Count
    sha256: Sha256


class Manifest(TypedDict):
    files: dict[str, Entry]
    step: NotRequired[int]


GOOD = {"bytes": 1, "sha256": "a" * 64}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[" * 100_000, "doc is nested more than 64 levels deep"),
        ("[" * 100_000 + "]" * 100_000, "doc is nested more than 64 levels deep"),
        ("[" * 66 + "]" * 66, "doc is nested more than 64 levels deep"),
        ('{"a":' * 400 + "1" + "}" * 400, "doc is nested more than 64 levels deep"),
        ('{"a": ' + "1" * 5000 + "}", "doc is not valid JSON: Exceeds the limit"),
        ('{"a": 1, "b": 2, "a": 3}', "doc is not valid JSON: the key 'a' occurs twice"),
        ('{"a": NaN}', "doc is not valid JSON: NaN is not a JSON number"),
        ('{"a": -Infinity}', "doc is not valid JSON: -Infinity is not a JSON number"),
        ("", "doc is not valid JSON: Expecting value at line 1, column 1"),
        ('{"a": 1', "doc is not valid JSON: Expecting ',' delimiter at line 1, column 8"),
        (b"\xff\xfe", "doc is not UTF-8: invalid start byte at byte 0"),
    ],
)
def test_what_is_no_json_is_refused(text: str | bytes, message: str) -> None:
    with pytest.raises(DocumentError) as raised:
        parse_json(text, "doc")
    assert str(raised.value).startswith(message)


def test_depth_is_counted_in_levels_not_in_brackets() -> None:
    deepest = "[" * MAX_DEPTH + "]" * MAX_DEPTH
    assert parse_json(deepest, "doc") is not None
    wide = "[" + ",".join(["[]"] * 5000) + "]"
    assert len(parse_json(wide, "doc")) == 5000


def test_constants_are_read_where_they_are_allowed() -> None:
    assert parse_json('{"a": Infinity}', "doc", constants=True) == {"a": float("inf")}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: 1\nb: 2\na: 3", "doc is not valid YAML: the key 'a' occurs twice at line 3, column 1"),
        ("run:\n  x: 1\n  x: 2", "doc is not valid YAML: the key 'x' occurs twice at line 3"),
        ("a: " + "[" * 100_000, "doc is nested more than 64 levels deep"),
        ("a: " + "[" * 70 + "]" * 70, "doc is nested more than 64 levels deep"),
        ("a: &x [*x]", "doc is not valid YAML: aliases expand to more than 1,000,000 values"),
        ("a: " + "1" * 5000, "doc is not valid YAML: Exceeds the limit"),
        ("a: 2024-13-45", "doc is not valid YAML: month must be in 1..12"),
        ("[a]: 1", "doc is not valid YAML: found unhashable key at line 1, column 1"),
        ("a: !!python/object:os.system x", "doc is not valid YAML: could not determine"),
        ("a: \0", "doc is not valid YAML: unacceptable character"),
        (b"a: \xff", "doc is not UTF-8: invalid start byte at byte 3"),
    ],
)
def test_what_is_no_yaml_is_refused(text: str | bytes, message: str) -> None:
    with pytest.raises(DocumentError) as raised:
        parse_yaml(text, "doc")
    assert str(raised.value).startswith(message)


def test_aliases_that_expand_without_end_are_refused() -> None:
    lines = ["a0: &a0 [1, 1, 1, 1, 1, 1, 1, 1, 1, 1]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 30)]
    with pytest.raises(DocumentError, match="aliases expand to more than 1,000,000 values"):
        parse_yaml("\n".join(lines), "doc")


def test_merged_keys_may_be_overridden() -> None:
    text = "x: &x {a: 1, b: 1}\ny:\n  <<: *x\n  b: 2"
    assert parse_yaml(text, "doc")["y"] == {"a": 1, "b": 2}
    twice = "o: {i: &b {<<: &a {x: 1}, x: 2}}\nc: {<<: *b}"  # the merged node is visited twice
    assert parse_yaml(twice, "doc") == {"o": {"i": {"x": 2}}, "c": {"x": 2}}


def test_merges_that_expand_without_end_are_refused() -> None:
    lines = ["a0: &a0 {x: 1}"]
    lines += [f"a{i}: &a{i} {{<<: [{', '.join([f'*a{i - 1}'] * 10)}]}}" for i in range(1, 10)]
    with pytest.raises(DocumentError, match="aliases expand to more than 1,000,000 values"):
        parse_yaml("\n".join(lines), "doc")
    with pytest.raises(DocumentError, match="aliases expand to more than"):
        parse_yaml("a: &a [*a]", "doc")


@pytest.mark.parametrize(
    "value",
    ["!!bool maybe", '!!int ""', '!!int "_"', '!!int "-"', '!!float ""', "!!timestamp x",
     "!!set [1]", "!!omap x", "!!binary x", "0x" + "f" * 6000, "1" + ":59" * 4000],
)  # fmt: skip
def test_values_that_their_tag_or_form_belies_are_refused(value: str) -> None:
    with pytest.raises(DocumentError, match=r"^doc") as raised:
        parse_yaml(f"a: {value}", "doc", dict[str, str])
    assert len(str(raised.value)) < 400


@pytest.mark.parametrize("parse", [parse_json, partial(parse_line, schema=dict), parse_yaml])
@pytest.mark.parametrize("text", ['{"x\\ud800": 1}', '{"x": "a\\uDfffb"}', '{"x": ["\\ud83d"]}'])
def test_half_a_character_is_refused(parse: Callable, text: str) -> None:
    with pytest.raises(DocumentError, match=r"doc: .*half of a surrogate pair in"):
        parse(text, "doc")
    assert parse_json('{"x": "\\ud83d\\ude00"}', "doc") == {"x": "\U0001f600"}


def test_many_keys_of_which_one_comes_twice_take_no_time() -> None:
    text = "{" + ",".join(f'"{i}": 0' for i in range(100_000)) + ', "99999": 0}'
    begun = time.process_time()
    with pytest.raises(DocumentError, match="the key '99999' occurs twice"):
        parse_json(text, "doc")
    assert time.process_time() - begun < 5  # comparing all pairs of keys takes minutes


def test_a_line_may_not_be_nested_deeper_than_a_document() -> None:
    text = '{"x": ' + "[" * 700 + "]" * 700 + "}"
    with pytest.raises(DocumentError, match="doc is nested more than 64 levels deep"):
        parse_line(text, "doc")


def test_what_is_no_file_is_not_waited_for(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe.json"
    os.mkfifo(pipe)
    for read in (read_json, read_yaml):
        with pytest.raises(DocumentError, match=r"pipe\.json .*Not a regular file"):
            read(pipe)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("[]", "doc: expected object, got array"),
        ("{}", "doc: object missing required field files"),
        ('{"files": [1]}', "doc: files: expected object, got array"),
        ('{"files": {}, "step": true}', "doc: step: expected int, got bool"),
        ('{"files": {}, "step": 1.0}', "doc: step: expected int, got float"),
        ('{"files": {}, "step": "1"}', "doc: step: expected int, got str"),
        ('{"files": {"x": 3}}', "doc: files['x']: expected object, got int"),
        ('{"files": {"x": {"bytes": -1}}}', "doc: files['x'].bytes: expected int >= 0"),
        ('{"files": {"x": {"bytes": 1}}}', "doc: files['x']: object missing required field sha256"),
    ],
)
def test_values_are_held_against_the_schema(value: str, message: str) -> None:
    with pytest.raises(DocumentError) as raised:
        parse_json(value, "doc", Manifest)
    assert str(raised.value) == message


def test_the_entry_at_fault_is_named_among_many() -> None:
    files = {f"f{i}": dict(GOOD) for i in range(20)}
    files["f13"]["sha256"] = "no"
    import json

    with pytest.raises(DocumentError, match=r"^doc: files\['f13'\]\.sha256: "):
        parse_json(json.dumps({"files": files}), "doc", Manifest)


@pytest.mark.parametrize(
    ("value", "named"),
    [
        ({"a": {"b": {"c": [1, "x"]}}}, "['a']['b']['c'][1]"),
        (
            {"a": {"b": {"c": [1]}}, "d.e": {"b": {}, "f": {"g": [2], "h": ["x"]}}},
            "['d.e']['f']['h'][0]",
        ),
        ({"a": {"b": {"c": []}}, "[0]": {"b": {"c": None}}}, "['[0]']['b']['c']"),
        ({"a": {"b": 1}}, "['a']['b']"),
    ],
)
def test_the_entry_at_fault_is_named_in_objects_within_objects(value: object, named: str) -> None:
    with pytest.raises(DocumentError, match=re.escape(f"card.json: {named}: expected ")):
        check(value, dict[str, dict[str, dict[str, list[int]]]], "card.json")


def test_a_document_keeps_what_its_schema_does_not_name(tmp_path: Path) -> None:
    path = tmp_path / "m.json"
    path.write_text('{"files": {}, "other": [1]}')
    assert read_json(path, Manifest) == {"files": {}, "other": [1]}


@pytest.mark.parametrize("read", [read_json, read_yaml])
def test_files_that_cannot_be_read_are_named(read: Callable[..., Any], tmp_path: Path) -> None:
    with pytest.raises(DocumentError, match=r"x\.json is missing"):
        read(tmp_path / "x.json")
    with pytest.raises(DocumentError, match="cannot be read: Is a directory"):
        read(tmp_path)
    with pytest.raises(DocumentError, match="cannot be read: embedded null byte"):
        read(f"{tmp_path}/a\0b")


def test_a_file_beyond_the_limit_is_not_parsed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fastadapt.io.documents.MAX_BYTES", 10)
    path = tmp_path / "big.json"
    path.write_text("[" + "1," * 10 + "1]")
    with pytest.raises(DocumentError, match="has more than 10 bytes"):
        read_json(path)
