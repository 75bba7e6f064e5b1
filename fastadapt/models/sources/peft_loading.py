"""Load a target that is a PEFT folder, over the weights of its base.

``peft`` builds and loads the adapter. Then the low-rank layers inside the blocks become
:class:`LowRankLinear`, and everything else, such as embeddings, is merged in memory: the base gives
the pair no more than its MLPs.
"""

from __future__ import annotations

import copy
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from fastadapt.errors import UserError
from fastadapt.io.tensors import check_tensor, open_tensors
from fastadapt.models.architectures import ARCHITECTURES
from fastadapt.models.pretrained import load_causal_lm, reading
from fastadapt.models.sources.low_rank import (
    RANKS,
    LowRankLinear,
    attach_ranks,
    dora_gain,
    set_parameter,
    shared_names,
    sharing_copy,
)
from fastadapt.models.sources.peft_folder import ORIGINAL, READ, PeftFolder

_MAGNITUDE = "lora_magnitude_vector"  # of DoRA: in peft's layers, and in the names of tensors


def peft_config(folder: PeftFolder, base: str, base_config: Any, trust: bool) -> Any:
    """Return transformers' configuration of a PEFT target: its base's, with the target's sizes.

    The entry :data:`RANKS` has the largest rank of every part of a block, by name.

    Raises:
        UserError: the base is another base than the adapter's.
    """
    config = copy.deepcopy(base_config)
    if config.model_type not in ARCHITECTURES:
        return config
    config.vocab_size = folder.rows(config.vocab_size)
    config.tie_word_embeddings = config.tie_word_embeddings and not folder.unties()
    folder.check_fits(_empty(config, "eager", torch.float32, trust), base)
    config._commit_hash = folder.commit
    setattr(config, RANKS, _ranks(folder, config.model_type))
    return config


def _ranks(folder: PeftFolder, model_type: str) -> dict[str, tuple[int, bool]]:
    paths, largest = ARCHITECTURES[model_type], dict[str, tuple[int, bool]]()
    inside = re.compile(rf"{paths.decoder}\.{paths.layers}\.\d+\.(.+)")
    for name, rank, dora in folder.ranks(paths):
        if match := inside.fullmatch(name):
            before = largest.get(match[1], (0, False))
            largest[match[1]] = max(before, (rank, dora))
    return largest


def _empty(config: Any, attention: str, dtype: torch.dtype, trust: bool) -> Any:
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(
            config, dtype=dtype, attn_implementation=attention, trust_remote_code=trust
        )


def empty_pair(
    folder: PeftFolder, config: Any, attention: str, dtype: torch.dtype, trust: bool
) -> tuple[Any, nn.ModuleList]:
    """Return the models of :func:`load_pair` on the meta device, without values."""
    model = _empty(config, attention, dtype, trust)
    paths = ARCHITECTURES[config.model_type]
    blocks = getattr(getattr(model, paths.decoder), paths.layers)
    base_mlps = nn.ModuleList(sharing_copy(getattr(block, paths.mlp)) for block in blocks)
    attach_ranks(model, {name: (rank, dora) for name, rank, dora in folder.ranks(paths)})
    return model.eval(), base_mlps.eval()


def load_pair(
    folder: PeftFolder,
    base: str,
    revision: str | None,
    config: Any,
    *,
    device: torch.device,
    dtype: torch.dtype,
    attention: str,
    trust: bool,
) -> tuple[Any, nn.ModuleList]:
    """Load the target of a PEFT folder and its base's MLPs, which share the base's weights.

    Args:
        folder: the PEFT folder.
        base, revision: the base.
        config: the target's :func:`peft_config`.
        device, dtype: of the weights.
        attention: transformers' name of the attention implementation.
        trust: run Python code that comes with the base.

    Returns:
        The target in eval mode, and the base's MLPs, one per layer.

    Raises:
        UserError: peft is not installed; a weight of the base or of the adapter is missing.
    """
    try:
        from peft import LoraConfig, PeftModel, set_peft_model_state_dict
    except ImportError:
        raise UserError(
            f"target {folder.source} is a PEFT folder, which needs peft: "
            "pip install 'fastadapt[peft]'"
        ) from None
    model = load_causal_lm(
        base,
        revision,
        device=device,
        dtype=dtype,
        attention=attention,
        trust=trust,
        role="base",
    ).requires_grad_(False)
    _resize(model, config.vocab_size)
    paths = ARCHITECTURES[config.model_type]
    blocks = getattr(getattr(model, paths.decoder), paths.layers)
    base_mlps = nn.ModuleList(sharing_copy(getattr(block, paths.mlp)) for block in blocks)
    settings = {k: v for k, v in folder.settings.items() if k in READ and v is not None}
    with _peft(folder.source):
        wrapped = PeftModel(
            model,
            LoraConfig(**settings, init_lora_weights=False, task_type="CAUSAL_LM"),
            autocast_adapter_dtype=False,
        ).eval()
        _widen_magnitudes(wrapped)
        tensors = _read(folder, device, dtype)
        loaded: Any = set_peft_model_state_dict(wrapped, tensors)
    if folder.unties():
        _untie(model)
    parameters = dict(wrapped.named_parameters(remove_duplicate=False))
    filled = {id(p) for name, p in parameters.items() if name not in loaded.missing_keys}
    missing = [
        name
        for name in loaded.missing_keys
        if _is_adapters(name) and id(parameters.get(name)) not in filled
    ]
    unexpected = [name for name in loaded.unexpected_keys if not _is_repeated(name, tensors)]
    for what, odd in (("missing", missing), ("unexpected", unexpected)):
        if odd:
            raise UserError(
                f"target {folder.source}: {len(odd)} tensors of the PEFT adapter are {what}: "
                f"{sorted(odd)[:3]}; save the PEFT adapter again with peft"
            )
    for block in blocks:
        _convert(block, folder)
    with _peft(folder.source):
        target = wrapped.merge_and_unload().requires_grad_(False)
    if any(".base_layer." in name for name, _ in target.named_parameters()):
        raise UserError(
            f"target {folder.source}: trainable_token_indices beside another adapter of the tied "
            "head is not supported; give the merged model"
        )
    _check_rows(target, folder)
    tied = target.get_input_embeddings().weight is target.get_output_embeddings().weight
    target.config.tie_word_embeddings = tied
    setattr(target.config, RANKS, getattr(config, RANKS))
    return target.eval(), base_mlps.eval()


