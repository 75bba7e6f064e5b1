"""The fingerprint of a source differs where other texts of the same file are read."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path

from fastadapt.data import sources
from fastadapt.data.sources import read_contents
from fastadapt.features.collect.texts import Source

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
