"""Settings of the sampling, the state of an unfinished response, and the draw of its tokens."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from fastadapt.errors import RunError, UserError
from fastadapt.evaluation.generation.degeneration import DegenerationConfig, DegenerationDetector
from fastadapt.evaluation.generation.gumbel import gumbel, position_key, request_seed
from fastadapt.evaluation.generation.responses import Finish, Request, Response

#: Largest number of tokens of a response that are drawn but not yet fed.
_IN_FLIGHT = 8


@dataclass(frozen=True)
class SamplingConfig:
    """Settings of the sampling of responses.

    Args:
        temperature: temperature of the softmax; 0 takes the most likely token.
        top_p: sample from the smallest set of tokens with at least this probability.
        max_new_tokens: largest number of tokens of a response; the context may end it earlier.
        seed: seed of the random numbers.
        stop: strings that end a response; they are not part of its text.
        stop_degenerate: end a response with its first degenerate window.
        degeneration: definition of a degenerate window.
        batching: ``auto`` (``static`` on a CPU, and for Gemma 4 and Qwen 3.5; else
            ``continuous``), ``continuous`` or ``static``.
        batch_size: sequences per batch; None: 64, or with continuous batching on a GPU as many as
            fit.
    """

    temperature: float = 0.7
    top_p: float = 1.0
    max_new_tokens: int = 32_768
    seed: int = 0
    stop: tuple[str, ...] = ()
    stop_degenerate: bool = True
    degeneration: DegenerationConfig = field(default_factory=DegenerationConfig)
    batching: Literal["auto", "continuous", "static"] = "auto"
    batch_size: int | None = None

    def __post_init__(self) -> None:
        if not self.temperature >= 0:
            raise UserError(f"sampling.temperature: expected 0 or more, got {self.temperature}")
        if not 0 < self.top_p <= 1:
            raise UserError(f"sampling.top_p: expected more than 0, at most 1, got {self.top_p}")
        if self.max_new_tokens < 1:
            raise UserError(
                f"sampling.max_new_tokens: expected 1 or more, got {self.max_new_tokens}"
            )
        if self.batch_size is not None and self.batch_size < 1:
            raise UserError(f"sampling.batch_size: expected 1 or more, got {self.batch_size}")
        if self.batching not in ("auto", "continuous", "static"):
            known = "auto, continuous or static"
            raise UserError(f"sampling.batching: expected {known}, got {self.batching!r}")
        if "" in self.stop:
            raise UserError("sampling.stop: an empty string would end every response; remove it")

    def fingerprint(self) -> dict[str, Any]:
        """Return the settings that determine the tokens of a response."""
        settings = asdict(self)
        for name in ("batching", "batch_size"):
            del settings[name]
        return settings


class Rollout:
    """A request and the tokens of its response so far.

    Args:
        request: the request.
        config: settings of the sampling.
        limit: largest number of new tokens, by the token budget and the context.
        eos: ids of the tokens that end a sequence.
        tokenizer: decodes the response.
    """

    def __init__(
        self, request: Request, config: SamplingConfig, limit: int, eos: set[int], tokenizer: Any
    ) -> None:
        self.request, self.limit = request, limit
        self.seed = request_seed(config.seed, request.id, request.repetition)
        self.tokens: list[int] = []
        self.finish: Finish | None = None
        self._config, self._eos, self._tokenizer = config, eos, tokenizer
        self._detector = (
            DegenerationDetector(config.degeneration) if config.stop_degenerate else None
        )
        # A token decodes to at least one byte, and a character has at most four.
        self._tail = 4 * max(map(len, config.stop), default=0) + 1

    def key(self) -> tuple[int, int]:
        """Return the key of the noise for the next token."""
        return self.key_at(len(self.request.prompt) + len(self.tokens))

    def key_at(self, position: int) -> tuple[int, int]:
        """Return the key of the noise for the token at ``position`` of prompt and response."""
        return position_key(self.seed, position)

    def has_drawn(self, key: tuple[int, int]) -> bool:
        """Return whether ``key`` is of a token of this response, including those being drawn."""
        first = len(self.request.prompt)
        return any(self.key_at(first + i) == key for i in range(len(self.tokens) + _IN_FLIGHT))

    def feed(self, token: int) -> bool:
        """Take the next token; return whether the response has ended."""
        if self.finish is not None:
            return True
        self.tokens.append(token)
        if token in self._eos:
            self.finish = "eos"
        elif self._detector is not None and self._detector.feed(token):
            self.finish = "degenerate"
        elif self._config.stop and self._stop_string() is not None:
            self.finish = "stop"
        elif len(self.tokens) >= self.limit:
            self.finish = "length"
        return self.finish is not None

    def response(self) -> Response:
        """Return the finished response; call only after it has ended."""
        assert self.finish is not None
        cut = None if self._detector is None else self._detector.cut
        text = self._text(self.tokens[:cut])
        if self.finish == "stop":
            text = text[: min((text.find(s) for s in self._config.stop if s in text), default=None)]
        return Response(
            id=self.request.id,
            repetition=self.request.repetition,
            seed=self.seed,
            prompt_tokens=list(self.request.prompt),
            tokens=self.tokens,
            text=text,
            finish=self.finish,
            cut=cut,
        )

    def _stop_string(self) -> str | None:
        tail = self._text(self.tokens[-self._tail :])
        return next((s for s in self._config.stop if s in tail), None)

    def _text(self, tokens: list[int]) -> str:
        text: str = self._tokenizer.decode(tokens, skip_special_tokens=True)
        return text


class LogitsError(RunError):
    """The model's logits are NaN or infinite, so no token can be drawn."""


