"""Python code that comes with models runs only if the user typed so for the call.

Each model has Python code that writes a file when it is executed. Every configuration, card,
manifest and set of the tests sets `trust_remote_code` to true.
"""

from __future__ import annotations

import ast
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import organism_runs
import pytest
import yaml

import fastadapt as package
from fastadapt.features.collect import CollectConfig, collect
from fastadapt.organism import FOLDER

PYTHON = """\
from pathlib import Path

Path({mark!r}).write_text("executed")
import transformers


class Config(transformers.Qwen2Config): ...


class Tokenizer(transformers.PreTrainedTokenizerFast): ...


class Model(transformers.Qwen2ForCausalLM): ...
"""
AUTO_MAP = {
    "AutoConfig": "configuration_x.Config",
    "AutoModel": "modeling_x.Model",
    "AutoModelForCausalLM": "modeling_x.Model",
    "AutoTokenizer": [None, "tokenization_x.Tokenizer"],
}
ASKING = {"trust_remote_code": True, "auto_map": AUTO_MAP, "custom_generate": "."}


class Foreign:
    """Paths of an untrusted run with its pair, store, set and data."""

    def __init__(self, folder: Path) -> None:
        self.mark, self.run, self.pair = folder / "executed", folder / "run", folder / "pair"
        self.bare = folder / "bare"

    @property
    def executed(self) -> bool:
        return self.mark.exists()


