"""Replace encoder and decoder of sparsify's ``SparseCoder``, under sparsify's own ``Trainer``.

    python examples/eleuther_sparsify.py

:class:`OnTheOp` changes one method, ``forward``. Put it in the place of ``SparseCoder`` in
``sparsify.trainer``, and the trainer makes coders of it. ``latent_acts`` and ``latent_indices``
hold the active latents of all tokens, one after the other: a token may have fewer than k.

The script compares one step in float64, for an SAE, a transcoder and a skip transcoder, and then a
training of a small model's SAEs by the trainer, which computes in float32. It also shows what
sparsify's own step lacks (:func:`auxiliary_gradient`, :func:`fired`). Needs ``eai-sparsify`` 1.3.
"""

from __future__ import annotations

import os
import sys
import tempfile
from typing import Any

import torch

if not torch.cuda.is_available():  # sparsify compiles for the GPU
    os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
    os.environ.setdefault("SPARSIFY_DISABLE_TRITON", "1")

import sparsify.trainer
from differences import largest_difference, report
from sparsify import SparseCoder, SparseCoderConfig, TrainConfig, Trainer
from sparsify.sparse_coder import ForwardOutput
from torch import Tensor, nn

from fastadapt.kernels.transcoder import transcoder

D, F, K = 16, 96, 4
FLOAT32 = 1e-5  # of weights after 16 steps of Adam, which enlarges differences of 1e-7


class OnTheOp(SparseCoder):
    """A ``SparseCoder`` on the op. Auxiliary losses, which are dense, stay sparsify's."""

    def forward(self, x: Tensor, y: Tensor | None = None, **options: Any) -> ForwardOutput:
        dead = options.get("dead_mask")
        auxiliary = self.cfg.multi_topk or (dead is not None and bool(dead.any()))
        if auxiliary or self.cfg.activation != "topk":
            return super().forward(x, y, **options)
        y = x if y is None else y
        out, _, _, codes = transcoder(
            x if self.cfg.transcode else x - self.b_dec,
            self.encoder.weight,
            self.encoder.bias,
            self.W_dec,
            self.b_dec,
            activation="topk",
            k=self.cfg.k,
            residual=None if self.W_skip is None else nn.functional.linear(x, self.W_skip),
            return_codes=True,
        )
        assert codes is not None
        variance = options.get("total_variance")
        variance = (y - y.mean(0)).square().sum() if variance is None else variance
        zero = out.new_zeros(())
        fvu = (y - out).square().sum() / variance
        return ForwardOutput(out, codes.values, codes.features, fvu, zero, zero)


def make_coder(kind: type[SparseCoder], **settings: Any) -> SparseCoder:
    """Return a coder in float64 none of whose parameters is 0."""
    config = SparseCoderConfig(num_latents=F, k=K, **settings)
    coder = kind(D, config, dtype=torch.float64)
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in coder.parameters():
            parameter.normal_(0, 0.3)
    return coder


def step(coder: SparseCoder) -> dict[str, Tensor]:
    """Return output, loss and gradients of one step, by name."""
    draw = torch.Generator().manual_seed(1)
    x, y = torch.randn(2, 64, D, generator=draw, dtype=torch.float64)
    result = coder(x, y)
    result.fvu.backward()
    seen = {f"gradient of {name}": p.grad for name, p in coder.named_parameters()}
    return seen | {"output": result.sae_out, "fvu": result.fvu}


def trained(kind: type[SparseCoder], folder: str) -> dict[str, Tensor]:
    """Train SAEs of a small model with sparsify's trainer; return their weights, by name."""
    from datasets import Dataset
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    shape: dict[str, Any] = {
        "hidden_size": D,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "vocab_size": 64,
    }
    model = LlamaForCausalLM(LlamaConfig(**shape, num_attention_heads=2, num_key_value_heads=2))
    ids = torch.randint(64, (64, 32), generator=torch.Generator().manual_seed(2))
    data = Dataset.from_dict({"input_ids": ids.tolist()}).with_format("torch")
    settings = TrainConfig(
        SparseCoderConfig(num_latents=F, k=K),
        batch_size=4,
        optimizer="adam",
        lr=1e-3,
        lr_warmup_steps=2,
        log_to_wandb=False,
        save_dir=folder,
    )
    original = sparsify.trainer.SparseCoder
    sparsify.trainer.SparseCoder = kind  # the line that puts the op into the trainer
    try:
        trainer = Trainer(settings, data, model)
        assert all(type(coder) is kind for coder in trainer.saes.values())
        trainer.fit()
    finally:
        sparsify.trainer.SparseCoder = original
    return {
        f"{name} {key}": value.float()
        for name, coder in trainer.saes.items()
        for key, value in coder.state_dict().items()
    }


def auxiliary_gradient() -> tuple[float, float]:
    """Return the size of the auxiliary loss's gradient at dead rows of the encoder: theirs, exact.

    The loss makes dead latents explain what the live ones leave. sparsify's fused encoder returns
    the pre-activations from which the loss comes, but its backward pass ignores their gradient.
    """
    dead = torch.arange(F) < F // 2
    x = torch.randn(64, D, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    sizes = []
    for exact in (False, True):
        coder = make_coder(SparseCoder)
        if exact:
            coder.encode = lambda x, coder=coder: dense_encode(coder, x)
        coder(x, dead_mask=dead).auxk_loss.backward()
        gradient = coder.encoder.weight.grad
        sizes.append(0.0 if gradient is None else float(gradient[dead].norm()))
    return sizes[0], sizes[1]


def dense_encode(coder: SparseCoder, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return what ``SparseCoder.encode`` returns, by plain autograd."""
    z = torch.relu(coder.encoder(x - coder.b_dec))
    top = z.topk(coder.cfg.k, sorted=False)
    return top.values, top.indices, z


def fired() -> tuple[int, int]:
    """Return how many latents ``latent_indices`` names, and how many of them are active.

    Of a token with fewer than k active latents, sparsify names others, whose value is 0. The
    trainer counts them as fired, so that they do not become dead.
    """
    coder = make_coder(SparseCoder)
    coder.encoder.bias.data -= 3
    result = coder(torch.randn(8, D, generator=torch.Generator().manual_seed(1)).double())
    active = result.latent_indices[result.latent_acts > 0]
    return len(result.latent_indices.unique()), len(active.unique())


def main() -> int:
    failed = 0
    cases: dict[str, dict[str, Any]] = {
        "SAE": {},
        "transcoder": {"transcode": True},
        "skip transcoder": {"transcode": True, "skip_connection": True},
    }
    for title, settings in cases.items():
        steps = [step(make_coder(kind, **settings)) for kind in (OnTheOp, SparseCoder)]
        failed |= report(f"sparsify {title}, one step", largest_difference(*steps))
    with tempfile.TemporaryDirectory() as folder:
        runs = [trained(kind, folder) for kind in (OnTheOp, SparseCoder)]
    failed |= report("sparsify Trainer, 16 steps in float32", largest_difference(*runs), FLOAT32)
    theirs, exact = auxiliary_gradient()
    print(f"AuxK: gradient of the encoder's dead rows {theirs:.2g} in sparsify, {exact:.2g} exact")
    named, active = fired()
    print(f"few active latents: {named} counted as fired in sparsify, {active} active")
    return failed


if __name__ == "__main__":
    sys.exit(main())
