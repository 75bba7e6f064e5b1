"""Published checkpoints convert to replacement models and adapters, and back to the same bytes."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from fastadapt.adapter.files import save_adapters
from fastadapt.adapter.module import AdapterConfig, TranscoderAdapter
from fastadapt.errors import UserError
from fastadapt.interop import hu2026
from fastadapt.models.replacement import PairMismatchError, ReplacementModel
from fastadapt.models.trained_files import load_adapters
from fastadapt.serving.export import export

FEATURES, WIDTH, LAYERS = 24, 16, 3
IDS = torch.tensor([[5, 9, 23, 7, 31, 8]])
LAYER, MODULES = "model.layers.{}.mlp.", ("enc", "dec")


def shards_of(folder: str | Path) -> dict[str, torch.Tensor]:
    shards = [load_file(file) for file in sorted(Path(folder).glob("*.safetensors"))]
    return {name: tensor for shard in shards for name, tensor in shard.items()}


def files_of(folder: str | Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in Path(folder).iterdir()}


@pytest.fixture
def published(save_model: Callable[..., str], tmp_path: Path) -> Callable[..., str]:
    """Return a function that writes a small published checkpoint; the pair in target/ and base/.

    The checkpoint is written from the format's description.
    """

    def make(tied: bool = False, decoder_bias: bool = True, shards: int = 3) -> str:
        target = save_model("target", 0, tie_word_embeddings=tied)
        base = save_model("base", 1, tie_word_embeddings=tied)
        for model in (target, base):
            file = Path(model) / "model.safetensors"
            weights = {name: t.bfloat16() for name, t in load_file(file).items()}
            save_file(weights, file, metadata={"format": "pt"})
            config = json.loads((Path(model) / "config.json").read_text())
            (Path(model) / "config.json").write_text(json.dumps({**config, "dtype": "bfloat16"}))
        tensors, mlps = shards_of(target), shards_of(base)
        tensors |= {name: t for name, t in mlps.items() if ".mlp." in name}
        generator = torch.Generator().manual_seed(5)
        for i in range(LAYERS):
            shapes: dict[str, tuple[int, ...]] = {
                "enc.weight": (FEATURES, WIDTH),
                "enc.bias": (FEATURES,),
                "dec.weight": (WIDTH, FEATURES),
                "dec.bias": (WIDTH,),
            }
            for name, shape in shapes.items():
                if name != "dec.bias" or decoder_bias:
                    noise = 0.3 * torch.randn(shape, generator=generator)
                    tensors[LAYER.format(i) + "transcoder_" + name] = noise.bfloat16()
        folder = tmp_path / "published"
        folder.mkdir()
        for file in Path(target).iterdir():
            if "token" in file.name or "generation" in file.name:
                (folder / file.name).write_bytes(file.read_bytes())
        config = json.loads((Path(target) / "config.json").read_text())
        config |= {"architectures": ["Qwen2ForCausalLMWithTranscoder"], "torch_dtype": "bfloat16"}
        config |= {"transcoder_n_features": FEATURES, "transcoder_dec_bias": decoder_bias}
        del config["dtype"]  # as older transformers wrote it
        (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
        names = list(tensors)
        weight_map: dict[str, str] = {}
        for n in range(shards):
            part = (
                f"model-{n + 1:05}-of-{shards:05}.safetensors"
                if shards > 1
                else "model.safetensors"
            )
            shard = {name: tensors[name] for name in names[n::shards]}
            save_file(shard, folder / part, metadata={"format": "pt"})
            weight_map |= dict.fromkeys(shard, part)
        if shards > 1:
            index = {"metadata": {"total_size": 1}, "weight_map": weight_map}
            text = json.dumps(index, indent=2, sort_keys=True) + "\n"
            (folder / "model.safetensors.index.json").write_text(text)
        return str(folder)

    return make


def logits(model: ReplacementModel, mode: Any) -> torch.Tensor:
    with torch.no_grad(), model.mode(mode):
        return model(IDS).logits


def reference_logits(folder: str) -> torch.Tensor:
    """Compute the formula in float32: Qwen2 in transformers, transcoders as hooks on its MLPs."""
    from torch.nn.functional import linear
    from transformers import AutoConfig, Qwen2ForCausalLM

    tensors = {name: t.float() for name, t in shards_of(folder).items()}
    plain = Qwen2ForCausalLM(AutoConfig.from_pretrained(folder)).float().eval()
    plain.load_state_dict({n: t for n, t in tensors.items() if "transcoder" not in n})
    for i, layer in enumerate(plain.model.layers):
        names = LAYER.format(i) + "transcoder_{}.{}"

        def add(_module: Any, inputs: Any, output: Any, names: Any = names) -> Any:
            enc, dec = ([tensors[names.format(m, n)] for n in ("weight", "bias")] for m in MODULES)
            return output + linear(linear(inputs[0], *enc).relu(), *dec)

        layer.mlp.register_forward_hook(add)
    with torch.no_grad():
        return plain(IDS).logits


@pytest.mark.parametrize("case", [{}, {"tied": True}, {"decoder_bias": False}, {"shards": 1}])
def test_round_trip_through_a_model(
    case: dict[str, Any], published: Callable[..., str], tmp_path: Path
) -> None:
    source = published(**case)
    target = str(tmp_path / "target")
    model = hu2026.load(source, target, device="cpu")
    assert model.n_features == FEATURES
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    hu2026.save(model, tmp_path / "back", like=source)
    assert files_of(tmp_path / "back") == files_of(source)
    again = hu2026.load(str(tmp_path / "back"), target, device="cpu")
    for mode in ("target", "hybrid", "replacement"):
        assert torch.equal(logits(model, mode), logits(again, mode))


def test_logits_follow_the_formula(published: Callable[..., str], tmp_path: Path) -> None:
    source = published()
    model = hu2026.load(source, str(tmp_path / "target"), device="cpu", dtype="float32")
    torch.testing.assert_close(logits(model, "replacement"), reference_logits(source))


def test_no_report_of_unexpected_tensors(
    published: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """transformers would report the transcoders as unexpected, although they are loaded."""
    records: list[logging.LogRecord] = []
    handler = logging.Handler()
    monkeypatch.setattr(handler, "emit", records.append)
    monkeypatch.setattr(logging.getLogger("transformers"), "handlers", [handler])
    hu2026.load(published(), device="cpu")
    assert not [r.getMessage() for r in records if "UNEXPECTED" in r.getMessage()]


def test_the_target_mode_is_the_target(published: Callable[..., str], tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    source, target = published(), str(tmp_path / "target")
    plain = AutoModelForCausalLM.from_pretrained(target)
    with torch.no_grad():
        expected = plain(IDS).logits
    assert torch.equal(logits(hu2026.load(source, target, device="cpu"), "target"), expected)
    alone = hu2026.load(source, device="cpu")
    whole = hu2026.load(source, target, device="cpu")
    for mode in ("hybrid", "replacement"):
        assert torch.equal(logits(alone, mode), logits(whole, mode))
    with pytest.raises(UserError, match="does not hold the target's MLPs"):
        logits(alone, "target")


@pytest.mark.parametrize("decoder_bias", [True, False])
def test_round_trip_through_adapters(
    decoder_bias: bool, published: Callable[..., str], tmp_path: Path
) -> None:
    source = published(decoder_bias=decoder_bias)
    target, base = str(tmp_path / "target"), str(tmp_path / "base")
    hu2026.to_adapters(source, tmp_path / "adapters", target=target, base=base)
    adapters, metadata = load_adapters(tmp_path / "adapters")
    assert metadata["published"] == {"checkpoint": source, "revision": None}
    tensors = shards_of(source)
    adapter: Any
    for i, adapter in enumerate(adapters):
        layer = LAYER.format(i)
        assert torch.equal(adapter.W_enc, tensors[layer + "transcoder_enc.weight"])
        assert torch.equal(adapter.W_dec, tensors[layer + "transcoder_dec.weight"].T)
        assert torch.equal(adapter.b_enc, tensors[layer + "transcoder_enc.bias"])
        expected = tensors.get(layer + "transcoder_dec.bias", torch.zeros(WIDTH).bfloat16())
        assert torch.equal(adapter.decoder_bias(), expected)
        assert (adapter.b_dec is not None) == decoder_bias
    hu2026.from_adapters(
        tmp_path / "adapters", tmp_path / "back", target=target, base=base, like=source
    )
    assert files_of(tmp_path / "back") == files_of(source)


@pytest.mark.parametrize("like", [None, True, False])
def test_adapters_without_biases_become_a_published_checkpoint(
    like: bool | None, published: Callable[..., str], tmp_path: Path
) -> None:
    """Without biases, or with zeros if another checkpoint's format asks for biases."""
    source = published(decoder_bias=like is not False)
    target, base = str(tmp_path / "target"), str(tmp_path / "base")
    adapters = [
        TranscoderAdapter(WIDTH, AdapterConfig(FEATURES, bias=False)) for _ in range(LAYERS)
    ]
    for adapter in adapters:
        torch.nn.init.normal_(adapter.W_dec, std=0.2)
    save_adapters([a.bfloat16() for a in adapters], tmp_path / "adapters")
    out = tmp_path / "out"
    as_source = None if like is None else source
    hu2026.from_adapters(tmp_path / "adapters", out, target=target, base=base, like=as_source)
    assert json.loads((out / "config.json").read_text())["transcoder_dec_bias"] is bool(like)
    biases = [t for name, t in shards_of(out).items() if name.endswith("transcoder_dec.bias")]
    assert len(biases) == (LAYERS if like else 0)
    assert not any(bias.count_nonzero() for bias in biases)
    model: Any = hu2026.load(str(out), target, device="cpu")
    for ours, theirs in zip(adapters, model.adapters, strict=True):
        assert torch.equal(ours.W_dec, theirs.W_dec)
        assert theirs.config.bias is bool(like)


