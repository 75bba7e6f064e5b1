"""The list of recipes, what is measured of a run, and the command that writes the tables."""

from __future__ import annotations

import copy
import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from threading import Event
from typing import Any

import pytest
import torch
import yaml

from fastadapt.adapter.module import AdapterConfig
from fastadapt.data.batches import collate_whole
from fastadapt.errors import UserError
from fastadapt.io.atomic import locked
from fastadapt.models.replacement import ReplacementModel
from fastadapt.training.config import load_config
from fastadapt.training.held_out import evaluate
from reproduce.parts import MEASURED, SETTINGS, TABLES, StoppedError, digest_of_code, write
from reproduce.recipes.__main__ import main
from reproduce.recipes.catalogue import Catalogue, read_catalogue
from reproduce.recipes.folder import RESULT, RUN, TRAINING, Part, _train, parts_of
from reproduce.recipes.measure import outputs_of

ROOT = Path(__file__).parents[3]
LIST: dict[str, Any] = {
    "pairs": {
        "embedded": {
            "title": "embedded pair",
            "config": "organism",
            "settings": {
                "adapter.n_features": 32,
                "objective.checkpoint": "none",
                "optimizer.batch_size": 1,
                "optimizer.max_steps": 2,
                "run.dead_window": 20,
            },
            "l0": [2.0, 8.0],
            "texts": 4,
            "judged": {"seeds": 1, "texts": 30, "units": 2, "before": 3, "after": 1},
        }
    },
    "recipes": [
        {
            "name": "l1",
            "description": "ReLU with the L1 penalty",
            "setting": "objective.sparsity",
            "values": {"embedded": [0.1, 0.03, 0.01]},
        },
        {
            "name": "topk",
            "description": "the k largest activations",
            "overrides": {"adapter.activation": "topk", "objective.sparsity": 0.0},
            "setting": "adapter.k",
            "values": {"embedded": [1, 4, 9]},
        },
    ],
}


def listed(folder: Path, change: Callable[[dict[str, Any]], object] = lambda _: None) -> Path:
    """Write the list, after a change, and return its path."""
    values = copy.deepcopy(LIST)
    change(values)
    path = folder / "recipes.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


# --- the list ---


def test_the_shipped_list_is_of_runs_that_can_be_configured() -> None:
    catalogue = read_catalogue()
    parts = parts_of(Path("out"), catalogue, list(catalogue["pairs"]), names(catalogue), 3)
    per_seed = sum(len(v) for recipe in catalogue["recipes"] for v in recipe["values"].values())
    assert len(parts) == len({part.folder for part in parts}) == 3 * per_seed
    assert {part.seed for part in parts[:per_seed]} == {1}  # the first seed is whole first
    for part in parts:
        config = part.config
        assert (config.run.seed, config.run.threads) == (part.seed, 1)
        if config.adapter.activation in ("topk", "batch_topk"):
            assert config.objective.sparsity == 0
        shared = catalogue["pairs"][part.pair]["settings"]
        assert config.optimizer.max_steps == shared["optimizer.max_steps"]


