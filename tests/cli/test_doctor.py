"""The doctor tells the truth about this machine, and notices a kernel that is wrong on it."""

import json
import platform

import pytest
import torch

from fastadapt import doctor


def test_all_checks_of_this_machine_pass(fastadapt):
    outcome = fastadapt("doctor", "--json")
    diagnosis = json.loads(outcome.out)
    assert outcome.code == 0, diagnosis["checks"]
    assert diagnosis["ok"]
    assert diagnosis["versions"]["python"] == platform.python_version()
    assert diagnosis["versions"]["torch"] == torch.__version__
    found = {(c["op"], c["implementation"], c["dtype"]) for c in diagnosis["checks"]}
    expected = {("transcoder", "reference"), ("linear_kl", "reference"), ("linear_kl", "chunked")}
    expected |= {("nmse", "reference"), ("nmse", "chunked")}
    if not torch.cuda.is_available():
        expected.add(("transcoder", "sparse"))
    assert found == {(*e, d) for e in expected for d in ("float32", "bfloat16")}
    assert all(0 < c["share"] <= 1 for c in diagnosis["checks"])


def test_the_table_says_what_and_why(fastadapt):
    outcome = fastadapt("doctor")
    assert outcome.code == 0
    for word in ("processor", "memory", "transformers", "pair.attention", "transcoder", "because"):
        assert word in outcome.out


def test_auto_means_what_the_ops_choose():
    from fastadapt.kernels.transcoder import _choose

    for device in ("cpu", "cuda"):
        told = {c.what: c.choice for c in doctor.choices(torch.device(device))}
        assert told["transcoder"] == _choose("auto", device, None)


@pytest.mark.parametrize(
    "wrong",
    [
        lambda real: real._replace(out=real.out * 1.001),
        lambda real: real._replace(out=real.out.detach() + 0 * real.out),  # right, no gradient
        lambda real: real._replace(penalty=real.penalty * 1.001),
        lambda real: real._replace(out=real.out + float("nan")),
    ],
)
def test_a_kernel_that_is_wrong_here_is_found(fastadapt, monkeypatch, wrong):
    right = doctor.transcoder

    def bent(*args, implementation, **kwargs):
        out = right(*args, implementation=implementation, **kwargs)
        return wrong(out) if implementation == "sparse" else out

    monkeypatch.setattr(doctor, "transcoder", bent)
    outcome = fastadapt("doctor", "--json")
    assert outcome.code == 1
    failed = [c for c in json.loads(outcome.out)["checks"] if not c["ok"]]
    assert {c["implementation"] for c in failed} == {"sparse"}
    assert all("times as far off as it may be" in c["message"] for c in failed)
    assert "float32" in {c["dtype"] for c in failed}


def test_a_kernel_that_does_not_run_here_is_found(fastadapt, monkeypatch):
    right = doctor.nmse

    def broken(*args, implementation, **kwargs):
        if implementation == "chunked":
            raise RuntimeError("no kernel image is available\nmore")
        return right(*args, implementation=implementation, **kwargs)

    monkeypatch.setattr(doctor, "nmse", broken)
    outcome = fastadapt("doctor")
    assert outcome.code == 1
    assert "FAILED: RuntimeError: no kernel image is available" in outcome.out
