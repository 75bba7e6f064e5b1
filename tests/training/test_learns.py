"""Training of the preset ``organism`` at its full size reaches the expected faithfulness."""

from __future__ import annotations

from pathlib import Path

import pytest

from fastadapt.cli.train import parse_train
from fastadapt.training.trainer import train

pytestmark = pytest.mark.slow

PRINTED = (
    "kl_hybrid",
    "kl_adapter",
    "kl_recovered_vs_hybrid",
    "top1_error_hybrid",
    "top1_error_adapter",
    "nmse_mean_hybrid",
    "nmse_mean",
    "l0_mean",
)


def run(folder: Path, *options: str) -> dict:
    """Train the preset and evaluate on all held-out conversations, most unused in its tuning."""
    held_out = ["--data.max_validation", "500", "--run.eval_every", "600"]
    argv = ["organism", "--run.output", str(folder / "run"), *held_out, *options]
    config, _ = parse_train(argv)
    return train(config)


@pytest.mark.parametrize(
    ("options", "l0", "recovered"),
    [
        ([], 10, 0.90),
        (["--objective.sparsity", "1.5e-1"], 2, 0.75),
    ],
    ids=["preset", "sparser"],
)
def test_the_adapter_closes_the_gap_to_the_target(
    options: list[str],
    l0: float,
    recovered: float,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Check the recovered share of the hybrid's KL on held-out data, and L0 per layer."""
    summary = run(tmp_path, *options)
    with capsys.disabled():
        numbers = [f"{k}={summary[k]:.4f}" for k in PRINTED]
        print("\n", *numbers, "l0_per_layer", [round(x, 2) for x in summary["l0_per_layer"]])
    assert max(summary["l0_per_layer"]) <= l0
    assert summary["kl_recovered_vs_hybrid"] >= recovered
    assert summary["top1_error_adapter"] < summary["top1_error_hybrid"]
    assert summary["nmse_mean"] < summary["nmse_mean_hybrid"]


@pytest.mark.parametrize("start", ["2e-3", "2e-1"])
def test_a_run_reaches_its_target_l0(
    start: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """λ starts about ten times too small and ten times too large for 150 steps of the preset."""
    short = ["--optimizer.max_steps", "150", "--objective.sparsity", start]
    summary = run(tmp_path, *short, "--objective.l0", "8")
    with capsys.disabled():
        print("\n", *(f"{k}={summary[k]:.4f}" for k in (*PRINTED, "sparsity_weight")))
    assert abs(summary["l0_mean"] / 8 - 1) <= 0.1
