"""Scales of planted features, whose share in either MLP is known, and of any by least squares."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from organism_runs import make_run
from torch import Tensor, nn

from fastadapt.adapter.module import AdapterConfig
from fastadapt.batch import Batch
from fastadapt.data.batches import collate
from fastadapt.data.sequences import Sample
from fastadapt.errors import RunError
from fastadapt.features.collect import CollectConfig, collect, exact_sums
from fastadapt.features.collect.layer_codes import Outputs, record_outputs, walk
from fastadapt.features.collect.scale_sums import ScaleSums, scales_of
from fastadapt.features.store.schema import MANIFEST
from fastadapt.features.store.store import Store
from fastadapt.models.block_inputs import record_module_inputs
from fastadapt.models.replacement import ReplacementModel

#: What base and target write along the direction of each feature, in multiples of the feature.
DOUBLED, NEW, CANCELLED, USELESS = (1.0, 2.0), (0.0, 1.0), (-1.0, 0.0), (0.0, 0.0)
PLANTED = (DOUBLED, NEW, CANCELLED, USELESS)
F = len(PLANTED)


class PlantedMLP(nn.Module):
    """``gain_i · a_i(x) d_i`` summed over features, a constant, and a burst at the first token."""

    def __init__(self, adapter: Any, gains: Tensor, constant: Tensor, burst: Tensor) -> None:
        super().__init__()
        self.adapter, self.gains, self.constant, self.burst = adapter, gains, constant, burst

    def forward(self, x: Tensor) -> Tensor:
        directions = self.adapter.W_dec.detach()
        out = (self.adapter.encode(x) * self.gains) @ directions + self.constant
        out[:, 0] += self.burst
        return out


def batch_of(*lengths: int) -> Batch:
    rows = [torch.randint(3, 40, (n,)) for n in lengths]
    return collate([Sample(i, row, row) for i, row in enumerate(rows)], 2)


def planted(make_pair: Callable[..., Any], directions: Tensor | None = None) -> Any:
    """Return a model in float64 whose MLPs differ by ``PLANTED`` along the adapters' rows."""
    model: Any = ReplacementModel.create(make_pair("qwen2", "float64"), AdapterConfig(F)).eval()
    with torch.no_grad():
        for mlp in model.mlps:
            width = mlp.adapter.d_in
            rows = torch.linalg.qr(torch.randn(width, F, dtype=torch.float64))[0].T
            mlp.adapter.W_dec.copy_(rows if directions is None else directions @ rows)
            mlp.adapter.b_dec.normal_()
            constant = 5 * rows.sum(0) + torch.randn(width, dtype=torch.float64)
            for name, which in (("base", 0), ("target", 1)):
                gains = torch.tensor([pair[which] for pair in PLANTED], dtype=torch.float64)
                shift = constant + (mlp.adapter.b_dec.detach() if which else 0)
                setattr(mlp, name, PlantedMLP(mlp.adapter, gains, shift, 1e3 * rows.sum(0)))
    fire_on_half(model, batch_of(40, 30))
    return model


@torch.no_grad()
def fire_on_half(model: Any, batch: Batch) -> None:
    """Set ``b_enc`` so that each feature is active on half of a batch's tokens."""
    for layer, adapter in enumerate(model.adapters):
        with record_module_inputs(adapter) as seen:
            next(number for number, _ in walk(model, batch, {}) if number == layer)
        adapter.b_enc.copy_(-(seen[0][batch.real] @ adapter.W_enc.T).median(0).values)


def sums_of(model: Any, batches: list[Batch], *, first: bool = False) -> ScaleSums:
    """Return the sums over batches; ``first``: count the first token of each text, too."""
    sums = ScaleSums(model.n_layers * model.n_features, torch.device("cpu"))
    for batch in batches:
        counted = batch.real.clone()
        counted[:, 0] &= first
        with record_outputs(model) as outputs_of:
            for layer, codes in walk(model, batch, {}):
                W_dec = model.adapters[layer].W_dec.detach()
                sums.add(layer, codes["adapter"], outputs_of(layer), W_dec, counted.flatten())
    return sums


def tokens_of(batches: list[Batch], *, first: bool = False) -> int:
    return sum(int(b.real.sum()) - (0 if first else len(b.real)) for b in batches)


