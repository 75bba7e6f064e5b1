"""A user's mistake gets one clear error, early: its own words, its own exit code, no traceback."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import yaml

TURNS = [{"from": "user", "value": "w1 w2"}, {"from": "assistant", "value": "w3 w4"}]
CONVERSATION = {"conversations": TURNS}


class Desk:
    """What a case arranges its mistake with."""

    def __init__(self, pair: Path, folder: Path, recipe: Callable[..., Path], run: Callable):
        self.pair, self.folder, self.recipe, self.run = pair, folder, recipe, run

    def train(self, *options: object, **changes: object) -> list[object]:
        """`fastadapt train` of the recipe with changes to its file and options after it."""
        return ["train", self.recipe(**changes), *options]

    def yaml(self, change: Callable[[dict], Any]) -> list[object]:
        """`fastadapt train` of the recipe's values after `change`, or of what that returns."""
        path = self.recipe()
        values = yaml.safe_load(path.read_text())
        changed = change(values)
        path.write_text(yaml.safe_dump(values) if changed is None else changed)
        return ["train", path]

    def model(self, which: str, **config: object) -> Path:
        """A copy of the pair's `which` with changes to its config.json."""
        copy = self.folder / f"other-{which}"
        shutil.copytree(self.pair / which, copy)
        self.edit(copy / "config.json", **config)
        return copy

    def edit(self, path: Path, **changes: object) -> None:
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))

    def data(self, *rows: object) -> str:
        """A file of rows; strings are written as they are."""
        path = self.folder / "rows.jsonl"
        lines = [r if isinstance(r, str) else json.dumps(r) for r in rows]
        path.write_text("".join(line + "\n" for line in lines))
        return str(path)

    def finished_run(self, **changes: object) -> Path:
        """The run directory of a run that ended well."""
        outcome = self.run("train", self.recipe(**changes))
        assert outcome.code == 0, outcome.err
        return self.folder / "run"


class Case(NamedTuple):
    """A mistake, the exit code, and what the error must say (a pattern)."""

    name: str
    arrange: Callable[[Desk], list[object]]
    message: str
    code: int = 2


def option(name: str, value: str, message: str) -> Case:
    return Case(f"{name} {value}", lambda d: d.train(name, value), message)


def _vocabulary_renamed(d: Desk) -> list[object]:
    from fastadapt.organism import FOLDER

    base = d.folder / "other-base"
    shutil.copytree(FOLDER / "base", base)
    path = base / "tokenizer.json"
    path.write_text(path.read_text().replace('"wait"', '"pause"'))
    return d.train(**{"pair.target": "organism/target", "pair.base": str(base)})


def _weights_cut(d: Desk, keep: float) -> list[object]:
    path = d.model("target") / "model.safetensors"
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * keep)])
    return d.train(**{"pair.target": str(path.parent)})


def _weights(
    d: Desk, which: str, change: Callable[[dict[str, torch.Tensor]], object]
) -> list[object]:
    from safetensors.torch import load_file, save_file

    path = d.model(which) / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})
    return d.train(**{f"pair.{which}": str(path.parent)})


def _other(d: Desk, **config: object) -> list[object]:
    return d.train(**{"pair.base": str(d.model("base", **config))})


def _no_config(d: Desk) -> list[object]:
    base = d.model("base")
    (base / "config.json").unlink()
    return d.train(**{"pair.base": str(base)})


def _rows(*rows: object, **changes: object) -> Callable[[Desk], list[object]]:
    return lambda d: d.train(**{"data.train": d.data(*rows), **changes})


def _file_in_place_of_folder(d: Desk) -> list[object]:
    (d.folder / "run").write_text("not a folder")
    return d.train()


def _folder_of_something_else(d: Desk) -> list[object]:
    (d.folder / "run").mkdir()
    (d.folder / "run" / "thesis.tex").write_text("years of work")
    return d.train("--overwrite")


def _second_run(d: Desk) -> list[object]:
    d.finished_run()
    return d.train()


def _resume_another(d: Desk) -> list[object]:
    d.finished_run()
    return d.train("--resume", "--optimizer.lr", "2e-3")


def _all_checkpoints_damaged(d: Desk) -> list[object]:
    for path in (d.finished_run() / "checkpoints").glob("step-*/*.safetensors"):
        content = bytearray(path.read_bytes())
        content[-1] ^= 1
        path.write_bytes(content)
    return d.train("--resume")


