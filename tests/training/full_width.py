"""One optimiser step of two layers at the true width of a 7B model; tell what it took.

Run as a program: ``full_width.py FOLDER``, a folder for the configurations. Weights are noise, made
on the fly. Prints one JSON object.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from fastadapt.training.config import TrainConfig, from_dict

TOKENS = 1024


def memory(field: str) -> int:
    """``VmRSS`` or ``VmHWM`` (its peak) of this process, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


def configure(folder: Path) -> tuple[TrainConfig, Any]:
    from transformers import Qwen2Config

    model = Qwen2Config(
        vocab_size=152064,
        hidden_size=3584,
        intermediate_size=18944,
        num_hidden_layers=2,
        num_attention_heads=28,
        num_key_value_heads=4,
        tie_word_embeddings=False,
    )
    for name in ("target", "base"):
        model.save_pretrained(folder / name)
    config = from_dict(
        {
            "pair": {
                "target": str(folder / "target"),
                "base": str(folder / "base"),
                "device": "cpu",
            },
            "adapter": {"n_features": 8192},
            "data": {"train": "none.jsonl", "validation": "none.jsonl", "max_tokens": TOKENS},
            "optimizer": {"max_steps": 1},
            "run": {"output": str(folder / "run")},
        }
    )
    return config, model


@torch.no_grad()
def fill(module: torch.nn.Module, scale: float) -> None:
    """Noise in every matrix: one block of it, repeated, since to draw 2e9 numbers takes minutes."""
    noise = torch.randn(2**20, generator=torch.Generator().manual_seed(0)) * scale
    for name, parameter in module.named_parameters():
        if name.endswith("bias"):
            parameter.zero_()
        elif parameter.dim() > 1:
            flat = parameter.view(-1)
            for part in flat.split(len(noise)):
                part.copy_(noise[: len(part)])


def build(config: TrainConfig, model_config: Any) -> Any:
    """The replacement model, of uninitialised memory filled with noise."""
    from transformers import Qwen2ForCausalLM
    from transformers.initialization import no_init_weights
    from transformers.models.qwen2.modeling_qwen2 import Qwen2MLP

    from fastadapt.models import ModelPair, ReplacementModel
    from fastadapt.pretrained import ARCHITECTURES

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
    with torch.no_grad():  # else the zero decoder gives W_enc no gradient at the first step
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


def main(folder: Path) -> dict[str, Any]:
    from fastadapt.training import loop
    from fastadapt.training.plan import plan
    from fastadapt.training.rundir import MetricsLog

    torch.set_num_threads(2)
    config, model_config = configure(folder)
    planned = plan(config)
    before = memory("VmRSS")
    began = time.monotonic()
    model = build(config, model_config)
    built, after_build = time.monotonic() - began, memory("VmHWM")
    run = loop.Run(config, folder, began, model, feed(model_config.vocab_size))
    # A sum is enough to notice a change of one element; a copy would count as the step's memory.
    weights = {name: p.double().sum().item() for name, p in run.optimizer.parameters.items()}
    began = time.monotonic()
    records: list[dict[str, Any]] = []
    with MetricsLog(folder / "metrics.jsonl", [records.append]) as run.log:
        run.advance()
    moments = run.optimizer.tensors()["exp_avg"]
    return {
        "record": records[0],
        "moved": [n for n, p in run.optimizer.parameters.items() if p.double().sum() != weights[n]],
        "with_gradient": [n for n, m in moments.items() if m.isfinite().all() and m.any()],
        "parameters": list(moments),
        "planned": planned.peak_bytes,
        "phases": planned.phases,
        "parts": planned.parts,
        "before": before,
        "after_build": after_build,
        "peak": memory("VmHWM"),
        "build_s": built,
        "step_s": time.monotonic() - began,
    }


if __name__ == "__main__":
    print(json.dumps(main(Path(sys.argv[1]))))