def scales(model: Any, batches: list[Batch], **how: bool) -> np.ndarray:
    """Return base, target and difference scales: ``[L, F, 3]``."""
    fitted = scales_of(sums_of(model, batches, **how).sums, tokens_of(batches, **how))
    return torch.stack(fitted, -1).view(model.n_layers, -1, 3).numpy()


EXACT = np.array([[base, target, 1.0] for base, target in PLANTED])
EXACT[PLANTED.index(USELESS), 2] = 0.0  # the difference has nothing of it


def test_planted_features(make_pair: Callable[..., Any]) -> None:
    """One doubles what the base writes, one is new, one cancels, and one is in neither MLP."""
    model, batches = planted(make_pair), [batch_of(30, 21), batch_of(26)]
    np.testing.assert_allclose(scales(model, batches), [EXACT] * model.n_layers, atol=1e-9)
    # Controls: without centring, the constant looks like a write of the base; with the first
    # tokens, the burst changes the mean.
    sums = exact_sums.totals(sums_of(model, batches).sums).view(model.n_layers, F, -1)
    uncentred = (sums[..., 2] / sums[..., 1])[:, PLANTED.index(NEW)]
    assert (uncentred > 1).all()
    off = scales(model, batches, first=True)[:, PLANTED.index(NEW), 0]
    assert (np.abs(off) > 0.5).all()


def test_other_features_share_a_direction(make_pair: Callable[..., Any]) -> None:
    """The difference scale is not that of the other features; base and target scales are."""
    mixed = torch.eye(F, dtype=torch.float64)
    mixed[1, 0] = 0.75  # the new feature writes along the doubled one, too
    model, batches = planted(make_pair, mixed), [batch_of(40, 33)]
    fitted = scales(model, batches)
    np.testing.assert_allclose(fitted[..., 2], [EXACT[:, 2]] * model.n_layers, atol=1e-9)
    alone = fitted[:, PLANTED.index(NEW), 1] - fitted[:, PLANTED.index(NEW), 0]
    assert (np.abs(alone - 1) > 0.01).all()


def test_a_feature_of_half_the_size(make_pair: Callable[..., Any]) -> None:
    model, batches = planted(make_pair), [batch_of(30)]
    for mlp in model.mlps:
        mlp.base.gains, mlp.target.gains = 2 * mlp.base.gains, 2 * mlp.target.gains
    fitted = scales(model, batches)
    np.testing.assert_allclose(fitted[..., :2], [2 * EXACT[:, :2]] * model.n_layers, atol=1e-9)
    np.testing.assert_allclose(fitted[:, :3, 2], 2, atol=1e-9)


@pytest.mark.parametrize(
    ("architecture", "dtype", "error"), [("qwen2", "float64", 1e-9), ("gemma2", "bfloat16", 1e-5)]
)
def test_scales_are_least_squares_fits(
    make_pair: Callable[..., Any], architecture: str, dtype: str, error: float
) -> None:
    """The fit is solved anew over all tokens and dimensions, with a constant vector.

    Of 16-bit outputs, the products with a feature's row are float32.
    """
    model: Any = ReplacementModel.create(make_pair(architecture, dtype), AdapterConfig(5)).eval()
    with torch.no_grad():
        for adapter in model.adapters:
            adapter.W_dec.normal_()
    batch = batch_of(14, 9)
    fire_on_half(model, batch)
    counted = batch.real.clone()
    counted[:, 0] = False
    rows = counted.flatten().nonzero().flatten()
    fitted = scales(model, [batch])
    with record_outputs(model) as outputs_of:
        for layer, codes in walk(model, batch, {}):
            a = torch.zeros(counted.numel(), 5, dtype=torch.float64)
            c = codes["adapter"]
            a[c.tokens, c.features] = c.values.double()
            a = a[rows]
            base, target, whole = (y[rows].double() for y in outputs_of(layer))
            W_dec = model.adapters[layer].W_dec.detach().double()
            for i in range(5):
                written = a[:, i, None] * W_dec[i]
                left = target - base - (whole - written)
                expected = [by_least_squares(written, y) for y in (base, target, left)]
                assert fitted[layer, i] == pytest.approx(expected, rel=error, abs=error)


def by_least_squares(written: Tensor, y: Tensor) -> float:
    n, width = written.shape
    constants = torch.eye(width, dtype=torch.float64).repeat(n, 1)
    design = torch.cat([written.reshape(-1, 1), constants], 1)
    return float(np.linalg.lstsq(design.numpy(), y.reshape(-1).numpy(), rcond=None)[0][0])


