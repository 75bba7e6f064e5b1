"""Samples responses of Hugging Face causal language models, resumable and reproducible.

The tokens of a response are a function of the model, the settings and (seed, request, repetition).
The random numbers do not depend on the batch (:mod:`fastadapt.evaluation.generation.gumbel`), so
neither batching nor an interruption changes them. Matrix products of other batch shapes may differ
in the last bits, which can change a token if its two best candidates are that close. This was not
seen in float64, nor in float32 on the embedded pair (100 responses, both kinds of batching). In 16
bits it is to be expected.

Two kinds of batching give the same tokens:

- ``continuous``: transformers' continuous batching with a paged cache. A finished request is
  replaced at once, which keeps a GPU busy for long responses of different lengths.
- ``static``: transformers' ``generate`` on left-padded batches, each until its last response ends.

On a CPU, static batches take two thirds of the time (embedded pair, 192 prompts: 3,160 tokens per
CPU second against 2,100). ``auto`` is ``static`` on a CPU and ``continuous`` on a GPU,
except for models that a paged cache cannot run (Gemma 4, Qwen 3.5).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from threading import Event
from typing import Any

import torch
from torch import Tensor

from fastadapt.data.batches import padding_id
from fastadapt.data.tokens import check_ids
from fastadapt.errors import UserError
from fastadapt.evaluation.generation.gumbel import request_seed
from fastadapt.evaluation.generation.responses import (
    Key,
    Request,
    Response,
    ResponseFile,
    Speed,
    open_responses,
    read_responses,
)
from fastadapt.evaluation.generation.rollout import Draw, LogitsError, Rollout, SamplingConfig, keys
from fastadapt.models.architectures import ARCHITECTURES

__all__ = ["Request", "Response", "Sampled", "SamplingConfig", "Speed", "read_responses", "sample"]

STATIC_BATCH = 64
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Sampled:
    """Responses that :func:`sample` returns, with their speed.

    Attributes:
        responses: responses to the finished requests, in the order of the requests.
        speed: speed of this call and the earlier calls recorded in ``out``; None if no token was
            generated.
        complete: whether every request is finished.
    """

    responses: list[Response]
    speed: Speed | None
    complete: bool


@dataclass
class _Session:
    """State of one call of :func:`sample`."""

    model: Any
    config: SamplingConfig
    eos: set[int]
    pad: int
    file: ResponseFile | None
    total: int
    progress: Progress | None
    stop: Event | None
    finished: dict[Key, Response] = field(default_factory=dict)
    tokens: int = 0
    done_before: int = 0

    def done(self, rollout: Rollout) -> None:
        """Store the response of a rollout that has ended."""
        response = rollout.response()
        self.finished[response.key] = response
        if self.file is not None:
            self.file.add(response)
        self.tokens += len(response.tokens)
        self.report()

    def report(self) -> None:
        """Call ``progress`` with the numbers of finished and of all requests."""
        if self.progress is not None:
            self.progress(self.done_before + len(self.finished), self.total)

    def stopped(self) -> bool:
        """Return whether the caller has set ``stop``."""
        return self.stop is not None and self.stop.is_set()


def sample(
    model: Any,
    tokenizer: Any,
    requests: Sequence[Request],
    config: SamplingConfig,
    *,
    out: Path | None = None,
    source: Mapping[str, Any] | None = None,
    progress: Progress | None = None,
    stop: Event | None = None,
) -> Sampled:
    """Sample a response to each request that has none yet.

    Args:
        model: transformers' causal language model. For a :class:`ReplacementModel`, pass its
            ``model`` within its ``mode``.
        tokenizer: decodes responses, and provides the padding token.
        requests: distinct by id and repetition.
        config: settings of the sampling.
        out: JSONL file of responses, see :mod:`fastadapt.evaluation.generation.responses`. Its
            responses are reused, and new ones are appended as they finish.
        source: identifies the model (ids, revisions, digest of an adapter, mode). ``out`` must have
            been written with the same ``source``.
        progress: called with (finished requests, total requests), first at the start.
        stop: set it to stop early. Finished responses are stored, unfinished ones are sampled again
            later.

    Raises:
        UserError: a prompt is empty, does not fit the context or has a token without embedding; two
            requests have one id and repetition; or ``out`` has other settings or prompts.
        RunError: the generation failed or ``out`` cannot be written.
        LogitsError: logits are NaN or infinite; responses that finished before are stored.
    """
    context = context_of(model)
    vocabulary = vocabulary_of(model)
    check_requests(requests, context, vocabulary)
    eos = end_tokens(model, tokenizer)
    settings = {
        "source": dict(source or {}),
        "context": context,
        "eos": sorted(eos),
        **config.fingerprint(),
    }
    with nullcontext() if out is None else open_responses(out, settings) as file:
        old = {} if file is None else dict(file.finished)
        limits = {r.key: min(config.max_new_tokens, context - len(r.prompt)) for r in requests}
        _check_old(requests, old, out, config.seed, limits, vocabulary)
        todo = [request for request in requests if request.key not in old]
        session = _Session(
            model=model,
            config=config,
            eos=eos,
            pad=padding_id(tokenizer, vocabulary),
            file=file,
            total=len(requests),
            progress=progress,
            stop=stop,
            done_before=len(requests) - len(todo),
        )
        session.report()
        rollouts = [Rollout(r, config, limits[r.key], eos, tokenizer) for r in todo]
        speeds = [] if file is None else list(file.speeds)
        if rollouts and not session.stopped():
            try:
                speeds.append(_generate(session, rollouts))
            except LogitsError as error:
                model_name = f"model {source['model']!r}, " if source and "model" in source else ""
                raise LogitsError(f"{model_name}{error}") from error
    finished = {**old, **session.finished}
    responses = [finished[request.key] for request in requests if request.key in finished]
    return Sampled(responses, _total_speed(speeds), len(responses) == len(requests))


def end_tokens(model: Any, tokenizer: Any) -> set[int]:
    """Return the ids that end a sequence, by the model's generation settings and the tokenizer."""
    ids = getattr(model.generation_config, "eos_token_id", None)
    ids = [] if ids is None else [ids] if isinstance(ids, int) else list(ids)
    return {i for i in (*ids, tokenizer.eos_token_id) if i is not None}