def _ask_in_json(path: Path) -> None:
    values = json.loads(path.read_text())
    path.write_text(json.dumps({**values, **ASKING}))


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Create a run and a store before any file sets `trust_remote_code`."""
    folder = tmp_path_factory.mktemp("foreign")
    for role in ("target", "base"):
        shutil.copytree(FOLDER / role, folder / "pair" / role)
    run = organism_runs.make_run(folder / "run")
    config = yaml.safe_load((run / "config.yaml").read_text())
    named = {role: str(folder / "pair" / role) for role in ("target", "base")}
    config["pair"] |= named
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    card = json.loads((run / "adapter" / "fastadapt.json").read_text())
    card["metadata"] |= named
    (run / "adapter" / "fastadapt.json").write_text(json.dumps(card))
    collect(run, config=CollectConfig(n=8), device="cpu")
    return folder


@pytest.fixture
def foreign(whole: Path, tmp_path: Path, fastadapt: Callable) -> Foreign:
    foreign = Foreign(tmp_path / "foreign")
    shutil.copytree(whole, tmp_path / "foreign")
    named = {role: str(foreign.pair / role) for role in ("target", "base")}
    config_file, card_file = foreign.run / "config.yaml", foreign.run / "adapter" / "fastadapt.json"
    config = yaml.safe_load(config_file.read_text())
    config["pair"] |= {**named, "trust_remote_code": True}
    config_file.write_text(yaml.safe_dump(config))
    card = json.loads(card_file.read_text())
    card["metadata"] |= {**named, **ASKING}
    card_file.write_text(json.dumps(card))
    assert fastadapt("features", "select", foreign.run, "some", "--promotes", "wait").code == 0
    for path in (*(foreign.run / "features").rglob("*.json"), *foreign.pair.rglob("*config.json")):
        if path.name != "site.json":
            _ask_in_json(path)
    _ask_in_json(card_file)
    shutil.copytree(foreign.run / "adapter", foreign.bare)
    for role in ("target", "base"):
        folder = foreign.pair / role
        for name in ("configuration_x", "modeling_x", "tokenization_x"):
            (folder / f"{name}.py").write_text(PYTHON.format(mark=str(foreign.mark)))
        (folder / "custom_generate").mkdir()
        generate = PYTHON.format(mark=str(foreign.mark)) + "\ndef generate(model, **kwargs): ...\n"
        (folder / "custom_generate" / "generate.py").write_text(generate)
    return foreign


def _commands(foreign: Foreign, out: Path) -> dict[str, list[object]]:
    run, pair = foreign.run, foreign.pair
    models = ["--pair.target", pair / "target", "--pair.base", pair / "base"]
    return {
        "train": ["train", run / "config.yaml"],
        "train over": ["train", "organism", foreign.run.parent / "over.yaml"],
        "train --pair": ["train", "organism", "--pair", foreign.run.parent / "pair.yaml"],
        "train --dry-run": ["train", "organism", *models, "--dry-run", "--run.output", out],
        "train a pair": [
            *("train", "organism", *models, "--run.output", out),
            *("--optimizer.max_steps", "1", "--data.max_validation", "2", "--pair.device", "cpu"),
        ],
        "eval": ["eval", run, "--output", out, "--parts", "[partial]"],
        "eval adapters": ["eval", run / "adapter", "--output", out, "--parts", "[partial]"],
        "eval bare": ["eval", foreign.bare, "--output", out, "--parts", "[speed]"],
        "where": ["where", run, "--output", out, "--where.n", "2"],
        "where adapters": ["where", run / "adapter", "--output", out, "--where.n", "2"],
        "where over": ["where", foreign.run.parent / "over.yaml", *models, "--output", out],
        "where a pair": ["where", *models, "--text", "tom has 3 apples", "--output", out],
        "contrast": ["contrast", run, "--output", out, "--n", "4", "--places", "words"],
        "collect": ["features", "collect", run, "--output", out, "--n", "4"],
        "overlap": ["features", "overlap", run],
        "effects": ["features", "effects", run, "--top", "1", "--texts", "1"],
        "trace": ["trace", run, "tom has 3 apples", "--max_new_tokens", "1"],
        "generate": ["generate", run, "tom has 3 apples", "--max_new_tokens", "1"],
        "changes": ["changes", run, "--texts", "1", "--prompts", "0"],
        "describe": ["features", "describe", run, "--yes"],
        "classify": ["features", "classify", run, "--yes"],
        "features export": ["features", "export", run, "--output", out],
        "merge": ["features", "merge", run / "features", "--output", out],
        "select": ["features", "select", run, "other", "--promotes", "wait"],
        "sets": ["features", "sets", run],
        "intervene": ["intervene", run, "--ablate", "some", "--output", out],
        "intervene file": [
            *("intervene", run, "--ablate", run / "features" / "sets" / "some.json"),
            *("--output", out),
        ],
        "export": ["export", run, "--output", out],
        "export hu2026": ["export", run, "--output", out, "--format", "hu2026"],
        "export adapters": ["export", pair / "target", "--output", out, "--format", "adapters"],
        "organism check": ["organism", "check", "--folder", pair],
        "data prepare": [
            *("data", "prepare", FOLDER / "data" / "train.jsonl", "--output", out),
            *("--tokenizer", pair / "target", "--train", "8", "--validation", "4"),
        ],
    }


#: Commands that refuse a file that sets the flag, with the expected message.
REFUSED = {
    "train": "type --pair.trust_remote_code true",
    "train over": "type --pair.trust_remote_code true",
    "train --pair": "--pair",
    "eval": "type --trust_remote_code",
    "eval adapters": "type --trust_remote_code",
    "where": "type --pair.trust_remote_code true",
    "where adapters": "type --pair.trust_remote_code true",
    "where over": "type --pair.trust_remote_code true",
    "contrast": "type --trust_remote_code",
    "collect": "type --trust_remote_code",
    "overlap": "type --trust_remote_code",
    "effects": "type --trust_remote_code",
    "trace": "type --trust_remote_code",
    "generate": "type --trust_remote_code",
    "changes": "type --trust_remote_code",
    "describe": "type --trust_remote_code",
}


NAMES = list(_commands(Foreign(Path("x")), Path("y")))
#: Commands that read a pair without a run, which would record the flag.
UNRECORDED = (
    "train a pair",
    "where a pair",
    "train --dry-run",
    "eval bare",
    "export",
    "organism check",
)


@pytest.mark.quick("train a pair", "train --dry-run", "overlap", "describe", "generate")
@pytest.mark.parametrize("name", [name for name in NAMES if name != "organism check"])
def test_no_command_runs_code_that_a_file_trusts(
    name: str,
    foreign: Foreign,
    fastadapt: Callable,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("builtins.input", lambda _="": "y")  # answers any question
    over = {"pair": {"trust_remote_code": True}}
    (foreign.run.parent / "over.yaml").write_text(yaml.safe_dump(over))
    (foreign.run.parent / "pair.yaml").write_text(yaml.safe_dump(over["pair"]))
    outcome = fastadapt(*_commands(foreign, tmp_path / "out")[name])
    assert not foreign.executed
    assert "Traceback" not in outcome.err
    assert outcome.code in (0, 2), outcome.err
    if name in REFUSED:
        assert outcome.code == 2
        assert REFUSED[name] in " ".join(outcome.err.split())


@pytest.mark.parametrize("name", UNRECORDED)
def test_an_architecture_of_its_own_is_refused_without_a_question(
    name: str,
    foreign: Foreign,
    fastadapt: Callable,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Only the model's own code implements the model, so transformers would ask to run it."""
    monkeypatch.setattr("builtins.input", lambda _="": "y")
    for path in foreign.pair.glob("*/config.json"):
        path.write_text(json.dumps({**json.loads(path.read_text()), "model_type": "somebody"}))
    outcome = fastadapt(*_commands(foreign, tmp_path / "out")[name])
    assert not foreign.executed
    assert outcome.code == 2
    assert "Traceback" not in outcome.err


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    ["eval", *(pytest.param(name, marks=pytest.mark.slow) for name in ("collect", "overlap"))],
)
def test_typed_trust_runs_it(name: str, foreign: Foreign, tmp_path: Path) -> None:
    """The code beside the models runs with the flag. It is executed in a subprocess."""
    command = [*_commands(foreign, tmp_path / "out")[name], "--trust_remote_code"]
    subprocess.run(
        [sys.executable, "-m", "fastadapt", *map(str, command)],
        env={**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules")},
        capture_output=True,
        check=False,
    )
    assert foreign.executed


def test_kernels_of_the_hub_are_not_loaded(
    foreign: Foreign, fastadapt: Callable, tmp_path: Path
) -> None:
    config = yaml.safe_load((foreign.run / "config.yaml").read_text())
    del config["pair"]["trust_remote_code"]
    for name in ("somebody/kernel", "paged|somebody/kernel", "somebody/kernel@main:run", 3, None):
        config["pair"]["attention"] = name
        (foreign.run / "config.yaml").write_text(yaml.safe_dump(config))
        outcome = fastadapt("eval", foreign.run, "--output", tmp_path / "out")
        assert outcome.code == 2
        assert "attention" in outcome.err


@pytest.mark.parametrize("key", ["attn_implementation", "_attn_implementation"])
def test_a_model_cannot_choose_its_attention(foreign: Foreign, key: str) -> None:
    import torch

    from fastadapt.models.pretrained import load_causal_lm

    path = foreign.pair / "base" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), key: "flash_attention_2"}))
    how: dict[str, Any] = {"dtype": torch.float32, "attention": "sdpa", "trust": False}
    model = load_causal_lm(str(path.parent), None, device=torch.device("cpu"), **how)
    assert model.config._attn_implementation == "sdpa"


