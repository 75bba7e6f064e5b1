"""Overlays override presets and files, and every combination has its own output folder."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from fastadapt.cli.train import (
    OVERLAYS,
    overlay_names,
    parse_train,
    preset_names,
    read_yaml,
)


def printed(fastadapt: Callable[..., Any], *argv: object) -> dict[str, Any]:
    outcome = fastadapt("train", *argv, "--print_config")
    assert outcome.code == 0, outcome.err
    return yaml.safe_load(outcome.out)


def changed(before: dict[str, Any], after: dict[str, Any]) -> dict[str, Any]:
    """Return the keys in which two configurations differ, with the values of the second."""
    return {
        f"{component}.{key}": value
        for component, fields in after.items()
        for key, value in fields.items()
        if before[component][key] != value
    }


@pytest.mark.parametrize("preset", ["organism", "r1-distill-qwen-7b", "qwq-32b"])
@pytest.mark.parametrize("overlay", overlay_names())
def test_an_overlay_changes_what_it_says_and_the_folder(
    fastadapt: Callable[..., Any], preset: str, overlay: str
) -> None:
    before, after = printed(fastadapt, preset), printed(fastadapt, preset, overlay)
    written = read_yaml(OVERLAYS / f"{overlay}.yaml")
    variant = OVERLAYS / preset / f"{overlay}.yaml"
    for component, fields in (read_yaml(variant) if variant.is_file() else {}).items():
        written[component] = {**written.get(component, {}), **fields}
    expected = {f"{c}.{k}": v for c, fields in written.items() for k, v in fields.items()}
    assert expected.items() >= changed(before, after).items() - {
        ("run.output", after["run"]["output"])
    }
    assert all(after[key.split(".")[0]][key.split(".")[1]] == v for key, v in expected.items())
    assert after["run"]["output"] == f"{before['run']['output']}-{overlay}"


def test_the_baselines_of_the_method(fastadapt: Callable[..., Any]) -> None:
    whole = printed(fastadapt, "r1-distill-qwen-7b")
    dense, bare, whole_mlp, skyline, norms, bias, lora = (
        printed(fastadapt, "r1-distill-qwen-7b", name)
        for name in ("dense", "no-bridge", "whole-mlp", "skyline", "norms", "bias", "lora")
    )
    folder = whole["run"]["output"]
    assert changed(whole, dense) == {"objective.sparsity": 0, "run.output": f"{folder}-dense"}
    assert changed(whole, bare) == {"objective.bridge": 0, "run.output": f"{folder}-no-bridge"}
    name = f"{folder}-whole-mlp"
    assert changed(whole, whole_mlp) == {"adapter.base_mlp": False, "run.output": name}
    kinds = ((skyline, "mlp", None), (norms, "norms", None), (bias, "bias", None))
    for tuned, kind, n_features in (*kinds, (lora, "lora", 8192)):
        assert tuned["run"]["trains"] == kind
        assert tuned["adapter"]["n_features"] == n_features
        assert {tuned["objective"][name] for name in ("sparsity", "nmse", "bridge")} == {0}


def test_the_older_option_adapter_kind_is_accepted(
    fastadapt: Callable[..., Any], recipe: Callable[..., Path], tmp_path: Path
) -> None:
    file = tmp_path / "old.yaml"
    file.write_text("adapter: {kind: mlp, n_features: null}\nobjective: {sparsity: 0}\n")
    typed = ("--adapter.kind", "mlp", "--adapter.n_features", "null", "--objective.sparsity", 0)
    by_file, by_option = (printed(fastadapt, recipe(), *more) for more in ([file], typed))
    assert by_file["run"]["trains"] == by_option["run"]["trains"] == "mlp"
    assert printed(fastadapt, recipe(), "norms", "--adapter.kind", "mlp")["run"]["trains"] == "mlp"


def test_every_overlay_of_a_preset_has_both() -> None:
    known = ["best", "bias", "dense", "lora", "no-bridge", "norms", "skyline", "whole-mlp"]
    assert overlay_names() == known
    for path in OVERLAYS.glob("*/*.yaml"):
        assert path.parent.name in preset_names()
        assert path.stem in overlay_names()


def test_later_ones_win_and_what_is_typed_wins_over_all(
    fastadapt: Callable[..., Any], recipe: Callable[..., Path], tmp_path: Path
) -> None:
    first, second = tmp_path / "fast.yaml", tmp_path / "short.yaml"
    first.write_text("optimizer: {lr: 0.5, warmup: 0.25}\nobjective: {nmse: 0.5}\n")
    second.write_text("optimizer: {lr: 0.125}\nrun: {log_every: 2}\n")
    config = printed(fastadapt, recipe(), first, second, "--optimizer.warmup", 0.75)
    assert (config["optimizer"]["lr"], config["optimizer"]["warmup"]) == (0.125, 0.75)
    assert (config["objective"]["nmse"], config["run"]["log_every"]) == (0.5, 2)
    assert config["optimizer"]["max_steps"] == 6  # from the recipe
    assert config["run"]["output"] == str(tmp_path / "run-fast-short")
    typed = printed(fastadapt, recipe(), first, "no-bridge", "--run.output", "here")
    assert typed["run"]["output"] == "here"
    assert printed(fastadapt, "--optimizer.lr", 1, recipe(), second)["optimizer"]["lr"] == 1


def test_a_file_that_names_the_folder_names_it_whole(
    fastadapt: Callable[..., Any], recipe: Callable[..., Path], tmp_path: Path
) -> None:
    file = tmp_path / "there.yaml"
    file.write_text("run: {output: there}\n")
    assert printed(fastadapt, recipe(), file)["run"]["output"] == "there"
    assert printed(fastadapt, recipe(), "dense", file)["run"]["output"] == "there"
    assert printed(fastadapt, recipe(), file, "dense")["run"]["output"] == "there-dense"
    file.write_text("run: {output: there/}\n")
    assert printed(fastadapt, recipe(), file, "dense")["run"]["output"] == "there-dense"


def test_the_preset_does_not_change_with_what_goes_over_it(fastadapt: Callable[..., Any]) -> None:
    whole = printed(fastadapt, "organism")
    printed(fastadapt, "organism", "skyline")
    assert printed(fastadapt, "organism") == whole


def test_help_names_them(fastadapt: Callable[..., Any]) -> None:
    text = " ".join(fastadapt("train", "--help").out.split())
    assert "PRESET_OR_YAML [PRESET_OR_YAML ...]" in text
    assert ", ".join(overlay_names()) in text.replace("- ", "-")  # lines end at hyphens, too


KINDS = {
    "skyline": "tuned MLPs",
    "norms": "refit norms",
    "bias": "biases",
    "lora": "low-rank updates",
}


@pytest.mark.quick("lora", "bias")
@pytest.mark.parametrize("overlay", KINDS)
def test_a_baseline_from_one_command(
    fastadapt: Callable[..., Any], recipe: Callable[..., Path], tmp_path: Path, overlay: str
) -> None:
    path = recipe(**{"run.report": True})
    run = ["train", path, overlay, "--optimizer.max_steps", 6, "--optimizer.lr", 1e-2]
    outcome = fastadapt(*run)
    assert outcome.code == 0, outcome.err
    folder = tmp_path / f"run-{overlay}"
    assert f"The {KINDS[overlay]} recover " in outcome.out
    assert "L0" not in outcome.out + outcome.err
    assert "dead" not in outcome.out + outcome.err
    card = json.loads((folder / "adapter" / "fastadapt.json").read_text())
    assert card["kind"] in ("mlp", "norms", "bias", "lora")
    assert card["additive"] is False
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["adapter_kind"] == card["kind"]
    assert not [key for key in summary if "l0" in key or "density" in key]
    assert summary["dead_per_layer"] == []
    page = (folder / "report.html").read_text()
    assert KINDS[overlay] in page
    for absent in ("L0", "Sparsity", "Feature density", "Bridge"):
        assert absent not in page.split("config.yaml")[0], absent
    again = fastadapt(*run)
    assert again.code == 2
    assert "holds another run, at step 6" in again.err
    assert fastadapt(*run, "--resume").code == 0


def test_a_transcoder_of_the_whole_mlp_trains_stops_and_goes_on(
    fastadapt: Callable[..., Any], recipe: Callable[..., Path], tmp_path: Path
) -> None:
    """Its run is that of an adapter but for the base's MLP; a resumed one has the same weights."""
    from safetensors.torch import load_file

    straight, halves = tmp_path / "straight", tmp_path / "halves"
    run = ["train", recipe(), "whole-mlp", "--run.output"]
    assert fastadapt(*run, straight).code == 0
    shutil.copytree(straight, halves)
    shutil.rmtree(halves / "adapter")
    (halves / "summary.json").unlink()
    newest = sorted((halves / "checkpoints").iterdir())[-1]
    shutil.rmtree(newest)
    outcome = fastadapt(*run, halves, "--resume")
    assert outcome.code == 0, outcome.err
    for layer in ("layer_0", "layer_1"):
        one, other = (
            load_file(folder / "adapter" / f"{layer}.safetensors") for folder in (straight, halves)
        )
        assert all(torch.equal(one[name], other[name]) for name in one)
    summary = json.loads((straight / "summary.json").read_text())
    assert summary["l0_mean"] > 0
    refused = fastadapt("train", recipe(), "lora", "--adapter.base_mlp", "false")
    assert refused.code == 2
    assert "adapter.base_mlp is a setting of transcoders" in " ".join(refused.err.split())


