"""`fastadapt doctor`: show the hardware and the meaning of `auto`, and check the kernels.

The command downloads no files. `fastadapt.kernels.checks` defines the checks.
"""

from __future__ import annotations

import os
import platform
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from json import dumps
from pathlib import Path
from typing import Any

import torch

from fastadapt.cli.console import print_table
from fastadapt.cli.train import ALLOCATOR, ALLOCATOR_VARIABLES
from fastadapt.errors import RunError
from fastadapt.kernels.checks import notes, run_checks
from fastadapt.models.pair import choose_attention, choose_device

PACKAGES = (
    "fastadapt",
    "torch",
    "triton",
    "transformers",
    "safetensors",
    "datasets",
    "jsonargparse",
)
#: Packages of each extra of this package, and what needs them.
EXTRAS = {
    "eval": (("lm-eval", "math-verify"), "benchmarks of fastadapt eval"),
    "features": (("duckdb", "openai"), "queries over features; language models as judges"),
    "flash": (("flash-attn",), "FlashAttention of GPUs"),
    "lowmem": (("torchao",), "optimizer.moments 8bit, and 16-bit rounding"),
    "peft": (("peft",), "targets that are PEFT folders (LoRA, DoRA)"),
    "tensorboard": (("tensorboard",), "run.sinks tensorboard"),
    "trackio": (("trackio",), "run.sinks trackio"),
    "wandb": (("wandb",), "run.sinks wandb"),
}


def doctor(*, json: bool = False) -> int:
    """Show the hardware, what will be used on it and why, and check the kernels.

    Args:
        json: print JSON
    """
    diagnosis = diagnose()
    if json:
        print(dumps(diagnosis, indent=2))
    else:
        _print_diagnosis(diagnosis)
    return 0 if diagnosis["ok"] else RunError.exit_code


def _print_diagnosis(diagnosis: dict[str, Any]) -> None:
    print_table(["hardware", ""], list(map(list, diagnosis["hardware"].items())), left=True)
    print()
    versions = [[name, text or "not installed"] for name, text in diagnosis["versions"].items()]
    print_table(["package", "version"], versions, left=True)
    print()
    extras = [
        [name, _installed(e["packages"]), e["for"]] for name, e in diagnosis["extras"].items()
    ]
    print_table(["extra", "packages", "for"], extras, left=True)
    print()
    chosen = [[c["what"], c["choice"], c["why"]] for c in diagnosis["choices"]]
    print_table(["setting", "auto means", "because"], chosen, left=True)
    print()
    head = ["kernel", "implementation", "dtype", "device", "cases", "check", "of allowed error"]
    print_table(head, summary(diagnosis["checks"]), left=True)
    for note in diagnosis["notes"]:
        print(f"\n{note}")


def _installed(packages: dict[str, str | None]) -> str:
    return ", ".join(f"{name} {text or 'not installed'}" for name, text in packages.items())


@dataclass(frozen=True)
class Choice:
    """A setting's value on this machine, and the reason."""

    what: str
    choice: str
    why: str


def diagnose(device: str = "auto") -> dict[str, Any]:
    """Return everything that `fastadapt doctor` shows, as plain values.

    Returns:
        ``{"ok": bool, "hardware": {name: text}, "versions": {package: version or None},
        "extras": {extra: {"packages": {package: version or None}, "for": text}}, "choices":
        [Choice as dict], "checks": [Check as dict], "notes": [text]}``; `ok` is true if all checks
        are; the notes name what could not be checked.
    """
    chosen = choose_device(device)
    checks = run_checks(chosen)
    return {
        "ok": all(check.ok for check in checks),
        "hardware": hardware(),
        "versions": versions(),
        "extras": {
            name: {"packages": {package: _version(package) for package in packages}, "for": use}
            for name, (packages, use) in EXTRAS.items()
        },
        "choices": [asdict(choice) for choice in choices(chosen)],
        "checks": [asdict(check) for check in checks],
        "notes": notes(chosen),
    }


