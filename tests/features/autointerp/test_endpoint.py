"""A judge behind a server on loopback that answers, fails, stalls, or sends invalid answers."""

from __future__ import annotations

import base64
import json
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from chat_server import KEY, ChatServer, Fault, answers_well, serving

from fastadapt.errors import RunError, UserError
from fastadapt.features.autointerp.judges.endpoint import EndpointJudge, open_judge
from fastadapt.features.autointerp.judges.settings import JudgeConfig, secrets
from fastadapt.features.autointerp.judges.without_llm import TokenJudge
from fastadapt.features.autointerp.questions import (
    DescribeQuestion,
    DetectQuestion,
    Estimate,
    Example,
)
from fastadapt.features.store.store import Store
from fastadapt.reporting.formatting import number


def judge_at(url: str, folder: Path, **settings: Any) -> EndpointJudge:
    config = JudgeConfig(**{"model": "made-1", "base_url": url, "timeout": 5.0, **settings})
    return EndpointJudge(config, folder / "calls")


def questions(n: int) -> list[DetectQuestion]:
    return [DetectQuestion(f"w{i}", ((f"w{i}",), ("none",))) for i in range(n)]


RIGHT = (True, False)


def test_questions_are_answered_in_order_and_answers_are_stored(
    good: ChatServer, tmp_path: Path
) -> None:
    judge = judge_at(good.url, tmp_path)
    seen: list[tuple[int, int]] = []
    assert judge.ask(questions(30), progress=lambda *p: seen.append(p)) == [RIGHT] * 30
    assert seen == [(i, 30) for i in range(1, 31)]
    assert len(good.requests) == 30
    assert good.keys[0] == f"Bearer {KEY}"
    assert judge_at(good.url, tmp_path).ask(questions(30)) == [RIGHT] * 30
    assert len(good.requests) == 30


def test_requests_have_the_settings(good: ChatServer, tmp_path: Path) -> None:
    plain = good.requests
    judge_at(good.url, tmp_path, extra='{"reasoning_effort": "low"}').ask(questions(1))
    assert plain[0]["model"] == "made-1"
    assert plain[0]["temperature"] == 0.0
    assert plain[0]["max_tokens"] == 1024
    assert plain[0]["response_format"] == {"type": "json_object"}
    assert plain[0]["reasoning_effort"] == "low"
    judge_at(good.url, tmp_path, temperature=None, max_tokens=None, json_mode=False).ask(
        questions(1)
    )
    assert set(plain[1]) == {"model", "messages"}


def test_another_model_or_parameter_is_another_question(good: ChatServer, tmp_path: Path) -> None:
    for settings in ({}, {"model": "made-2"}, {"temperature": 1.0}, {"max_tokens": 7}, {}):
        judge_at(good.url, tmp_path, **settings).ask(questions(1))
    assert len(good.requests) == 4


@pytest.mark.parametrize("concurrency", [1, 3, 8])
def test_concurrency_is_limited(tmp_path: Path, concurrency: int) -> None:
    def slowly(body: dict[str, Any], number: int) -> str:
        time.sleep(0.025 * concurrency)  # long enough for all requests to arrive
        return answers_well(body, number)

    with serving(slowly) as server:
        judge_at(server.url, tmp_path, concurrency=concurrency).ask(questions(24))
    assert server.most_at_once == concurrency


@pytest.mark.parametrize("status", [429, 500, 503, 0])
def test_transient_errors_are_retried(tmp_path: Path, status: int) -> None:
    def at_first(body: dict[str, Any], number: int) -> Any:
        return Fault(status) if number <= 2 else answers_well(body)

    with serving(at_first) as server:
        assert judge_at(server.url, tmp_path, concurrency=1).ask(questions(2)) == [RIGHT] * 2
    assert len(server.requests) == 4