def _checkpoint_of_another_shape(d: Desk) -> list[object]:
    run = d.finished_run(**{"adapter.n_features": 16})
    kept = d.folder / "kept"
    shutil.move(run / "checkpoints", kept)
    shutil.rmtree(run)
    run = d.finished_run()
    shutil.rmtree(run / "checkpoints")
    shutil.move(kept, run / "checkpoints")
    return d.train("--resume")


def _folder_in_use(d: Desk) -> list[object]:
    (d.folder / "new").mkdir()
    (d.folder / "new" / "file").write_text("")
    return ["organism", "build", "--out", d.folder / "new"]


CASES = [
    # --- the command line
    Case("command", lambda d: ["trian"], r"unknown command 'trian'; did you mean train\?"),
    Case("no config", lambda d: ["train"], r"PRESET_OR_YAML is missing; presets: organism"),
    Case(
        "preset",
        lambda d: ["train", "organsim"],
        r"organsim: no such preset; did you mean organism\?",
    ),
    Case("second positional", lambda d: d.train("more"), r"unexpected argument 'more'"),
    option("--optimizer.learning_rate", "1", r"unknown option --optimizer\.learning_rate"),
    option("--optimizer.lrr", "1", r"--optimizer\.lrr; did you mean --optimizer\.lr\?"),
    Case(
        "abbreviation", lambda d: d.train("--res"), r"unknown option --res; did you mean --resume\?"
    ),
    Case(
        "no value", lambda d: d.train("--optimizer.lr"), r"--optimizer\.lr: expected one argument"
    ),
    option("--optimizer.lr", "fast", r"--optimizer\.lr: expected float, got 'fast'"),
    option("--data.max_tokens", "10.5", r"--data\.max_tokens: expected int, got '10\.5'"),
    option("--adapter.k", "few", r"--adapter\.k: expected float or null, got 'few'"),
    option("--optimizer.betas", "[0.9]", r"--optimizer\.betas: expected a tuple with 2 elements"),
    option(
        "--objective.checkpoint", "maybe", r"--objective\.checkpoint: expected bool, got 'maybe'"
    ),
    Case(
        "both",
        lambda d: d.train("--resume", "--overwrite"),
        r"--resume .* --overwrite .*choose one",
    ),
    Case("organism command", lambda d: ["organism", "biuld"], r"unknown command 'biuld'.*'build'"),
    Case("organism build", lambda d: ["organism", "build"], r"--out is missing"),
    Case("organism out", _folder_in_use, r"--out: .*new is in use.*--overwrite"),
    Case(
        "organism folder",
        lambda d: ["organism", "check", "--folder", d.folder / "no"],
        r"--folder: .*no",
    ),
    # --- the file
    Case("no file", lambda d: ["train", d.folder / "no.yaml"], r"no\.yaml: no such file"),
    Case(
        "no YAML", lambda d: d.yaml(lambda v: "pair: [unclosed"), r"run\.yaml is not YAML: .*line 1"
    ),
    Case("a list", lambda d: d.yaml(lambda v: "- pair\n"), r"expected keys with values, got list"),
    Case("empty file", lambda d: d.yaml(lambda v: ""), r"expected keys with values, got NoneType"),
    Case(
        "unknown key",
        lambda d: d.yaml(lambda v: v["run"].update(sed=1)),
        r"unknown key run\.sed; did you mean run\.seed\?",
    ),
    Case(
        "unknown part",
        lambda d: d.yaml(lambda v: v.update(optimiser={})),
        r"unknown key optimiser; did you mean optimizer\?",
    ),
    Case(
        "missing key",
        lambda d: d.yaml(lambda v: v.update(pair={"target": "x"})),
        r"pair\.base is missing",
    ),
    Case(
        "part is no mapping",
        lambda d: d.yaml(lambda v: v.update(adapter=3)),
        r"adapter: expected keys, got 3",
    ),
    Case(
        "type in the file",
        lambda d: d.yaml(lambda v: v["run"].update(seed="x")),
        r"run\.seed: expected int, got 'x'",
    ),
    # --- impossible values
    option("--optimizer.lr", "-1", r"optimizer\.lr: expected a positive number, got -1\.0"),
    option(
        "--optimizer.betas", "[0.9, 1.5]", r"optimizer\.betas: expected two numbers in \[0, 1\)"
    ),
    option("--optimizer.warmup", "2", r"optimizer\.warmup: .*\[0, 1\], got 2\.0"),
    option("--optimizer.batch_size", "0", r"optimizer\.batch_size: expected 1 or more, got 0"),
    option("--run.keep_checkpoints", "0", r"run\.keep_checkpoints: expected 1 or more, got 0"),
    option("--adapter.n_features", "0", r"adapter\.n_features .*at least 1, got 0"),
    option("--adapter.activation", "gelu", r"adapter\.activation .*relu.*jumprelu, got 'gelu'"),
    option("--adapter.activation", "topk", r"adapter\.k is needed with activation='topk'"),
    option("--adapter.k", "3", r"adapter\.k is not used with activation='relu'"),
    option(
        "--adapter.activation",
        "jumprelu",
        r"adapter\.bandwidth is needed with activation='jumprelu'",
    ),
    Case(
        "k > F",
        lambda d: d.train("--adapter.activation", "topk", "--adapter.k", 25),
        r"adapter\.k .*24.*got 25",
    ),
    option("--adapter.implementation", "cuda", r"implementation .*'cuda'"),
    option("--adapter.implementation", "triton", r"'triton' is not built yet"),
    option("--objective.sparsity", "-0.001", r"objective\.sparsity .*got -0\.001"),
    option("--objective.first_cutoff", "2", r"objective\.first_cutoff must be 0 or 1, got 2"),
    option("--data.max_tokens", "1", r"data\.max_tokens: expected at least 2, got 1"),
    option("--data.family", "llama", r"family.*'llama'"),
    option("--pair.dtype", "float8", r"pair\.dtype must be one of float32.*got 'float8'"),
    option("--pair.device", "abacus", r"pair\.device: .*'abacus'"),
    option(
        "--pair.attention", "telepathy", r"""attn_implementation="telepathy"` is not supported"""
    ),
    # --- the pair
    Case(
        "architecture",
        lambda d: _other(d, model_type="llama"),
        r"not a pair: .*model_type: target 'qwen2', base 'llama'",
    ),
    Case(
        "width",
        lambda d: _other(d, hidden_size=48),
        r"not a pair: .*hidden_size: target 32, base 48",
    ),
    Case(
        "inner width",
        lambda d: _other(d, intermediate_size=96),
        r"intermediate_size: target 64, base 96",
    ),
    Case(
        "layers",
        lambda d: _other(d, num_hidden_layers=3, layer_types=["full_attention"] * 3),
        r"not a pair: .*num_hidden_layers: target 2, base 3",
    ),
    Case(
        "vocabulary",
        lambda d: _other(d, vocab_size=65),
        r"not a pair: .*vocab_size: target 64, base 65",
    ),
    Case(
        "activation function",
        lambda d: _other(d, hidden_act="gelu"),
        r"not a pair: .*hidden_act: target 'silu', base 'gelu'",
    ),
    Case(
        "tokenizer",
        _vocabulary_renamed,
        r"not a pair: their tokenizers differ in 2 tokens; 'pause': target None",
    ),
    Case(
        "no model",
        lambda d: d.train(**{"pair.target": str(d.folder / "nothing")}),
        r"model .*nothing' cannot be loaded: no such folder",
    ),
    Case("no config.json", _no_config, r"other-base.*config\.json"),
    Case(
        "cut weights",
        lambda d: _weights_cut(d, 0.7),
        r"other-target.*(truncated|cut|incomplete|damaged|cannot be read)",
    ),
    Case(
        "header cut",
        lambda d: _weights_cut(d, 0.001),
        r"other-target.*(header|truncated|cut|damaged|cannot be read)",
    ),
    Case(
        "weight missing",
        lambda d: _weights(d, "target", lambda t: t.pop("model.norm.weight")),
        r"other-target.*model\.norm\.weight",
    ),
    Case(
        "base MLP missing",
        lambda d: _weights(d, "base", lambda t: t.pop("model.layers.1.mlp.up_proj.weight")),
        r"other-base.*model\.layers\.1\.mlp\.up_proj\.weight",
    ),
    Case(
        "base MLP misshapen",
        lambda d: _weights(
            d,
            "base",
            lambda t: t.update({"model.layers.0.mlp.up_proj.weight": torch.zeros(64, 31)}),
        ),
        r"other-base.*model\.layers\.0\.mlp\.up_proj\.weight",
    ),
    Case(
        "part of the embedded pair",
        lambda d: d.train(**{"pair.target": "organism/tarket"}),
        r"organism/tarket",
    ),
    # --- the data
    Case("no data", lambda d: d.train(**{"data.train": str(d.folder / "no.jsonl")}), r"no\.jsonl"),
    Case("kind of file", lambda d: d.train(**{"data.train": str(d.recipe())}), r"run\.yaml.*jsonl"),
    Case("no column", _rows({"text": "w1"}), r"rows\.jsonl.*conversations.*text"),
    Case("no JSON", _rows(CONVERSATION, "{broken"), r"rows\.jsonl, line 2: .*JSON"),
    Case("no rows", _rows(), r"rows\.jsonl.*(empty|no )"),
    Case(
        "one turn", _rows({"conversations": TURNS[:1]}), r"rows\.jsonl, line 1: expected two turns"
    ),
    Case(
        "empty sample",
        _rows(CONVERSATION, {"conversations": [TURNS[0], {"from": "assistant", "value": ""}]}),
        r"rows\.jsonl, line 2: turn 2.*is empty",
    ),
    Case("all too long", _rows(CONVERSATION, **{"data.max_tokens": 3}), r"max_tokens"),
    Case("markers", lambda d: d.train(**{"data.family": "qwen"}), r"<\|im_start\|>"),
    # --- the run directory
    Case("a file", _file_in_place_of_folder, r"run\.output: .*run is a file"),
    Case(
        "something else",
        _folder_of_something_else,
        r"run\.output: .*not look like a run.*thesis\.tex.*nothing in it was touched",
    ),
    Case(
        "another run",
        _second_run,
        r"run\.output: .*holds another run, at step 6.*--resume.*--overwrite",
    ),
    Case(
        "read-only",
        lambda d: d.train("--run.output", "/proc/fastadapt"),
        r"run\.output: /proc/fastadapt cannot be made",
    ),
    Case("nothing to resume", lambda d: d.train("--resume"), r"--resume: .*holds no run"),
    Case(
        "resume another",
        _resume_another,
        r"--resume: .*another configuration \(optimizer\.lr: 0\.002, was 0\.01\)",
    ),
    Case(
        "damaged checkpoints",
        _all_checkpoints_damaged,
        r"no checkpoint .* is whole \(.*step",
        code=1,
    ),
    Case("checkpoint of another shape", _checkpoint_of_another_shape, r"checkpoint.*(shape|16)"),
]


