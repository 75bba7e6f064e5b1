"""A judge behind an endpoint of OpenAI's kind: a hosted one, vLLM, llama.cpp, Ollama, ..."""

from __future__ import annotations

import json
import math
import os
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastadapt.errors import RunError, UserError
from fastadapt.features.autointerp.judges import prompts
from fastadapt.features.autointerp.judges.error_budget import Tally, Told
from fastadapt.features.autointerp.judges.reply_cache import Calls
from fastadapt.features.autointerp.judges.settings import (
    BASE_URL,
    HOSTED,
    MODEL,
    JudgeConfig,
    public,
    secrets,
)
from fastadapt.features.autointerp.questions import Answer, Estimate, Progress, Question

if TYPE_CHECKING:
    from openai import OpenAI

_LETTERS_PER_TOKEN = 4  # of English, where no tokenizer counts
_PER_MESSAGE = 4  # tokens of a chat's own marks
_SHOWN = 300  # letters of an answer in a message


class EndpointJudge:
    """A judge behind an endpoint; see :class:`fastadapt.features.autointerp.questions.Judge`.

    Args:
        config: of :class:`JudgeConfig`, with a model there or in the environment.
        calls: folder for the answers that are kept.
        count: how many tokens a text has, for estimates; a quarter of its letters if not given.

    Raises:
        UserError: no model is named, the key is missing, or the package ``openai`` is.
    """

    tells_classes = True

    def __init__(
        self, config: JudgeConfig, calls: Path, *, count: Callable[[str], int] | None = None
    ) -> None:
        model = config.asked_for
        if model is None:
            raise UserError(f"judge.model: expected a name, here or in {MODEL}, got none")
        self.config, self.name = config, model
        self._url = config.base_url or os.environ.get(BASE_URL) or HOSTED
        self._key = os.environ.get(config.key_variable) or None
        if self._key is None and self._url == HOSTED:
            raise UserError(
                f"the judge {model} needs a key: set {config.key_variable} in the environment, or "
                f"give the address of an endpoint without one (judge.base_url, or {BASE_URL})"
            )
        self._secrets = sorted({*secrets(self._url), self._key or ""} - {""}, key=len, reverse=True)
        self._calls, self._count = Calls(calls), count
        try:
            import openai  # noqa: F401
        except ImportError:
            raise UserError(
                "a judge behind an endpoint needs: pip install 'fastadapt[features]'"
            ) from None

    @property
    def about(self) -> dict[str, str | int | None]:
        """The endpoint without what may be secret in its address, and the prompts' version."""
        return {"model": self.name, "endpoint": public(self._url), "prompts": prompts.VERSION}

    # --- what is kept, and what it would cost -----------------------------------------------------

    def kept(self, question: Question) -> Answer | None:
        """The answer that is kept from before; None if there is none that is valid."""
        return self._settled(question)[1]

    def estimate(self, questions: Sequence[Question]) -> Estimate:
        """What asking would cost; see :class:`fastadapt.features.autointerp.questions.Estimate`."""
        count = self._count or (lambda text: math.ceil(len(text) / _LETTERS_PER_TOKEN))
        calls = tokens = 0
        for question in questions:
            if not self._settled(question)[0]:
                calls += 1
                tokens += sum(
                    count(m["content"]) + _PER_MESSAGE for m in prompts.messages(question)
                )
        c = self.config
        out = None if c.max_tokens is None else calls * c.max_tokens
        cost = None
        if out is not None and c.price_in is not None and c.price_out is not None:
            cost = (tokens * c.price_in + out * c.price_out) / 1_000_000
        how = "by the given tokenizer" if self._count else f"{_LETTERS_PER_TOKEN} letters to one"
        return Estimate(calls, len(questions) - calls, tokens, out, cost, how)

    def _settled(self, question: Question) -> tuple[bool, Answer | None]:
        """Whether answers that are kept settle a question, and the answer, if it is valid."""
        messages = prompts.messages(question)
        for _ in range(2):
            text = self._calls.get(self._request(messages))
            if text is None:
                return False, None
            try:
                return True, prompts.read(question, text)
            except prompts.InvalidAnswerError as error:
                messages = prompts.again(messages, text, str(error))
        return True, None

    def _request(self, messages: Sequence[prompts.Message]) -> dict[str, Any]:
        """All that an answer depends on: what its file is named after."""
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

    # --- asking -----------------------------------------------------------------------------------

    def ask(
        self,
        questions: Sequence[Question],
        *,
        progress: Progress | None = None,
        stop: threading.Event | None = None,
    ) -> list[Answer | None]:
        """An answer to each question; None where it was not valid, or where ``stop`` came first.

        Answers are kept one by one, so what was asked before a kill is not asked again. With
        ``stop`` set no further request begins, and those under way are waited for.

        Raises:
            RunError: the endpoint cannot be reached or refuses, or too many answers are not valid;
                these are not kept then, so that they are asked for again.
        """
        stop = stop or threading.Event()
        ended = threading.Event()  # by an error or an interrupt of this call alone
        tally = Tally(len(questions), self.config.invalid_share)
        answers: list[Answer | None] = [None] * len(questions)
        with self._client() as client, ThreadPoolExecutor(self.config.concurrency) as pool:
            waiting: dict[Future[Told | None], int] = {}
            left = iter(enumerate(questions))
            try:
                while True:
                    while len(waiting) < 2 * self.config.concurrency and not stop.is_set():
                        if (following := next(left, None)) is None:
                            break
                        i, question = following
                        waiting[pool.submit(self._answer, client, question, stop, ended)] = i
                    if not waiting:
                        return answers
                    for future in wait(waiting, return_when=FIRST_COMPLETED).done:
                        i, told = waiting.pop(future), future.result()
                        if told is None:
                            continue
                        answers[i] = told.answer
                        tally.add(told)
                        if tally.hopeless:
                            ended.set()
                            error = self._nonsense(tally)
                            self._forget(tally, waiting)
                            raise error
                        if progress is not None:
                            progress(tally.done, len(questions))
            finally:
                ended.set()

    def _forget(self, tally: Tally, waiting: Iterable[Future[Told | None]]) -> None:
        """Drop what was not valid, with what is still on its way."""
        for future in wait(waiting).done:
            if future.exception() is None and (told := future.result()) is not None:
                tally.add(told)
        self._calls.forget(tally.requests)

    def _answer(
        self, client: OpenAI, question: Question, stop: threading.Event, ended: threading.Event
    ) -> Told | None:
        """Ask, and once more where the answer is not valid; None where it was to end before."""
        messages = prompts.messages(question)
        requests: list[Mapping[str, Any]] = []
        text = ""
        for _ in range(2):
            request = self._request(messages)
            known = self._calls.get(request)
            if known is None:
                if stop.is_set() or ended.is_set():
                    return None
                known = self._call(client, request)
            requests.append(request)
            text = known
            try:
                return Told(prompts.read(question, text), text, requests)
            except prompts.InvalidAnswerError as error:
                messages = prompts.again(messages, text, str(error))
        return Told(None, text, requests)

    def _call(self, client: OpenAI, request: Mapping[str, Any]) -> str:
        import openai

        made: Any
        fields = {"model": request["model"], "messages": request["messages"]}
        try:
            # As fields of the body, since what this package calls a parameter differs by version.
            made = client.chat.completions.create(**fields, extra_body=request["parameters"])
        except openai.APITimeoutError:
            raise self._failed(f"gave no answer in {self.config.timeout:g} s") from None
        except openai.APIConnectionError as error:
            why = str(error.__cause__ or error)
            raise self._failed(f"cannot be reached ({why})") from None
        except openai.APIStatusError as error:
            raise self._refused(error) from None
        except openai.APIError as error:
            raise self._failed(f"sent what cannot be read ({error})") from None
        except json.JSONDecodeError as error:
            made = error.doc
        except (ValueError, RecursionError) as error:  # numbers and nesting that Python refuses
            raise self._failed(f"sent what cannot be read ({error})") from None
        text, usage = _text_of(made), getattr(made, "usage", None)
        told = None if usage is None else usage.model_dump(exclude_none=True)
        self._calls.keep(request, text, told)
        return text

    @contextmanager
    def _client(self) -> Iterator[OpenAI]:
        from openai import OpenAI

        c = self.config
        client = OpenAI(
            api_key=self._key or "none",  # the package wants one; such an endpoint does not read it
            base_url=self._url,
            timeout=c.timeout,
            max_retries=c.retries,
        )
        with client:
            yield client

    # --- errors, which show no key or password ----------------------------------------------------

    def _failed(self, what: str) -> RunError:
        after = f", after {self.config.retries + 1} attempts" if self.config.retries else ""
        return RunError(self._safe(f"the judge {self.name} at {public(self._url)} {what}{after}"))

    def _refused(self, error: Any) -> RunError:
        body = error.body.get("message", error.body) if isinstance(error.body, dict) else error.body
        passing = error.status_code in (408, 409, 429) or error.status_code >= 500
        after = f" after {self.config.retries + 1} attempts" if passing else ""
        return RunError(
            self._safe(
                f"the judge {self.name} at {public(self._url)} refused{after}: HTTP "
                f"{error.status_code}, {_short(self._safe(str(body)))}"
            )
        )

    def _nonsense(self, tally: Tally) -> RunError:
        return RunError(
            self._safe(
                f"the judge {self.name} at {public(self._url)} gave {tally.invalid} answers of "
                f"{tally.done} that are not valid, each asked for twice; at most "
                f"{self.config.invalid_share:.0%} of {tally.total} may be (judge.invalid_share). "
                f"One of them: {_short(self._safe(tally.sample))}"
            )
        )

    def _safe(self, text: str) -> str:
        """A text without what is secret; before it is shortened, which may leave a part of that."""
        for secret in self._secrets:
            text = text.replace(secret, "***")
        return text


def _text_of(made: Any) -> str:
    """What a completion says; the whole of it where it says nothing, which is no valid answer.

    Half an emoji, which can be written nowhere, becomes the mark of what cannot be read.
    """
    from pydantic import BaseModel  # what the package openai makes its answers of

    try:
        text = made.choices[0].message.content
    except (AttributeError, IndexError, TypeError):
        text = None
    if not isinstance(text, str) or not text:
        text = str(made.model_dump(exclude_none=True) if isinstance(made, BaseModel) else made)
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def _short(text: str) -> str:
    text = " ".join(text.split())
    return repr(text if len(text) <= _SHOWN else text[:_SHOWN] + "…")
