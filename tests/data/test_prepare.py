"""A selection from a file of 5,000 rows in the schema of OpenThoughts3."""

import json
import threading
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import openthoughts
import pyarrow.parquet as pq
import pytest

from fastadapt.data.contents import Content, read_turns
from fastadapt.data.prepare import prepare
from fastadapt.data.prepare.report import summary
from fastadapt.data.prepare.selection import PrepareConfig, prompt_hash
from fastadapt.data.rendering import render
from fastadapt.data.sequences import DataConfig, load_sequences
from fastadapt.errors import UserError
from fastadapt.organism import NAMES

rows_of, bytes_of, FILES = openthoughts.rows_of, openthoughts.bytes_of, openthoughts.FILES
said = openthoughts.said

ROWS = 5000


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return openthoughts.write_jsonl(tmp_path_factory.mktemp("source") / "rows.jsonl", ROWS)


@pytest.fixture
def config(source: Path, selection: Callable[..., PrepareConfig]) -> Callable[..., PrepareConfig]:
    return partial(selection, source=str(source))


def test_quotas_are_met_and_nothing_is_in_both(config: Callable[..., PrepareConfig]) -> None:
    """Counts are within 1 of their shares; the splits share no row and no prompt."""
    result = prepare(config())
    splits = {split: rows_of(result["output"], split) for split in ("train", "validation")}
    for split, n in (("train", 1000), ("validation", 100)):
        assert len(splits[split]) == n
        counts = Counter(row["domain"] for row in splits[split])
        for domain, share in (("math", 0.708), ("code", 0.208), ("science", 0.083)):
            assert abs(counts[domain] - n * share / 0.999) <= 1
    rows = {split: {row["row"] for row in splits[split]} for split in splits}
    prompts = {split: {prompt_hash(said(row)[0]) for row in splits[split]} for split in splits}
    assert not rows["train"] & rows["validation"]
    assert not prompts["train"] & prompts["validation"]
    assert sum(map(len, rows.values())) == 1100
    assert result["counts"]["train"]["prompts"] == len(prompts["train"]) < 1000


def test_rows_are_those_of_the_source_and_short_enough(
    config: Callable[..., PrepareConfig], source: Path
) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(NAMES["organism/target"])
    lines = [json.loads(line) for line in source.read_text().splitlines()]
    result = prepare(config())
    for split in ("train", "validation"):
        for row in rows_of(result["output"], split):
            place, tokens = row.pop("row"), row.pop("tokens")
            turns = lines[place].pop("conversations")
            messages = row.pop("messages")
            assert row == lines[place]
            assert [turn["role"] for turn in messages] == ["user", "assistant"]
            assert [turn["content"] for turn in messages] == [turn["value"] for turn in turns]
            assert "</think>" in turns[1]["value"].partition("<think>")[2]
            text = render(turns, "r1-distill")
            assert tokens == len(tokenizer(text, add_special_tokens=False)["input_ids"]) <= 60
    difficulties = {row["difficulty"] for row in rows_of(result["output"], "train")}
    assert None in difficulties
    assert len(difficulties) > 2


def test_it_is_the_draw_that_a_dense_reading_gives(
    config: Callable[..., PrepareConfig], source: Path
) -> None:
    """The result equals a draw with all rows in memory, sorted by key."""
    from transformers import AutoTokenizer

    from fastadapt.data.prepare.selection import SPLITS, lacks_thinking, row_key

    tokenizer = AutoTokenizer.from_pretrained(NAMES["organism/target"])
    longest = 40  # many rows have this length, and many others have 41 tokens
    settings = config(max_tokens=longest, train=600, validation=60)
    lines = [json.loads(line) for line in source.read_text().splitlines()]
    order = sorted(range(ROWS), key=lambda row: row_key(42, row))
    expected: dict[str, list[int]] = {split: [] for split in SPLITS}
    long: Counter[str] = Counter()
    passed: Counter[str] = Counter()
    drawn, held_out = set(), set()
    quotas = settings.quotas()
    for split in SPLITS:
        for row in order:
            domain, turns = lines[row]["domain"], lines[row]["conversations"]
            if row in drawn or quotas[split][domain] == 0:
                continue
            if lacks_thinking(Content(tuple(read_turns(turns)))):
                continue
            drawn.add(row)
            text = render(turns, "r1-distill")
            if len(tokenizer(text, add_special_tokens=False)["input_ids"]) > longest:
                long[domain] += 1
            elif split == "train" and turns[0]["value"] in held_out:
                passed[domain] += 1
            else:
                quotas[split][domain] -= 1
                expected[split].append(row)
        held_out = {lines[row]["conversations"][0]["value"] for row in expected["validation"]}
    result = prepare(settings)
    assert result["counts"]["train"]["longest"] == longest
    for split in SPLITS:
        assert [row["row"] for row in rows_of(result["output"], split)] == expected[split]
    for domain, reasons in result["counts"]["left_out_of_drawn"].items():
        assert reasons["its prompt is in validation"] == passed[domain]
        assert reasons["more than max_tokens tokens"] == long[domain] > 0


