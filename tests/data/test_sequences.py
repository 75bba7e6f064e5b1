"""Token sequences: selected conversations, labels and errors."""

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from fastadapt.data.families import FAMILIES
from fastadapt.data.mixtures import Mixture
from fastadapt.data.rendering import get_form, render
from fastadapt.data.sequences import DataConfig, Sequences, count_repeated, load_sequences
from fastadapt.data.tokens import Encoder
from fastadapt.errors import UserError
from fastadapt.models.pretrained import encode_text, load_tokenizer
from fastadapt.organism import resolve


def config(**changes: Any) -> DataConfig:
    return DataConfig(**{"train": "", "validation": "", "family": "r1-distill", **changes})


@pytest.fixture
def rows(turns: Callable[[str, str], list[dict[str, str]]]) -> list[list[dict[str, str]]]:
    # 13 tokens when rendered as r1-distill; every fifth row has two more.
    return [
        turns("1 + 1 = ?", "<think> so 2 </think> 2" + (" wait ." if i % 5 == 2 else ""))
        for i in range(300)
    ]


@pytest.mark.parametrize("family", FAMILIES)
def test_ids_are_those_of_the_rendered_text(
    family: str,
    rows: list[list[dict[str, str]]],
    tokenizer: PreTrainedTokenizerFast,
    write_jsonl: Callable[..., str],
) -> None:
    sequences = load_sequences(write_jsonl(rows), tokenizer, config(family=family), split="train")
    assert len(sequences) == len(rows)
    for index in (0, 2, 127, 128, 299):
        sample = sequences[index]
        text = render(rows[index], family)
        assert sample.index == index
        assert sample.input_ids.dtype == sample.labels.dtype == torch.int64
        expected = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert sample.input_ids.tolist() == expected
        assert tokenizer.unk_token_id not in expected


@pytest.mark.parametrize("family", FAMILIES)
def test_markers_in_the_text_are_counted_and_read_as_tokens_on_request(
    family: str,
    turns: Callable[[str, str], list[dict[str, str]]],
    tokenizer: PreTrainedTokenizerFast,
    write_jsonl: Callable[..., str],
) -> None:
    marker = FAMILIES[family].markers[0]
    rows = [turns("1 + 1", "2"), turns(f"1 {marker} 2", "3"), turns("1 + 2", f"so {marker} 3")]
    settings = config(family=family, markers="tokens")
    sequences = load_sequences(write_jsonl(rows), tokenizer, settings, split="train")
    assert sequences.counts.with_markers == 2
    expected = tokenizer(render(rows[1], family), add_special_tokens=False)["input_ids"]
    assert sequences[1].input_ids.tolist() == expected


def test_there_is_one_bos_and_no_eos(
    rows: list[list[dict[str, str]]],
    tokenizer: PreTrainedTokenizerFast,
    write_jsonl: Callable[..., str],
) -> None:
    ids = load_sequences(write_jsonl(rows[:1]), tokenizer, config(), split="train")[0].input_ids
    assert (ids == tokenizer.bos_token_id).nonzero().flatten().tolist() == [0]
    assert (ids != tokenizer.eos_token_id).all()


def test_a_text_with_its_own_bos_gets_no_second_one() -> None:
    """The embedded tokenizer, with a BOS before every text, as most tokenizers have."""
    tokenizer = load_tokenizer(resolve("organism/target"), None, trust=False)
    bos, text = tokenizer.bos_token, "tom has 3 apples"
    encoders = [Encoder(tokenizer, get_form("r1-distill"), each) for each in ("text", "tokens")]
    assert bos not in tokenizer.convert_ids_to_tokens(encode_text(tokenizer, text))
    twice = encode_text(tokenizer, bos * 2 + text)  # as it was typed
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"{bos} $A", special_tokens=[(bos, tokenizer.bos_token_id)]
    )
    expected = tokenizer(text)["input_ids"]
    assert expected.count(tokenizer.bos_token_id) == 1
    assert encode_text(tokenizer, text) == encode_text(tokenizer, bos + text) == expected
    assert encode_text(tokenizer, bos * 2 + text) == twice
    for encoder in encoders:
        assert encoder.encode_text(text).ids == expected
    as_text, as_token = (encoder.encode_text(bos + text) for encoder in encoders)
    assert as_token.ids == expected
    assert len(as_token.offsets) == len(expected)
    assert as_text.ids[0] == tokenizer.bos_token_id
    assert as_text.ids != expected


