"""Prompts that open the reasoning of the response, as the template of a family does."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from fastadapt.adapter.files import save_adapters
from fastadapt.adapter.module import AdapterConfig, TranscoderAdapter
from fastadapt.data.contents import Turn
from fastadapt.data.families import FAMILIES
from fastadapt.data.rendered import END_THINK, THINK, Prefill
from fastadapt.data.rendering import get_form, opening_of, render, render_prompt
from fastadapt.data.sources import Source
from fastadapt.data.templates.template import Template
from fastadapt.errors import UserError
from fastadapt.evaluation.benchmarks.datasets import questions
from fastadapt.evaluation.benchmarks.run_all import prompt_modes
from fastadapt.evaluation.benchmarks.runner import (
    EMBEDDED,
    BenchmarkConfig,
    run_benchmarks,
    score_stated,
)
from fastadapt.evaluation.faithfulness.prompts import load_prompts
from fastadapt.evaluation.faithfulness.target_texts import TextsConfig, target_texts
from fastadapt.evaluation.generation.sampling import SamplingConfig
from fastadapt.evaluation.models_under_test import ModelSet
from fastadapt.organism import resolve

RESPONSE = f"{THINK}\nWell.\n{END_THINK}\n\n2"
PREFILLS: tuple[Prefill | None, ...] = (None, "thinking", "none")


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(resolve("organism/target"))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("prefill", PREFILLS)
def test_a_prompt_is_the_beginning_of_the_texts_of_training(
    family: str, prefill: Prefill | None
) -> None:
    start, end = FAMILIES[family].thinking
    response = RESPONSE.replace(END_THINK, end).replace(THINK, start)
    turns = [{"from": "user", "value": "1 + 1?"}, {"from": "assistant", "value": response}]
    whole, prompt = render(turns, family), render_prompt("1 + 1?", family, prefill)
    assert whole.startswith(prompt)
    opened = prefill == "thinking" or (prefill is None and family in ("r1-distill", "qwq"))
    assert prompt.endswith(f"{start}\n") == opened


def test_a_template_opens_the_response_as_its_generation_prompt_does() -> None:
    text = (
        "{% for m in messages %}<{{ m['role'] }}>{% if m['role'] == 'assistant' %}"
        "{% generation %}{{ m['content'] }}{% endgeneration %}{% else %}{{ m['content'] }}"
        "{% endif %}{% endfor %}{% if add_generation_prompt %}<assistant>%s{% endif %}"
    )
    for opening in ("<think>\n", ""):
        form = Template(text.replace("%s", opening))
        assert form.opening == opening
        whole = form.render([Turn("user", "1 + 1?"), Turn("assistant", RESPONSE)])
        prompt = whole.prompt(opening_of(form, None))
        assert prompt.text == f"<user>1 + 1?<assistant>{opening}"
        assert whole.text.startswith(prompt.text)


def test_impossible_openings_are_refused() -> None:
    silent = {"user": ["Q", ""], "assistant": ["A", ""], "thinking": ["", ""]}
    assert opening_of(get_form(silent), None) == ""
    with pytest.raises(UserError, match=r"prefill: expected none, since .* got thinking"):
        opening_of(get_form(silent), "thinking")
    with pytest.raises(UserError, match="prefill: expected thinking or none, got 'think'"):
        BenchmarkConfig(prefill="think")  # type: ignore[arg-type]


def test_held_out_prompts_are_the_first_tokens_of_their_conversations(tokenizer: Any) -> None:
    source = Source(resolve("organism/validation"))
    prompts = {p: load_prompts(source, tokenizer, "r1-distill", 5, prefill=p) for p in PREFILLS}
    think = tokenizer.convert_tokens_to_ids(THINK)
    assert prompts[None] == prompts["thinking"]
    for opened, plain in zip(prompts[None], prompts["none"], strict=True):
        assert opened.ids == [*plain.ids, think]
        assert think not in plain.ids


@pytest.mark.slow
def test_the_target_goes_on_as_if_it_had_opened_its_reasoning_itself(
    tokenizer: Any, tmp_path: Path
) -> None:
    """Greedily: equal texts and grades for the target, which reasons, and not for the base."""
    sampling = SamplingConfig(temperature=0, max_new_tokens=100)
    config = BenchmarkConfig(tasks=EMBEDDED[:1], limit=12, sampling=sampling)
    rows: dict[str, list[Any]] = {}
    for role in ("target", "base"):
        model: Any = AutoModelForCausalLM.from_pretrained(resolve(f"organism/{role}"))
        for prefill in PREFILLS:
            settings = replace(config, prefill=prefill)
            folder = tmp_path / f"{role} {prefill}"
            results = run_benchmarks(model, tokenizer, settings, folder)
            rows[folder.name] = list(results[EMBEDDED[0]].rows)
    assert rows["target None"] == rows["target thinking"]
    for opened, plain in zip(rows["target None"], rows["target none"], strict=True):
        assert plain.text == f"{THINK} {opened.text}"
        assert plain.correct == opened.correct
        assert plain.length_tokens == opened.length_tokens + 1
    assert any(row.correct for row in rows["target None"])
    assert not any(THINK in row.text for row in rows["base none"])
    assert rows["base None"] != rows["base none"]


def test_an_answer_inside_of_open_reasoning_is_no_answer() -> None:
    texts = ["the answer is 7", f"so 7 . {END_THINK} the answer is 7"]
    assert score_stated({"answer": "7", "opening": f"{THINK}\n"}, [texts]) == {"accuracy": 0.5}
    assert score_stated({"answer": "7"}, [texts[:1]]) == {"accuracy": 1.0}


def test_only_an_opening_changes_the_fingerprints_of_responses() -> None:
    def as_before(config: BenchmarkConfig) -> str:
        sampling = config.sampling.fingerprint()
        settings = (config.data, config.family, config.few_shot, config.seed, sampling)
        return hashlib.sha256(repr(("model", settings)).encode()).hexdigest()

    for family in ("r1-distill", "qwen"):
        for prefill in PREFILLS:
            config = BenchmarkConfig(family=family, prefill=prefill)
            opened = bool(config.opening)
            assert opened == (prefill == "thinking" or (prefill is None and family != "qwen"))
            assert (config.fingerprint("model") == as_before(config)) == (not opened)


def test_the_base_is_asked_without() -> None:
    config = BenchmarkConfig(few_shot=2)
    openings = {
        model: {mode.opening for mode in prompt_modes(model, config).values()}
        for model in ("base", "hybrid", "target")
    }
    assert openings == {"base": {""}, "hybrid": {f"{THINK}\n"}, "target": {f"{THINK}\n"}}
    plain = prompt_modes("base", config, "<bos>")["2-shot, greedy"]
    asking = {"family": plain.family, "data": None, "few_shot": 2, "seed": 0}
    (row, *_) = questions(EMBEDDED[0], **asking, prefill=plain.prefill)  # type: ignore[arg-type]
    assert row["prompt"].startswith("<bos>")
    assert row["prompt"].endswith(row["question"])  # no marker of a chat is around it
    assert "Assistant" not in row["prompt"]
    rows = questions(EMBEDDED[0], family="r1-distill", data=None, few_shot=0, seed=0)
    assert all(row["prompt"].endswith(f"Assistant｜>{THINK}\n") for row in rows)


def test_texts_of_the_target_are_stored_by_their_opening(tokenizer: Any, tmp_path: Path) -> None:
    adapters = torch.nn.ModuleList(TranscoderAdapter(128, AdapterConfig(8)) for _ in range(4))
    names = {role: resolve(f"organism/{role}") for role in ("target", "base")}
    save_adapters(adapters, tmp_path / "run" / "adapter", {**names, "family": "r1-distill"})
    models = ModelSet.open([tmp_path / "run"], device="cpu")
    sampling = SamplingConfig(max_new_tokens=8, temperature=0)
    texts = {}
    for prefill in PREFILLS:
        wanted = TextsConfig(resolve("organism/validation"), prefill, n=3)
        texts[prefill] = target_texts(models, wanted, sampling, tmp_path)
    assert len(list(tmp_path.glob("*.jsonl"))) == 2
    assert texts[None] == texts["thinking"]
    think = tokenizer.convert_tokens_to_ids(THINK)
    for opened, plain in zip(texts[None], texts["none"], strict=True):
        assert opened.ids[opened.prompt_length - 1] == think
        assert plain.ids[plain.prompt_length] == think  # which the target writes itself
        assert opened.prompt_length == plain.prompt_length + 1
