"""Names of places in a model, in the vocabularies of four tools.

``huggingface`` is the path of a module, with ``input`` or ``output`` at its end.
``transformer_lens`` is a hook of TransformerLens. ``nnterp`` is an accessor of nnterp, and
``interp_engine`` an address of interp-engine. In each name ``{layer}`` stands for the number of
the layer.

Two names differ by a norm. ``blocks.{layer}.mlp.hook_out`` is the output of the MLP.
``blocks.{layer}.hook_mlp_out`` is what the block adds to the residual stream: behind the norm that
follows the MLP in Gemma 2, 3, 4, GLM-4 and OLMo 2, and the same tensor in other models.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Literal, NamedTuple

Vocabulary = Literal["huggingface", "transformer_lens", "nnterp", "interp_engine"]
#: Names of one place, by vocabulary; a vocabulary without a name for the place is absent.
Hook = Mapping[str, str]


class Hooks(NamedTuple):
    """Places that coders read and write; of an SAE, both are the same place."""

    input: Hook
    output: Hook


#: Places with names in the vocabularies. The last one has no name that holds for every model in
#: the vocabularies that lack it.
PLACES: Mapping[str, Hook] = {
    "mlp_in": {
        "huggingface": "model.layers.{layer}.mlp.input",
        "transformer_lens": "blocks.{layer}.mlp.hook_in",
        "nnterp": "mlps_input[{layer}]",
        "interp_engine": "mlp_in.{layer}",
    },
    "mlp_out": {
        "huggingface": "model.layers.{layer}.mlp.output",
        "transformer_lens": "blocks.{layer}.mlp.hook_out",
        "nnterp": "mlps_output[{layer}]",
        "interp_engine": "mlp_out.{layer}",
    },
    "attn_out": {
        "huggingface": "model.layers.{layer}.self_attn.output",
        "transformer_lens": "blocks.{layer}.attn.hook_out",
        "nnterp": "attentions_output[{layer}]",
        "interp_engine": "attn_out.{layer}",
    },
    "resid_pre": {
        "huggingface": "model.layers.{layer}.input",
        "transformer_lens": "blocks.{layer}.hook_resid_pre",
        "nnterp": "layers_input[{layer}]",
        "interp_engine": "resid_pre.{layer}",
    },
    "resid_post": {
        "huggingface": "model.layers.{layer}.output",
        "transformer_lens": "blocks.{layer}.hook_resid_post",
        "nnterp": "layers_output[{layer}]",
        "interp_engine": "resid_post.{layer}",
    },
    "mlp_contribution": {
        "transformer_lens": "blocks.{layer}.hook_mlp_out",
        "interp_engine": "mlp_out_post.{layer}",
    },
}
#: Places of adapters and of transcoders of MLPs.
MLP_HOOKS = Hooks(PLACES["mlp_in"], PLACES["mlp_out"])

_NUMBER = re.compile(r"(?<![A-Za-z0-9])\d{1,5}(?![A-Za-z0-9])")


def find_hook(name: str, vocabulary: Vocabulary) -> tuple[Hook, int]:
    """Return the place and the layer of a name; the layer is 0 if the name has no number.

    Of a place that is not in :data:`PLACES`, only the name in the given vocabulary is returned.

    Example:
        >>> hook, layer = find_hook("blocks.7.mlp.hook_in", "transformer_lens")
        >>> layer, hook["nnterp"]
        (7, 'mlps_input[{layer}]')
        >>> find_hook("blocks.7.attn.hook_z", "transformer_lens")
        ({'transformer_lens': 'blocks.{layer}.attn.hook_z'}, 7)
    """
    number = _NUMBER.search(name)
    pattern = name if number is None else _NUMBER.sub("{layer}", name, count=1)
    for place in PLACES.values():
        if place.get(vocabulary) == pattern:
            return place, int(number[0]) if number else 0
    return {vocabulary: pattern}, int(number[0]) if number else 0


def name_hook(hook: Hook, vocabulary: Vocabulary, layer: int) -> str | None:
    """Return the name of a place in one layer; None if the vocabulary has none.

    Example:
        >>> name_hook(MLP_HOOKS.input, "interp_engine", 3)
        'mlp_in.3'
    """
    name = hook.get(vocabulary)
    return None if name is None else name.replace("{layer}", str(layer))
