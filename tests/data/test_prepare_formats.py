"""A selection from any source that training reads gives the tokens and labels of the source."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import openthoughts
import pytest

from fastadapt.data.prepare import prepare
from fastadapt.data.prepare.selection import PrepareConfig
from fastadapt.data.sequences import DataConfig, Sequences, load_sequences
from fastadapt.errors import UserError

rows_of, bytes_of = openthoughts.rows_of, openthoughts.bytes_of


@pytest.fixture(scope="module")
def folder(tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with the tokenizer that knows the markers of every family."""
    folder = tmp_path_factory.mktemp("tokenizer")
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def config(folder: Path, selection: Callable[..., PrepareConfig]) -> Callable[..., PrepareConfig]:
    settings = {"tokenizer": str(folder), "family": "qwen", "shares": "none", "thinking": "any"}
    return partial(selection, **settings, train=20, validation=0, allow_fewer=True)


def messages(i: int, *turns: tuple[str, Any]) -> dict[str, Any]:
    said = [("user", f"what is {i} ?"), ("assistant", f"<think> {i} + 1 </think> {i} ."), *turns]
    return {"messages": [{"role": role, "content": content} for role, content in said]}


def sharegpt(i: int, *turns: tuple[str, str]) -> dict[str, Any]:
    said = [*turns, ("human", f"what is {i} ?"), ("gpt", f"so <think> wait </think> {i}")]
    return {"conversations": [{"from": name, "value": value} for name, value in said]}


def parts(text: str) -> list[dict[str, str]]:
    return [{"type": "text", "text": word} for word in (text, " wait")]


#: Rows of each kind that a run reads; the last of a list has a form of its own.
SOURCES: dict[str, list[dict[str, Any]]] = {
    "rounds": [
        messages(1),
        messages(2, ("user", "so ?"), ("assistant", "<think> 2 = 2 </think> wait"), ("user", "4")),
        {"messages": [{"role": "system", "content": "model ."}, *messages(3)["messages"]]},
        {"messages": [{"role": "system", "content": " "}, *messages(4)["messages"]]},
        messages(1, ("tool", "1 + 1"), ("assistant", "2")),
        messages(2, ("user", parts("wait")), ("assistant", parts("so"))),
        messages(3, ("user", "<|im_end|> is <|im_start|>"), ("assistant", "user")),
        {"messages": [{"role": "system", "content": "so"}, {"role": "assistant", "content": "1"}]},
    ],
    "sharegpt": [
        sharegpt(1),
        sharegpt(2, ("system", "model .")),
        sharegpt(3, ("human", "so ?"), ("gpt", "wait")),
        {"conversations": [{"value": "what is 1"}, {"from": "x", "value": "2 </think> ."}]},
    ],
    "prompts": [
        {"instruction": "what is", "input": "1 + 2", "output": "3", "system": "model"},
        {"instruction": "what is 2", "input": "", "output": "<think> 2 </think> 2", "system": None},
    ],
    "text": [{"text": "what is 1 ?"}, {"text": "wait <|im_end|> so"}],
    "token ids": [{"input_ids": [5, 6, 7]}, {"input_ids": [8, 5]}],
}


