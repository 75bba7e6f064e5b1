"""What a user types about a run: a prompt, and factors of features."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from numbers import Integral
from pathlib import Path
from typing import Any

from fastadapt.adapter.files import adapter_digest
from fastadapt.data.contents import Turn
from fastadapt.data.rendered import TEXT_ONLY, Piece, Prefill, Rendered, Spec
from fastadapt.data.rendering import get_form, opening_of, prompt_pieces
from fastadapt.data.tokens import Encoder, Markers, check_ids, encode
from fastadapt.errors import UserError
from fastadapt.evaluation.faithfulness.prompts import family_of, held_out
from fastadapt.evaluation.generation.sampling import context_of, vocabulary_of
from fastadapt.evaluation.models_under_test import ModelSet
from fastadapt.features.loading import RunContents
from fastadapt.features.store.sets import Pair, find_set, pair_of
from fastadapt.interventions import check_exists
from fastadapt.models.pretrained import encode_text
from fastadapt.models.trained_files import read_adapters

RUN = "run"  # name of the run in RunContents.models


def prompt_ids(
    models: ModelSet, prompt: str, *, plain: bool = False, prefill: Prefill | None = None
) -> list[int]:
    """Return the tokens of a user's prompt, rendered as the run's training data were.

    Special tokens in the prompt stay text or become tokens, as the run's ``data.markers`` says.

    Args:
        models: the run; its tokenizer and its chat format are used.
        prompt: the user's text.
        plain: encode the text as it is, with the special tokens that the tokenizer adds.
        prefill: how the prompt opens the response, see
            :func:`fastadapt.data.rendering.opening_of`.

    Raises:
        UserError: the prompt is empty, the run records no chat format, ``prefill`` is given with
            ``plain``, or the tokenizer cannot encode a special token in the prompt as text.
    """
    if plain and prefill is not None:
        raise UserError("--prefill opens the response in a conversation; leave out --plain")
    ids = encode_text(models.tokenizer, prompt) if plain and prompt else []
    if not (ids if plain else prompt.strip()):
        raise UserError("prompt: expected a text, got none")
    if plain:
        return ids
    family = _family(models)
    if family is None:
        raise UserError(
            f"{models.compared[models.runs[0]].run}: no chat format recorded, so a prompt cannot "
            "be written as a turn of a conversation; pass --plain to read the text as it is"
        )
    return _encode(models, family, prompt_pieces(prompt, family, prefill), "prompt")


def opening_ids(models: ModelSet, prefill: Prefill | None = None) -> list[int]:
    """Return the tokens with which a run's prompts open the response; none without chat format.

    Raises:
        UserError: the run records no chat format, and ``prefill`` is ``thinking``.
    """
    family = _family(models)
    if family is None and prefill == "thinking":
        raise UserError("prefill: expected none, since the run records no chat format")
    if family is None or not opening_of(get_form(family), prefill):
        return []
    return _plain_ids(models, prompt_pieces("?", family, prefill).pieces[-1].text)


def response_ids(
    models: ModelSet, text: str, *, plain: bool = False, prefill: Prefill | None = None
) -> list[int]:
    """Return the tokens of a response's text, which continue those of :func:`prompt_ids`.

    Args:
        models: the run.
        text: the assistant's words, encoded as in the run's training data.
        plain: encode the text as it is; so is a text if the run records no chat format.
        prefill: as for :func:`prompt_ids`; without an opening there, the response begins with what
            the chat format writes before the assistant's words (``data.family.lead``).

    Raises:
        UserError: the tokenizer cannot encode a special token in the text as text.
    """
    family = None if plain else _family(models)
    if family is None:
        return _plain_ids(models, text)
    form = get_form(family)
    if opening_of(form, prefill):
        said = [Piece(text, "text", "assistant")]
    else:
        rendered = form.render([Turn("user", "?"), Turn("assistant", text)])
        said = [p for p in rendered.pieces if p.role == "assistant" and p.part in ("text", "end")]
        while said and said[-1].part == "end":  # the end of the turn
            said.pop()
    return _encode(models, family, Rendered(tuple(said)), "response")


def _plain_ids(models: ModelSet, text: str) -> list[int]:
    return list(encode(models.tokenizer, [text])["input_ids"][0])


def _encode(models: ModelSet, family: Spec, text: Rendered, name: str) -> list[int]:
    encoder = Encoder(models.tokenizer, get_form(family), _markers(models))
    try:
        return list(encoder.encode([text])[0].ids)
    except UserError:
        raise UserError(
            f"{name}: expected no special token in the text, since this tokenizer cannot encode "
            "one as text; leave it out, or pass --plain to read the text as it is"
        ) from None


def _run_folder(models: ModelSet) -> Path:
    return Path(str(models.compared[models.runs[0]].run))


def _family(models: ModelSet) -> Spec | None:
    """Return the chat format of the run's conversations; None without one, or for plain text."""
    family = family_of(models)
    return None if family == TEXT_ONLY else family


