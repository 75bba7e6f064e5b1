"""Damaged folders of other projects' formats, and of SAEs and transcoders in this library's."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from damage import Damage, sweep, variants
from safetensors.torch import save_file
from sets import make_set, randomised, weights_of, write_cross_layer

from fastadapt.adapter.coder import SparseCoder
from fastadapt.adapter.coder_files import CoderSet, save_coders
from fastadapt.adapter.module import AdapterConfig, TranscoderAdapter
from fastadapt.adapter.sae import Transcoder
from fastadapt.interop import dictionary_learning, hu2026, saelens, sparsify, transcoder_sets
from fastadapt.interop.cross_layer import read_cross_layer_set
from fastadapt.interop.hu2026_format import NAMES
from fastadapt.models.trained_files import load_adapters


def of_twice_the_width() -> SparseCoder:
    """Return a transcoder whose number of features is that of a default without ``num_latents``."""
    return randomised(Transcoder(5, AdapterConfig(10, "topk", k=2)), 0)


def write_published(path: Path) -> None:
    """Write a published checkpoint without the tensors that its adapters do not need."""
    config = {
        "model_type": "qwen2",
        "hidden_size": 4,
        "num_attention_heads": 2,
        "num_hidden_layers": 2,
        "transcoder_n_features": 6,
        "transcoder_dec_bias": True,
    }
    (path / "config.json").write_text(json.dumps(config))
    tensors = {}
    for layer in range(2):
        adapter = randomised(TranscoderAdapter(4, AdapterConfig(6)), layer)
        for ours, theirs in NAMES.items():
            tensor = getattr(adapter, ours).detach()
            tensor = tensor.T.contiguous() if ours == "W_dec" else tensor
            tensors[f"model.layers.{layer}.mlp.{theirs}"] = tensor
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})


def read_published(path: Path) -> None:
    hu2026.to_adapters(str(path), path.parent / "converted", overwrite=True)


#: Readers, and how a small folder of their format is written.
READERS: dict[str, tuple[Callable[[Path], Any], Callable[[Path], Any]]] = {
    "saelens": (
        lambda path: weights_of(saelens.read(path)),
        lambda path: saelens.write(make_set("transcoder", layers=(3,), square=True), path),
    ),
    "sparsify": (
        lambda path: weights_of(sparsify.read(path)),
        lambda path: sparsify.write(CoderSet.from_modules({3: of_twice_the_width()}), path),
    ),
    "dictionary-learning": (
        lambda path: weights_of(dictionary_learning.read(path)),
        lambda path: dictionary_learning.write(
            make_set("subtracting sae", "topk", layers=(3,)), path
        ),
    ),
    "circuit-tracer": (
        lambda path: weights_of(transcoder_sets.read(path)),
        lambda path: transcoder_sets.write(make_set("transcoder", square=True), path),
    ),
    "cross-layer": (read_cross_layer_set, lambda path: write_cross_layer(path, optional=False)),
    "hu2026": (read_published, write_published),
    "ours": (
        load_adapters,
        lambda path: save_coders(make_set("subtracting sae", layers=(3, 12)), path),
    ),
}
#: Files to damage, and the names of which one must be in a message.
FILES = [
    ("saelens", "layer_3/cfg.json"),
    ("saelens", "layer_3/sae_weights.safetensors"),
    ("sparsify", "layers.3.mlp/cfg.json"),
    ("sparsify", "layers.3.mlp/sae.safetensors"),
    ("dictionary-learning", "layer_3/config.json"),
    ("dictionary-learning", "layer_3/ae.safetensors"),
    ("circuit-tracer", "config.yaml"),
    ("circuit-tracer", "layer_1.safetensors"),
    ("cross-layer", "config.yaml"),
    ("cross-layer", "W_enc_1.safetensors"),
    ("cross-layer", "W_dec_1.safetensors"),
    ("hu2026", "config.json"),
    ("hu2026", "model.safetensors"),
    ("ours", "fastadapt.json"),
    ("ours", "layer_12.safetensors"),
]

#: Other texts that say where the damage is: the numbered file, or the folder and a tensor in it.
NAMED = {
    "ours": ("layer_",),
    "circuit-tracer": ("layer_",),
    "hu2026": ("): tensor model.layers.", "transcoder tensors are missing", "has model type `"),
}

#: Keys that may have any value of their type, or that no reader uses.
FREE = {
    *("orientation", "W_enc", "W_dec", "W_skip"),
    *("dtype", "device", "sae_lens_version", "model_name", "hook_name", "hook_name_out"),
    *("model_from_pretrained_kwargs", "fold_ln", "additive", "bandwidth", "initial_threshold"),
    *("normalize_decoder", "multi_topk", "expansion_factor", "transcode"),
    *(
        "reads",
        "writes",
        "layer",
        "lm_name",
        "submodule_name",
        "io",
        "feature_input_hook",
        "feature_output_hook",
    ),
    *("model", "architecture", "subtract_b_dec"),
    *("huggingface", "transformer_lens", "nnterp", "interp_engine"),
}
#: Further variants that are valid: a key that is absent has a default.
VALID = {
    *("normalize_activations None", "normalize_activations removed", "metadata removed"),
    *("reshape_activations None", "reshape_activations removed", "metadata {}"),
    *("metadata.fastadapt None", "metadata.fastadapt removed", "architecture removed"),
    *("activation removed", "num_latents 0", "num_latents removed", "skip_connection removed"),
    *("buffer removed", "buffer {}", "model_kind removed"),
    *("adapter.base_mlp removed", "adapter.bias removed"),
    *("num_attention_heads removed", "transcoder_dec_bias removed"),
}


def is_valid(damage: Damage, path: Path) -> bool:
    if path.suffix == ".safetensors":
        # The format has no checksum, and a published checkpoint has tensors beside its adapters.
        more = path.name == "model.safetensors" and damage.name == "one tensor more"
        return more or damage.name.startswith("bit flip")
    if path.suffix == ".yaml" and damage.name in ("document is {}", "1e400", "NaN"):
        return True
    cut = path.suffix == ".yaml" and damage.name.startswith("cut at")
    return damage.key in FREE or damage.name in VALID or damage.name.startswith("bit flip") or cut


@pytest.mark.parametrize(("name", "file"), FILES, ids=lambda part: part.replace("/", " "))
def test_every_damage_is_refused_by_name(name: str, file: str, tmp_path: Path) -> None:
    read, write = READERS[name]
    folder = tmp_path / "set"
    folder.mkdir()
    write(folder)
    path = folder / file
    read(folder)  # the control: the sound folder is accepted
    names = (path.name, *NAMED.get(name, ()))
    sweep(path, variants(path), lambda: read(folder), lambda d, _: is_valid(d, path), names)
