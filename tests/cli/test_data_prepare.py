"""Options, output and errors of `fastadapt data prepare`."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import openthoughts
import pytest


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return openthoughts.write_jsonl(tmp_path / "rows.jsonl", 2400)


@pytest.fixture
def command(source: Path, tmp_path: Path) -> Callable[..., list[str]]:
    def make(*more: str) -> list[str]:
        sizes = ["--train", "400", "--validation=40", "--max-tokens", "60"]
        where = ["--output", tmp_path / "out", "--tokenizer", "organism/target"]
        return [str(a) for a in ("data", "prepare", source, *where, *sizes, *more)]

    return make


def test_it_selects_and_says_what(
    fastadapt: Callable[..., Any], command: Callable[..., list[str]], tmp_path: Path
) -> None:
    outcome = fastadapt(*command())
    assert outcome.code == 0, outcome.err
    lines = [line.replace("┃", "│").split("│") for line in outcome.out.splitlines()]
    table = {cells[0].strip(): [c.strip() for c in cells[1:]] for cells in lines if len(cells) > 1}
    assert table["math"][1:] == ["284", "29"]
    assert table["code"][1:] == ["83", "8"]
    assert table["science"][1:] == ["33", "3"]
    assert table["all"] == ["2,400", "400", "40"]
    counts = json.loads((tmp_path / "out" / "manifest.json").read_text())["counts"]
    rows = [table[name] for name in table if "–" in name]
    assert [int(cells[0]) for cells in rows] == counts["train"]["lengths"]
    assert [int(cells[1]) for cells in rows] == counts["validation"]["lengths"]
    assert table["no <think>"][0] == str(counts["left_out_of_source"]["no <think>"]) != "0"
    for split in ("train", "validation"):
        assert str(tmp_path / "out" / f"{split}.parquet") in outcome.out
    assert "reading: " in outcome.err
    assert "writing: " in outcome.err


def test_dashes_are_as_good_as_underscores(
    fastadapt: Callable[..., Any], command: Callable[..., list[str]]
) -> None:
    assert fastadapt(*command("--allow-fewer", "--seed=3")).code == 0
    again = fastadapt(*command("--allow_fewer", "--seed", "3", "--resume"))
    assert again.code == 0, again.err


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--shares", "math"], "--shares: expected domain=share,..."),
        (["--trian", "3"], "unknown option --trian; did you mean --train?"),
        (["--train", "many"], "--train: expected int, got 'many'"),
        (["--family", "nobody"], "expected one of ["),
        (["--tokenizer", "organism/tokenizer"], "unknown part of the embedded pair"),
        (["--train", "3000"], "does not fill the quotas: train lacks"),
        (["--shares", "law=1"], "validation lacks 40 of 40 law, train lacks 400 of 400 law"),
        (["--resume"], "holds no selection; leave --resume out"),
        (["--resume", "--overwrite"], "choose one"),
        (["--output", "/proc/fastadapt"], "--output: /proc/fastadapt cannot be created"),
    ],
)
def test_a_mistake_gets_one_clear_line(
    more: list[str], message: str, fastadapt: Callable[..., Any], command: Callable[..., list[str]]
) -> None:
    outcome = fastadapt(*command(*more))
    assert outcome.code == 2
    assert outcome.out == ""
    said = [line for line in outcome.err.splitlines() if not line.startswith("reading")]
    assert len(said) == 1
    assert message in said[0]


def test_without_a_subcommand_it_helps(fastadapt: Callable[..., Any]) -> None:
    assert "prepare" in fastadapt("data").out


@pytest.mark.slow
def test_ctrl_c_says_how_to_go_on(
    command: Callable[..., list[str]], tmp_path: Path, fastadapt: Callable[..., Any]
) -> None:
    """A signal stops the command with exit code 0; the printed command finishes the selection."""
    big = openthoughts.write_jsonl(tmp_path / "big.jsonl", 60_000)
    argv = command()
    argv[2] = str(big)
    code = "import sys; from fastadapt.cli.main import main; sys.exit(main())"
    run = subprocess.Popen(
        [sys.executable, "-c", code, *argv],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )
    ledger = tmp_path / "out" / ".prepare" / "candidates.sqlite"
    deadline = time.monotonic() + 60
    while not (ledger.exists() and ledger.stat().st_size):
        assert run.poll() is None, run.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.02)
    run.send_signal(signal.SIGINT)
    out, err = run.communicate(timeout=60)
    assert run.returncode == 0, err
    assert "Traceback" not in err
    assert "rows, which are saved" in out
    typed = out.split("Resume with: ")[1].splitlines()[0].split()
    assert typed[-1] == "--resume"
    outcome = fastadapt(*typed[1:])
    assert outcome.code == 0, outcome.err
    assert "60,000" in outcome.out
