"""The table of supported architectures, and why another model is not supported.

``docs/adding-an-architecture.md`` describes how to add a row.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from fastadapt.errors import UserError

#: The page that describes how to add a row.
PAGE = "docs/adding-an-architecture.md"


@dataclass(frozen=True)
class Paths:
    """Attribute names of an architecture's modules, and properties of its attention and norms.

    Attributes:
        decoder: the module of the causal language model that holds the blocks.
        layers: the blocks, in ``decoder``.
        norm: the last norm, in ``decoder``.
        mlp: the MLP, in every block.
        attention_modules: attention, of which every block has one.
        projections: linear layers of an MLP that read its input.
        attention: the implementation where flash-attn is not used: ``eager`` for Gemma 2, since
            torch's fused attention cannot soft-cap scores.
        rotates_halves: whether the rotary embedding pairs column i with i + R/2, as
            :func:`fastadapt.kernels.frozen.rope` does; GLM-4 pairs neighbours, and is not fused.
        post_norm: whether a norm follows the MLP, before the residual is added.
        norm_offset, norm_rounds_first: arguments of :func:`fastadapt.kernels.frozen.rms_norm`.
        per_layer_inputs: children of a block that add embeddings of the tokens, if present.
        unread: mutable arguments in which a block leaves values that no other block reads, in the
            models that are not excluded.
        paged: whether transformers' continuous batching, with its paged cache, can run the blocks.
        without_rules: parts of a block for which :mod:`fastadapt.graphs.linear.rules` has no rule;
            empty if it has all.
        excluded: keys of the configuration that a supported model leaves unset or false, with the
            reason.
    """

    decoder: str = "model"
    layers: str = "layers"
    norm: str = "norm"
    mlp: str = "mlp"
    attention_modules: tuple[str, ...] = ("self_attn",)
    projections: tuple[str, ...] = ("gate_proj", "up_proj")
    attention: str = "sdpa"
    rotates_halves: bool = True
    post_norm: bool = False
    norm_offset: float = 0.0
    norm_rounds_first: bool = True
    per_layer_inputs: tuple[str, ...] = ()
    unread: tuple[str, ...] = ()
    paged: bool = True
    without_rules: str = ""
    excluded: Mapping[str, str] = field(default_factory=dict, hash=False)

    def attention_of(self, block: nn.Module) -> nn.Module:
        """Return a block's attention."""
        return next(getattr(block, name) for name in self.attention_modules if hasattr(block, name))


#: Supported architectures: those whose gradients and modes are tested.
ARCHITECTURES: Mapping[str, Paths] = {
    "qwen2": Paths(),
    "llama": Paths(),
    "gemma2": Paths(attention="eager", post_norm=True, norm_offset=1.0, norm_rounds_first=False),
    "gemma3_text": Paths(post_norm=True, norm_offset=1.0, norm_rounds_first=False),
    "gemma4_text": Paths(
        post_norm=True,
        norm_rounds_first=False,
        per_layer_inputs=("per_layer_input_gate", "per_layer_projection"),
        unread=("shared_kv_states",),
        paged=False,
        without_rules="there is no propagation rule for the embeddings that its blocks add",
        excluded={
            "num_kv_shared_layers": "its last blocks read the keys and values of earlier blocks, "
            "so that no block can be run on its input alone",
            "enable_moe_block": "its blocks have experts beside the MLP, which no adapter replaces",
        },
    ),
    "mistral": Paths(),
    "olmo2": Paths(post_norm=True, norm_rounds_first=False),
    "phi3": Paths(projections=("gate_up_proj",)),
    "glm4": Paths(projections=("gate_up_proj",), rotates_halves=False, post_norm=True),
    "qwen3": Paths(),
    "qwen3_5_text": Paths(
        attention_modules=("self_attn", "linear_attn"),
        norm_offset=1.0,
        norm_rounds_first=False,
        paged=False,
        without_rules="there is no propagation rule for its linear attention",
    ),
}

