"""Measure what features do to the output: the KL to the target without them.

A text is read once by the target and by the replacement model, and the replacement's states before
each layer are saved. Without a feature of layer l, the text is read again from layer l on. A text
on which a feature does not fire is not read again: the feature changes nothing there.

T tokens of a text, D width.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from threading import Event

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from fastadapt.errors import RunError, UserError
from fastadapt.features.collect.texts import Text, read_group
from fastadapt.features.store.ranking import strongest
from fastadapt.features.store.schema import EFFECTS, TEXTS
from fastadapt.features.store.sets import Pair, pair_of
from fastadapt.features.store.source_run import students_of
from fastadapt.features.store.store import Store, writing
from fastadapt.interventions import scale_features
from fastadapt.io.parquet import open_parquet
from fastadapt.kernels.linear_kl import linear_kl
from fastadapt.models.replacement import ReplacementModel

_EVERY = slice(None)


class AblatedText:
    """A text read by target and replacement, to be read again without features or layers.

    Args:
        model: the replacement model, in ``eval()``.
        ids: tokens of the text.

    Attributes:
        kl: ``[T]``, KL(target ‖ replacement) of the next token after each token, in nats; float32,
            or float64 if the model is in float64.
        firing: the features that fire at each token: sets of pairs.
    """

    @torch.no_grad()
    def __init__(self, model: ReplacementModel, ids: Sequence[int]) -> None:
        self._model = model
        tokens = torch.tensor([list(ids)], dtype=torch.int64, device=model.device)
        inputs = model.block_inputs(tokens, None)
        self._arguments = inputs.arguments
        target, self._states = inputs.hidden, [inputs.hidden]
        self.firing: list[set[Pair]] = [set() for _ in ids]
        for layer, arguments in enumerate(inputs.arguments):
            target, _ = model.block(layer, target, arguments, "target")
            state, aux = model.block(
                layer, self._states[-1], arguments, "replacement", return_codes=True
            )
            self._states.append(state)
            assert aux is not None
            assert aux.codes is not None
            pairs = zip(aux.codes.tokens.tolist(), aux.codes.features.tolist(), strict=True)
            for token, feature in pairs:
                self.firing[token].add((layer, feature))
        self._teacher = model.final_norm(target, "target")[0]
        self._final = self._states.pop()
        self.kl = self._kl(self._final)

    @property
    def pairs(self) -> set[Pair]:
        """The features that fire anywhere in the text."""
        return set().union(*self.firing)

    @torch.no_grad()
    def without(self, pairs: Iterable[Pair], tokens: slice = _EVERY) -> Tensor:
        """Return KL(target ‖ replacement without these features) after each of ``tokens``.

        The features are removed at all tokens. Fewer ``tokens`` spare the products with the head.
        """
        removed = self.pairs & set(pairs)
        if not removed:
            return self.kl if tokens is _EVERY else self._kl(self._final, tokens=tokens)
        first = min(layer for layer, _ in removed)
        with scale_features(self._model, dict.fromkeys(removed, 0.0)):
            return self._kl(self._read(first, self._states[first]), tokens=tokens)

    @torch.no_grad()
    def without_layer(self, layer: int) -> Tensor:
        """Return :attr:`kl` of the replacement with the base's MLP alone in one layer."""
        arguments = self._arguments[layer]
        state, _ = self._model.block(layer, self._states[layer], arguments, "hybrid")
        return self._kl(self._read(layer + 1, state))

    @torch.no_grad()
    def hybrid(self) -> Tensor:
        """Return KL(target ‖ hybrid) of the next token after each token: ``[T]``."""
        state = self._states[0]
        for layer, arguments in enumerate(self._arguments):
            state, _ = self._model.block(layer, state, arguments, "hybrid")
        return self._kl(state, "hybrid")

    def _read(self, first: int, state: Tensor) -> Tensor:
        for layer in range(first, self._model.n_layers):
            arguments = self._arguments[layer]
            state, _ = self._model.block(layer, state, arguments, "replacement")
        return state

    def _kl(self, state: Tensor, mode: str = "replacement", tokens: slice = _EVERY) -> Tensor:
        final = self._model.final_norm(state[:, tokens], mode)[0]  # type: ignore[arg-type]
        model, teacher = self._model, self._teacher[tokens]
        kl = linear_kl(teacher, [final], model.head, softcap=model.softcap).token_kl[0]
        if not kl.isfinite().all():
            raise RunError("a prediction is not finite; pass --dtype float32")
        return kl


