"""Files of SAELens: orientation, round trips, and that no adapter replaces an MLP there."""

from __future__ import annotations

import json
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from sets import D_OUT, D, F, assert_equal, folder, make_set, outputs

from fastadapt.adapter.coder_files import CoderSet, read_coders, save_coders
from fastadapt.adapter.hooks import PLACES
from fastadapt.errors import UserError
from fastadapt.interop import saelens, transcoder_sets
from fastadapt.interop.saelens import WEIGHTS, attach, read, write
from fastadapt.interop.saelens_config import CONFIG
from fastadapt.interop.saelens_splice import notes
from fastadapt.models.architectures import ARCHITECTURES
from fastadapt.organism import FOLDER

#: Kind of coder and activation, and SAELens' architecture.
CASES = {
    ("sae", "relu"): "standard",
    ("subtracting sae", "relu"): "standard",
    ("sae", "topk"): "topk",
    ("sae", "jumprelu"): "jumprelu",
    ("transcoder", "relu"): "transcoder",
    ("transcoder", "jumprelu"): "jumprelu_transcoder",
    ("skip", "relu"): "skip_transcoder",
    ("skip", "jumprelu"): "jumprelu_skip_transcoder",
    ("adapter", "relu"): "transcoder",
    ("adapter", "jumprelu"): "jumprelu_transcoder",
}


def config_of(path: Path, layer: int = 0) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((path / f"layer_{layer}" / CONFIG).read_text())
    return config


@pytest.mark.parametrize("case", CASES, ids=" ".join)
def test_round_trip(case: tuple[str, str], tmp_path: Path) -> None:
    coders, path = make_set(*case, layers=(0, 3, 12)), folder(tmp_path)
    write(coders, path)
    assert config_of(path, 12)["architecture"] == CASES[case]
    again = read(path)
    assert list(again.layers) == [0, 3, 12]
    assert again.model == "org/model"
    assert_equal(coders, again)
    assert_equal(
        CoderSet.from_modules({3: coders.layers[3]()}, coders.hooks), read(path / "layer_3")
    )


def test_tensors_have_the_formats_orientation(tmp_path: Path) -> None:
    coders, path = make_set("skip", "jumprelu"), folder(tmp_path)
    write(coders, path)
    tensors = load_file(path / "layer_1" / WEIGHTS)
    coder: Any = coders.layers[1]()
    assert tensors["W_enc"].shape == (D, F)
    assert tensors["W_dec"].shape == (F, D_OUT)
    assert tensors["W_skip"].shape == (D_OUT, D)
    assert torch.equal(tensors["W_enc"][2, 6], coder.W_enc[6, 2])
    # The formula of SAELens' transcoder, in its own words.
    x = torch.randn(20, D, generator=torch.Generator().manual_seed(9))
    pre = x @ tensors["W_enc"] + tensors["b_enc"]
    acts = torch.relu(pre) * (pre > tensors["threshold"])
    out = acts @ tensors["W_dec"] + tensors["b_dec"] + x @ tensors["W_skip"].T
    torch.testing.assert_close(out.double(), outputs(coders, x)[1], rtol=1e-5, atol=1e-5)


def test_a_file_that_saelens_has_written_is_read(tmp_path: Path) -> None:
    """An SAE of SAELens 6 with a hook in the residual stream, and one of version 3."""
    tensors = {
        "W_enc": torch.arange(1.0, 1 + D * F).view(D, F),
        "b_enc": torch.arange(7.0),
        "W_dec": torch.arange(1.0, 1 + F * D).view(F, D),
        "b_dec": torch.arange(5.0),
    }
    config = {"d_in": D, "d_sae": F, "dtype": "float32", "device": "cpu"}
    path = folder(tmp_path)
    save_file(tensors, path / WEIGHTS)
    six = {"architecture": "topk", "k": 3, "apply_b_dec_to_input": True}
    meta = {"sae_lens_version": "6.2.0", "hook_name": "blocks.8.hook_resid_post"}
    (path / CONFIG).write_text(
        json.dumps({**config, **six, "metadata": {**meta, "model_name": "gpt2-small"}})
    )
    coders = read(path)
    sae: Any = coders.layers[8]()
    assert (coders.model, sae.subtract_b_dec, sae.config.k) == ("gpt2-small", True, 3)
    assert coders.hooks == (PLACES["resid_post"], PLACES["resid_post"])
    assert torch.equal(sae.W_enc, tensors["W_enc"].T)
    assert torch.equal(sae.W_dec, tensors["W_dec"])
    three = {
        "activation_fn_str": "topk",
        "activation_fn_kwargs": {"k": 4},
        "hook_point": "blocks.2.hook_resid_pre",
        "model_name": "gpt2-small",
        "normalize_activations": False,
    }
    (path / CONFIG).write_text(json.dumps({**config, **three}))
    coders = read(path)
    assert (list(coders.layers), coders.empty.config.k) == ([2], 4)
    assert coders.hooks.input == PLACES["resid_pre"]