#: Multimodal architectures whose text model is read, if it is in the table: tests show that a text
#: without images passes through the text model only.
MULTIMODAL = ("gemma3", "gemma4", "internvl", "llava", "mistral3", "qwen3_5", "smolvlm")


def check_supported(config: Any, trust: bool = False) -> None:
    """Check that a model's architecture is in the table, and that its settings are supported.

    Args:
        config: transformers' configuration of a model.
        trust: run Python code that comes with the model.

    Raises:
        UserError: the model is not supported; the message says what is missing.

    Example:
        >>> from transformers import AutoConfig
        >>> check_supported(AutoConfig.for_model("qwen2"))
        >>> check_supported(  # doctest: +ELLIPSIS
        ...     AutoConfig.for_model("gemma4_text", num_kv_shared_layers=10)
        ... )
        Traceback (most recent call last):
        ...
        fastadapt.errors.UserError: architecture 'gemma4_text' is supported, but not with ...
    """
    kind = config.model_type
    paths = ARCHITECTURES.get(kind)
    if paths is None:
        raise UserError(
            f"architecture {kind!r} is not supported: {_reason(config, trust)}. "
            f"Supported: {', '.join(sorted(ARCHITECTURES))}"
        )
    for key, reason in paths.excluded.items():
        if value := getattr(config, key, None):
            raise UserError(
                f"architecture {kind!r} is supported, but not with {key}={value!r}: {reason}"
            )
    if getattr(config, "use_bidirectional_attention", None) in (True, "all"):
        raise UserError(
            f"architecture {kind!r} is supported, but not with use_bidirectional_attention="
            f"{config.use_bidirectional_attention!r}: expected a model that predicts the next token"
        )


def _reason(config: Any, trust: bool) -> str:
    """Return why a model without a row is not supported, and what a row would need."""
    inner = config.get_text_config(decoder=True)
    if inner is not config and inner.model_type in ARCHITECTURES:
        return (
            f"of multimodal models, the text models of {', '.join(MULTIMODAL)} are read. Its text "
            f"model {inner.model_type!r} is supported if it is saved alone"
        )
    if inner is not config:
        return f"it is multimodal, and its text model {inner.model_type!r} is not supported either"
    from transformers import AutoModelForCausalLM

    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, trust_remote_code=trust)
    # transformers raises errors of any type for a configuration that fits no model.
    except Exception as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:120]
        return f"transformers builds no causal language model from its configuration ({reason})"
    missing = next(_missing(model, Paths()), None)
    if missing is not None:
        return (
            f"{missing}. If it has this part under another name, {PAGE} of fastadapt's repository "
            "describes how to add it"
        )
    return (
        f"{type(model).__name__} has the attributes of the default row, but was not tested. {PAGE} "
        f'of fastadapt\'s repository describes how to add "{config.model_type}": Paths()'
    )


def _missing(model: Any, paths: Paths) -> Iterator[str]:
    """Yield a clause for each attribute of ``paths`` that a model lacks."""

    def lacks(owner: Any, where: str, name: str, field: str) -> Iterator[str]:
        if not hasattr(owner, name):
            kind = type(owner).__name__
            yield f"{where} ({kind}) has no attribute {name!r} (Paths.{field})"

    yield from lacks(model, "the model", paths.decoder, "decoder")
    decoder = getattr(model, paths.decoder, None)
    if decoder is None:
        return
    yield from lacks(decoder, paths.decoder, paths.layers, "layers")
    yield from lacks(decoder, paths.decoder, paths.norm, "norm")
    for i, block in enumerate(getattr(decoder, paths.layers, ())):
        where = f"{paths.decoder}.{paths.layers}.{i}"
        if not any(hasattr(block, name) for name in paths.attention_modules):
            yield from lacks(block, where, paths.attention_modules[0], "attention_modules")
        yield from lacks(block, where, paths.mlp, "mlp")
        if (mlp := getattr(block, paths.mlp, None)) is not None:
            for name in paths.projections:
                yield from lacks(mlp, f"{where}.{paths.mlp}", name, "projections")
