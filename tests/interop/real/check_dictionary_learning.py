"""Check ``interop/dictionary_learning.py`` with dictionary_learning. Run by ``make interop``."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import torch
from checks import check, report
from dictionary_learning import dictionary
from dictionary_learning.trainers.batch_top_k import BatchTopKSAE
from dictionary_learning.trainers.top_k import AutoEncoderTopK
from safetensors.torch import load_file, save_file
from sets import D, F, make_set, outputs

from fastadapt.errors import UserError
from fastadapt.interop.dictionary_learning import read, write

KINDS = [("subtracting sae", a) for a in ("relu", "topk", "batch_topk")]
KINDS += [("sae", "relu"), ("sae", "jumprelu"), ("transcoder", "relu"), ("transcoder", "jumprelu")]
CLASSES: dict[str, Any] = {
    "AutoEncoder": dictionary.AutoEncoder,
    "AutoEncoderNew": dictionary.AutoEncoderNew,
    "AutoEncoderTopK": AutoEncoderTopK,
    "BatchTopKSAE": BatchTopKSAE,
    "JumpReluAutoEncoder": dictionary.JumpReluAutoEncoder,
}


def round_trips(path: Path) -> None:
    """Load each class's state dict, save it as they would, convert it, and read it again."""
    x = torch.randn(50, D, generator=torch.Generator().manual_seed(0))
    for kind, activation in KINDS:
        name = f"{kind} {activation}"
        ours = make_set(kind, activation, layers=(0, 3), square=True)
        (path / name).mkdir()
        write(ours, path / name)
        expected = outputs(ours, x)
        for layer, coder in read(path / name).coders():
            folder = path / name / f"layer_{layer}"
            trainer = json.loads((folder / "config.json").read_text())["trainer"]
            k = [trainer["k"]] if "k" in trainer else []
            theirs = CLASSES[trainer["dict_class"]](D, F, *k)
            theirs.load_state_dict(load_file(folder / "ae.safetensors"))
            with torch.no_grad():
                out = theirs(x).double()
            torch.testing.assert_close(out, expected[layer], rtol=1e-5, atol=1e-5)
            (folder / "ae.safetensors").unlink()
            torch.save(theirs.state_dict(), folder / "ae.pt")
            message = ""
            try:
                read(folder)
            except UserError as refused:
                message = str(refused)
            assert "is a pickle" in message
            state = torch.load(folder / "ae.pt", map_location="cpu", weights_only=True)
            save_file(
                {key: tensor.clone().contiguous() for key, tensor in state.items()},
                folder / "ae.safetensors",
            )
            again = read(folder).layers[layer]()
            for key, tensor in coder.state_dict().items():
                assert torch.equal(again.state_dict()[key], tensor), (name, key)
        check(f"{name}: {trainer['dict_class']} computes the same, and saves the same bits")


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        round_trips(Path(folder))
    report("dictionary-learning")
