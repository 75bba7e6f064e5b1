"""A whole selection, on a file of 5,000 rows in the schema of OpenThoughts3."""

import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from collections import Counter
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from fastadapt.data import prepare as module
from fastadapt.data.prepare import prepare
from fastadapt.data.rendering import render
from fastadapt.data.selection import PrepareConfig, prompt_hash
from fastadapt.data.sequences import DataConfig, load_sequences
from fastadapt.errors import RunError, UserError
from fastadapt.organism import NAMES

_spec = importlib.util.spec_from_file_location(
    "fastadapt_tests_openthoughts", Path(__file__).with_name("openthoughts.py")
)
openthoughts = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(openthoughts)

ROWS = 5000
FILES = ("train.parquet", "validation.parquet", "manifest.json")


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    return openthoughts.write_jsonl(tmp_path_factory.mktemp("source") / "rows.jsonl", ROWS)


@pytest.fixture
def config(source, tmp_path):
    def make(**changes) -> PrepareConfig:
        values = {
            "source": str(source),
            "output": str(tmp_path / "out"),
            "tokenizer": str(NAMES["organism/target"]),
            "train": 1000,
            "validation": 100,
            "max_tokens": 60,
            **changes,
        }
        return PrepareConfig(**values)

    return make


def rows_of(folder, split) -> list[dict]:
    return pq.read_table(Path(folder) / f"{split}.parquet").to_pylist()


def bytes_of(folder) -> dict[str, bytes]:
    return {name: (Path(folder) / name).read_bytes() for name in FILES}


def test_quotas_are_met_and_nothing_is_in_both(config):
    """The claim: shares within 1, disjoint by row, by conversation and by prompt."""
    made = prepare(config())
    splits = {split: rows_of(made["output"], split) for split in ("train", "validation")}
    for split, n in (("train", 1000), ("validation", 100)):
        assert len(splits[split]) == n
        found = Counter(row["domain"] for row in splits[split])
        for domain, share in (("math", 0.708), ("code", 0.208), ("science", 0.083)):
            assert abs(found[domain] - n * share / 0.999) <= 1
    rows = {split: {row["row"] for row in splits[split]} for split in splits}
    prompts = {
        split: {prompt_hash(row["conversations"][0]["value"]) for row in splits[split]}
        for split in splits
    }
    assert not rows["train"] & rows["validation"]
    assert not prompts["train"] & prompts["validation"]
    assert sum(map(len, rows.values())) == 1100
    assert made["counts"]["train"]["prompts"] == len(prompts["train"]) < 1000


def test_rows_are_those_of_the_source_and_short_enough(config, source):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(NAMES["organism/target"])
    lines = [json.loads(line) for line in source.read_text().splitlines()]
    made = prepare(config())
    for split in ("train", "validation"):
        for row in rows_of(made["output"], split):
            place, tokens = row.pop("row"), row.pop("tokens")
            assert row == lines[place]
            response = row["conversations"][1]["value"]
            assert "</think>" in response.partition("<think>")[2]
            text = render(row["conversations"], "r1-distill")
            assert tokens == len(tokenizer(text, add_special_tokens=False)["input_ids"]) <= 60
    difficulties = {row["difficulty"] for row in rows_of(made["output"], "train")}
    assert None in difficulties
    assert len(difficulties) > 2


def test_it_is_the_draw_that_a_dense_reading_gives(config, source):
    """Against all rows in memory, sorted by key: quotas filled from the front."""
    from transformers import AutoTokenizer

    from fastadapt.data.selection import SPLITS, look_at, row_key

    tokenizer = AutoTokenizer.from_pretrained(NAMES["organism/target"])
    longest = 40  # of many rows, and one less than that of many others
    settings = config(max_tokens=longest, train=600, validation=60)
    lines = [json.loads(line) for line in source.read_text().splitlines()]
    order = sorted(range(ROWS), key=lambda row: row_key(42, row))
    expected, long, passed = {split: [] for split in SPLITS}, Counter(), Counter()
    gone, held_out = set(), set()
    quotas = settings.quotas()
    for split in SPLITS:
        for row in order:
            domain, turns = lines[row]["domain"], lines[row]["conversations"]
            if row in gone or quotas[split][domain] == 0:
                continue
            if isinstance(look_at(lines[row], quotas[split]), str):
                continue
            gone.add(row)
            text = render(turns, "r1-distill")
            if len(tokenizer(text, add_special_tokens=False)["input_ids"]) > longest:
                long[domain] += 1
            elif split == "train" and turns[0]["value"] in held_out:
                passed[domain] += 1
            else:
                quotas[split][domain] -= 1
                expected[split].append(row)
        held_out = {lines[row]["conversations"][0]["value"] for row in expected["validation"]}
    made = prepare(settings)
    assert made["counts"]["train"]["longest"] == longest
    for split in SPLITS:
        assert [row["row"] for row in rows_of(made["output"], split)] == expected[split]
    for domain, reasons in made["counts"]["left_out_of_drawn"].items():
        assert reasons["its prompt is in validation"] == passed[domain]
        assert reasons["more than max_tokens tokens"] == long[domain] > 0


