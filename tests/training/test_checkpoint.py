"""Checkpoints survive kills, full disks and damaged files, and never mix two steps."""

from __future__ import annotations

import errno
import json
import os
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError

from fastadapt.errors import RunError
from fastadapt.training import checkpoint as module
from fastadapt.training.checkpoint import (
    CheckpointDamagedError,
    list_checkpoints,
    load_latest,
    save_checkpoint,
    sweep,
    verify_checkpoint,
)

PROOF = os.environ.get("FASTADAPT_PROOF") == "1"


def tensors_of(step: int) -> dict[str, dict[str, torch.Tensor]]:
    return {
        "weights": {"0.W_enc": torch.full((5, 3), float(step)), "0.b_enc": torch.zeros(5) + step},
        "counters": {"since": torch.full((2, 5), step, dtype=torch.int64)},
    }


def save(folder: Path, step: int, keep: int = 2) -> Path:
    return save_checkpoint(folder, step, tensors_of(step), {"step": step, "tokens": 3}, keep=keep)


def assert_is_step(folder: Path, step: int) -> None:
    loaded, _ = load_latest(folder)
    assert loaded is not None
    assert loaded.step == step
    assert loaded.scalars == {"step": step, "tokens": 3}
    for stem, group in tensors_of(step).items():
        for name, tensor in group.items():
            assert torch.equal(loaded.tensors[stem][name], tensor)
            assert loaded.tensors[stem][name].dtype == tensor.dtype


def test_what_was_saved_comes_back(tmp_path: Path) -> None:
    folder = tmp_path / "run" / "checkpoints"
    path = save(folder, 12)
    assert path == folder / "step-00000012"
    assert sorted(p.name for p in path.iterdir()) == [
        "counters.safetensors",
        "manifest.json",
        "state.json",
        "weights.safetensors",
    ]
    assert_is_step(folder, 12)


def test_an_empty_or_absent_folder_has_no_checkpoint(tmp_path: Path) -> None:
    assert load_latest(tmp_path / "absent") == (None, [])
    assert load_latest(tmp_path) == (None, [])
    assert sweep(tmp_path / "absent") == []


def test_every_dtype_and_layout(tmp_path: Path) -> None:
    wide = torch.arange(24.0).view(4, 6)
    group = {
        "bfloat16": torch.randn(3).bfloat16(),
        "transposed": wide.T,
        "sliced": wide[:, 1:3],
        "empty": torch.empty(0, 4),
        "scalar": torch.tensor(float("nan")),
        "bytes": torch.get_rng_state(),
    }
    save_checkpoint(tmp_path, 1, {"all": group}, {})
    loaded, _ = load_latest(tmp_path)
    assert loaded is not None
    for name, tensor in group.items():
        assert torch.equal(loaded.tensors["all"][name].nan_to_num(7), tensor.nan_to_num(7))


def test_only_the_newest_are_kept(tmp_path: Path) -> None:
    for step in (3, 6, 9, 120_000_000):
        save(tmp_path, step, keep=2)
    assert [step for step, _ in list_checkpoints(tmp_path)] == [9, 120_000_000]
    save(tmp_path, 120_000_001, keep=1)
    assert [step for step, _ in list_checkpoints(tmp_path)] == [120_000_001]
    assert [p.name for p in tmp_path.iterdir()] == ["step-120000001"]
    with pytest.raises(ValueError, match="keep: expected at least 1 checkpoint, got 0"):
        save(tmp_path, 5, keep=0)


def test_of_a_set_behind_a_link_the_link_goes(tmp_path: Path) -> None:
    folder, disk = tmp_path / "checkpoints", tmp_path / "disk"
    save(folder, 1)
    disk.mkdir()
    (folder / "step-00000001").rename(disk / "old")
    (folder / "step-00000001").symlink_to(disk / "old")
    (folder / ".tmp-2-0f").symlink_to(disk)
    sweep(folder)
    save(folder, 2)
    save(folder, 3)
    assert [step for step, _ in list_checkpoints(folder)] == [2, 3]
    assert (disk / "old" / "manifest.json").is_file()


