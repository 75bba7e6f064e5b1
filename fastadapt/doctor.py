"""What this machine is, what will be used on it and why, and whether the kernels are right here.

Nothing is printed and nothing is downloaded. Every check is an op's implementation, run once
forward and backward on random inputs against the op's reference in float64, under the budget of
`fastadapt.kernels.testing`.
"""

from __future__ import annotations

import os
import platform
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastadapt.kernels.linear_kl import linear_kl
from fastadapt.kernels.nmse import nmse
from fastadapt.kernels.testing import error_budget
from fastadapt.kernels.transcoder import transcoder
from fastadapt.pair import choose_attention, choose_device

PACKAGES = (
    "fastadapt",
    "torch",
    "triton",
    "transformers",
    "safetensors",
    "datasets",
    "jsonargparse",
    "flash-attn",
)


@dataclass(frozen=True)
class Choice:
    """Something that will be used on this machine, and the reason."""

    what: str
    choice: str
    why: str


@dataclass(frozen=True)
class Check:
    """One implementation of one op, compared with its reference in float64.

    Attributes:
        share: the largest error as a share of what it may be, over all outputs and gradients; at
            most 1 where `ok`.
        worst: the output or gradient with that error.
        message: why it failed, empty where `ok`.
    """

    op: str
    implementation: str
    dtype: str
    device: str
    ok: bool
    share: float
    worst: str
    message: str = ""


def diagnose(device: str = "auto") -> dict[str, Any]:
    """Everything that `fastadapt doctor` tells, as plain values.

    Returns:
        ``{"ok": bool, "hardware": {name: text}, "versions": {package: version or None},
        "choices": [Choice as dict], "checks": [Check as dict]}``; `ok` if all checks are.
    """
    there = choose_device(device)
    checks = run_checks(there)
    return {
        "ok": all(check.ok for check in checks),
        "hardware": hardware(),
        "versions": versions(),
        "choices": [asdict(choice) for choice in choices(there)],
        "checks": [asdict(check) for check in checks],
    }


def hardware() -> dict[str, str]:
    """The processor, its cores, the memory, and the GPUs."""
    page = os.sysconf("SC_PAGE_SIZE")
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    found = {
        "system": f"{platform.system()} {platform.machine()}",
        "processor": f"{_processor()} ({torch.backends.cpu.get_cpu_capability()})",
        "cores": f"{usable} usable, torch uses {torch.get_num_threads()} threads",
        "memory": f"{os.sysconf('SC_PHYS_PAGES') * page / 2**30:.1f} GiB",
    }
    if not torch.cuda.is_available():
        found["GPU"] = "none that torch can use"
    for i in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(i)
        found[f"GPU {i}"] = (
            f"{properties.name}, {properties.total_memory / 2**30:.1f} GiB, "
            f"compute capability {properties.major}.{properties.minor}"
        )
    return found


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.is_file() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or "unknown processor"