def test_timeouts_are_retried(tmp_path: Path) -> None:
    def at_first(body: dict[str, Any], number: int) -> Any:
        return Fault(200, stall=1.5) if number == 1 else answers_well(body)

    with serving(at_first) as server:
        assert judge_at(server.url, tmp_path, timeout=0.3).ask(questions(1)) == [RIGHT]
    with serving(lambda *_: Fault(200, stall=1.0)) as server:
        judge = judge_at(server.url, tmp_path, timeout=0.2, retries=1)
        with pytest.raises(RunError, match=r"127\.0\.0\.1.* no answer in 0\.2 s, after 2 attempts"):
            judge.ask([DetectQuestion("other", (("a",),))])
    assert len(server.requests) == 2


def test_errors_of_an_unreachable_judge_name_the_address(tmp_path: Path) -> None:
    with serving(answers_well) as server:
        url = server.url
    judge = judge_at(url.replace("//", "//user:secret@") + "?token=hidden", tmp_path, retries=0)
    with pytest.raises(RunError, match=r"made-1 at http://127\.0\.0\.1:\d+/v1 cannot be") as caught:
        judge.ask(questions(3))
    assert "secret" not in str(caught.value)
    assert "hidden" not in str(caught.value)
    assert not (tmp_path / "calls").exists()


def test_refused_requests_are_not_retried_and_errors_hide_the_key(tmp_path: Path) -> None:
    body = json.dumps({"error": {"message": f"Incorrect API key provided: {KEY}"}})
    expected_error = pytest.raises(RunError, match="HTTP 401, 'Incorrect API key provided: ")
    with serving(lambda *_: Fault(401, body)) as server, expected_error as caught:
        judge_at(server.url, tmp_path, concurrency=1).ask(questions(5))
    assert KEY not in str(caught.value)
    assert caught.value.__cause__ is None
    assert len(server.requests) <= 3


LONG = "x " * 142 + "{}"  # the message is truncated within the following text


@pytest.mark.parametrize("status", [401, 200])
def test_truncated_messages_show_no_part_of_the_key(tmp_path: Path, status: int) -> None:
    text = LONG.format(KEY)
    said: Any = text if status == 200 else Fault(401, json.dumps({"error": {"message": text}}))
    with serving(lambda *_: said) as server, pytest.raises(RunError, match="x x x") as caught:
        judge_at(server.url, tmp_path, concurrency=1).ask(questions(30))
    assert "***" in str(caught.value)
    assert KEY[:6] not in str(caught.value)


def test_errors_hide_the_password_of_the_address(tmp_path: Path) -> None:
    sent = base64.b64encode(b"someone:open@sesame").decode()
    forms = ["someone:open%40sesame", "someone:open@sesame", sent, "open@sesame", "t0ps3cret"]
    text = f"who is this: {' '.join(forms)}"
    with serving(lambda *_: Fault(403, json.dumps({"error": {"message": text}}))) as server:
        url = server.url.replace("//", "//someone:open%40sesame@") + "?token=t0ps3cret"
        with pytest.raises(RunError, match="HTTP 403, 'who is this: ") as caught:
            judge_at(url, tmp_path, concurrency=1).ask(questions(1))
    for form in (*forms, sent[:6], "sesame"):
        assert form not in str(caught.value)
    assert str(caught.value).count("***") == len(forms)


def test_a_user_name_without_a_password_is_a_secret() -> None:
    assert secrets("https://t0ken@host/v1") == {"t0ken", "t0ken:", "dDBrZW46"}
    assert secrets("https://host/v1") == set()


def test_answers_are_stored_by_endpoint(good: ChatServer, tmp_path: Path) -> None:
    judge_at(good.url, tmp_path).ask(questions(3))
    with serving(lambda body, _: answers_well(body)) as other:
        judge = judge_at(other.url, tmp_path)
        assert judge.cached_answer(questions(1)[0]) is None
        assert judge.ask(questions(3)) == [RIGHT] * 3
    assert len(good.requests) == len(other.requests) == 3
    # Secrets in the address are not part of the key.
    named = judge_at(good.url.replace("//", "//me:hidden@"), tmp_path)
    assert named.cached_answer(questions(1)[0]) == RIGHT
    assert not [p for p in tmp_path.rglob("*.json") if "hidden" in p.read_text()]