def test_a_scaling_factor_of_ones_is_dropped(tmp_path: Path) -> None:
    """Versions before 4 wrote the tensor, which SAELens drops if it holds ones."""
    path = folder(tmp_path)
    tensors = {
        "W_enc": torch.ones(D, F),
        "b_enc": torch.ones(F),
        "W_dec": torch.ones(F, D),
        "b_dec": torch.ones(D),
        "scaling_factor": torch.ones(F),
    }
    config = {"d_in": D, "d_sae": F, "hook_point": "blocks.2.hook_resid_pre"}
    (path / CONFIG).write_text(json.dumps(config))
    save_file(tensors, path / WEIGHTS)
    assert torch.equal(read(path).layers[2]().W_dec, tensors["W_dec"])
    save_file({**tensors, "scaling_factor": torch.full((F,), 1.5)}, path / WEIGHTS)
    with pytest.raises(UserError, match="tensor scaling_factor: expected ones"):
        read(path).layers[2]()


@pytest.mark.parametrize(
    ("changes", "refused"),
    [
        ({"hook_name": "blocks.2.attn.hook_z"}, True),
        ({"hook_point": "blocks.2.attn.hook_z"}, True),
        ({"hook_point": "blocks.2.attn.hook_z", "sae_lens_version": "5.10.7"}, True),
        ({"hook_name": "blocks.2.attn.hook_z", "reshape_activations": "none"}, False),
        (
            {"metadata": {"hook_name": "blocks.2.attn.hook_z", "sae_lens_version": "6.0.0"}},
            False,
        ),
    ],
)
def test_older_files_reshape_heads(changes: dict[str, Any], refused: bool, tmp_path: Path) -> None:
    path = folder(tmp_path)
    (path / CONFIG).write_text(json.dumps({"d_in": D, "d_sae": F, **changes}))
    (path / WEIGHTS).write_bytes(b"")
    reason = "reshape_activations: expected none, got 'hook_z'; this library has no SAEs of"
    with pytest.raises(UserError, match=reason) if refused else nullcontext():
        assert list(read(path).layers) == [2]


def test_batch_topk_is_jumprelu_with_its_threshold(tmp_path: Path) -> None:
    coders, path = make_set("transcoder", "batch_topk"), folder(tmp_path)
    write(coders, path)
    again = read(path)
    assert again.empty.config.activation == "jumprelu"
    x = torch.randn(30, D, generator=torch.Generator().manual_seed(1))
    for layer, out in outputs(coders, x).items():
        torch.testing.assert_close(outputs(again, x)[layer], out, rtol=0, atol=0)


@pytest.mark.parametrize("module", [saelens, transcoder_sets])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_same_features_fire_in_16_bits(module: Any, dtype: torch.dtype, tmp_path: Path) -> None:
    """The threshold is float32, and lies between two values of the weights' dtype."""
    coders = make_set("transcoder", "batch_topk", layers=(0,), square=True)
    coder = coders.layers[0]().to(dtype)
    x = torch.randn(20_000, D, generator=torch.Generator().manual_seed(1)).to(dtype)
    differing = 0
    for threshold in (0.3019, 0.3, 1.0):
        coder.threshold = torch.tensor(threshold)
        active = coder.encode(x) > 0
        path = folder(tmp_path, str(threshold))
        module.write(CoderSet.from_modules({0: coder}), path)
        again: Any = module.read(path).layers[0]()
        assert again.threshold.dtype == dtype
        assert torch.equal(again.encode(x) > 0, active)
        again.threshold.data = coder.threshold.to(dtype).expand(F)  # the control: to the nearest
        differing += int(((again.encode(x) > 0) != active).sum())
    assert differing > 0


