"""Adapters: computation, initialisation, and strict reading of their folder."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from fastadapt.adapter.files import save_adapters
from fastadapt.adapter.module import AdapterConfig, TranscoderAdapter
from fastadapt.errors import UserError
from fastadapt.models.trained_files import load_adapters

CONFIGS = {
    "relu": AdapterConfig(40),
    "topk": AdapterConfig(40, "topk", k=4),
    "batch_topk": AdapterConfig(40, "batch_topk", k=1.5),
    "jumprelu": AdapterConfig(40, "jumprelu", bandwidth=0.1, initial_threshold=0.05),
    "without b_dec": AdapterConfig(40, bias=False),
}


def random_adapter(config: AdapterConfig, d_in: int = 12, d_out: int = 10) -> TranscoderAdapter:
    generator = torch.Generator().manual_seed(0)
    adapter = TranscoderAdapter(d_in, config, d_out=d_out, generator=generator)
    with torch.no_grad():
        for p in (adapter.b_enc, adapter.W_dec, adapter.b_dec):
            if p is not None:
                p.copy_(0.1 * torch.randn(p.shape, generator=generator))
    return adapter


def test_a_new_adapter_adds_nothing_and_half_of_its_features_fire() -> None:
    adapter = TranscoderAdapter(64, AdapterConfig(2048), generator=torch.Generator().manual_seed(1))
    x, residual = torch.randn(50, 64), torch.randn(50, 64)
    before = residual.clone()
    out, (penalty, stats, _) = adapter(x, residual)
    assert torch.equal(out, residual)
    assert torch.equal(residual, before)
    assert penalty == 0
    assert abs(stats.n_active / (50 * 2048) - 0.5) < 0.02
    assert adapter.W_enc.abs().max() <= 1 / math.sqrt(64)
    assert adapter.W_enc.std().item() == pytest.approx(1 / math.sqrt(3 * 64), rel=0.02)


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("training", [True, False])
def test_encode_then_decode_is_forward(name: str, training: bool) -> None:
    adapter = random_adapter(CONFIGS[name]).train(training)
    if name == "batch_topk":
        adapter.update_threshold(torch.tensor(0.08))
    for lead in ((), (9,), (2, 9), (2, 1, 9), (2, 2, 3, 3)):
        x = torch.randn(*lead, 12)
        a = adapter.encode(x)
        assert a.shape == (*x.shape[:-1], 40)
        out, aux = adapter(x, return_codes=True)
        torch.testing.assert_close(adapter.decode(a), out)
        torch.testing.assert_close(aux.codes.values, a[a != 0])
        assert aux.stats.n_active == (a > 0).sum()
        expected = (a * adapter.W_dec.norm(dim=1)).sum()
        torch.testing.assert_close(aux.penalty, expected)


def test_encode_compares_with_a_running_threshold_in_its_own_dtype() -> None:
    """In bfloat16, 0.1 is 0.1001: above a threshold of 0.1, and equal to the rounded one."""
    adapter = TranscoderAdapter(12, CONFIGS["batch_topk"], dtype=torch.bfloat16).eval()
    adapter.update_threshold(torch.tensor(0.1))
    with torch.no_grad():
        adapter.W_enc.zero_()
        adapter.b_enc.fill_(0.1)
    x = torch.zeros(3, 12, dtype=torch.bfloat16)
    assert adapter(x)[1].stats.n_active == (adapter.encode(x) > 0).sum() == 3 * 40


def test_an_adapter_without_b_dec_is_one_whose_b_dec_is_frozen_at_0(tmp_path: Path) -> None:
    """Nothing is trained, counted or stored of it; outputs and gradients are equal to the bit."""
    bare, frozen = random_adapter(CONFIGS["without b_dec"]), random_adapter(CONFIGS["relu"])
    assert {name for name, _ in bare.named_parameters()} == {"W_enc", "b_enc", "W_dec"}
    assert bare.state_dict().keys() == {"W_enc", "b_enc", "W_dec"}
    with torch.no_grad():
        assert frozen.b_dec is not None
        frozen.b_dec.requires_grad_(False).zero_()
    results = []
    for adapter in (bare, frozen):
        x = torch.randn(7, 12, generator=torch.Generator().manual_seed(5), requires_grad=True)
        out, aux = adapter(x)
        (out.square().sum() + aux.penalty).backward()
        tensors = (x, adapter.W_enc, adapter.b_enc, adapter.W_dec)
        with torch.no_grad():
            results.append([out, adapter.transcode(x), *(t.grad for t in tensors)])
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(*results, strict=True))
    save_adapters([bare, bare], tmp_path)
    assert "b_dec" not in load_file(tmp_path / "layer_1.safetensors")
    edit_tensors(tmp_path, lambda tensors: tensors.update(b_dec=torch.zeros(10)))
    with pytest.raises(UserError, match="b_dec"):
        load_adapters(tmp_path)


def test_folders_without_the_setting_have_b_dec(tmp_path: Path) -> None:
    save_adapters([random_adapter(CONFIGS["relu"]) for _ in range(2)], tmp_path)
    file = tmp_path / "fastadapt.json"
    card = json.loads(file.read_text())
    assert card["adapter"].pop("bias") is True
    file.write_text(json.dumps(card))
    (first, _), _ = load_adapters(tmp_path)
    assert isinstance(first, TranscoderAdapter)
    assert first.config.bias
    assert first.b_dec is not None


def test_batch_topk_ranks_in_training_and_thresholds_after() -> None:
    adapter = random_adapter(CONFIGS["batch_topk"])
    x = torch.randn(2, 8, 12)
    _, aux = adapter(x)
    assert aux.stats.n_active == 2 * 12
    adapter.update_threshold(aux.stats.min_active)
    assert adapter.threshold == aux.stats.min_active
    adapter.update_threshold(torch.tensor(float("nan")))
    assert adapter.threshold == aux.stats.min_active
    adapter.update_threshold(torch.tensor(1.0), decay=0.75)
    assert adapter.threshold.item() == pytest.approx(0.75 * aux.stats.min_active.item() + 0.25)
    adapter.eval()
    z = x @ adapter.W_enc.T + adapter.b_enc
    torch.testing.assert_close(adapter.encode(x), z * (z > adapter.threshold))
    causal = torch.cat([adapter(x[:, :t])[0][:, -1:] for t in range(1, 9)], 1)
    torch.testing.assert_close(causal, adapter(x)[0])
    with pytest.raises(UserError, match="relu has no running threshold"):
        random_adapter(CONFIGS["relu"]).update_threshold(torch.tensor(1.0))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_dtypes(dtype: torch.dtype) -> None:
    adapter: Any = random_adapter(CONFIGS["relu"]).to(dtype)
    out, aux = adapter(torch.randn(5, 12, dtype=dtype))
    assert out.dtype == dtype
    assert aux.penalty.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    (out.sum() + aux.penalty).backward()
    assert all(p.grad.dtype == dtype for p in adapter.parameters())


@pytest.mark.parametrize("name", CONFIGS)
def test_saved_adapters_are_loaded_unchanged(name: str, tmp_path: Path) -> None:
    adapters = [random_adapter(CONFIGS[name]) for _ in range(3)]
    if name == "batch_topk":
        adapters[1].update_threshold(torch.tensor(0.3))
    save_adapters(adapters, tmp_path / "set", {"l0_mean": 1.5})
    loaded, metadata = load_adapters(tmp_path / "set")
    assert metadata == {"l0_mean": 1.5}
    for ours, theirs in zip(adapters, loaded, strict=True):
        assert theirs.config == ours.config
        assert set(theirs.state_dict()) == set(ours.state_dict())
        for key, value in ours.state_dict().items():
            assert torch.equal(value, theirs.state_dict()[key])
        assert all(p.requires_grad for p in theirs.parameters())
    half, _ = load_adapters(tmp_path / "set", dtype=torch.bfloat16)
    assert half[0].W_enc.dtype == torch.bfloat16
    card = json.loads((tmp_path / "set" / "fastadapt.json").read_text())
    assert card["additive"] is True
    assert card["orientation"]["W_dec"] == "[n_features, d_out]"


def edit_tensors(folder: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    file = folder / "layer_1.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)


def edit_card(folder: Path, **changes: Any) -> None:
    file = folder / "fastadapt.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def edit_settings(folder: Path, **changes: Any) -> None:
    settings = json.loads((folder / "fastadapt.json").read_text())["adapter"]
    edit_card(folder, adapter={**settings, **changes})


FAULTS = {
    "missing tensor": (
        lambda f: edit_tensors(f, lambda t: t.pop("b_dec")),
        r"layer_1\.safetensors: tensor b_dec: expected \(10,\), got none",
    ),
    "extra tensor": (
        lambda f: edit_tensors(f, lambda t: t.update(W_skip=torch.ones(2))),
        r"layer_1\.safetensors: tensor W_skip: expected none, got \(2,\)",
    ),
    "transposed decoder": (
        lambda f: edit_tensors(f, lambda t: t.update(W_dec=t["W_dec"].T.contiguous())),
        r"tensor W_dec: expected \(40, 10\), got \(10, 40\)",
    ),
    "missing layer": (
        lambda f: (f / "layer_1.safetensors").unlink(),
        r"missing \['layer_1\.safetensors'\]",
    ),
    "extra layer": (
        lambda f: (f / "layer_7.safetensors").write_bytes(b""),
        r"unexpected \['layer_7\.safetensors'\]",
    ),
    "truncated": (
        lambda f: (f / "layer_0.safetensors").write_bytes(
            (f / "layer_0.safetensors").read_bytes()[:-8]
        ),
        r"layer_0\.safetensors is truncated or damaged",
    ),
    "no card": (lambda f: (f / "fastadapt.json").unlink(), r"fastadapt\.json is missing"),
    "broken card": (
        lambda f: (f / "fastadapt.json").write_text("{"),
        r"fastadapt\.json is not valid JSON",
    ),
    "list card": (lambda f: (f / "fastadapt.json").write_text("[]"), "expected object, got array"),
    "newer schema": (lambda f: edit_card(f, schema_version=99), "schema_version is 99"),
    "replacement": (lambda f: edit_card(f, additive=False), "'additive' must be true"),
    "no width": (lambda f: edit_card(f, d_in="wide"), "d_in: expected int"),
    "flag for a width": (lambda f: edit_card(f, d_in=True), "d_in: expected int"),
    "no metadata": (lambda f: edit_card(f, metadata=None), "metadata: expected object"),
    "unknown setting": (
        lambda f: edit_settings(f, colour=1),
        r"'adapter' has unknown settings \['colour'\]",
    ),
    "missing settings": (
        lambda f: edit_card(f, adapter={}),
        r"adapter: object missing required field",
    ),
    "text for a number": (
        lambda f: edit_settings(f, n_features="40"),
        r"adapter\.n_features: expected int, got str",
    ),
    "integers for weights": (
        lambda f: edit_tensors(f, lambda t: t.update(W_enc=t["W_enc"].long())),
        r"layer_1\.safetensors: tensor W_enc: expected floating point .*, got int64",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_faulty_folder_is_refused(fault: str, tmp_path: Path) -> None:
    save_adapters([random_adapter(CONFIGS["relu"]) for _ in range(2)], tmp_path)
    spoil, message = FAULTS[fault]
    spoil(tmp_path)
    with pytest.raises(UserError, match=message):
        load_adapters(tmp_path)


def test_adapters_of_one_folder_must_be_alike(tmp_path: Path) -> None:
    mixed = [random_adapter(CONFIGS["relu"]), random_adapter(CONFIGS["topk"])]
    with pytest.raises(UserError, match="layer 1 differs from layer 0"):
        save_adapters(mixed, tmp_path)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"n_features": 0}, "n_features must be at least 1"),
        ({"activation": "gelu"}, "activation must be one of relu, topk"),
        ({"activation": "topk"}, "k is needed"),
        ({"k": 3}, "k is not used"),
        ({"activation": "topk", "k": 2.5}, "must be an integer"),
        ({"activation": "topk", "k": 9, "n_features": 8}, r"in \(0, n_features=8\], got 9"),
        ({"activation": "jumprelu", "bandwidth": 0.1}, "initial_threshold is needed"),
        ({"bandwidth": 0.1}, "bandwidth is not used"),
        (
            {"activation": "jumprelu", "bandwidth": 0.1, "initial_threshold": -1.0},
            "initial_threshold must be a positive, finite number",
        ),
    ],
)
def test_impossible_settings(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        AdapterConfig(**settings)


@pytest.mark.parametrize(
    ("implementation", "device", "dtype", "message"),
    [
        ("auto", "cuda", "float64", ""),
        ("sparse", "cpu", "bfloat16", ""),
        ("sparse", "cuda", "float32", "'sparse' runs on a CPU, and the device is cuda"),
        ("triton", "cuda", "bfloat16", ""),
        ("triton", "meta", "bfloat16", ""),
        ("triton", "cpu", "float32", ""),  # interpreted
        ("triton", "mps", "float32", "'triton' needs a GPU, and the device is mps; use 'auto'"),
        ("triton", "cuda", "float64", "'triton' computes in float32 at most"),
        ("triton", "cpu", "bfloat16", "interpreted on a CPU"),
    ],
)
def test_where_implementations_run(
    implementation: str, device: str, dtype: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    config = AdapterConfig(8, implementation=implementation)
    with pytest.raises(UserError, match=message) if message else nullcontext():
        config.check_runs(torch.device(device), getattr(torch, dtype))


@pytest.mark.parametrize("family", ["qwen", {"user": "> "}])
def test_a_process_that_reads_adapters_ends_well(family: Any, tmp_path: Path) -> None:
    """A schema that msgspec frees wrongly aborts the process at its end."""
    save_adapters([random_adapter(CONFIGS["relu"])], tmp_path / "set", {"family": family})
    program = f"""
from fastadapt.models.trained_files import load_adapters
assert load_adapters({str(tmp_path / "set")!r})[1]["family"] == {family!r}
"""
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (ended.returncode, ended.stderr) == (0, "")