NONSENSE = [
    "I would rather not.",
    "",
    '{"1": "maybe", "2": false}',
    Fault(200, "<html>it works!</html>"),
    Fault(200, "{}"),
    Fault(200, '{"choices": [{"message": null}]}'),
    Fault(200, '{"choices": []}'),
]


@pytest.mark.parametrize("nonsense", NONSENSE)
def test_invalid_answers_are_retried_once_and_then_shown_in_an_error(
    tmp_path: Path, nonsense: Any
) -> None:
    expected_error = pytest.raises(RunError, match=r"made-1 at http://127.*One of them: ")
    with serving(lambda *_: nonsense) as server:
        with expected_error as caught:
            judge_at(server.url, tmp_path, concurrency=1, retries=0).ask(questions(30))
        if isinstance(nonsense, str) and nonsense:
            assert repr(nonsense) in str(caught.value)
        # At most a tenth of 30 answers may be invalid. The fourth raises, with some in flight.
        assert 8 <= len(server.requests) <= 14
        again = server.requests[1]["messages"]
        assert [m["role"] for m in again] == ["system", "user", "assistant", "user"]
        server.behaviour = answers_well  # the endpoint has recovered
        assert judge_at(server.url, tmp_path).ask(questions(30)) == [RIGHT] * 30


def test_a_few_answers_that_are_not_valid_are_counted(tmp_path: Path) -> None:
    def mostly(body: dict[str, Any], _: int) -> Any:
        bad = any('"w3"' in message["content"] for message in body["messages"])
        return "no" if bad else answers_well(body)

    with serving(mostly) as server:
        judge = judge_at(server.url, tmp_path)
        assert judge.ask(questions(20)) == [RIGHT] * 3 + [None] + [RIGHT] * 16
        assert len(server.requests) == 21
        assert judge.ask(questions(20))[3] is None  # invalid answers are stored too
        assert judge.estimate(questions(20)).calls == 0
        assert len(server.requests) == 21


def test_an_answer_of_the_retry_is_used(tmp_path: Path) -> None:
    def second(body: dict[str, Any], _: int) -> Any:
        return "hm" if len(body["messages"]) == 2 else answers_well(body)

    with serving(second) as server:
        assert judge_at(server.url, tmp_path).ask(questions(3)) == [RIGHT] * 3
        assert judge_at(server.url, tmp_path).cached_answer(questions(1)[0]) == RIGHT
    assert len(server.requests) == 6


@pytest.mark.parametrize(
    ("half", "answer"),
    [
        (r'{"description": "on \ud83d"}', None),  # escaped in the answer's JSON
        ('{"description": "on \ud83d"}', "on \ufffd"),  # escaped in the endpoint's JSON
        (Fault(200, r'{"choices": [], "id": "\ud83d"}'), None),
        (Fault(200, json.dumps("\ud83d")), None),
    ],
)
def test_half_an_emoji_is_an_invalid_answer_or_replaced(
    tmp_path: Path, half: Any, answer: str | None
) -> None:
    def mostly(body: dict[str, Any], _: int) -> Any:
        return half if " wait" in body["messages"][1]["content"] else answers_well(body)

    asked_questions: list[Any]
    asked_questions = [DescribeQuestion((Example(("so", " wait"), (False, True)),)), *questions(20)]
    with serving(mostly) as server:
        assert judge_at(server.url, tmp_path).ask(asked_questions) == [answer, *[RIGHT] * 20]
        calls = len(server.requests)
        assert judge_at(server.url, tmp_path).ask(asked_questions) == [answer, *[RIGHT] * 20]
        assert len(server.requests) == calls == 21 + (answer is None)  # all answers were stored


def test_a_stopped_run_is_resumed(tmp_path: Path) -> None:
    stop = threading.Event()

    def stops(body: dict[str, Any], number: int) -> str:
        if number == 10:
            stop.set()
        return answers_well(body)

    with serving(stops) as server:
        answers = judge_at(server.url, tmp_path, concurrency=2).ask(questions(40), stop=stop)
        assert 10 <= len([a for a in answers if a == RIGHT]) <= 12
        assert len(server.requests) == len([a for a in answers if a is not None])
        assert judge_at(server.url, tmp_path).ask(questions(40)) == [RIGHT] * 40
    assert len(server.requests) == 40


