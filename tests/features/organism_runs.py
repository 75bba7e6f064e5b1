"""Runs of the embedded pair with random adapters of a chosen L0, and the dense activations of a run
on the texts of its store."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import torch
import yaml
from stores import StoreText

from fastadapt.adapter.files import save_adapters
from fastadapt.adapter.module import AdapterConfig
from fastadapt.data.batches import collate
from fastadapt.data.sequences import DataConfig, load_sequences
from fastadapt.evaluation.models_under_test import ModelSet
from fastadapt.features.collect.texts import batch_of, batches_of, read_group
from fastadapt.models.replacement import Mode, ModelPair, PairConfig, ReplacementModel
from fastadapt.organism import resolve

PAIR = {"target": "organism/target", "base": "organism/base"}
DATA = {
    "validation": "organism/validation",
    "validation_split": "validation",
    "revision": None,
    "family": "r1-distill",
}


def make_run(
    folder: Path,
    *,
    n_features: int = 24,
    l0: float = 3.0,
    seed: int = 0,
    organism: str = "organism",
    **config: Any,
) -> Path:
    """Write a finished run's folder: ``config.yaml`` and ``adapter/``; ``organism`` is the pair."""
    names = {role: f"{organism}/{role}" for role in PAIR}
    read = {**DATA, "validation": f"{organism}/validation"}
    named: dict[str, Any] = {role: resolve(name) for role, name in names.items()}
    pair = ModelPair.load(PairConfig(**named, device="cpu"))
    model = ReplacementModel.create(pair, AdapterConfig(n_features, **config), seed=seed).eval()
    draw = torch.Generator().manual_seed(seed)
    data = DataConfig("", resolve(f"{organism}/validation"), max_validation=24)
    texts = load_sequences(data.validation, pair.tokenizer, data, split="validation")
    batch = collate(list(texts), 0)
    inputs = model.block_inputs(batch.input_ids, batch.attention_mask)
    hidden = inputs.hidden
    with torch.no_grad():
        adapter: Any
        for layer, adapter in enumerate(model.adapters):
            seen: list[torch.Tensor] = []
            handle = adapter.register_forward_pre_hook(
                lambda _, given, seen=seen: seen.append(given[0])
            )
            model.block(layer, hidden, inputs.arguments[layer], "replacement")
            handle.remove()
            z = (seen[0][batch.real] @ adapter.W_enc.T).float()
            adapter.b_enc.copy_(-z.quantile(1 - l0 / n_features, dim=0))
            adapter.W_dec.copy_(0.02 * torch.randn(adapter.W_dec.shape, generator=draw))
            hidden, _ = model.block(layer, hidden, inputs.arguments[layer], "replacement")
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(yaml.safe_dump({"pair": names, "data": read}))
    card = {**names, "family": "r1-distill", "measured": {"l0_mean": l0}}
    save_adapters(model.adapters, folder / "adapter", card)
    return folder


def dense_activations(
    run: Path, store: Path, batch_tokens: int, kind: str = "adapter", k: int = 0
) -> Iterator[tuple[StoreText, np.ndarray]]:
    """Yield each text of a store with its dense activations, float32 ``[L, T, F]``.

    Hooks record the inputs of modules in the blocks, in the batches of the collection. Inputs of
    adapters are encoded densely. Of the inputs of the MLPs' output matrices, the k strongest of
    each token are selected.
    """
    models = ModelSet.open([run], device="cpu")
    model = models.replacement(models.runs[0])
    modules: list[Any] = list(model.adapters)
    if kind != "adapter":
        modules = [getattr(mlp, kind).down_proj for mlp in model.mlps]
    seen: list[torch.Tensor] = []
    for module in modules:
        module.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    file = pq.ParquetFile(store / "texts.parquet")
    for group in range(file.num_row_groups):
        by_number = {}
        for batch_texts in batches_of(
            read_group(store / "texts.parquet", file, group), batch_tokens
        ):
            seen.clear()
            batch = batch_of(batch_texts)
            mode: Mode = "target" if kind == "target" else "replacement"
            padding = None if batch.attention_mask is None else ~batch.real
            with torch.no_grad():
                inputs = model.block_inputs(batch.input_ids, batch.attention_mask)
                hidden = inputs.hidden
                for layer, arguments in enumerate(inputs.arguments):
                    hidden, _ = model.block(layer, hidden, arguments, mode, padding=padding)
                activations = [
                    module.encode(x) if kind == "adapter" else _strongest(x, module.weight, k)
                    for module, x in zip(modules, seen, strict=True)
                ]
            a = torch.stack(activations).numpy()
            for i, text in enumerate(batch_texts):
                length = len(text.tokens)
                entry = StoreText(text.tokens.tolist(), text.regions.tolist(), text.domain)
                by_number[text.number] = entry, a[:, i, :length]
        yield from (by_number[number] for number in sorted(by_number))


def _strongest(h: torch.Tensor, weight: torch.Tensor, k: int) -> torch.Tensor:
    """Return ``h`` with zeros except at each token's k largest contributions."""
    score = h * weight.norm(dim=0)
    rank = score.argsort(dim=-1, descending=True).argsort(dim=-1)
    return torch.where((rank < k) & (h > 0), h, 0)


def hashed(seed: int, kind: int, layer: int, feature: int, text: int, position: int) -> int:
    """Return the priority of an activation by Python integers, as an oracle for the tensor code."""
    mask, step = 2**64 - 1, 0x9E3779B97F4A7C15

    def mix(x: int) -> int:
        x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & mask
        x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & mask
        return x ^ (x >> 31)

    unit = seed
    for part in (kind, layer, feature):
        unit = (mix((unit + step) & mask) + part) & mask
    token = mix((mix((text + step) & mask) + position) & mask)
    return mix(mix(unit) ^ token) & (2**63 - 1)


def files_of(folder: Path) -> dict[str, bytes]:
    """Return the contents of every file of a store, by name."""
    paths = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {str(p.relative_to(folder)): p.read_bytes() for p in paths if p.name != ".lock"}