def versions() -> dict[str, str | None]:
    """Versions of Python, of the packages that matter, and of CUDA; None for what is not there."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = None
    found["cuda (of torch)"] = torch.version.cuda
    return found


def choices(device: torch.device) -> list[Choice]:
    """What `auto` means on `device`, for every setting that has it."""
    on = device.type
    why = "a GPU is there" if on == "cuda" else "torch finds no GPU"
    found = [Choice("pair.device", on, why if on in ("cpu", "cuda") else "asked for")]
    for dtype in (torch.float32, torch.bfloat16):
        choice, why = choose_attention("auto", device, dtype)
        found.append(Choice(f"pair.attention, {_name(dtype)}", choice, why))
    if on == "cpu":
        found.append(
            Choice("transcoder", "sparse", "on a CPU, work on active features alone is faster")
        )
    else:
        found.append(Choice("transcoder", "reference", "the Triton kernels are not built yet"))
    for op in ("linear_kl", "nmse"):
        found.append(Choice(op, "chunked", "never more than a chunk of intermediate values"))
    return found


# --- checks ---------------------------------------------------------------------------------------

Outputs = dict[str, Tensor]
Op = Callable[..., Outputs]


def run_checks(device: torch.device) -> list[Check]:
    """Every implementation that runs on `device`, in float32 and bfloat16."""
    return [
        _check(op, run, inputs, implementation, dtype, device)
        for op, run, inputs, implementations in _cases(device)
        for implementation in implementations
        for dtype in (torch.float32, torch.bfloat16)
    ]


def _cases(device: torch.device) -> Iterator[tuple[str, Op, Outputs, tuple[str, ...]]]:
    generator = torch.Generator().manual_seed(0)
    random = partial(torch.randn, generator=generator, dtype=torch.float64)
    adapter = {
        "x": random(48, 32),
        "W_enc": random(96, 32) / 6,
        "b_enc": random(96) - 2,  # few features fire, so that "sparse" is what is tested
        "W_dec": random(96, 32),
        "b_dec": random(32),
    }
    sparse = ("sparse",) if device.type == "cpu" else ()
    yield "transcoder", _transcoder, adapter, ("reference", *sparse)
    heads = {"teacher": random(40, 24), "students": random(2, 40, 24), "head": random(80, 24) / 5}
    yield "linear_kl", _linear_kl, heads, ("reference", "chunked")
    streams = {"x": random(2, 9, 32), "target": random(2, 9, 32)}
    yield "nmse", _nmse, streams, ("reference", "chunked")


def _transcoder(
    implementation: str, x: Tensor, W_enc: Tensor, b_enc: Tensor, W_dec: Tensor, b_dec: Tensor
) -> Outputs:
    out, penalty, _ = transcoder(x, W_enc, b_enc, W_dec, b_dec, implementation=implementation)
    return {"out": out, "penalty": penalty}


def _linear_kl(implementation: str, teacher: Tensor, students: Tensor, head: Tensor) -> Outputs:
    options: dict[str, Any] = {"implementation": implementation, "chunk_tokens": 16}
    return {"kl": linear_kl(teacher, students, head, **options).kl}


def _nmse(implementation: str, x: Tensor, target: Tensor) -> Outputs:
    return {"nmse": nmse(x, target, implementation=implementation).nmse}


def _check(
    op: str,
    run: Op,
    inputs: Outputs,
    implementation: str,
    dtype: torch.dtype,
    device: torch.device,
) -> Check:
    about = (op, implementation, _name(dtype), str(device))
    rounded = {name: value.to(device, dtype) for name, value in inputs.items()}
    oracle = _forward_backward(run, "reference", {n: v.double() for n, v in rounded.items()})
    peer = _forward_backward(run, "reference", rounded)
    try:
        actual = _forward_backward(run, implementation, rounded)
        shares = {name: _share(actual[name], oracle[name], peer[name]) for name in oracle}
    except Exception as error:
        # A kernel that does not run here is a finding, whatever it raises.
        return Check(*about, ok=False, share=float("inf"), worst="", message=_told(error))
    worst = max(shares, key=lambda name: shares[name])
    share = shares[worst]
    message = "" if share <= 1 else f"{worst} is {share:.3g} times as far off as it may be"
    return Check(*about, ok=share <= 1, share=share, worst=worst, message=message)


def _forward_backward(run: Op, implementation: str, inputs: Outputs) -> Outputs:
    """Outputs, and gradients under a random cotangent of each, by name."""
    leaves = {name: value.clone().requires_grad_() for name, value in inputs.items()}
    outputs = run(implementation, **leaves)
    generator = torch.Generator().manual_seed(1)
    cotangents = [
        torch.randn(value.shape, generator=generator, dtype=torch.float64).to(value)
        for value in outputs.values()
    ]
    wanted = [name for name in leaves if name not in ("teacher", "target")]
    gradients = torch.autograd.grad(
        list(outputs.values()), [leaves[name] for name in wanted], cotangents
    )
    named = dict(zip((f"gradient of {name}" for name in wanted), gradients, strict=True))
    return {**{name: value.detach() for name, value in outputs.items()}, **named}


def _share(actual: Tensor, oracle: Tensor, peer: Tensor) -> float:
    """The error as a share of its budget, of the maximum or the RMS, whichever is larger."""
    budget = error_budget(actual, oracle, peer)
    return max(budget.max_error / budget.max_budget, budget.rms_error / budget.rms_budget)


def _told(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
