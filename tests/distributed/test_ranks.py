"""Shares of the ranks, errors that one rank reports, and the command that resumes a run."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from fastadapt.cli.parser import resume_command
from fastadapt.distributed.ranks import ALONE, Ranks, is_lost, lost_reason, should_report
from fastadapt.errors import UserError


@pytest.mark.parametrize("world", [1, 2, 3, 4])
@pytest.mark.parametrize("n", range(10))
def test_every_item_counts_once_and_all_ranks_get_equal_numbers(n: int, world: int) -> None:
    shares = [list(Ranks(rank, world).shard(range(n))) for rank in range(world)]
    assert len({len(share) for share in shares}) == 1
    counted = [item for share in shares for item, counts in share if counts]
    assert sorted(counted) == list(range(n))
    # The order of `interleave`: the first item of each rank, then the second of each.
    interleaved = [shares[rank][i] for i in range(len(shares[0])) for rank in range(world)]
    assert [item for item, counts in interleaved if counts] == list(range(n))
    assert all(counts for _, counts in interleaved[:n])


def test_operations_of_a_single_process_are_the_identity() -> None:
    rows = torch.randn(3, 2)
    assert ALONE.interleave(rows) is rows
    assert ALONE.any(True)
    assert not ALONE.any(False)
    assert ALONE.on_main(lambda: 7) == 7
    ALONE.all_reduce_sum(rows)
    assert torch.equal(ALONE.all_reduce_or(rows > 0), rows > 0)


def test_one_rank_reports_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    error = UserError("x")
    assert should_report(error)
    monkeypatch.setenv("RANK", "1")
    assert not should_report(error)
    error.is_reported = False  # no other rank has raised before
    assert should_report(error)


def test_the_reason_of_a_lost_rank_is_one_sentence() -> None:
    error = RuntimeError(
        "[/src/third_party/gloo/gloo/transport/tcp/pair.cc:553] Connection closed by peer "
        "[127.0.0.1]:26804. This is typically caused by a remote worker crashing."
    )
    assert is_lost(error)
    assert lost_reason(error) == "Connection closed by peer [127.0.0.1]:26804"
    assert not is_lost(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))


def test_the_resume_command_starts_all_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("WORLD_SIZE", 8), ("LOCAL_WORLD_SIZE", 4), ("GROUP_WORLD_SIZE", 2)):
        monkeypatch.setenv(name, str(value))
    torch_2_11 = SimpleNamespace()
    torch_2_12 = SimpleNamespace(shutdown_timeout=None)
    for launcher, option in ((torch_2_11, ""), (torch_2_12, "--shutdown-timeout 600 ")):
        monkeypatch.setattr("torch.distributed.launcher.api.LaunchConfig", launcher)
        assert resume_command(["organism", "--overwrite"]) == (
            f"torchrun --nnodes 2 --nproc-per-node 4 {option}-m fastadapt train organism --resume"
        )
    monkeypatch.setenv("GROUP_WORLD_SIZE", "1")
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert resume_command(["organism"]) == (
        "torchrun --nproc-per-node 4 --shutdown-timeout 600 -m fastadapt train organism --resume"
    )
