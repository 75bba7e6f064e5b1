"""Every command gives one clear error for a path that no system can open, typed or in a file."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from organism_runs import make_run

from fastadapt.cli.main import main
from fastadapt.organism import FOLDER

LONG, LONGER, MANY = "x" * 300, "x" * 5000, "d/" * 2500 + "x"
ODD = {"long": LONG, "longer": LONGER, "many": MANY, "nul": "a\0b", "surrogate": "a\ud800b"}
ODD |= {"escaped": "a\udcffb", "user": "~no-such-user/x"}
REASONS_FOR_PATHS = ("expected a path ", "no home folder is known for")
VALIDATION = FOLDER / "data" / "validation.jsonl"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Train a run, collect its features and save a set."""
    run = make_run(tmp_path_factory.mktemp("odd") / "run")
    collect = ["features", "collect", str(run), "--n", "60", "--device", "cpu"]
    sql = "SELECT layer, feature FROM features WHERE count > 0"
    assert main(collect) == 0
    assert main(["features", "select", str(run), "some", "--sql", sql]) == 0
    return run


@pytest.fixture
def copy(run: Path, tmp_path: Path) -> Path:
    """Copy the run, so that a test can damage the copy."""
    return Path(shutil.copytree(run, tmp_path / "run"))


@pytest.fixture
def refused(fastadapt: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable:
    """``refused(*argv)``: check that the command prints one error and writes no file; return it."""
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)

    def check(*argv: object, codes: tuple[int, ...] = (2,)) -> str:
        outcome = fastadapt(*argv)
        assert outcome.code in codes, outcome.err
        assert outcome.err.count("error: ") == 1
        assert "Traceback" not in outcome.err
        assert len(outcome.err) < 1200
        assert not list(here.iterdir())
        return " ".join(outcome.err.split())

    return check


OUTPUT = {
    "train": lambda run, out: ("train", "organism", "--run.output", out),
    "eval": lambda run, out: ("eval", run, "--output", out),
    "export": lambda run, out: ("export", run, "--output", out),
    "saelens": lambda run, out: ("export", run, "--format", "saelens", "--output", out),
    "import": lambda run, out: ("import", run, "--output", out),
    "intervene": lambda run, out: ("intervene", run, "--ablate", "some", "--output", out),
    "collect": lambda run, out: ("features", "collect", run, "--output", out),
    "merge": lambda run, out: ("features", "merge", run, "--output", out),
    "pages": lambda run, out: ("features", "export", run, "--output", out),
    "prepare": lambda run, out: ("data", "prepare", "organism/train", "--output", out),
}


@pytest.mark.parametrize("odd", ODD)
@pytest.mark.parametrize("command", OUTPUT)
def test_an_odd_output(command: str, odd: str, run: Path, refused: Callable) -> None:
    said = refused(*OUTPUT[command](run, ODD[odd]))
    assert any(name in said for name in ("--output: ", "run.output: ", "--out: "))
    assert any(reason in said for reason in REASONS_FOR_PATHS)