KERNEL_KEYS = [
    f"{prefix}{kind}_implementation" for kind in ("attn", "experts") for prefix in ("", "_")
]


@pytest.mark.parametrize("key", KERNEL_KEYS)
def test_a_kernel_of_the_hub_is_refused(foreign: Foreign, key: str) -> None:
    """transformers would download the named repository and run its code."""
    from fastadapt.errors import UserError
    from fastadapt.models.pretrained import model_config

    path = foreign.pair / "base" / "config.json"
    for name in ("somebody/kernel", "paged|somebody/kernel", {"": "somebody/kernel"}, 3):
        path.write_text(json.dumps({**json.loads(path.read_text()), key: name}))
        with pytest.raises(UserError, match=rf"config\.json: .*{key}"):
            model_config(str(path.parent), None, trust=False)


@pytest.mark.parametrize(
    "command",
    ["train a pair", "train --dry-run", "eval", "collect", "overlap", "export"],
)
def test_no_command_fetches_a_kernel(
    foreign: Foreign, fastadapt: Callable, tmp_path: Path, command: str
) -> None:
    for role in ("target", "base"):
        path = foreign.pair / role / "config.json"
        values = json.loads((FOLDER / role / "config.json").read_text())
        path.write_text(json.dumps({**values, KERNEL_KEYS[1]: "somebody/kernel"}))
    config = foreign.run / "config.yaml"
    config.write_text(config.read_text().replace("trust_remote_code: true", ""))
    outcome = fastadapt(*_commands(foreign, tmp_path / "out")[command])
    assert outcome.code == 2
    assert KERNEL_KEYS[1] in outcome.err