def test_held_out_texts_that_are_training_texts_are_counted(
    turns: Callable[[str, str], list[dict[str, str]]],
    tokenizer: PreTrainedTokenizerFast,
    write_jsonl: Callable[..., str],
) -> None:
    def load(name: str, *responses: str) -> Sequences:
        path = write_jsonl([turns("1 + 1", response) for response in responses], name)
        return load_sequences(path, tokenizer, config(), split="train")

    first, second = load("a.jsonl", "2", "3", "so 3", "wait"), load("b.jsonl", "3 wait", "4")
    held_out = load("c.jsonl", "3", "3", "3 wait", "2 so wait", "1")
    assert count_repeated(held_out, first) == 2
    assert count_repeated(held_out, Mixture([first, second], [1, 2])) == 3
    assert count_repeated(load("d.jsonl", "1", "so 1"), first) == 0


def test_padding_and_truncation_set_in_the_tokenizer_do_not_act(
    rows: list[list[dict[str, str]]],
    tokenizer: PreTrainedTokenizerFast,
    write_jsonl: Callable[..., str],
) -> None:
    expected = [
        s.input_ids for s in load_sequences(write_jsonl(rows), tokenizer, config(), split="train")
    ]
    backend = tokenizer.backend_tokenizer
    backend.enable_padding(length=64)
    backend.enable_truncation(4)
    try:
        loaded = load_sequences(write_jsonl(rows), tokenizer, config(), split="train")
        assert all(torch.equal(a.input_ids, b) for a, b in zip(loaded, expected, strict=True))
    finally:
        backend.no_padding()
        backend.no_truncation()


def test_every_token_counts_by_default(
    rows: list[list[dict[str, str]]],
    tokenizer: PreTrainedTokenizerFast,
    write_jsonl: Callable[..., str],
) -> None:
    sample = load_sequences(write_jsonl(rows[:1]), tokenizer, config(), split="train")[0]
    assert torch.equal(sample.labels, sample.input_ids)
    assert sample.labels.data_ptr() != sample.input_ids.data_ptr()


@pytest.mark.parametrize("family", FAMILIES)
def test_prompt_tokens_can_be_left_out_of_the_loss(
    family: str,
    rows: list[list[dict[str, str]]],
    tokenizer: PreTrainedTokenizerFast,
    write_jsonl: Callable[..., str],
) -> None:
    sample = load_sequences(
        write_jsonl(rows[:1]),
        tokenizer,
        config(family=family, loss="assistant"),
        split="train",
    )[0]
    first = sample.input_ids.tolist().index(tokenizer.convert_tokens_to_ids("<think>"))
    assert (sample.labels[:first] == -100).all()
    assert torch.equal(sample.labels[first:], sample.input_ids[first:])


def test_longer_conversations_are_left_out_and_counted(
    rows: list[list[dict[str, str]]],
    tokenizer: PreTrainedTokenizerFast,
    write_jsonl: Callable[..., str],
) -> None:
    everything = load_sequences(write_jsonl(rows), tokenizer, config(), split="train")
    assert everything.counts[:6] == (300, 300, 0, 240 * 13 + 60 * 15, 15, 0)
    short = load_sequences(write_jsonl(rows), tokenizer, config(max_tokens=13), split="train")
    assert short.counts[:6] == (300, 240, 60, 240 * 13, 13, 0)
    assert list(short.rows) == [i for i in range(300) if i % 5 != 2]
    for i, row in enumerate(short.rows):
        assert torch.equal(short[i].input_ids, everything[row].input_ids)