def test_a_truncated_file_of_answers_is_completed(good: ChatServer, tmp_path: Path) -> None:
    judge = judge_at(good.url, tmp_path)
    judge.ask(questions(2))
    path = next((tmp_path / "calls").rglob("*.json"))
    whole = path.read_bytes()
    path.write_bytes(whole[:20])
    assert judge.ask(questions(2)) == [RIGHT] * 2
    assert len(good.requests) == 3
    assert path.read_bytes() == whole


def test_the_estimate_counts_calls_tokens_and_money(good: ChatServer, tmp_path: Path) -> None:
    judge = judge_at(good.url, tmp_path, price_in=2.0, price_out=10.0, max_tokens=100)
    estimate = judge.estimate(questions(20))
    assert isinstance(estimate, Estimate)
    assert (estimate.calls, estimate.cached, estimate.tokens_out) == (20, 0, 2000)
    assert estimate.cost == pytest.approx((estimate.tokens_in * 2 + 2000 * 10) / 1e6)
    judge.ask(questions(20))
    letters = sum(len(m["content"]) for r in good.requests for m in r["messages"])
    assert letters / 4 <= estimate.tokens_in <= letters / 4 + 20 * 2 * 5
    assert judge.estimate(questions(21))[:2] == (1, 20)
    assert judge_at(good.url, tmp_path).estimate(questions(1)).cost is None
    by_words = EndpointJudge(judge.config, tmp_path / "none", count=lambda t: len(t.split()))
    assert by_words.estimate(questions(1)).counted == "by the given tokenizer"
    assert (
        f"about {number(estimate.cost)} in all; up to twice that if answers are not"
        in estimate.words
    )
    assert "twice" not in judge.estimate(questions(20)).words  # no request is made
    limitless = judge_at(good.url, tmp_path / "none", price_in=2.0, price_out=1.0, max_tokens=None)
    assert limitless.estimate(questions(1))[3:5] == (None, None)
    assert "any number of answers: no limit" in limitless.estimate(questions(1)).words


def test_impossible_settings_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for wrong in (
        {"concurrency": 0},
        {"timeout": 0.0},
        {"retries": -1},
        {"invalid_share": 1.0},
        {"max_tokens": 0},
        {"temperature": -1.0},
        {"price_in": -1.0},
        {"base_url": "ftp://x"},
        {"extra": '{"stream": true}'},
        {"extra": "[]"},
        {"extra": "low"},
    ):
        name = next(iter(wrong))
        with pytest.raises(UserError, match=rf"judge\.{name}"):
            JudgeConfig(**wrong)
    with pytest.raises(UserError, match=r"judge\.model: .* at judge\.base_url"):
        JudgeConfig(base_url="http://127.0.0.1:9/v1")
    monkeypatch.setenv("OPENAI_MODEL", "made-1")
    assert JudgeConfig(base_url="http://127.0.0.1:9/v1").model_name == "made-1"
    monkeypatch.delenv("OPENAI_API_KEY")
    with pytest.raises(UserError, match="OPENAI_API_KEY"):
        EndpointJudge(JudgeConfig(model="made-1"), tmp_path)


def test_the_environment_names_model_and_address(
    good: ChatServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = Store(tmp_path, {})
    assert isinstance(open_judge(JudgeConfig(), store), TokenJudge)
    monkeypatch.setenv("OPENAI_MODEL", "made-3")
    monkeypatch.setenv("OPENAI_BASE_URL", good.url)
    monkeypatch.delenv("OPENAI_API_KEY")  # a local endpoint may need no key
    judge = open_judge(JudgeConfig(), store)
    assert judge.ask(questions(1)) == [RIGHT]
    assert good.requests[0]["model"] == judge.name == "made-3"
    assert judge.about["endpoint"] == good.url
