"""Output and errors of `fastadapt features` and `fastadapt intervene`."""

from __future__ import annotations

import json
import re
import shutil
import signal
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from organism_runs import make_run

from fastadapt.cli.main import main
from fastadapt.cli.progress import Progress

COLLECT = ("--n", 60, "--device", "cpu")


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("features") / "run")


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "run"))


@pytest.fixture(scope="module")
def with_features(finished: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with collected features, which no test changes."""
    folder = shutil.copytree(finished, tmp_path_factory.mktemp("collected") / "run")
    assert main(["features", "collect", str(folder), *map(str, COLLECT)]) == 0
    return Path(folder)


@pytest.fixture
def collected(with_features: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(with_features, tmp_path / "run"))


def test_origins_are_shown_and_selected(collected: Path, fastadapt: Callable) -> None:
    shown = json.loads(fastadapt("features", "show", collected, "--top", 99, "--json").out)
    new = [f"{u['layer']}/{u['feature']}" for u in shown if u["scales"]["origin"] == "new"]
    assert 0 < len(new) < len(shown)
    outcome = fastadapt("features", "select", collected, "learned", "--origin", "new")
    assert outcome.code == 0, outcome.err
    assert f"learned: {len(new)} features" in outcome.out
    text = fastadapt("features", "show", collected, new[0]).out
    assert re.search(r"in the base +-?[\d.]+%, new: the MLPs write \S+ \(base\) and \S+", text)
    outcome = fastadapt("features", "select", collected, "other", "--origin", "old")
    assert outcome.code == 2
    assert "origin: expected one of new, strengthened, opposed, absent, got 'old'" in outcome.err


def test_from_a_run_to_its_pages_and_judgements(run: Path, fastadapt: Callable) -> None:
    outcome = fastadapt("features", "collect", run, *COLLECT)
    assert outcome.code == 0, outcome.err
    assert re.search(r"adapter\W+0\W+24\W", outcome.out)
    assert "60 texts" in outcome.out
    assert re.search(
        r"origin of what the features write: [\d.]+% new, [\d.]+% strengthened, [\d.]+% opposed, "
        r"[\d.]+% absent\n",
        outcome.out,
    )
    manifest = (run / "features" / "manifest.json").read_bytes()
    assert fastadapt("features", "collect", run, *COLLECT).code == 0
    assert (run / "features" / "manifest.json").read_bytes() == manifest

    short = ("--describe.before", 4, "--describe.after", 1)  # these features are rarely inactive
    described = fastadapt(
        "features", "describe", run, "--describe.units", 3, *short, "--device", "cpu"
    )
    assert described.code == 0, described.err
    assert "accuracy" in described.out
    assert (run / "features" / "adapter" / "scores.parquet").is_file()
    overlap = fastadapt("features", "overlap", run, "--device", "cpu")
    assert overlap.code == 0, overlap.err
    pages = fastadapt("features", "export", run)
    assert pages.code == 0, pages.err
    assert (run / "features" / "site" / "index.html").is_file()
    assert str(run / "features" / "site" / "index.html") in pages.out


def test_collecting_needs_no_extra(
    run: Path, fastadapt: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("duckdb", "openai", "matplotlib"):
        monkeypatch.setitem(sys.modules, name, None)
    outcome = fastadapt("features", "collect", run, *COLLECT)
    assert outcome.code == 0, outcome.err
    rows = pq.read_table(run / "features" / "adapter" / "features.parquet").to_pylist()
    lines = [re.split(r"\W*│\W*", line) for line in outcome.out.splitlines() if "│" in line]
    for layer, line in enumerate(lines):
        densities = [row["density"] for row in rows if row["layer"] == layer]
        assert line[:5] == ["adapter", str(layer), "24", "24", f"{sum(densities):.2f}"]
        assert line[5] == f"{100 * statistics.median(densities):.1f}%"
    assert len(lines) == 4


def test_texts_that_were_left_out_are_told(run: Path, fastadapt: Callable) -> None:
    outcome = fastadapt("features", "collect", run, *COLLECT, "--max_tokens", 90)
    assert outcome.code == 0, outcome.err
    data = json.loads((run / "features" / "manifest.json").read_text())["data"]
    assert 0 < data["too_long"] == 60 - data["texts"]
    assert f"{data['too_long']} of 60 conversations were left out" in outcome.out


@pytest.mark.parametrize("command", [("features", "collect"), ("eval",)])
@pytest.mark.parametrize("flags", [(), ("--overwrite",)])
def test_what_was_stopped_says_how_to_go_on(
    run: Path,
    fastadapt: Callable,
    monkeypatch: pytest.MonkeyPatch,
    command: tuple[str, ...],
    flags: tuple[Any, ...],
) -> None:
    monkeypatch.setattr(Progress, "__call__", lambda *_: signal.raise_signal(signal.SIGTERM))
    outcome = fastadapt(*command, run, "--device", "cpu", *flags)
    assert outcome.code == 0, outcome.err
    how = " without --overwrite" if flags else ""
    assert f"Re-run the same command{how} to resume." in outcome.out


def test_shards_are_merged(run: Path, fastadapt: Callable, tmp_path: Path) -> None:
    shards = [tmp_path / f"part-{i}" for i in range(2)]
    for i, folder in enumerate(shards):
        outcome = fastadapt(
            "features", "collect", run, *COLLECT, "--shard", f"{i}/2", "--output", folder
        )
        assert outcome.code == 0, outcome.err
        assert f"Shard {i} of 2 is done" in outcome.out
    outcome = fastadapt("features", "merge", *reversed(shards), "--output", tmp_path / "whole")
    assert outcome.code == 0, outcome.err
    assert fastadapt("features", "collect", run, *COLLECT).code == 0
    for name in ("texts.parquet", "adapter/features.parquet", "adapter/examples.parquet"):
        whole = (tmp_path / "whole" / name).read_bytes()
        assert whole == (run / "features" / name).read_bytes()


def test_a_set_is_taken_out_and_put_onto_the_target(
    collected: Path, fastadapt: Callable[..., Any], tmp_path: Path
) -> None:
    select = ("features", "select", collected)
    sql = "SELECT layer, feature FROM features WHERE count > {}"
    many = fastadapt(*select, "many", "--sql", sql.format(0))
    assert many.code == 0, many.err
    few = fastadapt(*select, "few", "--sql", sql.format("(SELECT median(count) FROM features)"))
    assert few.code == 0, few.err
    others = fastadapt(*select, "rest", "--difference", "many", "few")
    assert others.code == 0, others.err
    sizes = [int(re.search(r": (\d+) features", o.out)[1]) for o in (many, few, others)]  # type: ignore[index]
    assert sizes[0] == sizes[1] + sizes[2]
    listed = fastadapt("features", "sets", collected)
    assert [name in listed.out for name in ("few", "many", "rest")] == [True] * 3

    for kind in ("ablate", "only", "onto-target"):
        changed = fastadapt("intervene", collected, f"--{kind}", "few", "--output", tmp_path / kind)
        assert changed.code == 0, changed.err
        card = json.loads((tmp_path / kind / "adapter" / "fastadapt.json").read_text())
        (step,) = card["metadata"]["interventions"]
        assert (step["kind"], step["set"]["size"]) == (kind, sizes[1])
    assert card["metadata"]["base"] == card["metadata"]["target"]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (("features", "colect", "{run}"), "did you mean collect?"),
        (("features", "collect", "{run}", "--shard", "3/3"), "expected i/n with i from 0"),
        (("features", "collect", "{run}", "--n", "0"), "expected 1 or more, got 0"),
        (("features", "collect", "{run}", "--kinds", "[units]"), "--kinds"),
        (("features", "export", "{run}/adapter"), "has no features yet"),
        (("features", "select", "{run}", "a/b", "--template"), "a set's name"),
        (("features", "select", "{run}", "none", "--promotes", "qqqq"), "is empty"),
        (("features", "show", "{run}", "2.17"), "LAYER/NUMBER, such as 2/17"),
        (("features", "show", "{run}", "0/24"), "feature: expected 0 to 23, got 24"),
        (("features", "show", "{run}", "--top", "-1"), "--top: expected 0 or more, got -1"),
        (("features", "select", "{run}", "none"), "a set is selected in one way"),
        (("features", "select", "{run}", "none", "--sql", "DROP TABLE features"), "SELECT"),
        (("features", "classify", "{run}"), "cannot classify"),
        (("features", "describe", "{run}", "--judge.base_url", "http://localhost"), "judge.model"),
        (("features", "serve", "{run}", "--port", "70000"), "expected 0 to 65535"),
        (("intervene", "{run}", "--output", "{run}/x"), "expected one of --ablate"),
        (("intervene", "{run}", "--ablate", "nope", "--output", "{run}/x"), "no set 'nope'"),
    ],
)
def test_what_is_refused(
    with_features: Path, fastadapt: Callable, argv: tuple[str, ...], message: str
) -> None:
    before = sorted(with_features.rglob("*"))
    outcome = fastadapt(*(text.format(run=with_features) for text in argv))
    assert outcome.code == 2, outcome.out
    assert message in " ".join(outcome.err.split())
    assert sorted(with_features.rglob("*")) == before


def test_a_store_of_another_adapter_is_refused(
    collected: Path, fastadapt: Callable[..., Any], tmp_path: Path
) -> None:
    other = make_run(tmp_path / "other", seed=1)
    shutil.move(collected / "features", other / "features")
    for argv in (
        ("features", "describe", other, "--device", "cpu"),
        ("features", "collect", other, *COLLECT),
    ):
        outcome = fastadapt(*argv)
        assert outcome.code == 2
        assert "--overwrite" in outcome.err


def test_sets_of_another_adapter_are_listed_as_such(
    collected: Path, fastadapt: Callable[..., Any]
) -> None:
    sql = "SELECT layer, feature FROM features"
    for name in ("mine", "old"):
        assert fastadapt("features", "select", collected, name, "--sql", sql).code == 0
    path = collected / "features" / "sets" / "old.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "adapter": "0" * 64}))
    listed = fastadapt("features", "sets", collected)
    assert listed.code == 0, listed.err
    (mine,) = (line for line in listed.out.splitlines() if "mine" in line)
    (old,) = (line for line in listed.out.splitlines() if "old" in line)
    assert "other adapters" not in mine
    assert "selected from other adapters: select it again" in old


def test_costs_are_told_and_need_consent(
    collected: Path, fastadapt: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a terminal, no calls are made. The address refuses any call."""
    monkeypatch.setenv("OPENAI_API_KEY", "none")
    outcome = fastadapt(
        *("features", "classify", collected, "--judge.model", "some", "--classify.units", 2),
        *("--judge.base_url", "http://127.0.0.1:9/v1", "--judge.price_in", 1),
        *("--judge.price_out", 2),
    )
    assert outcome.code == 2
    assert "8 calls" in outcome.err
    assert "--yes" in outcome.err


def test_help_tells_every_command_and_option(fastadapt: Callable) -> None:
    from fastadapt.cli.main import COMMANDS

    names = [name.split()[1] for name in COMMANDS if name.startswith("features ")]
    shown = fastadapt("features").out
    assert [name for name in names if f"  {name} " not in shown] == []
    for name in names:
        outcome = fastadapt("features", name, "--help")
        assert outcome.code == 0, outcome.err
        assert f"fastadapt features {name}" in outcome.out


OPTIONS = {
    "collect": """
--after --batch_tokens --before --data --demeaned --device --dtype --kinds --max_tokens --n
--neurons_per_token --output --overwrite --scales --seed --shard --snapshot_tokens --split --top
--trust_remote_code --uniform
""",
    "merge": """
--output --overwrite
""",
    "export": """
--output
""",
    "serve": """
--port
""",
    "describe": """
--describe --describe.after --describe.before --describe.kinds --describe.min_density
--describe.min_shown --describe.samples --describe.scored --describe.seed --describe.shown
--describe.statistics --describe.statistics.level --describe.statistics.resamples
--describe.statistics.seed --describe.texts --describe.units --device --dtype --judge
--judge.base_url --judge.concurrency --judge.extra --judge.invalid_share --judge.json_mode
--judge.key_variable --judge.max_tokens --judge.model --judge.price_in --judge.price_out
--judge.retries --judge.temperature --judge.timeout --trust_remote_code --yes
""",
    "classify": """
--classify --classify.after --classify.before --classify.kinds --classify.min_density
--classify.min_shown --classify.seed --classify.statistics --classify.statistics.level
--classify.statistics.resamples --classify.statistics.seed --classify.top --classify.uniform
--classify.units --judge --judge.base_url --judge.concurrency --judge.extra
--judge.invalid_share --judge.json_mode --judge.key_variable --judge.max_tokens --judge.model
--judge.price_in --judge.price_out --judge.retries --judge.temperature --judge.timeout --yes
""",
    "overlap": """
--batch_tokens --device --dtype --features_at_once --store --tokens --trust_remote_code
""",
    "compare": """
--n --output
""",
    "effects": """
--device --dtype --features --store --texts --top --trust_remote_code
""",
    "show": """
--examples --json --kind --top
""",
    "select": """
--alive --at --before --classes --difference --features --hesitation --intersection --origin
--overwrite --promotes --random --seed --share --sql --template --times --top --union
""",
    "sets": "",
    "intervene": """
--ablate --only --onto-target --output --overwrite --scale --store
""",
}


def test_the_options_are_frozen() -> None:
    from fastadapt.cli.main import open_command

    for name, frozen in OPTIONS.items():
        command = open_command(name if name == "intervene" else f"features {name}")
        options = {*command.parser.option_names()} - {"--help"}
        assert sorted(options) == frozen.split(), name