def context_of(model: Any) -> int:
    """Return the largest number of tokens of a sequence of the model."""
    return int(model.config.get_text_config().max_position_embeddings)


def vocabulary_of(model: Any) -> int:
    """Return the number of tokens with an embedding in the model."""
    return int(model.get_input_embeddings().weight.shape[0])


def check_requests(requests: Sequence[Request], context: int, vocabulary: int) -> None:
    """Check that every prompt can be answered.

    Args:
        requests: the requests.
        context: largest number of tokens of a sequence.
        vocabulary: number of tokens with an embedding.

    Raises:
        UserError: a prompt is empty, leaves no token of the context for a response, or has a token
            without embedding; or two requests have one id and repetition.
    """
    seen: set[Key] = set()
    for request in requests:
        name = f"request {request.id!r}"
        if request.key in seen:
            raise UserError(
                f"{name}, repetition {request.repetition}: this request is given twice; give each "
                "request an id and a repetition that no other has"
            )
        seen.add(request.key)
        if not request.prompt:
            raise UserError(f"{name}: the prompt is empty; expected at least one token")
        if len(request.prompt) >= context:
            raise UserError(
                f"{name}: expected a prompt shorter than the model's context of {context} tokens, "
                f"got {len(request.prompt)} tokens. Shorten the prompt, or remove it."
            )
        check_ids(request.prompt, vocabulary, name)


def _check_old(
    requests: Sequence[Request],
    old: Mapping[Key, Response],
    out: Path | None,
    seed: int,
    limits: Mapping[Key, int],
    vocabulary: int,
) -> None:
    """Raise ``UserError`` if a stored response does not fit its request."""
    for request in requests:
        response = old.get(request.key)
        if response is None:
            continue
        if tuple(response.prompt_tokens) != request.prompt:
            raise UserError(
                f"{out} holds a response with the id {request.id!r} to a different prompt; sample "
                "into another file, or delete this one"
            )
        n, limit = len(response.tokens), limits[request.key]
        expected = request_seed(seed, *request.key)
        if response.seed != expected:
            reason = f"seed: expected {expected}, got {response.seed}"
        elif not 1 <= n <= limit:
            reason = f"tokens: expected 1 to {limit:,}, got {n:,}"
        elif max(response.tokens) >= vocabulary:
            reason = f"tokens: expected ids below {vocabulary:,}, got {max(response.tokens):,}"
        elif response.cut is not None and response.cut > n:
            reason = f"cut: expected at most {n:,}, got {response.cut:,}"
        else:
            continue
        raise UserError(
            f"{out}: response {request.key}: {reason}. Delete the file or this response's line."
        )