@dataclass(frozen=True)
class EffectsConfig:
    """Settings of :func:`effects`: the features to ablate, and the number of texts.

    Args:
        top: number of features, by contribution, the strongest first.
        features: features to measure in their place, each as LAYER/NUMBER, such as 2/17.
        texts: number of texts of the store, from its start.
    """

    top: int = 50
    features: tuple[str, ...] = ()
    texts: int = 50

    def __post_init__(self) -> None:
        for name in ("top", "texts"):
            if getattr(self, name) < 1:
                raise UserError(f"{name}: expected 1 or more, got {getattr(self, name)}")
        for name in self.features:
            pair_of(name)

    def pairs(self, store: Store) -> list[Pair]:
        """Return the features to ablate, in the order of measuring.

        Raises:
            UserError: no such feature, or none fired on the texts of the store.
        """
        pairs = list(dict.fromkeys(map(pair_of, self.features)))
        for pair in pairs:
            store.check_unit("adapter", *pair)
        if not (pairs := pairs or [unit[:2] for unit in strongest(store, n=self.top)]):
            raise UserError(f"{store.folder}: no feature fired on the texts of the store")
        return pairs


def effects(
    run: str | os.PathLike[str],
    source: str | os.PathLike[str] | None = None,
    config: EffectsConfig | None = None,
    *,
    dtype: str | None = None,
    device: str | None = None,
    trust_remote_code: bool = False,
    progress: Callable[[int, int], None] | None = None,
    stop: Event | None = None,
) -> pa.Table | None:
    """Measure the rise of the KL without each feature; add ``effects.parquet`` to the store.

    Features measured before on the same texts stay in the table.

    Args:
        run: folder of the run.
        source: folder of the store; the run's own if not given.
        config: which features, and on which texts.
        dtype: dtype of the pair; by default the dtype that the features were collected in.
        device: overrides the run's device.
        trust_remote_code: run Python code that comes with the models.
        progress: called with (texts done, texts).
        stop: when set, returns after the current text and writes nothing.

    Returns:
        The rows that were measured, in the order of features; None if stopped.

    Raises:
        UserError: the store does not exist or was collected from other adapters, or a feature does
            not exist.
        RunError: a prediction is not finite, or the store cannot be written.
    """
    config = config or EffectsConfig()
    store = Store.open(source or run)
    with writing(store.folder):
        students = students_of(
            store, run, dtype=dtype, device=device, trust_remote_code=trust_remote_code
        )
        pairs = config.pairs(store)
        rises = dict.fromkeys(pairs, 0.0)
        positions, total = 0, min(config.texts, store.manifest["data"]["texts"])
        for done, text in enumerate(first_texts(store, total), 1):
            ablated = AblatedText(students.model, text.tokens.tolist())
            before = predicted_sum(ablated.kl)
            for pair in ablated.pairs & rises.keys():
                rises[pair] += predicted_sum(ablated.without([pair])) - before
            positions += len(text.tokens) - 1
            if progress is not None:
                progress(done, total)
            if stop is not None and stop.is_set():
                return None
        rows = pa.table(
            {
                "layer": [layer for layer, _ in pairs],
                "feature": [feature for _, feature in pairs],
                "delta_kl": [rises[pair] / max(1, positions) for pair in pairs],
                "positions": [positions] * len(pairs),
            }
        ).cast(EFFECTS)
        store.add("effects", _with_earlier(store, rows, positions))
    return rows


def predicted_sum(kl: Tensor) -> float:
    """Return the sum of per-token KLs over the positions whose next token is in the text."""
    return float(kl[:-1].double().sum())


def first_texts(store: Store, n: int) -> Iterator[Text]:
    """Yield the first ``n`` texts of a store, with their tokens and regions."""
    with open_parquet(store.path("texts"), TEXTS) as file:
        for group in range(file.num_row_groups):
            for text in read_group(store.path("texts"), file, group):
                if n <= 0:
                    return
                n -= 1
                yield text


def _with_earlier(store: Store, rows: pa.Table, positions: int) -> pa.Table:
    """Append the store's rows of features not in ``rows``, if measured on as many positions."""
    if not store.has("effects"):
        return rows
    earlier = store.read("effects")
    new = set(zip(rows["layer"].to_pylist(), rows["feature"].to_pylist(), strict=True))
    old = zip(
        earlier["layer"].to_pylist(),
        earlier["feature"].to_pylist(),
        earlier["positions"].to_pylist(),
        strict=True,
    )
    retained = np.array(
        [count == positions and tuple(pair) not in new for *pair, count in old], bool
    )
    return pa.concat_tables([rows, earlier.filter(pa.array(retained))])
