"""Descriptions by an endpoint, from the store to the tables: resumption and errors."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from chat_server import KEY, ChatServer, answers_well, serving
from planted import PlantedActivations, planted

from fastadapt.errors import RunError, UserError
from fastadapt.features.autointerp.describe import describe
from fastadapt.features.autointerp.judges.endpoint import open_judge
from fastadapt.features.autointerp.judges.settings import DescribeConfig, JudgeConfig
from fastadapt.features.autointerp.questions import Estimate
from fastadapt.features.store.store import Store


def files(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


CONFIG = DescribeConfig(units=6, samples=("top",))


@pytest.mark.slow
def test_planted_features_by_an_endpoint_and_no_key_on_disk(
    good: ChatServer, tmp_path: Path
) -> None:
    data = planted(tmp_path / "f", features=6)
    estimates: list[Estimate] = []

    def approve(estimate: Estimate) -> bool:
        estimates.append(estimate)
        assert not good.requests
        return True

    def run() -> Any:
        judge = open_judge(JudgeConfig(model="made-1", base_url=good.url), data.store)
        return describe(data.store, judge, CONFIG, PlantedActivations(data), approve=approve)

    result = run()
    accuracy = [
        layer["accuracy"]["mean"] for layer in result["detection"]["adapter"]["top"]["layers"]
    ]
    assert accuracy[0] >= 0.95  # the server searches for the marked words
    assert abs(accuracy[2] - 0.5) <= 0.2
    assert estimates[0].calls == len(good.requests) == 2 * 18
    before = files(data.store.folder)
    assert run() == result  # needs no approval, since no request is made
    assert len(estimates) == 1
    assert len(good.requests) == 36
    assert files(data.store.folder) == before
    assert not [name for name, data in before.items() if KEY.encode() in data]
    assert result["judge"] == {"model": "made-1", "endpoint": good.url, "prompts": 1}


def test_without_approval_no_request_is_made(good: ChatServer, tmp_path: Path) -> None:
    data = planted(tmp_path / "f", features=3, texts=60)
    judge = open_judge(JudgeConfig(model="made-1", base_url=good.url), data.store)
    activations = PlantedActivations(data)
    assert describe(data.store, judge, CONFIG, activations, approve=lambda _: False) is None
    assert not good.requests
    assert not data.store.has("descriptions")


def test_invalid_answers_leave_no_partial_files(tmp_path: Path) -> None:
    data = planted(tmp_path / "f", features=3, texts=60)
    before = set(files(data.store.folder))

    def no_detection(body: dict[str, Any], _: int) -> str:
        return "?" if "Description:" in body["messages"][1]["content"] else answers_well(body)

    with serving(no_detection) as server:
        judge = open_judge(JudgeConfig(model="made-1", base_url=server.url), data.store)
        with pytest.raises(RunError, match="not valid"):
            describe(data.store, judge, CONFIG, PlantedActivations(data))
    new = set(files(data.store.folder)) - before
    assert {name.split("/")[0] for name in new} == {"calls", ".lock"}


def test_an_unusable_file_is_refused_before_any_request(good: ChatServer, tmp_path: Path) -> None:
    data = planted(tmp_path / "f", features=3, texts=60)
    (data.store.folder / "judgements.json").write_text("{")
    judge = open_judge(JudgeConfig(model="made-1", base_url=good.url), data.store)
    with pytest.raises(UserError, match=r"judgements\.json is not valid JSON"):
        describe(data.store, judge, CONFIG, PlantedActivations(data))
    assert not good.requests


KILLED = """
import sys
from pathlib import Path
from planted import PlantedActivations, planted
from fastadapt.features.autointerp.describe import describe
from fastadapt.features.autointerp.judges.endpoint import open_judge
from fastadapt.features.autointerp.judges.settings import DescribeConfig, JudgeConfig

data = planted(Path(sys.argv[1]), features=6)
judge = open_judge(JudgeConfig(model="made-1", base_url=sys.argv[2], concurrency=2), data.store)
describe(data.store, judge, DescribeConfig(units=6, samples=("top",)), PlantedActivations(data))
"""


@pytest.mark.slow
def test_killed_and_resumed_equals_uninterrupted(tmp_path: Path) -> None:
    enough = threading.Event()

    def slowly(body: dict[str, Any], number: int) -> str:
        if number >= 8:
            enough.set()
        if not resumed:
            time.sleep(0.05)
        return answers_well(body)

    resumed = False
    with serving(slowly) as server:
        here = [str(Path(__file__).parents[1]), *sys.path]
        child = subprocess.Popen(
            [
                sys.executable,
                "-c",
                f"import sys; sys.path[:0] = {here!r}\n{KILLED}",
                str(tmp_path / "killed"),
                server.url,
            ],
        )
        assert enough.wait(120)
        child.kill()
        child.wait()
        n_asked = len(server.requests)
        killed = Store.open(tmp_path / "killed")
        assert not killed.has("descriptions")
        n_cached = len(list((killed.folder / "calls").rglob("*.json")))
        assert 0 < n_cached <= n_asked < 36
        resumed = True
        data = planted(tmp_path / "whole", features=6)
        for store in (killed, data.store):
            judge = open_judge(JudgeConfig(model="made-1", base_url=server.url), store)
            describe(store, judge, CONFIG, PlantedActivations(data))
        assert len(server.requests) == n_asked + (36 - n_cached) + 36
    assert files(killed.folder) == files(data.store.folder)
