"""Collecting features, held against the forward pass that it rides on and against a plain loop.

Run with ``pytest -s benchmarks/bench_collect.py``: the embedded pair, 512 features a layer, ten of
them active on a token. What is asserted are ratios within one run, on one thread: batches are timed
in turn by each, so that a busy machine disturbs all alike, which it does not where small ops wait
for a second core. ``FASTADAPT_RUN`` names a trained run to take in place of random adapters.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from organism_runs import make_run

from benchmarks.collect_loop import Loop
from benchmarks.timing import peak_bytes
from fastadapt.features.collect import CollectConfig, Shard
from fastadapt.features.collect.collector import begin, empty_stats, open_run, take
from fastadapt.features.collect.feature_stats import FeatureStats
from fastadapt.features.collect.layer_codes import walk
from fastadapt.features.collect.texts import Text, batch_of, batches_of, locate_tokens, read_group
from fastadapt.models.replacement import ReplacementModel

L0 = 10.0
OVER_FORWARD, OVER_LOOP = 0.7, 30.0
LOOPED = 4  # of so many batches one goes through the loop too, at its place in the run
TEXTS = 1000
pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="bounds of a CPU")


class Bench:
    """A run, its batches, and the state that they are collected into."""

    def __init__(self, folder: Path, n: int) -> None:
        given = os.environ.get("FASTADAPT_RUN")
        run = given or str(make_run(folder / "run", n_features=512, l0=L0))
        config = CollectConfig(data="organism/train", n=n)
        opened = open_run(run, config, dtype=None, device="cpu", attention=None)
        prepared = begin(opened, opened.facts(Shard()), Shard(), folder / "store")
        self.opened, self.prepared = opened, prepared
        self.config, self.tokens = config, prepared.tokens
        self.model: ReplacementModel = opened.students.model
        self.tallies = empty_stats(opened, prepared)
        path = folder / "store" / "collecting" / "texts.parquet"
        with pq.ParquetFile(path) as file:
            self.batches = [
                some
                for group in range(file.num_row_groups)
                for some in batches_of(read_group(path, file, group), config.batch_tokens)
            ]

    @property
    def tally(self) -> FeatureStats:
        """Of the adapter."""
        return self.tallies["adapter"]

    @torch.no_grad()
    def forward(self, texts: list[Text]) -> None:
        """The replacement model's blocks alone."""
        batch = batch_of(texts)
        inputs = self.model.block_inputs(batch.input_ids, batch.attention_mask)
        padding = None if batch.attention_mask is None else ~batch.real
        hidden = inputs.hidden
        for layer in range(self.model.n_layers):
            arguments = inputs.arguments[layer]
            hidden, _ = self.model.block(layer, hidden, arguments, "replacement", padding=padding)

    def collect(self, texts: list[Text]) -> None:
        """The same, with everything that collecting does."""
        take(self.model, self.tallies, {}, texts, self.prepared.domains)


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


def test_collecting_over_the_forward_pass(benchmark: Any, bench: Bench) -> None:
    pairs: list[tuple[float, float]] = []

    def run() -> None:
        for some in bench.batches:
            pairs.append((timed(bench.forward, some), timed(bench.collect, some)))

    for some in bench.batches[:2]:  # warm-up
        bench.forward(some)
    benchmark.pedantic(run, rounds=1)
    alone, collecting = (sum(seconds) for seconds in zip(*pairs, strict=True))
    found = {
        "tokens": bench.tokens,
        "l0": float(bench.tally.counts.sum()) / bench.tokens / bench.model.n_layers,
        "forward_tokens_per_s": bench.tokens / alone,
        "collecting_tokens_per_s": bench.tokens / collecting,
        "over_forward": alone / collecting,
        "over_forward_median_of_batches": statistics.median(a / c for a, c in pairs),
    }
    tell(benchmark, found)
    assert found["over_forward"] >= OVER_FORWARD


def test_collecting_over_a_plain_loop(benchmark: Any, bench: Bench) -> None:
    tally = empty_stats(bench.opened, bench.prepared)["adapter"]
    loop, n_features = Loop(bench.config), bench.model.n_features
    seconds, codes_met = {"ours": 0.0, "loop": 0.0}, {"ours": 0, "loop": 0}

    def run() -> None:
        for i, some in enumerate(bench.batches):
            batch = batch_of(some)
            at = locate_tokens(some, bench.prepared.domains, bench.config, torch.device("cpu"))
            for layer, found in walk(bench.model, batch, {}):
                codes = found["adapter"]
                seconds["ours"] += timed(tally.add, layer, codes, at)
                codes_met["ours"] += len(codes.values)
                if i % LOOPED == 0:
                    dense = torch.zeros(batch.input_ids.numel(), n_features)
                    dense[codes.tokens, codes.features] = codes.values
                    dense = dense.view(*batch.input_ids.shape, n_features)
                    seconds["loop"] += timed(loop.add, layer, codes, some, dense)
                    codes_met["loop"] += len(codes.values)

    benchmark.pedantic(run, rounds=1)
    each = {who: seconds[who] / codes_met[who] for who in seconds}
    found = {
        "activations": codes_met["ours"],
        "ns_each": each["ours"] * 1e9,
        "ns_each_in_a_loop": each["loop"] * 1e9,
        "over_loop": each["loop"] / each["ours"],
    }
    tell(benchmark, found)
    assert found["over_loop"] >= OVER_LOOP


def test_memory_is_flat_in_tokens(benchmark: Any, tmp_path: Path) -> None:
    """At 1 and 8 times the tokens: bytes of the state, and the most that any batch allocates."""
    found: list[dict[str, float]] = []

    def run() -> None:
        for n in (TEXTS // 8, TEXTS):
            (tmp_path / str(n)).mkdir()
            bench = Bench(tmp_path / str(n), n)
            peaks = [_peak(bench, some) for some in bench.batches]
            tensors = [t for tally in bench.tallies.values() for t in tally.tensors().values()]
            state = sum(tensor.nbytes for tensor in tensors)
            found.append({"tokens": bench.tokens, "state_bytes": state, "batch_bytes": max(peaks)})

    benchmark.pedantic(run, rounds=1)
    tell(benchmark, {f"{key}_{i}": v for i, f in enumerate(found) for key, v in f.items()})
    once, eight = found
    assert eight["tokens"] > 7 * once["tokens"]
    assert eight["state_bytes"] == once["state_bytes"]
    assert eight["batch_bytes"] <= 1.1 * once["batch_bytes"]


def _peak(bench: Bench, texts: list[Text]) -> int:
    return peak_bytes(lambda: bench.collect(texts), "cpu")[0]


def tell(benchmark: Any, found: dict[str, float]) -> None:
    """Record and print what was found."""
    benchmark.extra_info |= {**found, "threads": torch.get_num_threads()}
    print("\n" + ", ".join(f"{key} {value:.4g}" for key, value in found.items()))
