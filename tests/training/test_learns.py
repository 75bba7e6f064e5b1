"""The main job on the embedded pair, at the size that the preset ships with."""

from __future__ import annotations

import pytest

from fastadapt.options import parse_train
from fastadapt.training.trainer import train

pytestmark = pytest.mark.slow


def run(folder, *options: str) -> dict:
    """The preset, with what is typed after it."""
    config, _ = parse_train(["organism", "--run.output", str(folder / "run"), *options])
    summary = train(config)
    print({k: v for k, v in summary.items() if k.startswith(("kl", "top1", "nmse_mean", "l0"))})
    return summary


@pytest.mark.parametrize(
    ("options", "l0", "recovered"),
    [
        ([], 10, 0.90),
        (["--objective.sparsity", "1e-1"], 2, 0.75),
    ],
    ids=["preset", "sparser"],
)
def test_the_adapter_closes_the_gap_to_the_target(options, l0, recovered, tmp_path) -> None:
    """Share of the hybrid's KL that is closed on held-out data, and active features per layer."""
    summary = run(tmp_path, *options)
    assert summary["l0_mean"] <= l0
    assert summary["kl_recovered_vs_hybrid"] >= recovered
    assert summary["top1_error_adapter"] < summary["top1_error_hybrid"]
    assert summary["nmse_mean"] < summary["nmse_mean_hybrid"]
