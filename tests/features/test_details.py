"""Ranking by contribution, and what a store says about one unit, against loops over activations."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest
from stores import StoreData, StoreText, make_store

from fastadapt.errors import UserError
from fastadapt.features.store.details import read_details
from fastadapt.features.store.ranking import by_layer, strongest
from fastadapt.features.store.schema import EFFECTS
from fastadapt.features.store.selection import SelectConfig, select
from fastadapt.features.store.sets import find_set
from fastadapt.features.store.store import Store
from fastadapt.reporting.visible import token_text

L, F = 2, 6
STRINGS = [" wait", "\x1b[2J", "a\nb", "\u202eevil", *(f" w{i}" for i in range(26))]


@pytest.fixture
def data(tmp_path_factory: pytest.TempPathFactory) -> StoreData:
    """Feature 0/5 is rare and strong, 1/0 dense and weak, and 1/5 never fires."""
    rng = np.random.default_rng(0)
    texts, activations = [], []
    for n in range(4):
        tokens = [int(t) for t in rng.integers(0, len(STRINGS), 40)]
        values = rng.exponential(size=(L, 40, F)) * (rng.random((L, 40, F)) < 0.3)
        values[0, :, 5] = 0
        values[0, 7, 5] = 100.0 + n
        values[1, :, 0] = 0.01
        values[1, :, 5] = 0
        texts.append(StoreText(tokens, [5] * 30 + [7] * 10))
        activations.append(values.astype(np.float32))
    return make_store(tmp_path_factory.mktemp("run") / "features", texts, activations, STRINGS)


def test_a_contribution_is_the_mean_of_what_a_feature_writes(data: StoreData) -> None:
    """The norms of a synthetic store are 1, so it is the mean activation over all tokens."""
    dense = np.concatenate(data.activations, axis=1).astype(np.float64)
    means = {(layer, i): dense[layer, :, i].mean() for layer in range(L) for i in range(F)}
    ranked = strongest(data.store)
    expected = sorted((pair for pair in means if means[pair] > 0), key=lambda p: -means[p])
    assert [unit[:2] for unit in ranked] == expected
    assert (1, 5) not in expected
    for unit in ranked:
        assert unit.contribution == pytest.approx(means[unit[:2]], rel=1e-6)
        assert unit.share == pytest.approx(means[unit[:2]] / sum(means.values()), rel=1e-6)
    assert strongest(data.store, n=2) == ranked[:2]
    layers = [sum(means[layer, i] for i in range(F)) for layer in range(L)]
    assert by_layer(data.store) == pytest.approx([x / sum(layers) for x in layers], rel=1e-6)
    # The order is not that of densities: the densest feature is the weakest that fires.
    assert ranked[0][:2] == (0, 5)
    assert ranked[-1][:2] == (1, 0)


def test_details_are_the_rows_of_the_store(data: StoreData) -> None:
    effects = {"layer": [0], "feature": [5], "delta_kl": [0.25], "positions": [156]}
    data.store.add("effects", pa.table(effects).cast(EFFECTS))
    strong, silent = read_details(data.store, [(0, 5), (1, 5)], examples=3)
    assert (strong.count, strong.max, strong.rank, strong.delta_kl) == (4, 103.0, 1, 0.25)
    assert strong.region == "thinking"
    assert [(e.value, e.text, e.position) for e in strong.examples] == [
        (103.0, "text-3", 7),
        (102.0, "text-2", 7),
        (101.0, "text-1", 7),
    ]
    row = data.store.read("lens", layer=0, features=[5]).to_pylist()[0]
    assert [logit for _, logit in strong.promoted] == row["promoted_logits"]
    assert [token for token, _ in strong.promoted] == list(map(token_text, row["promoted_tokens"]))
    assert (silent.count, silent.rank, silent.region, silent.delta_kl) == (0, None, None, None)
    assert silent.examples == []
    with pytest.raises(UserError, match="layer: expected 0 to 1, got 2"):
        read_details(data.store, [(0, 5), (2, 0)])


def test_texts_of_the_store_cannot_move_the_cursor(data: StoreData) -> None:
    """Control characters and reordering ones are shown, not printed."""
    pairs = [(layer, i) for layer in range(L) for i in range(F)]
    shown = repr(read_details(data.store, pairs, examples=20))
    assert "\\x1b" not in shown
    assert "\\u202e" not in shown
    assert "⟨U+001B⟩[2J" in shown
    assert "⟨U+202E⟩evil" in shown
    assert "a↵b" in shown


@pytest.mark.parametrize(
    ("token", "shown"), [(" wait", "␣wait"), ("  ", "␣␣"), ("a b ", "a b␣"), ("\t", "⇥")]
)
def test_spaces_at_the_ends_of_a_token_are_seen(token: str, shown: str) -> None:
    assert token_text(token) == shown


def test_features_are_selected_by_name(data: StoreData) -> None:
    selected = select(data.store, SelectConfig(features=("1/0", "0/5", "1/0")))
    assert selected.features == ((0, 5), (1, 0))
    assert selected.adapter == data.store.manifest["adapter"]
    inline = find_set(data.store.folder, "0/5,1/0")
    assert inline.features == selected.features
    assert inline.digest() == selected.digest()
    for name in ("2", "1/x", "-1/0", "1/0/0", "1/٣", ""):
        with pytest.raises(UserError, match="LAYER/NUMBER, such as 2/17"):
            SelectConfig(features=(name,))
    with pytest.raises(UserError, match="got feature 6 of layer 0"):
        select(data.store, SelectConfig(features=("0/6",)))


def test_effects_of_another_shape_are_refused(data: StoreData) -> None:
    effects = {"layer": [0], "feature": [F], "delta_kl": [0.25], "positions": [156]}
    data.store.add("effects", pa.table(effects).cast(EFFECTS))
    with pytest.raises(UserError, match="feature"):
        Store.open(data.store.folder).read("effects")
