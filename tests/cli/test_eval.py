"""Output, resuming and errors of `fastadapt eval`."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

QUICK = ("--texts.n", 3, "--texts.n_partial", 2, "--sampling.max_new_tokens", 8)
OUTPUTS = ("--parts", "[outputs, partial]")


@pytest.fixture
def runs(recipe: Callable, fastadapt: Callable, tmp_path: Path) -> list[Path]:
    """Train adapters and the skyline on the tiny pair."""
    folders = [tmp_path / "runs" / name for name in ("sparse", "tuned")]
    for folder, overlay in zip(folders, ([], ["skyline"]), strict=True):
        outcome = fastadapt("train", recipe(), *overlay, "--run.output", folder)
        assert outcome.code == 0, outcome.err
    return folders


def files(folder: Path) -> dict[str, int]:
    return {
        str(path.relative_to(folder)): path.stat().st_mtime_ns
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def test_runs_are_compared_and_nothing_is_measured_twice(
    runs: list[Path], fastadapt: Callable[..., Any]
) -> None:
    outcome = fastadapt("eval", *runs, *OUTPUTS, *QUICK)
    assert outcome.code == 0, outcome.err
    folder = runs[0].parent / "eval"
    result = json.loads((folder / "eval.json").read_text())
    assert [s["name"] for s in result["students"]] == ["base", "hybrid", "sparse", "tuned"]
    assert [s["kind"] for s in result["students"]] == ["base", "hybrid", "transcoder", "mlp"]
    assert result["texts"]["n"] == 3
    assert set(result["faithfulness"]) == {"base", "hybrid", "sparse", "tuned"}
    assert set(result["partial"]) == {"hybrid", "sparse", "tuned"}
    assert [gap["above"] for gap in result["order"]] == ["base", "hybrid", "sparse"]
    assert {"tables.md", "tables.tex", "report.html"} <= set(files(folder))
    assert {"kl-l0.png", "partial-last.png"} <= {p.name for p in (folder / "plots").iterdir()}
    for said in ("Output faithfulness", "Order", "Partial replacement", "report.html"):
        assert said in outcome.out
    assert "texts of the target" in outcome.err

    (sampled,) = (folder / "texts").iterdir()
    before, texts = files(folder), sampled.read_bytes()
    again = fastadapt("eval", *runs, *OUTPUTS, *QUICK)
    assert again.out == outcome.out
    arrays = {
        name: modified for name, modified in files(folder).items() if name.endswith(".safetensors")
    }
    assert arrays
    assert arrays == {name: before[name] for name in arrays}
    assert sampled.read_bytes() == texts
    assert json.loads((folder / "eval.json").read_text()) == result


@pytest.mark.slow
def test_runs_that_differ_by_their_seed_are_one_group(
    recipe: Callable, fastadapt: Callable, tmp_path: Path
) -> None:
    """Means are those of the runs; a run of another λ, and a copy of one, is in no group."""
    trained: dict[str, tuple[object, ...]] = {
        "a": (),
        "a2": ("--run.seed", 2),
        "bare": ("no-bridge",),
        "other": ("--objective.sparsity", 0.5, "--run.seed", 3),
        "bare2": ("no-bridge", "--run.seed", 2),
    }
    folders = [tmp_path / "runs" / name for name in trained]
    for folder, options in zip(folders, trained.values(), strict=True):
        overlay = options if options and options[0] == "no-bridge" else ()
        typed = options[len(overlay[:1]) :]
        outcome = fastadapt(
            *("train", recipe(), *overlay[:1], *typed, "--optimizer.max_steps", 2),
            *("--run.eval_every", 0, "--run.output", folder),
        )
        assert outcome.code == 0, outcome.err
    copy = Path(shutil.copytree(folders[0], tmp_path / "runs" / "copy"))
    outcome = fastadapt("eval", *folders, copy, *OUTPUTS, *QUICK)
    assert outcome.code == 0, outcome.err
    result = json.loads((tmp_path / "runs" / "eval" / "eval.json").read_text())
    groups = result["seeds"]["groups"]
    assert [group["runs"] for group in groups] == [["a", "a2"], ["bare", "bare2"]]
    means = []
    for group in groups:
        for key in ("kl", "top1_error"):
            each = [result["faithfulness"][run][key]["mean"] for run in group["runs"]]
            assert group[key]["mean"] == pytest.approx(sum(each) / 2)
            assert group[key]["low"] <= group[key]["mean"] <= group[key]["high"]
        means.append(group["kl"]["mean"])
    (gap,) = result["seeds"]["differences"]
    assert (gap["above"], gap["below"]) == ("a", "bare")
    assert gap["kl"]["mean"] == pytest.approx(means[0] - means[1])
    (pair,) = result["bridge_seeds"]
    assert (pair["without"], pair["with"]) == ("bare", "a")
    assert len(pair["last"]) == len(result["bridge"][0]["last"])
    curves = [
        [result["partial"][run]["last"][1]["mean"] for run in group["runs"]] for group in groups
    ]
    assert pair["last"][1]["mean"] == pytest.approx(sum(curves[1]) / 2 - sum(curves[0]) / 2)
    for said in ("Output faithfulness over seeds", "Effect of the bridge with only"):
        assert said in outcome.out
    assert "a − bare" in outcome.out


@pytest.mark.slow
def test_another_run_adds_only_itself(
    runs: list[Path], fastadapt: Callable[..., Any], tmp_path: Path
) -> None:
    output = ("--output", tmp_path / "out")
    assert fastadapt("eval", runs[0], *output, *OUTPUTS, *QUICK).code == 0
    before = files(tmp_path / "out")
    assert fastadapt("eval", *runs, *output, *OUTPUTS, *QUICK).code == 0
    after = files(tmp_path / "out")
    arrays = [name for name in before if name.endswith(".safetensors")]
    assert len(arrays) == 3 + 2
    assert {name: after[name] for name in arrays} == {name: before[name] for name in arrays}
    assert any("tuned" in name for name in after.keys() - before.keys())


@pytest.mark.slow
def test_parts_add_up_and_a_retrained_run_is_measured_anew(
    runs: list[Path], fastadapt: Callable[..., Any]
) -> None:
    """eval.json retains other parts while runs and settings are the same."""
    command: tuple[Any, ...]
    command = ("eval", runs[0], *QUICK, "--speed.new_tokens", 2, "--speed.rounds", 1)
    folder = runs[0] / "eval"

    def sections(*parts: str) -> set[str]:
        outcome = fastadapt(*command, "--parts", f"[{','.join(parts)}]")
        assert outcome.code == 0, outcome.err
        result = json.loads((folder / "eval.json").read_text())
        return {"faithfulness", "partial", "speed"} & result.keys()

    assert sections("outputs") == {"faithfulness"}
    assert sections("speed") == {"faithfulness", "speed"}
    assert sections("partial") == {"faithfulness", "speed", "partial"}
    (first,) = (folder / "texts").iterdir()
    shutil.rmtree(runs[0] / "adapter")
    shutil.copytree(runs[1] / "adapter", runs[0] / "adapter")
    assert sections("outputs") == {"faithfulness"}
    assert json.loads((folder / "eval.json").read_text())["students"][-1]["kind"] == "mlp"
    assert list((folder / "texts").iterdir()) == [first]  # the target has not changed
    command = (*command, "--sampling.seed", 1)
    assert sections("outputs") == {"faithfulness"}
    assert len(list((folder / "texts").iterdir())) == 2
    assert fastadapt(*command, "--parts", "[]").code == 2


@pytest.mark.slow
def test_a_killed_evaluation_is_gone_on_with(runs: list[Path], tmp_path: Path) -> None:
    """After SIGKILL at several moments, the numbers equal those of an uninterrupted evaluation."""
    command = [sys.executable, "-m", "fastadapt", "eval", *map(str, runs), *OUTPUTS]
    command += [*map(str, QUICK), "--outputs.batch_tokens", "16", "--partial.batch_tokens", "16"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}

    def start(name: str) -> subprocess.Popen:
        argv = [*command, "--output", str(tmp_path / name)]
        return subprocess.Popen(
            argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
        )

    began = time.monotonic()
    whole = start("whole")
    said = whole.communicate(timeout=300)
    assert whole.returncode == 0, said[1]
    took = time.monotonic() - began
    for share in (0.5, 0.7, 0.85):
        process = start("killed")
        time.sleep(share * took)
        process.send_signal(signal.SIGKILL)
        process.communicate()
    last = start("killed")
    said = last.communicate(timeout=300)
    assert last.returncode == 0, said[1]
    results = [json.loads((tmp_path / n / "eval.json").read_text()) for n in ("whole", "killed")]
    assert results[0] == results[1]


def test_benchmarks_run_only_when_requested() -> None:
    from fastadapt.cli.eval import default_parts
    from fastadapt.cli.main import open_command

    def parts(*argv: str) -> list[str]:
        return [*default_parts(open_command("eval").parse(["run", *argv])["config"])]

    offline = ["outputs", "partial", "speed"]
    assert parts() == offline
    assert parts("--texts.n", "3") == offline
    assert parts("--benchmarks.few_shot", "4") == [*offline, "benchmarks"]
    assert parts("--benchmarks.tasks", "[math500]") == [*offline, "benchmarks"]


BAD = {
    "no run": (lambda d: ["eval", d.folder / "nothing"], r"nothing: expected a run"),
    "a run without an adapter": (
        lambda d: ["eval", without_adapter(d)],
        r"run.*adapter",
    ),
    "an option that is not there": (
        lambda d: ["eval", d.folder, "--text.n", 3],
        r"unknown option --text\.n; did you mean --texts\.n",
    ),
    "no texts": (
        lambda d: ["eval", d.folder, "--texts.n", 0],
        r"texts\.n: expected 1 or more, got 0",
    ),
    "a part that is none": (
        lambda d: ["eval", d.folder, "--parts", "[output]"],
        r"--parts.*output",
    ),
    "prompts that are not there": (
        lambda d: [
            "eval",
            d.finished_run(),
            "--texts.prompts",
            "gone.jsonl",
            *OUTPUTS,
            "--output",
            d.folder / "e",
        ],
        r"gone\.jsonl",
    ),
    "a folder of something else": (
        lambda d: ["eval", d.finished_run(), "--output", d.pair],
        r"holds files that are not an evaluation .* nothing in it was touched",
    ),
    "benchmarks whose data are not there": (
        lambda d: [
            "eval",
            d.finished_run(),
            "--benchmarks.tasks",
            "[math500]",
            "--benchmarks.data",
            d.folder,
            "--output",
            d.folder / "e",
        ],
        r"benchmark math500: no math500\.jsonl or math500\.parquet in .*; download the dataset",
    ),
    "a prompt longer than the context": (
        lambda d: [
            "eval",
            d.finished_run(),
            "--texts.prompts",
            d.data(long_row()),
            *OUTPUTS,
            "--output",
            d.folder / "e",
        ],
        r"context",
    ),
}


def without_adapter(desk: Any) -> Path:
    folder = desk.finished_run()
    shutil.rmtree(folder / "adapter")
    return folder


def long_row() -> dict:
    turns = [{"from": "user", "value": "w1 " * 80}, {"from": "assistant", "value": "w2"}]
    return {"conversations": turns}


@pytest.mark.parametrize("case", BAD)
def test_what_cannot_be_evaluated_is_said_at_once(
    case: str, expect_error: Callable[..., None]
) -> None:
    arrange, message = BAD[case]
    expect_error(arrange, message)


def test_an_overwrite_that_cannot_run_removes_nothing(
    runs: list[Path], tmp_path: Path, fastadapt: Callable[..., Any]
) -> None:
    hours = tmp_path / "e" / "texts" / "hours.jsonl"
    hours.parent.mkdir(parents=True)
    hours.write_text("hours")
    (tmp_path / "long.jsonl").write_text(json.dumps(long_row()) + "\n")
    (runs[1] / "adapter" / "layer_0.safetensors").write_bytes(b"damaged")
    tasks = ("--benchmarks.tasks", "[math500]", "--benchmarks.data", tmp_path)
    for options, message in (
        (("--parts", "[]"), "--parts: expected one or more"),
        (("--parts", "[benchmarks]", *tasks), "no math500.jsonl"),
        ((*OUTPUTS, "--texts.prompts", "gone.jsonl"), "gone.jsonl"),
        ((*OUTPUTS, "--texts.prompts", tmp_path / "long.jsonl"), "context"),
        (("--parts", "[speed]"), "layer_0.safetensors"),
    ):
        outcome = fastadapt("eval", *runs, "--output", tmp_path / "e", "--overwrite", *options)
        assert outcome.code == 2
        assert message in " ".join(outcome.err.split())
        assert hours.read_text() == "hours"
    outcome = fastadapt(
        *("eval", runs[0], "--output", tmp_path / "e", "--overwrite", *OUTPUTS, *QUICK)
    )
    assert outcome.code == 0, outcome.err
    assert not hours.exists()


def test_an_adapter_of_another_pair(runs: list[Path], fastadapt: Callable[..., Any]) -> None:
    from fastadapt.organism import resolve

    card = runs[1] / "adapter" / "fastadapt.json"
    config = runs[1] / "config.yaml"
    target = json.loads(card.read_text())["metadata"]["target"]
    for path in (card, config):
        path.write_text(path.read_text().replace(target, resolve("organism/target")))
    outcome = fastadapt("eval", *runs, *QUICK)
    assert outcome.code == 2
    assert "expected a run of the pair of" in " ".join(outcome.err.split())