def test_library_adapters_become_a_published_checkpoint(
    published: Callable[..., str], tmp_path: Path
) -> None:
    published()  # writes the pair
    target, base = str(tmp_path / "target"), str(tmp_path / "base")
    adapters = [TranscoderAdapter(WIDTH, AdapterConfig(40)) for _ in range(LAYERS)]
    for adapter in adapters:
        assert adapter.b_dec is not None
        torch.nn.init.normal_(adapter.W_dec, std=0.2)
        torch.nn.init.normal_(adapter.b_dec, std=0.2)
    save_adapters([a.bfloat16() for a in adapters], tmp_path / "adapters")
    out = tmp_path / "out"
    hu2026.from_adapters(tmp_path / "adapters", out, target=target, base=base, shard_bytes=5000)
    config = json.loads((out / "config.json").read_text())
    assert config["architectures"] == ["Qwen2ForCausalLMWithTranscoder"]
    assert (config["transcoder_n_features"], config["transcoder_dec_bias"]) == (40, True)
    assert (config["model_type"], config["dtype"]) == ("qwen2", "bfloat16")
    assert len(list(out.glob("model-*-of-*.safetensors"))) > 3
    index = json.loads((out / "model.safetensors.index.json").read_text())["weight_map"]
    assert set(index) == set(shards_of(out))
    model = hu2026.load(str(out), target, device="cpu")
    for ours, theirs in zip(adapters, model.adapters, strict=True):
        for name, parameter in ours.named_parameters():
            assert torch.equal(parameter, getattr(theirs, name))
    hu2026.save(model, tmp_path / "again", shard_bytes=5000)
    assert shards_of(tmp_path / "again").keys() == index.keys()
    for name, tensor in shards_of(tmp_path / "again").items():
        assert torch.equal(tensor, shards_of(out)[name])