SOURCE = {
    "train": lambda run, odd: ("train", odd),
    "over": lambda run, odd: ("train", "organism", odd),
    "train data": lambda run, odd: ("train", "organism", "--run.output", "o", "--data.train", odd),
    "validation data": lambda run, odd: (
        *("train", "organism", "--run.output", "o", "--data.validation", odd),
    ),
    "target": lambda run, odd: ("train", "organism", "--run.output", "o", "--pair.target", odd),
    "base": lambda run, odd: ("train", "organism", "--run.output", "o", "--pair.base", odd),
    "plan": lambda run, odd: ("train", "organism", "--dry-run", "--data.train", odd),
    "eval": lambda run, odd: ("eval", odd),
    "eval two": lambda run, odd: ("eval", run, odd),
    "export": lambda run, odd: ("export", odd, "--output", "o"),
    "export target": lambda run, odd: ("export", run, "--output", "o", "--target", odd),
    "adapters": lambda run, odd: ("export", odd, "--format", "adapters", "--output", "o"),
    "saelens": lambda run, odd: ("export", odd, "--format", "saelens", "--output", "o"),
    "import": lambda run, odd: ("import", odd, "--output", "o"),
    "intervene": lambda run, odd: ("intervene", odd, "--ablate", "some", "--output", "o"),
    "set": lambda run, odd: ("intervene", run, "--ablate", f"{odd}.json", "--output", "o"),
    "store": lambda run, odd: (
        *("intervene", run, "--store", odd, "--ablate", "some", "--output", "o"),
    ),
    "collect": lambda run, odd: ("features", "collect", odd),
    "collect data": lambda run, odd: ("features", "collect", run, "--data", odd, "--output", "o"),
    "merge": lambda run, odd: ("features", "merge", odd, "--output", "o"),
    "pages": lambda run, odd: ("features", "export", odd),
    "serve": lambda run, odd: ("features", "serve", odd, "--port", 0),
    "describe": lambda run, odd: ("features", "describe", odd),
    "classify": lambda run, odd: ("features", "classify", odd),
    "overlap": lambda run, odd: ("features", "overlap", odd),
    "compare": lambda run, odd: ("features", "compare", odd, run),
    "init_from": lambda run, odd: (
        *("train", "organism", "--run.output", "o", "--run.init_from", odd),
    ),
    "select": lambda run, odd: ("features", "select", odd, "other", "--template"),
    "sets": lambda run, odd: ("features", "sets", odd),
    "check": lambda run, odd: ("features", "check", odd),
    "prepare": lambda run, odd: ("data", "prepare", odd, "--output", "o"),
    "tokenizer": lambda run, odd: (
        *("data", "prepare", VALIDATION, "--output", "o", "--tokenizer", odd),
    ),
}


@pytest.mark.parametrize("odd", ODD)
@pytest.mark.parametrize("command", SOURCE)
def test_an_odd_source(command: str, odd: str, run: Path, refused: Callable) -> None:
    said = refused(*SOURCE[command](run, ODD[odd]))
    assert any(reason in said for reason in REASONS_FOR_PATHS), said


ABSOLUTE = ("train", "train data", "target", "eval", "export", "intervene", "serve", "check")


@pytest.mark.parametrize("odd", ["long", "many", "nul", "surrogate"])
@pytest.mark.parametrize("command", ABSOLUTE)
def test_an_odd_absolute_source(command: str, odd: str, run: Path, refused: Callable) -> None:
    refused(*SOURCE[command](run, f"/{ODD[odd]}"))


# --- in files -------------------------------------------------------------------------------------


@pytest.mark.parametrize("odd", [LONG, LONGER, "a\0b"], ids=lambda odd: ascii(odd)[:9])
def test_an_odd_run_in_a_manifest(odd: str, run: Path, tmp_path: Path, refused: Callable) -> None:
    store = Path(shutil.copytree(run / "features", tmp_path / "store"))
    path = store / "manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "run": odd}))
    assert "manifest.json: run: expected a path" in refused("features", "describe", store)