def _markers(models: ModelSet) -> Markers:
    """Return the run's ``data.markers``; ``text`` for a folder of adapters without settings."""
    recorded = held_out(_run_folder(models))
    return recorded.markers if recorded else "text"


def ids_of(tokens: Any) -> list[int]:
    """Return token ids, ``[T]`` or ``[1, T]``, as a list.

    Args:
        tokens: a sequence, a tensor or an array of whole numbers.

    Raises:
        UserError: ``tokens`` is something else, or has no token.

    Example:
        >>> ids_of([[5, 9]])
        [5, 9]
    """
    plain = tokens.tolist() if hasattr(tokens, "tolist") else tokens
    if isinstance(plain, list | tuple) and len(plain) == 1 and isinstance(plain[0], list | tuple):
        (plain,) = plain
    fine = isinstance(plain, list | tuple | range) and len(plain) > 0
    if not fine or not all(isinstance(i, Integral) and not isinstance(i, bool) for i in plain):
        got = f"{plain!r:.60}"
        if isinstance(tokens, Mapping):
            got = "a tokenizer's result; give its input_ids"
        raise UserError(f"text: expected a text or token ids [T], whole numbers, got {got}")
    return list(map(int, plain))


def check_text(models: ModelSet, ids: Sequence[int]) -> None:
    """Raise ``UserError`` for a text that the target cannot read: too long, or unknown tokens."""
    context = context_of(models.model.model)
    if len(ids) > context:
        raise UserError(
            f"expected a text of at most {context:,} tokens, the model's context, got "
            f"{len(ids):,}; shorten it"
        )
    check_ids(ids, vocabulary_of(models.model.model), "prompt")


def factors_of(
    run: RunContents, without: Sequence[str] = (), scale: Sequence[str] = ()
) -> dict[Pair, float]:
    """Return the factor of each feature that a request scales. No weights are read.

    Args:
        run: the run.
        without: features to remove: sets of the run's store, JSON files of sets, or features like
            ``2/17,3/401``.
        scale: features and factor, such as ``2/17=0`` or ``hesitation=-0.5``.

    Raises:
        UserError: a text is none of these, a set does not exist or is of other adapters, or a
            feature does not exist or is scaled twice.
    """
    card = read_adapters(run.models.folder(RUN))[1]
    requests = [(name, 0.0) for name in without] + [_scale(text) for text in scale]
    factors: dict[Pair, float] = {}
    for name, factor in requests:
        for pair in _features(run, name):
            if pair in factors:
                raise UserError(f"feature {pair[0]}/{pair[1]} is scaled twice; name it once")
            if "adapter" in card:
                check_exists(pair, card["n_layers"], card["adapter"].features)
            factors[pair] = factor
    return factors


def _scale(text: str) -> tuple[str, float]:
    name, equals, value = text.rpartition("=")
    try:
        factor = float(value)
    except ValueError:
        factor = math.nan
    if not equals or not math.isfinite(factor):
        raise UserError(
            f"--scale: expected FEATURE=FACTOR, a finite factor, such as 2/17=0, got {text!r}"
        )
    return name, factor


def _features(run: RunContents, name: str) -> Sequence[Pair]:
    if "/" in name and not name.endswith(".json"):
        return [pair_of(part) for part in name.split(",")]
    folder = run.models.folder(RUN)
    features = find_set(folder.parent if run.store is None else run.store.folder, name)
    history = read_adapters(folder)[1]["metadata"].get("interventions") or ()
    known = {adapter_digest(folder), *(step["adapter"] for step in history)}
    if features.not_empty().adapter not in known:
        raise UserError(
            f"{features.label} was selected from other adapters than those of {folder}; select a "
            "set from the features of this run"
        )
    return features.features
