"""The study end to end, on the embedded pair with small untrained adapters."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
import signal
from dataclasses import replace
from pathlib import Path
from threading import Event
from typing import Any

import pytest
import torch
import yaml

from fastadapt.adapter.files import adapter_digest, adapters_of, save_adapters
from fastadapt.adapter.module import AdapterConfig
from fastadapt.cli.main import main
from fastadapt.cli.progress import Progress
from fastadapt.data.sequences import DataConfig
from fastadapt.errors import UserError
from fastadapt.evaluation.benchmarks.runner import BenchmarkConfig, Row, response_keys
from fastadapt.evaluation.folder import opened
from fastadapt.evaluation.generation.sampling import SamplingConfig
from fastadapt.evaluation.models_under_test import ModelSet
from fastadapt.features.collect import CollectConfig, collect
from fastadapt.features.store.store import Store
from fastadapt.interventions import Intervention
from fastadapt.interventions.files import intervene
from fastadapt.models.replacement import ModelPair, PairConfig, ReplacementModel
from fastadapt.organism import resolve
from fastadapt.study.conditions import (
    BEFORE,
    PAPER,
    PARTS,
    RUN,
    ArmsConfig,
    StudyConfig,
    arms_of,
    select,
)
from fastadapt.study.running import CONTENTS, Cost, Study

NAMES = {"target": "organism/target", "base": "organism/base"}
SMALL = StudyConfig(
    ArmsConfig(tops=(1,), times=(1, 10), draws=1, scales=(-1.0,)),
    benchmarks=BenchmarkConfig(tasks=("organism_math",), limit=2),
    sampling=SamplingConfig(max_new_tokens=12),
)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a run of the embedded pair with small random adapters, and with a feature store."""
    return make_run(tmp_path_factory.mktemp("study") / "run", AdapterConfig(64))


def make_run(folder: Path, config: AdapterConfig) -> Path:
    folder.mkdir()
    names: dict[str, Any] = {k: resolve(v) for k, v in NAMES.items()}
    pair = ModelPair.load(PairConfig(**names, device="cpu"))
    model = ReplacementModel.create(pair, config)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        adapter: Any
        for adapter in model.adapters:
            adapter.b_enc.fill_(-0.5)
            adapter.b_dec.fill_(0.1)
            adapter.W_dec.copy_(0.05 * torch.randn(adapter.W_dec.shape, generator=generator))
    save_adapters(model.adapters, folder / "adapter", {**NAMES, "family": "r1-distill"})
    data = dataclasses.asdict(DataConfig("organism/train", "organism/validation"))
    (folder / "config.yaml").write_text(yaml.safe_dump({"pair": NAMES, "data": data}))
    assert collect(folder, config=CollectConfig(n=40)) is not None
    return folder


def open_study(run: Path, folder: Path, config: StudyConfig, stop: Event, calls: list) -> Study:
    store = Store.open(run, adapter=adapter_digest(adapters_of(run)))
    students = ModelSet.open([run], [RUN])
    return Study(students, store, folder, config, lambda *call: calls.append(call), stop)