@pytest.mark.parametrize("odd", [LONG, LONGER, "a\0b"], ids=lambda odd: ascii(odd)[:9])
@pytest.mark.parametrize("role", ["target", "base"])
def test_an_odd_pair_in_a_run(role: str, odd: str, copy: Path, refused: Callable) -> None:
    path, card = copy / "config.yaml", copy / "adapter" / "fastadapt.json"
    values, metadata = yaml.safe_load(path.read_text()), json.loads(card.read_text())
    values["pair"][role] = metadata["metadata"][role] = odd
    path.write_text(yaml.safe_dump(values))
    card.write_text(json.dumps(metadata))
    said = refused("eval", copy, "--output", copy / "o")
    assert any(f"{where}.{role}: expected" in said for where in ("pair", "metadata"))


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENAMETOOLONG, "", LONG),
        OSError(errno.ELOOP, "", "loop"),
        ValueError("embedded null byte"),
        UnicodeEncodeError("utf-8", "\ud800", 0, 1, "surrogates not allowed"),
        RuntimeError("Symlink loop from '/x'"),
    ],
    ids=repr,
)
def test_what_no_check_has_seen_is_told_all_the_same(
    error: Exception, refused: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails() -> int:
        raise error

    monkeypatch.setattr("fastadapt.cli.doctor.diagnose", fails)
    refused("doctor")


@pytest.mark.parametrize("error", [OSError(errno.EIO, "", "x"), ValueError("x"), RuntimeError("x")])
def test_what_is_no_ones_mistake_keeps_its_traceback(
    error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails() -> int:
        raise error

    monkeypatch.setattr("fastadapt.cli.doctor.diagnose", fails)
    with pytest.raises(type(error)):
        main(["doctor"])


# --- paths that are no regular files --------------------------------------------------------------


def _loop(path: Path) -> None:
    path.symlink_to(path.name)


def _dangling(path: Path) -> None:
    path.symlink_to("nothing")


#: Replacements of a file, with the expected message.
NO_FILE: dict[str, tuple[Callable[[Path], Any], str]] = {
    "pipe": (os.mkfifo, "is a pipe; expected a file"),
    "folder": (Path.mkdir, "is a folder; expected a file"),
    "loop": (_loop, "is a link that leads to itself"),
    "dangling": (_dangling, "is a link to a path that does not exist"),
    "device": (lambda path: path.symlink_to("/dev/zero"), "is a device; expected a file"),
}
#: Messages of readers that open a path without a check, and messages about links.
REASONS: tuple[str, ...]
REASONS = ("Not a regular file", "Is a directory", "Too many levels", "No such file", "is missing")
REASONS += ("leads out of", "is no regular file")
ABLATE = ("intervene", "run", "--ablate", "some", "--output", "o")
READS: dict[str, list[tuple[object, ...]]] = {
    "config.yaml": [ABLATE, ("eval", "run", "--output", "o"), ("features", "collect", "run")],
    "adapter/fastadapt.json": [ABLATE, ("export", "run", "--output", "o")],
    "adapter/layer_0.safetensors": [ABLATE, ("export", "run", "--output", "o")],
    "features/manifest.json": [("features", "check", "run"), ABLATE],
    "features/texts.parquet": [
        ("features", "check", "run"),
        ("features", "serve", "run", "--port", 0),
        ("features", "export", "run", "--output", "o"),
    ],
    "features/adapter/features.parquet": [("features", "check", "run")],
    "features/adapter/scores.parquet": [("features", "check", "run")],
    "features/judgements.json": [("features", "check", "run"), ("features", "describe", "run")],
    "features/sets/some.json": [ABLATE, ("features", "check", "run")],
}


@pytest.mark.parametrize("kind", NO_FILE)
@pytest.mark.parametrize("name", READS)
def test_what_is_no_file_is_not_read_and_no_absence(
    name: str, kind: str, copy: Path, refused: Callable
) -> None:
    make, said = NO_FILE[kind]
    path = copy / name
    path.unlink(missing_ok=True)
    make(path)
    for argv in READS[name]:
        output = refused(*(copy if word == "run" else word for word in argv), codes=(1, 2))
        assert path.name in output
        assert any(words in output for words in (said, *REASONS)), output


@pytest.mark.parametrize("kind", ["pipe", "loop", "device"])
def test_data_that_is_no_file(kind: str, tmp_path: Path, refused: Callable) -> None:
    make, said = NO_FILE[kind]
    path = tmp_path / "rows.jsonl"
    make(path)
    train = ("train", "organism", "--run.output", tmp_path / "o", "--data.train", path)
    prepare = ("data", "prepare", path, "--output", tmp_path / "p")
    for argv in (train, (*prepare, "--tokenizer", FOLDER / "target")):
        output = refused(*argv)
        assert any(words in output for words in (said, *REASONS)), output
