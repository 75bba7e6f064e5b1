"""What an adapter changed: by layer, by feature, at single tokens, and in whole responses.

Measured on the first texts of the run's store of features. KLs are KL(target ‖ model) of the next
token, in nats.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from heapq import nlargest
from threading import Event
from typing import Any, NamedTuple

import numpy as np

from fastadapt.data.rendered import Prefill
from fastadapt.effects.ablation import AblatedText, first_texts, predicted_sum
from fastadapt.effects.generate import MODELS, GenerateConfig, generate_all
from fastadapt.effects.requests import opening_ids
from fastadapt.effects.trace import ADAPTER, firings, logits_of, promotes
from fastadapt.errors import UserError
from fastadapt.features.collect.texts import Text
from fastadapt.features.loading import RunContents
from fastadapt.features.store.characters import join_characters
from fastadapt.features.store.details import read_details
from fastadapt.features.store.logit_lens import strings_of
from fastadapt.features.store.ranking import by_layer, strongest
from fastadapt.features.store.schema import REGIONS
from fastadapt.features.store.sets import Pair
from fastadapt.features.store.store import Store
from fastadapt.reporting.visible import token_text, visible, visible_lines

#: Regions that a model writes, the first of which ends the prompt.
_RESPONSE = [REGIONS.index(name) for name in ("think start", "thinking", "think end", "answer")]
_BEFORE = 24  # tokens of the text shown before a position
_LIKELY = 3  # most likely tokens shown of each model
_CLOSING = 4  # features shown of a position
_CANDIDATES = 24  # features ablated at a position, by contribution


@dataclass(frozen=True)
class ChangesConfig:
    """Settings of :func:`changes`: numbers of texts, features, positions and prompts.

    Args:
        texts: number of texts of the store, from its start.
        features: number of features that are ablated, by contribution.
        positions: number of positions at which hybrid and target disagree most.
        prompts: number of texts whose prompts all models answer; 0: none.
        max_new_tokens: largest number of tokens of a response.
        prefill: ``thinking``: these prompts open the reasoning of the response; ``none``: each
            model itself decides whether to reason; None: as the template of the run's family.
    """

    texts: int = 20
    features: int = 20
    positions: int = 10
    prompts: int = 3
    max_new_tokens: int = 200
    prefill: Prefill | None = None

    def __post_init__(self) -> None:
        for name, least in (
            ("texts", 1),
            ("features", 1),
            ("positions", 1),
            ("prompts", 0),
            ("max_new_tokens", 1),
        ):
            if getattr(self, name) < least:
                raise UserError(f"{name}: expected {least} or more, got {getattr(self, name)}")


class _Place(NamedTuple):
    """A position of a text; the hybrid's KL at the position comes first, to sort by."""

    hybrid: float
    text: int
    position: int


def changes(
    run: RunContents,
    config: ChangesConfig | None = None,
    *,
    progress: Callable[[str, int, int], None] | None = None,
    stop: Event | None = None,
) -> dict[str, Any] | None:
    """Measure what the adapter of a run changed.

    Args:
        run: a run with collected features.
        config: settings.
        progress: called with (part, done, total).
        stop: when set, returns None after the current text.

    Returns:
        Values for JSON: ``adapter`` (SHA-256), ``settings``, ``texts`` and ``positions`` (numbers
        measured), ``kl`` (``hybrid``, ``adapter``), ``layers``, ``features``, ``disagreements`` and
        ``responses``.

    Raises:
        UserError: the run has no store of features, or no feature fired.
        RunError: a prediction is not finite.
    """
    config = config or ChangesConfig()
    if run.store is None:
        raise UserError(
            "this run has no features yet; run fastadapt features collect before fastadapt changes"
        )
    texts = list(first_texts(run.store, config.texts))
    sums = _Sums(run, [unit[:2] for unit in strongest(run.store, n=config.features)])
    for done, text in enumerate(texts, 1):
        sums.add(done - 1, text)
        if progress is not None:
            progress("texts", done, len(texts))
        if stop is not None and stop.is_set():
            return None
    responses, notes = _responses(run, texts[: config.prompts], config)
    return {
        "adapter": run.store.manifest["adapter"],
        "settings": asdict(config),
        "texts": len(texts),
        "positions": sums.positions,
        "kl": {name: sums.mean(kl) for name, kl in sums.kl.items()},
        "layers": sums.layers(run.store),
        "features": sums.features(run.store),
        "disagreements": [
            _disagreement(run, texts[place.text], place, count)
            for place, count in sums.places(run, texts, config.positions)
        ],
        "responses": responses,
        "notes": notes,
    }