def test_columns_of_another_kind_are_left_empty(
    config: Callable[..., PrepareConfig], tmp_path: Path
) -> None:
    response = "<think> 1 </think> 1"
    kinds = [(7.0, 7, "s", "s"), ("hard", None, 3, None), (True, None, None, None), (7.5, None) * 2]
    path = tmp_path / "rows.jsonl"
    with path.open("w") as file:
        for i, (difficulty, _, source, _) in enumerate(kinds):
            turns = [{"from": i, "value": f"{i}"}, {"from": "gpt", "value": response}]
            row = {"difficulty": difficulty, "source": source, "domain": "math"}
            file.write(json.dumps({**row, "conversations": turns}) + "\n")
    result = prepare(config(source=str(path), shares="math=1", train=4, validation=0))
    rows = {row["row"]: row for row in rows_of(result["output"], "train")}
    for i, (_, difficulty, _, source) in enumerate(kinds):
        assert (rows[i]["difficulty"], rows[i]["source"]) == (difficulty, source)
        assert rows[i]["messages"][0] == {"role": "user", "content": f"{i}"}


def whole_row(i: int) -> dict:
    turns = [f"what is {i} ?", f"<think> so {i} </think> {i}"]
    sides = [
        {"from": side, "value": turn} for side, turn in zip(("human", "gpt"), turns, strict=True)
    ]
    return {"domain": "math", "conversations": sides}


def test_what_a_column_cannot_hold_is_left_empty(
    config: Callable[..., PrepareConfig], tmp_path: Path
) -> None:
    """Integers beyond 64 bits and text with half a surrogate pair become null."""
    lines = [whole_row(i) for i in range(6)]
    values = [10**19, -(2**63), 1e30, 2**63 - 1, -(2**63) - 1, 5.0]
    for line, value in zip(lines, values, strict=True):
        line |= {"difficulty": value, "source": "a\ud800"}
        line["conversations"][0]["from"] = "\udfff"
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    how = {"train": 6, "validation": 0, "shares": "math=1", "allow_fewer": True}
    result = prepare(config(source=str(path), max_tokens=10_000, **how))
    rows = sorted(rows_of(result["output"], "train"), key=lambda row: row["row"])
    assert [row["row"] for row in rows] == [*range(6)]
    for row in rows:
        value = values[row["row"]]
        fits = -(2**63) <= value < 2**63
        assert row["difficulty"] == (int(value) if fits else None)
        assert row["source"] is None
        assert row["messages"][0]["role"] == "user"


def test_markers_in_the_text_are_counted(
    config: Callable[..., PrepareConfig], tmp_path: Path
) -> None:
    lines = [whole_row(i) for i in range(4)]
    for i, line in enumerate(lines):
        line["conversations"][1]["value"] += " <\uff5cAssistant\uff5c>" * (i % 2)
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    how = {"train": 4, "validation": 0, "shares": "math=1", "allow_fewer": True}
    result = prepare(config(source=str(path), max_tokens=10_000, **how))
    rows = rows_of(result["output"], "train")
    marked = sum(row["row"] % 2 for row in rows)
    assert result["counts"]["train"]["with_markers"] == marked > 0
    assert ["texts with markers", "", str(marked), "0"] in summary(result)[0][1]
    del result["counts"]["train"]["with_markers"]  # absent from older manifests
    assert summary(result)


