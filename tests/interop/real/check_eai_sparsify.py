"""Check the files of ``interop/sparsify.py`` with sparsify itself. Run by ``make interop``."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import torch
from checks import check, report
from sets import D, make_set, outputs
from sparsify import SparseCoder

from fastadapt.errors import UserError
from fastadapt.interop.sparsify import read, write

KINDS = [(kind, a) for kind in ("subtracting sae", "transcoder", "skip") for a in ("relu", "topk")]


def round_trips(path: Path) -> None:
    """Load each kind with their class, save it with their class, and read it again."""
    x = torch.randn(50, D, generator=torch.Generator().manual_seed(0))
    for kind, activation in KINDS:
        name = f"{kind} {activation}"
        ours = make_set(kind, activation, layers=(0, 3), square=True)
        (path / name).mkdir()
        write(ours, path / name)
        expected = outputs(ours, x)
        theirs = SparseCoder.load_many(str(path / name), local=True)
        for layer, coder in read(path / name).coders():
            module = "layers.{}" if "sae" in kind else "layers.{}.mlp"
            sparse = theirs[module.format(layer)]
            with torch.no_grad():
                out = sparse(x).sae_out
            torch.testing.assert_close(out.double(), expected[layer], rtol=1e-5, atol=1e-5)
            saved = path / f"{name} again" / module.format(layer)
            sparse.save_to_disk(saved)
            again = read(saved).layers[layer]()
            for key, tensor in coder.state_dict().items():
                assert torch.equal(again.state_dict()[key], tensor), (name, key)
        check(f"{name}: their class computes the same, and saves the same bits")


def adapters(path: Path) -> None:
    """Show that a marker would not help: their configuration drops it."""
    path.mkdir()
    message = ""
    try:
        write(make_set("adapter", square=True), path)
    except UserError as refused:
        message = str(refused)
    assert "in place of the MLPs that they are added to" in message
    assert not any(path.iterdir())
    check("adapters: refused")
    write(make_set("mlp", layers=(0,), square=True), path)
    file = path / "layers.0.mlp" / "cfg.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "additive": True}))
    sparse = SparseCoder.load_from_disk(file.parent)
    assert not hasattr(sparse.cfg, "additive")
    check("a marker additive in cfg.json is dropped by their reader, which runs the file as an MLP")


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        round_trips(Path(folder))
        adapters(Path(folder) / "adapters")
    report("eai-sparsify")
