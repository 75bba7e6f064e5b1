"""Output in any encoding of the terminal, and options with negative numbers in any notation."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable

import pytest
import yaml

from fastadapt.cli.console import print_table, write_any_text
from fastadapt.cli.parser import Parser


@pytest.mark.slow
@pytest.mark.parametrize(
    ("command", "encoding"),
    [
        pytest.param("train --help", "latin-1", marks=pytest.mark.slow),
        ("train --help", "cp1252"),
        pytest.param("data prepare --help", "ascii", marks=pytest.mark.slow),
    ],
)
def test_every_command_prints_in_any_encoding(encoding: str, command: str) -> None:
    environment = {**os.environ, "PYTHONIOENCODING": encoding, "PYTHONUTF8": "0"}
    argv = [sys.executable, "-m", "fastadapt", *command.split()]
    ended = subprocess.run(argv, capture_output=True, env=environment, timeout=300)
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.decode(encoding)


def test_a_configuration_is_the_same_in_any_encoding(recipe: Callable) -> None:
    environment = {**os.environ, "PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"}
    name = "runs/\u4e2d \u2013 \u03bb"
    argv = [sys.executable, "-m", "fastadapt", "train", str(recipe()), "--print_config"]
    ended = subprocess.run(
        [*argv, "--run.output", name], capture_output=True, env=environment, timeout=300
    )
    assert yaml.safe_load(ended.stdout)["run"]["output"] == name


def test_stand_ins(monkeypatch: pytest.MonkeyPatch) -> None:
    import io

    raw = io.BytesIO()
    stream = io.TextIOWrapper(raw, encoding="latin-1")
    monkeypatch.setattr(sys, "stdout", stream)
    write_any_text()
    print_table(["a"], [["1 \u2013 2 \u4e2d \udcff \u00e9"]])
    stream.flush()
    assert "1 - 2 \\u4e2d \\udcff \u00e9" in raw.getvalue().decode("latin-1")


NUMBERS = ["-5e-1", "-.5", "-0.5", "-1e0", "-5E+1", "-1_000.5", "-3", "-.inf"]


@pytest.mark.parametrize("number", NUMBERS)
def test_a_negative_number_is_a_value(number: str) -> None:
    parser = Parser(prog="test")
    parser.add_argument("--scale", type=float)
    parser.add_argument("--flag", action="store_true")
    for argv in (["--scale", number, "--flag"], [f"--scale={number}", "--flag"]):
        typed = parser.parse_args(argv)
        assert typed.scale == float(number.replace(".inf", "inf"))
        assert typed.flag


def test_a_negative_number_is_a_value_of_a_command() -> None:
    from fastadapt.cli.main import open_command

    argv = ["run", "--onto-target", "s", "--scale", "-5e-1", "--output", "o"]
    assert open_command("intervene").parse(argv)["scale"] == -0.5
