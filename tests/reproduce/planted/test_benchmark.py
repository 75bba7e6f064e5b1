"""Counts of what was described, the claims, their tables, and the command that writes them."""

from __future__ import annotations

import copy
import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from fastadapt.errors import UserError
from reproduce.planted.__main__ import RESULT, SETTINGS, TABLES, main, settings_of
from reproduce.planted.organisms import SIZES, adapter_config
from reproduce.planted.scores import BUDGETS, INSPECTED, summarise, tables
from reproduce.planted.units import ADAPTER, BASELINES, KL, SHUFFLED

K = 4
KINDS = ("fact", "style", "trigger", "skill")


def organism(**described: list[list[int]]) -> dict[str, Any]:
    """Return what was measured of one organism, in which methods describe nothing but this."""
    methods: dict[str, list[list[int]]] = {
        name: [[] for _ in range(K * BUDGETS[-1])] for name in (ADAPTER, SHUFFLED, *BASELINES)
    }
    return {
        "differences": [
            {"kind": kind, "words": "usual" if i % 2 else "new", "text": kind, "places": 9}
            for i, kind in enumerate(KINDS)
        ],
        "probability": {"base": [0.0] * K, "target": [0.9] * K},
        "described": {**methods, **described},
        "units": {},
    }


def placed(*ranks: tuple[int, int]) -> list[list[int]]:
    """Return the described differences of a method's units, from (rank, difference) pairs."""
    units: list[list[int]] = [[] for _ in range(K * BUDGETS[-1])]
    for rank, difference in ranks:
        units[rank].append(difference)
    return units


ALL = placed((0, 0), (3, 1), (4, 2), (39, 3))
SEEDS = [
    {
        "planted": organism(**{ADAPTER: ALL, KL: placed((0, 0), (1, 1))}),
        "null": organism(**{ADAPTER: placed((19, 0)), KL: placed((20, 0))}),
    }
    for _ in range(3)
]


def summary(seeds: list[Any]) -> dict[str, Any]:
    return {"settings": {"seeds": len(seeds), "size": "full"}, **summarise(seeds)}


def test_recall_counts_the_first_units() -> None:
    methods = summary(SEEDS)["methods"]
    recall = {int(b): i["mean"] for b, i in methods[ADAPTER]["recall"].items()}
    assert recall == {1: 0.5, 2: 0.75, 5: 0.75, 10: 1.0}  # of 4, 8, 20 and 40 units
    assert methods[ADAPTER]["by_kind"] == dict.fromkeys(KINDS, 1.0)
    assert methods[KL]["recall"]["10"]["mean"] == 0.5
    assert methods[KL]["by_words"] == {"new": 0.5, "usual": 0.5}
    assert methods[KL]["adapter_minus"]["mean"] == 0.5
    assert methods[ADAPTER]["adapter_minus"] is None


def test_false_discoveries_are_of_the_nulls_first_units() -> None:
    methods = summary(SEEDS)["methods"]
    assert methods[ADAPTER]["false"]["mean"] == pytest.approx(1.0)  # unit 20 counts
    assert methods[KL]["false"]["mean"] == 0.0  # unit 21 does not
    assert 0 < methods[KL]["false"]["high"] < INSPECTED  # none of 60 is no proof of none


def claims(seeds: list[Any]) -> list[str]:
    return [row[-1] for row in tables(summary(seeds))[1].rows]


def test_claims_follow_the_counts() -> None:
    recall, false, *above = claims(SEEDS)
    assert (recall, false) == ("yes, not clearly", "yes, not clearly")
    assert above == ["yes", "yes, not clearly", "yes", "yes"]  # KL has half of them
    worse = copy.deepcopy(SEEDS)
    for seed in worse:
        seed["planted"]["described"][ADAPTER] = placed((0, 0))
        seed["null"]["described"][ADAPTER] = placed(*((i, 0) for i in range(10)))
    recall, false, *above = claims(worse)
    assert recall.startswith("no")
    assert false.startswith("no")
    assert above[1].startswith("no")  # one difference against two


