"""The text model of a multimodal checkpoint: its configuration, and the names of its tensors.

A multimodal checkpoint holds a text model beside parts that read images or sound. On text alone it
computes what its text model computes, which is loaded without the other parts.
"""

from __future__ import annotations

import copy
from collections.abc import Collection
from typing import Any

from fastadapt.errors import UserError
from fastadapt.models.architectures import ARCHITECTURES, MULTIMODAL

_EMBEDDING = "embed_tokens.weight"


def text_config(config: Any, outer_ties: bool = True) -> Any:
    """Return the configuration of a multimodal model's text model; other configurations unchanged.

    Args:
        config: transformers' configuration.
        outer_ties: whether the outer ``tie_word_embeddings`` decides. Where ``config.json`` has
            none, the outer value is transformers' default, and the text model's value decides
            until the weights are read (:func:`fastadapt.models.pretrained.model_config`).

    Example:
        >>> from transformers import AutoConfig
        >>> text_config(AutoConfig.for_model("gemma3")).model_type
        'gemma3_text'
    """
    if config.model_type not in MULTIMODAL:
        return config
    inner = copy.deepcopy(config.get_text_config(decoder=True))
    if inner.model_type not in ARCHITECTURES:
        return config
    if outer_ties:
        inner.tie_word_embeddings = config.tie_word_embeddings
    inner.dtype = inner.dtype or config.dtype
    inner._commit_hash = getattr(config, "_commit_hash", None)
    return inner


def text_prefixes(names: Collection[str], source: str) -> dict[str, str]:
    """Return the parts of a multimodal checkpoint that its text model consists of.

    The text model is the part with the embedding of tokens.

    Args:
        names: names of all tensors of the checkpoint.
        source: the checkpoint, for messages.

    Returns:
        By the beginning of stored names: the beginning of the names in a causal language model.
        Empty for a checkpoint of text alone.

    Raises:
        UserError: several parts have an embedding of tokens.

    Example:
        >>> text_prefixes(["model.language_model.embed_tokens.weight", "model.visual.x"], "a/b")
        {'model.language_model.': 'model.'}
    """
    parts = [name.removesuffix(_EMBEDDING) for name in names if name.endswith(f".{_EMBEDDING}")]
    if not parts or "model." in parts:
        return {}
    if len(parts) > 1:
        raise UserError(
            f"{source}: expected one part with {_EMBEDDING}, got {', '.join(sorted(parts))}; give "
            "a checkpoint of the text model alone"
        )
    heads = [part for part in ("lm_head.", "language_model.lm_head.") if f"{part}weight" in names]
    return {parts[0]: "model."} | dict.fromkeys(heads, "lm_head.")


def text_names(names: Collection[str], source: str) -> dict[str, str]:
    """Return the tensors' names in a causal language model, by their names in the checkpoint.

    Tensors of other parts of a multimodal checkpoint are left out.

    Args:
        names, source: arguments of :func:`text_prefixes`.

    Example:
        >>> text_names(["language_model.model.embed_tokens.weight", "vision_tower.x"], "a/b")
        {'language_model.model.embed_tokens.weight': 'model.embed_tokens.weight'}
        >>> text_names(["model.embed_tokens.weight", "other"], "a/b")
        {'model.embed_tokens.weight': 'model.embed_tokens.weight', 'other': 'other'}
    """
    prefixes = text_prefixes(names, source) or {"": ""}
    return {
        name: ours + name.removeprefix(part)
        for name in names
        for part, ours in prefixes.items()
        if name.startswith(part)
    }
