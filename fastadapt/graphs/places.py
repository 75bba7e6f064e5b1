"""Find positions in sampled responses at which a model is about to say a word."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from threading import Event
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastadapt.errors import UserError
from fastadapt.evaluation.generation.responses import Response
from fastadapt.features.store.logit_lens import token_strings
from fastadapt.graphs.linear.trace import Stream, check_ids, mode_of
from fastadapt.graphs.targets import final_state, logits_of
from fastadapt.models.replacement import ReplacementModel

_POSITIONS = 256  # whose logits are in memory at once
_BEFORE = 60  # characters of the text before a place


@dataclass(frozen=True)
class PlaceConfig:
    """Settings of :func:`find_places`: the words, and which positions to list.

    Args:
        words: words; a token counts as a word if its text without surrounding spaces is the word,
            in any case.
        above: list places at which the words' probability rises to this value or above; by default
            those at which one of the words is the most likely token.
        after: list only places after this text in the response, such as a stated answer.
    """

    words: tuple[str, ...]
    above: float | None = None
    after: str | None = None

    def __post_init__(self) -> None:
        if not self.words or not all(word.strip() for word in self.words):
            raise UserError(f"--at: expected one or more words, none blank, got {list(self.words)}")
        if self.above is not None and not 0 < self.above <= 1:
            raise UserError(f"--above: expected more than 0 and at most 1, got {self.above}")


class Place(NamedTuple):
    """A position of a response after which a model predicts a word."""

    id: str  #: of the prompt
    repetition: int
    position: int  #: index of the last token read, in prompt and response
    token: int  #: the most likely token of the words
    probability: float  #: of all tokens of the words
    is_top: bool  #: a word is the most likely token
    before: str  #: text up to the position
    ids: tuple[int, ...]  #: the tokens read


def word_tokens(tokenizer: Any, n: int, words: Sequence[str]) -> Tensor:
    """Return the ids, below ``n``, of the tokens that are one of the words.

    Raises:
        UserError: a word is no token of the vocabulary.
    """
    texts = [text.strip().lower() for text in token_strings(tokenizer, n)]
    missing = [word for word in words if word.strip().lower() not in texts]
    if missing:
        raise UserError(f"--at: expected words that are tokens of the vocabulary, got {missing}")
    wanted = {word.strip().lower() for word in words}
    return torch.tensor([i for i, text in enumerate(texts) if text in wanted])


@torch.no_grad()
def find_places(
    model: ReplacementModel,
    responses: Sequence[Response],
    config: PlaceConfig,
    *,
    stream: Stream = "replacement",
    progress: Callable[[int, int], Any] | None = None,
    stop: Event | None = None,
) -> list[Place]:
    """Return the positions of responses at which a model predicts a word, in the file's order.

    Args:
        model: the replacement model.
        responses: sampled responses of a model with this vocabulary.
        config: words and conditions.
        stream: the model that reads the responses: the replacement, or else the target.
        progress: called with numbers of responses.
        stop: set it to return the places of the responses read so far.

    Raises:
        UserError: a word is no token, or a response does not fit into the model.
    """
    tokenizer, n_tokens = model.pair.tokenizer, model.head.shape[0]
    wanted = word_tokens(tokenizer, n_tokens, config.words).to(model.device)
    places: list[Place] = []
    for done, response in enumerate(responses, 1):
        ids = check_ids(model, [*response.prompt_tokens, *response.tokens])
        first = max(0, len(response.prompt_tokens) - 1)
        for i, token, probability, is_top in _scan(model, ids, first, wanted, config, stream):
            said = tokenizer.decode(ids[len(response.prompt_tokens) : i + 1].tolist())
            if config.after is None or config.after in said:
                before = tokenizer.decode(ids[: i + 1].tolist())[-_BEFORE:]
                key = (response.id, response.repetition)
                read = tuple(ids[: i + 1].tolist())
                places.append(Place(*key, i, token, probability, is_top, before, read))
        if progress is not None:
            progress(done, len(responses))
        if stop is not None and stop.is_set():
            break
    return places


def _scan(
    model: ReplacementModel,
    ids: Tensor,
    first: int,
    wanted: Tensor,
    config: PlaceConfig,
    stream: Stream,
) -> list[tuple[int, int, float, bool]]:
    """Return position, token, probability and whether a word is the top token, of each place."""
    states = final_state(model, ids, mode_of(stream))
    picked, last = [], 0.0
    for start in range(first, len(ids), _POSITIONS):
        shares = logits_of(model, states[start : start + _POSITIONS]).float().softmax(-1)
        of_words = shares[:, wanted]
        tops = torch.isin(shares.argmax(-1), wanted).tolist()
        best = wanted[of_words.argmax(-1)].tolist()
        for i, probability in enumerate(of_words.sum(-1).tolist()):
            rises = config.above is not None and last < config.above <= probability
            if rises or (config.above is None and tops[i]):
                picked.append((start + i, best[i], probability, tops[i]))
            last = probability
    return picked
