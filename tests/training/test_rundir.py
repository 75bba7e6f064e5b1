"""A run writes only into its folder, and removes only files that a run has written."""

from __future__ import annotations

import errno
import json
from collections.abc import Callable
from contextlib import suppress
from io import FileIO
from pathlib import Path
from typing import Any

import pytest

from fastadapt.errors import RunError, UserError
from fastadapt.io import workspace
from fastadapt.io.atomic import locked
from fastadapt.training import run_dir
from fastadapt.training.config import TrainConfig, save_config
from fastadapt.training.run_dir import (
    MetricsLog,
    drop_records_after,
    open_run,
    read_records,
    replacing,
    start_afresh,
)

STAGED = ".tmp-summary.json-" + "0f" * 16


def begin(config: TrainConfig) -> Path:
    with open_run(config, resume=False, overwrite=False) as folder:
        start_afresh(folder, config)
        MetricsLog(folder / "metrics.jsonl").__exit__()
    return folder


def test_a_new_folder_and_an_empty_one(
    tiny_config: Callable[..., TrainConfig], tmp_path: Path
) -> None:
    config = tiny_config(**{"run.output": str(tmp_path / "deep" / "run")})
    assert begin(config) == tmp_path / "deep" / "run"
    (tmp_path / "empty").mkdir()
    begin(tiny_config(**{"run.output": str(tmp_path / "empty")}))


def test_a_folder_of_another_run_is_not_overwritten(
    tiny_config: Callable[..., TrainConfig], tmp_path: Path
) -> None:
    config = tiny_config()
    folder = begin(config)
    (folder / "checkpoints" / "step-00000009").mkdir(parents=True)
    with (
        pytest.raises(UserError, match=r"another run, at step 9\. Resume that run \(--resume"),
        open_run(config, resume=False, overwrite=False),
    ):
        raise AssertionError("never reached")
    assert (folder / "checkpoints" / "step-00000009").is_dir()


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_folder_that_is_no_run_is_never_touched(
    tiny_config: Callable[..., TrainConfig], tmp_path: Path, overwrite: bool
) -> None:
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / "thesis.tex").write_text("years")
    (folder / "config.yaml").write_text("mine: too")
    (folder / "metrics.jsonl").write_text("")
    config = tiny_config(**{"run.output": str(folder)})
    with (
        pytest.raises(UserError, match="does not look like a run"),
        open_run(config, resume=False, overwrite=overwrite),
    ):
        raise AssertionError("never reached")
    assert (folder / "thesis.tex").read_text() == "years"
    assert (folder / "config.yaml").read_text() == "mine: too"


@pytest.mark.parametrize("name", ["metrics.jsonl", "summary.json", "report.html"])
def test_a_file_with_the_name_of_a_runs_makes_no_run(
    tiny_config: Callable[..., TrainConfig], tmp_path: Path, name: str
) -> None:
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / name).write_text("years")
    config = tiny_config(**{"run.output": str(folder)})
    for overwrite in (False, True):
        with (
            pytest.raises(UserError, match="does not look like a run"),
            open_run(config, resume=False, overwrite=overwrite),
        ):
            raise AssertionError("never reached")
    assert (folder / name).read_text() == "years"


