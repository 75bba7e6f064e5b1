"""Recorded calls of fsync and rename survive a power cut, and each of these calls is necessary."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import pytest
import torch
from power_cut import Recording, Site, faults, record, sites
from safetensors import SafetensorError

from fastadapt.adapter.files import save_adapters
from fastadapt.adapter.module import AdapterConfig, TranscoderAdapter
from fastadapt.data.prepare import output_folder
from fastadapt.data.prepare.candidate_store import CandidateStore
from fastadapt.data.prepare.selection import Shortlist
from fastadapt.distributed.ranks import Ranks
from fastadapt.errors import RunError
from fastadapt.evaluation.faithfulness.partial_results import PartialResults
from fastadapt.evaluation.generation.responses import Speed, open_responses
from fastadapt.features.collect.folder import begin_anew, clear, clear_work
from fastadapt.features.store.store import write_manifest
from fastadapt.io.atomic import (
    disk_errors,
    half_filled,
    replacing,
    staged_beside,
    sweep,
    sweep_tree,
    writing_folder,
)
from fastadapt.models.huggingface.checkpoint import write_checkpoint
from fastadapt.training import loop
from fastadapt.training import run_dir as rundir
from fastadapt.training.checkpoint import save_checkpoint
from fastadapt.training.config import TrainConfig, from_dict


def adapters() -> list[TranscoderAdapter]:
    return [TranscoderAdapter(8, AdapterConfig(4)) for _ in range(2)]


def write_file(folder: Path) -> None:
    with replacing(folder / "summary.json") as staged:
        staged.write_text("{}")


def write_tree(folder: Path) -> None:
    with writing_folder(folder / "site", last="site.json") as staged:
        (staged / "data").mkdir()
        (staged / "data" / "a.js").write_text("a")
        (staged / "site.json").write_text("{}")


def write_checkpoint_set(folder: Path) -> None:
    save_checkpoint(folder, 1, {"weights": {"W": torch.ones(3)}}, {"step": 1})


def write_store_manifest(folder: Path) -> None:
    write_manifest(folder, {}, [folder / "texts.parquet"])


def write_export(folder: Path) -> None:
    tensors = {"w": lambda: torch.ones(3)}
    write_checkpoint(folder / "out", tensors, "{}", companions={})


def write_over_adapters(folder: Path) -> None:
    save_adapters(adapters()[:1], folder / "adapter")


def old_adapters(folder: Path) -> None:
    save_adapters(adapters(), folder / "adapter")


def adapters_among_others(folder: Path) -> None:
    old_adapters(folder)
    (folder / "adapter" / "README.md").write_text("mine")


def adapters_of_a_killed_writer(folder: Path) -> None:
    """Leave what a kill between the two renames of a writer leaves."""
    old_adapters(folder)
    stage = staged_beside(folder / "adapter")
    (stage / "new").mkdir(parents=True)
    (folder / "adapter").rename(stage / "old")


def begin_data(folder: Path) -> None:
    output = str(folder / "runs" / "data")
    with output_folder.open_output(
        output, resume=False, overwrite=(folder / "runs").exists()
    ) as opened:
        output_folder.begin(opened, {"seed": 0})


def old_data(folder: Path) -> None:
    work = folder / "runs" / "data" / output_folder.WORK
    work.mkdir(parents=True)
    for name in ("settings.json", "rows", "journal", "candidates.sqlite"):
        (work / name).write_text("{}")


def read_data(folder: Path) -> None:
    with CandidateStore(folder, 0, Shortlist({"math": 9})) as store:
        for row in range(2):
            store.add(row, "math", ("0" * 32, "0" * 32), 3, {"row": row})
            store.commit(row + 1, None)


def config_in(folder: Path) -> TrainConfig:
    pair = {"target": "t", "base": "b"}
    data = {"train": "a", "validation": "b"}
    return from_dict({"pair": pair, "data": data, "run": {"output": str(folder / "runs" / "a")}})


def start_run(folder: Path) -> None:
    config, again = config_in(folder), (folder / "runs").exists()
    with rundir.open_run(config, resume=False, overwrite=again) as run:
        rundir.start_afresh(run, config)


def old_run(folder: Path) -> None:
    start_run(folder)
    run = folder / "runs" / "a"
    save_checkpoint(run / "checkpoints", 3, {"weights": {"W": torch.ones(3)}}, {"step": 3})
    (run / "checkpoints" / "notes.txt").write_text("mine")
    (run / "metrics.jsonl").write_text("{}")
    save_adapters(adapters(), run / "adapter")


def go_on_with_run(folder: Path) -> None:
    """Save a checkpoint by the training loop, without the other parts of a run."""
    with rundir.MetricsLog(folder / "metrics.jsonl") as log:
        log.write("train", 1)
        step = SimpleNamespace(
            log=log,
            folder=folder,
            step=1,
            config=config_in(folder),
            ranks=Ranks(),
            _record_checkpoint=lambda path: None,
        )
        capture = lambda _: ({"weights": {"W": torch.ones(3)}}, {"step": 1})  # noqa: E731
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(loop.state, "capture", capture)
            loop.TrainingRun._save(step)  # type: ignore[arg-type]


def prepare_features(folder: Path) -> None:
    """Write the files of an earlier collection and the staged files of the next one."""
    for within in (folder, folder / "adapter", folder / "collecting.next" / "adapter"):
        within.mkdir(parents=True, exist_ok=True)
        (within / "lens.parquet").write_bytes(b"lens")
    for within in (folder / "collecting", folder / "collecting.next"):
        within.mkdir(exist_ok=True)
        for name in ("tokens.parquet", "texts.parquet", "facts.json"):
            (within / name).write_text("{}")
    (folder / "lens.parquet").unlink()
    for name in ("manifest.json", "tokens.parquet", "texts.parquet"):
        (folder / name).write_text("{}")


def measure_parts(folder: Path) -> None:
    parts = PartialResults(folder / "arrays", "a", "0" * 32, 2)
    for part in range(2):
        parts.add(part, {"x": torch.ones(2)})


def sample(folder: Path) -> None:
    with open_responses(folder / "runs" / "responses.jsonl", {"seed": 0}) as file:
        file.add_speed(Speed(1, 1.0, "sync"))


class Artefact(NamedTuple):
    """Function that writes an artefact, its marker, and files before; see ``power_cut.faults``."""

    write: Callable[[Path], object]
    marker: str | None = None
    before: Callable[[Path], object] = lambda folder: None
    old_counts: bool = True


CARD = "adapter/fastadapt.json"
ARTEFACTS = {
    "summary": Artefact(write_file),
    "pages": Artefact(write_tree, "site/site.json"),
    "pages in an empty folder": Artefact(
        write_tree, "site/site.json", lambda folder: (folder / "site").mkdir()
    ),
    "pages again": Artefact(write_tree, "site/site.json", write_tree),
    "adapters": Artefact(old_adapters, CARD),
    "adapters again": Artefact(write_over_adapters, CARD, old_adapters),
    "adapters among others": Artefact(write_over_adapters, CARD, adapters_among_others),
    "adapters after a kill": Artefact(write_over_adapters, CARD, adapters_of_a_killed_writer),
    "adapters in new folders": Artefact(
        lambda folder: save_adapters(adapters(), folder / "a" / "b" / "c"), "a/b/c/fastadapt.json"
    ),
    "checkpoint": Artefact(write_checkpoint_set, "step-00000001/manifest.json"),
    "store manifest": Artefact(
        write_store_manifest,
        "manifest.json",
        lambda folder: (folder / "texts.parquet").write_bytes(b"texts"),
    ),
    "data begun": Artefact(begin_data, "runs/data/.prepare/settings.json"),
    "data begun again": Artefact(
        begin_data, "runs/data/.prepare/settings.json", old_data, old_counts=False
    ),
    "data read": Artefact(read_data),
    "data manifest": Artefact(
        lambda folder: output_folder.finish(folder, {"files": {}}), "manifest.json"
    ),
    "run begun": Artefact(start_run, "runs/a/config.yaml"),
    "run begun again": Artefact(start_run, "runs/a/config.yaml", old_run, old_counts=False),
    "run going on": Artefact(go_on_with_run),
    "features begun": Artefact(
        begin_anew, "collecting/facts.json", prepare_features, old_counts=False
    ),
    "collecting cleared": Artefact(clear_work, "collecting/facts.json", prepare_features),
    "features cleared": Artefact(clear, "manifest.json", prepare_features),
    "parts": Artefact(measure_parts),
    "responses": Artefact(sample),
    "export": Artefact(write_export, "out/config.json"),
}


@pytest.fixture(scope="module")
def recordings(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Recording]:
    by_name = {}
    for name, artefact in ARTEFACTS.items():
        folder = tmp_path_factory.mktemp("artefact")
        artefact.before(folder)
        with pytest.MonkeyPatch.context() as patch:
            by_name[name] = record(lambda: artefact.write(folder), folder, patch.setattr)  # noqa: B023
    return by_name


def faults_of(name: str, recording: Recording, without: Site | None = None) -> list[str]:
    artefact = ARTEFACTS[name]
    return faults(recording, artefact.marker, without, old_counts=artefact.old_counts)


@pytest.mark.parametrize("name", ARTEFACTS)
def test_a_power_cut_leaves_nothing_half_done(name: str, recordings: dict[str, Recording]) -> None:
    assert faults_of(name, recordings[name]) == []


@pytest.mark.parametrize("site", sites(), ids=str)
def test_every_call_that_syncs_is_needed(site: Site, recordings: dict[str, Recording]) -> None:
    taken = [
        name
        for name, recording in recordings.items()
        if any(site.holds(line) for event in recording.events for line in event.lines)
    ]
    assert taken, f"no artefact takes {site}"
    assert any(faults_of(name, recordings[name], site) for name in taken), f"{site} is not missed"


def test_what_stays_in_a_folder_of_others(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("mine")
    save_adapters([*adapters(), *adapters()], tmp_path)
    save_adapters(adapters(), tmp_path)
    names = {"README.md", "fastadapt.json", "layer_0.safetensors", "layer_1.safetensors"}
    assert {path.name for path in tmp_path.iterdir()} == names
    assert not half_filled(tmp_path)


def test_a_failed_write_leaves_what_was_there(tmp_path: Path) -> None:
    write_tree(tmp_path)

    def fail() -> None:
        with writing_folder(tmp_path / "site", last="site.json") as staged:
            (staged / "site.json").write_text("half")
            raise SafetensorError("I/O error: No space left on device (os error 28)")

    with pytest.raises(RunError, match=r"site cannot be written: No space left.*MiB free"):
        fail()
    assert (tmp_path / "site" / "site.json").read_text() == "{}"
    assert [path.name for path in tmp_path.iterdir()] == ["site"]


@pytest.mark.parametrize("end", [KeyboardInterrupt, None], ids=["Ctrl-C", "kill"])
def test_an_end_between_the_two_renames_loses_nothing(
    end: type[BaseException] | None, tmp_path: Path
) -> None:
    """The next writer restores the old folder, also if it fails itself."""
    path = tmp_path / "adapter"
    save_adapters(adapters(), path)
    before = {file.name: file.read_bytes() for file in path.iterdir()}
    replace = os.replace

    def stop(source: Path, destination: Path) -> None:
        if Path(destination) != path:
            replace(source, destination)
        elif end is not None:
            raise end
        else:
            os.kill(os.getpid(), signal.SIGKILL)

    child = os.fork()
    if child == 0:
        os.replace = stop  # type: ignore[assignment]
        with suppress(KeyboardInterrupt):
            save_adapters(adapters()[:1], path)
        os._exit(0)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert status == (-signal.SIGKILL if end is None else 0)
    assert path.exists() == (end is not None)
    with pytest.raises(ZeroDivisionError), writing_folder(path):
        raise ZeroDivisionError
    assert {file.name: file.read_bytes() for file in path.iterdir()} == before
    assert list(tmp_path.iterdir()) == [path]


def test_a_writer_at_work_is_left_alone(tmp_path: Path) -> None:
    with writing_folder(tmp_path / "site") as first:
        (first / "mine").write_text("")
        write_tree(tmp_path)
        assert (first / "mine").exists()
    assert [path.name for path in (tmp_path / "site").iterdir()] == ["mine"]


def test_a_sweep_follows_links_and_leaves_others(tmp_path: Path) -> None:
    (tmp_path / "disk" / "real").mkdir(parents=True)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "adapter").symlink_to(tmp_path / "disk" / "real")
    staged = staged_beside(tmp_path / "disk" / "real")
    staged.mkdir()
    mine = tmp_path / "disk" / ".tmp-real-mine"
    mine.write_text("")
    assert sweep(tmp_path / "run" / "adapter") == [staged]
    assert mine.exists()
    for name in ("site", "a"):
        staged_beside(tmp_path / "run" / name).write_text("")
    assert len(sweep_tree(tmp_path / "run", but=["site"])) == 1


def test_a_file_that_is_too_large_is_no_full_disk(tmp_path: Path) -> None:
    message = r"out cannot be written: File too large\. Run the same"
    with pytest.raises(RunError, match=message), disk_errors(tmp_path / "out"):
        raise OSError(27, "File too large")
