"""Other projects' implementations mean what the benchmarks take them to mean, where installed."""

import pytest
import torch

from benchmarks import head_cases, peers, transcoder_steps
from fastadapt.kernels.testing import assert_close

# The kernels run in the interpreter; what peers warn of is theirs.
pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.mark.parametrize("find", [peers.fla_kl, peers.liger_kl, peers.liger_chunked_kl])
def test_the_kl_of_teacher_and_student_and_its_gradient(find, device):
    peer = find()
    if peer is None:
        pytest.skip("not installed (extra bench)")
    inputs = head_cases.make_inputs(2, 12, 16, 65, torch.float32, device, 0)
    oracle = head_cases.truth(inputs, torch.float64)
    own = head_cases.truth(inputs, torch.float32)
    for name, value in head_cases.peer_step(inputs, peer.loss).items():
        assert_close(value, oracle[name], own[name], name=name)


def test_the_largest_k_and_their_gradients(device):
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
    wide, own = (
        transcoder_steps.truth_of_topk(inputs, dtype, k=k, penalised=False)
        for dtype in (torch.float64, torch.float32)
    )
    for name, value in results.items():
        assert_close(value, wide[name], own[name], name=name)


def test_what_is_missing_says_why():
    for reason in peers.missing().values():
        assert reason in ("not installed", "installed, but a package that it imports is not")
