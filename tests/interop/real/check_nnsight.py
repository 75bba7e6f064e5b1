"""Check with nnsight that the recorded Hugging Face hooks are where adapters read and write."""

from __future__ import annotations

import torch
from checks import IDS, check, make_pair, report
from nnsight import NNsight
from sets import randomised

from fastadapt.adapter.hooks import MLP_HOOKS, name_hook
from fastadapt.adapter.module import AdapterConfig, TranscoderAdapter


def splice() -> None:
    """Add an adapter at the recorded hooks, and compare logits with a plain forward hook."""
    hybrid, _ = make_pair()
    adapter: TranscoderAdapter = randomised(  # type: ignore[assignment]
        TranscoderAdapter(32, AdapterConfig(48), dtype=torch.float64), 1
    ).eval()
    read, written = (str(name_hook(hook, "huggingface", 1)) for hook in MLP_HOOKS)
    assert (read, written) == ("model.layers.1.mlp.input", "model.layers.1.mlp.output")
    mlp = hybrid.model.layers[1].mlp
    handle = mlp.register_forward_hook(lambda _, args, out: out + adapter.transcode(args[0]))
    with torch.no_grad():
        expected = hybrid(IDS).logits
        handle.remove()
        without = hybrid(IDS).logits
        assert not torch.allclose(expected, without, atol=0.1)
        model = NNsight(hybrid)
        with model.trace(IDS):
            module = model.model.layers[1].mlp
            x = module.input
            module.output = module.output + adapter.transcode(x)
            logits = model.lm_head.output.save()
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-12)
    check("an adapter added at the recorded hooks gives the logits of the formula")


if __name__ == "__main__":
    splice()
    report("nnsight")
