"""Read checkpoints: configuration, tokenizer, shards, and the MLPs alone. Only safetensors."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastadapt.errors import UserError
from fastadapt.io.names import check_name


@dataclass(frozen=True)
class Paths:
    """Attribute paths of an architecture's parts, from the causal language model down.

    ``attention`` is the implementation to use where flash-attn is not: ``eager`` for Gemma 2, whose
    soft-capped attention scores torch's fused attention cannot make.
    """

    decoder: str = "model"
    layers: str = "layers"
    mlp: str = "mlp"
    norm: str = "norm"
    attention: str = "sdpa"


#: The architectures whose gradients and modes are tested.
ARCHITECTURES: Mapping[str, Paths] = {
    "qwen2": Paths(),
    "llama": Paths(),
    "gemma2": Paths(attention="eager"),
    "gemma3_text": Paths(),
    "mistral": Paths(),
    "olmo2": Paths(),
    "phi3": Paths(),
    "qwen3": Paths(),
}


#: Shapes of the presets' models.
SHAPES = Path(__file__).parent / "presets" / "shapes.json"


@contextmanager
def reading(what: str, source: str) -> Iterator[None]:
    """Turn what a missing, broken or misshapen source raises into one line that names it."""
    from safetensors import SafetensorError

    try:
        yield
    except SafetensorError as e:
        raise UserError(
            f"{what} {source!r}: a safetensors file is truncated or damaged: {e}"
        ) from e
    # transformers raises the latter three on configurations that it did not expect.
    except (OSError, ValueError, RuntimeError, TypeError, KeyError, AttributeError) as e:
        no_memory = isinstance(e, torch.OutOfMemoryError) or "not enough memory" in str(e)
        if isinstance(e, UserError) or no_memory:
            raise
        reason = " ".join(str(e).split())
        raise UserError(f"{what} {source!r} cannot be loaded: {reason[:300]}") from e


def model_config(source: str, revision: str | None, trust: bool) -> Any:
    """transformers' configuration of a local folder or hub id.

    Its implementation of attention is the caller's to choose: a ``config.json`` may name code of
    the hub there, with or without ``trust`` in the code of the model.
    """
    from transformers import AutoConfig

    looks_local = source.startswith(("/", ".", "~")) or source.count("/") > 1
    if looks_local and not Path(source).is_dir():
        raise UserError(
            f"model {source!r} cannot be loaded: no such folder; expected one, or a hub id"
        )
    with reading("model", source):
        config = AutoConfig.from_pretrained(source, revision=revision, trust_remote_code=trust)
    config._attn_implementation = None
    return config


def shipped_config(source: str) -> Any | None:
    """transformers' configuration of a hub model that a preset names: its shapes, offline.

    For plans alone: what has no influence on shapes (positions, rotary bases) is not in it. None
    for other models.
    """
    from transformers import AutoConfig

    known = json.loads(SHAPES.read_text(encoding="utf-8")).get(source)
    return None if known is None else AutoConfig.for_model(**known)


def load_tokenizer(source: str, revision: str | None, trust: bool) -> Any:
    """The tokenizer of a local folder or hub id."""
    from transformers import AutoTokenizer

    with reading("tokenizer of", source):
        return AutoTokenizer.from_pretrained(source, revision=revision, trust_remote_code=trust)


def fetch(source: str, name: str, revision: str | None) -> Path | None:
    """Local path of one file of a folder or hub repository, or None where it has none."""
    from transformers.utils import cached_file

    found = cached_file(
        source, name, revision=revision, _raise_exceptions_for_missing_entries=False
    )
    return None if found is None else Path(found)


def tensor_files(source: str, revision: str | None) -> dict[str, Path]:
    """File of every shard, by name. Shards named by an index may not lie outside their folder."""
    index = fetch(source, "model.safetensors.index.json", revision)
    if index is None:
        single = fetch(source, "model.safetensors", revision)
        if single is None:
            raise UserError(
                f"{source}: no model.safetensors found; only safetensors checkpoints are read"
            )
        return {"model.safetensors": single}
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError) as e:
        raise UserError(f"{index} is not an index of shards: {e!r}") from e
    files = {}
    for name in names:
        check_name(name, f"{index}: weight_map")
        file = fetch(source, name, revision)
        if file is None:
            raise UserError(f"{source}: shard {name!r} named by the index is missing")
        files[name] = file
    return files


def load_causal_lm(
    source: str,
    revision: str | None,
    *,
    device: torch.device,
    dtype: torch.dtype,
    attention: str,
    trust: bool,
    role: str = "target",
    besides: Collection[str] = (),
) -> Any:
    """transformers' causal language model of a checkpoint, in eval mode, no weight left over.

    ``besides`` are the tensors that the checkpoint may hold and the model does not; ``role`` is the
    checkpoint's name in messages.
    """
    from transformers import AutoModelForCausalLM

    tensor_files(source, revision)
    with reading(role, source), _no_report() if besides else nullcontext():
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            source,
            revision=revision,
            dtype=dtype,
            attn_implementation=attention,
            trust_remote_code=trust,
            use_safetensors=True,
            ignore_mismatched_sizes=True,  # so that the check below names the weight
            output_loading_info=True,
            **({"device_map": {"": device}} if device.type != "cpu" else {}),
        )
    model, info = loaded
    for key in ("missing_keys", "mismatched_keys", "unexpected_keys"):
        if odd := sorted(map(str, set(info.get(key, ())) - set(besides))):
            raise UserError(f"{role} {source}: {len(odd)} {key.replace('_', ' ')}: {odd[:3]}")
    if getattr(model.get_output_embeddings(), "bias", None) is not None:
        raise UserError(f"{role} {source}: a head with a bias is not supported")
    return model.eval()


@contextmanager
def _no_report() -> Iterator[None]:
    """Without transformers' table of tensors that it does not know, which are known to the caller.

    What is wrong with a checkpoint is raised from the same facts.
    """
    from transformers.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)


def load_mlps(
    source: str,
    revision: str | None,
    config: Any,
    *,
    device: torch.device,
    dtype: torch.dtype,
    trust: bool,
    role: str = "base",
) -> nn.ModuleList:
    """The MLP modules of a checkpoint, one per layer, with their weights; nothing else is read.

    On the meta device they are shapes, and nothing is read.
    ``config`` is the checkpoint's :func:`model_config`; ``role`` is its name in messages.
    """
    from safetensors import safe_open
    from transformers import AutoModelForCausalLM

    paths = ARCHITECTURES[config.model_type]
    with torch.device("meta"):
        skeleton = AutoModelForCausalLM.from_config(config, trust_remote_code=trust)
    layers = getattr(getattr(skeleton, paths.decoder), paths.layers)
    mlps = nn.ModuleList(getattr(layer, paths.mlp) for layer in layers)
    prefixes = [f"{paths.decoder}.{paths.layers}.{i}.{paths.mlp}." for i in range(len(mlps))]
    wanted = {
        prefix + name
        for prefix, mlp in zip(prefixes, mlps, strict=True)
        for name in mlp.state_dict()
    }
    if device.type == "meta":
        return mlps.to(dtype).eval()
    tensors: dict[str, Tensor] = {}
    for file in tensor_files(source, revision).values():
        with (
            reading(role, str(file)),
            safe_open(file, framework="pt", device=str(device)) as shard,
        ):
            for name in wanted & set(shard.keys()):
                tensors[name] = shard.get_tensor(name).to(dtype)
    if missing := sorted(wanted - set(tensors)):
        raise UserError(f"{role} {source}: {len(missing)} MLP weights are missing: {missing[:3]}")
    for prefix, mlp in zip(prefixes, mlps, strict=True):
        own = {name: tensors[prefix + name] for name in mlp.state_dict()}
        for name, parameter in mlp.state_dict().items():
            if own[name].shape != parameter.shape:
                raise UserError(
                    f"{role} {source}: {prefix}{name}: expected {tuple(parameter.shape)}, "
                    f"got {tuple(own[name].shape)}"
                )
        mlp.load_state_dict(own, assign=True)
    return mlps.eval()
