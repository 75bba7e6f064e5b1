"""Runs rollouts with transformers' continuous batching, whose API differs between versions.

The scheduler runs in a separate thread. Two logits processors run with it. On the host, once per
step, they read the new tokens from every request's state and compute the keys of the next noise. On
the device, they add that noise, so that the largest score is the sampled token. Two processors are
needed because each can pass one int32 per request to the device, and a key has two.
"""

from __future__ import annotations

import math
import queue
import time
from collections.abc import Callable
from dataclasses import fields
from threading import Event
from typing import Any

import torch
from torch import Tensor
from transformers import ContinuousBatchingConfig, GenerationConfig, LogitsProcessorList
from transformers.generation.continuous_batching.cb_logits_processors import (
    ContinuousBatchingLogitsProcessor,
    ContinuousBatchingLogitsProcessorList,
)
from transformers.generation.continuous_batching.utils import WorkloadHints

from fastadapt.errors import RunError
from fastadapt.evaluation.generation.rollout import Draw, Rollout, SamplingConfig

# Sizes for a CPU, where transformers' default cache takes 60% of the memory, and every step reads
# all of it.
CPU_PAGE, CPU_BATCH, CPU_TOKENS = 16, 64, 2048


class _Key(ContinuousBatchingLogitsProcessor):
    """Logits processor that passes one half of each request's next noise key to the device."""

    def __init__(self, half: int, keys_of: Callable[[Any], tuple[int, int]]) -> None:
        self.supported_kwargs, self.ignored_kwargs = {}, ()
        self._half, self._keys_of = half, keys_of
        self.key_N: Tensor | None = None

    def fill_defaults(self, int32_tensor: Tensor) -> None:
        int32_tensor.zero_()

    def prepare_tensor_args(self, requests_with_new_token: list[Any]) -> Tensor:
        key = [self._keys_of(request.state)[self._half] for request in requests_with_new_token]
        return torch.tensor(key, dtype=torch.int32)

    def __call__(self, scores: Any, tensor_arg: Tensor) -> Any:
        self.key_N = tensor_arg[: scores.shape[0]]
        return scores


class _Drawing(_Key):
    """Logits processor that passes the second half of the keys and applies ``draw`` with both."""

    def __init__(self, high: _Key, draw: Draw, keys_of: Callable[[Any], tuple[int, int]]) -> None:
        super().__init__(1, keys_of)
        self._high, self._draw = high, draw

    def __call__(self, scores: Any, tensor_arg: Tensor) -> Any:
        super().__call__(scores, tensor_arg)
        assert self._high.key_N is not None
        assert self.key_N is not None
        return self._draw(scores, self._high.key_N, self.key_N)


class _Watch:
    """Feeds new tokens to the rollouts, from within the scheduler's thread."""

    def __init__(self, rollouts: list[Rollout]) -> None:
        self.rollouts = {str(i): rollout for i, rollout in enumerate(rollouts)}
        self.ended: queue.Queue[str] = queue.Queue()
        self.cancel: Callable[[str], None] = lambda name: None

    def keys_of(self, state: Any) -> tuple[int, int]:
        """Feed a request's new tokens, cancel it if it has ended, and return the next key."""
        rollout = self.rollouts.get(state.request_id)
        if rollout is None:  # a request of the warm-up
            return 0, 0
        if rollout.finish is None and self.take(state.request_id, self._tokens(state)):
            self.cancel(state.request_id)
            self.ended.put(state.request_id)
        # With two batches in flight, generated_tokens lags behind; position_offset does not.
        return rollout.key_at(state.position_offset)

    def take(self, name: str, tokens: list[int]) -> bool:
        """Feed a request's ``tokens`` that are new; return whether its response has ended."""
        rollout = self.rollouts[name]
        for token in tokens[len(rollout.tokens) :]:
            if rollout.feed(token):
                break
        return rollout.finish is not None

    def _tokens(self, state: Any) -> list[int]:
        """Return a request's generated tokens. After preemption its prompt holds the older ones."""
        prompt = len(self.rollouts[state.request_id].request.prompt)
        if len(state.initial_tokens) > prompt:
            return [*state.initial_tokens[prompt:], *state.generated_tokens]
        tokens: list[int] = state.generated_tokens
        return tokens


