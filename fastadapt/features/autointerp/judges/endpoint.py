"""Judge behind an OpenAI-compatible endpoint: a hosted one, vLLM, llama.cpp, Ollama, ..."""

from __future__ import annotations

import json
import math
import os
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastadapt.errors import RunError, UserError
from fastadapt.features.autointerp.judges import prompts
from fastadapt.features.autointerp.judges.reply_cache import ReplyCache
from fastadapt.features.autointerp.judges.settings import (
    BASE_URL,
    HOSTED,
    MODEL,
    JudgeConfig,
    public,
    secrets,
)
from fastadapt.features.autointerp.judges.without_llm import TokenJudge
from fastadapt.features.autointerp.questions import Answer, Estimate, Judge, Progress, Question
from fastadapt.features.store.store import Store

if TYPE_CHECKING:
    from openai import OpenAI

CALLS = "calls"  # folder of a store that holds the cached replies
_LETTERS_PER_TOKEN = 4  # of English text, without a tokenizer
_TOKENS_PER_MESSAGE = 4  # role and delimiters of a chat message
_MAX_QUOTED = 300  # letters of a reply in an error message
_MIN_REPLIES = 20  # number of replies, all invalid, after which the budget is exceeded


def open_judge(
    config: JudgeConfig, store: Store, *, count: Callable[[str], int] | None = None
) -> Judge:
    """Return the :class:`EndpointJudge` that ``config`` names, or :class:`TokenJudge` if none.

    Args:
        config: the judge's settings.
        store: the store whose folder ``calls`` caches the replies.
        count: number of tokens of a text, for estimates; a quarter of its letters if not given.

    Raises:
        UserError: the endpoint's key is missing, or ``openai`` is not installed.
    """
    if config.model_name is None:
        return TokenJudge()
    return EndpointJudge(config, store.folder / CALLS, count=count)


@dataclass(frozen=True)
class JudgeReply:
    """Reply to a question: the answer (None if invalid), the last text, and all requests sent."""

    answer: Answer | None
    text: str
    requests: list[Mapping[str, Any]]


class ErrorBudget:
    """Counts replies and invalid replies, and compares them with the share that may be invalid.

    Args:
        total: number of questions.
        max_share: share of ``total`` that may be invalid.
    """

    def __init__(self, total: int, max_share: float) -> None:
        self.total, self.max_share = total, max_share
        self.replies = self.invalid = 0
        self.sample = ""  # text of the latest invalid reply
        self.invalid_requests: list[Mapping[str, Any]] = []
        self._lock = threading.Lock()

    def add(self, reply: JudgeReply) -> None:
        """Count one reply; safe to call from several threads."""
        with self._lock:
            self.replies += 1
            if reply.answer is None:
                self.invalid += 1
                self.sample = reply.text
                self.invalid_requests += reply.requests

    @property
    def exceeded(self) -> bool:
        """Whether more replies are invalid than the share allows, or all of the first ones are."""
        with self._lock:
            all_invalid = self.replies >= _MIN_REPLIES and self.invalid == self.replies
            return all_invalid or self.invalid > self.max_share * self.total