def hardware() -> dict[str, str]:
    """Return the processor, its cores, the memory, and the GPUs."""
    page = os.sysconf("SC_PAGE_SIZE")
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    facts = {
        "system": f"{platform.system()} {platform.machine()}",
        "processor": f"{_processor()} ({torch.backends.cpu.get_cpu_capability()})",
        "cores": f"{usable} usable, torch uses {torch.get_num_threads()} threads",
        "memory": f"{os.sysconf('SC_PHYS_PAGES') * page / 2**30:.1f} GiB",
    }
    if not torch.cuda.is_available():
        facts["GPU"] = "none that torch can use"
    for i in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(i)
        facts[f"GPU {i}"] = (
            f"{properties.name}, {properties.total_memory / 2**30:.1f} GiB, "
            f"compute capability {properties.major}.{properties.minor}"
        )
    return facts


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.is_file() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or "unknown processor"


def versions() -> dict[str, str | None]:
    """Return versions of Python, of required packages and of CUDA; None if not installed."""
    installed: dict[str, str | None] = {"python": platform.python_version()}
    installed |= {package: _version(package) for package in PACKAGES}
    installed["cuda (of torch)"] = torch.version.cuda
    return installed


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def choices(device: torch.device) -> list[Choice]:
    """Return what `auto` selects on `device`, for every setting that accepts `auto`."""
    on = device.type
    why = "a GPU is available" if on == "cuda" else "torch finds no GPU"
    chosen = [Choice("pair.device", on, why if on in ("cpu", "cuda") else "requested")]
    for dtype in (torch.float32, torch.bfloat16):
        choice, why = choose_attention("auto", device, dtype)
        chosen.append(Choice(f"pair.attention, {_name(dtype)}", choice, why))
    if on == "cuda":
        chosen.append(_allocator())
    chunks = "never more than a chunk of intermediate values"
    if on == "cuda":
        codes = "codes, behind the library's matrix product, faster than dense where they are few"
        chosen.append(Choice("transcoder", "triton", codes))
        chosen.append(Choice("transcoder, float64", "reference", "the Triton kernels sum in fp32"))
        chosen.append(Choice("linear_kl", "triton", f"{chunks}, read twice and written once"))
        chosen.append(Choice("linear_kl, float64", "chunked", "the Triton kernels sum in fp32"))
        chosen.append(Choice("nmse", "triton", "reads both streams once"))
        chosen.append(Choice("nmse, float64", "chunked", "the Triton kernels sum in fp32"))
    else:
        cpu = Choice("transcoder", "sparse", "on a CPU, work on active features alone is faster")
        other = Choice("transcoder", "reference", f"no other implementation runs on {on}")
        chosen.append(cpu if on == "cpu" else other)
        chosen.append(Choice("linear_kl", "chunked", f"{chunks}; Triton kernels need a GPU"))
        chosen.append(Choice("nmse", "chunked", f"{chunks}; Triton kernels need a GPU"))
    return chosen


def _allocator() -> Choice:
    """Return the settings of the GPU's allocator that `fastadapt train` uses."""
    for name in ALLOCATOR_VARIABLES:
        if name in os.environ:
            return Choice("allocator of train", os.environ[name], f"{name} is set")
    why = "batches differ in length, which fragments segments of a fixed size"
    return Choice("allocator of train", ALLOCATOR, why)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def summary(checks: list[dict[str, Any]]) -> list[list[str]]:
    """Return the checks of :func:`diagnose` as rows: op, implementation, dtype, device, cases,
    result and error; one row for all cases of a kernel in a dtype, or one for each failed case.
    """
    groups: dict[tuple[str, ...], list[dict[str, Any]]] = {}
    for c in checks:
        key = (c["op"], c["implementation"], c["dtype"], c["device"])
        groups.setdefault(key, []).append(c)
    rows = []
    for about, cases in groups.items():
        failed = [c for c in cases if not c["ok"]]
        for c in failed or [max(cases, key=lambda c: c["share"])]:
            worst = ", ".join(filter(None, (c["worst"], c["case"])))
            share = f"{100 * c['share']:.0f}% ({worst})" if c["worst"] else c["case"]
            result = "ok" if c["ok"] else f"FAILED: {c['message']}"
            rows.append([*about, str(len(cases)), result, share])
    return rows
