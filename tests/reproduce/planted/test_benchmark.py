"""Counts of what was described, the claims, their tables, and the command that writes them."""

from __future__ import annotations

import copy
import json
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import replace
from itertools import count
from pathlib import Path
from threading import Event
from typing import Any

import pytest
import torch

from fastadapt.cli.train import read_configs
from fastadapt.errors import UserError
from fastadapt.io.atomic import locked
from fastadapt.training.config import load_config, save_config
from reproduce.parts import MEASURED, SETTINGS, TABLES, StoppedError
from reproduce.planted import units
from reproduce.planted.__main__ import main
from reproduce.planted.folder import RESULT, settings_of
from reproduce.planted.judge import CONTEXTS, Judge
from reproduce.planted.measure import Measured, StoredUnit, judge_of, rules
from reproduce.planted.organisms import SIZES, Maker, _move, adapter_config
from reproduce.planted.scores import BUDGETS, Seed, is_in_mlps, is_planted, summarise
from reproduce.planted.tables import tables
from reproduce.planted.units import ADAPTER, BASELINES, KL, SHUFFLED, STATES, TOKENS

KINDS = ("fact", "style", "trigger", "skill")
K = len(KINDS)
#: Difference k is at 20 positions from 20k, and writes token k.
JUDGE = Judge(
    torch.arange(20 * (K + 1)).div(20, rounding_mode="floor") == torch.arange(K)[:, None],
    [frozenset({k}) for k in range(K)],
    424,
)


def unit(judge: Judge, difference: int | None) -> StoredUnit:
    """Return a unit that describes a difference, or none."""
    if difference is None:
        return {"name": "-", "contexts": [0], "promoted": [423]}
    contexts = judge.planted[difference].nonzero()[:CONTEXTS, 0].tolist()
    promoted = sorted(judge.outputs[difference])[:10]
    return {"name": str(difference), "contexts": contexts, "promoted": promoted}