def test_a_run_of_whole_mlps_comes_back_as_one(tmp_path: Path) -> None:
    coders, path = make_set("mlp", square=True), folder(tmp_path)
    write(coders, path)
    save_coders(read(path), tmp_path / "ours")
    assert_equal(coders, read_coders(tmp_path / "ours"))


@pytest.mark.parametrize("architecture", [*ARCHITECTURES, None])
def test_the_output_hook_is_that_of_the_mlp(architecture: str | None, tmp_path: Path) -> None:
    """What a block adds to the stream is another tensor where a norm follows the MLP."""
    coders, path = make_set("transcoder"), folder(tmp_path)
    write(CoderSet(coders.empty, coders.layers, metadata={"architecture": architecture}), path)
    metadata = config_of(path, 1)["metadata"]
    after = architecture in (None, "gemma2", "gemma3_text", "gemma4_text", "glm4", "olmo2")
    assert metadata["hook_name"] == "blocks.1.mlp.hook_in"
    expected = "blocks.1.mlp.hook_out" if after else "blocks.1.hook_mlp_out"
    assert metadata["hook_name_out"] == expected
    assert metadata["model_from_pretrained_kwargs"] == {"fold_ln": False}


def test_an_adapter_has_no_hook_that_add_sae_finds(tmp_path: Path) -> None:
    """SAELens' ``add_sae`` skips a coder, with a warning, if the model lacks its hook."""
    for kind, skipped in (("adapter", True), ("skip", True), ("transcoder", False), ("mlp", False)):
        path = folder(tmp_path, kind)
        write(make_set(kind), path)
        metadata = config_of(path)["metadata"]
        hooks = {"blocks.0.mlp.hook_in", "blocks.0.hook_mlp_out"}
        assert (metadata["hook_name"] not in hooks) == skipped
        assert ("fastadapt.interop.saelens.attach" in metadata["hook_name"]) == skipped
        assert metadata["fastadapt"]["additive"] == (kind == "adapter")


@pytest.mark.parametrize("kind", ["adapter", "skip"])
@pytest.mark.parametrize("facts", [None, "removed", "other"])
def test_an_adapter_is_read_as_nothing_else(kind: str, facts: str | None, tmp_path: Path) -> None:
    """Without its record, an adapter would replace the MLP to whose output it is added."""
    path = folder(tmp_path)
    write(make_set(kind, layers=(0,), square=True), path)
    assert read(path).is_additive == (kind == "adapter")  # the control
    config = config_of(path)
    if facts == "other":
        config["metadata"]["fastadapt"]["additive"] = kind != "adapter"
    elif facts == "removed":
        del config["metadata"]["fastadapt"]
    else:
        config["metadata"]["fastadapt"] = None
    (path / "layer_0" / CONFIG).write_text(json.dumps(config))
    reason = r"layer_0/cfg\.json: (metadata\.fastadapt\.additive: expected|.*adapter has no skip)"
    with pytest.raises(UserError, match=reason):
        read(path)


class Point:
    """Hook point of TransformerLens, as far as ``attach`` uses it."""

    def __init__(self) -> None:
        self.fwd_hooks: list[Any] = []

    def add_hook(self, hook: Any, dir: str = "fwd", is_permanent: bool = False) -> None:
        assert (dir, is_permanent) == ("fwd", True)
        self.fwd_hooks.append(SimpleNamespace(user_hook=hook))

    def __call__(self, tensor: torch.Tensor) -> torch.Tensor:
        for handle in self.fwd_hooks:
            tensor = handle.user_hook(tensor, hook=self)
        return tensor


class Theirs:
    """A coder of SAELens, as far as ``attach`` uses it: it returns ones."""

    def __init__(self, path: Path, layer: int = 0) -> None:
        metadata = SimpleNamespace(**config_of(path, layer)["metadata"])
        self.cfg = SimpleNamespace(metadata=metadata)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return torch.ones_like(x)