def test_nothing_is_removed_until_the_new_set_verifies(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(tmp_path, 1, keep=1)

    def damaged(path: Path) -> dict:
        raise CheckpointDamagedError("planted")

    monkeypatch.setattr(module, "verify_checkpoint", damaged)
    with pytest.raises(RunError, match="does not read back as it was written: planted"):
        save(tmp_path, 2, keep=1)
    assert [step for step, _ in list_checkpoints(tmp_path)] == [1, 2]


def test_no_file_is_a_pickle(tmp_path: Path) -> None:
    for path in save(tmp_path, 4).iterdir():
        assert path.suffix in (".json", ".safetensors")
        assert path.read_bytes()[:2] not in (b"PK", b"\x80\x02", b"\x80\x04")


# --- damage ---------------------------------------------------------------------------------------


def flip(path: Path, position: int, bit: int) -> None:
    data = bytearray(path.read_bytes())
    data[position] ^= 1 << bit
    path.write_bytes(data)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def edit_manifest(path: Path, change: Callable[[dict], None]) -> None:
    """Change the manifest and recompute its checksum."""
    manifest = json.loads((path / "manifest.json").read_text())
    change(manifest)
    manifest["sha256"] = module.manifest_digest(manifest)
    (path / "manifest.json").write_text(json.dumps(manifest))


def put_a_folder(path: Path) -> None:
    (path / "state.json").unlink()
    (path / "state.json").mkdir()


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "truncated": (
        lambda p: truncate(p / "weights.safetensors"),
        "weights.safetensors has .* bytes",
    ),
    "emptied": (lambda p: (p / "state.json").write_bytes(b""), "state.json has 0 bytes"),
    "flipped": (
        lambda p: flip(p / "counters.safetensors", -3, 5),
        "SHA-256 of counters.safetensors",
    ),
    "missing": (lambda p: (p / "weights.safetensors").unlink(), "weights.safetensors is missing"),
    "no manifest": (lambda p: (p / "manifest.json").unlink(), "manifest.json is missing"),
    "half a manifest": (
        lambda p: (p / "manifest.json").write_text('{"step": '),
        "manifest.json cannot be read",
    ),
    "edited manifest": (
        lambda p: (p / "manifest.json").write_text('{"step": 9}'),
        "its SHA-256 differs",
    ),
    "manifest is a list": (
        lambda p: (p / "manifest.json").write_text("[]"),
        "expected object, got array",
    ),
    "swapped files": (
        lambda p: shutil.copy(p.parent / "step-00000001" / "weights.safetensors", p),
        "SHA-256 of weights.safetensors",
    ),
    "swapped sets": (
        lambda p: shutil.copytree(p.parent / "step-00000001", p, dirs_exist_ok=True),
        "records step 1, but its folder is step-00000002",
    ),
    "other schema": (lambda p: edit_manifest(p, lambda m: m.update(schema_version=1)), "version 1"),
    "path outside": (
        lambda p: edit_manifest(
            p, lambda m: m["files"].update({"../x": {"bytes": 0, "sha256": "0" * 64}})
        ),
        "expected the name of a file in its folder, got '../x'",
    ),
    "a folder in a file's place": (
        put_a_folder,
        "state.json cannot be read",
    ),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_set_is_passed_over_with_the_reason(tmp_path: Path, damage: str) -> None:
    save(tmp_path, 1)
    newest = save(tmp_path, 2)
    spoil, reason = DAMAGE[damage]
    spoil(newest)
    with pytest.raises(CheckpointDamagedError, match=reason):
        verify_checkpoint(newest)
    assert_is_step(tmp_path, 1)
    _, passed = load_latest(tmp_path)
    assert [each.path for each in passed] == [newest]


def test_every_flipped_bit_is_found(tmp_path: Path) -> None:
    """Flip bits all over every file; safetensors reads most of these files without an error."""
    path = save(tmp_path, 1)
    generator = torch.Generator().manual_seed(0)
    for file in sorted(path.iterdir()):
        whole = file.read_bytes()
        count = len(whole) if PROOF else 25
        for position in torch.randperm(len(whole), generator=generator)[:count].tolist():
            flip(file, position, position % 8)
            with pytest.raises(CheckpointDamagedError):
                verify_checkpoint(path)
            file.write_bytes(whole)
    verify_checkpoint(path)


def test_all_damaged(tmp_path: Path) -> None:
    for step in (1, 2):
        truncate(save(tmp_path, step) / "state.json")
    loaded, passed = load_latest(tmp_path)
    assert loaded is None
    assert [each.path.name for each in passed] == ["step-00000002", "step-00000001"]


def test_a_damaged_set_is_replaced_and_a_whole_one_is_not(tmp_path: Path) -> None:
    save(tmp_path, 1)
    truncate(save(tmp_path, 2) / "state.json")
    save(tmp_path, 2)
    assert_is_step(tmp_path, 2)
    with pytest.raises(RunError, match="a verified checkpoint of this step exists"):
        save(tmp_path, 2)
    assert_is_step(tmp_path, 2)
    assert sweep(tmp_path) == []


def test_sweep_removes_unfinished_saves_alone(tmp_path: Path) -> None:
    save(tmp_path, 1)
    stale = tmp_path / ".tmp-2-abc"
    stale.mkdir()
    (stale / "weights.safetensors").write_bytes(b"half")
    (tmp_path / "notes.txt").write_text("mine")
    assert load_latest(tmp_path)[1] == []
    assert sweep(tmp_path) == [stale]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["notes.txt", "step-00000001"]


# --- faults while saving --------------------------------------------------------------------------

CALLS = {
    "mkdir": (Path, "mkdir"),  # Python 3.10 binds os.mkdir when pathlib is imported
    "fsync": (os, "fsync"),
    "rename": (os, "rename"),
    "open": (os, "open"),
    "write": (Path, "write_text"),
    "read": (module, "file_digest"),
    "save_tensors": (module, "save_tensors"),
}


def fail_nth(
    monkeypatch: pytest.MonkeyPatch, where: object, name: str, nth: int, error: Exception
) -> list[object]:
    """Let the ``nth`` call raise; return a list that then holds the call's arguments."""
    real, count = getattr(where, name), iter(range(1, 1000))
    fired: list[object] = []

    def call(*args: object, **kwargs: object) -> object:
        if next(count) == nth:
            fired.append(args)
            raise error
        return real(*args, **kwargs)

    monkeypatch.setattr(where, name, call)
    return fired


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EACCES, errno.EROFS, errno.EIO])
@pytest.mark.parametrize("call", CALLS)
def test_a_failing_system_call_leaves_the_last_set_intact(
    tmp_path: Path, call: str, code: int
) -> None:
    """Fail the first, second, ... call of a save, until a save has fewer calls."""
    save(tmp_path, 1, keep=1)
    where, name = CALLS[call]
    failed = 0
    for nth in range(1, 100):
        step = nth + 1
        error: Exception = OSError(code, os.strerror(code))
        if call == "save_tensors":
            error = SafetensorError(f"I/O error: {os.strerror(code)} (os error {code})")
        before = list_checkpoints(tmp_path)
        with pytest.MonkeyPatch.context() as patch:
            fired = fail_nth(patch, where, name, nth, error)
            try:
                save(tmp_path, step, keep=1)
            except RunError as error_of_save:
                failed += 1
                message = str(error_of_save)
            else:
                if not fired:
                    break
                continue  # a failure to create an existing folder is harmless
        assert os.strerror(code) in message
        loaded, _ = load_latest(tmp_path)
        assert loaded is not None
        if loaded.step == step:  # the call after the rename failed
            assert "was saved" in message or "could not be written" in message or "read" in message
        else:
            assert list_checkpoints(tmp_path) == before
            assert f"Newest checkpoint: step {loaded.step}." in message
            assert ("MiB are free" in message) == (code == errno.ENOSPC)
        assert "--resume" in message
        sweep(tmp_path)
    assert failed >= 1
    assert_is_step(tmp_path, step)


