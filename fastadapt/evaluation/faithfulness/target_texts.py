"""What the target answers to held-out prompts, sampled once and read from then on."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from threading import Event

from fastadapt.errors import UserError
from fastadapt.evaluation.faithfulness.prompts import held_out, load_prompts
from fastadapt.evaluation.faithfulness.texts import Text
from fastadapt.evaluation.generation.responses import Request
from fastadapt.evaluation.generation.sampling import SamplingConfig, sample
from fastadapt.evaluation.models_under_test import Students
from fastadapt.organism import resolve


@dataclass(frozen=True)
class TextsConfig:
    """The texts on which students are compared: the target's own responses to held-out prompts.

    Args:
        prompts: conversations whose prompts are answered, named as ``data.train`` is; the run's
            held-out data if not given.
        n: the first so many.
        n_partial: partial replacement is measured on the first so many of them.
    """

    prompts: str | None = None
    n: int = 500
    n_partial: int = 100

    def __post_init__(self) -> None:
        for name in ("n", "n_partial"):
            if getattr(self, name) < 1:
                raise UserError(f"texts.{name}: expected 1 or more, got {getattr(self, name)}")


def target_texts(
    students: Students,
    config: TextsConfig,
    sampling: SamplingConfig,
    folder: Path,
    *,
    progress: Callable[[int, int], None] | None = None,
    stop: Event | None = None,
) -> list[Text]:
    """The target's responses with their prompts; of those that are finished, if stopped.

    Args:
        students: the runs; the first one says what prompts are held out, and how they are rendered.
        config: which prompts.
        sampling: how they are answered.
        folder: of a JSONL per target and settings.
        progress: called with (responses, responses wanted).
        stop: ends the sampling early; what is finished is kept.

    Raises:
        UserError: there are no prompts, or one does not fit the context.
    """
    first = students.students[students.runs[0]].run
    told = None if first is None else held_out(Path(first))
    source = config.prompts or (told and told.source)
    family = students.family or (told and told.family)
    if source is None or family is None:
        raise UserError(
            f"{first} does not say what it was validated on and how that was rendered: give "
            "the folder of a run first"
        )
    own = told if config.prompts is None else None
    prompts = load_prompts(
        resolve(source),
        students.tokenizer,
        family,
        config.n,
        split=own.split if own else "validation",
        revision=own.revision if own else None,
    )
    sha256 = students.fingerprint("target")
    facts = (sha256, source, own, family, sampling.fingerprint())
    told_by = hashlib.sha256(repr(facts).encode()).hexdigest()
    requests = [Request(prompt.id, tuple(prompt.ids)) for prompt in prompts]
    with students.generating("target") as model:
        sampled = sample(
            model,
            students.tokenizer,
            requests,
            sampling,
            out=folder / f"{told_by[:16]}.jsonl",
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
