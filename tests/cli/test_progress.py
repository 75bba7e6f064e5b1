"""Progress is a bar on a terminal and lines elsewhere; problems are printed at once."""

import io

import pytest

from fastadapt.cli.progress import Progress


class Terminal(io.StringIO):
    """A stream that reports to be a terminal."""

    def isatty(self) -> bool:
        return True


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def step(index: int, **more: object) -> dict:
    terms = {"loss": 2.5, "kl": 1.25, "nmse": 0.5, "sparsity": 0.125, "l0": 12.0}
    return {"kind": "train", "step": index, **terms, "tokens_per_s": 4321.0, **more}


def test_a_bar_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "160")  # tqdm cuts the end of a bar that does not fit
    stream = Terminal()
    with Progress(stream) as progress:
        progress.record({"kind": "start", "step": 0, "steps": 4})
        for index in range(1, 5):
            progress.record(step(index))
    last = stream.getvalue().split("\r")[-1]
    for part in ("4/4", "loss 2.5", "KL 1.25", "NMSE 0.5", "penalty 0.125", "L0 12", "4,321 tok/s"):
        assert part in last


def test_a_bar_goes_on_where_the_run_does() -> None:
    stream = Terminal()
    with Progress(stream) as progress:
        progress.record({"kind": "start", "step": 0, "steps": 10})
        progress.record({"kind": "resume", "step": 7, "steps": 10, "passed_over": []})
        progress.record(step(8))
    assert "resuming after step 7 of 10" in stream.getvalue()
    assert "8/10" in stream.getvalue().split("\r")[-1]


def test_a_line_every_so_often_elsewhere() -> None:
    stream, clock = io.StringIO(), Clock()
    with Progress(stream, clock) as progress:
        progress.record({"kind": "start", "step": 0, "steps": 100})
        for index in range(1, 101):
            clock.now += 1.0
            progress.record(step(index))
    lines = stream.getvalue().splitlines()
    assert [line.split()[1] for line in lines] == [
        *(f"{index}/100" for index in (1, 11, 21, 31, 41, 51, 61, 71, 81, 91, 100))
    ]
    assert lines[5].endswith("49 s left")
    assert "\r" not in stream.getvalue()


@pytest.mark.parametrize("stream", [io.StringIO(), Terminal()])
def test_what_goes_wrong_is_said_at_once(stream: io.StringIO) -> None:
    with Progress(stream) as progress:
        damaged = {"path": "checkpoints/step-6", "reason": "flipped bit"}
        progress.record({"kind": "resume", "step": 3, "steps": 9, "passed_over": [damaged]})
        progress.record(
            {"kind": "bad_batch", "step": 4, "ids": [7], "reason": "loss is not finite"}
        )
    assert "passed over checkpoints/step-6: flipped bit" in stream.getvalue()
    assert "step 4: skipped, loss is not finite (rows [7])" in stream.getvalue()


def test_markers_in_the_data_are_said() -> None:
    stream = io.StringIO()
    start = {"kind": "start", "step": 0, "steps": 4, "sequences": 1200}
    Progress(stream).record({**start, "with_markers": 0})
    assert stream.getvalue() == ""
    Progress(stream).record({**start, "with_markers": 3})
    assert stream.getvalue().startswith("training data: 3 of 1,200 texts have special tokens")
    # Of a mixture, each source has its count.
    stream = io.StringIO()
    source = {"bad": 0, "beyond_model": 0, "read": 9, "sequences": 9, "share": 0.5}
    sources = [{**source, "source": name, "with_markers": n} for name, n in (("a", 0), ("b", 3))]
    Progress(stream).record({**start, "with_markers": 3, "sources": sources})
    assert stream.getvalue().splitlines() == [
        "a: 50.0% of the training tokens",
        "b: 50.0% of the training tokens",
        "b: 3 of 9 texts have special tokens in what was said (data.markers)",
    ]


def test_rows_that_are_left_out_and_shares_are_said() -> None:
    stream = io.StringIO()
    source = {"source": "a.jsonl", "bad": 0, "beyond_model": 0, "read": 9, "examples": []}
    sources = [
        {**source, "bad": 2, "examples": ["a.jsonl, line 3: text is empty"], "share": 0.7496},
        {**source, "source": "b.csv", "beyond_model": 1, "share": 0.2504},
    ]
    Progress(stream).record({"kind": "start", "step": 0, "steps": 4, "sources": sources})
    assert stream.getvalue().splitlines() == [
        "a.jsonl: 75.0% of the training tokens",
        "a.jsonl: 2 of 9 rows cannot be read and are left out; the first: "
        "a.jsonl, line 3: text is empty",
        "b.csv: 25.0% of the training tokens",
        "b.csv: 1 of 9 texts are longer than the model can read and are left out",
    ]


