"""Bad input gives one clear message, and leaves no partial files."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from threading import Event
from typing import Any

import pytest
import torch
from organism_runs import make_run
from safetensors.torch import load_file, save_file

from fastadapt.adapter.files import save_adapters
from fastadapt.errors import RunError, UserError
from fastadapt.features.collect import CollectConfig, Shard, collect, merge, snapshots
from fastadapt.features.collect import collector as gathering
from fastadapt.features.store.store import Store
from fastadapt.models.baselines import LoraConfig, tuned_weights
from fastadapt.models.replacement import ModelPair, PairConfig
from fastadapt.organism import resolve

FEW = CollectConfig(n=3)


def copy_of(run: Path, folder: Path) -> Path:
    return Path(shutil.copytree(run, folder, ignore=shutil.ignore_patterns("features*")))


def rows(path: Path, *values: dict[str, Any]) -> str:
    path.write_text("".join(json.dumps(value) + "\n" for value in values))
    return str(path)


def conversation(answer: str = "<think> hmm </think> 4", **columns: Any) -> dict[str, Any]:
    turns = [{"from": "human", "value": "2 + 2 ?"}, {"from": "gpt", "value": answer}]
    return {"conversations": turns, **columns}


def nothing_left(folder: Path) -> bool:
    return not folder.exists() or {path.name for path in folder.iterdir()} <= {".lock"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"top": 0}, r"top: expected 1 or more, got 0"),
        ({"uniform": -1}, r"uniform: expected 0 or more, got -1"),
        ({"n": 0}, r"n: expected 1"),
        ({"max_tokens": 1}, r"max_tokens: expected 2"),
        ({"neurons_per_token": 0}, r"neurons_per_token: expected 1"),
        ({"seed": 2**63}, r"seed: expected less than"),
        ({"split": "train"}, r"split: 'train' is given without data"),
        ({"kinds": ()}, r"kinds: .* got none"),
        ({"kinds": ("adapter", "hybrid")}, r"kinds: expected one or more of adapter, base"),
        ({"kinds": ("base", "base")}, r"kinds: .* each once"),
    ],
)
def test_settings(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        CollectConfig(**changes)


@pytest.mark.parametrize("text", ["3/3", "4/3", "0/0"])
def test_a_shard_out_of_range(text: str) -> None:
    with pytest.raises(UserError, match=r"--shard: expected i/n with i from 0 to n - 1"):
        Shard.parse(text)


@pytest.mark.parametrize("text", ["", "1", "1/", "-1/3", "a/b", "1/3/5"])
def test_an_invalid_shard(text: str) -> None:
    with pytest.raises(UserError, match=r"--shard: expected i/n, such as 0/3"):
        Shard.parse(text)
    assert Shard.parse("2/3") == (2, 3)


def test_a_run_without_features(tmp_path: Path) -> None:
    named: dict[str, Any] = {role: resolve(f"organism/{role}") for role in ("target", "base")}
    pair = ModelPair.load(PairConfig(**named, device="cpu"))
    for kind, trained in (("norms", "norms"), ("lora", LoraConfig(2, 0))):
        save_adapters(tuned_weights(pair, trained), tmp_path / kind / "adapter", named)  # type: ignore[arg-type]
        with pytest.raises(UserError, match=f"of kind '{kind}', which has no features"):
            collect(tmp_path / kind, None, CollectConfig(data="organism/validation"))


def test_folders_that_are_no_run(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="expected a run"):
        collect(tmp_path)
    (tmp_path / "config.yaml").write_text("pair: {}")
    with pytest.raises(UserError, match="this run is not finished"):
        collect(tmp_path)


def test_adapters_alone_need_data(run: Path, tmp_path: Path) -> None:
    adapters = Path(shutil.copytree(run / "adapter", tmp_path / "alone"))
    with pytest.raises(UserError, match="no validation data or no chat format recorded in"):
        collect(adapters)
    data = rows(tmp_path / "own.jsonl", conversation(), conversation("4"))
    store = collect(adapters, tmp_path / "store", CollectConfig(data=data))
    assert store is not None
    assert store.manifest["domains"] == []  # the data have no such column
    assert set(store.read("texts")["domain"].to_pylist()) == {None}
    features = store.read("features")
    assert features["by_domain"].to_pylist() == [[]] * len(features)
    assert sum(features["count"].to_pylist()) > 0


def test_domains_that_some_texts_lack(run: Path, tmp_path: Path) -> None:
    data = rows(
        tmp_path / "own.jsonl",
        conversation(domain="math"),
        conversation(domain=None),
        conversation(domain="art"),
    )
    store = collect(run, tmp_path / "store", CollectConfig(data=data))
    assert store is not None
    assert store.manifest["domains"] == ["art", "math"]
    rows_ = store.read("features").to_pylist()
    assert sum(sum(row["by_domain"]) for row in rows_) < sum(row["count"] for row in rows_)


def test_splits_of_a_folder(run: Path, tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    for name, n in (("train", 2), ("test", 3)):
        rows(tmp_path / "data" / f"{name}-0.jsonl", *[conversation()] * n)
    config = CollectConfig(data=str(tmp_path / "data"))
    with pytest.raises(UserError, match=r"no file of split 'validation' among test-0"):
        collect(run, tmp_path / "store", config)
    assert nothing_left(tmp_path / "store")
    for split, n in (("train", 2), ("test", 3)):
        store = collect(run, tmp_path / split, replace(config, split=split))
        assert store is not None
        assert store.manifest["data"]["texts"] == n
        assert store.manifest["collected"]["data"]["split"] == split
    with pytest.raises(UserError, match="fingerprint: "):  # of other texts
        collect(run, tmp_path / "test", replace(config, split="train"))


@pytest.mark.parametrize("shard", [Shard(), Shard(0, 2), Shard(1, 2)])
def test_more_domains_than_can_be_counted(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shard: Shard
) -> None:
    def data(n: int) -> str:
        return rows(tmp_path / "own.jsonl", *(conversation(domain=f"d{i % n}") for i in range(90)))

    monkeypatch.setattr(gathering, "take", pytest.fail)  # no forward pass
    expected = r"at most 64 different values in the column 'domain', got 65 in 90 conversations"
    with pytest.raises(UserError, match=expected):
        collect(run, tmp_path / "store", CollectConfig(data=data(65)), shard=shard)
    assert nothing_left(tmp_path / "store")
    monkeypatch.undo()
    stop = Event()
    stop.set()  # the largest allowed number is accepted
    collect(run, tmp_path / "store", CollectConfig(data=data(64)), shard=shard, stop=stop)
    assert (tmp_path / "store" / "collecting" / "state.safetensors").is_file()


@pytest.mark.parametrize(
    ("values", "config", "message"),
    [
        ([], {}, "holds no conversation"),
        ([{"title": "a"}], {}, "no column 'conversations'"),
        ([conversation(""), conversation()], {}, "own.jsonl, line 1: conversations, turn 2"),
        ([conversation()], {"max_tokens": 4}, "all 1 conversations are longer than 4 tokens"),
    ],
)
def test_texts_that_cannot_be_read(
    run: Path, tmp_path: Path, values: list[dict[str, Any]], config: dict[str, Any], message: str
) -> None:
    data = rows(tmp_path / "own.jsonl", *values)
    with pytest.raises(UserError, match=message):
        collect(run, tmp_path / "store", CollectConfig(data=data, **config))
    assert nothing_left(tmp_path / "store")


def broken(run: Path, folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> Path:
    """Return a copy of the run with a changed first layer."""
    folder = copy_of(run, folder)
    path = folder / "adapter" / "layer_0.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)
    return folder


def test_nothing_fires(tmp_path: Path, run: Path) -> None:
    silent = copy_of(run, tmp_path / "silent")
    for path in (silent / "adapter").glob("*.safetensors"):
        tensors = load_file(path)
        tensors["b_enc"].fill_(-1000)
        save_file(tensors, path)
    with pytest.raises(RunError, match=r"nothing fires: none of the 4 x 24 features or neurons"):
        collect(silent, tmp_path / "store", FEW)
    assert nothing_left(tmp_path / "store")


def test_an_activation_that_is_not_finite(tmp_path: Path, run: Path) -> None:
    # The weights are finite, as adapters require, but their sum is not.
    bad = broken(run, tmp_path / "bad", lambda tensors: tensors["W_enc"][3:4].fill_(3e38))
    with pytest.raises(RunError, match=r"texts 0 to 2: layer 0: an activation of the adapter"):
        collect(bad, tmp_path / "store", FEW)
    assert not (tmp_path / "store" / "manifest.json").exists()


def test_a_folder_with_other_contents(tmp_path: Path, run: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("words")
    with pytest.raises(UserError, match="is not empty and is not a store of features"):
        collect(run, tmp_path / "mine", FEW, overwrite=True)
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "words"
    with pytest.raises(UserError, match="is a file"):
        collect(run, tmp_path / "mine" / "thesis.txt", FEW)


def test_features_of_another_adapter_or_other_settings(tmp_path: Path, run: Path) -> None:
    folder = tmp_path / "store"
    collect(run, folder, FEW)
    before = (folder / "manifest.json").read_bytes()
    other = broken(run, tmp_path / "other", lambda tensors: tensors["b_enc"].add_(0.01))
    with pytest.raises(UserError, match=r"holds a collection with other settings \(.*adapter"):
        collect(other, folder, FEW)
    with pytest.raises(UserError, match=r"top: 7, was 20.*--overwrite"):
        collect(run, folder, CollectConfig(n=3, top=7))
    assert (folder / "manifest.json").read_bytes() == before
    (folder / "sets").mkdir()
    (folder / "sets" / "mine.json").write_text("{}")
    store = collect(run, folder, CollectConfig(n=3, top=7), overwrite=True)
    assert store is not None
    assert store.manifest["settings"]["top"] == 7
    assert (folder / "sets" / "mine.json").exists()
    with pytest.raises(UserError, match="were collected from other adapters"):
        Store.open(folder, adapter="0" * 64)


def test_incomplete_or_different_shards(tmp_path: Path, run: Path) -> None:
    folders = [tmp_path / str(i) for i in range(2)]
    for i, folder in enumerate(folders):
        collect(run, folder, FEW, shard=Shard(i, 2))
    out = tmp_path / "merged"
    with pytest.raises(UserError, match="got none"):
        merge([], out)
    with pytest.raises(UserError, match=r"expected all 2 shards to merge; 1/2 missing"):
        merge(folders[:1], out)
    with pytest.raises(UserError, match=r"a different shard of 2 in each folder, got 0/2 again"):
        merge([folders[0], folders[0]], out)
    with pytest.raises(UserError, match="holds no shard"):
        merge([tmp_path], out)
    other = tmp_path / "other"
    collect(run, other, CollectConfig(n=3, seed=1), shard=Shard(1, 2))
    with pytest.raises(UserError, match=r"not shards of one collection: seed: 1, was 0"):
        merge([folders[0], other], out)
    table = folders[0] / "tokens.parquet"
    table.rename(tmp_path / "secret.parquet")
    table.symlink_to("../secret.parquet")
    with pytest.raises(UserError, match=r"tokens\.parquet is a link that leads out of"):
        merge(folders, out)
    (folders[0] / "collecting" / "state.safetensors").unlink()
    with pytest.raises(UserError, match=r"shard 0/2 is not finished"):
        merge(folders, out)
    assert nothing_left(out)


def test_a_full_disk(tmp_path: Path, run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = CollectConfig(n=70, batch_tokens=1500, snapshot_tokens=1500)

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(snapshots, "save_tensors", full)
        with pytest.raises(
            RunError, match=r"No space left on device.*without --overwrite to resume"
        ):
            collect(run, tmp_path / "store", config)
    assert not (tmp_path / "store" / "manifest.json").exists()
    assert collect(run, tmp_path / "store", config) is not None


def test_two_processes_on_one_folder(tmp_path: Path, run: Path) -> None:
    from fastadapt.features.store.store import writing

    with writing(tmp_path / "store"), pytest.raises(UserError, match="another process is writing"):
        collect(run, tmp_path / "store", FEW)


def test_neurons_of_a_run_without_a_recorded_l0(tmp_path: Path, run: Path) -> None:
    silent = copy_of(run, tmp_path / "run")
    card = json.loads((silent / "adapter" / "fastadapt.json").read_text())
    del card["metadata"]["measured"]
    (silent / "adapter" / "fastadapt.json").write_text(json.dumps(card))
    with pytest.raises(UserError, match="--neurons_per_token"):
        collect(silent, tmp_path / "store", CollectConfig(n=3, kinds=("adapter", "base")))


def test_synthetic_runs_have_the_requested_l0(tmp_path: Path) -> None:
    run = make_run(tmp_path / "made", n_features=40, l0=5.0)
    store = collect(run, None, CollectConfig(n=20))
    assert store is not None
    counts = store.read("features")["count"].to_pylist()
    assert 4.5 < sum(counts) / 4 / store.manifest["data"]["tokens"] < 5.5
