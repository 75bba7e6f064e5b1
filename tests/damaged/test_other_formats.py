"""Damaged folders of other projects' formats, and of SAEs and transcoders in this library's."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from damage import Damage, sweep, variants
from sets import make_set, randomised, weights_of, write_cross_layer

from fastadapt.adapter.coder import SparseCoder
from fastadapt.adapter.coder_files import CoderSet, save_coders
from fastadapt.adapter.module import AdapterConfig
from fastadapt.adapter.sae import Transcoder
from fastadapt.interop import dictionary_learning, saelens, sparsify, transcoder_sets
from fastadapt.interop.cross_layer import read_cross_layer_set
from fastadapt.models.trained_files import load_adapters


def of_twice_the_width() -> SparseCoder:
    """Return a transcoder whose number of features is that of a default without ``num_latents``."""
    return randomised(Transcoder(5, AdapterConfig(10, "topk", k=2)), 0)


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
    ("ours", "fastadapt.json"),
    ("ours", "layer_12.safetensors"),
]

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
}


def is_valid(damage: Damage, path: Path) -> bool:
    if path.suffix == ".safetensors":
        return damage.name.startswith("bit flip")  # the format has no checksum
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
    names = (path.name, *(("layer_",) if name in ("ours", "circuit-tracer") else ()))
    sweep(path, variants(path), lambda: read(folder), lambda d, _: is_valid(d, path), names)
