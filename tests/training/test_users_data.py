"""Runs on a mixture of formats: the chat format travels with the run, and resuming is exact."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from threading import Event
from typing import Any

import pytest
import yaml
from pyarrow.parquet import ParquetFile
from same_run import assert_same_run, into, stop_after

from fastadapt.data.mixtures import load_training
from fastadapt.errors import UserError
from fastadapt.evaluation.faithfulness.prompts import held_out, load_prompts
from fastadapt.evaluation.faithfulness.target_texts import TextsConfig, target_texts
from fastadapt.evaluation.generation.sampling import SamplingConfig
from fastadapt.evaluation.models_under_test import ModelSet
from fastadapt.features.collect.collector import open_run
from fastadapt.features.collect.config import CollectConfig, Shard
from fastadapt.features.collect.texts import prepare, read_group
from fastadapt.models.pretrained import load_tokenizer
from fastadapt.training.config import TrainConfig
from fastadapt.training.run_dir import read_records
from fastadapt.training.trainer import train

WORDS = [f"w{i}" for i in range(56)]
TEMPLATE = (
    "{% for m in messages %}<｜User｜> {{ m.role }} {{ m.content }}{% if m.role == 'assistant' %}"
    "<eos>{% endif %}{% endfor %}{% if add_generation_prompt %}<｜User｜> assistant {% endif %}"
)


@pytest.fixture
def mixed(tiny_config: Callable[..., TrainConfig], tiny_pair: Path, tmp_path: Path) -> Any:
    """``mixed(**changes)``: a run on chats and texts, on a pair with a template of its own."""
    for name in ("target", "base"):
        shutil.copytree(tiny_pair / name, tmp_path / name)
        (tmp_path / name / "chat_template.jinja").write_text(TEMPLATE)
    draw = random.Random(1)

    def words(n: int) -> str:
        return " ".join(draw.choices(WORDS, k=n))

    chats = [
        [
            {"role": "user", "content": words(4)},
            {"role": "assistant", "content": words(draw.randint(2, 9))},
            {"role": "user", "content": words(2)},
            {"role": "assistant", "content": words(5)},
        ]
        for _ in range(30)
    ]
    chats[3] = chats[3][:1]  # a bad row
    rows = [{"messages": chat} for chat in chats]
    (tmp_path / "chat.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    texts = [{"text": words(draw.randint(3, 30))} for _ in range(30)]
    (tmp_path / "text.json").write_text(json.dumps(texts))

    def make(**changes: Any) -> TrainConfig:
        chat, text = f"{tmp_path}/chat.jsonl", f"{tmp_path}/text.json"
        values = {
            "pair.target": str(tmp_path / "target"),
            "pair.base": str(tmp_path / "base"),
            "data.train": [{"source": chat, "weight": 3}, {"source": text}],
            "data.validation": f"{tmp_path}/chat.jsonl",
            "data.loss": "assistant",
            "data.bad_rows": "skip",
            "optimizer.max_steps": 10,
        }
        return tiny_config(**{**values, **changes})

    return make


@pytest.mark.slow
def test_a_mixture_resumes_with_the_same_bits(mixed: Any, tmp_path: Path) -> None:
    """The template changes in between: a resumed run keeps the form it was started with."""
    whole = into(mixed(), tmp_path / "whole")
    summary = train(whole)
    shares = {Path(each["source"]).name: each["share"] for each in summary["sources"]}
    assert shares == pytest.approx({"chat.jsonl": 0.75, "text.json": 0.25}, abs=0.05)
    again, stop = into(mixed(), tmp_path / "again"), Event()
    train(again, stop=stop, sinks=[stop_after(stop, 3)])
    (tmp_path / "target" / "chat_template.jinja").write_text(TEMPLATE.replace("<eos>", ""))
    train(again, resume=True)
    assert_same_run(tmp_path / "again", tmp_path / "whole")
    start = read_records(tmp_path / "whole" / "metrics.jsonl")[0]
    chat, text = start["sources"]
    assert (chat["read"], chat["sequences"], chat["bad"], text["bad"]) == (30, 29, 1, 0)
    assert start["bad_rows"] == 1
    assert chat["examples"][0].endswith(
        "line 4: messages: expected a turn of the assistant, got none"
    )
    other = mixed(
        **{
            "data.train": [
                {"source": f"{tmp_path}/chat.jsonl"},
                {"source": f"{tmp_path}/text.json"},
            ]
        }
    )
    with pytest.raises(UserError, match=r"--resume: .*data\.train: .*'weight': 1\.0"):
        train(into(other, tmp_path / "again"), resume=True)


def test_the_form_of_chat_travels_with_the_run(mixed: Any, tmp_path: Path) -> None:
    train(mixed(**{"optimizer.max_steps": 1, "run.eval_every": 0}))
    spec = {"template": TEMPLATE, "tokens": {}}
    run = tmp_path / "run"
    assert yaml.safe_load((run / "config.yaml").read_text())["data"]["family"] == spec
    assert ModelSet.open([run]).family == spec
    recorded = held_out(run)
    assert recorded is not None
    assert (recorded.family, recorded.bad_rows) == (spec, "skip")
    tokenizer = load_tokenizer(str(tmp_path / "target"), None, False)
    prompts = load_prompts(recorded.read_as(), tokenizer, recorded.family, 5, bad_rows="skip")
    assert [prompt.id for prompt in prompts] == ["0", "1", "2", "4", "5"]
    # The turns of the user, the assistant, the user, and the beginning of the assistant's next.
    tokens = tokenizer.convert_ids_to_tokens(prompts[0].ids)
    assert (tokens.count("<｜User｜>"), tokens.count("<eos>")) == (4, 1)


@pytest.mark.parametrize("markers", ["text", "tokens"])
def test_special_tokens_are_read_as_in_training(
    markers: str, tiny_config: Callable[..., TrainConfig], tiny_pair: Path, tmp_path: Path
) -> None:
    """Trained, collected and evaluated tokens are the same, whatever ``data.markers`` is."""
    row = {"prompt": "w0 <eos> w2", "response": "w3 w4"}
    (tmp_path / "rows.jsonl").write_text(json.dumps(row) + "\n")
    source = str(tmp_path / "rows.jsonl")
    changes = {"data.train": source, "data.validation": source, "data.markers": markers}
    config = tiny_config(**changes, **{"optimizer.max_steps": 1, "run.eval_every": 0})
    train(config)
    run = Path(config.run.output)
    tokenizer = load_tokenizer(str(tiny_pair / "target"), None, False)
    (sample,) = load_training(config.data, tokenizer, None)
    trained = sample.input_ids.tolist()
    assert (tokenizer.eos_token_id in trained[:-1]) == (markers == "tokens")

    defaults: dict[str, Any] = {
        "dtype": None,
        "device": None,
        "attention": None,
        "trust_remote_code": False,
    }
    opened = open_run(str(run), CollectConfig(), **defaults)
    prepare(opened.source, tokenizer, Shard(), tmp_path / "texts.parquet", max_tokens=99)
    (text,) = read_group(tmp_path / "texts.parquet", ParquetFile(tmp_path / "texts.parquet"), 0)
    assert text.tokens.tolist() == trained
    data = opened.facts(Shard())["data"]
    assert data.get("markers", "text") == markers
    plain = replace(opened.source, markers="text").fingerprint()
    assert (data["fingerprint"] == plain) == (markers == "text")

    models = ModelSet.open([run])
    for prompts in (None, source):
        texts = TextsConfig(n=1, prompts=prompts, prefill="none")
        folder = tmp_path / "texts"
        (read,) = target_texts(models, texts, SamplingConfig(max_new_tokens=1), folder)
        n = read.prompt_length
        assert read.ids[:n] == trained[:n]


def test_a_run_of_an_older_version_resumes(
    tiny_config: Callable[..., TrainConfig], tmp_path: Path
) -> None:
    """Such runs record a family and ``train_on_prompt``; their user's file names neither."""
    whole = into(tiny_config(), tmp_path / "whole")
    train(whole)
    old, stop = into(tiny_config(), tmp_path / "old"), Event()
    train(old, stop=stop, sinks=[stop_after(stop, 3)])
    path = tmp_path / "old" / "config.yaml"
    values = yaml.safe_load(path.read_text())
    for name in ("loss", "bad_rows", "markers", "columns", "subset"):
        del values["data"][name]
    values["data"]["train_on_prompt"] = True
    assert values["data"]["family"] == "r1-distill"
    path.write_text(yaml.safe_dump(values))
    train(old, resume=True)
    assert_same_run(tmp_path / "old", tmp_path / "whole")