def test_a_killed_overwrite_leaves_a_run(
    tiny_config: Callable[..., TrainConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A kill before any removal, or before the new configuration is in place."""
    config = tiny_config()
    folder = begin(config)
    done: list[str] = []
    after = 0

    class Killed(BaseException):
        pass

    def count(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any) -> Any:
            if len(done) == after:
                raise Killed
            done.append(name)
            return function(*args)

        return call

    steps = (workspace, "remove"), (workspace, "sync_folder"), (run_dir, "save_config")
    for module, name in steps:
        monkeypatch.setattr(module, name, count(name, getattr(module, name)))
    names = ("adapter/layer_0.safetensors", "metrics.jsonl", "summary.json", "report.html")
    while not done or done[-1] != "save_config":
        for name in names:
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_text("")
        done.clear()
        with open_run(config, resume=False, overwrite=True), suppress(Killed):
            start_afresh(folder, config)
        assert (folder / "config.yaml").is_file()
        assert len(done) == after
        after += 1
    assert done.count("remove") == len(names)
    assert done.count("sync_folder") > 0
    assert sorted(path.name for path in folder.iterdir()) == [".lock", "config.yaml"]


def test_overwriting_removes_what_a_run_wrote_and_nothing_else(
    tiny_config: Callable[..., TrainConfig], tmp_path: Path
) -> None:
    config = tiny_config()
    folder = begin(config)
    for name in ("checkpoints/step-00000003", "checkpoints/.tmp-6-ab", "adapter", STAGED):
        (folder / name).mkdir(parents=True)
        (folder / name / "layer_0.safetensors").write_bytes(b"x")
    (folder / "summary.json").write_text("{}")
    (folder / "notes.md").write_text("mine")
    (folder / "adapter" / "notes.md").write_text("mine")
    with open_run(config, resume=False, overwrite=True):
        assert (folder / "summary.json").exists()  # until the new run begins
        start_afresh(folder, config)
    names = sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.name != ".lock")
    assert names == ["adapter", "adapter/notes.md", "config.yaml", "notes.md"]


@pytest.mark.parametrize("name", ["checkpoints", "adapter"])
def test_a_folder_behind_a_link_is_emptied_and_stays(
    tiny_config: Callable[..., TrainConfig], tmp_path: Path, name: str
) -> None:
    config = tiny_config()
    folder = begin(config)
    disk = tmp_path / "disk"
    written = {"checkpoints": "step-00000003", "adapter": "layer_0.safetensors"}[name]
    (disk / written).mkdir(parents=True)
    (folder / name).symlink_to(disk)
    for _ in range(2):
        with open_run(config, resume=False, overwrite=True):
            start_afresh(folder, config)
        assert (folder / name).readlink() == disk
        assert list(disk.iterdir()) == []


def test_an_overwrite_that_fails_leaves_a_run(
    tiny_config: Callable[..., TrainConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny_config()
    folder = begin(config)
    (folder / "checkpoints" / "step-00000003").mkdir(parents=True)

    def refuse(self: Path) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    with monkeypatch.context() as patched:
        patched.setattr(Path, "rmdir", refuse)
        with open_run(config, resume=False, overwrite=True), pytest.raises(RunError):
            start_afresh(folder, config)
    with open_run(config, resume=False, overwrite=True):
        start_afresh(folder, config)


def test_a_dangling_link_is_reported_before_anything_is_removed(
    tiny_config: Callable[..., TrainConfig], tmp_path: Path
) -> None:
    config = tiny_config()
    folder = begin(config)
    (folder / "checkpoints").symlink_to(tmp_path / "unmounted")
    for resume in (False, True):
        with (
            pytest.raises(UserError, match=r"checkpoints is a link to .*unmounted"),
            open_run(config, resume=resume, overwrite=not resume),
        ):
            raise AssertionError("never reached")
    assert (folder / "config.yaml").is_file()


def test_lines_that_are_not_records_are_skipped(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    deep, long = "[" * 100_000 + "]" * 100_000, "7" * 5000
    lines = ['{"kind": "train", "step": 1}', deep, f'{{"kind": "a", "step": {long}}}']
    lines += ['{"kind": [], "step": 2}', '{"kind": "train", "step": 3, "told": "a\u2028b"}', "[]"]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    assert [record["step"] for record in read_records(path)] == [1, 3]


def test_resume_needs_a_run_of_the_same_configuration(
    tiny_config: Callable[..., TrainConfig], tmp_path: Path
) -> None:
    config = tiny_config()
    for resume, overwrite, message in (
        (True, False, r"holds no run; omit --resume"),
        (True, True, "choose one"),
    ):
        with (
            pytest.raises(UserError, match=message),
            open_run(config, resume=resume, overwrite=overwrite),
        ):
            raise AssertionError("never reached")
    assert not (tmp_path / "run").exists()
    begin(config)
    other = tiny_config(**{"optimizer.lr": 0.5, "adapter.n_features": 40})
    with (
        pytest.raises(UserError, match=r"adapter\.n_features: 40, was 48; optimizer\.lr: 0\.5"),
        open_run(other, resume=True, overwrite=False),
    ):
        raise AssertionError("never reached")
    with open_run(tiny_config(**{"run.eval_every": 9}), resume=True, overwrite=False) as folder:
        assert folder == tmp_path / "run"


def test_the_folder_of_a_run_killed_before_its_first_write_can_be_used(
    tiny_config: Callable[..., TrainConfig], tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / ".lock").touch()
    (folder / f".tmp-config.yaml-{'0f' * 16}").write_text("pa")
    begin(tiny_config())
    assert sorted(p.name for p in folder.iterdir()) == [".lock", "config.yaml", "metrics.jsonl"]


def test_a_file_in_the_folders_place(
    tiny_config: Callable[..., TrainConfig], tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("x")
    for name, message in (("file", "is a file"), ("file/run", "cannot be created")):
        config = tiny_config(**{"run.output": str(tmp_path / name)})
        with (
            pytest.raises(UserError, match=message),
            open_run(config, resume=False, overwrite=False),
        ):
            raise AssertionError("never reached")
    assert (tmp_path / "file").read_text() == "x"


def test_two_processes_cannot_share_a_folder(
    tiny_config: Callable[..., TrainConfig], tmp_path: Path
) -> None:
    config = tiny_config()
    folder = begin(config)
    with (
        locked(folder / ".lock"),
        pytest.raises(UserError, match="another process is training in"),
        open_run(config, resume=True, overwrite=False),
    ):
        raise AssertionError("never reached")


def test_a_run_that_cannot_begin_leaves_no_folder(
    tiny_config: Callable[..., TrainConfig], tmp_path: Path
) -> None:
    config = tiny_config()
    with (
        pytest.raises(UserError, match="no such model"),
        open_run(config, resume=False, overwrite=False),
    ):
        raise UserError("no such model")
    assert not (tmp_path / "run").exists()


def test_a_folder_that_may_not_be_written(
    tiny_config: Callable[..., TrainConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    config = tiny_config()
    monkeypatch.setattr(Path, "mkdir", refuse)
    with (
        pytest.raises(UserError, match=r"run\.output: .* cannot be created: Permission denied"),
        open_run(config, resume=False, overwrite=False),
    ):
        raise AssertionError("never reached")


# --- metrics --------------------------------------------------------------------------------------


def test_records_reach_the_file_and_the_sinks_in_order(tmp_path: Path) -> None:
    passed: list[dict] = []
    with MetricsLog(tmp_path / "metrics.jsonl", [passed.append]) as log:
        log.write("train", 1, loss=float("nan"), l0_per_layer=[1.0, float("inf")])
        assert read_records(tmp_path / "metrics.jsonl") == passed  # flushed at once
        log.write("eval", 1, kl_adapter=0.5, histogram={"counts": [[1]]})
    assert passed == [
        {"kind": "train", "step": 1, "loss": None, "l0_per_layer": [1.0, None]},
        {"kind": "eval", "step": 1, "kl_adapter": 0.5, "histogram": {"counts": [[1]]}},
    ]
    with MetricsLog(tmp_path / "metrics.jsonl") as log:
        assert log.has("eval", 1)
        assert not log.has("eval", 2)


def test_records_after_a_checkpoint_are_removed(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    records = [{"kind": "train", "step": step, "loss": 0.1 * step} for step in range(1, 7)]
    text = "".join(json.dumps(record) + "\n" for record in records)
    path.write_text(text + '{"kind": "train", "step": 7, "lo')  # cut short by a kill
    drop_records_after(path, 4)
    assert path.read_text() == "".join(json.dumps(record) + "\n" for record in records[:4])
    drop_records_after(tmp_path / "none.jsonl", 4)
    assert read_records(tmp_path / "none.jsonl") == []


def test_a_full_disk_is_reported(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path / "metrics.jsonl")
    log._file.close()
    log._file = FileIO("/dev/full", "a")
    with pytest.raises(RunError, match=r"No space left.*Make room\. Checkpoints are intact"), log:
        log.write("train", 1, loss=1.0)  # closing the log then raises nothing


def test_replacing_is_all_or_nothing(tmp_path: Path) -> None:
    path = tmp_path / "summary.json"
    path.write_text("old")
    with pytest.raises(UnicodeEncodeError), replacing(path) as staged:
        staged.write_text("half\udc00")
    assert path.read_text() == "old"
    with replacing(path) as staged:
        staged.write_text("new")
    with replacing(tmp_path / "adapter") as staged:
        staged.mkdir()
        (staged / "a").write_text("1")
    assert [p.name for p in sorted(tmp_path.iterdir())] == ["adapter", "summary.json"]
    assert path.read_text() == "new"


def test_an_unknown_key_in_an_edited_configuration_is_refused(
    tiny_config: Callable[..., TrainConfig], tmp_path: Path
) -> None:
    config = tiny_config()
    folder = begin(config)
    save_config(config, folder / "config.yaml")
    text = (folder / "config.yaml").read_text()
    (folder / "config.yaml").write_text(text.replace("warmup", "warm_up"))
    with (
        pytest.raises(UserError, match=r"unknown key optimizer\.warm_up; did you mean"),
        open_run(config, resume=True, overwrite=False),
    ):
        raise AssertionError("never reached")
