"""``load``: the model of a run, its features on a text, and its store."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import fastadapt
from fastadapt import ModelPair, PairConfig, UserError, load

#: A trained run of the embedded pair with 16 features per layer, and its store of features.
FINISHED = Path(__file__).parents[1] / "cli" / "old_files" / "finished"
TEXT = "tom has 3 apples"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("loading") / "run"
    shutil.copytree(FINISHED, folder)
    return folder


def test_a_run_is_a_model_a_store_and_a_configuration(run: Path, tmp_path: Path) -> None:
    loaded = load(run, device="cpu")
    assert loaded.pair is loaded.model.pair
    assert loaded.config is not None
    assert loaded.config.adapter.n_features == 16
    assert not loaded.model.training
    assert not any(p.requires_grad for p in loaded.model.parameters())
    assert loaded.store is not None
    assert loaded.store.read("features").num_rows == loaded.model.n_layers * 16
    bare = tmp_path / "bare"
    shutil.copytree(run / "adapter", bare)
    loaded = load(bare, device="cpu")
    assert loaded.store is None
    assert loaded.config is None


def test_features_are_the_encoders_active_entries(run: Path) -> None:
    """Compared with dense encodes of the MLP inputs in the model's own forward."""
    model = load(run, device="cpu").model
    ids = torch.tensor(model.pair.tokenizer(TEXT)["input_ids"])
    read: list[Tensor] = []
    hooks = [
        mlp.register_forward_pre_hook(lambda _, inputs: read.append(inputs[0]))
        for mlp in model.mlps
    ]
    with torch.no_grad():
        model(input_ids=ids[None])
    for hook in hooks:
        hook.remove()
    for given in (TEXT, ids.tolist(), ids, ids[None]):
        layers = model.features(given)
        assert len(layers) == model.n_layers
        adapter: Any
        for codes, adapter, x in zip(layers, model.adapters, read, strict=True):
            dense = (x[0] @ adapter.W_enc.T + adapter.b_enc).relu()
            values = torch.zeros_like(dense)
            values[codes.tokens, codes.features] = codes.values
            torch.testing.assert_close(values, dense, rtol=1e-5, atol=1e-5)
            assert len(codes.values) == (dense > 0).sum()


def test_ids_of_another_shape_are_refused(run: Path) -> None:
    model = load(run, device="cpu").model
    ids: Any
    for ids in (torch.zeros(1, 2, 3, dtype=torch.int64), [], torch.tensor(3)):
        with pytest.raises(UserError, match=r"text: expected one or more token ids \[T\] or \[B"):
            model.features(ids)


def test_a_folder_without_a_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=str(tmp_path)):
        load(tmp_path)


def test_names_of_the_embedded_pair_are_resolved() -> None:
    pair = ModelPair.load(PairConfig("organism/target", "organism/base", device="cpu"))
    assert pair.target.config.num_hidden_layers == 4
    with pytest.raises(UserError, match="organism/targte"):
        ModelPair.load(PairConfig("organism/targte", "organism/base", device="cpu"))


def test_every_public_name_is_importable() -> None:
    assert set(fastadapt.__all__) <= set(dir(fastadapt))
    for name in fastadapt.__all__:
        assert getattr(fastadapt, name) is not None