def organism(
    described: Mapping[str, Mapping[int, int]] | None = None, judge: Judge = JUDGE
) -> Measured:
    """Return what was measured of an organism in which methods describe nothing but this.

    Args:
        described: a difference by rank, by method.
        judge: of the organism.
    """
    described = described or {}
    k = len(judge.outputs)
    methods = (ADAPTER, SHUFFLED, *BASELINES)
    return {
        "rules": rules(),
        "differences": [
            {
                "kind": KINDS[i * K // k],  # type: ignore[typeddict-item]
                "words": "usual" if i % 2 else "new",
                "text": f"difference {i}",
                "places": 20,
                "probability": {"base": 0.0, "target": 0.9, "hybrid": 0.6 if i % 2 else 0.1},
                "elsewhere": {"base": 0.0, "target": 0.01},
            }
            for i in range(k)
        ],
        "units": {
            name: [
                unit(judge, described.get(name, {}).get(rank)) for rank in range(k * BUDGETS[-1])
            ]
            for name in methods
        },
    }


ALL = {0: 0, 3: 1, 4: 2, 39: 3}
SEEDS = [
    Seed(
        number,
        JUDGE,
        organism({ADAPTER: ALL, KL: {0: 0, 1: 1}}),
        organism({ADAPTER: {19: 0}, KL: {20: 0}}),
    )
    for number in range(1, 9)
]


def summary(seeds: list[Seed]) -> dict[str, Any]:
    numbers = [seed.number for seed in seeds]
    nulls = [seed.number for seed in seeds if seed.null is not None]
    settings = {"seeds": numbers, "nulls": nulls, "size": "full", "vocabulary": 424}
    return {"settings": settings, **summarise(seeds)}


def changed(seeds: list[Seed], **others: dict[int, int]) -> list[Seed]:
    """Return seeds with other descriptions in their planted organisms."""
    return [replace(s, planted=organism({ADAPTER: ALL, **others})) for s in seeds]


@pytest.fixture(scope="module")
def result() -> dict[str, Any]:
    return summary(SEEDS)


def recall(result: dict[str, Any], method: str, part: str = "all") -> dict[int, Any]:
    values = result["methods"][method]["recall"][part]
    return {int(budget): interval["mean"] for budget, interval in values.items()}


def test_recall_counts_the_first_units(result: dict[str, Any]) -> None:
    assert recall(result, ADAPTER) == {1: 0.5, 2: 0.75, 5: 0.75, 10: 1.0}  # 4, 8, 20, 40 units
    assert [recall(result, ADAPTER, kind)[2] for kind in KINDS] == [1.0, 1.0, 1.0, 0.0]
    assert recall(result, KL) == {1: 0.5, 2: 0.5, 5: 0.5, 10: 0.5}
    assert [recall(result, KL, words)[10] for words in ("new", "usual")] == [0.5, 0.5]
    methods = result["methods"]
    assert [methods[KL]["adapter_minus"][str(b)]["mean"] for b in (1, 2, 10)] == [0.0, 0.25, 0.5]
    assert methods[ADAPTER]["adapter_minus"] is None


def test_recall_of_what_is_planted_and_of_what_is_in_the_mlps(result: dict[str, Any]) -> None:
    seeds = [replace(seed, planted=copy.deepcopy(seed.planted)) for seed in SEEDS]
    rows = [seed.planted["differences"] for seed in seeds]
    for each in rows:
        each[1]["probability"]["target"] = 0.79  # not learned
    rows[0][2]["probability"]["base"] = 0.11  # no difference
    rows[1][3]["probability"] = {"base": None, "target": None, "hybrid": None}  # no place
    assert [is_planted(row) for row in rows[0]] == [True, False, False, True]
    assert [is_planted(row) for row in rows[1]] == [True, False, True, False]
    assert [is_in_mlps(row) for row in rows[2]] == [True, False, True, False]  # 3 is in the hybrid
    # At 2 per difference 0, 1 and 2 are described: of the planted ones 1 of 2, 2 of 2, 2 of 3.
    failed = summary(seeds)
    assert recall(failed, ADAPTER)[2] == 0.75
    assert recall(failed, ADAPTER, "planted")[2] == pytest.approx((1 / 2 + 1 + 6 * 2 / 3) / 8)
    assert recall(failed, ADAPTER, "in_mlps") == {1: 0.5625, 2: 1.0, 5: 1.0, 10: 1.0}
    last = tables(failed)[-1]
    assert "seed 1: difference 1; seed 1: difference 2; seed 2: difference 1; seed" in last.note
    assert "All differences are planted." in tables(result)[-1].note
    assert last.rows[K + 3][5:9] == ["–", "90.0%", "–", "–"]  # base, null, hybrid, planted


def test_a_class_without_differences_has_no_recall() -> None:
    seeds = [replace(seed, planted=copy.deepcopy(seed.planted)) for seed in SEEDS[:2]]
    for seed in seeds:
        for row in seed.planted["differences"]:
            row["probability"]["hybrid"] = 0.9
    result = summary(seeds)
    assert set(recall(result, ADAPTER, "in_mlps").values()) == {None}
    assert tables(result)[3].rows[0][-1] == "–"


def described(result: dict[str, Any], method: str) -> dict[str, float]:
    values = result["methods"][method]["described"]
    return {name: interval["mean"] for name, interval in values.items()}


def test_descriptions_are_counted_in_the_first_units(result: dict[str, Any]) -> None:
    """Units 20 of the nulls count, units 21 do not."""
    ours, kl = (described(result, method) for method in (ADAPTER, KL))
    assert ours == pytest.approx({"right": 3, "words_of_others": 0, "null": 1})
    assert kl == pytest.approx({"right": 2, "words_of_others": 0, "null": 0})
    ends = result["methods"][KL]["described"]["null"]
    assert 0 < ends["high"] < 1  # none of 160 is no proof of none


def test_units_that_promote_the_words_of_several_differences_are_counted() -> None:
    seeds = [replace(seed, planted=organism({TOKENS: {0: 0}})) for seed in SEEDS[:2]]
    for seed in seeds:
        seed.planted["units"][TOKENS][0]["promoted"] = [0, 1]
    values = described(summary(seeds), TOKENS)
    assert values["right"] == 1.0
    assert values["words_of_others"] == pytest.approx(1 / 3)  # by those of 1, not of 2 and 3


def test_seeds_without_a_null_count_for_recall_alone(result: dict[str, Any]) -> None:
    partly = summary([replace(seed, null=None) for seed in SEEDS[:5]] + SEEDS[5:])
    assert recall(partly, ADAPTER) == recall(result, ADAPTER)
    assert described(partly, ADAPTER)["null"] == pytest.approx(1.0)
    assert partly["differences"][0]["probability"]["null"] is None
    nothing = summary([replace(seed, null=None) for seed in SEEDS[:2]])
    assert nothing["methods"][ADAPTER]["described"]["null"]["mean"] is None
    assert tables(nothing)[1].rows[1][1:] == ["–", "not measurable"]


# --- the claims ---


def claims(seeds: list[Seed]) -> dict[str, tuple[str, str]]:
    return {claim: (here, holds) for claim, here, holds in tables(summary(seeds))[1].rows}


RECALL, FALSE = "recall at 10 per difference ≥ 0.8", "false discoveries in 20 null units ≤ 1"
ABOVE = "recall at 10 per difference above every simple baseline"


def test_a_perfect_result_is_a_clear_yes() -> None:
    seeds = [replace(seed, null=organism()) for seed in SEEDS]
    perfect = claims(seeds)
    assert perfect[RECALL] == ("100.0% [89.3, 100.0]", "yes")
    assert perfect[FALSE] == ("0 [0, 0.469]", "yes")
    assert perfect[ABOVE][1] == "yes"
    assert claims(seeds[:2])[RECALL][1] == "yes, not clearly"  # eight of eight show less


def test_one_equal_baseline_is_enough_for_a_no() -> None:
    seeds = changed(SEEDS, **{STATES: ALL})
    here, holds = claims(seeds)[ABOVE]
    assert here.startswith("0.0% [")
    assert here.endswith(f"over: {STATES}")
    assert holds == "no, not clearly"  # the recall may be higher with other seeds
    worse = claims([replace(s, planted=organism({ADAPTER: {0: 0}, KL: ALL})) for s in SEEDS])
    assert (worse[ABOVE][1], worse[RECALL][1]) == ("no", "no")


def test_seeds_that_disagree_make_a_claim_unclear() -> None:
    seeds = [*SEEDS[:5], *(replace(s, planted=organism({ADAPTER: {0: 0}})) for s in SEEDS[5:])]
    assert claims(seeds)[RECALL] == ("71.9% [39.4, 100.0]", "no, not clearly")


def test_many_false_discoveries_are_a_no() -> None:
    seeds = [replace(s, null=organism({ADAPTER: dict.fromkeys(range(10), 0)})) for s in SEEDS]
    assert claims(seeds)[FALSE][1] == "no"


def test_tables_have_every_method_and_difference(result: dict[str, Any]) -> None:
    shown = tables(result)
    assert [row[0] for row in shown[0].rows] == [ADAPTER, SHUFFLED, *BASELINES]
    assert all(len(row) == len(table.head) for table in shown for row in table.rows)
    assert len(shown[-1].rows) == len(SEEDS) * K
    assert "40 units are as many as 9% of the vocabulary" in shown[0].note


# --- the command ---

ROOT = Path(__file__).parents[3]


def run(out: Path, *arguments: str, size: str = "small") -> int:
    return main(["--out", str(out), "--size", size, *arguments])


def finished(out: Path, seeds: int, nulls: int) -> None:
    """Write what a benchmark of the small size leaves before its tables, from seed 1 on."""
    out.mkdir(exist_ok=True)
    (out / SETTINGS).write_text(json.dumps(settings_of("small")))
    for seed in range(1, seeds + 1):
        judge = judge_of(seed, SIZES["small"])
        visible = [k for k, places in enumerate(judge.planted) if places.sum() >= 5]
        parts = {"planted": organism({ADAPTER: dict(enumerate(visible))}, judge)}
        if seed <= nulls:
            parts["null"] = organism({}, judge)
        for role, measured in parts.items():
            folder = out / f"seed{seed}" / role
            folder.mkdir(parents=True)
            (folder / MEASURED).write_text(json.dumps(measured))


@pytest.mark.parametrize(
    ("option", "value"), [("--seeds", "0"), ("--first-seed", "-1"), ("--nulls", "-1")]
)
def test_impossible_numbers_are_refused(tmp_path: Path, option: str, value: str) -> None:
    with pytest.raises(UserError, match=rf"{option}: expected \d or more, got {value}"):
        run(tmp_path / "a", option, value)
    assert not (tmp_path / "a").exists()


def test_other_files_and_other_settings_are_refused(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match=r"--out: .* not of this benchmark \(it holds notes.txt\)"):
        run(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["notes.txt"]
    ours = settings_of("small")
    for number, settings in enumerate(
        (
            settings_of("full"),
            {"training": ours["training"] | {"base": "0" * 64}},
            {"training": {k: v for k, v in ours["training"].items() if k != "adapters"}},
            {"size": "small"},
        )
    ):
        out = tmp_path / str(number)
        out.mkdir()
        (out / SETTINGS).write_text(json.dumps(settings))
        with pytest.raises(UserError, match=r"--out: .* another size, base or .* same --size"):
            run(out, "--summary")


def test_another_preset_is_another_way_of_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Parts of two presets are not mixed, wherever the folder is."""
    before = settings_of("small")["training"]
    monkeypatch.chdir(tmp_path)
    assert settings_of("small")["training"] == before
    for section, name in (("objective", "sparsity"), ("optimizer", "lr")):
        values = read_configs(["organism"])
        values[section][name] = 0.5
        with monkeypatch.context() as patched:
            patched.setattr("reproduce.planted.organisms.read_configs", lambda _, v=values: v)
            assert settings_of("small")["training"] != before


def test_a_summary_needs_something_measured(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"holds no benchmark; leave out --summary to run one"):
        run(tmp_path / "new", "--summary")
    assert not (tmp_path / "new").exists()
    finished(tmp_path, 0, 0)
    with pytest.raises(UserError, match=r"no measured organism yet; leave out --summary"):
        run(tmp_path, "--summary")


def test_finished_parts_are_not_repeated(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    finished(tmp_path, 3, 1)
    assert run(tmp_path, "--seeds", "3", "--nulls", "1") == 0
    result: Any = json.loads((tmp_path / RESULT).read_text())
    assert (result["settings"]["seeds"], result["settings"]["nulls"]) == ([1, 2, 3], [1])
    visible = sum(
        int((judge_of(seed, SIZES["small"]).planted.sum(1) >= 5).sum()) for seed in (1, 2, 3)
    )
    assert result["methods"][ADAPTER]["recall"]["all"]["10"]["mean"] == pytest.approx(visible / 24)
    assert "## Planted differences" in (tmp_path / TABLES).read_text()
    assert RECALL in capsys.readouterr().out
    assert not (tmp_path / "seed1" / "planted" / "target").exists()


def test_a_summary_is_of_what_is_measured_by_the_present_rules(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    finished(tmp_path, 3, 1)
    old = tmp_path / "seed2" / "planted" / MEASURED
    old.write_text(json.dumps({"rules": "0" * 64, "units": "of another form"}))
    assert run(tmp_path, "--seeds", "4", "--nulls", "2", "--summary") == 0
    missing = "Not measured yet: seed 2, planted; seed 2, null; seed 4, planted."
    assert missing in capsys.readouterr().out
    result: Any = json.loads((tmp_path / RESULT).read_text())
    assert (result["settings"]["seeds"], result["settings"]["nulls"]) == ([1, 3], [1])


def test_what_another_process_works_on_is_left_to_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    finished(tmp_path, 1, 0)
    part = tmp_path / "seed2" / "planted"
    part.mkdir(parents=True)
    with locked(part / ".lock"):
        staged = part / f".tmp-texts-{'0' * 32}"  # what the other process is writing
        staged.mkdir()
        assert run(tmp_path, "--seeds", "2", "--nulls", "0") == 0
        assert staged.exists()
    printed = capsys.readouterr()
    assert "seed 2, planted: another process is at it" in printed.err
    assert "Not measured yet: seed 2, planted." in printed.out
    assert not (tmp_path / RESULT).exists()


def test_a_damaged_part_is_named(tmp_path: Path) -> None:
    finished(tmp_path, 3, 1)
    (tmp_path / "seed1" / "null" / MEASURED).write_text("{")
    with pytest.raises(UserError, match=r"seed1/null/measured.json"):
        run(tmp_path, "--seeds", "3")


def test_rules_are_the_code_without_its_words(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, source, other = rules(), Path(units.__file__).read_text(), tmp_path / "units.py"
    read = rules.__wrapped__
    monkeypatch.setattr(units, "__file__", str(other))
    docstring, rule = '"""Return units in random order."""', "2 * len("
    assert docstring in source
    assert rule in source
    other.write_text("# a comment\n" + source.replace(docstring, '"""Shuffle."""'))
    assert read() == before
    other.write_text(source.replace(rule, "3 * len("))
    assert read() != before
    other.write_text(source)
    assert read() == before
    monkeypatch.setattr("reproduce.planted.measure.PROMOTED", 11)
    assert read() != before
    assert rules() == before  # of this process


# --- organisms ---


def maker(folder: Path, stop: Event) -> Maker:
    return Maker(folder, 1, "planted", SIZES["small"], lambda *_: None, stop)


class Later(Event):
    """An event that is set from the third time on that it is asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.times: Iterator[int] = count(1)
        self.last = 0

    def is_set(self) -> bool:
        self.last = next(self.times)
        return self.last >= 3


def test_fine_tuning_stops_before_its_next_step(tmp_path: Path) -> None:
    stop = Later()
    with pytest.raises(StoppedError):
        maker(tmp_path, stop)._fine_tune(tmp_path / "target")
    assert stop.last == 3  # of four steps
    assert list(tmp_path.iterdir()) == []


def test_adapters_are_the_presets(tmp_path: Path) -> None:
    config = adapter_config(tmp_path, SIZES["full"], 3)
    assert (config.objective.sparsity, config.run.threads) == (0.03, 1)
    assert (config.data.family, config.run.seed) == ("text", 3)
    steps = SIZES["full"].train_texts // SIZES["full"].adapter_batch_size
    assert config.optimizer.max_steps == steps  # every text once


def test_a_run_that_moved_has_the_paths_of_its_folder(tmp_path: Path) -> None:
    before = adapter_config(tmp_path / "old", SIZES["small"], 3)
    path, config = tmp_path / "config.yaml", adapter_config(tmp_path / "new", SIZES["small"], 3)
    save_config(before, path)
    _move(path, config)
    assert load_config(path) == config
    other = replace(before, optimizer=replace(before.optimizer, lr=1.0))
    save_config(other, path)
    _move(path, config)
    assert load_config(path).optimizer.lr == 1.0  # other settings stay, and are refused


@pytest.mark.slow
def test_a_kill_and_a_move_and_two_processes_give_the_same_result(tmp_path: Path) -> None:
    whole, cut, moved = (tmp_path / name for name in ("whole", "cut", "moved"))
    command = [sys.executable, "-m", "reproduce.planted", "--size", "small", "--seeds", "1"]
    command.append("--out")
    subprocess.run([*command, str(whole)], cwd=ROOT, check=True, capture_output=True)
    process = subprocess.Popen([*command, str(cut)], cwd=ROOT)
    while not (cut / "seed1/planted/run/config.yaml").exists() and process.poll() is None:
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (cut / "seed1/planted" / MEASURED).exists()
    cut.rename(moved)  # one process goes on with the adapters, the other begins the null
    both = [subprocess.Popen([*command, str(moved)], cwd=ROOT) for _ in range(2)]
    assert [process.wait() for process in both] == [0, 0]
    for name in (RESULT, TABLES, f"seed1/planted/{MEASURED}", f"seed1/null/{MEASURED}"):
        assert (moved / name).read_bytes() == (whole / name).read_bytes()
