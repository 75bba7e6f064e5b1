"""Damaged data of the user and of selections: rows, Parquet files, manifests, ledgers."""

from __future__ import annotations

import gzip
import shutil
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import openthoughts
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from damage import Damage, command, document, raw, sweep, variants

from fastadapt.data import prepare as module
from fastadapt.data.prepare import filter_pass, prepare
from fastadapt.data.prepare.report import summary
from fastadapt.data.prepare.selection import PrepareConfig
from fastadapt.data.sequences import DataConfig, load_sequences
from fastadapt.data.sources import Source
from fastadapt.errors import UserError
from fastadapt.evaluation.faithfulness.prompts import load_prompts
from fastadapt.organism import NAMES

ROWS = 60


# --- rows -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(NAMES["organism/target"])


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    return openthoughts.write_jsonl(tmp_path / "rows.jsonl", 4)


def as_text(damage: Damage) -> bool:
    """Return whether a row is valid: the position of a turn decides its role, not its name."""
    free = damage.key in ("difficulty", "source", "domain", "from")
    return free or (damage.key == "value" and damage.value in ("x", "12"))


def test_rows_to_train_on_and_to_answer(rows: Path, tokenizer: Any) -> None:
    """The readers of ``train``, ``features collect`` and ``eval`` refuse damaged lines."""
    lines = rows.read_bytes().splitlines(keepends=True)
    line = lines[1].rstrip(b"\n")
    cases = [
        Damage(d.name, lines[0] + d.content.replace(b"\n", b" ") + b"\n", d.key, d.value, d.keys)
        for d in (*document(line), *raw(line, 10))
        if d.content is not None
    ]

    def read() -> int:
        config = DataConfig(train=str(rows), validation=str(rows), max_tokens=1000)
        sequences = load_sequences(str(rows), tokenizer, config, split="train")
        prompts = load_prompts(Source(str(rows)), tokenizer, "r1-distill", 10)
        assert len(sequences) == len(prompts)
        return len(sequences)

    def valid(damage: Damage, n: int) -> bool:
        if damage.name == "empty":  # a blank line is no row
            return n == 1
        if damage.name == "conversations.0 removed":  # an answer to an empty prompt
            return n == 2
        return damage.name.startswith("bit flip") or as_text(damage)

    sweep(rows, cases, read, valid, ("rows.jsonl, line 2",))


def test_a_file_of_rows_as_a_whole(rows: Path, tokenizer: Any) -> None:
    def read() -> None:
        config = DataConfig(train=str(rows), validation=str(rows), max_tokens=1000)
        load_sequences(str(rows), tokenizer, config, split="train")

    content = rows.read_bytes()
    ends = {content[: i + 1] for i, byte in enumerate(content) if byte == 10}
    ends |= {end[:-1] for end in ends}
    cases = [
        *raw(content),
        Damage("gzip", gzip.compress(content)),
        Damage("half a gzip", gzip.compress(content)[:50]),
    ]

    def valid(damage: Damage, _: Any) -> bool:
        return damage.name.startswith("bit flip") or damage.content in ends

    sweep(rows, cases, read, valid)


TURN = pa.struct([("from", pa.string()), ("value", pa.string())])


def tables() -> Iterator[tuple[str, pa.Table]]:
    """Yield tables with missing columns, or columns of other types."""
    good = [[{"from": "human", "value": "what"}, {"from": "gpt", "value": "so"}]] * 3
    yield "no such column", pa.table({"text": ["x"]})
    yield "no column", pa.table({})
    yield "no row", pa.table({"conversations": pa.array([], pa.list_(TURN))})
    yield "text", pa.table({"conversations": ["what"]})
    yield "numbers", pa.table({"conversations": [1, 2]})
    yield "null", pa.table({"conversations": pa.array([None, good[0]], pa.list_(TURN))})
    yield "null alone", pa.table({"conversations": pa.nulls(2)})
    yield "bytes", pa.table({"conversations": pa.array([b"\xff"])})
    yield "lists of numbers", pa.table({"conversations": [[1, 2]]})
    yield "null turns", pa.table({"conversations": pa.array([[None, None]], pa.list_(TURN))})
    yield "turns of nobody", pa.table({"conversations": [[{"value": "what"}] * 3]})
    yield "empty", pa.table({"conversations": pa.array([[]], pa.list_(TURN))})
    for value in (1, 2.5, True, None, b"x"):
        turns = [{"from": "human", "value": value}, {"from": "gpt", "value": value}]
        yield f"value {value!r}", pa.table({"conversations": pa.array([turns])})
    yield "no value", pa.table({"conversations": [[{"from": "human"}, {"from": "gpt"}]]})
    twice = pa.array(good, pa.list_(TURN))
    yield "a column twice", pa.Table.from_arrays([twice, twice], ["conversations"] * 2)


@pytest.mark.parametrize("table", [pytest.param(table, id=name) for name, table in tables()])
def test_a_parquet_file_of_other_columns(table: pa.Table, tokenizer: Any, tmp_path: Path) -> None:
    path = tmp_path / "rows.parquet"
    pq.write_table(table, path)
    config = DataConfig(train=str(path), validation=str(path), max_tokens=1000)
    with pytest.raises(UserError, match=r"rows\.parquet"):
        load_sequences(str(path), tokenizer, config, split="train")


