"""Key in the environment, which no file may contain, and a server with valid answers."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from chat_server import KEY, ChatServer, answers_well, serving


@pytest.fixture(autouse=True)
def _environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("OPENAI_BASE_URL", "OPENAI_MODEL", "OPENAI_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("OPENAI_API_KEY", KEY)


@pytest.fixture
def good() -> Iterator[ChatServer]:
    with serving(answers_well) as server:
        yield server