def test_the_command_to_go_on_with_names_them_all(
    recipe: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    from fastadapt.cli.parser import resume_command

    argv = [str(recipe()), "skyline", "--optimizer.lr", "1e-3"]
    config, _ = parse_train(argv)
    again = resume_command(argv).split()
    assert again[1:] == ["train", *argv, "--resume"]
    resumed, flags = parse_train(again[2:])
    assert (resumed, flags.resume) == (config, True)


@pytest.mark.slow
@pytest.mark.parametrize("overlay", [*KINDS, "no-bridge", "dense", "whole-mlp"])
def test_what_it_needs(fastadapt: Callable[..., Any], overlay: str) -> None:
    preset, plan = ("train", "r1-distill-qwen-7b"), ("--dry-run", "--json", "--gpu", "h200")
    planned, whole = (json.loads(fastadapt(*preset, *over, *plan).out) for over in ([overlay], []))
    width, inner, layers = 3584, 18944, 28
    trained = {
        "skyline": 3 * width * inner * layers,
        "norms": width * (2 * layers + 1),
        "bias": width * layers,
        "lora": 869 * 3 * (width + inner) * layers,
    }
    if overlay == "lora":  # to within half of what one rank more has
        assert abs(planned["parameters"] - whole["parameters"]) < 3 * (width + inner) * layers / 2
    assert planned["parameters"] == trained.get(overlay, whole["parameters"])
    assert planned["flops_per_step"] < whole["flops_per_step"] or overlay == "dense"
    assert (planned["l0"] is None) == (overlay in KINDS)
    text = fastadapt("train", "r1-distill-qwen-7b", overlay, "--dry-run", "--gpu", "h200").out
    assert ("at L0" in text) == (overlay not in KINDS)


def test_exports_refuse_what_is_no_transcoder(
    fastadapt: Callable[..., Any], recipe: Callable[..., Path], tmp_path: Path
) -> None:
    assert fastadapt("train", recipe(), "skyline", "--optimizer.max_steps", 2).code == 0
    for format in ("huggingface", "hu2026"):
        outcome = fastadapt(
            "export", tmp_path / "run-skyline", "--output", tmp_path / "out", "--format", format
        )
        assert outcome.code == 2
        assert "needs transcoder adapters; the folder holds weights of kind 'mlp'" in " ".join(
            outcome.err.split()
        )
        assert not Path(tmp_path / "out").exists()
