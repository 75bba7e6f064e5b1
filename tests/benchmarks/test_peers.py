"""Other projects' implementations, if installed, compute the results that the benchmarks expect."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from benchmarks import head_cases, peers, transcoder_steps
from fastadapt.kernels.testing import assert_close

# Peers warn in the interpreter.
pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.mark.parametrize("find", [peers.fla_kl, peers.liger_kl, peers.liger_chunked_kl])
def test_kl_and_its_gradient(find: Callable[[], Any], device: str) -> None:
    peer = find()
    if peer is None:
        pytest.skip("not installed (extra bench)")
    inputs = head_cases.make_inputs(2, 12, 16, 65, torch.float32, device, 0)
    oracle = head_cases.truth(inputs, torch.float64)
    reference = head_cases.truth(inputs, torch.float32)
    for name, value in head_cases.peer_step(inputs, peer.loss).items():
        assert_close(value, oracle[name], reference[name], name=name)


def test_topk_and_its_gradients(device: str) -> None:
    peer = peers.sparsify_topk()
    if peer is None:
        pytest.skip("not installed (extra bench)")
    k = 2
    inputs = transcoder_steps.make_inputs(8, 16, 32, 8, torch.float32, device, 0)
    values, indices = peer.encode(inputs["x"], inputs["W_enc"], inputs["b_enc"], k)
    decoded = peer.decode(indices, values, inputs["W_dec"]) + inputs["b_dec"]
    out = inputs["residual"] + decoded
    results = {"out": out.detach()}
    results |= transcoder_steps.gradients(inputs, [out], [inputs["g"]])
    oracle, reference = (
        transcoder_steps.truth_of_topk(inputs, dtype, k=k, penalised=False)
        for dtype in (torch.float64, torch.float32)
    )
    for name, value in results.items():
        assert_close(value, oracle[name], reference[name], name=name)


def test_missing_peers_have_a_reason() -> None:
    for reason in peers.missing().values():
        assert reason in ("not installed", "installed, but a package that it imports is missing")
