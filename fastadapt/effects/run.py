"""A finished run in Python: what users of a run type first, in a program or in a notebook."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral, Real
from pathlib import Path
from typing import Any

from torch import Tensor

from fastadapt.adapter.files import adapter_digest
from fastadapt.data.rendered import Prefill
from fastadapt.effects.generate import GenerateConfig, generate
from fastadapt.effects.requests import RUN, check_text, factors_of, ids_of, prompt_ids
from fastadapt.effects.texts import Rows
from fastadapt.effects.trace import ADAPTER, firings, promotes, trace
from fastadapt.effects.views import (
    FeatureCard,
    Responses,
    TextFeatures,
    TextKL,
    shown_features,
)
from fastadapt.errors import UserError, require
from fastadapt.evaluation.models_under_test import ModelSet
from fastadapt.features.loading import RunContents
from fastadapt.features.store.details import first_descriptions, read_details
from fastadapt.features.store.logit_lens import strings_of
from fastadapt.features.store.schema import MANIFEST
from fastadapt.features.store.store import Store
from fastadapt.hub.download import locate
from fastadapt.hub.push import Pushed, push
from fastadapt.io.names import has_file
from fastadapt.models.replacement import ReplacementModel
from fastadapt.models.trained_files import read_adapters
from fastadapt.reporting.formatting import number
from fastadapt.reporting.page import render
from fastadapt.reporting.terminal import table_text
from fastadapt.reporting.visible import visible
from fastadapt.training.config import recorded_config
from fastadapt.training.logs.run_log import TRAINED, comparison, read_summary
from fastadapt.training.run_dir import CONFIG, SUMMARY

_NO_FEATURES = "this run trained no transcoders, so it has no features"
#: A text, or its token ids ``[T]`` or ``[1, T]``.
Text = str | Sequence[int] | Tensor


@dataclass(frozen=True, repr=False)
class LoadedRun(RunContents):
    """A finished run; see :func:`load`.

    Attributes:
        models: the run under the name ``run``, with the pair's base, hybrid and target.
        store: the collected features, or None.
        config: the run's configuration; None for adapters alone, and for an intervention, which
            records its pair and data only.
        source: the folder as typed, or the name of the repository on the hub.
        commit: commit of the repository; None for a folder.
    """

    source: str
    commit: str | None = None

    @property
    def replacement(self) -> ReplacementModel:
        """The replacement model, under the name that the library's documentation uses."""
        return self.model

    def features(self, text: Text, *, plain: bool = True, top: int = 5) -> TextFeatures:
        """Return the features that fire at each token of a text, with what they promote.

        Hidden states are those of the replacement model.

        Args:
            text: a text or its token ids.
            plain: read the text as it is; False: as a user's prompt, with the markers of the run's
                conversations.
            top: number of features that are shown per token.

        Raises:
            UserError: the run has no transcoders, or the text is empty or too long.
        """
        _check_count("top", top)
        ids = self._ids(text, plain)
        check_text(self.models, ids)
        fires = firings(self, ids)
        pairs, _ = shown_features(fires, top)
        return TextFeatures(
            ids,
            strings_of(self.pair.tokenizer, ids),
            fires,
            promotes(self, pairs),
            {} if self.store is None else first_descriptions(self.store, pairs),
            top,
        )

    def feature(self, layer: int, feature: int, *, examples: int = 5) -> FeatureCard:
        """Return all that the run's store says about a feature.

        Args:
            layer, feature: the feature, both counted from 0.
            examples: largest number of examples.

        Raises:
            UserError: no features were collected, or the feature does not exist.
        """
        _check_count("examples", examples)
        if self.store is None:
            if self.models.compared[RUN].kind != "transcoder":
                raise UserError(f"{self.source}: {_NO_FEATURES}")
            raise UserError(
                f"{self.source}: no features were collected from this run yet; run "
                f"{self._collect}, or give the folder of a store (fastadapt.load(..., store=...))"
            )
        (details,) = read_details(self.store, [(layer, feature)], examples=examples)
        return FeatureCard(details)

    def generate(
        self,
        prompt: Text,
        *,
        scale: Mapping[Any, float] | None = None,
        without: Sequence[str] = (),
        models: Sequence[str] = (ADAPTER,),
        temperature: float = 0.0,
        max_new_tokens: int = 512,
        seed: int = 0,
        plain: bool = False,
        prefill: Prefill | None = None,
    ) -> Responses:
        """Generate a response, by default the adapter's most likely tokens.

        Args:
            prompt: a user's prompt, rendered as the training data of the run were; or token ids.
            scale: factor of features, by pair (layer, number), or by the name of a set of the run.
            without: features to remove: names of sets, or features like ``2/17,3/401``.
            models: models to generate with, among base, hybrid, adapter and target.
            temperature: temperature of the softmax; 0 takes the most likely token.
            max_new_tokens: largest number of tokens of a response.
            seed: seed of the random numbers.
            plain: read the prompt as it is, without the markers of a conversation.
            prefill: whether the prompt opens the response's reasoning: ``thinking`` or ``none``; by
                default as the chat template of the run's family.

        Raises:
            UserError: the prompt is empty or too long, or a feature does not exist.
            RunError: a prediction is not finite.
        """
        config = GenerateConfig(
            _names(models), temperature=temperature, max_new_tokens=max_new_tokens, seed=seed
        )
        factors = factors_of(self, _names(without), _scaled({} if scale is None else scale))
        config.check_factors(factors)
        responses = generate(self, self._ids(prompt, plain, prefill), config, factors)
        return Responses(responses, self._trained)

    def kl(self, text: Text, *, plain: bool = True, base: bool = False) -> TextKL:
        """Return KL(target ‖ model) of the next token after each token, of hybrid and adapter.

        Args:
            text: a text or its token ids.
            plain: read the text as it is; False: as a user's prompt, with the markers of the run's
                conversations.
            base: load the base as a whole model and compare it, too.

        Raises:
            UserError: the text is empty or too long.
            RunError: a prediction is not finite.
        """
        return TextKL(trace(self, self._ids(text, plain), base=base), self._trained)

    def push_to_hub(
        self,
        repository: str,
        *,
        private: bool | None = None,
        license: str | None = None,
        target: str | None = None,
        base: str | None = None,
        tokenizer: str | None = None,
    ) -> Pushed:
        """Push the run to the Hugging Face hub; see :func:`fastadapt.hub.push.push`."""
        return push(
            self._folder,
            repository,
            private=private,
            license=license,
            target=target,
            base=base,
            tokenizer=tokenizer,
        )

    @property
    def _folder(self) -> Path:
        return Path(str(self.models.compared[RUN].run))

    @property
    def _trained(self) -> str:
        return TRAINED[self.models.compared[RUN].kind]

    @property
    def _collect(self) -> str:
        """The command that collects features; not into the hub's cache."""
        output = "" if self.commit is None else " --output FOLDER"
        return f"fastadapt features collect {self._folder}{output}"

    def _ids(self, text: Text, plain: bool, prefill: Prefill | None = None) -> list[int]:
        if isinstance(text, str):
            return prompt_ids(self.models, text, plain=plain, prefill=prefill)
        return ids_of(text)

    def _facts(self) -> list[list[str]]:
        card = read_adapters(self.models.folder(RUN))[1]
        config, facts = self.models.config, [["trained", self.models.compared[RUN].description]]
        if "adapter" in card:
            size = f"{card['n_layers']} × {card['adapter'].features:,}"
            facts.append(["layers × features", size])
        if self.commit is not None:
            facts.append(["commit", self.commit])
        for role in ("target", "base"):
            revision = getattr(config, f"{role}_revision")
            name = card["metadata"].get(role) or getattr(config, role)
            facts.append([role, name if revision is None else f"{name} at {revision}"])
        if "adapter" not in card:
            facts.append(["features", "none: this run trained no transcoders"])
        elif self.store is None:
            facts.append(["features", f"not collected ({self._collect})"])
        else:
            data = self.store.manifest["data"]
            texts = f"{number(data['tokens'])} tokens of {number(data['texts'])} texts"
            facts.append(["features", f"collected from {texts}"])
        return [[name, visible(value)] for name, value in facts]

    def _results(self) -> Rows | None:
        summary = read_summary(self._folder / SUMMARY)
        return comparison(summary, layers=False) if summary else None

    def __repr__(self) -> str:
        facts, results = self._facts(), self._results()
        width = max(len(name) for name, _ in facts)
        lines = [visible(self.source), *(f"  {name:<{width}}  {value}" for name, value in facts)]
        return "\n".join([*lines, *([] if results is None else ["", table_text(*results)])])

    def _repr_html_(self) -> str:
        results = self._results()
        return render(
            "loaded-run.html.j2", name=visible(self.source), facts=self._facts(), results=results
        )