def names(catalogue: Catalogue) -> list[str]:
    return [recipe["name"] for recipe in catalogue["recipes"]]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda v: v["recipes"][1].update(name="l1"), "each name once"),
        (lambda v: v["recipes"][1].update(baseline="l2"), "baseline: expected one of l1, topk"),
        (lambda v: v["recipes"][1].update(values={"real": [1, 2, 3]}), "expected pairs embedded"),
        (lambda v: v["recipes"][1]["values"].update(embedded=[1, 2]), "at least|length >= 3"),
        (lambda v: v["recipes"][1]["values"].update(embedded=[1, 2, 2]), "each value once"),
        (lambda v: v["recipes"][0].update(values={}), "its baseline l1 has none for embedded"),
        (lambda v: v["recipes"][0].update(name="a/b"), "name"),
        (lambda v: v["recipes"][0].pop("setting"), "setting"),
    ],
)
def test_a_wrong_list_is_one_clear_error(
    tmp_path: Path, change: Callable[[dict[str, Any]], object], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        read_catalogue(listed(tmp_path, change))


def test_a_setting_that_does_not_exist_is_named(tmp_path: Path) -> None:
    path = listed(tmp_path, lambda v: v["recipes"][1].update(setting="adapter.kk"))
    with pytest.raises(UserError, match=r"topk, adapter.kk 1.*unknown key adapter\.kk"):
        run(tmp_path / "out", path)
    assert not (tmp_path / "out").exists()


def test_a_pair_whose_files_are_missing_says_how_to_make_them(tmp_path: Path) -> None:
    needs = {"paths": [str(tmp_path / "none")], "command": "make real"}
    path = listed(tmp_path, lambda v: v["pairs"]["embedded"].update(needs=needs))
    with pytest.raises(UserError, match=r"pair embedded needs .*none, .* run make real, or name"):
        run(tmp_path / "out", path)
    (tmp_path / "none").mkdir()
    with pytest.raises(UserError, match="holds no table of recipes"):
        run(tmp_path / "out", path, "--summary")


# --- what is measured ---


def test_measures_are_those_of_the_training(make_pair: Callable[..., Any]) -> None:
    model = ReplacementModel.create(make_pair("qwen2"), AdapterConfig(24))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        adapter: Any
        for adapter in model.adapters:
            adapter.W_dec.normal_(0, 0.1, generator=generator)
            adapter.b_enc -= 0.3
    rows = [torch.randint(3, 40, (n,), generator=generator) for n in (8, 5, 3)]
    batches = [collate_whole([row]) for row in rows]
    texts, fired = outputs_of(model.eval(), batches)
    want = evaluate(model, batches)
    assert (texts["tokens"], texts["predicted"]) == ([8, 5, 3], [7, 4, 2])
    for key, name in (("kl", "kl_adapter"), ("kl_hybrid", "kl_hybrid")):
        per_text = [kl / n for kl, n in zip(texts[key], texts["predicted"], strict=True)]  # type: ignore[literal-required]
        assert sum(per_text) / 3 == pytest.approx(want[name], rel=1e-5)
    assert sum(texts["active"]) / 16 / model.n_layers == pytest.approx(want["l0_mean"])
    assert (fired == 0).sum(1).tolist() == want["n_dead_per_layer"]
    assert 0 < int((fired == 0).sum()) < fired.numel()


# --- the command ---


def run(out: Path, path: Path, *arguments: str, removed: Path | None = None) -> int:
    elsewhere = removed or out.parent / "removed.json"
    common = ["--catalogue", str(path), "--out", str(out), "--removed", str(elsewhere)]
    return main([*common, "--seeds", "2", *arguments])


def parts(out: Path, path: Path, seeds: int = 2) -> list[Part]:
    catalogue = read_catalogue(path)
    return parts_of(out, catalogue, list(catalogue["pairs"]), names(catalogue), seeds)


def measure_part(part: Part, n: int = 4) -> None:
    """Write a result: KL is 1 / L0 with l1, at L0s 1, 4 and 16, and a tenth less with topk."""
    number = part.recipe["values"][part.pair].index(part.value)
    l0, factor = 4.0**number, 1.0 if part.recipe["name"] == "l1" else 0.9
    spread = [0.8, 1.2] * (n // 2)
    part.folder.mkdir(parents=True, exist_ok=True)
    result = {
        **part.stamps,
        "pair": part.pair,
        "recipe": part.recipe["name"],
        "value": part.value,
        "seed": part.seed,
        "layers": 4,
        "features": 128,
        "silent": 16 * number,
        "dead": 8 * number,
        "texts": {
            "tokens": [10] * n,
            "predicted": [9] * n,
            "kl": [9 * factor * s / l0 for s in spread],
            "kl_hybrid": [9 * 1.5] * n,
            "active": [round(4 * 10 * l0)] * n,
        },
        "detection": {"accuracy": 0.75, "units": 8} if part.is_judged else None,
        "cost": {"steps": 2, "tokens": 80, "flops": 2e12, "cpu_s": None, "peak_bytes": 10**8},
        "commit": "c" * 40,
        "date": "2026-01-31",
    }
    write(part.folder / MEASURED, result)


@pytest.fixture
def finished(tmp_path: Path) -> tuple[Path, Path]:
    """A folder whose parts are all measured, and its list."""
    out, path = tmp_path / "out", listed(tmp_path)
    for part in parts(out, path):
        measure_part(part)
    write(out / SETTINGS, {"training": "recipes", "measuring": "0" * 64})
    return out, path


def result_of(out: Path) -> dict[str, Any]:
    result: dict[str, Any] = json.loads((out / RESULT).read_text())
    embedded: dict[str, Any] = result["pairs"]["embedded"]
    return embedded


def test_finished_parts_are_not_repeated(
    finished: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    out, path = finished
    page = out.parent / "page.md"
    assert run(out, path, "--page", str(page)) == 0
    embedded = result_of(out)
    assert embedded["l0"] == pytest.approx([4.0, 2.0, 8.0])
    l1, topk = embedded["recipes"]
    assert [each["mean"] for each in l1["kl"]] == pytest.approx([1 / 4, 1 / 2, 1 / 8])
    assert l1["change"] == [None] * 3
    for each in topk["change"]:
        assert each["mean"] == pytest.approx(-0.1)
    assert topk["silent"] == pytest.approx([16 / 128, 8 / 128, 24 / 128])
    assert topk["detection"] == pytest.approx([0.75] * 3)  # of the seed that is judged
    assert topk["cpu_s"] == [None] * 3
    printed, tables = capsys.readouterr().out, (out / TABLES).read_text()
    assert "-10.0% [" in printed
    assert "## KL at equal L0, embedded pair" in tables
    assert "the hybrid's KL is 1.50" in tables
    for name in ("embedded.png", "embedded.svg"):
        assert (out / name).read_bytes() == (page.with_suffix("") / name).read_bytes()
    text = page.read_text()
    assert text.startswith("# Recipes\n")
    assert "(page/embedded.png)" in text
    assert tables in text
    assert "Not measured yet" not in text
    assert not (out / "embedded/l1/0.1/seed1/run").exists()


def test_what_is_not_reached_says_so(finished: tuple[Path, Path]) -> None:
    out, path = finished
    path.write_text(path.read_text().replace("- 8.0", "- 17.0"))
    for part in parts(out, path):
        measure_part(part)
    assert run(out, path) == 0
    l1, topk = result_of(out)["recipes"]
    assert (l1["kl"][2]["mean"], topk["change"][2]["mean"], topk["dead"][2]) == (None, None, None)
    assert "not reached" in (out / TABLES).read_text()


def test_a_summary_is_of_recipes_with_all_values(
    finished: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    out, path = finished
    absent = parts(out, path)[-1]  # of topk and seed 2
    (absent.folder / MEASURED).unlink()
    other = parts(out, path)[0]
    stale = json.loads((other.folder / MEASURED).read_text()) | {"rules": "0" * 64}
    write(other.folder / MEASURED, stale)
    assert run(out, path, "--summary") == 0
    printed = capsys.readouterr().out
    assert f"Not measured yet: {other.label}; {absent.label}." in printed
    l1, topk = result_of(out)["recipes"]
    assert (l1["seeds"], topk["seeds"]) == ([2], [1])
    assert topk["change"] == [None] * 3  # no common seed
    for part in parts(out, path):
        if part.recipe["name"] == "topk":
            (part.folder / MEASURED).unlink(missing_ok=True)
    assert run(out, path, "--summary", "--page", str(out.parent / "page.md")) == 0
    assert "Not measured yet: topk (embedded pair).\n" in (out.parent / "page.md").read_text()


def test_other_settings_make_a_part_unmeasured(finished: tuple[Path, Path]) -> None:
    out, path = finished
    assert all(part.measured() for part in parts(out, path))
    text = path.read_text()
    path.write_text(text.replace("adapter.n_features: 32", "adapter.n_features: 33"))
    assert not any(part.measured() for part in parts(out, path))
    path.write_text(text.replace("the k largest", "k"))  # words count for nothing
    assert all(part.measured() for part in parts(out, path))
    changed = text.replace("objective.sparsity: 0.0", "objective.sparsity: 0.5")
    path.write_text(changed)
    assert [bool(part.measured()) for part in parts(out, path, 1)] == [True] * 3 + [False] * 3


def test_a_run_is_repeated_only_with_other_settings(finished: tuple[Path, Path]) -> None:
    out, path = finished
    part = parts(out, path)[0]
    run, stop = part.folder / RUN, Event()
    result = json.loads((part.folder / MEASURED).read_text())
    result["cost"]["cpu_s"] = 12.5
    write(part.folder / MEASURED, result)
    write(part.folder / TRAINING, {"training": part.stamps["training"]})
    run.mkdir()
    write(run / "summary.json", {})
    assert _train(part, lambda *_: None, stop) == 12.5
    path.write_text(path.read_text().replace("units: 2", "units: 3"))  # what is judged, not trained
    (same,) = parts(out, path)[:1]
    assert same.measured() is None
    assert _train(same, lambda *_: None, stop) == 12.5
    path.write_text(path.read_text().replace("adapter.n_features: 32", "adapter.n_features: 33"))
    (other,) = parts(out, path)[:1]
    stop.set()
    with pytest.raises(StoppedError):  # before the first step
        _train(other, lambda *_: None, stop)
    assert not (run / "summary.json").exists()
    assert load_config(run / "config.yaml").adapter.n_features == 33
    assert not (part.folder / MEASURED).exists()


def test_other_files_are_refused(tmp_path: Path) -> None:
    out, path = tmp_path / "out", listed(tmp_path)
    with pytest.raises(UserError, match="holds no table of recipes; leave out --summary"):
        run(out, path, "--summary")
    assert not out.exists()
    out.mkdir()
    (out / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match=r"not of this table of recipes \(it holds notes.txt\)"):
        run(out, path)
    assert [p.name for p in out.iterdir()] == ["notes.txt"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--pairs", "other"), "--pairs: expected some of embedded, got other"),
        (("--recipes", "l2"), "--recipes: expected some of l1, topk, got l2"),
        (("--seeds", "0"), "--seeds: expected 1 or more, got 0"),
    ],
)
def test_impossible_options_are_refused(
    tmp_path: Path, arguments: tuple[str, ...], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        run(tmp_path / "out", listed(tmp_path), *arguments)
    assert not (tmp_path / "out").exists()


def test_a_damaged_part_is_named(finished: tuple[Path, Path]) -> None:
    out, path = finished
    damaged = parts(out, path)[2].folder / MEASURED
    for text in ("{", '{"rules": 1}', damaged.read_text().replace('"seed": 1', '"seed": -1')):
        damaged.write_text(text)
        with pytest.raises(UserError, match=r"embedded/l1/0\.01/seed1/measured\.json"):
            run(out, path)


def test_what_another_process_works_on_is_left_to_it(
    finished: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    out, path = finished
    theirs = parts(out, path)[1]
    (theirs.folder / MEASURED).unlink()
    with locked(theirs.folder / ".lock"):
        assert run(out, path) == 0
    printed = capsys.readouterr()
    assert f"{theirs.label}: another process is at it" in printed.err
    assert f"Not measured yet: {theirs.label}." in printed.out
    assert not (out / RESULT).exists()


def test_a_removed_recipe_stays_a_row(finished: tuple[Path, Path]) -> None:
    out, path = finished
    removed = out.parent / "removed.json"
    assert run(out, path, "--record", "topk") == 0
    assert [each["is_removed"] for each in result_of(out)["recipes"]] == [False, False]
    without = yaml.safe_load(path.read_text())
    del without["recipes"][1]
    path.write_text(yaml.safe_dump(without))
    assert run(out, path, removed=removed) == 0
    l1, topk = result_of(out)["recipes"]
    assert (l1["name"], topk["name"], topk["is_removed"]) == ("l1", "topk", True)
    assert topk["change"][0]["mean"] == pytest.approx(-0.1)
    assert "topk (removed; measured at ccccccccc, 2026-01-31)" in (out / TABLES).read_text()
    other = path.read_text().replace("adapter.n_features: 32", "adapter.n_features: 33")
    path.write_text(other)  # runs of other settings are not compared
    for part in parts(out, path):
        measure_part(part)
    assert run(out, path, removed=removed) == 0
    assert [each["name"] for each in result_of(out)["recipes"]] == ["l1"]
    removed.write_text('{"schema_version": 2, "recipes": []}')
    with pytest.raises(UserError, match=r"removed\.json"):
        run(out, path, removed=removed)


def test_only_measured_recipes_are_recorded(finished: tuple[Path, Path]) -> None:
    out, path = finished
    for part in parts(out, path):
        if part.recipe["name"] == "topk":
            (part.folder / MEASURED).unlink()
    with pytest.raises(UserError, match="--record: nothing is measured of topk yet"):
        run(out, path, "--record", "topk")


def test_a_digest_of_code_ignores_its_words(tmp_path: Path) -> None:
    file = tmp_path / "rule.py"
    file.write_text('def rule():\n    """Double."""\n    return 2\n')
    before = digest_of_code([str(file)], 1)
    file.write_text('# a comment\ndef rule():\n    """Twice."""\n\n    return 2\n')
    assert digest_of_code([str(file)], 1) == before
    assert digest_of_code([str(file)], 2) != before
    file.write_text("def rule():\n    return 3\n")
    assert digest_of_code([str(file)], 1) != before


@pytest.mark.slow
def test_a_kill_and_two_processes_give_the_same_numbers(tmp_path: Path) -> None:
    path, whole, cut = listed(tmp_path, topk_alone), tmp_path / "whole", tmp_path / "cut"
    command = [sys.executable, "-m", "reproduce.recipes", "--catalogue", str(path), "--seeds", "1"]
    command += ["--removed", str(tmp_path / "none.json"), "--out"]
    subprocess.run([*command, str(whole)], cwd=ROOT, check=True, capture_output=True)
    process = subprocess.Popen([*command, str(cut)], cwd=ROOT)
    while not list(cut.rglob(MEASURED)) and process.poll() is None:
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (cut / RESULT).exists()
    both = [subprocess.Popen([*command, str(cut)], cwd=ROOT) for _ in range(2)]
    assert [process.wait() for process in both] == [0, 0]
    first, second = (numbers(folder, path) for folder in (whole, cut))
    assert first == second
    assert len(first) == 3
    costs = [each["cost"] for each in first]
    assert all(cost["flops"] > 0 and cost["peak_bytes"] > 0 for cost in costs)
    active, tokens = first[0]["texts"]["active"], first[0]["texts"]["tokens"]
    assert active == [4 * n for n in tokens]  # k = 1 in each of four layers
    assert first[0]["detection"]["units"] > 0
    assert not list(whole.rglob("checkpoints"))


def topk_alone(values: dict[str, Any]) -> None:
    del values["recipes"][0]
    values["recipes"][0]["baseline"] = "topk"


def numbers(out: Path, path: Path) -> list[dict[str, Any]]:
    """Return what is measured of all parts, without the time that it took."""
    results: list[Any] = [copy.deepcopy(part.measured()) for part in parts(out, path, 1)]
    for result in results:
        result["cost"]["cpu_s"] = None
    return results