class EndpointJudge:
    """Judge behind an endpoint; see :class:`fastadapt.features.autointerp.questions.Judge`.

    Args:
        config: settings, with a model named in them or in the environment.
        calls: folder that caches the replies.
        count: number of tokens of a text, for estimates; a quarter of its letters if not given.

    Raises:
        UserError: no model is named, the key is missing, or ``openai`` is not installed.
    """

    can_classify = True

    def __init__(
        self, config: JudgeConfig, calls: Path, *, count: Callable[[str], int] | None = None
    ) -> None:
        model = config.model_name
        if model is None:
            raise UserError(
                "judge.model: not set; give the model's name by judge.model or by the environment "
                f"variable {MODEL}"
            )
        self.config, self.name = config, model
        self._url = config.base_url or os.environ.get(BASE_URL) or HOSTED
        self._key = os.environ.get(config.key_variable) or None
        if self._key is None and self._url == HOSTED:
            raise UserError(
                f"the judge {model} needs a key: set {config.key_variable} in the environment, or "
                f"give the address of an endpoint without a key (judge.base_url, or {BASE_URL})"
            )
        self._secrets = sorted({*secrets(self._url), self._key or ""} - {""}, key=len, reverse=True)
        self._cache, self._count = ReplyCache(calls), count
        try:
            import openai  # noqa: F401
        except ImportError:
            raise UserError(
                "the package openai is not installed; run pip install 'fastadapt[features]'"
            ) from None

    @property
    def about(self) -> dict[str, str | int | None]:
        """Model, endpoint without the secret parts of its address, and version of the prompts."""
        return {"model": self.name, "endpoint": public(self._url), "prompts": prompts.VERSION}

    def cached_answer(self, question: Question) -> Answer | None:
        """Return the cached valid answer to a question; None if the cache has none."""
        reply = self._reply(question, self._cache.get)
        return None if reply is None else reply.answer

    def estimate(self, questions: Sequence[Question]) -> Estimate:
        """Estimate the cost of the questions that the cache does not answer."""
        count = self._count or (lambda text: math.ceil(len(text) / _LETTERS_PER_TOKEN))
        new = [q for q in questions if self._reply(q, self._cache.get) is None]
        tokens = sum(
            count(message["content"]) + _TOKENS_PER_MESSAGE
            for question in new
            for message in prompts.messages(question)
        )
        c = self.config
        out = None if c.max_tokens is None else len(new) * c.max_tokens
        cost = None
        if out is not None and c.price_in is not None and c.price_out is not None:
            cost = (tokens * c.price_in + out * c.price_out) / 1_000_000
        how = "by the given tokenizer" if self._count else f"{_LETTERS_PER_TOKEN} letters to one"
        return Estimate(len(new), len(questions) - len(new), tokens, out, cost, how)

    def ask(
        self,
        questions: Sequence[Question],
        *,
        progress: Progress | None = None,
        stop: threading.Event | None = None,
    ) -> list[Answer | None]:
        """Answer each question; None where the answer is invalid or ``stop`` was set before.

        Replies are cached one by one, so a killed call resumes without repeating requests. Once
        ``stop`` is set no request begins, and requests under way are completed.

        Raises:
            RunError: the endpoint cannot be reached or refuses, or too many replies are invalid.
                Invalid replies are then removed from the cache, to be requested again.
        """
        stop = stop or threading.Event()
        ended = threading.Event()  # by an error or an interrupt of this call alone
        budget = ErrorBudget(len(questions), self.config.invalid_share)
        answers: list[Answer | None] = [None] * len(questions)

        def send(request: dict[str, Any]) -> str | None:
            if stop.is_set() or ended.is_set():
                return None
            text = self._cache.get(request)
            return self._call(client, request) if text is None else text

        def reply_to(question: Question) -> JudgeReply | None:
            # Ends the call here, before this thread takes its next question.
            try:
                reply = self._reply(question, send)
            except BaseException:
                ended.set()
                raise
            if reply is not None:
                budget.add(reply)
            if budget.exceeded:
                ended.set()
            return reply

        with self._client() as client, ThreadPoolExecutor(self.config.concurrency) as pool:
            futures = {pool.submit(reply_to, q): i for i, q in enumerate(questions)}
            n_answered = 0
            try:
                for future in as_completed(futures):
                    if (reply := future.result()) is None:
                        continue
                    if budget.exceeded:
                        pool.shutdown(cancel_futures=True)  # waits for requests under way
                        self._cache.remove(budget.invalid_requests)
                        raise self._too_many_invalid(budget)
                    answers[futures[future]] = reply.answer
                    n_answered += 1
                    if progress is not None:
                        progress(n_answered, len(questions))
            finally:
                ended.set()
                pool.shutdown(cancel_futures=True)
        return answers

    def _reply(
        self, question: Question, send: Callable[[dict[str, Any]], str | None]
    ) -> JudgeReply | None:
        """Return the reply to a question, asked again if it is invalid; None if never asked."""
        messages = prompts.messages(question)
        requests: list[Mapping[str, Any]] = []
        text = ""
        for _ in range(2):
            request = self._request(messages)
            reply = send(request)
            if reply is None:
                return None
            requests.append(request)
            text = reply
            try:
                return JudgeReply(prompts.read(question, text), text, requests)
            except prompts.InvalidAnswerError as error:
                messages = prompts.again(messages, text, str(error))
        return JudgeReply(None, text, requests)

    def _request(self, messages: Sequence[prompts.Message]) -> dict[str, Any]:
        """Return the request: all that a reply depends on, and the key of the reply cache."""
        c = self.config
        parameters = c.fields
        if c.temperature is not None:
            parameters["temperature"] = c.temperature
        if c.max_tokens is not None:
            parameters["max_tokens"] = c.max_tokens
        if c.json_mode:
            parameters["response_format"] = {"type": "json_object"}
        return {
            "endpoint": public(self._url),
            "model": self.name,
            "prompts": prompts.VERSION,
            "messages": list(messages),
            "parameters": parameters,
        }

    def _call(self, client: OpenAI, request: Mapping[str, Any]) -> str:
        import openai

        completion: Any
        fields = {"model": request["model"], "messages": request["messages"]}
        try:
            # Parameters go into the body: their names as arguments differ by openai's version.
            completion = client.chat.completions.create(**fields, extra_body=request["parameters"])
        except openai.APITimeoutError:
            raise self._failed(f"gave no answer in {self.config.timeout:g} s") from None
        except openai.APIConnectionError as error:
            raise self._failed(f"cannot be reached ({error.__cause__ or error})") from None
        except openai.APIStatusError as error:
            raise self._refused(error) from None
        except json.JSONDecodeError as error:
            completion = error.doc
        # Python refuses long numbers (ValueError) and deep nesting (RecursionError).
        except (openai.APIError, ValueError, RecursionError) as error:
            raise self._failed(f"sent a reply that cannot be read ({error})") from None
        text, usage = _text_of(completion), getattr(completion, "usage", None)
        self._cache.put(
            request, text, None if usage is None else usage.model_dump(exclude_none=True)
        )
        return text

    def _client(self) -> OpenAI:
        from openai import OpenAI

        return OpenAI(
            api_key=self._key or "none",  # required by openai, ignored by endpoints without a key
            base_url=self._url,
            timeout=self.config.timeout,
            max_retries=self.config.retries,
        )

    # --- errors, without secrets ------------------------------------------------------------------

    def _failed(self, what: str) -> RunError:
        after = f", after {self.config.retries + 1} attempts" if self.config.retries else ""
        return self._error(f"{what}{after}")

    def _refused(self, error: Any) -> RunError:
        body = error.body.get("message", error.body) if isinstance(error.body, dict) else error.body
        retried = error.status_code in (408, 409, 429) or error.status_code >= 500
        after = f" after {self.config.retries + 1} attempts" if retried else ""
        return self._error(f"refused{after}: HTTP {error.status_code}, {self._quote(str(body))}")

    def _too_many_invalid(self, budget: ErrorBudget) -> RunError:
        return self._error(
            f"gave {budget.invalid} answers of {budget.replies} that are not valid, each asked for "
            f"twice; expected at most {budget.max_share:.0%} of {budget.total} "
            f"(judge.invalid_share). One of them: {self._quote(budget.sample)}"
        )

    def _error(self, what: str) -> RunError:
        return RunError(self._scrub(f"the judge {self.name} at {public(self._url)} {what}"))

    def _quote(self, text: str) -> str:
        # Scrubbed before it is shortened: a part of a secret would not be recognised.
        text = " ".join(self._scrub(text).split())
        return repr(text if len(text) <= _MAX_QUOTED else text[:_MAX_QUOTED] + "…")

    def _scrub(self, text: str) -> str:
        for secret in self._secrets:
            text = text.replace(secret, "***")
        return text


def _text_of(completion: Any) -> str:
    """Return a completion's text; if it has none, the whole completion as an invalid answer.

    Lone surrogates, which UTF-8 cannot write, become U+FFFD.
    """
    from pydantic import BaseModel  # the base of openai's completions

    try:
        text = completion.choices[0].message.content
    except (AttributeError, IndexError, TypeError):
        text = None
    if not isinstance(text, str) or not text:
        is_model = isinstance(completion, BaseModel)
        text = str(completion.model_dump(exclude_none=True) if is_model else completion)
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
