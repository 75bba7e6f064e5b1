"""What a result depends on, recorded with it: commit, versions, hardware."""

from __future__ import annotations

import hashlib
import importlib.metadata
import os
import platform
import subprocess
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

__all__ = ["describe"]

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = (
    "torch",
    "triton",
    "numpy",
    "transformers",
    "eai-sparsify",
    "fla-core",
    "liger-kernel",
    "fastadapt",
)


def describe(device: str, commit: str | None = None) -> dict[str, Any]:
    """``commit`` is for a checkout without its history; the digest of the sources needs none."""
    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "commit": commit or _git("rev-parse", "HEAD"),
        "changed": bool(_git("status", "--porcelain", "--", "kernels", "fastadapt", "benchmarks")),
        "sources": _digest(),
        "versions": {"python": platform.python_version(), **_versions()},
        "hardware": _hardware(device),
    }


def _git(*arguments: str) -> str | None:
    try:
        command = ["git", "-C", str(ROOT), *arguments]
        result = subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return None
    return result.stdout.strip() if result.returncode == 0 else None


def _digest() -> str:
    """SHA-256 over the sources of the kernels and benchmarks, names included."""
    digest = hashlib.sha256()
    for folder in ("kernels", "fastadapt/kernels", "benchmarks"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            digest.update(path.relative_to(ROOT).as_posix().encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()


def _versions() -> dict[str, str]:
    found = {}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def _hardware(device: str) -> dict[str, Any]:
    hardware: dict[str, Any] = {
        "machine": platform.machine(),
        "cpu": _cpu(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
    }
    if device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        hardware |= {
            "gpu": properties.name,
            "gpu_bytes": properties.total_memory,
            "multiprocessors": properties.multi_processor_count,
            "capability": f"{properties.major}.{properties.minor}",
            "l2_bytes": getattr(properties, "L2_cache_size", None),
            "cuda": torch.version.cuda,
        }
    return hardware


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()
