"""Names in files may only refer to files of the same folder, for reading and for writing."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from stores import StoreText, make_store

from fastadapt.data.prepare import output_folder
from fastadapt.errors import RunError, UserError
from fastadapt.evaluation.benchmarks.runner import read_rows
from fastadapt.evaluation.runs import run_names
from fastadapt.features.autointerp.judges.reply_cache import ReplyCache
from fastadapt.features.store.sets import FeatureSet, load_set, save_set
from fastadapt.features.store.store import Store
from fastadapt.interop import hu2026_format
from fastadapt.io import documents
from fastadapt.io.atomic import digest, replacing, staged_beside, sweep
from fastadapt.io.parquet import read_table
from fastadapt.io.tensors import read_tensors
from fastadapt.models.huggingface.checkpoint import companions_of, write_checkpoint
from fastadapt.models.pretrained import tensor_files
from fastadapt.training import checkpoint
from fastadapt.training.logs.run_log import read_run

ODD = ["../secret", "/etc/passwd", "..\\secret", "a\0b", "x" * 300, "\ud800", "..", "", "link"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Return a folder beside a secret file, with a link to this file."""
    inner = tmp_path / "folder"
    inner.mkdir()
    (tmp_path / "secret").write_text("precious")
    (inner / "link").symlink_to("../secret")
    return inner


@pytest.fixture
def untouched(folder: Path) -> Callable[[], bool]:
    """``untouched()``: return whether all files are as at the first call."""

    def all_of() -> dict[str, Any]:
        paths = sorted(folder.parent.rglob("*"))
        return {str(p): p.read_bytes() if p.is_file() else p.is_symlink() for p in paths}

    before: dict[str, Any] = {}

    def check() -> bool:
        if not before:
            before.update(all_of())
        return all_of() == before

    return check


def make(folder: Path) -> Store:
    rng = np.random.default_rng(1)
    texts = [StoreText(list(rng.integers(0, 30, 8)), [5] * 8)]
    activations = [np.maximum(rng.normal(size=(2, 8, 6)), 0).astype(np.float32)]
    return make_store(folder, texts, activations, [f"w{i}" for i in range(30)]).store


