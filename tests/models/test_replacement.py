"""Pairs load strictly, and the three modes compute what their names say in transformers' calls."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from fastadapt.adapter.module import AdapterConfig
from fastadapt.errors import UserError
from fastadapt.kernels.transcoder import SMALL_ENTRIES
from fastadapt.models.architectures import ARCHITECTURES
from fastadapt.models.huggingface.checkpoint import lazy_tensors
from fastadapt.models.pair import choose_attention, choose_device
from fastadapt.models.pretrained import reading
from fastadapt.models.replacement import ModelPair, PairConfig, PairMismatchError, ReplacementModel
from fastadapt.models.sources.checks import tokenizer_notes

IDS = torch.tensor([[5, 9, 23, 7, 31, 8]])


def randomised(pair: Any, features: int = 24) -> ReplacementModel:
    model = ReplacementModel.create(pair, AdapterConfig(features))
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for p in model.adapters.parameters():
            p.add_(0.3 * torch.randn(p.shape, generator=generator))
    return model


def load(target: str, base: str, **changes: Any) -> ModelPair:
    return ModelPair.load(PairConfig(target, base, device="cpu", **changes))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_three_modes(architecture: str, save_model: Callable[..., str]) -> None:
    from transformers import AutoModelForCausalLM

    target = save_model("target", 0, architecture)
    base = save_model("base", 1, architecture)
    model = randomised(load(target, base))
    attention = model.model.config._attn_implementation  # Gemma 2's default differs by version
    plain = AutoModelForCausalLM.from_pretrained(target, attn_implementation=attention).eval()
    with torch.no_grad():
        with model.mode("target"):
            assert torch.equal(model(IDS).logits, plain(IDS).logits)
        other = AutoModelForCausalLM.from_pretrained(base)
        for layer, source in zip(plain.model.layers, other.model.layers, strict=True):
            layer.mlp = source.mlp
        with model.mode("hybrid"):
            assert torch.equal(model(IDS).logits, plain(IDS).logits)
        for layer, adapter in zip(plain.model.layers, model.adapters, strict=True):

            def add(_module: Any, inputs: Any, output: Any, adapter: Any = adapter) -> Any:
                a = (inputs[0] @ adapter.W_enc.T + adapter.b_enc).relu()
                return output + a @ adapter.W_dec + adapter.b_dec

            layer.mlp.register_forward_hook(add)
        torch.testing.assert_close(model(IDS).logits, plain(IDS).logits)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_targets_mlps_need_not_be_read(
    architecture: str, save_model: Callable[..., str]
) -> None:
    target, base = save_model("target", 0, architecture), save_model("base", 1, architecture)
    config, models = PairConfig(target, base, device="cpu"), [randomised(load(target, base))]
    models.append(randomised(ModelPair.load(config, target_mlps=False)))
    file = Path(target, "model.safetensors")
    others = {name: x for name, x in load_file(file).items() if ".mlp." not in name}
    save_file(others, file, metadata={"format": "pt"})
    with pytest.raises(UserError, match="missing keys"):  # the control: what is read must be there
        load(target, base)
    models.append(randomised(ModelPair.load(config, target_mlps=False)))
    size = [sum(p.numel() for p in model.parameters()) for model in models]
    mlps = sum(p.numel() for p in models[0].pair.base_mlps.parameters())
    assert size == [size[0], size[0] - mlps, size[0] - mlps]
    for mode in ("hybrid", "replacement"):
        outputs = []
        for model in models:
            with model.mode(mode), torch.no_grad():
                outputs.append(model(IDS).logits)
        assert torch.equal(outputs[0], outputs[1])
        assert torch.equal(outputs[0], outputs[2])
    with (
        pytest.raises(UserError, match="does not hold the target's MLPs"),
        models[1].mode("target"),
    ):
        models[1](IDS)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_generate_in_each_mode(architecture: str, make_pair: Callable[..., Any]) -> None:
    model = randomised(make_pair(architecture))
    seen = {}
    for mode in ("target", "hybrid", "replacement"):
        with model.mode(mode):
            settings = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None}
            cached = model.generate(IDS, **settings)
            assert torch.equal(cached, model.generate(IDS, use_cache=False, **settings))
            ids = IDS
            for _ in range(8):
                ids = torch.cat([ids, model(ids).logits[:, -1:].argmax(-1)], 1)
            assert torch.equal(cached, ids)
            seen[mode] = cached
    assert len({tuple(ids[0].tolist()) for ids in seen.values()}) == 3


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ["qwen2", "gemma2", "phi3"])
def test_compile(architecture: str, make_pair: Callable[..., Any]) -> None:
    torch._dynamo.reset()
    model = randomised(make_pair(architecture))
    compiled = torch.compile(model.model, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        for mode in ("replacement", "hybrid", "target"):
            with model.mode(mode):
                torch.testing.assert_close(
                    compiled(IDS, use_cache=False).logits, model(IDS).logits, rtol=1e-4, atol=1e-4
                )


def test_mode_is_restored_after_an_error(make_pair: Callable[..., Any]) -> None:
    model = randomised(make_pair("qwen2"))
    with pytest.raises(RuntimeError, match="inside"), model.mode("target"):
        raise RuntimeError("inside")
    assert {mlp.mode for mlp in model.mlps} == {"replacement"}
    with (
        pytest.raises(UserError, match="mode must be one of target, hybrid, replacement"),
        model.mode("base"),  # type: ignore[arg-type]
    ):
        raise AssertionError("never reached")


def test_only_adapters_train_and_no_weight_is_loaded_twice(save_model: Callable[..., str]) -> None:
    pair = load(save_model("target", 0), save_model("base", 1))
    model: Any = randomised(pair)
    trained = {id(p) for p in model.parameters() if p.requires_grad}
    assert trained == {id(p) for p in model.adapters.parameters()}
    frozen = sum(p.numel() for p in model.parameters() if not p.requires_grad)
    target = load_file(Path(pair.config.target) / "model.safetensors")
    mlps = sum(t.numel() for name, t in target.items() if ".mlp." in name)
    assert frozen == sum(t.numel() for t in target.values()) + mlps
    assert not model.model.training
    assert [n for n, _ in model.blocks[0].mlp.target.named_children()][:3] == [
        "gate_proj",
        "up_proj",
        "down_proj",
    ]


def test_block_by_block_equals_the_models_own_forward(make_pair: Callable[..., Any]) -> None:
    for architecture in ARCHITECTURES:
        model = randomised(make_pair(architecture))
        ids = torch.randint(3, 40, (2, 7))
        real = torch.arange(7) < torch.tensor([[7], [4]])
        for mode in ("target", "hybrid", "replacement"):
            inputs = model.block_inputs(ids, real)
            h = inputs.hidden
            with torch.no_grad():
                for layer in range(model.n_layers):
                    h, aux = model.block(layer, h, inputs.arguments[layer], mode)
                    assert (aux is not None) == (mode == "replacement")
                with model.mode(mode):
                    logits = model(ids, attention_mask=real.long()).logits
                ours = model.final_norm(h, mode) @ model.head.T
                if model.softcap:
                    ours = model.softcap * (ours / model.softcap).tanh()
            torch.testing.assert_close(ours[real], logits[real])
    assert all("forward" not in vars(block) for block in model.blocks)


def test_graph_capture_needs_no_synchronization(
    make_pair: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Calls too large to choose without a synchronization are dense, but only in a capture."""
    from torch._subclasses import FakeTensorMode

    mlp = randomised(make_pair("qwen2")).mlps[0]
    with FakeTensorMode():
        few, many = (torch.empty(1, n, 16, device="cuda") for n in (1, SMALL_ENTRIES // 24 + 1))
    for capturing, expected in ((True, True), (False, None)):
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda c=capturing: c)
        assert mlp._dense_in_capture(few) is None
        assert mlp._dense_in_capture(many) is expected


def test_one_pair_carries_one_set_of_adapters(make_pair: Callable[..., Any]) -> None:
    pair = make_pair("qwen2")
    model = randomised(pair)
    with pytest.raises(UserError, match="already carries adapters"):
        ReplacementModel(pair, model.adapters)
    with pytest.raises(UserError, match="expected 3 adapters, one per layer, got 1"):
        ReplacementModel(make_pair("qwen2"), model.adapters[:1])


MISMATCHES: dict[str, tuple[dict[str, Any], str]] = {
    "architecture": ({"architecture": "llama"}, "model_type: target 'qwen2', base 'llama'"),
    "width": ({"hidden_size": 32}, "hidden_size: target 16, base 32"),
    "mlp width": ({"intermediate_size": 48}, "intermediate_size: target 40, base 48"),
    "layers": ({"num_hidden_layers": 2}, "num_hidden_layers: target 3, base 2"),
}


@pytest.mark.parametrize("case", MISMATCHES)
def test_a_mismatched_pair_says_what_differs(case: str, save_model: Callable[..., str]) -> None:
    changes, message = MISMATCHES[case]
    with pytest.raises(PairMismatchError) as error:
        load(save_model("target"), save_model("base", 1, **changes))
    assert message in str(error.value)


def test_the_error_for_a_multimodal_model_names_its_text_model(
    tmp_path: Path, save_model: Callable[..., str]
) -> None:
    from transformers import AutoConfig

    AutoConfig.for_model("llava_next").save_pretrained(tmp_path / "whole")
    refused = "'llava_next' is not supported: .* text model 'llama' is supported if it is saved"
    with pytest.raises(UserError, match=refused):
        load(str(tmp_path / "whole"), save_model("base"))


def test_vocabularies_need_not_agree(save_model: Callable[..., str]) -> None:
    target = save_model("target")
    for base, note in (
        (save_model("larger", 1, vocab_size=44), "differ in 4 tokens; 'w40': target None, base 40"),
        (
            save_model("other", 1, words="v"),
            "tokenizers of target and base differ in 74 tokens; 'v10'",
        ),
    ):
        pair = load(target, base)
        assert note in pair.notes[0]
        assert randomised(pair)(IDS).logits.shape[-1] == 40


def test_renamed_added_tokens_are_a_note(save_model: Callable[..., str]) -> None:
    from transformers import AutoTokenizer

    ours, theirs = (AutoTokenizer.from_pretrained(save_model(n)) for n in ("a", "b"))
    ours.add_tokens(["<think>"])
    assert "<think>" in tokenizer_notes(ours, theirs)[0]
    assert tokenizer_notes(ours, ours) == []


def test_missing_sources(tmp_path: Path, save_model: Callable[..., str]) -> None:
    good = save_model("good")
    with pytest.raises(UserError, match="cannot be loaded"):
        load(good, str(tmp_path / "nowhere"))
    os.remove(Path(good) / "model.safetensors")
    with pytest.raises(UserError, match="only safetensors checkpoints are read"):
        load(good, good)


@pytest.mark.parametrize("role", ["target", "base"])
def test_missing_extra_and_misshapen_weights(role: str, save_model: Callable[..., str]) -> None:
    name = "model.layers.1.mlp.up_proj.weight"

    def attempt(change: Callable[[dict[str, torch.Tensor]], Any]) -> str:
        folders = {"target": save_model("target"), "base": save_model("base", 1)}
        file = Path(folders[role]) / "model.safetensors"
        tensors = load_file(file)
        change(tensors)
        save_file(tensors, file, metadata={"format": "pt"})
        with pytest.raises(UserError) as error:
            load(**folders)
        return str(error.value)

    def misshape(tensors: dict[str, torch.Tensor]) -> None:
        tensors[name] = tensors[name][:7].clone()

    assert name in attempt(lambda tensors: tensors.pop(name))
    assert "up_proj" in attempt(misshape)


@pytest.mark.parametrize("role", ["target", "base"])
def test_truncated_weights(role: str, save_model: Callable[..., str]) -> None:
    folders = {"target": save_model("target"), "base": save_model("base", 1)}
    file = Path(folders[role]) / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(UserError, match="truncated or damaged"):
        load(**folders)


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory."),
        RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 9 bytes."),
    ],
)
def test_out_of_memory_errors_pass_unchanged(error: RuntimeError) -> None:
    with pytest.raises(RuntimeError) as raised, reading("target", "somewhere"):
        raise error
    assert raised.value is error


