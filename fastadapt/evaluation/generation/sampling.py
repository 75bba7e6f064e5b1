"""Sample responses of any Hugging Face causal language model, resumable and reproducible.

A request's tokens are a function of the model, the settings, and (seed, request, repetition): its
random numbers are its own (:mod:`fastadapt.evaluation.generation.gumbel`), so neither the batch
that it is in nor an interruption changes them. What remains is the arithmetic: matrix products of
another batch shape may differ in the last bits, and a token whose two best candidates are that
close then falls the other way. In float64 none was seen to, nor in float32 on the embedded pair
(100 responses, both ways to batch); in 16 bits it must be reckoned with.

Two ways to batch, of the same tokens. ``continuous``, transformers' continuous batching with its
paged cache: a finished request makes room at once, so long rollouts of unlike lengths keep a GPU
busy. ``static``: transformers' ``generate`` on left-padded batches, each until its last response
ends. On a CPU static batches take two thirds of the time (the embedded pair, 192 prompts: 3,160
tokens per CPU second against 2,100), so ``auto`` takes them there, and ``continuous`` on a GPU.
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

__all__ = ["Request", "Response", "Sampled", "SamplingConfig", "Speed", "read_responses", "sample"]

STATIC_BATCH = 64
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Sampled:
    """Responses in the order of the requests, and how fast they came.

    Attributes:
        responses: of the requests that are finished.
        speed: of this sampling and those before it that ``out`` tells of; None where nothing was
            generated.
        complete: whether every request is finished.
    """

    responses: list[Response]
    speed: Speed | None
    complete: bool


@dataclass
class _Session:
    """One call of :func:`sample` on its way."""

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
        response = rollout.response()
        self.finished[response.key] = response
        if self.file is not None:
            self.file.add(response)
        self.tokens += len(response.tokens)
        self.tell()

    def tell(self) -> None:
        if self.progress is not None:
            self.progress(self.done_before + len(self.finished), self.total)

    def stopped(self) -> bool:
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
        model: transformers' causal language model; of a :class:`ReplacementModel` its ``model``,
            within its ``mode``.
        tokenizer: decodes, and gives the padding token.
        requests: distinct by id and repetition.
        config: how to sample.
        out: JSONL that responses are added to as they finish, and read from before; see
            :mod:`fastadapt.evaluation.generation.responses`.
        source: names the model (ids, revisions, digest of an adapter, mode); part of what ``out``
            must agree on.
        progress: called with (requests finished, requests), first at the start.
        stop: ends the sampling early; what is finished is kept, what is not is begun anew later.

    Raises:
        UserError: a prompt that leaves no room in the context, an empty one, one with a token that
            the model has no embedding of, two requests of one name, or an ``out`` of other settings
            or prompts.
        RunError: the generation failed, logits are NaN or infinite (it names the model and a
            request; what was finished before is kept), or ``out`` cannot be written.
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
        session.tell()
        rollouts = [Rollout(r, config, limits[r.key], eos, tokenizer) for r in todo]
        speeds = [] if file is None else list(file.speeds)
        if rollouts and not session.stopped():
            try:
                speeds.append(_generate(session, rollouts))
            except LogitsError as error:
                model_name = f"model {source['model']!r}, " if source and "model" in source else ""
                raise LogitsError(f"{model_name}{error}") from error
    found = {**old, **session.finished}
    responses = [found[request.key] for request in requests if request.key in found]
    return Sampled(responses, _together(speeds), len(responses) == len(requests))


def end_tokens(model: Any, tokenizer: Any) -> set[int]:
    """Ids that end a sequence: those of the model's generation settings and the tokenizer's."""
    ids = getattr(model.generation_config, "eos_token_id", None)
    ids = [] if ids is None else [ids] if isinstance(ids, int) else list(ids)
    return {i for i in (*ids, tokenizer.eos_token_id) if i is not None}


def context_of(model: Any) -> int:
    """Tokens that a sequence of the model may have."""
    return int(model.config.get_text_config().max_position_embeddings)


def vocabulary_of(model: Any) -> int:
    """Tokens that the model has an embedding of."""
    return int(model.get_input_embeddings().weight.shape[0])


def check_requests(requests: Sequence[Request], context: int, vocabulary: int) -> None:
    """Refuse prompts that cannot be answered.

    Raises:
        UserError: a prompt leaves no room for a token, is empty, is there twice, or has a token
            that the model has no embedding of.
    """
    seen: set[Key] = set()
    for request in requests:
        name = f"request {request.id!r}"
        if request.key in seen:
            raise UserError(f"{name}, repetition {request.repetition}: is there twice")
        seen.add(request.key)
        if not request.prompt:
            raise UserError(f"{name}: the prompt is empty; expected at least one token")
        if len(request.prompt) >= context:
            raise UserError(
                f"{name}: the prompt has {len(request.prompt)} tokens, and the model's context is "
                f"{context}: no room for a response. Shorten the prompt, or leave it out."
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
    """``UserError`` where a response that is there is not one to its request."""
    for request in requests:
        response = old.get(request.key)
        if response is None:
            continue
        if tuple(response.prompt_tokens) != request.prompt:
            raise UserError(
                f"{out} holds a response to another prompt of the name {request.id!r}; sample into "
                "another file, or delete this one"
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
        raise UserError(f"{out}: response {request.key}: {reason}. Delete the file, or its line.")


def _generate(session: _Session, rollouts: list[Rollout]) -> Speed:
    """Run the rollouts; their speed goes to the file whether they end or something stops them."""
    on_gpu = session.model.device.type != "cpu"
    how = session.config.batching
    if how == "auto":
        how = "continuous" if on_gpu else "static"
    seconds = 0.0
    begun = time.perf_counter()
    try:
        with torch.no_grad(), _generation_settings(session):
            if how == "continuous":
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
        speed = Speed(session.tokens, seconds or time.perf_counter() - begun, how)
        if session.file is not None and session.tokens:
            session.file.add_speed(speed)
    return speed


def _together(speeds: Sequence[Speed]) -> Speed | None:
    if not sum(speed.tokens for speed in speeds):
        return None
    return Speed(
        sum(speed.tokens for speed in speeds),
        sum(speed.seconds for speed in speeds),
        "+".join(sorted({speed.batching for speed in speeds})),
    )


@contextmanager
def _generation_settings(session: _Session) -> Iterator[None]:
    """Ours alone: ``generate`` fills what it is not told from the model's, penalties included."""
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
    # Prompts of like length beside each other, so that little is padding; the tokens do not mind.
    ordered = sorted(rollouts, key=lambda rollout: len(rollout.request.prompt), reverse=True)
    size = session.config.batch_size or STATIC_BATCH
    for start in range(0, len(ordered), size):
        if session.stopped():
            return
        _run_batch(session, ordered[start : start + size])


def _run_batch(session: _Session, batch: list[Rollout]) -> None:
    """One ``generate`` on left-padded prompts; transformers derives positions from the mask."""
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
        every = session.stopped()
        flags = [every or rollout.finish is not None for rollout in batch]
        return torch.tensor(flags, device=ids_BT.device)

    model.generate(
        input_ids=ids_BT.to(model.device),
        attention_mask=mask_BT.to(model.device),
        max_new_tokens=max(rollout.limit for rollout in batch),
        logits_processor=LogitsProcessorList([scores]),
        stopping_criteria=StoppingCriteriaList([ended]),
    )