def test_the_manifest_says_what_is_there(config, source):
    import hashlib

    made = prepare(config())
    folder = Path(made["output"])
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest == {k: v for k, v in made.items() if k not in ("interrupted", "output")}
    for name, told in manifest["files"].items():
        content = (folder / name).read_bytes()
        assert told["bytes"] == len(content)
        assert told["sha256"] == hashlib.sha256(content).hexdigest()
        assert told["rows"] == pq.read_metadata(folder / name).num_rows
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


def test_the_files_train(config):
    made = prepare(config())
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(NAMES["organism/target"])
    folder = made["output"]
    data = DataConfig(f"{folder}/train.parquet", f"{folder}/validation.parquet", max_tokens=60)
    train = load_sequences(data.train, tokenizer, data, split="train")
    assert train.counts.kept == 1000
    assert train.counts.too_long == 0
    assert train.counts.tokens == made["counts"]["train"]["tokens"]
    whole = DataConfig(folder, folder, max_tokens=60)
    assert len(load_sequences(folder, tokenizer, whole, split="validation")) == 100


def test_again_gives_the_same_bytes(config, tmp_path):
    first = bytes_of(prepare(config(output=str(tmp_path / "a")))["output"])
    assert bytes_of(prepare(config(output=str(tmp_path / "b")))["output"]) == first
    assert bytes_of(prepare(config(output=str(tmp_path / "a")), overwrite=True)["output"]) == first
    other = bytes_of(prepare(config(output=str(tmp_path / "c"), seed=43))["output"])
    assert other["train.parquet"] != first["train.parquet"]


def test_parquet_and_jsonl_give_the_same_rows(config, tmp_path):
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


# --- stopping and going on ------------------------------------------------------------------------

KILLED = """
import os, signal, sys
from fastadapt.data import prepare as module, reading
from fastadapt.data.selection import PrepareConfig
from fastadapt.data.spool import Spool

reading._COMMIT_ROWS = 250
kind, at, *values = sys.argv[1:]
config = PrepareConfig(*values[:3], train=1000, validation=100, max_tokens=60)
seen = 0

def sink(record):
    global seen
    seen += record["kind"] == kind
    if seen == int(at):
        os.kill(os.getpid(), signal.SIGKILL)

module._GROUP_BYTES = 1 << 15
module.prepare(config, resume="resume" in values, sink=sink)
"""


def run_killed(config: PrepareConfig, kind: str, at: int, *more: str) -> int:
    command = [sys.executable, "-c", KILLED, kind, str(at)]
    command += [config.source, config.output, config.tokenizer, *more]
    return subprocess.run(command, env={**os.environ, "HF_HUB_OFFLINE": "1"}).returncode


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_killed_and_resumed_gives_the_same_bytes(kind, config, source, tmp_path, monkeypatch):
    """SIGKILL while reading, twice, then while writing; the files are those of one go."""
    if kind == "parquet":
        source = openthoughts.write_parquet(tmp_path / "rows.parquet", ROWS, group=333)
    monkeypatch.setattr(module, "_GROUP_BYTES", 1 << 15)
    whole = bytes_of(prepare(config(source=str(source), output=str(tmp_path / "whole")))["output"])
    settings = config(source=str(source))
    assert run_killed(settings, "read", 7) == -signal.SIGKILL
    journal = Path(settings.output) / ".prepare" / "journal"
    with journal.open("ab") as file:  # as a kill in the middle of a write leaves it
        file.write(b'[1750, "math", "3')
    with (journal.parent / "rows").open("ab") as file:
        file.write(b"half a row")
    assert run_killed(settings, "read", 6, "resume") == -signal.SIGKILL
    assert run_killed(settings, "write", 3, "resume") == -signal.SIGKILL
    assert not (Path(settings.output) / "manifest.json").exists()
    read = []
    made = prepare(settings, resume=True, sink=read.append)
    assert bytes_of(made["output"]) == whole
    assert not any(record["kind"] == "read" for record in read)  # that was done
    assert sorted(path.name for path in Path(made["output"]).iterdir()) == sorted(FILES)


def test_told_to_stop_it_goes_on_from_there(config, tmp_path):
    whole = bytes_of(prepare(config(output=str(tmp_path / "whole")))["output"])
    stop = threading.Event()
    stop.set()
    reached = []
    for _ in range(10):
        made = prepare(config(), resume=bool(reached), stop=stop)
        if not made["interrupted"]:
            break
        reached.append(made["rows"])
    assert reached == [1000, 2000, 3000, 4000, 5000]
    assert bytes_of(made["output"]) == whole


