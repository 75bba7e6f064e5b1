"""Write a trained run as one Hugging Face checkpoint, shard by shard."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from fastadapt.adapter.files import read_transcoders
from fastadapt.errors import UserError
from fastadapt.models.hf_checkpoint import (
    CONFIG,
    SHARD_BYTES,
    adapter_tensors,
    as_json,
    read_json,
    replacement_tensors,
    write_checkpoint,
)
from fastadapt.models.hf_classes import classes_of, model_type_of
from fastadapt.models.pretrained import ARCHITECTURES


def export(
    adapters: str | Path,
    folder: str | Path,
    *,
    target: str,
    base: str,
    revisions: dict[str, str | None] | None = None,
    shard_bytes: float = SHARD_BYTES,
    overwrite: bool = False,
) -> None:
    """Write adapters and the pair that they belong to as one checkpoint.

    Configuration (EOS, longest sequence), generation settings, chat template and tokenizer are the
    target's, the latter three as the same files. Weights keep the dtypes that they are stored in;
    ``dtype`` of the configuration, in which they are loaded, is that of the adapters, in which the
    run computed.

    Args:
        adapters: what :func:`fastadapt.save_adapters` wrote.
        folder: new or empty, or with ``overwrite`` an export and nothing else.
        target, base: folders or hub ids, of ``revisions`` of these names.
        shard_bytes: of a shard at most.
        overwrite: replace an export that is there, once the new one is on the disk.

    Raises:
        UserError: adapters and models do not fit, or the folder is in use.
        RunError: the folder cannot be written; it is as it was.
    """
    at = revisions or {}
    layers, card = read_transcoders(adapters, "this export")
    config = read_json(target, CONFIG, at.get("target"))
    architecture = str(config.get("model_type"))
    if architecture not in ARCHITECTURES:
        raise UserError(
            f"target {target}: architecture {architecture!r} is not supported; "
            f"supported: {', '.join(sorted(ARCHITECTURES))}"
        )
    fits = {"layers": (len(layers), config.get("num_hidden_layers"))}
    fits["width"] = (card["d_in"], config.get("hidden_size"))
    for what, (ours, theirs) in fits.items():
        if ours != theirs:
            raise UserError(f"{what}: adapters {adapters} have {ours}, target {target} {theirs}")
    paths = ARCHITECTURES[architecture]
    kind = dataclasses.replace(card["adapter"], implementation="auto")
    mlp = f".{paths.mlp}."
    tensors = {
        name.replace(mlp, f"{mlp}base.") if name.startswith(f"{paths.decoder}.") else name: read
        for name, read in replacement_tensors(target, base, at).items()
    }
    tensors |= adapter_tensors(layers, paths)
    own: dict[str, Any] = {key: value for key, value in config.items() if key != "torch_dtype"}
    own |= {
        "architectures": [classes_of(architecture)[2].__name__],
        "model_type": model_type_of(architecture),
        "adapter": dataclasses.asdict(kind),
        "dtype": str(layers[0]().W_enc.dtype).removeprefix("torch."),
    }
    write_checkpoint(
        Path(folder),
        tensors,
        as_json(own),
        companions=target,
        revision=at.get("target"),
        shard_bytes=shard_bytes,
        overwrite=overwrite,
    )