def test_one_shard_is_in_memory_at_a_time(
    published: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Writing holds at most one shard and the next tensor."""
    source = published(shards=1)
    sizes: list[int] = []

    def save_and_measure(tensors: dict[str, torch.Tensor], file: Any, metadata: Any) -> None:
        sizes.append(sum(t.nbytes for t in tensors.values()))
        save_file(tensors, file, metadata)

    monkeypatch.setattr("safetensors.torch.save_file", save_and_measure)
    model = hu2026.load(source, device="cpu")
    hu2026.save(model, tmp_path / "out", shard_bytes=4000)
    total = sum(t.nbytes for t in shards_of(source).values())
    assert sum(sizes) == total
    assert max(sizes) <= 4000 < total / 3


def test_another_target_is_refused(
    published: Callable[..., str], save_model: Callable[..., str], tmp_path: Path
) -> None:
    source = published()
    other = save_model("other", 7)
    with pytest.raises(PairMismatchError, match="of the weights that they should share differ"):
        hu2026.load(source, other, device="cpu")
    wider = save_model("wider", 7, hidden_size=32)
    with pytest.raises(PairMismatchError, match="hidden_size: target 32, base 16"):
        hu2026.load(source, wider, device="cpu")


def test_faulty_checkpoints_are_refused(published: Callable[..., str], tmp_path: Path) -> None:
    source = Path(published(shards=1))
    file = source / "model.safetensors"
    whole, name = load_file(file), LAYER.format(1) + "transcoder_dec.weight"

    def attempt(tensors: dict[str, torch.Tensor]) -> str:
        save_file(tensors, file, metadata={"format": "pt"})
        with pytest.raises(UserError) as error:
            hu2026.to_adapters(str(source), tmp_path / "adapters")
        assert not (tmp_path / "adapters" / "fastadapt.json").exists()
        return str(error.value)

    assert name in attempt({n: t for n, t in whole.items() if n != name})
    message = attempt({**whole, name: whole[name].T.contiguous()})
    assert f"tensor {name}: expected (16, 24), got (24, 16)" in message
    message = attempt({**whole, name: torch.full_like(whole[name], float("nan"))})
    assert f"tensor {name}: expected finite values, got 384 NaN or infinite" in message
    extra = LAYER.format(LAYERS) + "transcoder_enc.bias"
    assert extra in attempt({**whole, extra: torch.zeros(FEATURES)})
    with pytest.raises(UserError, match="expected a checkpoint of Qwen2ForCausalLMWith"):
        hu2026.load(str(tmp_path / "base"), device="cpu")


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn])
@pytest.mark.parametrize("folder", ["published", "target", "base"])
@pytest.mark.parametrize("part", ["mlp.up_proj.weight", "self_attn.q_proj.weight"])
def test_codes_of_quantised_weights_are_refused(
    part: str, folder: str, dtype: torch.dtype, published: Callable[..., str], tmp_path: Path
) -> None:
    """Each command that reads the checkpoint raises and writes no file."""
    source = published(shards=1)
    pair: dict[str, Any] = {name: str(tmp_path / name) for name in ("target", "base")}
    adapters, out = tmp_path / "adapters", tmp_path / "out"
    save_adapters([TranscoderAdapter(WIDTH, AdapterConfig(40)) for _ in range(LAYERS)], adapters)
    file = tmp_path / folder / "model.safetensors"
    tensors, name = load_file(file), f"model.layers.1.{part}"
    save_file({**tensors, name: tensors[name].to(dtype)}, file, metadata={"format": "pt"})
    exports: list[Callable[[], Any]] = [
        lambda: hu2026.from_adapters(adapters, out, **pair),
        lambda: export(adapters, out, **pair),
    ]
    calls: dict[str, list[Callable[[], Any]]] = {
        "published": [
            lambda: hu2026.load(source, device="cpu"),
            lambda: hu2026.to_adapters(source, out),
        ],
        "target": [lambda: hu2026.load(source, pair["target"], device="cpu"), *exports],
        "base": exports,
    }
    for call in calls[folder]:
        with pytest.raises(UserError, match=f"{folder}.*tensor {name} is stored as"):
            call()
    assert not out.exists()


def test_a_stale_index_is_ignored(published: Callable[..., str], tmp_path: Path) -> None:
    """A checkpoint in one file beside an older index is written back as one file."""
    source = Path(published(shards=3))
    whole = shards_of(source)
    for shard in source.glob("model-*"):
        shard.unlink()
    save_file(whole, source / "model.safetensors", metadata={"format": "pt"})
    hu2026.save(hu2026.load(str(source), device="cpu"), tmp_path / "out", like=str(source))
    assert [file.name for file in (tmp_path / "out").glob("model*")] == ["model.safetensors"]
    assert shards_of(tmp_path / "out").keys() == whole.keys()


def test_unsupported_models_are_refused(
    published: Callable[..., str], make_pair: Callable[..., Any], tmp_path: Path
) -> None:
    source = published(decoder_bias=False)
    model: Any = hu2026.load(source, device="cpu")
    width = model.d_model
    adapters = [TranscoderAdapter(width, AdapterConfig(model.n_features)) for _ in model.adapters]
    model.set_adapters(torch.nn.ModuleList(adapter.bfloat16() for adapter in adapters))
    with torch.no_grad():
        model.adapters[1].b_dec[3] = 1
    with pytest.raises(UserError, match="has no decoder biases"):
        hu2026.save(model, tmp_path / "out", like=source)
    llama = ReplacementModel.create(make_pair("llama"), AdapterConfig(8))
    with pytest.raises(UserError, match="Qwen2 model with ReLU adapters; this is llama with relu"):
        hu2026.save(llama, tmp_path / "out")
    topk = ReplacementModel.create(make_pair("qwen2"), AdapterConfig(8, "topk", k=2))
    with pytest.raises(UserError, match="this is qwen2 with topk"):
        hu2026.save(topk, tmp_path / "out")
    with pytest.raises(UserError, match="holds an export; give a new folder"):
        hu2026.save(model, source)


def contents_of(folder: Path) -> dict[str, bytes | None]:
    return {str(path): path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


ODD = ["../x", "../victim.safetensors", "/abs", "a/b", "a\\b", "a\0b", "x" * 300, "\ud800", ".."]
ODD += ["config.json", "model.safetensors.index.json"]


@pytest.mark.parametrize("name", ODD, ids=lambda name: ascii(name)[:30])
def test_an_index_may_only_name_shards_of_its_folder(
    name: str, published: Callable[..., str], tmp_path: Path
) -> None:
    """Files that the index of ``like`` names are written inside the new folder, or not at all."""
    source = published()
    pair: dict[str, Any] = {role: str(tmp_path / role) for role in ("target", "base")}
    model = hu2026.load(source, pair["target"], device="cpu")
    hu2026.to_adapters(source, tmp_path / "adapters", **pair)
    (tmp_path / "victim.safetensors").write_text("precious")
    index = Path(source) / "model.safetensors.index.json"
    values = json.loads(index.read_text())
    first = next(iter(values["weight_map"]))
    values["weight_map"][first] = name
    index.write_text(json.dumps(values))
    before = contents_of(tmp_path)
    out = tmp_path / "new" / "out"
    out.mkdir(parents=True)
    with pytest.raises(UserError, match="weight_map"):
        hu2026.save(model, out, like=source)
    with pytest.raises(UserError, match="weight_map"):
        hu2026.from_adapters(tmp_path / "adapters", out, **pair, like=source)
    if not name.endswith(".json"):  # those exist in the folder, but are not safetensors
        with pytest.raises(UserError, match="weight_map"):
            hu2026.load(source, device="cpu")
    after = contents_of(tmp_path)
    assert {path for path in after if not path.startswith(str(out.parent))} == set(before)
    assert {path: after[path] for path in before} == before
