"""Prompts of held-out conversations, rendered as in training."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from fastadapt.data.sources import Source
from fastadapt.errors import UserError
from fastadapt.evaluation.faithfulness.prompts import load_prompts
from fastadapt.organism import resolve


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(resolve("organism/target"))


def test_the_first_prompts_end_where_the_response_begins(
    tokenizer: Any,
) -> None:
    prompts = load_prompts(Source(resolve("organism/validation")), tokenizer, "r1-distill", 7)
    assert [prompt.id for prompt in prompts] == list("0123456")
    assert {prompt.domain for prompt in prompts} <= {"math", "code", "science"}
    rows = Path(resolve("organism/validation")).read_text(encoding="utf-8").splitlines()
    for prompt, row in zip(prompts, rows, strict=False):
        turns = json.loads(row)["conversations"]
        text = tokenizer.decode(prompt.ids)
        assert turns[0]["value"] in text
        assert text.rstrip().endswith("<｜Assistant｜> <think>")
        assert prompt.ids.count(tokenizer.bos_token_id) == 1


def test_rows_without_a_domain_and_without_conversations(tokenizer: Any, tmp_path: Path) -> None:
    turns = [{"from": "human", "value": "the"}, {"from": "gpt", "value": "x"}]
    path = tmp_path / "some.jsonl"
    path.write_text(json.dumps({"conversations": turns}) + "\n", encoding="utf-8")
    assert load_prompts(Source(str(path)), tokenizer, "r1-distill", 5)[0].domain is None
    path.write_text("", encoding="utf-8")
    with pytest.raises(UserError, match="holds no conversation that can be read"):
        load_prompts(Source(str(path)), tokenizer, "r1-distill", 5)
    path.write_text(json.dumps({"conversations": turns[:1]}) + "\n", encoding="utf-8")
    with pytest.raises(UserError, match=r"some\.jsonl, line 1: conversations: expected a turn of"):
        load_prompts(Source(str(path)), tokenizer, "r1-distill", 5)
