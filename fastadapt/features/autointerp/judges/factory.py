"""The judge that settings name."""

from __future__ import annotations

from collections.abc import Callable

from fastadapt.features.autointerp.judges.endpoint import EndpointJudge
from fastadapt.features.autointerp.judges.settings import JudgeConfig
from fastadapt.features.autointerp.judges.without_llm import TokenJudge
from fastadapt.features.autointerp.questions import Judge
from fastadapt.features.store.store import Store

CALLS = "calls"  # folder of a store


def open_judge(
    config: JudgeConfig, store: Store, *, count: Callable[[str], int] | None = None
) -> Judge:
    """A language model behind an endpoint where one is named, else the judge that needs none.

    Args:
        config: which one.
        store: keeps the answers.
        count: how many tokens a text has, for estimates; a quarter of its letters if not given.

    Raises:
        UserError: the endpoint needs a key that is not there, or ``openai`` is not installed.
    """
    if config.asked_for is None:
        return TokenJudge()
    return EndpointJudge(config, store.folder / CALLS, count=count)
