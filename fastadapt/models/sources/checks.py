"""Check that two checkpoints are a model and its fine-tuning, as far as a pair needs it."""

from __future__ import annotations

from typing import Any

from fastadapt.errors import UserError
from fastadapt.models.pretrained import ARCHITECTURES


class PairMismatchError(UserError):
    """Two checkpoints are not a model and its fine-tuning; the message names the differences."""


#: Configuration keys that must agree for the base's MLPs to work inside the target.
SAME = (
    "model_type",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "hidden_act",
    "hidden_activation",
    "mlp_bias",
)


def check_configs(target: Any, base: Any) -> None:
    """Raise :class:`PairMismatchError` with every key of :data:`SAME` in which two configs differ.

    Raises:
        UserError: the target's architecture is not supported.
    """
    if target.model_type not in ARCHITECTURES:
        inner = getattr(target.get_text_config(), "model_type", None)
        text = f" (its text model {inner!r} is)" if inner in ARCHITECTURES else ""
        raise UserError(
            f"architecture {target.model_type!r} is not supported{text}; "
            f"supported: {', '.join(sorted(ARCHITECTURES))}"
        )
    differing = [
        f"{name}: target {getattr(target, name, None)!r}, base {getattr(base, name, None)!r}"
        for name in SAME
        if getattr(target, name, None) != getattr(base, name, None)
    ]
    if differing:
        raise PairMismatchError(
            f"these models are not a pair: {'; '.join(differing)}. Give the model that the target "
            "was fine-tuned from"
        )


def check_tokenizers(target: Any, base: Any) -> list[str]:
    """Compare two tokenizers; return notes on harmless differences.

    Ordinary tokens must have the same ids. Added tokens may differ, as where a fine-tuned model
    renames its chat markers: text is always tokenized with the target's tokenizer.

    Raises:
        PairMismatchError: an ordinary token has different ids.
    """

    def ordinary(tokenizer: Any) -> dict[str, int]:
        added = set(tokenizer.get_added_vocab())
        return {t: i for t, i in tokenizer.get_vocab().items() if t not in added}

    target_ids, base_ids = ordinary(target), ordinary(base)
    if target_ids != base_ids:
        odd = sorted(target_ids.items() ^ base_ids.items())
        token = odd[0][0]
        raise PairMismatchError(
            f"these models are not a pair: their tokenizers differ in {len({t for t, _ in odd})} "
            f"tokens; {token!r}: target {target_ids.get(token)}, base {base_ids.get(token)}. Give "
            "the model that the target was fine-tuned from"
        )
    a, b = target.get_added_vocab(), base.get_added_vocab()
    if a == b:
        return []
    renamed = sorted({t for t, _ in a.items() ^ b.items()})
    return [f"{len(renamed)} added tokens differ; the target's are used: {renamed[:4]}"]
