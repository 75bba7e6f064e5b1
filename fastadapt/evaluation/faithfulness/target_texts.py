"""Samples the target's responses to held-out prompts, and stores them for later evaluations."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from threading import Event
from typing import Any, NamedTuple

from fastadapt.data.rendered import Prefill, Spec
from fastadapt.data.rendering import get_form, opening_of
from fastadapt.data.sources import BadRows, Policy, Source, read_contents
from fastadapt.data.templates import auto_format
from fastadapt.data.tokens import Markers
from fastadapt.errors import UserError
from fastadapt.evaluation.faithfulness.prompts import HeldOut, Prompt, held_out, load_prompts
from fastadapt.evaluation.faithfulness.texts import Text
from fastadapt.evaluation.generation.responses import Request
from fastadapt.evaluation.generation.sampling import SamplingConfig, check_requests, sample
from fastadapt.evaluation.models_under_test import ModelSet
from fastadapt.organism import resolve


@dataclass(frozen=True)
class TextsConfig:
    """Settings of the texts on which models are compared.

    Args:
        prompts: source of the conversations whose prompts the target answers, in the form of
            ``data.train``; default: the held-out data of the first run.
        prefill: ``thinking``: prompts open the reasoning of the response; ``none``: the target
            itself decides whether to reason; None: as the family's own template.
        n: number of prompts, from the start of the source.
        n_partial: number of texts, from the start, on which partial replacement is measured.
    """

    prompts: str | None = None
    prefill: Prefill | None = None
    n: int = 500
    n_partial: int = 100

    def __post_init__(self) -> None:
        for name in ("n", "n_partial"):
            if getattr(self, name) < 1:
                raise UserError(f"texts.{name}: expected 1 or more, got {getattr(self, name)}")


class _Prompts(NamedTuple):
    """The prompts that the target answers, and how they were read."""

    prompts: list[Prompt]
    read_as: Source
    source: str
    default: HeldOut | None
    family: Spec
    markers: Markers

    @property
    def requests(self) -> list[Request]:
        return [Request(prompt.id, tuple(prompt.ids)) for prompt in self.prompts]


def check_texts(models: ModelSet, config: TextsConfig) -> None:
    """Check that the target can answer the prompts of :func:`target_texts`, without its weights.

    Raises:
        UserError: see :func:`target_texts`.
    """
    sizes = models.sizes("target").get_text_config()
    requests = _read_prompts(models, config).requests
    check_requests(requests, sizes.max_position_embeddings, sizes.vocab_size)


def target_texts(
    models: ModelSet,
    config: TextsConfig,
    sampling: SamplingConfig,
    folder: Path,
    *,
    progress: Callable[[int, int], None] | None = None,
    stop: Event | None = None,
) -> list[Text]:
    """Return the target's responses with their prompts; if stopped, only the finished ones.

    Args:
        models: the runs. The first one determines the held-out data and the rendering.
        config: which prompts.
        sampling: settings of the sampling.
        folder: stores one JSONL file per target and settings.
        progress: called with (completed responses, total responses).
        stop: set it to stop early; finished responses are stored.

    Raises:
        UserError: no held-out data or chat format is recorded, the source has no prompts, or a
            prompt does not fit the context.
    """
    prompts, read_as, source, default, family, markers = read = _read_prompts(models, config)
    tokenizer = models.tokenizer
    sha256 = models.fingerprint("target")
    facts: tuple[Any, ...] = (sha256, source, default, family, sampling.fingerprint())
    if opening := opening_of(get_form(auto_format.resolve(family, tokenizer)), config.prefill):
        facts += (opening,)  # without, the file is that of versions that had no opening
    if default is None and markers != "text":
        facts += (markers,)
    layout, _ = read_contents(read_as, bad=BadRows("skip"))
    if layout is not None and layout.system_columns:
        facts += (layout.system_columns,)  # earlier versions did not read them
    fingerprint = hashlib.sha256(repr(facts).encode()).hexdigest()
    with models.generating("target") as model:
        sampled = sample(
            model,
            tokenizer,
            read.requests,
            sampling,
            out=folder / f"{fingerprint[:16]}.jsonl",
            source={"model": "target", "sha256": sha256},
            progress=progress,
            stop=stop,
        )
    responses = {response.id: response for response in sampled.responses}
    texts = []
    for prompt in prompts:
        if response := responses.get(prompt.id):
            ids = [*prompt.ids, *response.tokens]
            texts.append(Text(prompt.id, ids, len(prompt.ids), prompt.domain))
    return texts


def _read_prompts(models: ModelSet, config: TextsConfig) -> _Prompts:
    first = models.compared[models.runs[0]].run
    recorded = None if first is None else held_out(Path(first))
    source = config.prompts or (recorded and recorded.source)
    family = models.family or (recorded and recorded.family)
    if source is None or family is None:
        raise UserError(
            f"{first}: no validation data or no chat format recorded; give, as the first run, "
            "one whose config.yaml records both"
        )
    default = recorded if config.prompts is None else None
    read_as = default.read_as() if default else Source(source, "validation")
    read_as = replace(read_as, name=resolve(source))
    bad_rows: Policy = default.bad_rows if default else "stop"
    markers: Markers = recorded.markers if recorded else "text"
    prompts = load_prompts(
        read_as,
        models.tokenizer,
        family,
        config.n,
        bad_rows=bad_rows,
        markers=markers,
        prefill=config.prefill,
    )
    return _Prompts(prompts, read_as, source, default, family, markers)