@pytest.fixture
def desk(tiny_pair, tmp_path, recipe, fastadapt) -> Desk:
    return Desk(tiny_pair, tmp_path, recipe, fastadapt)


@pytest.mark.parametrize("case", CASES, ids=[case.name.replace(" ", "-") for case in CASES])
def test_a_mistake_gets_one_clear_error(case, desk, fastadapt):
    argv = case.arrange(desk)
    before = _contents(desk.folder / "run")
    outcome = fastadapt(*argv)
    assert re.search(case.message, " ".join(outcome.err.split())), outcome.err
    assert outcome.code == case.code
    assert outcome.out == ""
    assert outcome.err.count("error: ") == 1
    assert "Traceback" not in outcome.err
    assert _contents(desk.folder / "run") == before, "the output was touched"


def _contents(path: Path) -> Any:
    if not path.is_dir():
        return path.read_bytes() if path.is_file() else None
    return {p.name: _contents(p) for p in path.iterdir() if p.name != ".lock"}


def test_every_case_has_words_of_its_own():
    assert len(CASES) >= 30
    assert len({case.name for case in CASES}) == len(CASES)
    assert len({case.message for case in CASES}) == len(CASES)


def test_a_missing_extra_is_named(fastadapt, recipe, monkeypatch):
    import transformers.utils

    monkeypatch.setattr(transformers.utils, "is_flash_attn_2_available", lambda: False)
    outcome = fastadapt("train", recipe(), "--pair.attention", "flash_attention_2")
    assert outcome.code == 2
    assert "pip install 'fastadapt[flash]'" in outcome.err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there(fastadapt, recipe):
    outcome = fastadapt("train", recipe(), "--pair.device", "cuda")
    assert outcome.code == 2
    assert re.search(r"pair\.device is cuda, but torch finds no GPU", outcome.err)