def model_of(mlps: dict[int, torch.Tensor] | None = None, **cfg: str) -> Any:
    """Return a model of TransformerLens, as far as ``attach`` uses it, with ``W_out`` of MLPs."""
    names = ("blocks.0.mlp.hook_in", "blocks.0.mlp.hook_out")
    blocks = {i: SimpleNamespace(mlp=SimpleNamespace(W_out=w)) for i, w in (mlps or {}).items()}
    points = {name: Point() for name in names}
    return SimpleNamespace(hook_dict=points, cfg=SimpleNamespace(**cfg), blocks=blocks)


def test_attach_refuses_a_second_coder_and_folded_norms(tmp_path: Path) -> None:
    coders, path = make_set("adapter", layers=(0,), square=True), folder(tmp_path)
    write(CoderSet(coders.empty, coders.layers), path)
    model, theirs = model_of(normalization_type="RMS"), Theirs(path)
    read_point, write_point = model.hook_dict.values()
    with pytest.raises(UserError, match=r"attached to blocks\.0\.mlp\.hook_out already"):
        attach(model, [theirs, theirs])
    assert not write_point.fwd_hooks
    attach(model, [theirs])
    with pytest.raises(UserError, match=r"already.*reset_hooks\(including_permanent=True\)"):
        attach(model, [theirs])
    read_point(torch.zeros(2))
    assert write_point(torch.zeros(2)).tolist() == [1, 1]
    # The control: after their reset, coders can be attached again.
    read_point.fwd_hooks, write_point.fwd_hooks = [], []
    attach(model, [theirs])
    for folded in ("RMSPre", "LNPre"):
        with pytest.raises(UserError, match=r"norms are folded.*from_pretrained_no_processing"):
            attach(model_of(normalization_type=folded), [theirs])


def organism_mlp(role: str) -> torch.Tensor:
    """Return ``W_out`` of layer 0, as TransformerLens holds it."""
    weights = load_file(FOLDER / role / "model.safetensors")
    return weights["model.layers.0.mlp.down_proj.weight"].T


