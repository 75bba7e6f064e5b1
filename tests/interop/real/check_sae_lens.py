"""Check the files of ``interop/saelens.py`` with SAELens itself. Run by ``make interop``."""

from __future__ import annotations

import copy
import logging
import os
import tempfile
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from checks import IDS, check, make_pair, report
from sae_lens import SAE, HookedSAETransformer, SAETransformerBridge
from sets import D, F, make_set, outputs

from fastadapt.adapter.coder_files import CoderSet
from fastadapt.adapter.hooks import PLACES, name_hook
from fastadapt.adapter.module import AdapterConfig, TranscoderAdapter
from fastadapt.adapter.sae import Transcoder
from fastadapt.errors import UserError
from fastadapt.interop.saelens import attach, read, write
from fastadapt.interop.saelens_splice import sample

warnings.filterwarnings("ignore")
#: A name that TransformerLens knows. In the working folder, it is a folder with the tiny model.
NAME = "Qwen/Qwen2-0.5B"
#: transformers computes norms in float32 also in a float64 model, TransformerLens does not.
ROUNDING = 1e-5
KINDS = [("sae", "relu"), ("subtracting sae", "relu"), ("subtracting sae", "topk")]
KINDS += [("sae", "jumprelu"), ("transcoder", "relu"), ("transcoder", "jumprelu")]
KINDS += [("skip", "relu"), ("skip", "jumprelu"), ("transcoder", "batch_topk")]
KINDS += [("adapter", "relu"), ("adapter", "jumprelu"), ("mlp", "relu")]


def round_trips(path: Path) -> None:
    """Load each architecture with their class, save it with their class, and read it again."""
    x = torch.randn(50, D, generator=torch.Generator().manual_seed(0))
    for kind, activation in KINDS:
        name = f"{kind} {activation}"
        ours = make_set(kind, activation, layers=(0, 3))
        (path / name).mkdir()
        write(ours, path / name)
        expected = outputs(ours, x)
        for layer, coder in read(path / name).coders():
            theirs = SAE.load_from_disk(path / name / f"layer_{layer}")
            assert theirs.W_enc.shape == (D, F)
            with torch.no_grad():
                torch.testing.assert_close(
                    theirs(x).double(), expected[layer], rtol=1e-5, atol=1e-5
                )
            theirs.save_model(path / f"{name} again")
            again = read(path / f"{name} again")
            assert again.layers.keys() == {layer}
            weights = again.layers[layer]().state_dict()
            for key, tensor in coder.state_dict().items():
                assert torch.equal(weights[key], tensor), (name, key)
            assert type(again.empty) is type(coder)
        check(f"{name}: their class computes the same, and saves the same bits")


def coders(kind: str, model: Any, seed: int) -> CoderSet:
    """Return random coders of every MLP of a model in float64, with an effect on its logits."""
    draw, layers = torch.Generator().manual_seed(seed), {}
    width, n_layers = model.config.hidden_size, model.config.num_hidden_layers
    for i in range(n_layers):
        settings = AdapterConfig(48)
        layers[i] = (
            TranscoderAdapter(width, settings, dtype=torch.float64)
            if kind == "adapter"
            else Transcoder(width, settings, skip=kind == "skip", dtype=torch.float64)
        )
        with torch.no_grad():
            for tensor in layers[i].state_dict().values():
                tensor.copy_(0.2 * torch.randn(tensor.shape, generator=draw, dtype=torch.float64))
    metadata = {"architecture": model.config.model_type}
    return CoderSet.from_modules(layers, model="tiny", metadata=metadata)


class WithCoders(torch.nn.Module):
    """An MLP and a coder, as the formula has them."""

    def __init__(self, mlp: torch.nn.Module, coder: Any) -> None:
        super().__init__()
        self.mlp, self.coder = mlp, coder

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if isinstance(self.coder, TranscoderAdapter):
            return self.mlp(x) + self.coder(x)[0]
        return self.coder(x)


def models(hybrid: Any, tokenizer: Any) -> dict[str, Any]:
    """Return the hybrid in both of their classes, without folding."""
    hybrid.config.architectures = [type(hybrid).__name__]
    hybrid.config.save_pretrained(NAME)
    plain = HookedSAETransformer.from_pretrained_no_processing(
        NAME, hf_model=hybrid, tokenizer=tokenizer, dtype=torch.float64
    )
    bridge = SAETransformerBridge.boot_transformers(
        NAME, hf_model=copy.deepcopy(hybrid), tokenizer=tokenizer, dtype=torch.float64
    )  # it changes the model that it wraps
    return {"HookedSAETransformer": plain, "SAETransformerBridge": bridge}


