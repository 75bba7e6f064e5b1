"""A selection resumes after a stop, a kill or a full disk, also with a streamed hub dataset."""

import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import openthoughts
import pyarrow.parquet as pq
import pytest

from fastadapt.data import prepare as module
from fastadapt.data.prepare import prepare
from fastadapt.data.prepare.selection import PrepareConfig
from fastadapt.errors import RunError, UserError
from fastadapt.io.ledger import Ledger

rows_of, bytes_of, FILES = openthoughts.rows_of, openthoughts.bytes_of, openthoughts.FILES

ROWS = 5000


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return openthoughts.write_jsonl(tmp_path_factory.mktemp("source") / "rows.jsonl", ROWS)


@pytest.fixture
def config(source: Path, selection: Callable[..., PrepareConfig]) -> Callable[..., PrepareConfig]:
    return partial(selection, source=str(source))


KILLED = """
import os, signal, sys
from fastadapt.data import prepare as module
from fastadapt.data.prepare import filter_pass
from fastadapt.data.prepare.selection import PrepareConfig
from fastadapt.data.prepare.candidate_store import CandidateStore

filter_pass._COMMIT_ROWS = 250
kind, count, *values = sys.argv[1:]
config = PrepareConfig(*values[:3], train=1000, validation=100, max_tokens=60)
seen = 0

def sink(record):
    global seen
    seen += record["kind"] == kind
    if seen == int(count):
        os.kill(os.getpid(), signal.SIGKILL)

module._GROUP_BYTES = 1 << 15
module.prepare(config, resume="resume" in values, sink=sink)
"""


