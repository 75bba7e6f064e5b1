"""`fastadapt data inspect`: columns, counted tokens, lengths, and rows that are left out."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

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


def test_the_base_of_a_whole_model_is_not_needed(
    fastadapt: Callable[..., Any], tmp_path: Path
) -> None:
    from fastadapt.organism import FOLDER

    data = ["data", "inspect", "organism/train", "--rows", "2", "--examples", "0", "--pair"]
    named = fastadapt(*data, "organism")
    folder = fastadapt(*data, str(FOLDER / "target"))
    assert named.code == folder.code == 0, folder.err
    assert named.out == folder.out