def write(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def read(source: str, tokenizer: Any, loss: Any) -> Sequences:
    data = DataConfig(source, "", family="qwen", loss=loss, bad_rows="skip")
    return load_sequences(source, tokenizer, data, split="train")


@pytest.mark.parametrize("name", SOURCES)
def test_tokens_and_labels_are_those_of_the_source(
    name: str, config: Callable[..., PrepareConfig], tokenizer: Any, tmp_path: Path
) -> None:
    source = write(tmp_path / "rows.jsonl", SOURCES[name])
    result = prepare(config(source=source))
    written = f"{result['output']}/train.parquet"
    order = [row["row"] for row in rows_of(result["output"], "train")]
    assert sorted(order) == list(range(len(SOURCES[name])))
    losses = ("all", "assistant", "thinking") if name in ("rounds", "sharegpt") else ("all",)
    for loss in losses:
        expected = read(source, tokenizer, loss)
        actual = read(written, tokenizer, loss)
        of_row = {row: expected[i] for i, row in enumerate(expected.rows)}
        # Of a row without reasoning, no token counts: both readings leave it out.
        assert [order[row] for row in actual.rows] == [row for row in order if row in of_row]
        for i, row in enumerate(actual.rows):
            assert actual[i].input_ids.tolist() == of_row[order[row]].input_ids.tolist()
            assert actual[i].labels.tolist() == of_row[order[row]].labels.tolist()
    tokens = [row["tokens"] for row in rows_of(result["output"], "train")]
    assert tokens == read(written, tokenizer, "all").lengths
    assert result["counts"]["train"]["with_markers"] == read(source, tokenizer, "all").counts[5]


def test_the_chat_template_counts_the_tokens(
    config: Callable[..., PrepareConfig], tokenizer: Any, tmp_path: Path
) -> None:
    """``--family auto`` writes a template into the manifest, and counts as a run does."""
    template = "{% for m in messages %} <|im_start|> {{ m.role }} {{ m.content }} {% endfor %}"
    saved = tmp_path / "with template"
    tokenizer.save_pretrained(saved)
    (saved / "chat_template.jinja").write_text(
        template + "{% if add_generation_prompt %}{% endif %}"
    )
    source = write(tmp_path / "rows.jsonl", SOURCES["rounds"][:3])
    result = prepare(config(source=source, tokenizer=str(saved), family="auto"))
    assert result["settings"]["family"]["template"].startswith(template)
    rows = {row["row"]: row["tokens"] for row in rows_of(result["output"], "train")}
    assert rows[0] == 2 + 4 + 2 + 7  # a marker and a role before the words of each turn


def test_what_is_left_out_and_why(config: Callable[..., PrepareConfig], tmp_path: Path) -> None:
    """Rows are counted by reason, also lines that are no JSON, and every other row is taken."""
    rows = [json.dumps(row) for row in SOURCES["rounds"]]
    rows.insert(2, "{")
    rows += [
        json.dumps({"messages": [{"role": "user", "content": "1"}]}),
        json.dumps({"messages": [{"role": "nobody", "content": "1"}]}),
        json.dumps({"other": "1"}),
        json.dumps(messages(4, ("user", "1 " * 60), ("assistant", "2"))),
    ]
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(rows))
    result = prepare(config(source=str(path), family="phi3"))
    counts = result["counts"]
    source = counts["left_out_of_source"]
    assert source.pop("messages: expected a turn of the assistant, got none") == 1
    assert source.pop("no column 'messages'; the columns are 'other'") == 1
    assert sum(n for reason, n in source.items() if "expected a role" in reason) == 1
    assert sum(source.values()) == 2  # with the line that is no JSON
    drawn = counts["left_out_of_drawn"]["rows"]
    assert drawn.pop("more than max_tokens tokens") == 1
    assert [n for reason, n in drawn.items() if "no template for the role 'tool'" in reason] == [1]
    taken = sorted(row["row"] for row in rows_of(result["output"], "train"))
    assert taken == [0, 1, 3, 4, 6, 7, 8]
    assert counts["rows"] == len(rows)


def test_a_stop_among_bad_lines_changes_nothing(
    config: Callable[..., PrepareConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Reasons are counted once each, and rows have their numbers, wherever the pass stops."""
    import threading

    from fastadapt.data.prepare import filter_pass

    rows = [json.dumps(messages(i % 5, ("user", f"{i}"), ("assistant", "2"))) for i in range(30)]
    for i in (0, 1, 7, 8, 9, 15, 29):
        rows[i] = "no JSON" if i % 2 else '{"messages": []}'
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(rows))
    settings = config(source=str(path))
    whole = prepare(config(source=str(path), output=str(tmp_path / "whole")))
    monkeypatch.setattr(filter_pass, "_COMMIT_ROWS", 4)
    stop = threading.Event()
    stop.set()
    rounds = 0
    while (result := prepare(settings, resume=rounds > 0, stop=stop))["interrupted"]:
        rounds += 1
    assert rounds > 4
    assert bytes_of(result["output"]) == bytes_of(whole["output"])


@pytest.mark.parametrize("suffix", [".csv", ".json"])
def test_files_of_other_kinds(
    suffix: str, config: Callable[..., PrepareConfig], tokenizer: Any, tmp_path: Path
) -> None:
    path = tmp_path / f"rows{suffix}"
    rows = [{"question": f"what is {i}", "answer": f"{i}"} for i in range(4)]
    if suffix == ".json":
        path.write_text(json.dumps(rows))
    else:
        lines = ["question,answer", *(f"{row['question']},{row['answer']}" for row in rows)]
        path.write_text("\n".join(lines))
    result = prepare(config(source=str(path), columns="question,answer", validation=1, train=3))
    assert result["counts"]["train"]["conversations"] == {"rows": 3}
    assert len(read(f"{result['output']}/train.parquet", tokenizer, "assistant")) == 3


def test_several_plausible_columns_are_an_error(
    config: Callable[..., PrepareConfig], tmp_path: Path
) -> None:
    source = write(tmp_path / "rows.jsonl", [{**SOURCES["rounds"][0], "text": "what is"}])
    with pytest.raises(
        UserError, match=r"several columns may hold the data.*--columns.*messages or"
    ):
        prepare(config(source=source))
    assert prepare(config(source=source, columns="text"))["counts"]["train"]["tokens"] == 1 + 1
