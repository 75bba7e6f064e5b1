"""Check that two checkpoints are a model and its fine-tuning."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fastadapt.errors import UserError
from fastadapt.models.architectures import check_supported


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


def check_configs(target: Any, base: Any, trust: bool = False) -> None:
    """Raise :class:`PairMismatchError` with every key of :data:`SAME` in which two configs differ.

    Raises:
        UserError: the target's architecture is not supported
            (:func:`fastadapt.models.architectures.check_supported`; ``trust`` is its argument).
    """
    check_supported(target, trust)
    check_equal(target, base, SAME)


def check_equal(target: Any, base: Any, names: Sequence[str]) -> None:
    """Raise :class:`PairMismatchError` with every key of ``names`` in which two configs differ."""
    # An attribute of single layers raises an error; the dictionaries have those layers' values.
    ours, theirs = target.to_dict(), base.to_dict()
    differing = [
        f"{name}: target {ours.get(name)!r}, base {theirs.get(name)!r}"
        for name in names
        if ours.get(name) != theirs.get(name)
    ]
    if differing:
        raise PairMismatchError(
            f"these models are not a pair: {'; '.join(differing)}. Give the model that the target "
            "was fine-tuned from"
        )


def tokenizer_notes(target: Any, base: Any) -> list[str]:
    """Return how two tokenizers differ, as notes.

    Text is always tokenized with the target's, and the base gives the pair only its MLPs, so that
    no difference prevents training. Ordinary tokens with other ids may mean a wrong base.
    """
    ours, theirs = _ordinary(target), _ordinary(base)
    if ours != theirs:
        odd = sorted(ours.items() ^ theirs.items())
        token = odd[0][0]
        return [
            f"the tokenizers of target and base differ in {len({t for t, _ in odd})} tokens; "
            f"{token!r}: target {ours.get(token)}, base {theirs.get(token)}. The target's is used"
        ]
    a, b = target.get_added_vocab(), base.get_added_vocab()
    if a == b:
        return []
    renamed = sorted({t for t, _ in a.items() ^ b.items()})
    return [f"{len(renamed)} added tokens differ; the target's are used: {renamed[:4]}"]


def conflicting_id(target: Any, base: Any) -> str | None:
    """Return a token id with two meanings, in words; None if the base can read the target's ids.

    Ids that only one of the tokenizers knows, and added tokens, may differ.
    """
    ours, theirs = ({i: t for t, i in _ordinary(each).items()} for each in (target, base))
    odd = [i for i in sorted(ours.keys() & theirs.keys()) if ours[i] != theirs[i]]
    if not odd:
        return None
    first = odd[0]
    return (
        f"{len(odd)} token ids have other meanings for the base; id {first} is {ours[first]!r} for "
        f"the target and {theirs[first]!r} for the base"
    )


def _ordinary(tokenizer: Any) -> dict[str, int]:
    added = set(tokenizer.get_added_vocab())
    return {t: i for t, i in tokenizer.get_vocab().items() if t not in added}