def run_killed(config: PrepareConfig, kind: str, count: int, *more: str) -> int:
    command = [sys.executable, "-c", KILLED, kind, str(count)]
    command += [config.source, config.output, config.tokenizer, *more]
    return subprocess.run(command, env={**os.environ, "HF_HUB_OFFLINE": "1"}).returncode


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_killed_and_resumed_gives_the_same_bytes(
    kind: str,
    config: Callable[..., PrepareConfig],
    source: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """SIGKILL twice while reading and once while writing gives the files of one run."""
    if kind == "parquet":
        source = openthoughts.write_parquet(tmp_path / "rows.parquet", ROWS, group=333)
    monkeypatch.setattr(module, "_GROUP_BYTES", 1 << 15)
    whole = bytes_of(prepare(config(source=str(source), output=str(tmp_path / "whole")))["output"])
    settings = config(source=str(source))
    assert run_killed(settings, "read", 7) == -signal.SIGKILL
    work = Path(settings.output) / ".prepare"
    assert (work / "candidates.sqlite").stat().st_size
    assert run_killed(settings, "read", 6, "resume") == -signal.SIGKILL
    assert run_killed(settings, "write", 3, "resume") == -signal.SIGKILL
    assert not (Path(settings.output) / "manifest.json").exists()
    read: list[dict[str, Any]] = []
    result = prepare(settings, resume=True, sink=read.append)
    assert bytes_of(result["output"]) == whole
    assert not any(record["kind"] == "read" for record in read)  # that was done
    assert sorted(path.name for path in Path(result["output"]).iterdir()) == sorted(FILES)


def test_told_to_stop_it_goes_on_from_there(
    config: Callable[..., PrepareConfig], tmp_path: Path
) -> None:
    whole = bytes_of(prepare(config(output=str(tmp_path / "whole")))["output"])
    stop = threading.Event()
    stop.set()
    reached: list[int] = []
    for _ in range(10):
        result = prepare(config(), resume=bool(reached), stop=stop)
        if not result["interrupted"]:
            break
        reached.append(result["rows"])
    assert reached == [1000, 2000, 3000, 4000, 5000]
    assert bytes_of(result["output"]) == whole


def test_a_finished_one_is_verified_on_resume(config: Callable[..., PrepareConfig]) -> None:
    result = prepare(config())
    assert prepare(config(), resume=True) == result
    path = Path(result["output"]) / "train.parquet"
    content = bytearray(path.read_bytes())
    content[100] ^= 1
    path.write_bytes(content)
    with pytest.raises(
        RunError, match=r"train\.parquet has another size or SHA-256 than in manifest\.json"
    ):
        prepare(config(), resume=True)


def test_a_kill_after_the_manifest_leaves_nothing_behind(
    config: Callable[..., PrepareConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kill is after the last write and before the first removal."""
    with monkeypatch.context() as patched:
        patched.setattr(module.output_folder, "clean", lambda folder: None)
        result = prepare(config())
    folder = Path(result["output"])
    assert (folder / ".prepare" / "candidates.sqlite").exists()
    assert prepare(config(), resume=True) == result
    assert sorted(path.name for path in folder.iterdir()) == sorted(FILES)


def test_resume_needs_the_same_settings_and_source(
    config: Callable[..., PrepareConfig], source: Path, tmp_path: Path
) -> None:
    copy = tmp_path / "rows.jsonl"
    shutil.copy(source, copy)
    stop = threading.Event()
    stop.set()
    prepare(config(source=str(copy)), stop=stop)
    with pytest.raises(UserError, match=r"other settings \(seed: 1, was 42\)"):
        prepare(config(source=str(copy), seed=1), resume=True)
    with copy.open("a") as file:
        file.write("\n")
    with pytest.raises(UserError, match=r"other settings \(source: .*bytes"):
        prepare(config(source=str(copy)), resume=True)


@pytest.mark.slow
def test_no_room_leaves_what_there_is(
    config: Callable[..., PrepareConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A full disk raises one error, and a resumed selection gives the same bytes."""
    whole = bytes_of(prepare(config(output=str(tmp_path / "whole")))["output"])
    add, written = Ledger.add, []

    def full(ledger: Ledger, entries: Any) -> None:
        written.append(len(entries))
        if len(written) == 3:  # at its bound on pages, SQLite reports a full disk
            ledger._connection.execute("PRAGMA max_page_count = 1")
        add(ledger, entries)

    with monkeypatch.context() as patched:
        patched.setattr(Ledger, "add", full)
        with pytest.raises(RunError, match=r"cannot be written: No space left on device.*--resume"):
            prepare(config())
    assert len(written) == 3
    assert bytes_of(prepare(config(), resume=True)["output"]) == whole


def test_files_of_an_earlier_version_are_refused_and_swept(
    config: Callable[..., PrepareConfig],
) -> None:
    stop = threading.Event()
    stop.set()
    folder = Path(prepare(config(), stop=stop)["output"])
    (folder / ".prepare" / "candidates.sqlite").rename(folder / ".prepare" / "journal")
    with pytest.raises(RunError, match=r"journal was written by an earlier version.*--overwrite"):
        prepare(config(), resume=True)
    assert prepare(config(), overwrite=True)["interrupted"] is False
    assert sorted(path.name for path in folder.iterdir()) == sorted(FILES)


# --- the hub --------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_hub_is_streamed_at_one_commit(
    config: Callable[..., PrepareConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`datasets` streams local files; only their location is replaced."""
    import datasets
    import huggingface_hub

    folder = tmp_path / "hub"
    folder.mkdir()
    whole = openthoughts.write_parquet(folder / "train-0.parquet", ROWS)
    table = pq.read_table(whole)
    pq.write_table(table.slice(0, 2600), folder / "train-0.parquet")
    pq.write_table(table.slice(2600), folder / "train-1.parquet")
    real, calls = datasets.load_dataset, []

    def load(name: str, **how: Any) -> Any:
        calls.append((name, how))
        files = sorted(map(str, folder.glob("*.parquet")))
        return real("parquet", data_files=files, split="train", streaming=how["streaming"])

    class Info:
        sha = "c0ffee"

    monkeypatch.setattr(datasets, "load_dataset", load)
    monkeypatch.setattr(
        huggingface_hub.HfApi, "dataset_info", lambda self, name, revision=None: Info
    )
    expected = prepare(config(output=str(tmp_path / "lines")))
    settings = config(source="someone/rows")
    stop = threading.Event()
    stop.set()
    for i in range(3):
        assert prepare(settings, resume=i > 0, stop=stop)["rows"] == 1000 * (i + 1)
    result = prepare(settings, resume=True)
    assert calls[0] == ("someone/rows", {"split": "train", "revision": "c0ffee", "streaming": True})
    assert result["source"] == {"dataset": "someone/rows", "split": "train", "revision": "c0ffee"}
    for split in ("train", "validation"):
        assert rows_of(result["output"], split) == rows_of(expected["output"], split)


STOPPED_ON_THE_HUB = """
import sys, threading, datasets, huggingface_hub
from fastadapt.data.prepare import prepare
from fastadapt.data.prepare.selection import PrepareConfig

real, (file, output, tokenizer) = datasets.load_dataset, sys.argv[1:]
datasets.load_dataset = lambda name, **how: real(
    "parquet", data_files=file, split="train", streaming=True
)
huggingface_hub.HfApi.dataset_info = lambda *_, **__: type("Info", (), {"sha": "c0ffee"})
stop = threading.Event()
stop.set()
result = prepare(PrepareConfig("someone/rows", output, tokenizer, max_tokens=60), stop=stop)
assert result["rows"] == 1000
"""


@pytest.mark.slow
def test_a_stopped_stream_ends_its_process_well(
    config: Callable[..., PrepareConfig], tmp_path: Path
) -> None:
    """Arrow's threads would abort a process that leaves a streamed file half read."""
    file = openthoughts.write_parquet(tmp_path / "rows.parquet", ROWS)
    command: list[str | Path]
    command = [sys.executable, "-c", STOPPED_ON_THE_HUB, file, config().output, config().tokenizer]
    ended = subprocess.run(command, capture_output=True, text=True)
    assert (ended.returncode, ended.stderr) == (0, "")


def test_a_hub_out_of_reach_says_so(config: Callable[..., PrepareConfig]) -> None:
    with pytest.raises(UserError, match=r"dataset of this name from the hub .* failed"):
        prepare(config(source="nobody/nothing"))


def test_a_lost_connection_says_so(
    config: Callable[..., PrepareConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The hub's client raises an error of its own where nothing answers."""
    import huggingface_hub

    def refused(*_: Any, **__: Any) -> None:
        huggingface_hub.get_session().get("http://127.0.0.1:9")

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", refused)
    with pytest.raises(UserError, match=r"from the hub .* failed: .*[Cc]onnect"):
        prepare(config(source="nobody/nothing"))