def test_only_validation_is_cut_short(
    rows: list[list[dict[str, str]]],
    tokenizer: PreTrainedTokenizerFast,
    write_jsonl: Callable[..., str],
) -> None:
    settings = config(max_validation=7, max_tokens=13)
    path = write_jsonl(rows)
    held_out = load_sequences(path, tokenizer, settings, split="validation")
    assert held_out.counts[:6] == (9, 7, 2, 7 * 13, 13, 0)
    assert len(load_sequences(path, tokenizer, settings, split="train")) == 240


def test_the_split_selects_the_files_of_a_folder(
    rows: list[list[dict[str, str]]],
    tokenizer: PreTrainedTokenizerFast,
    write_jsonl: Callable[..., str],
    tmp_path: Path,
) -> None:
    write_jsonl(rows[:3], "train.jsonl")
    write_jsonl(rows[:2], "validation.jsonl")
    write_jsonl(rows[:1], "test.jsonl")
    source = str(tmp_path)
    assert len(load_sequences(source, tokenizer, config(), split="train")) == 3
    assert len(load_sequences(source, tokenizer, config(), split="validation")) == 2
    other = config(validation_split="test")
    assert len(load_sequences(source, tokenizer, other, split="validation")) == 1


def test_indices_run_as_in_a_list(
    rows: list[list[dict[str, str]]],
    tokenizer: PreTrainedTokenizerFast,
    write_jsonl: Callable[..., str],
) -> None:
    sequences = load_sequences(write_jsonl(rows[:4]), tokenizer, config(), split="train")
    assert sequences[-1].index == 3
    assert [sample.index for sample in sequences] == [0, 1, 2, 3]
    with pytest.raises(IndexError, match="expected less than 4, got 4"):
        sequences[4]


