"""Prefetching by worker processes returns the same batches in the same steps, and ends."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

from fastadapt.distributed.ranks import ALONE, Ranks
from fastadapt.errors import RunError, UserError
from fastadapt.training.config import FREE_ON_RESUME, TrainConfig
from fastadapt.training.prefetch import BatchPrefetcher
from fastadapt.training.step_data import StepData
from fastadapt.training.trainer import train

CPU = torch.device("cpu")


@pytest.fixture
def make_feed(tiny_config: Callable, tiny_pair: Path) -> Iterator[Callable[..., StepData]]:
    tokenizer = AutoTokenizer.from_pretrained(tiny_pair / "target")
    feeds: list[StepData] = []

    def make(**changes: object) -> StepData:
        feeds.append(StepData(tiny_config(**changes), tokenizer, CPU, ALONE, len(tokenizer)))
        return feeds[-1]

    yield make
    for feed in feeds:
        feed.close()


def children() -> set[int]:
    path = Path(f"/proc/self/task/{os.getpid()}/children")
    return set(map(int, path.read_text().split()))


def batches_of(feed: StepData, step: int) -> list:
    return [feed.batch(feed.train, ids) for ids in feed.micro_batches(step)]


def same(one: list, other: list) -> bool:
    def equal(x: torch.Tensor | None, y: torch.Tensor | None) -> bool:
        return x is y if x is None or y is None else torch.equal(x, y)

    return len(one) == len(other) and all(
        n == m and all(map(equal, a[:3], b[:3])) for (a, n), (b, m) in zip(one, other, strict=True)
    )


@pytest.mark.parametrize("accumulation", [1, 3])
@pytest.mark.parametrize("workers", [1, 2])
def test_workers_return_the_batches_of_a_step_without_workers(
    make_feed: Callable[..., StepData], accumulation: int, workers: int
) -> None:
    how = {"optimizer.accumulation": accumulation, "optimizer.epochs": 3}
    alone, ahead = make_feed(**how), make_feed(**how, **{"data.workers": workers})
    assert alone.steps == ahead.steps
    for step in range(alone.steps):
        assert same(batches_of(alone, step), batches_of(ahead, step))


@pytest.mark.parametrize("workers", [0, 1])
def test_widths_include_the_padding(make_feed: Callable[..., StepData], workers: int) -> None:
    how = {"optimizer.batch_size": 1, "optimizer.accumulation": 2, "data.workers": workers}
    plain, feed = make_feed(**how), make_feed(**how, **{"data.pad_to": 16})
    for step in range(feed.steps):
        micro_batches = feed.micro_batches(step)
        batches, widths = batches_of(feed, step), feed.widths(micro_batches)
        assert [batch.input_ids.shape[1] for batch, _ in batches] == widths
        assert {width % 16 for width in widths} == {0}
        longest = plain.widths(plain.micro_batches(step))
        assert [n for _, n in batches] == longest  # tokens without padding
        assert all(0 <= wide - n < 16 for wide, n in zip(widths, longest, strict=True))
    held_out = [batch.input_ids.shape[1] for batch in feed.held_out_batches()]
    assert feed.largest_width >= max(held_out)
    assert feed.largest_width % 16 == 0
    assert feed.first_batch().input_ids.shape[1] == feed.widths(feed.micro_batches(0))[0]


def test_batches_on_a_cpu_pass_their_mask(make_feed: Callable[..., StepData]) -> None:
    """A CPU has the bits of before; one sequence has neither padding nor a mask."""
    feed = make_feed(**{"optimizer.batch_size": 3})
    batch, _ = batches_of(feed, 0)[0]
    assert batch.attention_mask is not None
    assert batch.model_mask is batch.attention_mask
    assert batch.input_ids.shape[1] == max(batch.real.sum(1))
    alone = make_feed(**{"optimizer.batch_size": 1})
    assert batches_of(alone, 0)[0][0].attention_mask is None


def test_batches_are_collated_by_the_workers(
    make_feed: Callable[..., StepData], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Remove the function that collates in this process; no step needs it."""
    from fastadapt.training import step_data as module

    feed = make_feed(**{"data.workers": 1})
    before = children()
    monkeypatch.setattr(module, "make_batch", None)
    for step in range(feed.steps):
        assert len(batches_of(feed, step)) == 1
    assert len(children() - before) <= 1


def test_repeated_and_skipped_steps_get_their_batches(make_feed: Callable[..., StepData]) -> None:
    """A step whose layout overflowed is repeated; a resumed run begins at any step."""
    how = {"optimizer.epochs": 4, "optimizer.batch_size": 1}
    alone, ahead = make_feed(**how), make_feed(**how, **{"data.workers": 2})
    for step in (5, 5, 6, 6, 7, 50, 51, 3, 3, 4, 95, 0):
        assert same(batches_of(alone, step), batches_of(ahead, step)), step


