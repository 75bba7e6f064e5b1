"""The fingerprint of a source differs where other texts of the same file are read."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from fastadapt.data import sources
from fastadapt.data.sources import read_contents
from fastadapt.errors import UserError
from fastadapt.features.collect.config import Shard
from fastadapt.features.collect.merging import Part, merged_texts
from fastadapt.features.collect.texts import GROUP, Source, prepare
from fastadapt.organism import resolve

TURNS = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]


def test_a_system_column_is_part_of_the_fingerprint(tmp_path: Path) -> None:
    """Earlier versions did not read it: their shards must not be merged with new ones."""
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"system": "c", "messages": TURNS}) + "\n")
    source = Source(str(path), "train", None, "qwen", None, 100)
    read = source.fingerprint()
    alone = dataclasses.replace(source, columns="messages")
    both = dataclasses.replace(source, columns="system,messages")
    assert len({read, alone.fingerprint(), both.fingerprint()}) == 3


def test_a_system_column_beside_a_prompt_as_turns_is_part_of_the_fingerprint(
    tmp_path: Path,
) -> None:
    path = tmp_path / "rows.jsonl"
    row = {"system": "c", "prompt": TURNS[:1], "response": TURNS[1:]}
    path.write_text(json.dumps(row) + "\n")
    layout, _ = read_contents(sources.Source(str(path)))
    assert layout is not None
    assert layout.system_columns == ("system",)
    path.write_text(json.dumps({**row, "prompt": "a", "response": "b"}) + "\n")
    layout, _ = read_contents(sources.Source(str(path)))
    assert layout is not None
    assert layout.system_columns == ()


def test_the_commit_of_a_hub_dataset_is_part_of_the_fingerprint(
    cached_dataset: Callable[..., Path],
) -> None:
    source = Source("some/rows", "train", None, "qwen", None, 100)
    fingerprints = []
    for commit, row in (
        ("a" * 40, {"messages": TURNS}),
        ("b" * 40, {"messages": TURNS}),
        ("b" * 40, {"messages": TURNS, "system": "c"}),
    ):
        folder = cached_dataset("some/rows", commit, [row])
        fingerprints.append(source.fingerprint())
        shutil.rmtree(folder)
    assert len(set(fingerprints)) == 3


def test_the_fingerprint_without_a_system_column_is_that_of_earlier_versions(
    tmp_path: Path,
) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"messages": TURNS}) + "\n")
    fingerprint = Source(str(path), "train", None, "qwen", None, 100).fingerprint()
    expected = "2ce7ae63ad8207b513490ff18349963f216b248c0646dd8ac51ddf7941f33101"
    assert fingerprint == expected


def test_rows_left_out_are_counted_once_over_all_shards(tmp_path: Path) -> None:
    """A line that is no JSON has no shard; a row of one token has one."""
    tokenizer = AutoTokenizer.from_pretrained(resolve("organism/target"))
    path = tmp_path / "rows.jsonl"
    rows = [json.dumps({"input_ids": [3, 4, 5]})] * (2 * GROUP)
    rows[1] = rows[GROUP + 1] = json.dumps({"input_ids": [3]})
    rows[7] = "{"
    path.write_text("".join(row + "\n" for row in rows))
    source = Source(str(path), "train", None, "r1-distill", None, 100, bad_rows="skip")
    counts = []
    for i, n in ((0, 1), (0, 2), (1, 2)):
        prepared = prepare(source, tokenizer, Shard(i, n), tmp_path / "texts", max_tokens=100)
        counts.append((prepared.texts, prepared.bad_rows))
    assert counts == [(2 * GROUP - 3, 3), (GROUP - 2, 2), (GROUP - 1, 1)]
    path.write_text(rows[7] + "\n" + rows[1] + "\n")
    with pytest.raises(UserError, match=r"none of the conversations can be used; .*line 1"):
        prepare(source, tokenizer, Shard(), tmp_path / "texts", max_tokens=100)
    path.write_text(rows[0] + "\n" + rows[7] + "\n")
    too_long = prepare(source, tokenizer, Shard(), tmp_path / "texts", max_tokens=2)
    assert (too_long.too_long, too_long.bad_rows) == (1, 1)  # begin() names the option to raise


def test_bad_rows_of_an_earlier_versions_shard_are_not_counted_as_none() -> None:
    prepared = {"read": 9, "too_long": 0, "texts": 4, "tokens": 40, "domains": []}
    earlier, later = prepared, {**prepared, "bad_rows": 1}
    for shards, expected in (((later, later), 2), ((earlier, later), None)):
        parts = [Part(Path(), {"prepared": each}) for each in shards]
        assert merged_texts(parts).bad_rows == expected
