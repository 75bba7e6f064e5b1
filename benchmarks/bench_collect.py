"""Compare collecting features with the forward pass alone and with a plain Python loop.

Run with ``pytest -s benchmarks/bench_collect.py``. The benchmark uses the embedded pair with 512
features per layer and an L0 of ten. Assertions are about ratios within one run. Both sides time
each batch in turn, so that other load disturbs both equally. One thread is used, since small ops
would wait for a busy second core. ``FASTADAPT_RUN`` names a trained run to use instead of random
adapters.
"""

from __future__ import annotations

import functools
import os
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from organism_runs import make_run

from benchmarks.bounds import limit
from benchmarks.collect_loop import Loop
from benchmarks.timing import peak_bytes
from fastadapt.features.collect import CollectConfig, Shard
from fastadapt.features.collect.collector import begin, empty_stats, open_run, take
from fastadapt.features.collect.layer_codes import walk
from fastadapt.features.collect.texts import Text, batch_of, batches_of, locate_tokens, read_group

LOOPED = 4  # the loop processes one batch of this many
TEXTS = 1000
pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="bounds of a CPU")


class Bench:
    """A run, its batches, and the state of a collection."""

    def __init__(self, folder: Path, n: int) -> None:
        folder.mkdir(exist_ok=True)
        run = os.environ.get("FASTADAPT_RUN") or make_run(folder / "run", n_features=512, l0=10.0)
        self.config = CollectConfig(data="organism/train", n=n, scales=False)
        options: dict[str, Any] = {"dtype": None, "device": "cpu", "attention": None}
        options["trust_remote_code"] = False
        self.opened = open_run(str(run), self.config, **options)
        facts = self.opened.facts(Shard())
        self.prepared = begin(self.opened, facts, Shard(), folder / "store")
        self.tokens, self.model = self.prepared.tokens, self.opened.students.model
        self.tallies = empty_stats(self.opened, self.prepared)
        with_scales = replace(self.opened, config=replace(self.opened.config, scales=True))
        self.with_scales = empty_stats(with_scales, self.prepared)
        path = folder / "store" / "collecting" / "texts.parquet"
        with pq.ParquetFile(path) as file:
            self.batches = [
                texts
                for group in range(file.num_row_groups)
                for texts in batches_of(read_group(path, file, group), self.config.batch_tokens)
            ]

    @torch.no_grad()
    def forward(self, texts: list[Text]) -> None:
        """Run the replacement model's blocks alone."""
        batch = batch_of(texts)
        inputs = self.model.block_inputs(batch.input_ids, batch.attention_mask)
        padding = None if batch.attention_mask is None else ~batch.real
        hidden = inputs.hidden
        for layer in range(self.model.n_layers):
            arguments = inputs.arguments[layer]
            hidden, _ = self.model.block(layer, hidden, arguments, "replacement", padding=padding)

    def collect(self, texts: list[Text], *, scales: bool = False) -> None:
        """Run the blocks and collect features, with scales or without."""
        tallies = self.with_scales if scales else self.tallies
        take(self.model, tallies, {}, texts, self.prepared.domains)


def timed(step: Callable[..., Any], *args: Any) -> float:
    start = time.perf_counter()
    step(*args)
    return time.perf_counter() - start


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    return Bench(tmp_path_factory.mktemp("bench"), TEXTS)


@pytest.fixture
def report(benchmark: Any) -> Callable[[dict[str, float]], None]:
    """Return a function that records figures and prints them."""

    def record(figures: dict[str, float]) -> None:
        benchmark.extra_info |= {**figures, "threads": torch.get_num_threads()}
        print("\n" + ", ".join(f"{key} {value:.4g}" for key, value in figures.items()))

    return record


def test_collecting_over_the_forward_pass(benchmark: Any, bench: Bench, report: Any) -> None:
    with_scales = functools.partial(bench.collect, scales=True)
    steps = (bench.forward, bench.collect, with_scales)
    seconds: list[list[float]] = []

    def run() -> None:
        for texts in bench.batches:
            seconds.append([timed(step, texts) for step in steps])

    for texts in bench.batches[:2]:  # warm-up
        bench.forward(texts)
    benchmark.pedantic(run, rounds=1)
    alone, collecting, scaling = (sum(each) for each in zip(*seconds, strict=True))
    codes = float(bench.tallies["adapter"].counts.sum())
    report(
        {
            "tokens": bench.tokens,
            "l0": codes / bench.tokens / bench.model.n_layers,
            "forward_tokens_per_s": bench.tokens / alone,
            "collecting_tokens_per_s": bench.tokens / collecting,
            "over_forward": alone / collecting,
            "over_forward_median_of_batches": statistics.median(a / c for a, c, _ in seconds),
            "with_scales_over_without": scaling / collecting,
        }
    )
    assert alone / collecting >= limit("collecting over the forward pass")


def test_collecting_over_a_plain_loop(benchmark: Any, bench: Bench, report: Any) -> None:
    tally = empty_stats(bench.opened, bench.prepared)["adapter"]
    loop, n_features = Loop(bench.config), bench.model.n_features
    seconds, n_codes = {"ours": 0.0, "loop": 0.0}, {"ours": 0, "loop": 0}

    def run() -> None:
        for i, texts in enumerate(bench.batches):
            batch = batch_of(texts)
            places = locate_tokens(texts, bench.prepared.domains, bench.config, torch.device("cpu"))
            for layer, by_kind in walk(bench.model, batch, {}):
                codes = by_kind["adapter"]
                seconds["ours"] += timed(tally.add, layer, codes, places)
                n_codes["ours"] += len(codes.values)
                if i % LOOPED == 0:
                    dense = torch.zeros(batch.input_ids.numel(), n_features)
                    dense[codes.tokens, codes.features] = codes.values
                    dense = dense.view(*batch.input_ids.shape, n_features)
                    seconds["loop"] += timed(loop.add, layer, codes, texts, dense)
                    n_codes["loop"] += len(codes.values)

    benchmark.pedantic(run, rounds=1)
    ours, plain = (seconds[key] / n_codes[key] for key in ("ours", "loop"))
    figures = {"activations": n_codes["ours"], "ns_each": ours * 1e9}
    report(figures | {"ns_each_in_a_loop": plain * 1e9, "over_loop": plain / ours})
    assert plain / ours >= limit("collecting over a Python loop")


def test_memory_is_flat_in_tokens(benchmark: Any, tmp_path: Path, report: Any) -> None:
    """Compare the state's bytes and the largest peak of a batch at 1 and 8 times the tokens."""
    sizes: list[dict[str, float]] = []

    def run() -> None:
        for n in (TEXTS // 8, TEXTS):
            bench = Bench(tmp_path / str(n), n)
            collects = [functools.partial(bench.collect, texts) for texts in bench.batches]
            peaks = [peak_bytes(collect, "cpu")[0] for collect in collects]
            tensors = [t for tally in bench.tallies.values() for t in tally.tensors().values()]
            state = sum(tensor.nbytes for tensor in tensors)
            sizes.append({"tokens": bench.tokens, "state_bytes": state, "batch_bytes": max(peaks)})

    benchmark.pedantic(run, rounds=1)
    report({f"{key}_{i}": value for i, size in enumerate(sizes) for key, value in size.items()})
    once, eight = sizes
    assert eight["tokens"] > 7 * once["tokens"]
    assert eight["state_bytes"] == once["state_bytes"]
    growth = limit("batch memory at 8 times the tokens")
    assert eight["batch_bytes"] <= growth * once["batch_bytes"]