def test_the_manifest_says_what_is_there(
    config: Callable[..., PrepareConfig], source: Path
) -> None:
    import hashlib

    result = prepare(config())
    folder = Path(result["output"])
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest == {k: v for k, v in result.items() if k not in ("interrupted", "output")}
    for name, entry in manifest["files"].items():
        content = (folder / name).read_bytes()
        assert entry["bytes"] == len(content)
        assert entry["sha256"] == hashlib.sha256(content).hexdigest()
        assert entry["rows"] == pq.read_metadata(folder / name).num_rows
    origin = manifest["source"]["files"][0]
    assert origin["sha256"] == hashlib.sha256(source.read_bytes()).hexdigest()
    counts = manifest["counts"]
    lines = [json.loads(line) for line in source.read_text().splitlines()]
    assert counts["rows"] == ROWS
    assert counts["domains"] == dict(Counter(line["domain"] for line in lines))
    responses = [line["conversations"][1]["value"] for line in lines]
    unopened = sum("<think>" not in r for r in responses)
    unclosed = sum("<think>" in r and "</think>" not in r.split("<think>")[1] for r in responses)
    assert unopened > 300
    assert unclosed > 300
    assert counts["left_out_of_source"]["no <think>"] == unopened
    assert counts["left_out_of_source"]["no </think> after it"] == unclosed
    for split in ("train", "validation"):
        tokens = [row["tokens"] for row in rows_of(folder, split)]
        assert counts[split]["tokens"] == sum(tokens)
        assert counts[split]["longest"] == max(tokens)
        assert sum(counts[split]["lengths"]) == len(tokens)
    assert sorted(path.name for path in folder.iterdir()) == sorted(FILES)


def test_the_files_train(config: Callable[..., PrepareConfig]) -> None:
    result = prepare(config())
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(NAMES["organism/target"])
    folder = result["output"]
    data = DataConfig(f"{folder}/train.parquet", f"{folder}/validation.parquet", max_tokens=60)
    train = load_sequences(str(data.train), tokenizer, data, split="train")
    assert train.counts.sequences == 1000
    assert train.counts.too_long == 0
    assert train.counts.tokens == result["counts"]["train"]["tokens"]
    whole = DataConfig(folder, folder, max_tokens=60)
    assert len(load_sequences(folder, tokenizer, whole, split="validation")) == 100


def test_again_gives_the_same_bytes(config: Callable[..., PrepareConfig], tmp_path: Path) -> None:
    first = bytes_of(prepare(config(output=str(tmp_path / "a")))["output"])
    assert bytes_of(prepare(config(output=str(tmp_path / "b")))["output"]) == first
    assert bytes_of(prepare(config(output=str(tmp_path / "a")), overwrite=True)["output"]) == first
    other = bytes_of(prepare(config(output=str(tmp_path / "c"), seed=43))["output"])
    assert other["train.parquet"] != first["train.parquet"]


@pytest.mark.slow
def test_parquet_and_jsonl_give_the_same_rows(
    config: Callable[..., PrepareConfig], tmp_path: Path
) -> None:
    folder = tmp_path / "parts"
    folder.mkdir()
    whole = openthoughts.write_parquet(tmp_path / "rows.parquet", ROWS)
    table = pq.read_table(whole)
    for i, start in enumerate(range(0, ROWS, 1900)):  # several files, several row groups in each
        part = table.slice(start, 1900)
        pq.write_table(part, folder / f"train-{i:05}.parquet", row_group_size=300)
    given = [
        bytes_of(prepare(config(output=str(tmp_path / name), **how))["output"])["train.parquet"]
        for name, how in (
            ("lines", {}),
            ("one", {"source": str(whole)}),
            ("many", {"source": str(folder)}),
        )
    ]
    assert given[0] == given[1] == given[2]


# --- quotas that cannot be filled -----------------------------------------------------------------


def test_a_quota_that_cannot_be_filled_says_which_and_how_many(
    config: Callable[..., PrepareConfig],
) -> None:
    with pytest.raises(UserError) as caught:
        prepare(config(train=4000))
    message = str(caught.value)
    assert "does not fill the quotas: train lacks" in message
    for domain, n in (("math", "2,835"), ("code", "833"), ("science", "332")):
        assert f"of {n} {domain}" in message
    assert "no <think>: " in message
    assert "--allow_fewer" in message
    assert "\n" not in message