class _Sums:
    """KLs summed over the predicted tokens of all texts so far."""

    def __init__(self, run: RunContents, pairs: Sequence[Pair]) -> None:
        self._model = run.model
        self.positions = 0
        self.kl = {"hybrid": 0.0, ADAPTER: 0.0}
        self._rises = dict.fromkeys(pairs, 0.0)
        self._by_layer = [0.0] * run.model.n_layers
        self._places: list[_Place] = []

    def add(self, index: int, text: Text) -> None:
        """Add the KLs of a text to the sums."""
        read = AblatedText(self._model, text.tokens.tolist())
        hybrid, adapter = read.hybrid(), predicted_sum(read.kl)
        self.kl["hybrid"] += predicted_sum(hybrid)
        self.kl[ADAPTER] += adapter
        self.positions += len(text.tokens) - 1
        for layer in range(self._model.n_layers):
            self._by_layer[layer] += predicted_sum(read.without_layer(layer)) - adapter
        for pair in read.pairs & self._rises.keys():
            self._rises[pair] += predicted_sum(read.without([pair])) - adapter
        self._places += [_Place(kl, index, t) for t, kl in enumerate(hybrid[:-1].tolist())]

    def mean(self, total: float) -> float:
        """Divide a sum by the number of predicted tokens."""
        return total / max(1, self.positions)

    def layers(self, store: Store) -> list[dict[str, float]]:
        """Return each layer's share of contributions, and the rise of the KL without the layer."""
        pairs = zip(by_layer(store), self._by_layer, strict=True)
        return [{"share": share, "delta_kl": self.mean(rise)} for share, rise in pairs]

    def features(self, store: Store) -> list[dict[str, Any]]:
        """Return what the store says of each ablated feature, the largest rise of the KL first."""
        pairs = sorted(self._rises, key=lambda pair: (-self._rises[pair], pair))
        units = read_details(store, pairs, examples=1)
        rises = [self.mean(self._rises[pair]) for pair in pairs]
        return [{**asdict(unit), "delta_kl": rise} for unit, rise in zip(units, rises, strict=True)]

    def places(self, run: RunContents, texts: Sequence[Text], n: int) -> list[tuple[_Place, int]]:
        """Return the positions with the hybrid's largest KL, one for each pair of adjacent tokens.

        Positions are of one kind if the token and the token after it are equal. Each comes with the
        number of positions of its kind among the 20 n with the largest KL.
        """
        kinds: dict[tuple[int, int], tuple[_Place, int]] = {}
        for place in nlargest(20 * n, self._places):
            ids = texts[place.text].tokens
            kind = int(ids[place.position]), int(ids[place.position + 1])
            first, count = kinds.get(kind, (place, 0))
            kinds[kind] = first, count + 1
        return list(kinds.values())[:n]