def test_a_damaged_parquet_file(tokenizer: Any, tmp_path: Path) -> None:
    path = tmp_path / "rows.parquet"
    good = [[{"from": "human", "value": "what is 1"}, {"from": "gpt", "value": "so"}]] * 3
    pq.write_table(pa.table({"conversations": pa.array(good, pa.list_(TURN))}), path)

    def read() -> int:
        config = DataConfig(train=str(path), validation=str(path), max_tokens=1000)
        return len(load_sequences(str(path), tokenizer, config, split="train"))

    cases = list(raw(path.read_bytes(), 40))
    sweep(path, cases, read, lambda d, _: d.name.startswith("bit flip"))


@pytest.mark.parametrize("name", ["rows.jsonl.gz", "rows.json", "rows.jsonl", "nothing.jsonl"])
def test_what_is_no_file_of_rows(name: str, tokenizer: Any, tmp_path: Path) -> None:
    path = tmp_path / name
    if name == "rows.jsonl":
        path.mkdir()
    elif name != "nothing.jsonl":
        path.write_bytes(gzip.compress(b"{}\n")[:9])
    config = DataConfig(train=str(path), validation=str(path))
    with pytest.raises(UserError, match=name.replace(".", r"\.")):
        load_sequences(str(path), tokenizer, config, split="train")


def test_the_data_of_a_run_through_its_command(
    tiny_config: Callable[..., Any], tmp_path: Path
) -> None:
    """The first line of each file is wrong."""
    from fastadapt.training.config import save_config

    options = tmp_path / "options.yaml"
    save_config(tiny_config(), options)
    path = tmp_path / "rows.jsonl"
    path.touch()
    run = command("train", options, "--data.train", path, "--run.output", tmp_path / "run")
    deep, digits = (
        b'{"conversations": ' + b"[" * 100_000,
        b'{"conversations": ' + b"1" * 5000 + b"}",
    )
    cases = [
        Damage("nested", deep + b"\n"), Damage("5,000 digits", digits + b"\n"),
        Damage("a list", b"[1, 2]\n"), Damage("null", b'{"conversations": null}\n'),
        Damage("no column", b'{"text": "x"}\n'), Damage("empty", b""), Damage("folder", None),
    ]  # fmt: skip
    sweep(path, cases, run, lambda *_: False)


# --- selections -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return openthoughts.write_jsonl(tmp_path_factory.mktemp("source") / "rows.jsonl", ROWS)


@pytest.fixture
def config(source: Path, tmp_path: Path) -> PrepareConfig:
    return PrepareConfig(
        str(source), str(tmp_path / "out"), str(NAMES["organism/target"]),
        train=10, validation=2, max_tokens=60, allow_fewer=True,
    )  # fmt: skip


def written(folder: Path) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name in openthoughts.FILES}


@pytest.fixture
def loaded_once(monkeypatch: pytest.MonkeyPatch, tokenizer: Any) -> None:
    monkeypatch.setattr("fastadapt.models.pretrained.load_tokenizer", lambda *_, **__: tokenizer)


@pytest.mark.usefixtures("loaded_once")
def test_the_manifest_of_a_selection(config: PrepareConfig) -> None:
    folder = Path(config.output)
    manifest = prepare(config)
    path = folder / "manifest.json"

    def read() -> Any:
        result = prepare(config, resume=True)
        summary(result)
        return result

    assert read() == manifest
    before = written(folder)

    def valid(damage: Damage, _: Any) -> bool:
        if damage.name.startswith("bit flip"):
            return True
        top = damage.name.split(".")[0].split()[0]
        # Counts and source are only reported.
        return top in ("counts", "source") or (top, damage.key) == ("files", "rows")

    # A folder whose manifest has another format is treated as a folder of other files.
    sweep(path, variants(path), read, valid, ("manifest.json", "holds no selection", "--resume"))
    assert written(folder) == before


@pytest.fixture
def begun(config: PrepareConfig, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, dict[str, bytes]]:
    """Return a selection that was killed before writing, and the files of the resumed one."""
    monkeypatch.setattr(filter_pass, "_COMMIT_ROWS", 20)
    folder = Path(config.output)

    def killed(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(module, "_write", killed)
        with pytest.raises(KeyboardInterrupt):
            prepare(config)
    whole = folder.with_name("whole")
    shutil.copytree(folder, whole)
    prepare(replace(config, output=str(whole)), resume=True)
    return folder, written(whole)


@pytest.mark.usefixtures("loaded_once")
@pytest.mark.parametrize("name", ["settings.json", "candidates.sqlite"])
def test_resuming_over_damaged_files(
    name: str, begun: tuple[Path, dict[str, bytes]], config: PrepareConfig
) -> None:
    """Resuming gives the files of an undamaged selection, or an error."""
    folder, expected = begun
    path = folder / ".prepare" / name
    content = {p.name: p.read_bytes() for p in path.parent.iterdir()}

    def read() -> dict[str, bytes]:
        for file in folder.iterdir():
            if file.is_file():
                file.unlink()
        for other, held in content.items():
            if other != name:
                (path.parent / other).write_bytes(held)
        prepare(config, resume=True)
        return written(folder)

    def valid(damage: Damage, files: dict[str, bytes]) -> bool:
        return files == expected or damage.name.startswith("bit flip")

    if name == "candidates.sqlite":
        cases = list(raw(content[name], 10))
        for fingerprint in ("candidate", "progress", "text"):
            with closing(sqlite3.connect(path)) as connection, connection:
                connection.execute(
                    "UPDATE parts SET value = '[1' WHERE fingerprint = ?", (fingerprint,)
                )
            cases.append(Damage(f"{fingerprint} of other contents", path.read_bytes()))
            path.write_bytes(content[name])
    else:
        cases = variants(path)
    sweep(path, cases, read, valid, (name, "started with other settings", "--resume"))
