"""Upload batches of Neuronpedia: the server's rules, and every value from the store."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import msgspec
import numpy as np
import pyarrow as pa
import pytest
from stores import StoreData, StoreText, make_store
from typing_extensions import NotRequired, TypedDict

from fastadapt.cli.main import main
from fastadapt.errors import UserError
from fastadapt.features.store.schema import DESCRIPTIONS
from fastadapt.interop.neuronpedia import MAX_TEXT, _cut, write

L, F = 2, 150
STRINGS = [f" w{i}" for i in range(40)]


# The rules of the server's schema (apps/webapp/app/api/feature/upload-batch), in its own terms.
class Text(TypedDict):
    text: Annotated[str, msgspec.Meta(min_length=1, max_length=512)]
    methodName: NotRequired[None]
    modelName: NotRequired[None]


_Token = Annotated[str, msgspec.Meta(min_length=1)]
_Length = msgspec.Meta(min_length=1, max_length=1024)


class Example(TypedDict):
    tokens: Annotated[list[_Token], _Length]
    values: Annotated[list[float], _Length]


class Logit(TypedDict):
    token: str
    value: float


_Logits = Annotated[list[Logit], msgspec.Meta(max_length=20)]


class Feature(TypedDict):
    index: Annotated[int, msgspec.Meta(ge=0, le=10_000_000)]
    density: Annotated[float, msgspec.Meta(ge=0, le=1)]
    explanations: list[Text]
    activations: Annotated[list[Example], msgspec.Meta(min_length=1)]
    topLogits: _Logits
    bottomLogits: _Logits


_Lower = Annotated[str, msgspec.Meta(pattern="^[^A-Z]+$")]


class Body(TypedDict):
    modelId: _Lower
    source: _Lower
    features: Annotated[list[Feature], msgspec.Meta(min_length=1, max_length=128)]


@pytest.fixture
def data(tmp_path: Path) -> StoreData:
    """Every third feature of layer 0 never fires, and none of layer 1 above 9."""
    rng = np.random.default_rng(0)
    texts, activations = [], []
    for _ in range(3):
        tokens = [int(t) for t in rng.integers(0, len(STRINGS), 30)]
        values = rng.exponential(size=(L, 30, F)) * (rng.random((L, 30, F)) < 0.2)
        values[0, :, ::3] = 0
        values[1, :, 10:] = 0
        texts.append(StoreText(tokens, [5] * 30))
        activations.append(values.astype(np.float32))
    store_data = make_store(tmp_path / "run" / "features", texts, activations, STRINGS)
    rows = [
        {"layer": 0, "feature": 1, "variant": "top", "description": "waiting"},
        {"layer": 0, "feature": 1, "variant": "uniform", "description": "x" * 600},
        {"layer": 1, "feature": 2, "variant": "top", "description": " "},
        {"layer": 1, "feature": 2, "variant": "uniform", "description": "𝑥" * 300},
    ]
    more = {"judge": "some judge", "shown": [0]}
    table = pa.Table.from_pylist([{**row, **more} for row in rows], schema=DESCRIPTIONS)
    store_data.store.add("descriptions", table)
    return store_data


def batches(folder: Path) -> list[Any]:
    return [json.loads(file.read_text("utf-8")) for file in sorted(folder.glob("*/batch_*.json"))]


def test_batches_obey_the_servers_rules_and_are_the_stores(data: StoreData, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    written = write(data.store, out, model_id="qwen2.5-7b", source_set="diff-r1")
    bodies = batches(out)
    assert (written.batches, written.features) == (2, 100 + 10) == (len(bodies), 110)
    assert (written.silent, written.shortened) == (50 + 140, 2)
    for body in bodies:
        msgspec.convert(body, Body, strict=True)
        indices = [feature["index"] for feature in body["features"]]
        assert len(set(indices)) == len(indices)
        for feature in body["features"]:
            for example in feature["activations"]:
                assert len(example["tokens"]) == len(example["values"])
    assert [body["source"] for body in bodies] == ["0-diff-r1", "1-diff-r1"]
    assert {body["modelId"] for body in bodies} == {"qwen2.5-7b"}
    feature = bodies[0]["features"][0]
    dense = np.concatenate([a[0, :, 1] for a in data.activations])
    assert feature["index"] == 1
    assert feature["density"] == pytest.approx((dense > 0).mean())
    assert max(feature["activations"][0]["values"]) == pytest.approx(dense.max())
    text = next(n for n, a in enumerate(data.activations) if a[0, :, 1].max() == dense.max())
    said = " ".join("".join(feature["activations"][0]["tokens"]).split())
    assert said in "".join(STRINGS[t] for t in data.texts[text].tokens)
    assert [e["text"] for e in feature["explanations"]] == ["waiting", "x" * 511 + "…"]
    (lens,) = data.store.read("lens", layer=0, features=[1]).to_pylist()
    assert [logit["token"] for logit in feature["topLogits"]] == lens["promoted_tokens"]
    assert [logit["value"] for logit in feature["bottomLogits"]] == lens["suppressed_logits"]


@pytest.mark.parametrize("text", ["x𝑥" * 300, "𝑥" * 300, "𝑥" * 257, "x" + "𝑥" * 256])
def test_long_descriptions_are_cut_as_the_server_counts(text: str) -> None:
    """JavaScript's length counts a character above U+FFFF twice."""
    cut = _cut(text)
    assert MAX_TEXT - 1 <= sum(1 + (ord(c) > 0xFFFF) for c in cut) <= MAX_TEXT
    assert cut.endswith("…")
    assert text.startswith(cut[:-1])
    assert _cut("𝑥" * 256) == "𝑥" * 256  # the control: 512 units


def test_many_features_are_divided(tmp_path: Path) -> None:
    texts = [StoreText(list(range(30)), [5] * 30)]
    ones = np.ones((1, 30, 300), dtype=np.float32)
    data = make_store(tmp_path / "run" / "features", texts, [ones], STRINGS)
    out = tmp_path / "out"
    out.mkdir()
    write(data.store, out, model_id="m", source_set="s")
    assert [len(body["features"]) for body in batches(out)] == [128, 128, 44]


def test_what_is_refused(data: StoreData, tmp_path: Path) -> None:
    for names in (("Qwen", "s"), ("m", "a b"), ("", "s")):
        with pytest.raises(UserError, match="expected lower-case letters, digits"):
            write(data.store, tmp_path, model_id=names[0], source_set=names[1])
    texts = [StoreText([1, 2], [5, 5])]
    silent = make_store(tmp_path / "silent", texts, [np.zeros((1, 2, 3), np.float32)], STRINGS)
    with pytest.raises(UserError, match="no feature has an example"):
        write(silent.store, tmp_path, model_id="m", source_set="s")


def test_the_command(data: StoreData, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["export", str(data.store.folder), "--format", "neuronpedia"]
    words += ["--output", str(tmp_path / "out"), "--model_id", "m"]
    assert main(words) == 2
    assert "--source_set is missing" in capsys.readouterr().err
    assert main([*words, "--source_set", "s"]) == 0
    printed = capsys.readouterr().out
    assert "110 features in 2 batches; 190 without an example left out; 2 descriptions" in printed
    assert "/api/feature/upload-batch" in printed
    assert len(batches(tmp_path / "out")) == 2
    assert main([*words, "--source_set", "s"]) == 2
    assert main([*words, "--source_set", "s", "--overwrite"]) == 0
    # No weights: nothing that could run in place of an MLP.
    assert {file.suffix for file in (tmp_path / "out").rglob("*") if file.is_file()} == {".json"}
