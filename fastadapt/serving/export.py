"""Write a trained run as one Hugging Face checkpoint, shard by shard."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from fastadapt.adapter.files import read_transcoders
from fastadapt.errors import UserError
from fastadapt.models.architectures import ARCHITECTURES
from fastadapt.models.huggingface.checkpoint import (
    SHARD_BYTES,
    adapter_tensors,
    as_json,
    companions_of,
    replacement_tensors,
    target_values,
    write_checkpoint,
)
from fastadapt.models.huggingface.classes import classes_of, model_type_of


def export(
    adapters: str | Path,
    folder: str | Path,
    *,
    target: str,
    base: str,
    revisions: dict[str, str | None] | None = None,
    tokenizer: str | None = None,
    shard_bytes: float = SHARD_BYTES,
    overwrite: bool = False,
) -> None:
    """Write adapters and their pair as one checkpoint.

    The target's configuration, generation settings, chat template and tokenizer are used; the last
    three are copied unchanged. Weights keep their stored dtypes. The configuration's ``dtype``, in
    which transformers loads the weights, is the adapters' dtype, in which the run computed.

    Args:
        adapters: a folder written by :func:`fastadapt.save_adapters`.
        folder: a new or empty folder, or with ``overwrite`` an export.
        target, base: folders or hub ids of the pair.
        revisions: revisions with the keys ``target`` and ``base``.
        tokenizer: folder or hub id of the tokenizer, if it is not the target's.
        shard_bytes: largest size of a shard in bytes.
        overwrite: replace an existing export after the new one is on disk.

    Raises:
        UserError: the adapters do not fit the models, or the folder holds other files.
        RunError: the folder cannot be written; it is left as it was.
    """
    revisions = revisions or {}
    layers, card = read_transcoders(adapters, "this export")
    config = target_values(target, base, revisions)
    architecture = str(config.get("model_type"))
    if architecture not in ARCHITECTURES:
        raise UserError(
            f"target {target}: architecture {architecture!r} is not supported; "
            f"supported: {', '.join(sorted(ARCHITECTURES))}"
        )
    sizes = {"layers": (len(layers), config.get("num_hidden_layers"))}
    sizes["width"] = (card["d_in"], config.get("hidden_size"))
    for name, (size, expected) in sizes.items():
        if size != expected:
            raise UserError(
                f"{name}: adapters {adapters} have {size}, but target {target} has {expected}; "
                "give the pair that they were trained with"
            )
    paths = ARCHITECTURES[architecture]
    settings = dataclasses.replace(card["adapter"], implementation="auto")
    mlp = f".{paths.mlp}."
    tensors = {
        name.replace(mlp, f"{mlp}base.") if name.startswith(f"{paths.decoder}.") else name: read
        for name, read in replacement_tensors(target, base, revisions).items()
    }
    tensors |= adapter_tensors(layers, paths)
    values: dict[str, Any] = {k: value for k, value in config.items() if k != "torch_dtype"}
    values |= {
        "architectures": [classes_of(architecture)[2].__name__],
        "model_type": model_type_of(architecture),
        "adapter": dataclasses.asdict(settings),
        "dtype": str(layers[0]().W_enc.dtype).removeprefix("torch."),
    }
    write_checkpoint(
        Path(folder),
        tensors,
        as_json(values),
        companions=companions_of(target, base, revisions, tokenizer),
        shard_bytes=shard_bytes,
        overwrite=overwrite,
    )
