"""Damaged or forged checkpoints are skipped with a reason."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from damage import sweep, variants
from safetensors.torch import load_file, save_file

from fastadapt.errors import RunError, UserError
from fastadapt.io.atomic import digest
from fastadapt.training import checkpoint as module
from fastadapt.training.checkpoint import MANIFEST, SCALARS, load_latest, save_checkpoint
from fastadapt.training.trainer import train


def sign(folder: Path, **changes: Any) -> None:
    """Rewrite the manifest with valid hashes and ``changes``; None removes a key."""
    manifest = json.loads((folder / MANIFEST).read_text())
    for name in manifest["files"]:
        size, sha256 = digest(folder / name)
        manifest["files"][name] = {"bytes": size, "sha256": sha256}
    manifest |= changes
    manifest = {key: value for key, value in manifest.items() if value is not None}
    manifest["sha256"] = module.manifest_digest(manifest)
    (folder / MANIFEST).write_text(json.dumps(manifest))


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    groups = {"weights": {"0.W": torch.ones(3, 2)}, "rng": {"cpu": torch.zeros(8).byte()}}
    return save_checkpoint(tmp_path, 3, groups, {"step": 3})


@pytest.mark.parametrize("name", [MANIFEST, SCALARS, "weights.safetensors"])
def test_a_damaged_file_is_never_used(saved: Path, name: str) -> None:
    def load() -> None:
        checkpoint, skipped = load_latest(saved.parent)
        if checkpoint is None:
            raise RunError("; ".join(each.reason for each in skipped))

    sweep(saved / name, variants(saved / name), load, lambda *_: False)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"files": {}}, "files: expected state.json and tensors"),
        ({"files": None}, "missing required field files"),
        ({"files": []}, "files: expected object, got array"),
        ({"files": {"state.json": 3}}, "files"),
        ({"step": None}, "missing required field step"),
        ({"step": "3"}, "step: expected int, got str"),
        ({"step": -1}, "step: expected int >= 0"),
        ({"step": 10**30}, "step"),
        ({"step": True}, "step: expected int, got bool"),
        ({"schema_version": []}, "schema version"),
    ],
)
def test_a_signed_manifest_of_another_shape_does_not_verify(
    saved: Path, changes: dict[str, Any], reason: str
) -> None:
    sign(saved, **changes)
    checkpoint, (skipped,) = load_latest(saved.parent)
    assert checkpoint is None
    assert reason in skipped.reason


def test_tensors_that_the_manifest_does_not_list_are_not_read(saved: Path) -> None:
    save_file({"weights.1.W": torch.zeros(1)}, saved / "more.safetensors")
    checkpoint, (skipped,) = load_latest(saved.parent)
    assert checkpoint is None
    assert "more.safetensors is not one of the files" in skipped.reason


@pytest.fixture
def stopped(tiny_config: Callable) -> Any:
    """Return the configuration of a run that was stopped after 3 of 6 steps."""
    import threading

    config = tiny_config(**{"optimizer.max_steps": 6})
    stop = threading.Event()
    sink = lambda record: stop.set() if record["step"] == 3 else None  # noqa: E731
    train(config, sinks=[sink], stop=stop)
    return config


@pytest.mark.slow
def test_a_signed_set_of_another_content_is_refused_at_resume(stopped: Any) -> None:
    folder = sorted(Path(stopped.run.output, "checkpoints").glob("step-*"))[-1]
    state = json.loads((folder / SCALARS).read_text())
    rng, counters = (load_file(folder / f"{name}.safetensors") for name in ("rng", "counters"))
    wrong: list[str] = []

    def attempt(what: str) -> None:
        sign(folder)
        try:
            train(stopped, resume=True)
        except (UserError, RunError) as error:
            if folder.name not in str(error):
                wrong.append(f"{what}: {error}")
        else:
            pytest.fail(f"{what}: accepted")  # the run has newer checkpoints now

    for key in ("updates", "step", "tokens", "bad_in_row", "threads", "wall_s", "codes_per_token"):
        value: Any
        for value in ("x", -1, {}, [None], 10**30):
            (folder / SCALARS).write_text(json.dumps({**state, key: value}))
            attempt(f"{key} {value!r}")
    for key, odd_value in (
        ("step", 2),
        ("codes_per_token", [1.0] * 9),
        ("codes_per_token", [1e308]),
    ):
        (folder / SCALARS).write_text(json.dumps({**state, key: odd_value}))
        attempt(f"{key} {odd_value!r}")
    (folder / SCALARS).write_text(json.dumps(state))
    for odd in (rng["rng.cpu"][:8].clone(), rng["rng.cpu"].float(), torch.zeros(0).byte()):
        save_file({"rng.cpu": odd}, folder / "rng.safetensors")
        attempt(f"rng {list(odd.shape)}")
    save_file({"rng.cpu": torch.full_like(rng["rng.cpu"], 255)}, folder / "rng.safetensors")
    attempt("rng of ones")
    save_file(rng, folder / "rng.safetensors")
    save_file({"counters.since_fired": torch.zeros(1)}, folder / "counters.safetensors")
    attempt("counters")
    save_file(counters, folder / "counters.safetensors", {"DCP_SHARDING_INFO": "[[["})
    attempt("shares")
    assert not wrong, "\n".join(wrong)