def test_tables_show_every_method_and_difference() -> None:
    methods, verdicts, planted = tables(summary(SEEDS))
    assert [row[0] for row in methods.rows] == [ADAPTER, SHUFFLED, *BASELINES]
    assert all(len(row) == len(t.head) for t in (methods, verdicts, planted) for row in t.rows)
    assert len(planted.rows) == 3 * K
    assert planted.rows[0][-3:] == ["0.0%", "90.0%", "90.0%"]


# --- the command ---

ROOT = Path(__file__).parents[3]


def run(out: Path, *arguments: str, size: str = "small") -> int:
    return main(["--out", str(out), "--size", size, *arguments])


def finished(out: Path, seeds: int) -> None:
    """Write what a benchmark leaves before its tables."""
    for seed, measured in enumerate(SEEDS[:seeds]):
        for role, values in measured.items():
            folder = out / f"seed{seed}" / role
            folder.mkdir(parents=True)
            (folder / "described.json").write_text(json.dumps(values))


def test_one_seed_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"--seeds: expected 2 or more.*got 1"):
        run(tmp_path / "a", "--seeds", "1")
    assert not (tmp_path / "a").exists()


def test_other_files_and_other_sizes_are_refused(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match=r"--out: .* not of this benchmark \(it holds notes.txt\)"):
        run(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["notes.txt"]
    for number, settings in enumerate((settings_of("full"), settings_of("small") | {"texts": ""})):
        out = tmp_path / str(number)
        out.mkdir()
        (out / SETTINGS).write_text(json.dumps(settings))
        with pytest.raises(UserError, match=r"--out: .* another size, or .*; give the same --size"):
            run(out)


def test_finished_parts_are_not_repeated(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    finished(tmp_path, 3)
    (tmp_path / SETTINGS).write_text(json.dumps(settings_of("small")))
    assert run(tmp_path) == 0
    result: Any = json.loads((tmp_path / RESULT).read_text())
    assert result["settings"]["seeds"] == 3
    assert result["methods"][ADAPTER]["recall"]["10"]["mean"] == 1.0
    text = (tmp_path / TABLES).read_text()
    assert "## Planted differences" in text
    assert "| style | usual |" in text
    printed = capsys.readouterr().out
    assert "recall at 10 per difference ≥ 0.8" in printed


def test_a_damaged_part_is_named(tmp_path: Path) -> None:
    finished(tmp_path, 3)
    (tmp_path / SETTINGS).write_text(json.dumps(settings_of("small")))
    (tmp_path / "seed1" / "null" / "described.json").write_text("{")
    with pytest.raises(UserError, match=r"seed1/null/described.json"):
        run(tmp_path)


def test_adapters_are_the_presets(tmp_path: Path) -> None:
    config = adapter_config(tmp_path / "planted" / "target", tmp_path, SIZES["full"], 3)
    assert (config.objective.sparsity, config.run.threads) == (0.03, 1)
    assert (config.data.family, config.run.seed) == ("text", 3)
    steps = SIZES["full"].train_texts // SIZES["full"].adapter_batch_size
    assert config.optimizer.max_steps == steps  # every text once


@pytest.mark.slow
def test_a_killed_benchmark_resumes_to_the_same_result(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "reproduce.planted", "--size", "small", "--seeds", "2"]
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    subprocess.run([*command, "--out", str(whole)], cwd=ROOT, check=True, capture_output=True)
    for part in ("seed0/planted/target/config.json", "seed0/null/run/summary.json"):
        process = subprocess.Popen([*command, "--out", str(cut)], cwd=ROOT)
        while not (cut / part).exists() and process.poll() is None:
            time.sleep(0.05)
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert not (cut / RESULT).exists()
    subprocess.run([*command, "--out", str(cut)], cwd=ROOT, check=True, capture_output=True)
    assert (cut / RESULT).read_bytes() == (whole / RESULT).read_bytes()
    assert (cut / TABLES).read_bytes() == (whole / TABLES).read_bytes()