def test_batches_that_were_not_prefetched_are_collated_on_request(
    make_feed: Callable[..., StepData],
) -> None:
    alone, ahead = make_feed(), make_feed(**{"data.workers": 1})
    ahead.micro_batches(0)
    alone.micro_batches(0)
    for ids in ([0], [3, 1], [2, 2]):
        assert same([alone.batch(alone.train, ids)], [ahead.batch(ahead.train, ids)])
    assert same(batches_of(alone, 1), batches_of(ahead, 1))


def test_a_rank_prefetches_only_its_share(
    tiny_config: Callable[..., TrainConfig], tiny_pair: Path
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_pair / "target")
    config = tiny_config(**{"optimizer.accumulation": 4, "data.workers": 1})
    ranks = Ranks(1, 2)
    feed = StepData(config, tokenizer, CPU, ranks, len(tokenizer))
    returned: list[Any] = []
    prefetcher: Any = feed.prefetcher
    real = prefetcher.get

    def get(*request: Any) -> Any:
        returned.append(real(*request))
        return returned[-1]

    prefetcher.get = get
    for step in range(feed.steps):
        for ids, _ in ranks.shard(feed.micro_batches(step)):
            feed.batch(feed.train, ids)
    feed.close()
    assert returned
    assert None not in returned


def test_a_killed_worker_is_reported_when_its_batch_is_requested(
    make_feed: Callable[..., StepData],
) -> None:
    """Torch's handler of SIGCHLD, which may raise anywhere in a step, does not report it."""
    handler = signal.getsignal(signal.SIGCHLD)
    before = children()
    feed = make_feed(**{"data.workers": 2, "optimizer.epochs": 50})
    batches_of(feed, 0)
    os.kill(min(children() - before), signal.SIGKILL)
    time.sleep(0.5)  # longer than the signal needs
    with pytest.raises(RunError, match=r"data\.workers was killed.*--resume"):
        [batches_of(feed, step) for step in range(1, feed.steps)]
    assert children() == before
    assert signal.getsignal(signal.SIGCHLD) == handler


def test_workers_end_with_the_feed(make_feed: Callable[..., StepData]) -> None:
    feed = make_feed(**{"data.workers": 2, "optimizer.epochs": 50})
    before = children()
    batches_of(feed, 0)
    assert len(children() - before) == 2
    feed.close()
    assert children() == before
    feed.close()


@pytest.mark.slow
def test_a_run_with_workers_writes_the_same_bits(
    tiny_config: Callable[..., TrainConfig], tmp_path: Path
) -> None:
    """A run may be resumed with another number of workers."""
    assert "data.workers" in FREE_ON_RESUME
    before = children()
    for name, first, then in (("none", 0, 0), ("two", 2, 2), ("mixed", 2, 0)):
        output = {"run.output": str(tmp_path / name), "data.bucket": 3}
        stop = _StopAfter(5)
        train(tiny_config(**output, **{"data.workers": first}), sinks=[stop], stop=stop.event)
        train(tiny_config(**output, **{"data.workers": then}), resume=True)
    assert children() == before
    weights = [
        [(tmp_path / name / "adapter" / f"layer_{i}.safetensors").read_bytes() for i in range(2)]
        for name in ("none", "two", "mixed")
    ]
    assert weights[0] == weights[1] == weights[2]


class _StopAfter:
    def __init__(self, step: int) -> None:
        import threading

        self.event, self._step = threading.Event(), step

    def __call__(self, record: dict) -> None:
        if record["kind"] == "train" and record["step"] == self._step:
            self.event.set()


def test_buckets_train_on_every_sequence_once(make_feed: Callable[..., StepData]) -> None:
    feed = make_feed(**{"data.bucket": 4, "optimizer.batch_size": 5})
    seen = [i for step in range(feed.steps) for ids in feed.micro_batches(step) for i in ids]
    assert sorted(seen) == list(range(len(feed.train)))
    plain = make_feed(**{"optimizer.batch_size": 5})
    assert [feed.micro_batches(s) for s in range(5)] != [plain.micro_batches(s) for s in range(5)]


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("data.bucket", 0, "data.bucket: expected 1 or more, got 0"),
        ("data.pad_to", 0, "data.pad_to: expected at least 1 or null, got 0"),
        ("data.workers", -1, "data.workers: expected 0 or more, got -1"),
    ],
)
def test_impossible_values_are_refused(
    tiny_config: Callable[..., TrainConfig], key: str, value: int, message: str
) -> None:
    with pytest.raises(UserError, match=message):
        tiny_config(**{key: value})