@pytest.mark.parametrize("limit", [0, 64, 300])
def test_a_write_that_the_kernel_cuts_short(tmp_path: Path, limit: int) -> None:
    """Limit the size of files to ``limit`` bytes, so that writes of safetensors and JSON fail."""
    save(tmp_path, 1)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        with pytest.raises(RunError, match=r"step 2 could not be .*Newest checkpoint: step 1\."):
            save(tmp_path, 2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert [p.name for p in tmp_path.iterdir()] == ["step-00000001"]
    assert_is_step(tmp_path, 1)


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match=r"could not be written.*Newest checkpoint: none"):
        save(tmp_path / "file" / "checkpoints", 1)


def test_kills_while_saving(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Kill saves at random moments: each can resume, none mixes steps, none is lost."""
    kills = 100 if PROOF else 5
    program = Path(__file__).with_name("crash_saves.py")
    arguments = [sys.executable, str(program), str(tmp_path / "checkpoints"), str(kills), "0"]
    done = subprocess.run(arguments, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr
    counts = json.loads(done.stdout)
    assert counts["kills"] >= counts["mid_save"] == kills
    assert {k: counts[k] for k in ("lost", "mixed", "unresumable", "damaged")} == {
        "lost": 0,
        "mixed": 0,
        "unresumable": 0,
        "damaged": 0,
    }
    assert counts["kept"] == 2
    with capsys.disabled():
        print(f" {counts} ", end="")