def test_rows_of_the_held_out_data_that_are_left_out_are_said() -> None:
    stream = io.StringIO()
    held_out = {"source": "v.jsonl", "read": 9, "bad": 2, "too_long": 3, "beyond_model": 0}
    start = {"kind": "start", "step": 0, "steps": 4, "sources": []}
    Progress(stream).record({**start, "held_out_source": {**held_out, "examples": ["line 1: a"]}})
    assert stream.getvalue().splitlines() == [
        "held-out data, v.jsonl: 2 of 9 rows cannot be read and are left out; the first: line 1: a",
        "held-out data, v.jsonl: 3 of 9 texts have more than data.max_tokens tokens and are left "
        "out",
    ]


def test_what_is_not_read_and_a_family_for_a_template_are_said() -> None:
    stream = io.StringIO()
    source = {"source": "a.jsonl", "bad": 0, "beyond_model": 0, "read": 9, "unread": ["'tools'"]}
    start = {"kind": "start", "step": 0, "steps": 4, "sources": [source]}
    Progress(stream).record({**start, "family": "qwen3", "no_template": "the template drops turns"})
    assert stream.getvalue().splitlines() == [
        "data.family auto is the family qwen3: the template drops turns",
        "a.jsonl: not read: 'tools'",
    ]


def test_held_out_texts_that_are_training_texts_are_said() -> None:
    stream = io.StringIO()
    start = {"kind": "start", "step": 0, "steps": 4, "held_out_sequences": 1200}
    Progress(stream).record({**start, "held_out_in_training": 0})
    assert stream.getvalue() == ""
    Progress(stream).record({**start, "held_out_in_training": 1100})
    (line,) = stream.getvalue().splitlines()
    assert line.startswith("hint: 1,100 of 1,200 held-out sequences are training sequences, too")


def test_numbers_that_are_not_there_are_dashes() -> None:
    stream = io.StringIO()
    with Progress(stream) as progress:
        progress.record({"kind": "start", "step": 0, "steps": 1})
        progress.record(step(1, kl=None))
    assert "KL –" in stream.getvalue()


def reading(rows: int, fraction: float | None) -> dict:
    return {"kind": "read", "rows": rows, "kept": rows // 2, "fraction": fraction}


def test_reading_a_source_is_a_bar_whose_end_is_estimated() -> None:
    stream = Terminal()
    with Progress(stream) as progress:
        progress.record(reading(1000, 0.25))
        progress.record(reading(3000, 0.5))
        last = stream.getvalue().split("\r")[-1]
        progress.record({"kind": "write", "done": 30, "of": 30})
    for part in ("reading", "3000/6000", "1,500 kept"):
        assert part in last
    assert "30/30" in stream.getvalue().split("\r")[-1]


def test_a_source_of_unknown_length_has_a_bar_without_an_end() -> None:
    stream = Terminal()
    with Progress(stream) as progress:
        progress.record(reading(1000, None))
        progress.record(reading(2000, None))
    assert "2000 rows" in stream.getvalue().split("\r")[-1]


def test_reading_elsewhere_is_a_line_now_and_then() -> None:
    stream, clock = io.StringIO(), Clock()
    with Progress(stream, clock) as progress:
        for rows in range(1000, 6000, 1000):
            progress.record(reading(rows, rows / 10_000))
            clock.now += 4.0
        progress.record({"kind": "write", "done": 7, "of": 9})
    assert stream.getvalue().splitlines() == [
        "reading: 1,000 of 10,000 rows  500 kept",
        "reading: 4,000 of 10,000 rows  2,000 kept",
        "writing: 7 of 9 rows",
    ]


@pytest.mark.parametrize("first", [0.5, 4.0, 60.0])
@pytest.mark.parametrize("evaluation", [0.0, 50.0])
def test_the_first_time_left_is_near_the_truth(first: float, evaluation: float) -> None:
    """A run of 200 steps of 1.5 s, evaluated every 50; its first step also compiles."""
    stream, clock = io.StringIO(), Clock()
    took: list[float] = []
    with Progress(stream, clock) as progress:
        progress.record({"kind": "start", "step": 0, "steps": 200})
        for index in range(201):
            if index:
                clock.now += first if index == 1 else 1.5
                progress.record(step(index))
                took.append(clock.now)
            if index % 50 == 0:
                clock.now += evaluation
                values = dict.fromkeys(("kl_adapter", "kl_hybrid", "kl_recovered_vs_hybrid"), 1.0)
                progress.record({"kind": "eval", "step": index, **values})
    lines = [line for line in stream.getvalue().splitlines() if line.endswith(" left")]
    shown = [line for line in lines if not line.endswith("? left")]
    index = int(shown[0].split()[1].split("/")[0])
    assert index < 15
    minutes, seconds = shown[0].split("  ")[-1].removesuffix(" s left").split(" min ")
    left = 60 * int(minutes) + int(seconds)
    assert 0.5 < left / (clock.now - took[index - 1]) < 2


def test_a_hybrid_that_is_the_target_is_said_before_the_first_step() -> None:
    stream = io.StringIO()
    with Progress(stream) as progress:
        for kl in (1.0, 0.0):
            progress.record({"kind": "eval", "step": 0, "kl_hybrid": kl, "kl_adapter": kl})
            assert ("hint: The hybrid's KL" in stream.getvalue()) == (kl == 0)
