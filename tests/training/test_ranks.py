"""A run on several ranks has the losses, weights and checkpoints of a run on one rank.

torchrun starts real processes, which communicate over gloo. A start takes seconds, so one launch
trains many configurations (``rank_runs.py``).
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from fastadapt.distributed.ranks import Ranks
from fastadapt.errors import UserError
from fastadapt.training.checkpoint import list_checkpoints, load_latest
from fastadapt.training.checkpoint.tensor_files import Checkpoint
from fastadapt.training.config import TrainConfig, save_config
from fastadapt.training.run_dir import read_records
from fastadapt.training.trainer import check_shares

PROGRAM = str(Path(__file__).with_name("rank_runs.py"))
TIMING = {"wall_s", "tokens_per_s"}
BATCHES = {"optimizer.batch_size": 1, "optimizer.accumulation": 4, "optimizer.epochs": 4}
RUN = {
    **BATCHES,
    "optimizer.max_steps": 20,
    "run.eval_every": 0,
    "run.checkpoint_every": 6,
    "run.threads": 1,
}
DOUBLE = {"pair.dtype": "float64"}


def launch(ranks: int, *arguments: str) -> subprocess.CompletedProcess[str]:
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    command = [sys.executable, *(torchrun if ranks > 1 else ()), *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, capture_output=True, text=True, timeout=600, env=environment)


def launch_well(ranks: int, *arguments: str) -> subprocess.CompletedProcess[str]:
    done = launch(ranks, *arguments)
    assert done.returncode == 0, done.stderr[-4000:]
    return done


@pytest.fixture
def written(tiny_config: Callable[..., TrainConfig], tmp_path: Path) -> Callable[..., str]:
    """``written(name, **changes)`` writes a run's configuration and returns the file's path."""

    def write(name: str, **changes: object) -> str:
        config = tiny_config(**{**RUN, **changes, "run.output": str(tmp_path / name)})
        save_config(config, tmp_path / f"{name}.yaml")
        return str(tmp_path / f"{name}.yaml")

    return write


def newest(folder: Path) -> Checkpoint:
    checkpoint, passed = load_latest(folder / "checkpoints")
    assert checkpoint is not None
    assert passed == []
    return checkpoint


def steps(folder: Path, kind: str = "train") -> list[dict]:
    records = (r for r in read_records(folder / "metrics.jsonl") if r["kind"] == kind)
    return [{k: v for k, v in record.items() if k not in TIMING} for record in records]


def flat(tensors: dict[str, torch.Tensor]) -> torch.Tensor:
    return torch.cat([tensors[name].flatten().double() for name in sorted(tensors)])


def assert_close(folder: Path, whole: Path, tolerance: float) -> None:
    """Compare weights, moments, running thresholds and log to a tolerance, all else exactly."""
    ours, theirs = newest(folder), newest(whole)
    assert ours.tensors.keys() == theirs.tensors.keys()
    for group in ("weights", "exp_avg", "exp_avg_sq"):
        a, b = flat(ours.tensors[group]), flat(theirs.tensors[group])
        assert (a - b).abs().max() < tolerance, group
    for group in ("counters", "rng"):
        for name, tensor in theirs.tensors[group].items():
            torch.testing.assert_close(
                ours.tensors[group][name], tensor, rtol=0, atol=tolerance if "." in name else 0
            )
    saved, expected = ({**c.scalars, "wall_s": 0} for c in (ours, theirs))
    assert_same_numbers(saved, expected, tolerance)
    for kind in ("train", "eval", "bad_batch", "checkpoint"):
        assert_same_numbers(steps(folder, kind), steps(whole, kind), tolerance)


def assert_same_numbers(a: object, b: object, tolerance: float) -> None:
    if isinstance(a, dict) and isinstance(b, dict):
        assert a.keys() == b.keys()
        for key in a:
            assert_same_numbers(a[key], b[key], tolerance)
    elif isinstance(a, list) and isinstance(b, list):
        assert len(a) == len(b)
        for x, y in zip(a, b, strict=True):
            assert_same_numbers(x, y, tolerance)
    elif isinstance(a, float) and isinstance(b, float):
        assert abs(a - b) < tolerance
    else:
        assert a == b


def assert_same_bits(folder: Path, whole: Path) -> None:
    ours, theirs = newest(folder), newest(whole)
    for group in ("weights", "exp_avg", "exp_avg_sq", "counters", "rng"):
        for name, tensor in theirs.tensors[group].items():
            assert torch.equal(ours.tensors[group][name], tensor), (group, name)
    files = sorted((whole / "adapter").glob("*.safetensors"))
    assert files
    for file in files:
        assert (folder / "adapter" / file.name).read_bytes() == file.read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["relu", "mlp"])
def test_two_ranks_from_the_command_line(
    written: Callable[..., str], tmp_path: Path, kind: str
) -> None:
    """The fp32 sum of two bf16 gradients has the same bits in either order."""
    bits = {"pair.dtype": "bfloat16", "optimizer.accumulation": 2, "optimizer.clip": float("inf")}
    short = {"optimizer.max_steps": 3, "run.checkpoint_every": 3}
    bits |= VARIANTS[kind]
    configs = [written(name, **bits, **short) for name in ("two", "one")]
    done = launch_well(2, "-m", "fastadapt", "train", configs[0])
    sentences = {"relu": "The adapter recovers", "mlp": "The tuned MLPs recover"}
    assert done.stdout.count(sentences[kind]) == 1
    assert done.stderr.count("Loading models and data") == 1
    launch_well(1, PROGRAM, configs[1])
    assert_same_bits(tmp_path / "two", tmp_path / "one")
    assert [steps(tmp_path / name, "start")[0]["ranks"] for name in ("two", "one")] == [2, 1]
    path = list_checkpoints(tmp_path / "two" / "checkpoints")[-1][1]
    assert {p.name for p in path.iterdir()} == {
        "counters.safetensors",
        "manifest.json",
        "rng.safetensors",
        "shard-00001-model-00001-of-00001.safetensors",
        "shard-00002-model-00001-of-00001.safetensors",
        "state.json",
    }


@pytest.fixture
def gemma_pair(tiny_pair: Path, tmp_path: Path) -> dict[str, str]:
    """A pair with tied and scaled embeddings, capped logits, sliding windows, eager attention."""
    from transformers import AutoTokenizer, Gemma2Config, Gemma2ForCausalLM

    config = Gemma2Config(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        sliding_window=4,
        final_logit_softcapping=5.0,
        max_position_embeddings=64,
        tie_word_embeddings=True,
    )
    for seed, name in enumerate(("target", "base")):
        torch.manual_seed(seed)
        model = Gemma2ForCausalLM(config)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.normal_(0, 0.2)
        model.save_pretrained(tmp_path / "gemma" / name)
        tokenizer = AutoTokenizer.from_pretrained(tiny_pair / name)
        tokenizer.save_pretrained(tmp_path / "gemma" / name)
    return {f"pair.{name}": str(tmp_path / "gemma" / name) for name in ("target", "base")}


NORMS = {"run.trains": "norms", "adapter.n_features": None, "objective.sparsity": 0.0}
VARIANTS: dict[str, dict] = {
    "relu": {},
    "topk": {"adapter.activation": "topk", "adapter.k": 3},
    "batch_topk": {"adapter.activation": "batch_topk", "adapter.k": 2.5},
    "jumprelu": {
        "adapter.activation": "jumprelu",
        "adapter.bandwidth": 0.1,
        "adapter.initial_threshold": 0.05,
    },
    "short last step": {"optimizer.batch_size": 5, "optimizer.epochs": 3},  # 15 micro-batches
    "steered": {"objective.l0": 3.0, "objective.sparsity": 1e-2},
    "no checkpointing": {"objective.checkpoint": "none", "optimizer.accumulation": 8},
    "ranks without a share": {"adapter.n_features": 5},  # rows of 2, 2, 1 and 0 features
    "mlp": {"run.trains": "mlp", "adapter.n_features": None, "objective.sparsity": 0.0},
}


@pytest.mark.slow
def test_weights_that_models_share_on_two_ranks(
    tiny_pair: Path, written: Callable[..., str], tmp_path: Path
) -> None:
    """PEFT targets, whose base weights are shared, and a target with one layer of its base.

    The gains of DoRA have more bits than the other weights.
    """
    peft = pytest.importorskip("peft")
    from safetensors.torch import load_file, save_file
    from transformers import AutoModelForCausalLM

    kinds: dict[str, dict[str, Any]] = {
        "lora": {"target_modules": "all-linear"},
        "dora": {"target_modules": "all-linear", "use_dora": True},
        "saved": {"target_modules": ["up_proj"], "modules_to_save": ["down_proj"]},
    }
    for name, settings in kinds.items():
        base = AutoModelForCausalLM.from_pretrained(tiny_pair / "base")
        adapted = peft.get_peft_model(base, peft.LoraConfig(r=4, **settings))
        with torch.no_grad():
            for parameter in adapted.parameters():
                if parameter.requires_grad:
                    parameter.add_(0.1 * torch.randn_like(parameter))
        adapted.save_pretrained(tmp_path / name)
    partly = Path(shutil.copytree(tiny_pair / "target", tmp_path / "partly"))
    file = partly / "model.safetensors"
    layer = {n: t for n, t in load_file(tiny_pair / "base" / file.name).items() if "0.mlp" in n}
    save_file({**load_file(file), **layer}, file, metadata={"format": "pt"})

    bits = {"pair.dtype": "bfloat16", "optimizer.accumulation": 2, "optimizer.clip": float("inf")}
    short = {"optimizer.max_steps": 3, "run.checkpoint_every": 3}
    for ranks in (1, 2):
        paths = [
            written(f"{name}-{ranks}", **bits, **short, **{"pair.target": str(tmp_path / name)})
            for name in (*kinds, "partly")
        ]
        launch_well(ranks, PROGRAM, *paths)
    for name in (*kinds, "partly"):
        assert_same_bits(tmp_path / f"{name}-2", tmp_path / f"{name}-1")


@pytest.mark.slow
def test_the_same_steps_on_one_two_and_four_ranks(
    written: Callable[..., str],
    gemma_pair: dict[str, str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Float64 runs agree to 1e-10. Float32 errors against float64 are at most twice one rank's.

    The bound holds for the maximum and for the RMS of the error.
    """
    variants: dict[str, dict[str, Any]] = {**VARIANTS, "gemma2": gemma_pair}
    names = [name.replace(" ", "-") for name in variants]
    for ranks in (1, 2, 4):
        doubles = [
            written(f"{name}-{ranks}", **DOUBLE, **changes)
            for name, changes in zip(names, variants.values(), strict=True)
        ]
        broken = written(f"nan-{ranks}", **DOUBLE) + "@nan:4"
        launch_well(ranks, PROGRAM, *doubles, broken, written(f"single-{ranks}"))
    for name in [*names, "nan"]:
        for ranks in (2, 4):
            assert_close(tmp_path / f"{name}-{ranks}", tmp_path / f"{name}-1", 1e-10)
    assert [r["step"] for r in steps(tmp_path / "nan-4", "bad_batch")] == [5]

    exact = newest(tmp_path / "relu-1").tensors["weights"]
    errors = {n: flat(newest(tmp_path / f"single-{n}").tensors["weights"]) for n in (1, 2, 4)}
    errors = {n: weights - flat(exact) for n, weights in errors.items()}
    loss = {
        name: torch.tensor([r["loss"] for r in steps(tmp_path / name)], dtype=torch.float64)
        for name in ("relu-1", "single-1", "single-2", "single-4")
    }
    losses = {n: loss[f"single-{n}"] - loss["relu-1"] for n in (1, 2, 4)}
    eps, lines = torch.finfo(torch.float32).eps, []
    for n in (2, 4):
        for by_ranks, largest in (
            (errors, flat(exact).abs().max()),
            (losses, loss["relu-1"].max()),
        ):
            for size in (lambda e: e.abs().max(), lambda e: e.square().mean().sqrt()):
                lines.append(f"{n} ranks {size(by_ranks[n]):.1e}, one {size(by_ranks[1]):.1e}")
                assert size(by_ranks[n]) <= 2 * (size(by_ranks[1]) + eps * largest)
    with capsys.disabled():
        print(f" errors of weights and losses: {'; '.join(lines)} ", end="")


