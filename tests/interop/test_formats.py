"""`fastadapt export` and `fastadapt import` for the formats of other projects."""

from __future__ import annotations

import json
import re
import sys
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, get_args

import numpy as np
import pytest
import torch
from organism_runs import make_run
from safetensors.torch import load_file
from sets import assert_equal, make_set, outputs, weights_of
from stores import StoreText, make_store

import fastadapt
from fastadapt.adapter.coder_files import read_coders, save_coders
from fastadapt.adapter.files import adapter_digest
from fastadapt.cli.export import Checkpoint, Coders, Format
from fastadapt.cli.main import main
from fastadapt.errors import UserError
from fastadapt.interop.formats import FORMATS, export_coders, require_output
from fastadapt.interop.neuronpedia import write_record
from fastadapt.models.huggingface.checkpoint import RECORD, Kind, export_kind
from fastadapt.organism import FOLDER

#: A set that each format holds.
HELD = {
    "saelens": make_set("skip", "jumprelu", layers=(1, 12)),
    "sparsify": make_set("subtracting sae", "topk", layers=(1, 12)),
    "circuit-tracer": make_set("mlp", "relu", square=True),
    "dictionary-learning": make_set("subtracting sae", "batch_topk", layers=(1, 12)),
}


def run(*argv: object) -> int:
    return main([str(word) for word in argv])


def test_every_format_has_a_case_and_an_option() -> None:
    assert HELD.keys() == FORMATS.keys() == set(get_args(Coders))
    assert set(get_args(Format)) == {*get_args(Checkpoint), *FORMATS, "neuronpedia"}