@pytest.mark.parametrize("name", ["../secret.safetensors", "/etc/passwd", "a/../../b"])
def test_shards_stay_in_their_folder(name: str, save_model: Callable[..., str]) -> None:
    base = Path(save_model("base"))
    (base / "model.safetensors").unlink()
    (base / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": {"model.layers.0.mlp.up_proj.weight": name}})
    )
    with pytest.raises(UserError, match="expected the name of a file in its folder"):
        load(save_model("target"), str(base))


def test_sharded_checkpoints_load(save_model: Callable[..., str]) -> None:
    from transformers import AutoModelForCausalLM

    target, base = save_model("target"), save_model("base", 1)
    whole = load(target, base)
    model = AutoModelForCausalLM.from_pretrained(base)
    os.remove(Path(base) / "model.safetensors")
    model.save_pretrained(base, max_shard_size="8KB")
    assert (Path(base) / "model.safetensors.index.json").exists()
    sharded = load(target, base)
    for a, b in zip(whole.base_mlps.parameters(), sharded.base_mlps.parameters(), strict=True):
        assert torch.equal(a, b)


def test_choices_of_device_and_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    assert choose_device("cpu").type == "cpu"
    with pytest.raises(UserError, match="torch knows no device 'gpu'"):
        choose_device("gpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert choose_device("auto").type == "cpu"
    with pytest.raises(UserError, match="torch finds no GPU"):
        choose_device("cuda")
    cuda, cpu = torch.device("cuda"), torch.device("cpu")
    assert choose_attention("eager", cpu, torch.float32) == ("eager", "set by pair.attention")
    assert choose_attention("auto", cpu, torch.bfloat16)[0] == "sdpa"
    assert "16-bit" in choose_attention("auto", cuda, torch.float32)[1]
    with pytest.raises(UserError, match=r"fastadapt\[flash\]"):
        choose_attention("flash_attention_2", cuda, torch.bfloat16)
    with pytest.raises(UserError, match=r"pair\.dtype must be one of"):
        PairConfig("a", "b", dtype="int8")


@pytest.mark.parametrize("architecture", ["gemma2", "gemma3_text", "qwen2"])
@pytest.mark.parametrize("attention", ["eager", "auto"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_nothing_in_any_dtype(
    architecture: str, attention: str, side: str, save_model: Callable[..., str]
) -> None:
    """A window that holds only padding is a row of minus infinities in a float32 softmax."""
    target = save_model("target", 0, architecture)
    base = save_model("base", 1, architecture)
    short, n = IDS[:, :3], 9
    ids, mask = torch.zeros(1, n, dtype=torch.long), torch.zeros(1, n, dtype=torch.bool)
    real = slice(n - 3, n) if side == "left" else slice(0, 3)
    ids[:, real], mask[:, real] = short, True
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    for dtype in ("float32", "float64"):
        model = randomised(load(target, base, dtype=dtype, attention=attention))
        with torch.no_grad():
            alone = model(short).logits
            padded = model(ids, attention_mask=mask, position_ids=positions).logits[:, real]
        torch.testing.assert_close(padded, alone, rtol=1e-4, atol=1e-5)


def change_config(folder: str, **changes: Any) -> None:
    path = Path(folder) / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.mark.parametrize("role", ["target", "base"])
@pytest.mark.parametrize(
    "dtype", [torch.int8, torch.uint8, torch.int32, torch.bool, torch.float8_e4m3fn]
)
def test_codes_of_quantised_weights_are_refused(
    role: str, dtype: torch.dtype, save_model: Callable[..., str]
) -> None:
    folders = {"target": save_model("target"), "base": save_model("base", 1)}
    file = Path(folders[role]) / "model.safetensors"
    tensors, name = load_file(file), "model.layers.1.mlp.up_proj.weight"
    tensors[name] = tensors[name].to(dtype)
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(UserError, match=f"{role}.*tensor {name} is stored as"):
        load(**folders)


@pytest.mark.parametrize(
    ("file", "message"),
    [
        ("one.gguf", r"one\.gguf has GGUF weights; .*give that folder"),
        ("model.safetensors", r"expected a folder or a hub id, got a file; give its folder"),
        ("pytorch_model.bin", r"pytorch_model\.bin holds pickled weights"),
    ],
)
def test_a_file_is_no_model(
    file: str,
    message: str,
    save_model: Callable[..., str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The hub is not asked, although the name fits a hub id."""
    monkeypatch.chdir(tmp_path)
    Path(file).write_bytes(b"GGUF")
    models: dict[str, Any] = {"target": save_model("target", 0), "base": save_model("base", 1)}
    for name in (file, f"./{file}", str(tmp_path / file)):
        for role in ("target", "base", "tokenizer"):
            what = "tokenizer" if role == "tokenizer" else "model"
            with pytest.raises(UserError, match=f"^(model|{what}) .*{message}"):
                ModelPair.load(PairConfig(**{**models, role: name}, device="cpu"))


@pytest.mark.parametrize("role", ["target", "base"])
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_a_quantised_configuration_is_refused(
    role: str, device: str, save_model: Callable[..., str]
) -> None:
    """The error is raised on the meta device too, where no weight is read."""
    folders: dict[str, Any] = {"target": save_model("target"), "base": save_model("base", 1)}
    change_config(folders[role], quantization_config={"quant_method": "fp8"})
    with pytest.raises(UserError, match=f"{role}' is quantised"):
        ModelPair.load(PairConfig(**folders, device="cpu"), into=torch.device(device))


@pytest.mark.parametrize("same", [True, False], ids=["stale index", "different files"])
def test_a_single_file_takes_precedence_over_an_index(
    same: bool, save_model: Callable[..., str]
) -> None:
    """Saving in one file leaves the index of earlier shards behind; transformers ignores it."""
    from transformers import AutoModelForCausalLM

    target, base = save_model("target"), save_model("base", 1)
    model = AutoModelForCausalLM.from_pretrained(base)
    model.save_pretrained(base, max_shard_size="8KB")
    if same:
        model.save_pretrained(base)
    else:
        changed = {name: t + 1 for name, t in load_file(Path(target) / "model.safetensors").items()}
        save_file(changed, Path(base) / "model.safetensors", metadata={"format": "pt"})
    assert (Path(base) / "model.safetensors.index.json").exists()
    theirs = AutoModelForCausalLM.from_pretrained(base)
    for mlp, layer in zip(load(target, base).base_mlps, theirs.model.layers, strict=True):
        for name, weight in layer.mlp.named_parameters():
            assert torch.equal(mlp.get_parameter(name), weight)
    for name, read in lazy_tensors(base, None, "base").items():
        assert torch.equal(read(), theirs.state_dict()[name])


@pytest.mark.parametrize("role", ["target", "base"])
def test_weights_in_other_files_are_refused(role: str, save_model: Callable[..., str]) -> None:
    """transformers would read other weights than those of the folder's usual files."""
    folders = {"target": save_model("target"), "base": save_model("base", 1)}
    for name in ("other.safetensors", "model.safetensors.index.json"):
        change_config(folders[role], transformers_weights=name)
        with pytest.raises(UserError, match=f"transformers_weights '{name}'"):
            load(**folders)
    change_config(folders[role], transformers_weights=None)
    card = Path(folders[role]) / "adapter_config.json"
    card.write_text(json.dumps({"base_model_name_or_path": "another", "peft_type": "LORA"}))
    with pytest.raises(UserError, match=f"{role}: adapter_config.json stands beside the weights"):
        load(**folders)