def test_a_run_that_read_no_system_column_resumes(
    tiny_config: Callable[..., TrainConfig], tiny_pair: Path, tmp_path: Path
) -> None:
    """Earlier versions left such a column out and recorded no column of turns."""
    rows = map(json.loads, (tiny_pair / "train.jsonl").read_text().splitlines())
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"system": "w1 w2", **row}) + "\n" for row in rows))
    settings = {"data.train": str(path), "optimizer.max_steps": 4}
    before = tiny_config(**settings, **{"data.columns": "conversations"})
    whole, old, stop = into(before, tmp_path / "whole"), into(before, tmp_path / "old"), Event()
    train(whole)
    train(old, stop=stop, sinks=[stop_after(stop, 3)])
    for name in ("whole", "old"):
        recorded = tmp_path / name / "config.yaml"
        values = yaml.safe_load(recorded.read_text())
        values["data"]["columns"] = None
        recorded.write_text(yaml.safe_dump(values))
    now = into(tiny_config(**settings), tmp_path / "old")
    with pytest.raises(UserError, match=r"read no system column needs --data\.columns with the"):
        train(now, resume=True)
    train(old, resume=True)
    assert_same_run(tmp_path / "old", tmp_path / "whole")


def test_sources_are_looked_at_before_weights(
    tiny_config: Callable[..., TrainConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def load(*_: Any) -> None:
        pytest.fail("weights were read")

    monkeypatch.setattr("fastadapt.training.trainer.load_model_and_data", load)
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"prompt": "w1", "answer": "w2", "text": "w3"}) + "\n")
    several = r"rows\.jsonl: several columns may hold the data"
    with pytest.raises(UserError, match=several):
        train(tiny_config(**{"data.train": str(path)}))
    with pytest.raises(UserError, match=several):
        train(tiny_config(**{"data.train": [{"source": str(path)}]}))
    with pytest.raises(UserError, match=r"absent\.jsonl': no such file or folder"):
        train(tiny_config(**{"data.validation": str(tmp_path / "absent.jsonl")}))