def test_local_files_leave_no_trace(
    rows: list[list[dict[str, str]]],
    tokenizer: PreTrainedTokenizerFast,
    write_jsonl: Callable[..., str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    path = write_jsonl(rows)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_sequences(path, tokenizer, config(), split="train")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["rows.jsonl"]


class NoWords:
    """A tokenizer that has all markers and returns ``n_tokens`` ids for any text."""

    unk_token_id = None

    def __init__(self, n_tokens: int) -> None:
        self.n_tokens = n_tokens

    def __call__(self, text: Any, **_: Any) -> dict[str, Any]:
        if isinstance(text, str):
            return {"input_ids": [5]}
        offsets = [[(0, 1)] * self.n_tokens for _ in text]
        return {"input_ids": [[5] * self.n_tokens for _ in text], "offset_mapping": offsets}


def test_a_malformed_conversation_is_located(
    rows: list[list[dict[str, str]]],
    turns: Callable[[str, str], list[dict[str, str]]],
    tokenizer: PreTrainedTokenizerFast,
    write_jsonl: Callable[..., str],
) -> None:
    bad = turns("1 + 1 = ?", "")
    path = write_jsonl([*rows[:140], bad, *rows])
    with pytest.raises(UserError) as caught:
        load_sequences(path, tokenizer, config(), split="train")
    assert (
        str(caught.value) == f"{path}, line 141: conversations, turn 2 (assistant) is empty"
        " (--data.bad_rows skip leaves such rows out)"
    )


@pytest.mark.parametrize(("n_tokens", "count"), [(0, "0 token(s)"), (1, "1 token(s)")])
def test_a_one_token_sample_is_refused(
    n_tokens: int, count: str, rows: list[list[dict[str, str]]], write_jsonl: Callable[..., str]
) -> None:
    with pytest.raises(UserError, match=r"line 1: the text has") as caught:
        load_sequences(write_jsonl(rows), NoWords(n_tokens), config(), split="train")
    assert count in str(caught.value)


def test_a_response_without_tokens_is_refused(
    rows: list[list[dict[str, str]]], write_jsonl: Callable[..., str]
) -> None:
    settings = config(loss="assistant")
    message = r"line 1: the response has no token \(data.loss is assistant; all counts"
    with pytest.raises(UserError, match=message):
        load_sequences(write_jsonl(rows), NoWords(3), settings, split="train")


def test_the_loss_of_reasoning_needs_reasoning(
    turns: Callable[[str, str], list[dict[str, str]]],
    tokenizer: PreTrainedTokenizerFast,
    write_jsonl: Callable[..., str],
) -> None:
    message = (
        r"has no token \(data.loss is thinking; assistant and all count other tokens\) \(--data"
    )
    path = write_jsonl([turns("1 + 1 ?", "2")])
    with pytest.raises(UserError, match=message):
        load_sequences(path, tokenizer, config(loss="thinking"), split="train")


def test_a_source_without_conversations_is_refused(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    path = tmp_path / "none.jsonl"
    path.write_text("\n")
    with pytest.raises(
        UserError, match=r"\(train\): expected at least one conversation or text, got none"
    ):
        load_sequences(str(path), tokenizer, config(), split="train")


def test_nothing_left_names_the_setting_and_the_shortest(
    rows: list[list[dict[str, str]]],
    tokenizer: PreTrainedTokenizerFast,
    write_jsonl: Callable[..., str],
) -> None:
    with pytest.raises(UserError) as caught:
        load_sequences(write_jsonl(rows), tokenizer, config(max_tokens=12), split="validation")
    assert str(caught.value).endswith(
        "(validation): of 300 rows none fits into data.max_tokens=12: the shortest has 13 tokens"
    )


def test_a_tokenizer_of_another_family_is_refused(
    rows: list[list[dict[str, str]]], write_jsonl: Callable[..., str]
) -> None:
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    other = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel({"<unk>": 0, "a": 1}, unk_token="<unk>")),
        unk_token="<unk>",
    )
    with pytest.raises(UserError, match=r"does not know its marker '<\|im_start\|>' as one token"):
        load_sequences(write_jsonl(rows), other, config(family="qwen"), split="train")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"family": "r1"}, f"data.family: expected one of {sorted(FAMILIES)}, got 'r1'"),
        ({"max_tokens": 1}, "data.max_tokens: expected at least 2, got 1"),
        ({"max_validation": 0}, "data.max_validation: expected at least 1 or null, got 0"),
    ],
)
def test_an_impossible_setting_is_refused_at_once(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as caught:
        config(**changes)
    assert str(caught.value) == message


def test_the_columns_of_the_real_data_load(
    rows: list[list[dict[str, str]]], tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    lines = [
        {"difficulty": d, "source": "s", "domain": "math", "conversations": row}
        for d, row in zip([None, 7], rows, strict=False)
    ]
    path = tmp_path / "full.jsonl"
    path.write_text("\n".join(json.dumps(line) for line in lines))
    assert len(load_sequences(str(path), tokenizer, config(), split="train")) == 2


def test_a_split_is_train_or_validation(tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(ValueError, match="split: expected 'train' or 'validation', got 'test'"):
        load_sequences("unused", tokenizer, config(), split="test")


def test_the_published_splits_load_as_they_are(
    tokenizer: PreTrainedTokenizerFast,
    turns: Callable[[str, str], list[dict[str, str]]],
    tmp_path: Path,
) -> None:
    """File names and columns are those of the published splits; some rows have `difficulty`."""
    for name, n in (("train", 6), ("val", 3)):
        with (tmp_path / f"stratified_n55000_t10000_s42_{name}.jsonl").open("w") as file:
            for i in range(n):
                row: dict[str, Any] = {
                    "domain": ("math", "code", "science")[i % 3],
                    "source": "someone/something",
                    "conversations": turns("1 + 1 = ?", "<think> so 2 </think> 2" + " ." * (i % 2)),
                    "needs_truncation": False,
                }
                if i % 3 == 1:
                    row["difficulty"] = 7.0
                file.write(json.dumps(row) + "\n")
    settings = config(
        train=str(tmp_path / "stratified_n55000_t10000_s42_train.jsonl"),
        validation=str(tmp_path / "stratified_n55000_t10000_s42_val.jsonl"),
    )
    train = load_sequences(str(settings.train), tokenizer, settings, split="train")
    held_out = load_sequences(settings.validation, tokenizer, settings, split="validation")
    assert (len(train), len(held_out)) == (6, 3)
    text = render(turns("1 + 1 = ?", "<think> so 2 </think> 2 ."), "r1-distill")
    expected = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert train[1].input_ids.tolist() == held_out[1].input_ids.tolist() == expected