def load(
    path: str | os.PathLike[str],
    *,
    revision: str | None = None,
    store: str | os.PathLike[str] | None = None,
    dtype: str | None = None,
    device: str | None = None,
    attention: str | None = None,
    trust_remote_code: bool = False,
) -> LoadedRun:
    """Open a finished run: models, adapters, collected features, configuration.

    The models' weights are loaded when they are first needed, so that a feature's card needs none.
    A name that could be a path is never looked up on the hub.

    Args:
        path: folder of a run or of adapters; or the name of a run on the Hugging Face hub,
            ``owner/name`` or ``owner/name@revision``, whose adapters are downloaded.
        revision: branch, tag or commit on the hub; the main branch by default.
        store: folder of collected features; ``features`` in the run by default.
        dtype, device, attention: settings of the pair in place of the run's.
        trust_remote_code: run Python code that comes with the models.

    Returns:
        The run. In a notebook, its results show themselves.

    Raises:
        UserError: no finished run in the folder or repository, a damaged file, or features that
            were collected from other adapters.
        RunError: the download failed.

    Example::

        run = fastadapt.load("runs/organism")
        run.features("tom has 3 apples")          # what fires at each token
        run.feature(2, 17)                        # the card of a feature
        run.generate("tom has 3 apples .", scale={(2, 17): 0.0})
        run.kl("tom has 3 apples")                # per token
    """
    located = locate(path, revision)
    models = ModelSet.open(
        [located.folder],
        [RUN],
        dtype=dtype,
        device=device,
        attention=attention,
        trust_remote_code=trust_remote_code,
    )
    collected = None
    if store is not None or has_file(located.folder / "features" / MANIFEST):
        adapter = adapter_digest(models.folder(RUN))
        collected = Store.open(store or located.folder, adapter=adapter)
    settings = recorded_config(located.folder / CONFIG)
    return LoadedRun(models, collected, settings, located.name, located.commit)


#: The name of :func:`load` in earlier versions.
load_run = load


def _check_count(name: str, value: Any) -> None:
    require(isinstance(value, Integral), name, "a whole number", value)
    require(value >= 0, name, "0 or more", value)


def _names(names: str | Sequence[str]) -> tuple[str, ...]:
    return (names,) if isinstance(names, str) else tuple(names)


def _scaled(scale: Any) -> list[str]:
    """Return factors of features as a command's ``--scale`` names them."""
    expected = "factors by feature, such as {(2, 17): 0.0}"
    require(isinstance(scale, Mapping), "scale", expected, scale)
    texts = []
    for key, factor in scale.items():
        pair = (
            isinstance(key, tuple) and len(key) == 2 and all(isinstance(i, Integral) for i in key)
        )
        require(pair or isinstance(key, str), "scale", f"{expected}, or by the name of a set", key)
        require(
            isinstance(factor, Real) and math.isfinite(factor),
            f"scale of {key}",
            "a finite number",
            factor,
        )
        name = f"{key[0]}/{key[1]}" if pair else key
        texts.append(f"{name}={float(factor)!r}")
    return texts
