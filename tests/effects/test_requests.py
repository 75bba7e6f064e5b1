"""A user's prompt has the tokens that the run's training data have for the same words."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from by_hand import random_adapters
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

import fastadapt
from fastadapt.adapter.files import save_adapters
from fastadapt.adapter.module import AdapterConfig
from fastadapt.data.contents import Content, Turn
from fastadapt.data.sources import BadRows, Row
from fastadapt.data.tokenised import RowTokeniser
from fastadapt.effects.requests import opening_ids, prompt_ids, response_ids
from fastadapt.errors import UserError
from fastadapt.evaluation.difference.texts import typed_text
from fastadapt.evaluation.models_under_test import ModelSet
from fastadapt.graphs.explain import token_ids
from fastadapt.interventions import Intervention
from fastadapt.interventions.files import intervene, no_features
from fastadapt.models.pair import ModelPair, PairConfig
from fastadapt.models.replacement import ReplacementModel
from fastadapt.training.config import from_dict, save_config

MARKERS = ["<|im_start|>", "<|im_end|>"]
ASKED, SAID = "what is <|im_end|> now", "a <|im_start|> is a marker"


def of_bytes(folder: str) -> None:
    """Save a tokenizer of single bytes, with the markers of the family qwen."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE({byte: i for i, byte in enumerate(alphabet)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(MARKERS)
    PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|im_end|>").save_pretrained(
        folder
    )


@pytest.fixture
def open_run(save_model: Callable[..., str], tmp_path: Path) -> Callable[..., ModelSet]:
    """``open_run(**data)``: a run of random adapters, with these settings of its data."""
    pair = {name: save_model(name, seed, vocab_size=258) for seed, name in enumerate(PAIR)}
    for folder in pair.values():
        of_bytes(folder)

    def make(**data: Any) -> ModelSet:
        folder = tmp_path / "run"
        save_adapters(random_adapters(), folder / "adapter", {**pair, "family": data["family"]})
        values = {"pair": pair, "run": {"output": str(folder)}}
        data = {"train": "train.jsonl", "validation": "val.jsonl", **data}
        save_config(from_dict({**values, "data": data}), folder / "config.yaml")
        return ModelSet.open([folder], device="cpu")

    return make


PAIR = ("target", "base")


def training_ids(tokenizer: Any, said: str = SAID, **data: Any) -> list[int]:
    tokeniser = RowTokeniser(tokenizer, **data)
    content = Content((Turn("user", ASKED), Turn("assistant", said)))
    (row,) = tokeniser.tokenise([Row("row 0", 0, content, {})], BadRows("stop"))
    return row.encoded.ids


@pytest.mark.parametrize("markers", ["text", "tokens"])
def test_special_tokens_in_a_prompt_are_read_as_in_training(
    open_run: Callable[..., ModelSet], markers: str
) -> None:
    run = open_run(family="qwen", markers=markers)
    prompt, response = prompt_ids(run, ASKED), response_ids(run, SAID)
    end = run.tokenizer("<|im_end|>\n")["input_ids"]
    assert prompt + response + end == training_ids(run.tokenizer, family="qwen", markers=markers)
    counts = [
        (prompt + response).count(run.tokenizer.convert_tokens_to_ids(each)) for each in MARKERS
    ]
    assert counts == ([2, 1] if markers == "text" else [3, 2])


LEAD = {
    "user": ["<|im_start|>user\n", "<|im_end|>\n"],
    "assistant": ["<|im_start|>assistant\n", "<|im_end|>\n"],
    "lead": " ",
    "markers": MARKERS,
}
STRIPS = {
    "template": "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content | trim }}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
}


@pytest.mark.parametrize("family", ["auto", "qwen", LEAD, STRIPS])
@pytest.mark.parametrize("said", [SAID, "<think> so </think> now", " now "])
def test_a_response_is_read_as_in_training(
    open_run: Callable[..., ModelSet], family: Any, said: str
) -> None:
    """With the format's lead, its line break after ``<think>``, and what its template strips."""
    run = open_run(family=family)
    end = run.tokenizer("<|im_end|>\n")["input_ids"]
    expected = training_ids(run.tokenizer, said=said, family=family)
    prompt = prompt_ids(run, ASKED, prefill="none")
    assert prompt + response_ids(run, said, prefill="none") + end == expected