@pytest.mark.slow
@pytest.mark.parametrize(
    "number", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)]
)
def test_a_signal_to_all_processes_saves_and_ends_without_warnings(
    number: int, tiny_config: Callable[..., TrainConfig], tmp_path: Path
) -> None:
    """Ctrl-C reaches the workers too. After the run no process remains."""
    from fastadapt.training.config import save_config

    rows = tmp_path / "train.jsonl"
    draw = random.Random(0)
    words = [f"w{i}" for i in range(56)]
    turns = [
        [{"from": who, "value": " ".join(draw.choices(words, k=9))} for who in ("user", "gpt")]
        for _ in range(4000)
    ]
    rows.write_text("".join(json.dumps({"conversations": t}) + "\n" for t in turns))
    config = tiny_config(**{"data.workers": 2, "data.train": str(rows), "run.eval_every": 0})
    save_config(config, tmp_path / "run.yaml")
    code = "import sys; from fastadapt.cli.main import main; sys.exit(main())"
    command = [sys.executable, "-c", code, "train", str(tmp_path / "run.yaml")]
    environment = {k: v for k, v in os.environ.items() if k != "TOKENIZERS_PARALLELISM"}
    run = subprocess.Popen(
        command,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    metrics = Path(config.run.output) / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while not (metrics.exists() and '"train", "step": 3,' in metrics.read_text()):
        assert run.poll() is None, run.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.05)
    os.killpg(run.pid, number)
    out, err = run.communicate(timeout=60)
    assert run.returncode == 0, err
    assert "Stopped at step" in out
    for word in ("Traceback", "Warning", "warning", "fork", "KeyboardInterrupt"):
        assert word not in err
    with pytest.raises(ProcessLookupError):
        os.killpg(run.pid, 0)


def test_the_prefetcher_gives_requested_batches_only(make_feed: Callable[..., StepData]) -> None:
    feed = make_feed(**{"data.workers": 1})
    prefetcher = feed.prefetcher
    assert isinstance(prefetcher, BatchPrefetcher)
    first = feed.micro_batches(0)[0]
    assert prefetcher.get(0, first[::-1]) is None
    assert prefetcher.get(0, first) is not None
    assert prefetcher.get(0, first) is None
    assert prefetcher.get(1, feed.micro_batches(1)[0]) is not None


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("workers", [0, 2])
def test_a_gpu_is_not_waited_for(
    workers: int, tiny_config: Callable[..., TrainConfig], tiny_pair: Path
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_pair / "target")
    gpu = torch.device("cuda")
    feed = StepData(tiny_config(**{"data.workers": workers}), tokenizer, gpu, ALONE, len(tokenizer))
    alone = StepData(tiny_config(**{"data.pad_to": 128}), tokenizer, CPU, ALONE, len(tokenizer))
    batches_of(feed, 0)
    torch.cuda.set_sync_debug_mode("error")
    try:
        by_step = [batches_of(feed, step) for step in range(feed.steps)]
    finally:
        torch.cuda.set_sync_debug_mode("default")
        feed.close()
    for step, batches in enumerate(by_step):
        assert all(batch.model_mask is None for batch, _ in batches)
        assert same([(batch.to("cpu"), n) for batch, n in batches], batches_of(alone, step))


@pytest.mark.parametrize("workers", [0, 1])
def test_a_padding_token_without_an_embedding(
    workers: int, tiny_config: Callable[..., TrainConfig], tiny_pair: Path
) -> None:
    """All ids of a batch have an embedding, and the texts are those of another padding token."""
    tokenizer = AutoTokenizer.from_pretrained(tiny_pair / "target")
    n_rows, config = len(tokenizer), tiny_config(**{"data.workers": workers})
    plain = StepData(config, tokenizer, CPU, ALONE, n_rows)
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    assert tokenizer.pad_token_id == n_rows
    feed = StepData(config, tokenizer, CPU, ALONE, n_rows)
    padded = 0
    try:
        for step in range(4):
            for (ours, n), (theirs, m) in zip(
                batches_of(feed, step), batches_of(plain, step), strict=True
            ):
                assert n == m
                assert int(ours.input_ids.max()) < n_rows
                padded += int((~ours.real).sum())
                for a, b in ((ours.input_ids, theirs.input_ids), (ours.labels, theirs.labels)):
                    assert torch.equal(a[ours.real], b[ours.real])
        assert padded
    finally:
        feed.close()
        plain.close()


def test_tokens_without_an_embedding_are_refused(
    tiny_config: Callable[..., TrainConfig], tiny_pair: Path
) -> None:
    """The error names the first row with such a token and is raised before the first step."""
    tokenizer = AutoTokenizer.from_pretrained(tiny_pair / "target")
    feed = StepData(tiny_config(), tokenizer, CPU, ALONE, len(tokenizer))
    most = [int(feed.train[i].input_ids.max()) for i in range(len(feed.train))]
    n_rows = max(most)
    row = feed.train.rows[most.index(n_rows)] + 1
    message = rf"row {row}: expected tokens below {n_rows}, .* got token {n_rows}"
    with pytest.raises(UserError, match=message):
        StepData(tiny_config(), tokenizer, CPU, ALONE, n_rows)