@contextmanager
def _peft(source: str) -> Iterator[None]:
    """Name the target in errors of peft; silence its warnings of tied weights, which are untied."""
    with reading("target", source), warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*tie_word_embeddings", UserWarning)
        yield


def _read(folder: PeftFolder, device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    tensors = {}
    with open_tensors(folder.weights, device) as file:
        for name in file.keys():  # noqa: SIM118
            if ORIGINAL in name:
                continue
            tensor = file.get_tensor(name)
            check_tensor(tensor, str(folder.weights), name, finite=True)
            # A saved module may be in the file under both names.
            wide = tensor.dtype if _MAGNITUDE in name else dtype
            tensors[name.replace(".modules_to_save.", ".")] = tensor.to(wide)
    return tensors


def _widen_magnitudes(wrapped: Any) -> None:
    """Let the magnitudes of DoRA have float32 at least, whatever the model's dtype.

    A magnitude differs from the norm of a row by a small fraction, which 16 bits do not resolve.
    """
    from peft.tuners.lora import LoraLayer

    for layer in wrapped.modules():
        if isinstance(layer, LoraLayer):
            for parameter in getattr(layer, _MAGNITUDE).parameters():
                parameter.data = parameter.data.to(
                    torch.promote_types(parameter.dtype, torch.float32)
                )


def _is_adapters(name: str) -> bool:
    return any(part in name for part in ("lora_", "modules_to_save", "trainable_tokens_delta"))


def _resize(model: Any, rows: int) -> None:
    """Give embedding and head a number of rows; new rows are NaN until the adapter fills them."""
    before = model.get_input_embeddings().weight.shape[0]
    if rows == before:
        return
    model.resize_token_embeddings(rows, mean_resizing=False)
    for part in (model.get_input_embeddings(), model.get_output_embeddings()):
        part.requires_grad_(False).weight[before:] = torch.nan


def _is_repeated(name: str, tensors: dict[str, Tensor]) -> bool:
    """Return whether a tensor of a tied head is the embedding's, which peft saves twice."""
    other = name.replace(".lm_head.", ".model.embed_tokens.")
    embedding = tensors.get(other) if other != name else None
    return embedding is not None and torch.equal(embedding, tensors[name])


def _untie(model: Any) -> None:
    """Give the head parameters of its own where they are those of the embedding.

    peft has wrapped both as in training, where they were tied. Merging the low-rank parts of both
    into one weight would add them up.
    """
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    for name in shared_names(embedding, head):
        parameter = head.get_parameter(name)
        set_parameter(head, name, nn.Parameter(parameter.detach().clone(), requires_grad=False))


def _check_rows(model: Any, folder: PeftFolder) -> None:
    for part in (model.get_input_embeddings(), model.get_output_embeddings()):
        if odd := part.weight.isnan().any(1).nonzero().flatten().tolist():
            raise UserError(
                f"target {folder.source}: the adapter adds tokens {odd[0]} to {odd[-1]} to its "
                "base's vocabulary, and does not hold their rows of the embedding or the head. "
                "Save it with save_embedding_layers=True, or give the merged model"
            )


def _convert(block: nn.Module, folder: PeftFolder) -> None:
    """Replace peft's low-rank layers in a block by layers that share the base's weight."""
    from peft.tuners.lora import LoraLayer

    for name, layer in list(block.named_modules()):
        if not isinstance(layer, LoraLayer):
            continue
        inner: Any = layer.get_base_layer()
        (key,) = layer.active_adapters
        variant = layer.lora_variant.get(key)
        dora = key in layer.lora_magnitude_vector
        if not isinstance(inner, nn.Linear) or (variant is not None) != dora:
            raise UserError(
                f"target {folder.source}: {name}: this kind of low-rank layer is not supported; "
                "merge the adapter into its base (peft: merge_and_unload)"
            )
        A, B = layer.scaling[key] * _weight(layer.lora_A[key]), _weight(layer.lora_B[key])
        gain = None
        if dora:
            magnitude = _weight(layer.lora_magnitude_vector[key])
            gain = dora_gain(inner.weight, A, B, magnitude)
        block.set_submodule(name, LowRankLinear(inner, A, B, inner.bias, gain))


def _weight(module: Any) -> Tensor:
    weight: Tensor = module.weight
    return weight
