"""What is dealt out, what is reported, and by which rank."""

from __future__ import annotations

import pytest
import torch

from fastadapt.cli.parser import resume_command
from fastadapt.distributed.ranks import ALONE, Ranks, is_lost, lost_reason, should_report
from fastadapt.errors import UserError


@pytest.mark.parametrize("world", [1, 2, 3, 4])
@pytest.mark.parametrize("n", range(10))
def test_every_item_counts_once_and_every_rank_gets_as_many(n: int, world: int) -> None:
    hands = [list(Ranks(rank, world).shard(range(n))) for rank in range(world)]
    assert len({len(hand) for hand in hands}) == 1
    counted = [item for hand in hands for item, counts in hand if counts]
    assert sorted(counted) == list(range(n))
    # In the order of `interleave`: the first of each hand, then the second of each.
    dealt = [hands[rank][i] for i in range(len(hands[0])) for rank in range(world)]
    assert [item for item, counts in dealt if counts] == list(range(n))
    assert all(counts for _, counts in dealt[:n])


def test_alone_everything_is_as_it_was() -> None:
    rows = torch.randn(3, 2)
    assert ALONE.interleave(rows) is rows
    assert ALONE.any(True)
    assert not ALONE.any(False)
    assert ALONE.on_main(lambda: 7) == 7
    ALONE.all_reduce_sum(rows)
    assert torch.equal(ALONE.all_reduce_or(rows > 0), rows > 0)


def test_an_error_of_the_run_is_reported_by_one(monkeypatch) -> None:
    error = UserError("x")
    assert should_report(error)
    monkeypatch.setenv("RANK", "1")
    assert not should_report(error)
    error.is_reported = False  # the first of the run's processes to meet one
    assert should_report(error)


def test_what_gloo_says_of_a_lost_rank() -> None:
    said = RuntimeError(
        "[/src/third_party/gloo/gloo/transport/tcp/pair.cc:553] Connection closed by peer "
        "[127.0.0.1]:26804. This is typically caused by a remote worker crashing."
    )
    assert is_lost(said)
    assert lost_reason(said) == "Connection closed by peer [127.0.0.1]:26804"
    assert not is_lost(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))


def test_a_run_of_several_goes_on_as_several(monkeypatch) -> None:
    for name, value in (("WORLD_SIZE", 8), ("LOCAL_WORLD_SIZE", 4), ("GROUP_WORLD_SIZE", 2)):
        monkeypatch.setenv(name, str(value))
    assert resume_command(["organism", "--overwrite"]) == (
        "torchrun --nnodes 2 --nproc-per-node 4 -m fastadapt train organism --resume"
    )
    monkeypatch.setenv("GROUP_WORLD_SIZE", "1")
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert resume_command(["organism"]) == (
        "torchrun --nproc-per-node 4 -m fastadapt train organism --resume"
    )