def shards(folder: Path, name: str) -> None:
    index = {"weight_map": {"a": name}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def checkpoints(folder: Path, name: str) -> None:
    path = checkpoint.save_checkpoint(folder, 1, {"weights": {"a": torch.zeros(2)}}, {"step": 1})
    manifest = json.loads((path / "manifest.json").read_text())
    manifest["files"][name] = {"bytes": 8, "sha256": hashlib.sha256(b"precious").hexdigest()}
    manifest["sha256"] = checkpoint.manifest_digest(manifest)
    (path / "manifest.json").write_text(json.dumps(manifest))
    (path / "link").symlink_to("../../secret")


def stores(folder: Path, name: str) -> None:
    manifest = make(folder / "store").folder / "manifest.json"
    values = json.loads(manifest.read_text())
    values["files"][name] = next(iter(values["files"].values()))
    manifest.write_text(json.dumps(values))
    (folder / "store" / "link").symlink_to("../../secret")


def data(folder: Path, name: str) -> None:
    """Write a complete selection whose manifest lists one more file, called ``name``."""
    files = {}
    for split_file in output_folder.FILES.values():
        (folder / split_file).write_bytes(b"precious")
        files[split_file] = {
            "rows": 0,
            "bytes": 8,
            "sha256": hashlib.sha256(b"precious").hexdigest(),
        }
    split = {"conversations": {}, "wanted": {}, "prompts": 0, "tokens": 0, "longest": 0}
    counts: dict[str, Any] = {
        "rows": 0,
        "domains": {},
        "left_out_of_source": {},
        "left_out_of_drawn": {},
        **{each: {**split, "lengths": [0]} for each in output_folder.FILES},
    }
    manifest = {
        "format": output_folder.FORMAT,
        "schema_version": output_folder.SCHEMA_VERSION,
        "settings": {"max_tokens": 8},
        "source": {},
        "counts": counts,
        "files": {**files, name: files[split_file]},
    }
    (folder / "manifest.json").write_text(json.dumps(manifest))


def read_checkpoint(folder: Path) -> None:
    loaded, passed = checkpoint.load_latest(folder)
    assert loaded is None
    raise UserError(passed[0].reason)


READERS: dict[str, tuple[Callable[[Path, str], None], Callable[[Path], object]]] = {
    "shards": (shards, lambda folder: tensor_files(str(folder), None)),
    "checkpoint": (checkpoints, read_checkpoint),
    "store": (stores, lambda folder: Store.open(folder / "store")),
    "data": (
        data,
        lambda folder: output_folder.verify(folder, output_folder.read_manifest(folder) or {}),
    ),
}


@pytest.mark.parametrize("name", ODD, ids=lambda name: ascii(name)[:14])
@pytest.mark.parametrize("reader", READERS)
def test_a_file_names_files_of_its_folder(
    reader: str, name: str, folder: Path, untouched: Callable[[], bool]
) -> None:
    if (reader, name) == ("shards", "link"):
        pytest.skip("shards may be links: the hub's cache consists of them")
    write, read = READERS[reader]
    write(folder, name)
    untouched()
    with pytest.raises(
        UserError,
        match=r"expected the name of a file|half of a surrogate pair|is a link that leads out",
    ):
        read(folder)
    assert untouched()


def test_shards_may_be_links(folder: Path) -> None:
    shards(folder, "link")
    save_file({"w": torch.ones(2)}, (folder / "link").resolve())
    assert tensor_files(str(folder), None) == {"link": folder / "link"}


@pytest.mark.parametrize("name", ["a/b", *ODD[:-1], "é" * 130], ids=lambda name: ascii(name)[:14])
def test_sets_and_runs_have_plain_names(
    name: str, folder: Path, untouched: Callable[[], bool]
) -> None:
    store = make(folder / "store")
    features = FeatureSet.from_pairs([(0, 1)], adapter="0" * 64, shape=(2, 6), expression="hand")
    untouched()
    with pytest.raises(UserError, match="name"):
        save_set(store, features, name)
    with pytest.raises(UserError, match="name"):
        load_set(store, name)
    with pytest.raises(UserError, match="name"):
        run_names([folder], [name])
    assert untouched()


def test_a_set_is_not_written_through_a_link(folder: Path, untouched: Callable[[], bool]) -> None:
    store = make(folder / "store")
    features = FeatureSet.from_pairs(
        [(0, 1)], adapter=store.manifest["adapter"], shape=(2, 6), expression="hand"
    )
    (store.folder / "sets").mkdir()
    (store.folder / "sets" / "a.json").symlink_to("../../../secret")
    untouched()
    with pytest.raises(UserError, match="is a link that leads out"):
        save_set(store, features, "a", overwrite=True)
    (store.folder / "sets" / "a.json").unlink()
    (store.folder / "sets").rmdir()
    (store.folder / "sets").symlink_to("../..")
    with pytest.raises(UserError, match="is a link that leads out"):
        save_set(store, features, "a")
    assert not (folder.parent / "a.json").exists()


def test_answers_are_not_kept_behind_a_link(folder: Path) -> None:
    calls = ReplyCache(folder)
    request = {"a": 1}
    name = calls._path(request).parent.name
    (folder / name).symlink_to("..")
    with pytest.raises((UserError, RunError), match="is a link that leads out"):
        calls.put(request, "answer")


def test_what_is_written_takes_the_place_of_a_link(folder: Path) -> None:
    """A file or folder of ours that somebody replaced by a link: what it leads to stays."""
    with replacing(folder / "link") as staged:
        staged.write_text("new")
    assert not (folder / "link").is_symlink()
    assert (folder / "link").read_text() == "new"
    assert (folder.parent / "secret").read_text() == "precious"
    (folder / "plots").symlink_to(folder.parent)
    with replacing(folder / "plots") as staged:
        staged.mkdir()
        (staged / "a.png").write_text("new")
    assert [path.name for path in (folder / "plots").iterdir()] == ["a.png"]
    assert not (folder / "plots").is_symlink()
    assert sorted(path.name for path in folder.iterdir()) == ["link", "plots"]
    assert (folder.parent / "secret").read_text() == "precious"


def test_a_file_replaces_no_folder(folder: Path) -> None:
    (folder / "plots").mkdir()
    (folder / "plots" / "thesis.tex").write_text("years")
    with pytest.raises(IsADirectoryError), replacing(folder / "plots") as staged:
        staged.write_text("new")
    assert (folder / "plots" / "thesis.tex").read_text() == "years"
    assert sorted(path.name for path in folder.iterdir()) == ["link", "plots"]


def test_a_sweep_removes_a_link_and_not_what_it_leads_to(folder: Path) -> None:
    """A kill between the two renames of a folder that takes the place of a link leaves the link."""
    left = staged_beside(folder / "plots")
    left.symlink_to(folder.parent)
    assert sweep(folder / "plots") == [left]
    assert not left.is_symlink()
    assert (folder.parent / "secret").read_text() == "precious"


# --- files of a model or a run that are copied or read whole --------------------------------------


def companion(model: Path, out: Path) -> None:
    write_checkpoint(
        out, {"w": lambda: torch.ones(1)}, "{}", companions=companions_of(str(model), "")
    )


def test_a_companion_is_a_file_of_its_model(folder: Path, untouched: Callable[[], bool]) -> None:
    (folder / "real.json").write_text("{}")
    (folder / "vocab.json").symlink_to("real.json")
    companion(folder, folder.parent / "out")
    assert (folder.parent / "out" / "vocab.json").read_text() == "{}"
    for leads in ("../secret", "link", str(folder.parent / "secret")):
        (folder / "chat_template.jinja").unlink(missing_ok=True)
        (folder / "chat_template.jinja").symlink_to(leads)
        with pytest.raises(UserError, match=r"chat_template\.jinja is a link that leads out of"):
            companion(folder, folder.parent / "other")
        assert not (folder.parent / "other").exists()


def hub(cache: Path, blob: str) -> Path:
    """A snapshot as the hub's cache has it: links into the repository's blobs."""
    snapshot = cache / "models--a--b" / "snapshots" / "0123"
    snapshot.mkdir(parents=True)
    (cache / "models--a--b" / "blobs").mkdir()
    (cache / "models--a--b" / "blobs" / "cafe").write_text("{}")
    (snapshot / "tokenizer.json").symlink_to(blob)
    return snapshot


def test_a_companion_may_be_a_blob_of_the_hubs_cache(tmp_path: Path) -> None:
    snapshot = hub(tmp_path, "../../blobs/cafe")
    companion(snapshot, tmp_path / "out")
    assert (tmp_path / "out" / "tokenizer.json").read_text() == "{}"
    (tmp_path / "linked").symlink_to(snapshot)
    companion(tmp_path / "linked", tmp_path / "again")


@pytest.mark.parametrize(
    "blob", ["../../../secret", "../../secret", "../../../models--c--d/blobs/x"]
)
def test_a_companion_is_no_blob_of_another_model(tmp_path: Path, blob: str) -> None:
    snapshot = hub(tmp_path, blob)
    secret = Path(os.path.normpath(snapshot / blob))
    secret.parent.mkdir(parents=True, exist_ok=True)
    secret.write_text("precious")
    with pytest.raises(UserError, match="is a link that leads out of"):
        companion(snapshot, tmp_path / "out")
    blobs = tmp_path / "models--a--b" / "blobs"
    shutil.rmtree(blobs)
    blobs.symlink_to(secret.parent)
    (snapshot / "tokenizer.json").unlink()
    (snapshot / "tokenizer.json").symlink_to(f"../../blobs/{secret.name}")
    with pytest.raises(UserError, match="is a link that leads out of"):
        companion(snapshot, tmp_path / "out")


def test_a_companion_is_bounded(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "merges.txt").write_text("12345678901")
    monkeypatch.setattr("fastadapt.io.documents.MAX_BYTES", 10)
    with pytest.raises(UserError, match=r"merges\.txt has more than 10 bytes"):
        companion(folder, folder.parent / "out")


def test_configurations_that_are_copied_are_files_of_their_model(folder: Path) -> None:
    (folder / "config.json").symlink_to("../secret")
    with pytest.raises(UserError, match=r"config\.json is a link that leads out of"):
        hu2026_format._text(str(folder), "config.json")


def test_a_report_shows_no_file_outside_its_run(folder: Path) -> None:
    (folder / "config.yaml").symlink_to("../secret")
    with pytest.raises(UserError, match=r"config\.yaml is a link that leads out of"):
        read_run(folder)


READ_WHOLE: dict[str, Callable[[Path], object]] = {
    "document": documents.read_json,
    "bytes": documents.read_bytes,
    "digest": digest,
    "tensors": read_tensors,
    "table": read_table,
    "rows": read_rows,
}


@pytest.mark.parametrize("reader", READ_WHOLE)
@pytest.mark.parametrize("kind", ["pipe", "/dev/zero"])
def test_pipes_and_devices_are_not_read(reader: str, kind: str, tmp_path: Path) -> None:
    path = tmp_path / "odd"
    os.mkfifo(path) if kind == "pipe" else path.symlink_to(kind)
    with pytest.raises((UserError, OSError), match=r"odd.*Not a regular file|regular.*odd"):
        READ_WHOLE[reader](path)