@pytest.mark.parametrize("name", FORMATS)
def test_export_and_import_give_the_same_coders(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ours, out, back = (tmp_path / part for part in ("ours", "out", "back"))
    save_coders(HELD[name], ours)
    assert run("export", ours, "--output", out, "--format", name) == 0
    assert f"Load it with:  {FORMATS[name].loading.split(';')[0]}" in capsys.readouterr().out
    record = json.loads((out / RECORD).read_text())
    assert (record["format"], record["layers"]) == (name, list(HELD[name].layers))
    assert record["hooks"]["input"] == dict(HELD[name].hooks.input)
    assert run("import", out, "--output", back) == 0
    printed = capsys.readouterr().out
    assert "2 layers" in printed
    assert f"fastadapt.load_adapters('{back}')" in printed
    loaded = fastadapt.load_adapters(back)[0][0]
    assert f"fastadapt.{type(loaded).__name__}:" in printed
    called = loaded(torch.zeros(2, 5))
    assert isinstance(called, tuple) == ("out, counts = module(x)" in printed)
    again = read_coders(back)
    assert_equal(HELD[name], again)
    assert again.metadata["imported"] == {"format": name, "path": str(out)}
    # Again over an earlier result, with --overwrite alone; and with a typed format and model.
    for words in (("export", ours, "--format", name), ("import", out)):
        target = out if words[0] == "export" else back
        assert run(*words, "--output", target) == 2
        assert "--overwrite" in capsys.readouterr().err
        assert run(*words, "--output", target, "--overwrite") == 0
    assert run("import", out, "--output", tmp_path / "named", "--model", "org/\u202eb") == 0
    assert read_coders(tmp_path / "named").model == "org/\u202eb"
    assert "of org/⟨U+202E⟩b:" in capsys.readouterr().out
    # An export of another format for coders is replaced too.
    plain = tmp_path / "plain"
    save_coders(make_set("subtracting sae", "relu"), plain)
    for other in ("saelens", "sparsify"):
        assert run("export", plain, "--format", other, "--output", out, "--overwrite") == 0
        assert json.loads((out / RECORD).read_text())["format"] == other
    assert {path.name for path in out.iterdir()} == {RECORD, "layers.0", "layers.1"}
    (out / "notes.txt").write_text("mine")
    assert run("export", ours, "--format", name, "--output", out, "--overwrite") == 2
    assert (out / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize("name", FORMATS)
def test_an_adapter_never_becomes_a_replacement(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each format refuses adapters, except SAELens', whose files say how to add them."""
    adapters = make_set("adapter", square=True)
    save_coders(adapters, tmp_path / "ours")
    code = run("export", tmp_path / "ours", "--output", tmp_path / "out", "--format", name)
    if name != "saelens":
        assert code == 2
        assert "in place of the MLPs that they are added to" in capsys.readouterr().err
        assert not (tmp_path / "out").exists()
        return
    assert code == 0
    assert "attach(" in capsys.readouterr().out
    assert run("import", tmp_path / "out", "--output", tmp_path / "back") == 0
    assert_equal(adapters, read_coders(tmp_path / "back"))
    again = read_coders(tmp_path / "back")
    assert again.is_additive
    assert again.metadata["target"] == "org/model"
    assert "base" not in again.metadata  # which model it is stands in no file of SAELens


@pytest.mark.parametrize("layers", [(0, 1, 2), (1, 12)])
@pytest.mark.parametrize("name", ["saelens", "dictionary-learning"])
def test_the_printed_code_loads_every_layer(
    name: str, layers: tuple[int, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kind = "adapter" if name == "saelens" else "subtracting sae"
    coders, out = make_set(kind, layers=layers), tmp_path / "it's {here}"
    save_coders(coders, tmp_path / "ours")
    attached: list[Any] = []
    monkeypatch.setattr("fastadapt.interop.saelens.attach", lambda _, saes: attached.extend(saes))
    theirs = ModuleType("sae_lens")
    theirs.SAE = SimpleNamespace(  # type: ignore[attr-defined]
        load_from_disk=lambda path: load_file(Path(path) / "sae_weights.safetensors")
    )
    monkeypatch.setitem(sys.modules, "sae_lens", theirs)
    code = export_coders(tmp_path / "ours", out, name)[0].splitlines()[0]
    names: dict[str, Any] = {"model": None}
    exec(code, names)
    loaded = attached if name == "saelens" else names["state_dicts"]
    assert len(loaded) == len(layers)
    key = "b_enc" if name == "saelens" else "encoder.bias"
    for weights, (_, coder) in zip(loaded, coders.coders(), strict=True):
        assert torch.equal(weights[key], coder.b_enc)


def test_exports_of_other_kinds_are_not_replaced(tmp_path: Path) -> None:
    """Each kind has patterns that match some files of another, so names do not decide."""
    save_coders(make_set("transcoder"), tmp_path / "ours")
    for kind, words in {
        "set of coders": ("export", tmp_path / "ours", "--format", "saelens"),
        "import": ("import", tmp_path / "set of coders"),
    }.items():
        assert run(*words, "--output", tmp_path / kind) == 0
    (tmp_path / "neuronpedia" / "layer_0").mkdir(parents=True)
    write_record(tmp_path / "neuronpedia" / RECORD, model_id="m", source_set="s")
    (tmp_path / "checkpoint").mkdir()
    (tmp_path / "checkpoint" / "config.json").write_text('{"transcoder_n_features": 8}')
    written: dict[Kind, Path] = {kind: tmp_path / kind for kind in get_args(Kind)}
    for kind, folder in written.items():
        assert export_kind(folder) == kind
        for other in written:
            message = f"--output: {folder} holds an export of another kind: expected {other}, got "
            with pytest.raises(UserError, match=message + kind) if kind != other else nullcontext():
                require_output(folder, ("*",), other, overwrite=True)


def test_coders_go_from_format_to_format(tmp_path: Path) -> None:
    """A ReLU transcoder converted to all four formats in turn has bitwise equal outputs."""
    coders = make_set("transcoder", square=True)
    save_coders(coders, tmp_path / "0")
    for i, name in enumerate(FORMATS):
        model = () if i == 0 else ("--model", "org/model")
        assert run("export", tmp_path / f"{i}", "--output", tmp_path / name, "--format", name) == 0
        assert run("import", tmp_path / name, "--output", tmp_path / f"{i + 1}", *model) == 0
    x = torch.randn(9, 5, generator=torch.Generator().manual_seed(0))
    again = outputs(read_coders(tmp_path / "4"), x)
    for layer, out in outputs(coders, x).items():
        assert torch.equal(again[layer], out)


MISTAKES: dict[str, tuple[tuple[Any, ...], str]] = {
    "nothing": (("import", "{tmp}/empty"), "expected a folder, or one with a folder per layer"),
    "no folder": (("import", "org/m"), "org/m: no such folder; download .*hf download org/m"),
    "a run": (("import", "{tmp}/run"), "run/adapter is a folder of this library"),
    "a run as adapters": (
        ("export", "{tmp}/run", "--format", "adapters"),
        "run/adapter holds adapters in this library's format already",
    ),
    "a control character": (("import", "{tmp}/saelens", "--model", "\x1b[31m"), "--model: .*"),
    "a hidden character": (("import", "a\u202eb"), "a⟨U\\+202E⟩b: no such folder"),
    "a store for another format": (
        ("export", "{tmp}/ours", "--format", "saelens", "--store", "{tmp}"),
        "--store: not used with --format saelens, only with circuit-tracer",
    ),
    "TopK without features": (
        ("export", "{tmp}/topk", "--format", "circuit-tracer"),
        "has no TopK. .*--store RUN.* fastadapt features collect {tmp}/topk",
    ),
    "an import without a name": (
        ("generate", "{tmp}/nameless", "hello", "--plain"),
        r"config.yaml, got neither; import the set again and name its model \(--model\)",
    ),
    "ours": (("import", "{tmp}/ours"), "is a folder of this library"),
    "a format that it is not": (
        ("import", "{tmp}/saelens", "--format", "sparsify"),
        r"expected a folder with cfg.json and sae.safetensors",
    ),
    "an option of other formats": (
        ("export", "{tmp}/ours", "--format", "saelens", "--base", "org/base"),
        "--base: not used with --format saelens",
    ),
    "neuronpedia's option": (
        ("export", "{tmp}/ours", "--format", "saelens", "--model_id", "m"),
        "--model_id: not used with --format saelens, only with neuronpedia",
    ),
    "a folder in use": (("import", "{tmp}/saelens", "--output", "{tmp}"), "--output: .* neither"),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_mistakes(case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_coders(make_set("skip"), tmp_path / "ours")
    (tmp_path / "empty").mkdir()
    save_coders(make_set("adapter"), tmp_path / "run" / "adapter")
    save_coders(make_set("transcoder", "topk", square=True), tmp_path / "topk")
    nameless = replace(make_set("transcoder", square=True), model=None)
    save_coders(replace(nameless, metadata={"imported": {}}), tmp_path / "nameless")
    words = ("--output", tmp_path / "saelens", "--format", "saelens")
    assert run("export", tmp_path / "ours", *words) == 0
    capsys.readouterr()
    typed, reason = MISTAKES[case]
    argv = [word.replace("{tmp}", str(tmp_path)) for word in typed]
    argv += [] if {"--output", "generate"} & {*argv} else ["--output", str(tmp_path / "out")]
    assert run(*argv) == 2
    error = " ".join(capsys.readouterr().err.split())
    assert "\x1b" not in error
    assert re.search(reason.replace("{tmp}", str(tmp_path)), error), error
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_a_run_with_topk_gets_thresholds_fitted_on_its_texts(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from transformers import AutoModelForCausalLM

    run_dir = make_run(tmp_path / "run", activation="topk", k=3, base_mlp=False)
    words = ("export", run_dir, "--output", tmp_path / "out", "--format")
    assert run(*words, "circuit-tracer") == 2
    assert "run fastadapt features collect" in capsys.readouterr().err
    draw = np.random.default_rng(0)
    ids = [draw.integers(5, 60, 40).tolist() for _ in range(4)]
    texts, silent = [StoreText(t, [5] * 40) for t in ids], np.zeros((4, 40, 24), np.float32)
    strings = [str(i) for i in range(64)]
    digest = adapter_digest(run_dir / "adapter")
    make_store(run_dir / "features", texts, [silent] * 4, strings, adapter=digest)
    assert run(*words, "circuit-tracer") == 0
    assert "TopK is replaced by JumpReLU" in capsys.readouterr().out
    coders = FORMATS["circuit-tracer"].read(tmp_path / "out")
    exact = read_coders(run_dir / "adapter")
    model = AutoModelForCausalLM.from_pretrained(FOLDER / "target")
    for layer, coder in coders.coders():
        seen: list[torch.Tensor] = []
        handle = model.model.layers[layer].mlp.register_forward_pre_hook(
            lambda _, args, seen=seen: seen.append(args[0][0])
        )
        with torch.no_grad():
            for t in ids:
                model(torch.tensor([t]))
        handle.remove()
        fitted = torch.cat(seen)[:80]
        # As many features fire on the first half of the texts as TopK has.
        topk = exact.layers[layer]().eval().encode(fitted)
        active = int((topk > 0).sum())
        assert int((coder.encode(fitted) > 0).sum()) == active > 80
        assert torch.equal(coder.W_dec, exact.layers[layer]().W_dec)
    assert run("export", run_dir, "--output", tmp_path / "c", "--format", "sparsify") == 0
    # An import of the same transcoders takes the texts of the run, and gets the same thresholds.
    assert run("import", tmp_path / "c", "--output", tmp_path / "d") == 0
    b = ("--output", tmp_path / "b", "--format", "circuit-tracer", "--store", run_dir)
    assert run("export", tmp_path / "d", *b) == 2
    assert "got those of" in capsys.readouterr().err  # sparsify's files name no model
    assert run("export", tmp_path / "d", *b, "--target", "organism/target") == 0
    imported = weights_of(FORMATS["circuit-tracer"].read(tmp_path / "b"))
    for layer, weights in weights_of(coders).items():
        for name, tensor in weights.items():
            assert torch.equal(imported[layer][name], tensor)
    again = weights_of(FORMATS["sparsify"].read(tmp_path / "c"))
    for layer, weights in weights_of(exact).items():
        assert all(torch.equal(again[layer][name], tensor) for name, tensor in weights.items())