class Draw:
    """Turns logits into scores whose ``argmax`` is the sampled token. N rows, V vocabulary.

    From logits that are NaN or infinite, ``argmax`` would give token 0. The key of the first such
    row is stored on the device without a synchronisation, and :meth:`check` raises.
    """

    def __init__(self, config: SamplingConfig, device: torch.device | str = "cpu") -> None:
        from transformers import TopPLogitsWarper

        self._broken = torch.zeros(2, dtype=torch.int32, device=device)
        self._temperature = config.temperature
        self._top_p = TopPLogitsWarper(config.top_p) if config.top_p < 1 else None

    def __call__(self, logits_NV: Tensor, high_N: Tensor, low_N: Tensor) -> Tensor:
        """Return ``logits / temperature``, restricted to the top p, plus noise; ``[N, V]``.

        Args:
            logits_NV: a token with a logit of minus infinity is never drawn.
            high_N, low_N: int32 ``[N]``, halves of the keys; both 0 for padding rows.
        """
        scores_NV = logits_NV
        if self._temperature != 0:
            scores_NV = logits_NV.float() / self._temperature
        self._note(scores_NV, high_N, low_N)
        if self._temperature == 0:
            return scores_NV
        if self._top_p is not None:
            scores_NV = self._top_p(None, scores_NV)
        return scores_NV + gumbel(high_N, low_N, logits_NV.shape[-1])

    def _note(self, scores_NV: Tensor, high_N: Tensor, low_N: Tensor) -> None:
        """Store the key of the first row whose maximum is not finite. Does not synchronise."""
        if not len(scores_NV):  # a step that only reads prompts
            return
        # The maximum is NaN if one score is, and minus infinity if all tokens are excluded.
        bad_N = ~scores_NV.amax(-1).isfinite() & ((high_N != 0) | (low_N != 0))
        first = bad_N.int().argmax(0, keepdim=True)
        key = torch.stack([high_N, low_N]).index_select(1, first)[:, 0]
        is_first = bad_N.any() & (self._broken == 0).all()
        self._broken.copy_(torch.where(is_first, key, self._broken))

    def check(self, rollouts: Iterable[Rollout], *, together: bool = False) -> None:
        """Raise if a call had logits that are not finite. Waits for the device.

        Args:
            rollouts: the rollouts of the calls; the error names the affected one.
            together: whether NaN may spread between rollouts, as in a batch of concatenated
                sequences.

        Raises:
            LogitsError: a call had such logits.
        """
        high, low = self._broken.tolist()
        if (high, low) == (0, 0):
            return
        drawn = next((rollout for rollout in rollouts if rollout.has_drawn((high, low))), None)
        name = "a request" if drawn is None else f"request {drawn.request.id!r}"
        name += ", or another of its batch: " if together else ": "
        raise LogitsError(
            f"{name}the model's logits are NaN or infinite, so that no token can be drawn. Weights "
            "of 16 bits may overflow; pass --dtype float32 (fastadapt where: --pair.dtype float32)"
        )

    def forget(self) -> None:
        """Clear the record of invalid logits, so that :meth:`check` ignores earlier calls."""
        self._broken.zero_()


def keys(rollouts: list[Rollout], device: torch.device | str = "cpu") -> tuple[Tensor, Tensor]:
    """Return the halves of the rollouts' keys, two int32 ``[N]``; 0 for ended responses."""
    pairs = [rollout.key() if rollout.finish is None else (0, 0) for rollout in rollouts]
    high, low = zip(*pairs, strict=True)
    return (
        torch.tensor(high, dtype=torch.int32, device=device),
        torch.tensor(low, dtype=torch.int32, device=device),
    )