@pytest.mark.slow
def test_every_arm_is_measured_once_and_the_study_resumes(run: Path, tmp_path: Path) -> None:
    calls: list[tuple[str, int, int]] = []
    stop = Event()

    def stop_at_the_fifth_arm(*call: Any) -> None:
        calls.append(call)
        if len({label for label, *_ in calls}) == 5:
            stop.set()

    with opened(tmp_path / "study", contents=CONTENTS) as folder:
        study = open_study(run, folder, SMALL, stop, calls)
        assert replace(study, progress=stop_at_the_fifth_arm).run() is None
    assert len(list((folder / "benchmarks").iterdir())) == 5
    assert not (folder / "study.json").exists()
    stamps = {p: p.stat().st_mtime_ns for p in folder.glob("benchmarks/*/*.rows.jsonl")}
    stop.clear()
    with opened(tmp_path / "study", contents=CONTENTS) as folder:
        result = study.run()
    assert result is not None
    assert json.loads(json.dumps(result)) == json.loads((folder / "study.json").read_text())
    sets = select(study.store, SMALL)
    arms = arms_of(study.store, sets, SMALL)
    assert len({arm.name for arm in arms}) == len(arms)
    assert len(list((folder / "benchmarks").iterdir())) == len(arms)
    assert stamps
    assert sorted(path.name for path in (folder / "plots").iterdir()) == [
        "addition.png",
        "removal.png",
        "transfer.png",
    ]
    # Larger random sets exist only if a draw uses at most half of the other features.
    for key, features in sets.items():
        times = {arm.times for arm in arms if arm.selection == key} - {0}
        others = int(result["features"]["alive"]) - len(features)
        most = max(others // 2 // len(features), min(1, others // len(features)))
        assert times == {n for n in (1, min(10, most)) if n <= most}
        scales = {arm.scale for arm in arms if arm.selection == key and arm.scale is not None}
        assert scales == ({-0.5, -1.0} if key == "top1" else {-0.5})
    for arm in arms:
        if arm.times:
            assert arm.features is not None
            assert len(arm.features) == arm.times * len(sets[arm.selection])
            assert not set(arm.features) & set(sets[arm.selection])
    for entry in result["arms"]:
        assert all(("density" in draw) == (entry["times"] > 0) for draw in entry["draws"])
    # A further call measures no arm.
    calls.clear()
    with opened(tmp_path / "study", contents=CONTENTS):
        assert study.run() == result
    assert all(completed == total for _, completed, total in calls)


@pytest.mark.parametrize("collected", [False, True])
def test_a_stopped_study_prints_how_to_resume(
    run: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    collected: bool,
) -> None:
    ignored = None if collected else shutil.ignore_patterns("features")
    copy = shutil.copytree(run, tmp_path / "run", ignore=ignored)
    monkeypatch.setattr(Progress, "__call__", lambda *_: signal.raise_signal(signal.SIGTERM))
    assert main(["study", str(copy), "--overwrite"]) == 0
    # An earlier study is overwritten only after features are collected.
    option = " without --overwrite" if collected else ""
    assert f"Re-run the same command{option} to resume." in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--benchmarks.hesitation_words", "[never]"), "is empty"),
        (("--benchmarks.tasks", "[math500]", "--benchmarks.data", "."), "no math500.jsonl"),
    ],
)
def test_an_overwrite_that_cannot_run_removes_nothing(
    run: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    options: tuple[str, ...],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    earlier = tmp_path / "out" / "benchmarks" / "earlier"
    earlier.parent.mkdir(parents=True)
    earlier.write_text("")
    command = ["study", str(run), "--output", str(tmp_path / "out"), "--overwrite"]
    assert main([*command, *options]) == 2
    assert message in " ".join(capsys.readouterr().err.split())
    assert earlier.exists()


def test_the_cost_is_said_first(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The store was collected with other settings than the defaults."""
    command = ["study", str(run), "--dry-run", "--benchmarks.repetitions", "2"]
    assert main(command) == 0
    (whole,) = re.findall(r"(\d+) arms, 0 of them measured; ([\d,]+) res", capsys.readouterr().out)
    assert int(whole[1].replace(",", "")) == int(whole[0]) * 500 * 2
    assert main([*command, "--paper"]) == 0
    store = Store.open(run, adapter=adapter_digest(adapters_of(run)))
    arms = arms_of(store, select(store, StudyConfig(PAPER)), StudyConfig(PAPER))
    assert f"{len(arms)} arms, 0 of them measured" in capsys.readouterr().out
    assert len(arms) < int(whole[0]) / 2
    before = [arm for arm in arms if arm.selection == BEFORE]
    assert [(arm.kind, arm.times) for arm in before] == [("ablate", 0)]
    main_set = next(arm.features for arm in arms if arm.kind == "ablate")
    assert before[0].features is not None
    assert main_set is not None
    assert set(before[0].features) >= set(main_set)
    assert {arm.kind for arm in arms if arm.selection in PARTS} == {"only"}
    assert not (run / "study").exists()
    assert main([*command, "--paper", "--study.draws", "2"]) == 2
    assert "--paper sets all settings --study.*" in capsys.readouterr().err


def test_features_of_other_adapters_are_refused(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = Path(shutil.copytree(run, tmp_path / "run"))
    manifest = copy / "features" / "manifest.json"
    values = json.loads(manifest.read_text())
    manifest.write_text(json.dumps({**values, "adapter": "0" * 64}))
    assert main(["study", str(copy), "--dry-run"]) == 2
    assert "were collected from other adapters" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("config", "options", "message"),
    [
        (CollectConfig(n=40, after=0), ["--paper"], "no token after the activation"),
        (
            CollectConfig(n=40, kinds=("target",), neurons_per_token=4),
            [],
            "no features or neurons of kind adapter, only of target",
        ),
    ],
)
def test_features_without_what_a_study_needs_are_refused(
    run: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    config: CollectConfig,
    options: list[str],
    message: str,
) -> None:
    copy = Path(shutil.copytree(run, tmp_path / "run", ignore=shutil.ignore_patterns("features")))
    assert collect(copy, config=config) is not None
    assert main(["study", str(copy), "--dry-run", *options]) == 2
    assert message in " ".join(capsys.readouterr().err.split())


def test_transcoders_of_whole_mlps_are_studied_without_transfer(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Their features cannot be added to the target; all other arms are measured."""
    run = make_run(tmp_path / "run", AdapterConfig(64, base_mlp=False))
    assert main(["study", str(run), "--dry-run", "--study.share", "0.01"]) == 0
    assert "No features are added to the target: " in capsys.readouterr().out
    config = replace(
        SMALL,
        study=replace(SMALL.study, times=(1,), parts=("only",), share=0.01),
        sampling=SamplingConfig(max_new_tokens=2),
    )
    with opened(tmp_path / "study", contents=CONTENTS) as folder:
        result = open_study(run, folder, config, Event(), []).run()
    assert result is not None
    assert {arm["kind"] for arm in result["arms"]} == {None, "ablate", "only"}
    assert result["notes"]
    page = (folder / "tables.md").read_text()
    assert "Transfer to the target" not in page
    assert "No features are added to the target: " in page
    assert not (folder / "plots" / "transfer.png").exists()


def test_the_cost_counts_the_responses_that_are_missing(run: Path, tmp_path: Path) -> None:
    """A pilot with fewer questions or repetitions leaves the others to sample."""
    study = open_study(run, tmp_path, SMALL, Event(), [])
    benchmarks = study._benchmarks()
    arms = arms_of(study.store, select(study.store, SMALL), SMALL)
    n, limit = len(arms), 12
    assert study.cost() == Cost(n, 0, 2 * n, limit)
    (keys,) = response_keys(benchmarks).values()
    rows = [Row(*key, True, "1", 1, "eos", None, 0, "") for key in sorted(keys)]
    lines = "".join(json.dumps(vars(row)) + "\n" for row in rows)
    for arm in arms:
        folder = study._folder(arm, benchmarks)
        folder.mkdir(parents=True)
        (folder / "organism_math.rows.jsonl").write_text(lines)
    assert study.cost() == Cost(n, n, 0, limit)
    for changed, missing in (
        (replace(SMALL.benchmarks, limit=5), 3),
        (replace(SMALL.benchmarks, repetitions=3), 4),
        (replace(SMALL.benchmarks, limit=1), 0),
    ):
        expected = Cost(n, 0 if missing else n, missing * n, limit)
        assert replace(study, config=replace(SMALL, benchmarks=changed)).cost() == expected


def test_an_arm_equals_the_saved_intervention(run: Path, tmp_path: Path) -> None:
    study = open_study(run, tmp_path, SMALL, Event(), [])
    ids = torch.tensor([[2, 4, 30, 90, 200, 5, 6]])
    logits = []
    for arm in arms_of(study.store, select(study.store, SMALL), SMALL)[:7]:
        with torch.no_grad(), study._generating(arm) as model:
            logits.append(model(ids).logits)
        if arm.features is None:
            continue
        assert arm.kind is not None
        intervention = Intervention(arm.kind, arm.scale)
        saved = intervene(run, tmp_path / arm.name, arm.features, intervention)
        students = ModelSet.open([saved], ["saved"])
        with torch.no_grad(), students.generating("saved") as model:
            assert torch.equal(model(ids).logits, logits[-1])
    assert all(not torch.equal(a, b) for i, a in enumerate(logits) for b in logits[:i])


def test_impossible_studies_are_refused(run: Path, tmp_path: Path) -> None:
    for values, message in (
        ({"tops": ()}, r"study\.tops: expected one or more distinct"),
        ({"times": (0,)}, r"study\.times: expected"),
        ({"share": 0.0}, r"study\.share: expected more than 0"),
        ({"draws": 0}, r"study\.draws: expected"),
    ):
        with pytest.raises(UserError, match=message):
            replace(SMALL.study, **values)
    words = replace(SMALL.benchmarks, hesitation_words=("never",))
    study = open_study(run, tmp_path, replace(SMALL, benchmarks=words), Event(), [])
    with pytest.raises(UserError, match="is empty"):
        study.run()
    (tmp_path / "other").write_text("")
    with pytest.raises(UserError, match="not an evaluation"), opened(tmp_path, contents=CONTENTS):
        pass