def test_what_is_not_installed_is_not_fetched() -> None:
    import torch

    from fastadapt.errors import UserError
    from fastadapt.models.pair import choose_attention

    for name in ("flash_attention_3", "flash_attention_4", "flash_attention_5"):
        with pytest.raises(UserError, match="not installed"):
            choose_attention(name, torch.device("cpu"), torch.float32)


def test_trust_is_typed_again_to_resume(recipe: Callable, fastadapt: Callable) -> None:
    typed = ("--pair.trust_remote_code", "true")
    path = recipe(**{"optimizer.max_steps": 3})
    assert fastadapt("train", path, *typed).code == 0
    run = Path(yaml.safe_load(path.read_text())["run"]["output"])
    assert yaml.safe_load((run / "config.yaml").read_text())["pair"]["trust_remote_code"] is True
    outcome = fastadapt("train", path, "--resume")
    assert outcome.code == 2
    assert "type --pair.trust_remote_code true" in " ".join(outcome.err.split())
    assert fastadapt("train", path, *typed, "--resume").code == 0
    assert fastadapt("train", run / "config.yaml", *typed, "--resume").code == 0
    assert fastadapt("train", run / "config.yaml", "--resume").code == 2


def test_what_is_typed_last_wins_over_a_file(recipe: Callable, tmp_path: Path) -> None:
    from fastadapt.cli.train import parse_train

    path = recipe(**{"pair.trust_remote_code": True})
    option = "--pair.trust_remote_code"
    for typed, wanted in (("true", True), ("false", False)):
        assert parse_train([str(path), option, typed])[0].pair.trust_remote_code is wanted
        assert parse_train([str(path), f"{option}={typed}"])[0].pair.trust_remote_code is wanted


@pytest.mark.parametrize("value", [None, 1, "true", "false", [True]])
def test_trust_is_true_or_false(value: Any) -> None:
    with pytest.raises(ValueError, match="expected true or false"):
        package.PairConfig("a", "b", trust_remote_code=value)


#: Modules that read the flag from an option, pass it on, or remove it from a file's values.
NAMED = {
    "models/pair.py": "PairConfig",
    "training/config.py": "take_trust removes it from what a file holds",
    "cli/parser.py": "help of the option",
    "cli/train.py": "typed",
}


def test_no_reader_takes_the_flag_from_a_file() -> None:
    """The flag's name occurs as a string, and thus as a key, only in the modules above."""
    root = Path(package.__file__).parent
    for path in root.rglob("*.py"):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        texts = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
        held = [
            node.lineno
            for node in ast.walk(tree)
            if isinstance(node, ast.Constant)
            and isinstance(node.value, str)
            and "trust_remote_code" in node.value
            and id(node) not in texts
        ]
        name = path.relative_to(root).as_posix()
        known = {*NAMED, "evaluation/runs.py", "training/run_dir.py"}
        assert not held or name in known, (name, held)


def test_what_reads_a_configuration_leaves_trust_out(foreign: Foreign, recipe: Callable) -> None:
    from fastadapt.evaluation.runs import read_pair
    from fastadapt.models.trained_files import read_adapters
    from fastadapt.training.config import load_config, recorded_trust

    path = recipe(**{"pair.trust_remote_code": True})
    assert load_config(path).pair.trust_remote_code is False
    assert recorded_trust(path)
    for folder in (foreign.run / "adapter", foreign.bare):
        pair = read_pair(folder, read_adapters(folder)[1]["metadata"])
        assert pair.trust_remote_code is False


def test_trust_is_said_in_every_call_that_may_run_code() -> None:
    """Without the argument, transformers asks at the terminal and accepts a "y" from a pipe."""
    root = Path(package.__file__).parent
    callers = {"AutoConfig", "AutoTokenizer", "AutoModel", "AutoModelForCausalLM"}
    calls = 0
    for path in root.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
                continue
            value = node.func.value
            opens = node.func.attr in ("from_pretrained", "from_config")
            if opens and isinstance(value, ast.Name) and value.id in callers:
                assert "trust_remote_code" in {k.arg for k in node.keywords}, (path, node.lineno)
                calls += 1
    assert calls >= 6
    for path in root.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = ast.unparse(node) if isinstance(node, (ast.Import, ast.Attribute)) else ""
            assert names not in ("torch.load", "import pickle", "yaml.unsafe_load"), path
            assert not (isinstance(node, ast.keyword) and node.arg == "allow_pickle"), path
