"""The fingerprint of a source differs where other texts of the same file are read."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

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


def test_the_fingerprint_without_a_system_column_is_that_of_earlier_versions(
    tmp_path: Path,
) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"messages": TURNS}) + "\n")
    fingerprint = Source(str(path), "train", None, "qwen", None, 100).fingerprint()
    expected = "2ce7ae63ad8207b513490ff18349963f216b248c0646dd8ac51ddf7941f33101"
    assert fingerprint == expected