def _disagreement(run: RunContents, text: Text, place: _Place, count: int) -> dict[str, Any]:
    """Return what the models predict at a position, and the features that close the gap there."""
    ids, t = text.tokens.tolist(), place.position
    ids = ids[: t + 1]
    read = AblatedText(run.model, ids)
    firing = [f.pair for f in firings(run, ids)[t]]
    last = slice(t, t + 1)
    whole = float(read.without([], last))
    rises = [(float(read.without([pair], last)) - whole, pair) for pair in firing[:_CANDIDATES]]
    closing = sorted(rises, reverse=True)[:_CLOSING]
    together = float(read.without(firing, last)) - whole
    promoted = promotes(run, [pair for _, pair in closing], n=1)
    likely = {name: _likely(run, name, ids) for name in ("target", "hybrid", ADAPTER)}
    start = max(0, t - _BEFORE)
    strings = strings_of(run.pair.tokenizer, text.tokens[start : t + 2].tolist())
    before, token, following = strings[:-2], strings[-2], strings[-1]
    return {
        "text": text.number,
        "position": t,
        "region": REGIONS[int(text.regions[t])],
        "alike": count,
        "before": "…" * (start > 0) + _line(before),
        "token": visible(token),
        "following": token_text(following),
        "kl": {"hybrid": place.hybrid, ADAPTER: whole},
        "likely": likely,
        "features": [
            {
                "layer": pair[0],
                "feature": pair[1],
                "delta_kl": rise,
                "promotes": token_text(promoted[pair][0]),
            }
            for rise, pair in closing
        ],
        "firing": len(firing),
        "together": together,
    }


def _line(strings: Sequence[str]) -> str:
    return visible("".join(text for text, _ in join_characters(strings)))


def _likely(run: RunContents, name: str, ids: Sequence[int]) -> list[tuple[str, float]]:
    (logits,) = logits_of(run.models, name, ids, last=1)
    shares, tokens = logits.double().softmax(-1).topk(_LIKELY)
    texts = map(token_text, strings_of(run.pair.tokenizer, tokens.tolist()))
    return list(zip(texts, shares.tolist(), strict=True))


def _responses(
    run: RunContents, texts: Sequence[Text], config: ChangesConfig
) -> tuple[list[dict[str, Any]], list[str]]:
    """Return models' likeliest responses to the texts' prompts, and where they leave the target.

    A base that cannot read the prompts is left out, and the notes say so.
    """
    prompts = [text.tokens[: _prompt_length(text)].tolist() for text in texts]
    opening = opening_ids(run.models, config.prefill)
    prompts = [[*ids, *opening] for ids in prompts if ids]
    if not prompts:
        return [], []
    obstacle = run.models.base_obstacle(i for ids in prompts for i in ids)
    notes = [] if obstacle is None else [f"The base does not respond: {obstacle}."]
    names = tuple(name for name in MODELS if obstacle is None or name != "base")
    settings = GenerateConfig(names, max_new_tokens=config.max_new_tokens)
    tokenizer = run.pair.tokenizer

    def shown(ids: Sequence[int]) -> str:
        return visible_lines(str(tokenizer.decode(ids, skip_special_tokens=False)))

    out = []
    for ids, responses in zip(prompts, generate_all(run, prompts, settings), strict=True):
        target = next(each.tokens for each in responses if each.model == "target")
        models = {}
        for each in responses:
            n = _agreement(each.tokens, target)
            models[each.model] = {
                "agrees": shown(each.tokens[:n]),
                "differs": shown(each.tokens[n:]),
                "agreeing_tokens": n,
                "tokens": len(each.tokens),
                "finish": each.finish,
            }
        out.append({"prompt": shown(ids), "models": models})
    return out, notes


def _prompt_length(text: Text) -> int:
    """Return the number of tokens before the response; 0 without a response."""
    written = np.flatnonzero(np.isin(text.regions, _RESPONSE))
    return int(written[0]) if len(written) else 0


def _agreement(ids: Sequence[int], target: Sequence[int]) -> int:
    """Return the number of tokens before the first that differs.

    Example:
        >>> _agreement([1, 2, 3], [1, 2, 4, 5])
        2
    """
    same = [a == b for a, b in zip(ids, target, strict=False)]
    return same.index(False) if False in same else len(same)