def unguarded(model: Any, coders: list[Any], without: torch.Tensor, expected: torch.Tensor) -> None:
    """Show the control: with the real hook name, add_sae runs adapters in place of the MLPs."""
    guarded = [coder.cfg.metadata.hook_name for coder in coders]
    for coder in coders:
        coder.cfg.metadata.hook_name = coder.cfg.metadata.fastadapt["reads"][-1]
    wrong = model.run_with_saes(IDS, saes=coders)
    for coder, name in zip(coders, guarded, strict=True):
        coder.cfg.metadata.hook_name = name
    assert min(float((wrong - right).abs().max()) for right in (without, expected)) > 0.1
    check("adapter: with the real hook name, add_sae would run it in place of the MLP")


def record_mlps(coders: list[Any], model: Any, scale: float = 1.0) -> None:
    """Record the MLPs of a model in transformers as those of the base, as an export does."""
    for coder in coders:
        facts = coder.cfg.metadata.fastadapt
        down = scale * model.model.layers[facts["layer"]].mlp.down_proj.weight.detach()
        facts["base_mlp"] = sample(down, down.shape)


def splices(path: Path) -> None:
    """Compare logits with ours, for coders attached by ``attach`` and by ``add_sae``."""
    hybrid, tokenizer = make_pair()
    without = hybrid(IDS).logits
    for kind in ("adapter", "transcoder", "skip"):
        ours = coders(kind, hybrid, 1)
        (path / f"splice {kind}").mkdir()
        write(ours, path / f"splice {kind}")
        replaced = copy.deepcopy(hybrid)
        for layer, block in enumerate(replaced.model.layers):
            block.mlp = WithCoders(block.mlp, ours.layers[layer]())
        expected = replaced(IDS).logits
        assert not torch.allclose(expected, without, atol=0.1)
        for name, model in models(hybrid, tokenizer).items():
            if name == "SAETransformerBridge":
                places = (PLACES[place] for place in ("mlp_in", "mlp_out", "attn_out"))
                names = [name_hook(place, "transformer_lens", 1) for place in places]
                assert model.hook_dict.keys() >= set(names)
            theirs = [SAE.load_from_disk(p) for p in sorted((path / f"splice {kind}").iterdir())]
            torch.testing.assert_close(model(IDS), without, rtol=0, atol=ROUNDING)
            if kind == "adapter":
                record_mlps(theirs, hybrid)
                record_mlps(theirs, hybrid, scale=1.01)
                with pytest.raises(UserError, match="is not that of"):
                    attach(model, theirs)
                record_mlps(theirs, hybrid)
            attach(model, theirs)
            error = float((model(IDS) - expected).abs().max())
            assert error < ROUNDING, error
            with pytest.raises(UserError, match="already"):
                attach(model, theirs)
            theirs[0].hook_sae_acts_post.add_hook(lambda acts, hook: acts * 0)
            changed = float((model(IDS) - expected).abs().max())
            assert changed > 0.1, changed  # features can be changed there
            theirs[0].reset_hooks()
            model.reset_hooks(including_permanent=True)
            torch.testing.assert_close(model(IDS), without, rtol=0, atol=ROUNDING)
            attach(model, theirs)  # not refused after the reset
            model.reset_hooks(including_permanent=True)
            check(f"{kind} in {name}: attached, logits differ by {error:.1e} from ours")
            error = float((model.run_with_saes(IDS, saes=theirs) - expected).abs().max())
            if kind == "adapter":
                unguarded(model, theirs, without, expected)
            if kind == "transcoder":
                assert error < ROUNDING, error
                check(f"{kind} in {name}: with add_sae, logits differ by {error:.1e} from ours")
            else:
                plain = model.run_with_saes(IDS, saes=theirs)
                torch.testing.assert_close(plain, without, rtol=0, atol=ROUNDING)
                check(f"{kind} in {name}: add_sae skips it; it never replaces the MLP")


if __name__ == "__main__":
    logging.getLogger("sae_lens").setLevel(logging.ERROR)
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        round_trips(Path(folder))
        splices(Path(folder))
    report("sae-lens", "transformer-lens")