def test_a_finished_one_is_verified_on_resume(config):
    made = prepare(config())
    assert prepare(config(), resume=True) == made
    path = Path(made["output"]) / "train.parquet"
    content = bytearray(path.read_bytes())
    content[100] ^= 1
    path.write_bytes(content)
    with pytest.raises(RunError, match=r"train\.parquet is not what manifest\.json says"):
        prepare(config(), resume=True)


def test_a_kill_after_the_manifest_leaves_nothing_behind(config, monkeypatch):
    """Between the last file written and the first one removed."""
    with monkeypatch.context() as patched:
        patched.setattr(module.outdir, "clean", lambda folder: None)
        made = prepare(config())
    folder = Path(made["output"])
    assert (folder / ".prepare" / "rows").exists()
    assert prepare(config(), resume=True) == made
    assert sorted(path.name for path in folder.iterdir()) == sorted(FILES)


def test_resume_needs_the_same_settings_and_source(config, source, tmp_path):
    copy = tmp_path / "rows.jsonl"
    shutil.copy(source, copy)
    stop = threading.Event()
    stop.set()
    prepare(config(source=str(copy)), stop=stop)
    with pytest.raises(UserError, match=r"other settings \(seed: 1, was 42\)"):
        prepare(config(source=str(copy), seed=1), resume=True)
    with copy.open("a") as file:
        file.write("\n")
    with pytest.raises(UserError, match=r"other settings \(source: .*bytes"):
        prepare(config(source=str(copy)), resume=True)


def test_no_room_leaves_what_there_is(config, tmp_path, monkeypatch):
    """A disk that is full in the middle: one clear error, and resume gives the same bytes."""
    import errno

    from fastadapt.data import spool

    whole = bytes_of(prepare(config(output=str(tmp_path / "whole")))["output"])
    real, written = spool._append, []

    def full(file, data):
        written.append(len(data))
        if len(written) == 5:
            real(file, data[: len(data) // 2])
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(file, data)

    monkeypatch.setattr(spool, "_append", full)
    with pytest.raises(RunError, match=r"cannot be written: No space left on device.*--resume"):
        prepare(config())
    monkeypatch.setattr(spool, "_append", real)
    assert bytes_of(prepare(config(), resume=True)["output"]) == whole


# --- quotas that cannot be filled -----------------------------------------------------------------


def test_a_quota_that_cannot_be_filled_says_which_and_how_many(config):
    with pytest.raises(UserError) as caught:
        prepare(config(train=4000))
    said = str(caught.value)
    assert "does not fill the quotas: train lacks" in said
    for domain, n in (("math", "2,835"), ("code", "833"), ("science", "332")):
        assert f"of {n} {domain}" in said
    assert "no <think>: " in said
    assert "--allow_fewer" in said
    assert "\n" not in said


def test_what_there_is_can_be_taken_without_reading_again(config):
    with pytest.raises(UserError):
        prepare(config(train=4000))
    records = []
    made = prepare(config(train=4000, allow_fewer=True), resume=True, sink=records.append)
    assert {record["kind"] for record in records} == {"write"}
    train, validation = made["counts"]["train"], made["counts"]["validation"]
    assert all(0 < train["conversations"][d] < train["wanted"][d] for d in train["wanted"])
    assert validation["conversations"] == validation["wanted"]


def test_a_reserve_that_was_too_small_says_so(config, tmp_path):
    source = openthoughts.write_jsonl(tmp_path / "rows.jsonl", ROWS, copies=200)
    few = config(source=str(source), validation=12, train=1400, reserve=1.0)
    with pytest.raises(UserError, match="raise --reserve and begin again"):
        prepare(few)
    made = prepare(
        config(source=str(source), validation=12, train=1400, reserve=3.0), overwrite=True
    )
    assert len(rows_of(made["output"], "train")) == 1400


# --- folders and sources that will not do ---------------------------------------------------------


def test_other_things_in_the_folder_are_not_touched(config, tmp_path):
    folder = tmp_path / "out"
    folder.mkdir()
    (folder / "thesis.tex").write_text("years of work")
    for how in ({}, {"overwrite": True}):
        with pytest.raises(UserError, match=r"holds no selection \(it holds thesis.tex\)"):
            prepare(config(), **how)
    with pytest.raises(UserError, match=r"--resume: .* holds no selection"):
        prepare(config(), resume=True)
    assert [path.name for path in folder.iterdir()] == ["thesis.tex"]


def test_files_beside_a_selection_survive_an_overwrite(config):
    folder = Path(prepare(config())["output"])
    (folder / "notes.txt").write_text("mine")
    prepare(config(seed=1), overwrite=True)
    assert (folder / "notes.txt").read_text() == "mine"


def test_a_selection_is_not_replaced_unasked(config):
    before = bytes_of(prepare(config())["output"])
    with pytest.raises(UserError, match=r"holds a selection already\. Replace it"):
        prepare(config())
    with pytest.raises(UserError, match="choose one"):
        prepare(config(), resume=True, overwrite=True)
    assert bytes_of(config().output) == before


def test_an_unfinished_one_is_not_replaced_unasked(config):
    stop = threading.Event()
    stop.set()
    prepare(config(), stop=stop)
    with pytest.raises(UserError, match=r"was not finished\. Go on with it"):
        prepare(config())
    assert not prepare(config(), overwrite=True)["interrupted"]


def test_a_folder_is_one_process_at_a_time(config):
    def again(_):
        with pytest.raises(UserError, match="another process is writing"):
            prepare(config(), resume=True)
        seen.append(1)

    seen: list[int] = []
    prepare(config(), sink=again)
    assert seen


def test_a_mistake_leaves_no_folder(config, tmp_path):
    with pytest.raises(UserError, match="no such file or folder"):
        prepare(config(source=str(tmp_path / "absent.jsonl")))
    with pytest.raises(UserError, match=r"<\|im_start\|>"):
        prepare(config(family="qwen"))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"conversations": []}, r"line 1: no column 'domain'; the columns are 'conversations'"),
        ({"domain": "math"}, r"line 1: no column 'conversations'"),
        (
            {
                "domain": "math",
                "difficulty": "hard",
                "conversations": [{"value": "1"}, {"value": "<think></think>"}],
            },
            r"line 1: difficulty: expected an integer or null, got 'hard'",
        ),
    ],
)
def test_a_source_of_another_form_is_named(row, message, config, tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(row) + "\n")
    with pytest.raises(UserError, match=message):
        prepare(config(source=str(path)))