@pytest.mark.parametrize("base", ["organism/base", "organism/target"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_attach_refuses_the_mlps_of_another_model(
    base: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    """``intervene --onto-target`` names the target as base, since its MLPs stay."""
    coders, path = make_set("adapter", layers=(0,), square=True), folder(tmp_path)
    metadata = {"target": "organism/target", "base": base, "interventions": []}
    write(replace(coders, model="organism/target", metadata=metadata), path)
    theirs = Theirs(path)
    assert theirs.cfg.metadata.fastadapt["base"] == base
    assert read(path).metadata["base"] == base
    role = base.partition("/")[2]
    other = "target" if role == "base" else "base"
    attach(model_of({0: organism_mlp(role).to(dtype)}), [theirs])
    attach(model_of({0: organism_mlp(role).bfloat16().to(dtype)}), [theirs])
    model = model_of({0: organism_mlp(other).to(dtype)})
    with pytest.raises(UserError, match=f"MLP of layer 0 is not that of {base}") as refused:
        attach(model, [theirs])
    assert ("block.mlp = other.mlp" in str(refused.value)) == (role == "base")
    assert not any(point.fwd_hooks for point in model.hook_dict.values())


def test_the_output_hook_of_runs_that_record_no_architecture(tmp_path: Path) -> None:
    """Runs of version 0.1.0, imported sets and ``save_adapters``: their target's config.json."""
    coders = make_set("transcoder", layers=(0,))
    for model, hook in (("organism/target", "hook_mlp_out"), ("no/such", "mlp.hook_out")):
        path = folder(tmp_path, hook)
        write(CoderSet(coders.empty, coders.layers, model=model), path)
        assert config_of(path)["metadata"]["hook_name_out"] == f"blocks.0.{hook}"
        assert (notes(path / "layer_0") == []) == (hook == "hook_mlp_out")
    points = {"blocks.0.mlp.hook_in": Point(), "blocks.0.hook_mlp_out": Point()}
    with pytest.raises(UserError, match="export again where the target"):
        attach(SimpleNamespace(hook_dict=points), [Theirs(path)])


@pytest.mark.parametrize("out_hook", ["blocks.0.hook_mlp_out", "blocks.0.mlp.hook_out"])
@pytest.mark.parametrize("kind", ["adapter", "skip", "transcoder"])
def test_attach_adds_adapters_and_replaces_by_transcoders(
    kind: str, out_hook: str, tmp_path: Path
) -> None:
    coders, path = make_set(kind, layers=(0,)), folder(tmp_path)
    write(coders, path)
    coder: Any = coders.layers[0]()

    class Computing(Theirs):
        def __call__(self, x: torch.Tensor) -> torch.Tensor:
            out: Any = coder(x)
            return out[0] if kind == "adapter" else out

    theirs = Computing(path)
    points = {"blocks.0.mlp.hook_in": Point(), out_hook: Point()}
    attach(SimpleNamespace(hook_dict=points), [theirs])
    x, mlp = torch.randn(4, D), torch.randn(4, D_OUT)
    points["blocks.0.mlp.hook_in"](x)
    out = points[out_hook](mlp)
    torch.testing.assert_close(out, theirs(x) + (mlp if kind == "adapter" else 0))
    with pytest.raises(UserError, match=r"the model has no hook blocks\.0\.mlp\.hook_in"):
        attach(SimpleNamespace(hook_dict={}), [theirs])
    del theirs.cfg.metadata.fastadapt
    with pytest.raises(UserError, match=r"without metadata\.fastadapt"):
        attach(SimpleNamespace(hook_dict=points), [theirs])


def test_what_saelens_lacks_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="transcoders with ReLU and JumpReLU, got topk"):
        write(make_set("transcoder", "topk"), folder(tmp_path))


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "scaled": ({"normalize_activations": "layer_norm"}, "normalize_activations: expected none"),
    "heads": ({"reshape_activations": "hook_z"}, "reshape_activations: expected none"),
    "gated": ({"architecture": "gated"}, "architecture: expected one of standard, topk"),
    "norms": ({"rescale_acts_by_decoder_norm": True}, "rescale_acts_by_decoder_norm: expected F"),
    "tanh": ({"activation_fn": "tanh-relu"}, "activation_fn: expected relu or topk"),
    "no k": ({"architecture": "topk"}, "k: expected 1 to d_sae=7, got None"),
    "a head": (
        {"metadata": {"hook_name": "blocks.0.attn.hook_z", "hook_head_index": 3}},
        "hook_head_index: expected null, a whole hook, got head 3",
    ),
    "a head in an older file": ({"hook_point_head_index": 0}, "hook_head_index: .* got head 0"),
    "folded": (
        {
            "metadata": {
                "hook_name": "blocks.1.mlp.hook_in",
                "model_from_pretrained_kwargs": {"fold_ln": True},
            }
        },
        "fold_ln: expected false for mlp.hook_in",
    ),
    "forged": (
        {
            "metadata": {
                "fastadapt": {
                    "additive": True,
                    "hooks": {"input": {"huggingface": "a"}, "output": {"huggingface": "b"}},
                }
            }
        },
        r"metadata\.fastadapt\.hooks: expected those of the MLP for an adapter",
    ),
    "subtracting": ({"apply_b_dec_to_input": True}, "apply_b_dec_to_input: expected false"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_this_library_does_not_compute_is_refused(case: str, tmp_path: Path) -> None:
    path = folder(tmp_path)
    write(make_set("transcoder"), path)
    changes, reason = REFUSED[case]
    (path / "layer_1" / CONFIG).write_text(json.dumps({**config_of(path, 1), **changes}))
    with pytest.raises(UserError, match=reason):
        read(path)


def test_layers_that_differ_are_read_apart(tmp_path: Path) -> None:
    path = folder(tmp_path)
    write(make_set("transcoder", layers=(1, 4)), path)
    config = config_of(path, 4)
    config["metadata"]["model_name"] = "org/other"
    (path / "layer_4" / CONFIG).write_text(json.dumps(config))
    with pytest.raises(UserError, match="layer 4 differs from layer 1"):
        read(path)
    config = config_of(path, 1)
    (path / "layer_4" / CONFIG).write_text(json.dumps(config))
    with pytest.raises(UserError, match="two of layer 1"):
        read(path)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_architectures_with_a_norm_behind_the_mlp(architecture: str) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(architecture, num_hidden_layers=1)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    block = model.model.layers[0]
    has_norm = any(hasattr(block, f"post_{mlp}_layernorm") for mlp in ("feedforward", "mlp"))
    assert has_norm == ARCHITECTURES[architecture].post_norm
