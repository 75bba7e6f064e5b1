"""Run one optimiser step of two layers at the width of a 7B model; print memory and time.

Run as a program: ``full_width.py FOLDER``, a folder for the configurations. Weights are random.
The result is printed as one JSON object.
"""

from __future__ import annotations

import ctypes
import json
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from fastadapt.training.config import TrainConfig, from_dict

TOKENS = 1024
WIDE = {
    "vocab_size": 152064,
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
}
SMALL = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


def memory(field: str) -> int:
    """Return ``VmRSS`` or ``VmHWM`` (its peak) of this process, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


def configure(folder: Path, sizes: dict[str, Any], n_features: int) -> tuple[TrainConfig, Any]:
    from transformers import Qwen2Config

    model = Qwen2Config(num_hidden_layers=2, tie_word_embeddings=False, **sizes)
    for name in ("target", "base"):
        model.save_pretrained(folder / name)
    config = from_dict(
        {
            "pair": {
                "target": str(folder / "target"),
                "base": str(folder / "base"),
                "device": "cpu",
            },
            "adapter": {"n_features": n_features},
            "data": {"train": "none.jsonl", "validation": "none.jsonl", "max_tokens": TOKENS},
            "optimizer": {"max_steps": 1},
            "run": {"output": str(folder)},
        }
    )
    return config, model


@torch.no_grad()
def fill(module: torch.nn.Module, scale: float) -> None:
    """Fill every matrix with one repeated block of noise; drawing 2e9 numbers takes minutes."""
    noise = torch.randn(2**20, generator=torch.Generator().manual_seed(0)) * scale
    for name, parameter in module.named_parameters():
        if name.endswith("bias"):
            parameter.zero_()
        elif parameter.dim() > 1:
            flat = parameter.view(-1)
            for part in flat.split(len(noise)):
                part.copy_(noise[: len(part)])


def build(config: TrainConfig, model_config: Any) -> Any:
    """Return a replacement model whose uninitialised weights are filled with noise."""
    from transformers import Qwen2ForCausalLM
    from transformers.initialization import no_init_weights
    from transformers.models.qwen2.modeling_qwen2 import Qwen2MLP

    from fastadapt.models.architectures import ARCHITECTURES
    from fastadapt.models.replacement import ModelPair, ReplacementModel

    with no_init_weights():
        target = Qwen2ForCausalLM(model_config).eval()
        mlps = torch.nn.ModuleList(Qwen2MLP(model_config) for _ in range(2)).eval()
    fill(target, 0.02)
    fill(mlps, 0.021)
    pair = ModelPair(
        target=target,
        base_mlps=mlps,
        tokenizer=None,
        config=config.pair,
        paths=ARCHITECTURES["qwen2"],
    )
    model = ReplacementModel.create(pair, config.adapter)
    adapter: Any
    with torch.no_grad():  # with a zero decoder, W_enc has no gradient at the first step
        for adapter in model.adapters:
            adapter.W_dec.normal_(0, 0.001)
    return model


def feed(vocabulary: int) -> Any:
    from fastadapt.objective import Batch

    ids = torch.randint(vocabulary, (1, TOKENS), generator=torch.Generator().manual_seed(0))
    return SimpleNamespace(
        steps=1,
        train=[0],
        micro_batches=lambda step: [[0]],
        batch=lambda data, indices: (Batch(ids, None, ids), TOKENS),
        rows=list,
    )


def multiply(width: int, vocabulary: int) -> None:
    """Compute the largest matrix products of a step: the head's, forward and backward."""
    x, weight = torch.ones(TOKENS, width), torch.ones(vocabulary, width)
    torch.mm(x @ weight.T, weight, out=x)


def one_step(config: TrainConfig, model_config: Any) -> dict[str, Any]:
    """Build the models and take one optimiser step; return its record and the moved weights."""
    from fastadapt.training import loop
    from fastadapt.training.run_dir import MetricsLog

    folder = Path(config.run.output)
    model = build(config, model_config)
    began = time.monotonic()
    run = loop.TrainingRun(config, folder, began, model, feed(model_config.vocab_size))
    # The sum shows a change of any element. A copy would add to the step's memory.
    weights = {name: p.double().sum().item() for name, p in run.optimizer.parameters.items()}
    records: list[dict[str, Any]] = []
    with MetricsLog(folder / "metrics.jsonl", [records.append]) as run.log:
        run.advance()
    moments = run.optimizer.tensors()["exp_avg"]
    parameters = run.optimizer.parameters
    return {
        "record": records[0],
        "parameters": list(moments),
        "moved": [name for name, p in parameters.items() if p.double().sum() != weights[name]],
        "with_gradient": [name for name, m in moments.items() if m.isfinite().all() and m.any()],
        "step_s": time.monotonic() - began,
    }


def main(folder: Path, sizes: dict[str, Any], n_features: int) -> dict[str, Any]:
    from fastadapt.training.planning.estimate import plan

    torch.set_num_threads(2)
    # The plan does not count memory of the libraries. Load their code by a small step, and their
    # persistent scratch memory by products of this size, before the measurement.
    one_step(*configure(folder / "small", SMALL, 64))
    multiply(sizes["hidden_size"], sizes["vocab_size"])
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    config, model_config = configure(folder / "wide", sizes, n_features)
    planned = plan(config)
    before = memory("VmRSS")
    result = one_step(config, model_config)
    return result | {
        "planned": planned.peak_bytes,
        "phases": planned.phases,
        "parts": planned.parts,
        "before": before,
        "peak": memory("VmHWM"),
    }


if __name__ == "__main__":
    print(json.dumps(main(Path(sys.argv[1]), WIDE, 8192)))