def run_continuous(
    model: Any,
    rollouts: list[Rollout],
    config: SamplingConfig,
    eos: set[int],
    done: Callable[[Rollout], None],
    stop: Event | None,
) -> float:
    """Generate until every rollout has ended, or until ``stop`` is set.

    Args:
        model: transformers' causal language model.
        rollouts: the requests.
        config: settings of the sampling.
        eos: ids of the tokens that end a sequence.
        done: called with each rollout that has ended.
        stop: set it to stop early.

    Returns:
        Seconds of generation, without the warm-up.

    Raises:
        RunError: the scheduler failed.
    """
    watch, draw = _Watch(rollouts), Draw(config, model.device)
    high = _Key(0, watch.keys_of)
    processors = ContinuousBatchingLogitsProcessorList(
        LogitsProcessorList([high, _Drawing(high, draw, watch.keys_of)])
    )
    processors.tensors_required = 2
    manager = model.init_continuous_batching(
        generation_config=GenerationConfig(do_sample=False, eos_token_id=sorted(eos) or -1),
        continuous_batching_config=_settings(model, rollouts, config),
        workload_hints=WorkloadHints(
            max_prompt_length=max(len(r.request.prompt) for r in rollouts),
            max_generated_length=max(r.limit for r in rollouts),
            num_requests=len(rollouts),
        ),
    )
    manager.logit_processor = processors
    watch.cancel = manager.cancel_request
    try:
        manager.warmup()
        draw.forget()  # the warm-up's logits belong to no request
        manager.start()
        begun = time.perf_counter()
        for name, rollout in watch.rollouts.items():
            manager.add_request(
                list(rollout.request.prompt), request_id=name, max_new_tokens=rollout.limit
            )
        _collect(manager, watch, draw, done, stop)
        return time.perf_counter() - begun
    finally:
        manager.stop(block=True, hard_stop=True)
        manager.destroy()


def _collect(
    manager: Any,
    watch: _Watch,
    draw: Draw,
    done: Callable[[Rollout], None],
    stop: Event | None,
) -> None:
    left = set(watch.rollouts)
    while left and not (stop is not None and stop.is_set()):
        output = manager.get_result(timeout=0.05)
        ended = []
        if output is not None and output.request_id in left:
            if output.error is not None:
                raise RunError(
                    f"continuous batching failed: {output.error}. Pass --sampling.batching static "
                    "to sample without it."
                )
            if output.is_finished() and watch.take(output.request_id, output.generated_tokens):
                ended.append(output.request_id)
        while not watch.ended.empty():
            ended.append(watch.ended.get())
        # Check before a response is stored: logits that produced its tokens were noted by now.
        draw.check(watch.rollouts.values(), together=True)
        for name in ended:
            if name in left:
                left.discard(name)
                done(watch.rollouts[name])
        if output is None and not ended and left and not manager.is_running():
            raise RunError(
                f"continuous batching stopped: {manager.background_thread_status.fatal_error}. "
                "Pass --sampling.batching static to sample without it."
            )


def _settings(
    model: Any, rollouts: list[Rollout], config: SamplingConfig
) -> ContinuousBatchingConfig:
    if model.device.type != "cpu":
        return settings_of(max_requests_per_batch=config.batch_size)
    at_once = min(len(rollouts), config.batch_size or CPU_BATCH)
    longest = max(len(r.request.prompt) + r.limit for r in rollouts)
    return settings_of(
        CPU_PAGE,
        num_blocks=at_once * (math.ceil(longest / CPU_PAGE) + 1),
        max_batch_tokens=CPU_TOKENS,
        max_requests_per_batch=at_once,
    )


def settings_of(page: int | None = None, **settings: Any) -> ContinuousBatchingConfig:
    """Return a ``ContinuousBatchingConfig``, by the option names of the installed transformers.

    Switches off the automatic change of the attention implementation, which is chosen when the
    model is loaded.

    Args:
        page: tokens per page of the cache; None for transformers' default.
        settings: other options.
    """
    known = {field.name for field in fields(ContinuousBatchingConfig)}
    if "auto_switch_to_flash" in known:
        settings["auto_switch_to_flash"] = False
    if page is not None:
        # transformers 5.17 has block_size.
        settings["page_size" if "page_size" in known else "block_size"] = page
    return ContinuousBatchingConfig(**settings)
