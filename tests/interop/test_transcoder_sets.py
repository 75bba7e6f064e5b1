"""Transcoder sets of circuit-tracer: written, read, and refused where its reader would err."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from sets import SETTINGS, D, F, assert_equal, folder, make_set, outputs, write_cross_layer

from fastadapt.adapter.coder_files import CoderSet
from fastadapt.adapter.hooks import MLP_HOOKS
from fastadapt.adapter.module import AdapterConfig
from fastadapt.adapter.sae import Transcoder
from fastadapt.errors import UserError
from fastadapt.interop.cross_layer import read_cross_layer_set
from fastadapt.interop.thresholds import compare, fit_threshold, with_thresholds
from fastadapt.interop.transcoder_sets import CONFIG, read, read_transcoder_set, write

LOST = ("bandwidth", "initial_threshold")
CASES = [(kind, a) for kind in ("transcoder", "skip") for a in ("relu", "jumprelu")]


@pytest.mark.parametrize("case", CASES, ids=" ".join)
def test_round_trip(case: tuple[str, str], tmp_path: Path) -> None:
    coders, path = make_set(*case, layers=range(12), square=True), folder(tmp_path)
    write(coders, path)
    again = read(path)
    assert again.model == "org/model"
    assert_equal(coders, again, but=LOST)
    overlay = read_transcoder_set(path)  # the reader of fastadapt graph --base_set
    x = torch.randn(20, D, generator=torch.Generator().manual_seed(3))
    for layer, out in outputs(coders, x).items():
        transcoder = overlay.layers[layer]
        theirs = transcoder.decode(transcoder.codes(x), x)
        torch.testing.assert_close(theirs.double(), out, rtol=1e-5, atol=1e-5)


def test_files_have_the_formats_names_and_orientation(tmp_path: Path) -> None:
    coders, path = make_set("skip", "jumprelu", square=True), folder(tmp_path)
    write(coders, path)
    config = yaml.safe_load((path / CONFIG).read_text())
    assert config["model_kind"] == "transcoder_set"
    assert config["model_name"] == "org/model"
    assert (config["feature_input_hook"], config["feature_output_hook"]) == (
        "mlp.hook_in",
        "mlp.hook_out",
    )
    t = load_file(path / "layer_1.safetensors")
    threshold = "activation_function.threshold"
    assert t.keys() == {"W_enc", "b_enc", "W_dec", "b_dec", "W_skip", threshold}
    assert t["W_enc"].shape == t["W_dec"].shape == (F, D)
    # The formula of circuit-tracer's SingleLayerTranscoder, in its own words.
    x = torch.randn(20, D, generator=torch.Generator().manual_seed(9))
    pre = torch.nn.functional.linear(x, t["W_enc"], t["b_enc"])
    out = (pre * (pre > t[threshold])) @ t["W_dec"] + t["b_dec"] + x @ t["W_skip"].T
    torch.testing.assert_close(out.double(), outputs(coders, x)[1], rtol=1e-5, atol=1e-5)


def test_an_adapter_is_refused_and_nothing_is_written(tmp_path: Path) -> None:
    path = folder(tmp_path)
    with pytest.raises(UserError, match=r"in place of the MLPs that they are added to.*graph"):
        write(make_set("adapter", square=True), path)
    assert not any(path.iterdir())
    write(make_set("mlp", square=True), path)  # the control: these replace the MLPs
    assert len(read(path).layers) == 2


@pytest.mark.parametrize(
    ("coders", "reason"),
    [
        (make_set("sae"), "needs transcoders of MLPs, got SAEs"),
        (make_set("transcoder", "topk", square=True), "runs TopK transcoders .* as ReLU"),
        (make_set("transcoder"), "equal widths of input and output, got d_in=5 and d_out=3"),
        (make_set("transcoder", layers=(1, 2), square=True), "every layer from 0 on, got layers 1"),
    ],
)
def test_what_circuit_tracer_lacks_is_refused(
    coders: CoderSet, reason: str, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=reason):
        write(coders, folder(tmp_path))


def test_thresholds_below_zero_are_not_read_as_this_librarys(tmp_path: Path) -> None:
    """There a negative value above its threshold passes; here it does not."""
    coders, path = make_set("transcoder", "jumprelu", square=True), folder(tmp_path)
    write(coders, path)
    file = path / "layer_1.safetensors"
    tensors = load_file(file)
    tensors["activation_function.threshold"][3] = -0.5
    save_file(tensors, file)
    with pytest.raises(UserError, match=r"expected thresholds of at least 0, got -0\.5"):
        read(path).layers[1]()
    with torch.no_grad():
        coder: Any = coders.layers[1]()
        coder.threshold[3] = -0.5
    write(CoderSet.from_modules({0: coder}), folder(tmp_path, "clamped"))
    assert load_file(tmp_path / "clamped" / "layer_0.safetensors").keys() == tensors.keys()
    again: Any = read(tmp_path / "clamped").layers[0]()
    assert torch.equal(again.threshold, coder.threshold.clamp(min=0))


# --- TopK -----------------------------------------------------------------------------------------


def wide_topk(seed: int = 0) -> Any:
    draw = torch.Generator().manual_seed(seed)
    coder: Any = Transcoder(16, AdapterConfig(64, "topk", k=4), skip=True, generator=draw)
    with torch.no_grad():
        coder.W_dec.copy_(torch.randn(coder.W_dec.shape, generator=draw))
        coder.W_skip.copy_(torch.randn(16, 16, generator=draw))
    return coder


def test_a_fitted_threshold_gives_as_many_active_features() -> None:
    coder, x = wide_topk(), torch.randn(300, 16, generator=torch.Generator().manual_seed(1))
    threshold = fit_threshold(coder, x)
    z = x @ coder.W_enc.T + coder.b_enc
    assert int((z > threshold).sum()) == 300 * 4
    sparse, few = wide_topk(), torch.randn(300, 16, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        sparse.b_enc.fill_(-0.9)  # fewer than k pre-activations of most tokens are positive
    positive = (few @ sparse.W_enc.T + sparse.b_enc) > 0
    active = int(positive.sum(1).clamp(max=4).sum())
    assert active < 300 * 4
    threshold = fit_threshold(sparse, few)
    assert int(((few @ sparse.W_enc.T + sparse.b_enc) > threshold).sum()) == active
    with pytest.raises(UserError, match="no feature fires"):
        fit_threshold(sparse, torch.zeros(5, 16))
    with pytest.raises(UserError, match="expected a transcoder with topk to fit, got relu"):
        fit_threshold(Transcoder(16, AdapterConfig(8)), x)


def test_thresholds_are_far_closer_to_topk_than_what_its_reader_would_run(tmp_path: Path) -> None:
    coder, x = wide_topk(), torch.randn(2000, 16, generator=torch.Generator().manual_seed(1))
    coders, fits = with_thresholds(CoderSet.from_modules({0: coder}, MLP_HOOKS), {0: x})
    fit = fits[0]
    assert fit.topk == 4
    assert fit.jumprelu == pytest.approx(4, rel=0.1)
    assert fit.relu == pytest.approx(32, rel=0.05)  # half of the features
    assert fit.error < fit.relu_error / 2
    write(coders, folder(tmp_path))
    again: Any = read(tmp_path / "set").layers[0]()
    assert torch.equal(again.threshold, torch.full((64,), fit.threshold))
    assert torch.equal(again.W_skip, coder.W_skip)
    exact = Transcoder(16, AdapterConfig(64, "jumprelu", **SETTINGS["jumprelu"]))
    exact.load_state_dict({n: t for n, t in again.state_dict().items() if n != "W_skip"})
    assert compare(coder, exact, x[1000:]).error == pytest.approx(fit.error)


# --- cross-layer ----------------------------------------------------------------------------------

LAYERS = 3  # of write_cross_layer


@pytest.mark.parametrize("optional", [True, False])
def test_a_cross_layer_set_follows_its_formula(optional: bool, tmp_path: Path) -> None:
    path = folder(tmp_path)
    weights = write_cross_layer(path, optional=optional)
    clt = read_cross_layer_set(path)
    assert (clt.model, clt.input_hook, clt.output_hook) == (
        "org/model",
        "hook_resid_mid",
        "hook_mlp_out",
    )
    draw = torch.Generator().manual_seed(1)
    inputs = [torch.randn(9, D, generator=draw, dtype=torch.float64) for _ in range(LAYERS)]
    acts = [clt.encode(i, x) for i, x in enumerate(inputs)]
    outs = clt.decode(acts, inputs)
    for i, out in enumerate(outs):
        expected = weights[i]["b_dec"].expand(9, D).clone()
        for source in range(i + 1):
            w = weights[source]
            z = torch.einsum("td,fd->tf", inputs[source], w["W_enc"]) + w["b_enc"]
            a = z * (z > w["threshold"]) if optional else torch.relu(z)
            torch.testing.assert_close(acts[source], a)
            expected += torch.einsum("tf,fd->td", a, w["W_dec"][:, i - source])
        if optional:
            expected += torch.einsum("td,de->te", inputs[i], weights[i]["W_skip"])
        torch.testing.assert_close(out, expected)


def test_cross_layer_sets_that_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"expected a folder with config\.yaml and W_enc_0"):
        read_cross_layer_set(tmp_path)
    path = folder(tmp_path)
    write_cross_layer(path)
    save_file({"W_dec_1": torch.ones(F, 1, D)}, path / "W_dec_1.safetensors")
    with pytest.raises(UserError, match=r"W_dec_1: expected \(7, 2, 5\), got \(7, 1, 5\)"):
        read_cross_layer_set(path)
    (path / "W_enc_1.safetensors").unlink()
    with pytest.raises(UserError, match=r"W_enc_1\.safetensors is missing"):
        read_cross_layer_set(path)
    (path / CONFIG).write_text("model_kind: transcoder_set")
    with pytest.raises(UserError, match="model_kind: expected cross_layer_transcoder"):
        read_cross_layer_set(path)