@pytest.mark.slow
def test_resumed_on_two_four_and_one_ranks(written: Callable[..., str], tmp_path: Path) -> None:
    whole, again = written("whole", **DOUBLE), written("again", **DOUBLE)
    launch_well(1, PROGRAM, whole)
    launch_well(2, PROGRAM, f"{again}@stop:5")
    launch_well(4, PROGRAM, f"{again}@stop:11")
    launch_well(1, PROGRAM, again)
    resumed = steps(tmp_path / "again", "resume")
    assert [(r["step"], r["ranks"]) for r in resumed] == [(5, 4), (11, 1)]
    for record in (5, 11):  # the two stops saved checkpoints
        assert record in [r["step"] for r in steps(tmp_path / "again", "checkpoint")]
    ours, theirs = newest(tmp_path / "again"), newest(tmp_path / "whole")
    for group in ("weights", "exp_avg", "exp_avg_sq", "counters"):
        difference = flat(ours.tensors[group]) - flat(theirs.tensors[group])
        assert difference.abs().max() < 1e-10, group
    assert_same_numbers(steps(tmp_path / "again"), steps(tmp_path / "whole"), 1e-10)


@pytest.mark.slow
def test_the_same_number_of_ranks_resumes_to_the_bit(
    written: Callable[..., str], tmp_path: Path
) -> None:
    whole, again = written("whole"), written("again")
    launch_well(2, PROGRAM, whole, f"{again}@stop:8", again)
    assert_same_bits(tmp_path / "again", tmp_path / "whole")


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [2, 4])
def test_a_rank_killed_within_a_step_ends_the_run_and_costs_no_checkpoint(
    ranks: int, written: Callable[..., str], tmp_path: Path
) -> None:
    whole, killed = written("whole", **DOUBLE), written("killed", **DOUBLE)
    done = launch(ranks, PROGRAM, f"{killed}@kill:8")
    assert done.returncode != 0
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1, done.stderr[-4000:]
    assert f"of {ranks} lost another rank: a process of the run has ended" in errors[0]
    assert "Re-run the same command with --resume to continue from step 6, on any" in errors[0]
    assert "Signal 9 (SIGKILL)" in done.stderr  # torchrun's report
    launch_well(1, PROGRAM, whole, killed)
    assert_close(tmp_path / "killed", tmp_path / "whole", 1e-10)