def test_the_hub_is_streamed_at_one_commit(config, tmp_path, monkeypatch):
    """`datasets` streams the same files here; only where they lie is stood in for."""
    import datasets
    import huggingface_hub

    folder = tmp_path / "hub"
    folder.mkdir()
    whole = openthoughts.write_parquet(folder / "train-0.parquet", ROWS)
    table = pq.read_table(whole)
    pq.write_table(table.slice(0, 2600), folder / "train-0.parquet")
    pq.write_table(table.slice(2600), folder / "train-1.parquet")
    real, asked = datasets.load_dataset, []

    def load(name, **how):
        asked.append((name, how))
        files = sorted(map(str, folder.glob("*.parquet")))
        return real("parquet", data_files=files, split="train", streaming=how["streaming"])

    class Info:
        sha = "c0ffee"

    monkeypatch.setattr(datasets, "load_dataset", load)
    monkeypatch.setattr(
        huggingface_hub.HfApi, "dataset_info", lambda self, name, revision=None: Info
    )
    expected = prepare(config(output=str(tmp_path / "lines")))
    settings = config(source="someone/rows")
    stop = threading.Event()
    stop.set()
    for i in range(3):
        assert prepare(settings, resume=i > 0, stop=stop)["rows"] == 1000 * (i + 1)
    made = prepare(settings, resume=True)
    assert asked[0] == ("someone/rows", {"split": "train", "revision": "c0ffee", "streaming": True})
    assert made["source"] == {"dataset": "someone/rows", "split": "train", "revision": "c0ffee"}
    for split in ("train", "validation"):
        assert rows_of(made["output"], split) == rows_of(expected["output"], split)


STOPPED_ON_THE_HUB = """
import sys, threading, datasets, huggingface_hub
from fastadapt.data.prepare import prepare
from fastadapt.data.selection import PrepareConfig

real, (file, output, tokenizer) = datasets.load_dataset, sys.argv[1:]
datasets.load_dataset = lambda name, **how: real(
    "parquet", data_files=file, split="train", streaming=True
)
huggingface_hub.HfApi.dataset_info = lambda *_, **__: type("Info", (), {"sha": "c0ffee"})
stop = threading.Event()
stop.set()
made = prepare(PrepareConfig("someone/rows", output, tokenizer, max_tokens=60), stop=stop)
assert made["rows"] == 1000
"""


def test_a_stopped_stream_ends_its_process_well(config, tmp_path):
    """Arrow's threads abort a process in which a streamed file is left half read."""
    file = openthoughts.write_parquet(tmp_path / "rows.parquet", ROWS)
    command = [sys.executable, "-c", STOPPED_ON_THE_HUB, file, config().output, config().tokenizer]
    ended = subprocess.run(command, capture_output=True, text=True)
    assert (ended.returncode, ended.stderr) == (0, "")


def test_a_hub_out_of_reach_says_so(config):
    with pytest.raises(UserError, match="as a dataset of the hub"):
        prepare(config(source="nobody/nothing"))
