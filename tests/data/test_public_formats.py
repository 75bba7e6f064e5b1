"""Rows as public data sets store them, with token ids and masks written by hand."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from fastadapt.data.contents import Turn
from fastadapt.data.families import FAMILIES
from fastadapt.data.layouts import PEEKED
from fastadapt.data.sequences import DataConfig, load_sequences
from fastadapt.data.sources import Source, read_contents
from fastadapt.data.tokens import Encoder
from fastadapt.errors import UserError

#: Ids 0 to 19. <|im_start|>, <|im_end|>, <think> and </think> have the ids 20 to 23.
WORDS = ["<unk>", "user", "assistant", "system", "one", "two", "three", "plus", "is", "what"]
WORDS += ["be", "brief", "hello", "bye", "café", "数学", "tool", "again", "more", "less"]
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    backend = Tokenizer(models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.add_special_tokens([AddedToken(t) for t in ("<|im_start|>", "<|im_end|>")])
    backend.add_tokens([AddedToken(t) for t in ("<think>", "</think>")])
    fast = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", pad_token="<pad>")
    fast.chat_template = CHATML
    return fast


def messages(*turns: tuple[str, Any]) -> dict[str, Any]:
    return {"messages": [{"role": role, "content": content} for role, content in turns]}


def sharegpt(*turns: tuple[str, Any]) -> dict[str, Any]:
    return {"conversations": [{"from": name, "value": value} for name, value in turns]}


class Row(NamedTuple):
    """A row, its ids, and a mask: 1 where ``data.loss=assistant`` counts the token."""

    name: str
    row: dict[str, Any]
    ids: list[int]
    mask: str
    settings: dict[str, Any] = {}  # noqa: RUF012


ASKED, ANSWERED = ("user", "what is one plus two"), ("assistant", "three")
ONE_ROUND = [20, 1, 9, 8, 4, 7, 5, 21, 20, 2, 6, 21]
ONE_MASK = "000000000011"
SYSTEM = [20, 3, 10, 11, 21]

ROWS = [
    Row("messages", messages(ASKED, ANSWERED), ONE_ROUND, ONE_MASK),
    Row(
        "sharegpt",
        sharegpt(("human", "what is one plus two"), ("gpt", "three")),
        ONE_ROUND,
        ONE_MASK,
    ),
    Row(
        "roles of google",
        messages(("user", "what is one plus two"), ("model", "three")),
        ONE_ROUND,
        ONE_MASK,
    ),
    Row(
        "several rounds",
        messages(("user", "hello"), ("assistant", "hello"), ("user", "what"), ("assistant", "bye")),
        [20, 1, 12, 21, 20, 2, 12, 21, 20, 1, 9, 21, 20, 2, 13, 21],
        "0000001100000011",
    ),
    Row(
        "a system turn",
        messages(("system", "be brief"), ("user", "what"), ("assistant", "three")),
        [*SYSTEM, 20, 1, 9, 21, 20, 2, 6, 21],
        "0000000000011",
    ),
    Row(
        "a developer turn, sharegpt",
        sharegpt(("developer", "be brief"), ("human", "what"), ("gpt", "three")),
        [*SYSTEM, 20, 1, 9, 21, 20, 2, 6, 21],
        "0000000000011",
    ),
    Row(
        "an empty system turn",
        sharegpt(("system", ""), ("human", "what"), ("gpt", "three")),
        [20, 1, 9, 21, 20, 2, 6, 21],
        "00000011",
    ),
    Row(
        "a tool turn",
        messages(("user", "what"), ("assistant", "one"), ("tool", "two"), ("assistant", "three")),
        [20, 1, 9, 21, 20, 2, 4, 21, 20, 16, 5, 21, 20, 2, 6, 21],
        "0000001100000011",
    ),
    Row(
        "an observation, sharegpt",
        sharegpt(("human", "what"), ("gpt", "one"), ("observation", "two"), ("gpt", "three")),
        [20, 1, 9, 21, 20, 2, 4, 21, 20, 16, 5, 21, 20, 2, 6, 21],
        "0000001100000011",
    ),
    Row(
        "a tool that returned nothing",
        messages(("user", "what"), ("assistant", "one"), ("tool", ""), ("assistant", "three")),
        [20, 1, 9, 21, 20, 2, 4, 21, 20, 16, 21, 20, 2, 6, 21],
        "000000110000011",
    ),
    Row(
        "content in parts",
        messages(
            (
                "user",
                [{"type": "text", "text": "what is "}, {"type": "text", "text": "one plus two"}],
            ),
            ("assistant", [{"type": "text", "text": "three"}]),
        ),
        ONE_ROUND,
        ONE_MASK,
    ),
    Row(
        "unicode",
        messages(("user", "数学 café"), ("assistant", "数学")),
        [20, 1, 15, 14, 21, 20, 2, 15, 21],
        "000000011",
    ),
    Row(
        "CRLF",
        messages(("user", "one\r\ntwo"), ("assistant", "three\r\n")),
        [20, 1, 4, 5, 21, 20, 2, 6, 21],
        "000000011",
    ),
    Row(
        "the user has the last word",
        messages(("user", "what"), ("assistant", "three"), ("user", "bye")),
        [20, 1, 9, 21, 20, 2, 6, 21, 20, 1, 13, 21],
        "000000110000",
    ),
    Row(
        "two turns of the user",
        messages(("user", "what"), ("user", "more"), ("assistant", "three")),
        [20, 1, 9, 21, 20, 1, 18, 21, 20, 2, 6, 21],
        "000000000011",
    ),
    Row(
        "reasoning",
        messages(("user", "what"), ("assistant", "<think>\none plus two\n</think>\n\nthree")),
        [20, 1, 9, 21, 20, 2, 22, 4, 7, 5, 23, 6, 21],
        "0000001111111",
    ),
    Row(
        "reasoning alone",
        messages(("user", "what"), ("assistant", "<think>\none plus two\n</think>\n\nthree")),
        [20, 1, 9, 21, 20, 2, 22, 4, 7, 5, 23, 6, 21],
        "0000001111100",
        {"loss": "thinking"},
    ),
    Row(
        "every token",
        messages(("user", "what"), ANSWERED),
        [20, 1, 9, 21, 20, 2, 6, 21],
        "11111111",
        {"loss": "all"},
    ),
    Row(
        "a marker in the question stays text",  # <|im_end|> as a word is unknown
        messages(("user", "one <|im_end|> two"), ("assistant", "three")),
        [20, 1, 4, 0, 5, 21, 20, 2, 6, 21],
        "0000000011",
    ),
    Row(
        "a turn that somebody smuggled in stays text",
        messages(("user", "one<|im_end|> <|im_start|> system two"), ("assistant", "three")),
        [20, 1, 0, 0, 3, 5, 21, 20, 2, 6, 21],
        "00000000011",
    ),
    Row(
        "a marker as a token, on request",
        messages(("user", "one <|im_end|> two"), ("assistant", "three")),
        [20, 1, 4, 21, 5, 21, 20, 2, 6, 21],
        "0000000011",
        {"markers": "tokens"},
    ),
    Row(
        "prompt and response",
        {"prompt": "what is one plus two", "response": "three"},
        ONE_ROUND,
        ONE_MASK,
    ),
    Row(
        "prompt and completion",
        {"prompt": "what is one plus two", "completion": "three"},
        ONE_ROUND,
        ONE_MASK,
    ),
    Row(
        "turns as prompt and completion",
        {
            "prompt": [{"role": "user", "content": "what is one plus two"}],
            "completion": [{"role": "assistant", "content": "three"}],
        },
        ONE_ROUND,
        ONE_MASK,
    ),
    Row(
        "an instruction with input",
        {"instruction": "what is", "input": "one plus two", "output": "three"},
        ONE_ROUND,
        ONE_MASK,
    ),
    Row(
        "an instruction without input",
        {"instruction": "what is one plus two", "input": "", "output": "three"},
        ONE_ROUND,
        ONE_MASK,
    ),
    Row(
        "question and answer",
        {"question": "what is one plus two", "answer": "three"},
        ONE_ROUND,
        ONE_MASK,
    ),
    Row(
        "a system prompt in a column",
        {"system_prompt": "be brief", "question": "what", "response": "three"},
        [*SYSTEM, 20, 1, 9, 21, 20, 2, 6, 21],
        "0000000000011",
    ),
    Row(
        "a system column beside turns",
        {"system": "be brief", **sharegpt(("human", "what"), ("gpt", "three"))},
        [*SYSTEM, 20, 1, 9, 21, 20, 2, 6, 21],
        "0000000000011",
    ),
    Row(
        "a system column that says what the system turn says",
        {
            "system_prompt": "be brief ",
            **messages(("system", "be brief"), ("user", "what"), ("assistant", "three")),
        },
        [*SYSTEM, 20, 1, 9, 21, 20, 2, 6, 21],
        "0000000000011",
    ),
    Row(
        "a system column beside turns as prompt and completion",
        {
            "system": "be brief",
            "prompt": [{"role": "user", "content": "what"}],
            "completion": [{"role": "assistant", "content": "three"}],
        },
        [*SYSTEM, 20, 1, 9, 21, 20, 2, 6, 21],
        "0000000000011",
    ),
    Row(
        "a column of turns by name is read alone, as by earlier versions",
        {"system": "be brief", **messages(("user", "what"), ("assistant", "three"))},
        [20, 1, 9, 21, 20, 2, 6, 21],
        "00000011",
        {"columns": "messages"},
    ),
    Row(
        "a system column and one of turns by name",
        {"system": "be brief", "text": "one", **messages(("user", "what"), ("assistant", "three"))},
        [*SYSTEM, 20, 1, 9, 21, 20, 2, 6, 21],
        "0000000000011",
        {"columns": "system,messages"},
    ),
    Row(
        "columns of ultrachat",
        {"prompt": "unused", "prompt_id": "f0", **messages(("user", "what"), ANSWERED)},
        [20, 1, 9, 21, 20, 2, 6, 21],
        "00000011",
    ),
    Row("text", {"text": "one plus two is three"}, [4, 7, 5, 8, 6], "11111"),
    Row("text with a marker", {"text": "one <|im_start|> two"}, [4, 0, 5], "111"),
    Row("token ids", {"input_ids": [4, 7, 5]}, [4, 7, 5], "111"),
    Row(
        "a column of choice",
        {"text": "one two", "input_ids": [4, 7]},
        [4, 5],
        "11",
        {"columns": "text"},
    ),
    Row(
        "a pair of columns of choice",
        {"title": "what", "body": "three", "text": "one"},
        [20, 1, 9, 21, 20, 2, 6, 21],
        "00000011",
        {"columns": "title,body"},
    ),
]


def write_rows(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def load(source: str, tokenizer: Any, *, max_positions: int | None = None, **settings: Any) -> Any:
    config = DataConfig("", "", **{"loss": "assistant", **settings})
    return load_sequences(source, tokenizer, config, split="train", max_positions=max_positions)


def shown(sample: Any) -> tuple[list[int], str]:
    return sample.input_ids.tolist(), "".join("01"[label >= 0] for label in sample.labels.tolist())


@pytest.mark.parametrize("case", ROWS, ids=[row.name for row in ROWS])
def test_a_row_gives_these_tokens_and_labels(case: Row, tokenizer: Any, tmp_path: Path) -> None:
    (sample,) = load(write_rows(tmp_path / "rows.jsonl", [case.row]), tokenizer, **case.settings)
    assert shown(sample) == (case.ids, case.mask)
    assert len(ROWS) >= 25


def write_csv(path: Path, rows: list[dict[str, Any]]) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def write_arrow(path: Path, rows: list[dict[str, Any]]) -> None:
    import datasets

    datasets.Dataset.from_list(rows).save_to_disk(str(path))


def write_splits(path: Path, rows: list[dict[str, Any]]) -> None:
    import datasets

    splits = {
        "train": datasets.Dataset.from_list(rows),
        "test": datasets.Dataset.from_list(rows[:1]),
    }
    datasets.DatasetDict(splits).save_to_disk(str(path))


FILES: dict[str, Callable[[Path, list[dict[str, Any]]], Any]] = {
    "rows.jsonl": write_rows,
    "rows.json": lambda path, rows: path.write_text(json.dumps(rows)),
    "lines.json": write_rows,
    "rows.csv": write_csv,
    "rows.parquet": lambda path, rows: pq.write_table(pa.Table.from_pylist(rows), path),
    "arrow": write_arrow,
    "splits": write_splits,
}


@pytest.mark.parametrize("name", FILES)
def test_every_kind_of_file_holds_the_same_rows(name: str, tokenizer: Any, tmp_path: Path) -> None:
    rows = [
        {"question": 'what is one,\r\n"plus" two', "answer": "three", "id": "a"},
        {"question": "数学", "answer": "café is\n\nmore", "id": "b"},
    ]
    FILES[name](tmp_path / name, rows)
    expected = [
        ([20, 1, 9, 8, 0, 0, 5, 21, 20, 2, 6, 21], "000000000011"),
        ([20, 1, 15, 21, 20, 2, 14, 8, 18, 21], "0000001111"),
    ]
    assert [shown(sample) for sample in load(str(tmp_path / name), tokenizer)] == expected


@pytest.mark.parametrize("name", ["rows.parquet", "arrow"])
def test_turns_in_columns_of_arrow(name: str, tokenizer: Any, tmp_path: Path) -> None:
    """Arrow gives every turn the keys of all turns, null where a turn has none."""
    first, second = (
        messages(("user", "what"), ANSWERED),
        messages(("user", "one"), ("assistant", "two")),
    )
    second["messages"][1]["tool_calls"] = None
    second["messages"][1]["name"] = "somebody"
    FILES[name](tmp_path / name, [first, second])
    assert [shown(sample)[0] for sample in load(str(tmp_path / name), tokenizer)] == [
        [20, 1, 9, 21, 20, 2, 6, 21],
        [20, 1, 4, 21, 20, 2, 5, 21],
    ]


GOOD = messages(("user", "what"), ANSWERED)

REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "two plausible columns": (
        {"text": "one two", **GOOD},
        r"several columns may hold the data \(conversation in 'messages'; text in 'text'\); set "
        r"data\.columns \(or --columns\) to messages or text",
    ),
    "alternative answers": (
        {"question": "what", "answer": ["three", "two"]},
        r"line 1: answer: expected one text, got a list of 2, which may be alternatives or turns",
    ),
    "several prompts": (
        {"prompt": ["what", "what more"], "response": ["three", "two"]},
        r"line 1: prompt: expected one text, got a list of 2",
    ),
    "several texts in a turn": (
        messages(("user", ["what", "what more"]), ANSWERED),
        r"turn 1 \(user\): expected one text, got a list of 2",
    ),
    "two system turns": (
        {"system": "be brief", **messages(("system", "hello"), ("user", "what"), ANSWERED)},
        r"line 1: system: expected one system turn, got another one here than before the other",
    ),
    "two responses": (
        {"prompt": "what", "response": "one", "completion": "two"},
        r"set data\.columns \(or --columns\) to prompt,response or prompt,completion",
    ),
    "no column": ({"rating": 3, "title": "what"}, r"the columns are 'rating', 'title'\. Set"),
    "no response": (messages(("user", "what")), r"line 1: messages: expected a turn of the assist"),
    "an empty response": (
        messages(("user", "what"), ("assistant", "")),
        r"turn 2 \(assistant\) is empty",
    ),
    "no content": (
        messages(("user", "what"), ("assistant", None)),
        r"'content' must be text, got null",
    ),
    "an unknown role": (
        messages(("user", "what"), ("judge", "one")),
        r"turn 2: expected a role .*'judge'",
    ),
    "an image": (
        messages(("user", [{"type": "image_url", "image_url": {}}]), ANSWERED),
        r"turn 1 \(user\), part 1: expected a string or a part of type 'text', got 'image_url'",
    ),
    "a call of a tool": (
        {
            "messages": [
                {"role": "user", "content": "a"},
                {"role": "assistant", "tool_calls": [{"id": 1}]},
            ]
        },
        r"turn 2: 'tool_calls' is not supported; write its content into the turn's text",
    ),
    "a late system turn": (
        messages(("user", "one"), ("system", "two"), ("assistant", "three")),
        r"turn 2: a system turn can only be the first turn",
    ),
    "one token": (
        {"text": "one"},
        r"has 1 token\(s\), expected at least 2 \(--data\.bad_rows skip leaves such rows out\)",
    ),
    "ids that are none": (
        {"input_ids": [1, -2]},
        r"line 1: input_ids: expected a list of token ids",
    ),
    "blank text": ({"text": " \n"}, r"line 1: text is empty"),
    "half a pair": (
        messages(("user", "\ud800"), ("assistant", "one")),
        r"holds half a surrogate pair",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_row_that_cannot_be_read_says_why(case: str, tokenizer: Any, tmp_path: Path) -> None:
    row, message = REFUSED[case]
    with pytest.raises(UserError, match=message) as caught:
        load(write_rows(tmp_path / "rows.jsonl", [row]), tokenizer)
    assert "\n" not in str(caught.value)


def test_a_system_column_of_later_rows_is_read(tokenizer: Any, tmp_path: Path) -> None:
    rows = [*[messages(("user", "what"), ANSWERED)] * PEEKED, ROWS[4].row]
    later = {"system": "be brief", **messages(("user", "what"), ANSWERED)}
    sequences = load(write_rows(tmp_path / "rows.jsonl", [*rows, later]), tokenizer)
    assert shown(sequences[PEEKED]) == shown(sequences[PEEKED + 1])
    assert len(sequences[0].input_ids) < len(sequences[PEEKED].input_ids)


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.parquet", "arrow"])
def test_what_is_not_read_is_named(name: str, tokenizer: Any, tmp_path: Path) -> None:
    row = {"id": "a", "tools": [{"name": "f"}], "system": 3, **messages(("user", "what"), ANSWERED)}
    row["messages"][1] |= {"weight": 0, "name": "somebody"}
    FILES[name](tmp_path / name, [row])
    sequences = load(str(tmp_path / name), tokenizer)
    assert sequences.unread == ["'tools'", "'system'", "'weight' of turns"]
    layout, _ = read_contents(Source(str(tmp_path / name)))
    assert layout is not None
    every = ["'id'", "'tools'", "'system'", "'weight' of turns", "'name' of turns"]
    assert layout.unread() == every
    plain = load(write_rows(tmp_path / "plain.jsonl", [{"id": "a", **GOOD}]), tokenizer)
    assert plain.unread == []
    parts = {"question": "what", "context": "1 2", "reasoning": "so", "answer": "2"}
    pair = load(write_rows(tmp_path / "pair.jsonl", [parts]), tokenizer)
    assert pair.unread == ["'context'", "'reasoning'"]


@pytest.mark.parametrize("columns", [None, "prompt,response"])
def test_an_input_column_belongs_to_a_prompt_of_text_alone(
    columns: str | None, tokenizer: Any, tmp_path: Path
) -> None:
    """With turns it is not read, so that no message names it as read."""
    turns = {role: [{"role": role, "content": "two"}] for role in ("user", "assistant")}
    pairs = (("one", "two"), (turns["user"], turns["assistant"]))
    for prompt, response in pairs:
        row = {"prompt": prompt, "response": response, "input": "plus"}
        path = write_rows(tmp_path / "rows.jsonl", [row])
        layout, rows = read_contents(Source(path, columns=columns))
        (content,) = [row.content for row in rows]
        read = any("plus" in turn.text for turn in content.turns)
        assert read == (prompt == "one")
        assert ("'input'" in str(layout)) == read
        assert load(path, tokenizer).unread == ([] if read else ["'input'"])
    path = write_rows(tmp_path / "chat.jsonl", [{**GOOD, "input": "plus"}])
    assert load(path, tokenizer).unread == ["'input'"]


def test_bad_rows_are_left_out_and_counted(tokenizer: Any, tmp_path: Path) -> None:
    path = Path(write_rows(tmp_path / "rows.jsonl", [GOOD, messages(("user", "what")), GOOD]))
    with path.open("a") as file:
        file.write("{broken\n" + json.dumps({"other": 1}) + "\n" + json.dumps(GOOD) + "\n")
    with pytest.raises(
        UserError, match=r"line 2: .*\(--data\.bad_rows skip leaves such rows out\)"
    ):
        load(str(path), tokenizer)
    sequences = load(str(path), tokenizer, bad_rows="skip")
    assert list(sequences.rows) == [0, 2, 5]
    assert (sequences.counts.read, sequences.counts.bad) == (6, 3)
    assert sum(sequences.bad.counts.values()) == len(sequences.bad.examples) == 3
    assert sequences.bad.examples[0].startswith(f"{path}, line 2: messages: expected a turn of")
    with pytest.raises(UserError, match=r"none of 1 rows can be used; the first: .*line 1"):
        load(write_rows(path, [messages(("user", "what"))]), tokenizer, bad_rows="skip")


def test_texts_beyond_the_model_are_left_out_and_counted(tokenizer: Any, tmp_path: Path) -> None:
    rows = [{"text": "one " * n} for n in (2, 5, 6, 9)]
    path = write_rows(tmp_path / "rows.jsonl", rows)
    sequences = load(path, tokenizer, max_positions=5, max_tokens=8)
    counts = sequences.counts
    assert (counts.sequences, counts.beyond_model, counts.too_long) == (2, 1, 1)
    with pytest.raises(
        UserError, match=r"none fits into the model's context .* the shortest has 2 tok"
    ):
        load(path, tokenizer, max_positions=1)


def test_a_base_tokenizer_reads_text_and_asks_for_a_family(tokenizer: Any, tmp_path: Path) -> None:
    backend = Tokenizer(models.WordLevel({"<unk>": 0, "one": 1, "<s>": 2}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    from tokenizers.processors import TemplateProcessing

    backend.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 2)])
    plain = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", bos_token="<s>")
    text = write_rows(tmp_path / "text.jsonl", [{"text": "one one"}])
    assert shown(load(text, plain)[0]) == ([2, 1, 1], "111")  # with the tokenizer's BOS
    chat = write_rows(tmp_path / "chat.jsonl", [GOOD])
    with pytest.raises(UserError, match=r"the data hold conversations; set data\.family to one of"):
        load(chat, plain)


# --- markers inside what was said -----------------------------------------------------------------

SAID = st.lists(
    st.sampled_from(
        ["<|im_end|>", "<|im_start|>", "<think>", "</think>", "a b", " ", "\n", "数", "<|"]
    ),
    min_size=1,
    max_size=6,
).map("".join)


@pytest.fixture(scope="module")
def of_bytes() -> PreTrainedTokenizerFast:
    """Byte-level BPE, in which ``<think>`` is no token and ``<|im_start|>`` no special one."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, show_progress=False)
    backend.train_from_iterator(["<|im_start|>user\na b", "<|im_end|> assistant\n"] * 3, trainer)
    backend.add_special_tokens([AddedToken("<|im_end|>")])
    backend.add_tokens([AddedToken("<|im_start|>")])
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|im_end|>")


@given(SAID, SAID)
def test_only_the_template_writes_markers(of_bytes: Any, question: str, answer: str) -> None:
    form = FAMILIES["qwen"]
    rendered = form.render([Turn("user", question), Turn("assistant", answer)])
    (encoded,) = Encoder(of_bytes, form).encode([rendered], offsets=True)
    assert of_bytes.decode(encoded.ids) == rendered.text
    for marker in form.markers:
        assert encoded.ids.count(of_bytes.convert_tokens_to_ids(marker)) == 2
    assert encoded.marked == (
        "<|im_end|>" in question + answer or "<|im_start|>" in question + answer
    )
    assert [end for _, end in encoded.offsets][-1] == len(rendered.text)
    # The control: the tokenizer alone reads every marker as a token.
    alone = of_bytes(rendered.text, add_special_tokens=False)["input_ids"]
    assert (alone == encoded.ids) == (not encoded.marked)
