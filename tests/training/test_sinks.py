"""Each sink holds exactly the series of ``metrics.jsonl``, also after a crash and resumption."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from fastadapt.errors import UserError
from fastadapt.training.config import TrainConfig
from fastadapt.training.logs import sinks
from fastadapt.training.run_dir import METRICS, RUN_ID, read_records
from fastadapt.training.trainer import train

Series = dict[str, list[tuple[int, float]]]


def recorded(folder: Path) -> Series:
    series: Series = {}
    for record in read_records(folder / METRICS):
        if record["kind"] in sinks.SERIES:
            for name, value in sinks.scalars(record).items():
                series.setdefault(name, []).append((record["step"], value))
    return series


def of_tensorboard(folder: Path) -> Series:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder / "tensorboard"), {"scalars": 0})
    events.Reload()
    return {
        tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]
    }


def of_wandb(folder: Path) -> Series:
    """Return the series of the newest offline run, the one that wandb would synchronise."""
    from wandb.proto.wandb_internal_pb2 import Record

    newest = max(folder.glob("wandb/offline-run-*/*.wandb"), key=lambda f: f.stat().st_mtime_ns)
    series: Series = {}
    for data in leveldb_log(newest.read_bytes()):
        record = Record()
        record.ParseFromString(data)
        items = record.history.item
        row = {i.key or "/".join(i.nested_key): json.loads(i.value_json) for i in items}
        for name, value in row.items():
            if "/" in name:
                series.setdefault(name, []).append((row["step"], value))
    return series


def leveldb_log(data: bytes) -> Iterator[bytes]:
    """Yield the records of a file in LevelDB's log format, after wandb's header of 7 bytes."""
    block, header, position, record = 32768, 7, 7, b""
    while position + header <= len(data):
        if block - position % block < header:  # no header fits into the remainder of a block
            position += block - position % block
            continue
        length, kind = struct.unpack_from("<HB", data, position + 4)
        record += data[position + header : position + header + length]
        position += header + length
        if kind in (1, 4):  # a whole record, or the last fragment of one
            yield record
            record = b""


def of_trackio(folder: Path) -> Series:
    import trackio
    from trackio.sqlite_storage import SQLiteStorage

    project = os.environ["TRACKIO_PROJECT"]
    (run,) = trackio.Api().runs(project)
    series: Series = {}
    for row in SQLiteStorage.get_logs(project, run.name, run_id=run.id):
        for name, value in row.items():
            if "/" in name:
                series.setdefault(name, []).append((row["step"], value))
    return series


READERS: dict[str, Callable[[Path], Series]] = {
    "tensorboard": of_tensorboard,
    "wandb": of_wandb,
    "trackio": of_trackio,
}


@pytest.fixture(params=READERS)
def sink(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> str:
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))  # read when first imported
    monkeypatch.setenv("TRACKIO_PROJECT", tmp_path.name)
    pytest.importorskip(request.param)
    return request.param


class CrashError(Exception):
    pass


def crash_at(step: int) -> Callable[[dict], None]:
    def watch(record: dict) -> None:
        if record["kind"] == "train" and record["step"] == step:
            raise CrashError

    return watch


def test_a_crash_and_a_resumption_leave_one_complete_series(
    sink: str, tiny_config: Callable[..., TrainConfig]
) -> None:
    config = tiny_config(**{"run.sinks": [sink]})
    folder = Path(config.run.output)
    with pytest.raises(CrashError):
        train(config, sinks=[crash_at(8)])  # the last checkpoint is of step 6
    train(config, resume=True)
    expected = recorded(folder)
    assert [step for step, _ in expected["train/loss"]] == list(range(1, 13))
    assert [step for step, _ in expected["eval/kl_adapter"]] == [0, 5, 10, 12]
    assert len([name for name in expected if name.startswith("train/l0_per_layer/")]) == 2
    got = READERS[sink](folder)
    assert got.keys() == expected.keys()
    for name, points in expected.items():
        assert [step for step, _ in got[name]] == [step for step, _ in points], name
        assert [v for _, v in got[name]] == pytest.approx([v for _, v in points], rel=1e-6), name


def test_a_sink_added_at_the_resumption_has_the_whole_history(
    sink: str, tiny_config: Callable[..., TrainConfig]
) -> None:
    config = tiny_config()
    folder = Path(config.run.output)
    with pytest.raises(CrashError):
        train(config, sinks=[crash_at(8)])
    train(tiny_config(**{"run.sinks": [sink]}), resume=True)
    got = READERS[sink](folder)["train/loss"]
    assert [step for step, _ in got] == list(range(1, 13))


def test_an_overwrite_starts_the_series_again(
    sink: str, tiny_config: Callable[..., TrainConfig]
) -> None:
    first = tiny_config(**{"run.sinks": [sink], "optimizer.max_steps": 4})
    folder = Path(first.run.output)
    train(first)
    named = (folder / "run-id.txt").read_text() if sink != "tensorboard" else ""
    train(tiny_config(**{"run.sinks": [sink], "optimizer.max_steps": 2}), overwrite=True)
    if sink != "tensorboard":
        assert (folder / "run-id.txt").read_text() != named
    if sink != "trackio":  # which also keeps the old run, in another folder
        assert [step for step, _ in READERS[sink](folder)["train/loss"]] == [1, 2]
        train(tiny_config(**{"optimizer.max_steps": 2}), overwrite=True)
        assert not (folder / sink).exists()


def test_a_sink_that_is_not_installed_names_its_extra(
    tiny_config: Callable[..., TrainConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sinks.importlib.util, "find_spec", lambda _: None)
    with pytest.raises(UserError, match=r"wandb is not installed.* 'fastadapt\[wandb\]'"):
        train(tiny_config(**{"run.sinks": ["wandb"]}))


def test_only_known_sinks_once_each(tiny_config: Callable[..., TrainConfig]) -> None:
    with pytest.raises(UserError, match=r"run\.sinks: expected one of tensorboard, wandb, trackio"):
        tiny_config(**{"run.sinks": ["mlflow"]})
    with pytest.raises(UserError, match=r"run\.sinks: expected each once"):
        tiny_config(**{"run.sinks": ["wandb", "wandb"]})


def test_the_numbers_of_a_record() -> None:
    record = {"kind": "train", "step": 3, "loss": 0.5, "l0_per_layer": [1.5, None], "why": "x"}
    assert sinks.scalars(record) == {"train/loss": 0.5, "train/l0_per_layer/0": 1.5}


@pytest.mark.parametrize(
    "name",
    [b"", b"../../x\n", b"/etc/x", b"\xff\0", b"a" * 300],
    ids=["empty", "up", "root", "bytes", "long"],
)
def test_a_name_that_no_run_has_is_refused(
    name: bytes, sink: str, tiny_config: Callable[..., TrainConfig]
) -> None:
    if sink == "tensorboard":
        pytest.skip("its files lie in the run")
    config = tiny_config(**{"run.sinks": [sink]})
    file = Path(config.run.output) / RUN_ID
    with pytest.raises(CrashError):
        train(config, sinks=[crash_at(8)])
    file.write_bytes(name)
    with pytest.raises(UserError, match=f"{file.name}: expected 8 hexadecimal digits, got "):
        train(config, resume=True)