@pytest.mark.slow
def test_a_disk_that_is_full_for_one_rank(written: Callable[..., str], tmp_path: Path) -> None:
    config = written("run", **DOUBLE)
    done = launch(2, PROGRAM, f"{config}@full:8")
    assert done.returncode != 0
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1, done.stderr[-4000:]
    assert "checkpoint of step 12 could not be written" in errors[0]
    assert "rank 1: File too large" in errors[0]
    assert "Newest checkpoint: step 6." in errors[0]
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["step-00000006"]
    launch_well(2, PROGRAM, config)
    assert newest(tmp_path / "run").step == 20


def test_a_step_that_cannot_be_shared_says_which_can(
    tiny_config: Callable[..., TrainConfig],
) -> None:
    two = Ranks(0, 2)
    check_shares(tiny_config(**{"optimizer.accumulation": 4}), two)
    with pytest.raises(UserError, match=r"expected a multiple of 2, got 1; .*batch_size 1 --opt"):
        check_shares(tiny_config(), two)
    odd = tiny_config(**{"optimizer.batch_size": 3, "optimizer.accumulation": 3})
    with pytest.raises(UserError, match="a step has 9 sequences, which 2 ranks cannot share"):
        check_shares(odd, two)
    norms = tiny_config(**NORMS, **{"optimizer.accumulation": 4})
    with pytest.raises(UserError, match=r"run\.trains=norms needs a single process"):
        check_shares(norms, two)