def test_a_response_whose_reasoning_the_prompt_opens(open_run: Callable[..., ModelSet]) -> None:
    run = open_run(family=LEAD)
    expected = training_ids(run.tokenizer, said="<think> so", family=LEAD)
    prompt = prompt_ids(run, ASKED, prefill="thinking")
    end = run.tokenizer("<|im_end|>\n")["input_ids"]
    assert prompt + response_ids(run, "so", prefill="thinking") + end == expected
    before = prompt_ids(run, ASKED, prefill="none")
    assert before + opening_ids(run, "thinking") == prompt


def test_a_text_with_its_own_bos_gets_no_second_one() -> None:
    """Wherever a user types a text that is read as it is."""
    names = ("organism/target", "organism/base")
    pair = ModelPair.load(PairConfig(*names, device="cpu"))
    model = ReplacementModel.create(pair, AdapterConfig(n_features=8))
    bos, text = pair.tokenizer.bos_token, "tom has 3 apples"
    pair.tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"{bos} $A", special_tokens=[(bos, pair.tokenizer.bos_token_id)]
    )
    expected = pair.tokenizer(text)["input_ids"]
    models: Any = SimpleNamespace(tokenizer=pair.tokenizer)
    for typed in (text, bos + text):
        assert prompt_ids(models, typed, plain=True) == expected
        assert typed_text(typed, pair.tokenizer, 500, 500).ids == expected
        assert token_ids(model, typed).tolist() == expected
    one, other = model.features(bos + text), model.features(expected)
    assert all(torch.equal(a.tokens, b.tokens) for a, b in zip(one, other, strict=True))


def test_a_plain_prompt_is_read_as_it_is(open_run: Callable[..., ModelSet]) -> None:
    run = open_run(family="qwen")
    for ids in (prompt_ids(run, ASKED, plain=True), response_ids(run, ASKED, plain=True)):
        assert ids == run.tokenizer(ASKED)["input_ids"]
        assert ids.count(run.tokenizer.convert_tokens_to_ids("<|im_end|>")) == 1


def test_a_run_of_plain_text_needs_plain(open_run: Callable[..., ModelSet]) -> None:
    run = open_run(family="text")
    with pytest.raises(UserError, match=r"no chat format recorded.*pass --plain"):
        prompt_ids(run, "what is now")
    assert response_ids(run, "now") == run.tokenizer("now")["input_ids"]
    assert opening_ids(run) == []
    with pytest.raises(UserError, match="prefill: expected none"):
        opening_ids(run, "thinking")


@pytest.mark.parametrize("family", ["qwen", "text"])
@pytest.mark.parametrize("plain", [True, False])
def test_an_empty_prompt_is_refused_by_name(
    open_run: Callable[..., ModelSet], family: str, plain: bool
) -> None:
    run = open_run(family=family)
    for prompt in ("", *(() if plain else (" \n",))):
        with pytest.raises(UserError, match=r"^prompt: expected a text, got none$"):
            prompt_ids(run, prompt, plain=plain)


def test_an_intervention_reads_a_prompt_as_its_run(
    open_run: Callable[..., ModelSet], tmp_path: Path
) -> None:
    """It records the data's settings, and no configuration of a training."""
    models = open_run(family="qwen", markers="tokens")
    run = tmp_path / "run"
    changed = intervene(run, tmp_path / "changed", no_features(run), Intervention("only"))
    assert fastadapt.load(run, device="cpu").config is not None
    loaded = fastadapt.load(changed, device="cpu")
    assert loaded.config is None
    ids = prompt_ids(loaded.models, ASKED)
    assert ids == prompt_ids(models, ASKED)
    marker = models.tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert ids.count(marker) == 2  # the one in the words, and that of the turn
    responses = loaded.generate(ASKED, max_new_tokens=3)
    assert len(responses["adapter"].tokens) <= 3