def choose_batching(model: Any, batching: str) -> str:
    """Return ``static`` or ``continuous`` for a value of ``sampling.batching``.

    Raises:
        UserError: transformers' continuous batching cannot run the model.
    """
    kind = model.config.model_type
    paged = ARCHITECTURES[kind].paged if kind in ARCHITECTURES else True
    if batching == "continuous" and not paged:
        raise UserError(
            f"sampling.batching: transformers' continuous batching cannot run {kind!r}; expected "
            "auto or static"
        )
    if batching == "auto":
        return "continuous" if paged and model.device.type != "cpu" else "static"
    return batching


def _generate(session: _Session, rollouts: list[Rollout]) -> Speed:
    """Run the rollouts. Their speed is stored even if an error or ``stop`` ends them early."""
    batching = choose_batching(session.model, session.config.batching)
    seconds = 0.0
    begun = time.perf_counter()
    try:
        with torch.no_grad(), _generation_settings(session):
            if batching == "continuous":
                from fastadapt.evaluation.generation.continuous import run_continuous

                seconds = run_continuous(
                    session.model,
                    rollouts,
                    session.config,
                    session.eos,
                    session.done,
                    session.stop,
                )
            else:
                _run_static(session, rollouts)
    finally:
        speed = Speed(session.tokens, seconds or time.perf_counter() - begun, batching)
        if session.file is not None and session.tokens:
            session.file.add_speed(speed)
    return speed


def _total_speed(speeds: Sequence[Speed]) -> Speed | None:
    tokens, seconds = (sum(getattr(s, name) for s in speeds) for name in ("tokens", "seconds"))
    batching = "+".join(sorted({speed.batching for speed in speeds}))
    return Speed(tokens, seconds, batching) if tokens else None


@contextmanager
def _generation_settings(session: _Session) -> Iterator[None]:
    """Replace the model's generation settings, from which ``generate`` takes its defaults.

    Those may include penalties, which would change the samples.
    """
    from transformers import GenerationConfig

    model, before = session.model, session.model.generation_config
    model.generation_config = GenerationConfig(
        do_sample=False, eos_token_id=sorted(session.eos) or None, pad_token_id=session.pad
    )
    try:
        yield
    finally:
        model.generation_config = before


def _run_static(session: _Session, rollouts: list[Rollout]) -> None:
    # Sorted by length, to have little padding. The order does not change the tokens.
    ordered = sorted(rollouts, key=lambda rollout: len(rollout.request.prompt), reverse=True)
    size = session.config.batch_size or STATIC_BATCH
    for start in range(0, len(ordered), size):
        if session.stopped():
            return
        _run_batch(session, ordered[start : start + size])


def _run_batch(session: _Session, batch: list[Rollout]) -> None:
    """Run one ``generate`` on left-padded prompts. transformers derives positions from the mask."""
    from transformers import LogitsProcessorList, StoppingCriteriaList

    model = session.model
    draw = Draw(session.config, model.device)
    length = max(len(rollout.request.prompt) for rollout in batch)
    ids_BT = torch.full((len(batch), length), session.pad, dtype=torch.int64)
    mask_BT = torch.zeros_like(ids_BT)
    for row, rollout in enumerate(batch):
        n = len(rollout.request.prompt)
        ids_BT[row, length - n :] = torch.tensor(rollout.request.prompt)
        mask_BT[row, length - n :] = 1

    def scores(ids_BT: Tensor, logits_BV: Tensor) -> Tensor:
        return draw(logits_BV, *keys(batch, logits_BV.device))

    def ended(ids_BT: Tensor, logits: Any, **_: Any) -> Tensor:
        draw.check(batch)
        for rollout, token in zip(batch, ids_BT[:, -1].tolist(), strict=True):
            if rollout.finish is None and rollout.feed(token):
                session.done(rollout)
        stopped = session.stopped()
        flags = [stopped or rollout.finish is not None for rollout in batch]
        return torch.tensor(flags, device=ids_BT.device)

    model.generate(
        input_ids=ids_BT.to(model.device),
        attention_mask=mask_BT.to(model.device),
        max_new_tokens=max(rollout.limit for rollout in batch),
        logits_processor=LogitsProcessorList([scores]),
        stopping_criteria=StoppingCriteriaList([ended]),
    )
