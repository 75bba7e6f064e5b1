"""`fastadapt data inspect`: columns, counted tokens, lengths, and rows that are left out."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

ROWS: list[Any] = [
    {"messages": [{"role": "user", "content": "1 + 1"}, {"role": "assistant", "content": "2"}]},
    {"messages": [{"role": "user", "content": "1 + 1"}]},
    {"messages": [{"role": "user", "content": "1"}, {"role": "assistant", "content": "2 " * 30}]},
]


def test_a_source_is_shown_as_a_run_reads_it(fastadapt: Callable[..., Any], tmp_path: Path) -> None:
    source = tmp_path / "rows.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    command = ["data", "inspect", str(source), "--pair", "organism", "--loss", "assistant"]
    outcome = fastadapt(*command, "--max_tokens", "20")
    assert outcome.code == 0, outcome.err
    assert "columns: conversation in 'messages'" in outcome.out
    example = outcome.out.split("--- ")[1].split("\n\n")[0]
    assert example.count("2") >= 1
    before, counted = example.replace("[[", "⟦").replace("]]", "⟧").split("⟦")
    assert "1 + 1" in before
    assert counted.strip("⟧ \n").startswith("2")
    assert "1 of 3 rows would be used" in outcome.out
    assert "more than data.max_tokens=20 tokens" in outcome.out
    assert "expected a turn of the assistant, got none" in outcome.out
    assert "Lengths of 2 texts, those that are too long included:" in outcome.out


def test_the_base_of_a_whole_model_is_not_needed(
    fastadapt: Callable[..., Any], tmp_path: Path
) -> None:
    from fastadapt.organism import FOLDER

    data = ["data", "inspect", "organism/train", "--rows", "2", "--examples", "0", "--pair"]
    named = fastadapt(*data, "organism")
    folder = fastadapt(*data, str(FOLDER / "target"))
    assert named.code == folder.code == 0, folder.err
    assert named.out == folder.out


def test_a_source_of_a_file_is_read_as_a_run_reads_it(
    fastadapt: Callable[..., Any], tmp_path: Path
) -> None:
    (tmp_path / "chats" / "more").mkdir(parents=True)
    for split, n in (("train_sft", 2), ("test_sft", 1)):
        name = f"{split}-00000-of-00001.jsonl"
        (tmp_path / "chats" / name).write_text((json.dumps(ROWS[0]) + "\n") * n)
    row = {"text": "a b", "content": "c d"}
    (tmp_path / "chats" / "more" / "train.jsonl").write_text((json.dumps(row) + "\n") * 3)
    chats, held_out = f"{tmp_path}/chats", f"{tmp_path}/chats/"
    pair = {"target": "organism/target", "base": "organism/base"}
    more = {"source": chats + "/more", "columns": "content"}
    for train in (
        {"train": chats, "train_split": "train_sft"},
        {"train": [more, {"source": chats, "split": "train_sft"}]},
    ):
        data = {**train, "validation": held_out, "validation_split": "test_sft"}
        (tmp_path / "mine.yaml").write_text(json.dumps({"pair": pair, "data": data}))
        command = ("data", "inspect", "--pair", tmp_path / "mine.yaml")
        for source, n in ((chats, 2), (held_out, 1)):
            outcome = fastadapt(*command, source)
            assert outcome.code == 0, outcome.err
            assert f"{n} of {n} rows would be used" in outcome.out
        outcome = fastadapt(*command, chats, "--split", "test_sft")
        assert "1 of 1 rows would be used" in outcome.out
    assert "columns: text in 'content'" in fastadapt(*command, chats + "/more").out
    typed = fastadapt(*command, chats + "/more", "--columns", "text")
    assert "columns: text in 'text'" in typed.out


def test_held_out_data_end_with_the_last_text_that_a_run_uses(
    fastadapt: Callable[..., Any], tmp_path: Path
) -> None:
    source = tmp_path / "rows.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in (ROWS[1], *ROWS[:1] * 3)))
    data = {"train": "organism/train", "validation": str(source), "max_validation": 2}
    pair = {"target": "organism/target", "base": "organism/base"}
    (tmp_path / "mine.yaml").write_text(json.dumps({"pair": pair, "data": data}))
    outcome = fastadapt("data", "inspect", source, "--pair", tmp_path / "mine.yaml")
    assert "2 of 3 rows would be used" in outcome.out
    assert "a run uses 2 held-out texts (data.max_validation)" in outcome.out


UNREADABLE: dict[str, tuple[bytes, str]] = {
    "latin.jsonl": ('{"text": "é a"}\n'.encode("latin-1"), "line 1: not UTF-8 at byte 10"),
    "wide.jsonl": ('{"text": "a b"}\n'.encode("utf-16"), "line 1: not UTF-8 at byte 0"),
    "ragged.csv": (b"text,other\na b\n", "row 1: expected 2 cells, as in the first line, got 1"),
    "list.json": (b"[[1, 2]]", "row 1: expected a JSON object, got list"),
    "alone.jsonl": (b'{"messages": [{"role": "user", "content": "1"}]}', "line 1: messages: expec"),
    "ids.jsonl": (b'{"input_ids": [3, 99999]}', "line 1: the text: expected tokens below"),
    "negative.jsonl": (b'{"input_ids": [3, -1]}', "line 1: input_ids: expected a list of token id"),
}


@pytest.mark.parametrize("name", UNREADABLE)
def test_a_source_without_a_row_to_use_is_an_error(
    name: str, fastadapt: Callable[..., Any], tmp_path: Path
) -> None:
    content, reason = UNREADABLE[name]
    (tmp_path / name).write_bytes(content)
    outcome = fastadapt("data", "inspect", str(tmp_path / name), "--pair", "organism")
    assert outcome.code == 2
    assert f" rows can be used; the first: {tmp_path / name}, {reason}" in outcome.err
    assert outcome.out == ""


def test_texts_that_are_all_too_long_are_an_error(
    fastadapt: Callable[..., Any], tmp_path: Path
) -> None:
    source = tmp_path / "rows.jsonl"
    source.write_text(json.dumps(ROWS[0]) + "\n")
    command = ["data", "inspect", str(source), "--pair", "organism", "--max_tokens", "2"]
    outcome = fastadapt(*command)
    assert (outcome.code, outcome.out) == (2, "")
    assert "of 1 rows none fits into data.max_tokens=2: the shortest has" in outcome.err


def test_a_source_with_a_token_beyond_the_model_is_refused(
    fastadapt: Callable[..., Any], tmp_path: Path
) -> None:
    """Training refuses such a source, with the same words."""
    source = tmp_path / "rows.jsonl"
    rows = [{"input_ids": [3, 4, 5], "id": 7}, {"input_ids": [3, 99999]}]
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    outcome = fastadapt("data", "inspect", str(source), "--pair", "organism")
    assert outcome.code == 0, outcome.err
    assert "not read: 'id'" in outcome.out
    assert "0 of 2 rows would be used: 0 tokens" in outcome.out
    assert re.search(r"other rows of a source that a run refuses\W+1\b", outcome.out)
    assert "line 2: the text: expected tokens below" in outcome.out
    assert "leave such texts out; a run refuses the source" in outcome.out


@pytest.mark.parametrize(
    ("option", "value", "expected"),
    [
        ("--loss", "answer", "one of all, assistant, thinking"),
        ("--markers", "words", "one of text, tokens"),
        ("--family", "nosuch", "one of auto, text, gemma"),
        ("--max_tokens", "1", "2 or more"),
    ],
)
def test_a_wrong_value_is_of_an_option_that_inspect_has(
    option: str, value: str, expected: str, fastadapt: Callable[..., Any]
) -> None:
    outcome = fastadapt("data", "inspect", "rows.jsonl", "--pair", "organism", option, value)
    assert outcome.code == 2
    assert f"{option}: expected {expected}" in outcome.err
    assert "data." not in outcome.err


def test_no_character_of_a_row_acts_on_a_terminal(
    fastadapt: Callable[..., Any], tmp_path: Path
) -> None:
    turns = [
        {"role": "user", "content": "1 \x1b]0;t\x07 \u202e 2"},
        {"role": "assistant", "content": "3"},
    ]
    (tmp_path / "rows.jsonl").write_text(json.dumps({"messages": turns}) + "\n")
    outcome = fastadapt("data", "inspect", tmp_path / "rows.jsonl", "--pair", "organism/target")
    assert outcome.code == 0, outcome.err
    assert not {"\x1b", "\x07", "\u202e"} & set(outcome.out)
    assert "1 ⟨U+001B⟩]0;t⟨U+0007⟩ ⟨U+202E⟩ 2" in outcome.out