def test_what_there_is_can_be_taken_without_reading_again(
    config: Callable[..., PrepareConfig],
) -> None:
    with pytest.raises(UserError):
        prepare(config(train=4000))
    records: list[dict[str, Any]] = []
    result = prepare(config(train=4000, allow_fewer=True), resume=True, sink=records.append)
    assert {record["kind"] for record in records} == {"write"}
    train, validation = result["counts"]["train"], result["counts"]["validation"]
    assert all(0 < train["conversations"][d] < train["wanted"][d] for d in train["wanted"])
    assert validation["conversations"] == validation["wanted"]


@pytest.mark.slow
def test_a_reserve_that_was_too_small_says_so(
    config: Callable[..., PrepareConfig], tmp_path: Path
) -> None:
    source = openthoughts.write_jsonl(tmp_path / "rows.jsonl", ROWS, copies=200)
    few = config(source=str(source), validation=12, train=1400, reserve=1.0)
    with pytest.raises(UserError, match="Raise --reserve and start again"):
        prepare(few)
    result = prepare(
        config(source=str(source), validation=12, train=1400, reserve=3.0), overwrite=True
    )
    assert len(rows_of(result["output"], "train")) == 1400


# --- invalid folders and sources ------------------------------------------------------------------


def test_other_things_in_the_folder_are_not_touched(
    config: Callable[..., PrepareConfig], tmp_path: Path
) -> None:
    folder = tmp_path / "out"
    folder.mkdir()
    (folder / "thesis.tex").write_text("years of work")
    settings: list[dict[str, Any]] = [{}, {"overwrite": True}]
    for how in settings:
        with pytest.raises(
            UserError, match=r"holds no selection of conversations \(it holds thesis.tex\)"
        ):
            prepare(config(), **how)
    with pytest.raises(UserError, match=r"--resume: .* holds no selection"):
        prepare(config(), resume=True)
    assert [path.name for path in folder.iterdir()] == ["thesis.tex"]


@pytest.mark.slow
def test_files_beside_a_selection_survive_an_overwrite(
    config: Callable[..., PrepareConfig],
) -> None:
    folder = Path(prepare(config())["output"])
    (folder / "notes.txt").write_text("mine")
    prepare(config(seed=1), overwrite=True)
    assert (folder / "notes.txt").read_text() == "mine"


def test_a_selection_is_not_replaced_unasked(config: Callable[..., PrepareConfig]) -> None:
    before = bytes_of(prepare(config())["output"])
    with pytest.raises(UserError, match=r"holds a selection already\. Replace it"):
        prepare(config())
    with pytest.raises(UserError, match="choose one"):
        prepare(config(), resume=True, overwrite=True)
    assert bytes_of(config().output) == before


def test_an_unfinished_one_is_not_replaced_unasked(config: Callable[..., PrepareConfig]) -> None:
    stop = threading.Event()
    stop.set()
    prepare(config(), stop=stop)
    with pytest.raises(UserError, match=r"an unfinished selection\. Resume it"):
        prepare(config())
    assert not prepare(config(), overwrite=True)["interrupted"]


def test_a_folder_is_one_process_at_a_time(config: Callable[..., PrepareConfig]) -> None:
    def again(_: Any) -> None:
        with pytest.raises(UserError, match="another process is writing"):
            prepare(config(), resume=True)
        seen.append(1)

    seen: list[int] = []
    prepare(config(), sink=again)
    assert seen


def test_a_mistake_leaves_no_folder(config: Callable[..., PrepareConfig], tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such file or folder"):
        prepare(config(source=str(tmp_path / "absent.jsonl")))
    with pytest.raises(UserError, match=r"<\|im_start\|>"):
        prepare(config(family="qwen"))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (
            {"conversations": []},
            "no column 'domain'; the columns are 'conversations'. Pass --shares",
        ),
        ({"domain": "math"}, r"rows.jsonl: no column 'conversations', 'messages'"),
        ({"domain": "math", "text": "a", "prompt": "b", "answer": "c"}, "several columns may hold"),
        ({"domain": "math", "input_ids": [1, 2]}, "pass --thinking any to take every row"),
    ],
)
def test_a_source_of_another_form_is_named(
    row: dict[str, Any], message: str, config: Callable[..., PrepareConfig], tmp_path: Path
) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(row) + "\n")
    with pytest.raises(UserError, match=message):
        prepare(config(source=str(path)))
