"""`fastadapt doctor` describes this machine correctly, and detects a wrong kernel."""

import ast
import json
import platform
import re
import subprocess
import sys
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from fastadapt.cli import doctor
from fastadapt.cli.train import ALLOCATOR_VARIABLES
from fastadapt.kernels import checks as kernel_checks

ROOT = Path(__file__).parents[2]
runs_triton = kernel_checks.runs_triton


@pytest.fixture(autouse=True)
def _not_interpreted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Remove the effect of TRITON_INTERPRET, which must be set whenever triton is imported."""
    monkeypatch.setattr(kernel_checks, "runs_triton", lambda device: device == "cuda")


def test_all_checks_of_this_machine_pass(fastadapt: Callable[..., Any]) -> None:
    outcome = fastadapt("doctor", "--json")
    diagnosis = json.loads(outcome.out)
    assert outcome.code == 0, diagnosis["checks"]
    assert diagnosis["ok"]
    assert diagnosis["versions"]["python"] == platform.python_version()
    assert diagnosis["versions"]["torch"] == version("torch")
    checked = {(c["op"], c["implementation"], c["dtype"]) for c in diagnosis["checks"]}
    expected = {("transcoder", "reference"), ("linear_kl", "reference"), ("linear_kl", "chunked")}
    expected |= {("nmse", "reference"), ("nmse", "chunked")}
    frozen = ("rms_norm", "gated", "rope")
    expected |= {(op, "reference") for op in frozen}
    dtypes = ["float32", "bfloat16"]
    if torch.cuda.is_available():
        dtypes.append("float16")
        expected |= {(op, "triton") for op in ("transcoder", "linear_kl", "nmse", *frozen)}
    else:
        expected.add(("transcoder", "sparse"))
    assert checked == {(*e, d) for e in expected for d in dtypes}
    cases = {c["case"] for c in diagnosis["checks"] if c["op"] == "transcoder"}
    activations = ("relu", "topk", "batch_topk", "jumprelu", "tanh penalty")
    assert cases == {a + p for a in activations for p in ("", ", codes", ", dense")}
    assert all(0 < c["share"] <= 1 for c in diagnosis["checks"])


@pytest.mark.skipif(torch.cuda.is_available(), reason="the kernels run on the GPU")
def test_kernels_that_cannot_run_here_are_named(fastadapt: Callable[..., Any]) -> None:
    outcome = fastadapt("doctor")
    assert "cannot run here and were not checked: they need a GPU" in outcome.out
    assert "device is cpu" in outcome.out


@pytest.mark.skipif(torch.cuda.is_available(), reason="the kernels run on the GPU")
@pytest.mark.filterwarnings("ignore:.* encountered in:RuntimeWarning:triton")  # of masked lanes
@pytest.mark.slow
def test_triton_kernels_are_checked_where_they_are_interpreted(
    fastadapt: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernel_checks, "runs_triton", runs_triton)
    # The interpreter is slow, so only one activation and one dtype of each op are checked.
    monkeypatch.setattr(kernel_checks, "ACTIVATIONS", {"jumprelu": {"bandwidth": 0.5}})
    dtypes = kernel_checks.dtypes
    monkeypatch.setattr(kernel_checks, "dtypes", lambda *about: dtypes(*about)[:1])
    outcome = fastadapt("doctor", "--json")
    diagnosis = json.loads(outcome.out)
    assert outcome.code == 0, diagnosis["checks"]
    chosen = {
        (c["op"], c["implementation"], c["case"])
        for c in diagnosis["checks"]
        if c["implementation"].startswith("triton")
    }
    expected = {("transcoder", "triton", f"jumprelu, {c}") for c in ("codes", "dense")}
    expected |= {(op, "triton", "") for op in ("linear_kl", "nmse", "rope")}
    expected |= {("rms_norm", "triton", name) for name in ("Llama", "Gemma")}
    expected |= {("gated", "triton", name) for name in ("silu", "gelu_tanh")}
    assert chosen == expected
    assert dtypes("triton", "cpu") == (torch.float32, torch.float16)  # no bfloat16
    assert "interpreted on the CPU" in diagnosis["notes"][0]


def test_failures_have_a_row_each_and_the_rest_one_together() -> None:
    good = {"op": "a", "implementation": "i", "dtype": "d", "device": "cpu", "ok": True}
    good |= {"case": "small", "share": 0.1, "worst": "out", "message": ""}
    worse = good | {"case": "", "share": 0.25}
    bad = good | {"dtype": "e", "ok": False, "share": float("inf"), "worst": "", "message": "no"}
    assert doctor.summary(
        [good, worse, good, bad, bad | {"case": "large"}, good | {"dtype": "e"}]
    ) == [
        ["a", "i", "d", "cpu", "3", "ok", "25% (out)"],
        ["a", "i", "e", "cpu", "3", "FAILED: no", "small"],
        ["a", "i", "e", "cpu", "3", "FAILED: no", "large"],
    ]


def test_the_table_says_what_and_why(fastadapt: Callable[..., Any]) -> None:
    outcome = fastadapt("doctor")
    assert outcome.code == 0
    for word in ("processor", "memory", "transformers", "pair.attention", "transcoder", "because"):
        assert word in outcome.out


def test_auto_means_what_the_ops_choose() -> None:
    from fastadapt.kernels.linear_kl import resolve_implementation as resolve_linear_kl
    from fastadapt.kernels.nmse import resolve_implementation as resolve_nmse
    from fastadapt.kernels.transcoder import resolve_implementation as resolve_transcoder

    class On(NamedTuple):
        device: torch.device
        dtype: torch.dtype

    for name in ("cpu", "cuda"):
        device = torch.device(name)
        choices = {c.what: c.choice for c in doctor.choices(device)}
        for dtype, what in ((torch.bfloat16, ""), (torch.float64, ", float64")):
            transcoder = choices.get(f"transcoder{what}", choices["transcoder"])
            on: Any = On(device, dtype)
            assert transcoder == resolve_transcoder("auto", on, None, None)
            softmax = torch.promote_types(dtype, torch.float32)
            linear_kl = choices.get(f"linear_kl{what}", choices["linear_kl"])
            assert linear_kl == resolve_linear_kl("auto", name, softmax)
            nmse = choices.get(f"nmse{what}", choices["nmse"])
            assert nmse == resolve_nmse("auto", name, dtype, dtype)


@pytest.mark.parametrize(
    "wrong",
    [
        lambda real: real._replace(out=real.out * 1.001),
        lambda real: real._replace(out=real.out.detach() + 0 * real.out),  # zero gradient
        lambda real: real._replace(penalty=real.penalty * 1.001),
        lambda real: real._replace(out=real.out + float("nan")),
    ],
)
def test_a_kernel_that_is_wrong_here_is_found(
    fastadapt: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, wrong: Callable[..., Any]
) -> None:
    right = kernel_checks.transcoder

    def bent(*args: Any, implementation: str, **kwargs: Any) -> Any:
        out = right(*args, implementation=implementation, **kwargs)
        return wrong(out) if implementation == "sparse" else out

    monkeypatch.setattr(kernel_checks, "transcoder", bent)
    outcome = fastadapt("doctor", "--json")
    assert outcome.code == 1
    failed = [c for c in json.loads(outcome.out)["checks"] if not c["ok"]]
    assert {c["implementation"] for c in failed} == {"sparse"}
    assert all("times the allowed error" in c["message"] for c in failed)
    assert "float32" in {c["dtype"] for c in failed}


def test_a_kernel_that_does_not_run_here_is_found(
    fastadapt: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    right = kernel_checks.nmse

    def broken(*args: Any, implementation: str, **kwargs: Any) -> Any:
        if implementation == "chunked":
            raise RuntimeError("no kernel image is available\nmore")
        return right(*args, implementation=implementation, **kwargs)

    monkeypatch.setattr(kernel_checks, "nmse", broken)
    outcome = fastadapt("doctor")
    assert outcome.code == 1
    assert "FAILED: RuntimeError: no kernel image is available" in outcome.out


@pytest.mark.parametrize("variable", [None, *ALLOCATOR_VARIABLES])
def test_the_allocator_of_a_run(variable: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """`train` sets it before torch is imported, unless a variable is set; `doctor` shows it."""
    for name in ALLOCATOR_VARIABLES:
        monkeypatch.delenv(name, raising=False)
    if variable is not None:
        monkeypatch.setenv(variable, "backend:native")
    choices = {c.what: c for c in doctor.choices(torch.device("cuda"))}
    shown = choices["allocator of train"]
    program = (
        "import os, sys\n"
        "from fastadapt.cli import train\n"
        "def stop(_):\n"
        "    raise SystemExit(str(dict(os.environ)) if 'torch' not in sys.modules else '')\n"
        "train.parse_train = stop\n"
        "train.train(['organism'])\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False
    )
    environment = ast.literal_eval(done.stderr)
    values = {n: environment[n] for n in ALLOCATOR_VARIABLES if n in environment}
    if variable is None:
        assert values == {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"}
        assert shown.choice == "expandable_segments:True"
    else:
        assert values == {variable: "backend:native"}
        assert (shown.choice, shown.why) == ("backend:native", f"{variable} is set")
    assert "allocator of train" not in {c.what for c in doctor.choices(torch.device("cpu"))}


def test_extras_are_listed_with_what_needs_them(fastadapt: Callable[..., Any]) -> None:
    """Every extra of pyproject.toml that a user may need, and no other."""
    tomllib = pytest.importorskip("tomllib", reason="Python 3.11 reads pyproject.toml")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    declared = {
        extra: tuple(re.split(r"[\[<>=!~]", line)[0] for line in lines)
        for extra, lines in project["optional-dependencies"].items()
        if lines and extra not in ("bench", "dev", "docs")
    }
    assert {extra: packages for extra, (packages, _) in doctor.EXTRAS.items()} == declared
    outcome = fastadapt("doctor")
    for extra, packages in declared.items():
        (line,) = (row for row in outcome.out.splitlines() if row.startswith(f"{extra} "))
        for package in packages:
            try:
                state = version(package)
            except PackageNotFoundError:
                state = "not installed"
            assert f"{package} {state}" in line