def test_the_order_of_batches_does_not_change_a_bit(make_pair: Callable[..., Any]) -> None:
    model, batches = planted(make_pair), [batch_of(n, n + 3) for n in (5, 8, 13)]
    once, reversed_ = sums_of(model, batches), sums_of(model, batches[::-1])
    assert torch.equal(once.sums, reversed_.sums)
    assert torch.equal(once.tokens, reversed_.tokens)
    assert (once.tokens > 0).all()


def test_features_without_a_scale(make_pair: Callable[..., Any]) -> None:
    """Nowhere active, no output, and active alike on all tokens."""
    model, batches = planted(make_pair), [batch_of(30)]
    with torch.no_grad():
        for adapter in model.adapters:
            adapter.b_enc[0] = -1e6
            adapter.W_dec[1] = 0
            adapter.W_enc[2], adapter.b_enc[2] = 0, 3
    fitted = scales(model, batches)
    assert np.isnan(fitted[:, :3]).all()
    assert np.isfinite(fitted[:, 3]).all()


def test_an_output_that_is_not_finite_is_refused(make_pair: Callable[..., Any]) -> None:
    model = planted(make_pair)
    model.mlps[1].target.constant[0] = torch.inf
    with pytest.raises(RunError, match="layer 1: the target writes a number that is not finite"):
        sums_of(model, [batch_of(9)])


def test_padding_may_hold_anything(make_pair: Callable[..., Any]) -> None:
    model, batch = planted(make_pair), batch_of(9, 4)
    sums, dirty = (ScaleSums(model.n_layers * F, torch.device("cpu")) for _ in range(2))
    counted = batch.real.clone()
    counted[:, 0] = False
    with record_outputs(model) as outputs_of:
        for layer, codes in walk(model, batch, {}):
            W_dec, clean = model.adapters[layer].W_dec.detach(), outputs_of(layer)
            outside = ~counted.flatten()[:, None]
            broken = Outputs(*(y.masked_fill(outside, torch.nan) for y in clean))
            sums.add(layer, codes["adapter"], clean, W_dec, counted.flatten())
            dirty.add(layer, codes["adapter"], broken, W_dec, counted.flatten())
    assert torch.equal(sums.sums, dirty.sums)


# --- in a store -----------------------------------------------------------------------------------


FEW = CollectConfig(n=3)


def test_features_of_adapters_alone_have_scales(run: Path, tmp_path: Path) -> None:
    config = replace(FEW, kinds=("adapter", "base"))
    store = collect(run, tmp_path / "both", config)
    assert store is not None
    rows = store.read("scales").to_pylist()
    counts = {(r["layer"], r["feature"]): r["count"] for r in store.read("features").to_pylist()}
    assert len(rows) == sum(count > 0 for count in counts.values())
    for row in rows:
        count = counts[row["layer"], row["feature"]]
        assert count - 3 <= row["positions"] <= count
    assert not store.has("scales", "base")
    assert "adapter/scales.parquet" in store.manifest["files"]
    neurons = collect(run, tmp_path / "neurons", replace(FEW, kinds=("base",)))
    assert neurons is not None
    assert not neurons.has("scales")
    assert neurons.manifest["settings"]["scales"] is False


def test_adapters_without_the_mlp_of_the_base_have_no_scales(tmp_path: Path) -> None:
    whole = make_run(tmp_path / "whole", n_features=8, base_mlp=False)
    without = collect(whole, None, FEW)
    assert without is not None
    assert not without.has("scales")


def test_a_collection_of_a_version_without_scales_is_read(run: Path, tmp_path: Path) -> None:
    out = tmp_path / "store"
    assert collect(run, out, replace(FEW, scales=False)) is not None
    path = out / MANIFEST
    manifest = json.loads(path.read_text())
    del manifest["settings"]["scales"], manifest["collected"]["settings"]["scales"]
    path.write_text(json.dumps(manifest))
    before = path.read_bytes()
    store = collect(run, out, FEW)
    assert store is not None
    assert not store.has("scales")
    assert path.read_bytes() == before
    anew = collect(run, out, FEW, overwrite=True)
    assert anew is not None
    assert Store.open(out).read("scales").num_rows > 0
