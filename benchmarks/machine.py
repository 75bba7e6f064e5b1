"""Describe the environment of a result: commit, versions, hardware."""

from __future__ import annotations

import contextlib
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
PACKAGES = ("torch", "triton", "numpy", "transformers", "fastadapt")
PEERS = ("eai-sparsify", "fla-core", "liger-kernel")


def describe(device: str, commit: str | None = None) -> dict[str, Any]:
    """Return date, commit, digest of the sources, versions and hardware.

    ``commit`` overrides git, for a checkout without history.
    """
    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "commit": commit or _git("rev-parse", "HEAD"),
        "changed": bool(_git("status", "--porcelain", "--", "kernels", "fastadapt", "benchmarks")),
        "sources": _digest(),
        "versions": {"python": platform.python_version(), **_versions()},
        "hardware": _hardware(device),
    }


def _git(*arguments: str) -> str | None:
    command = ["git", "-C", str(ROOT), *arguments]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (FileNotFoundError, subprocess.CalledProcessError):
        return None


def _digest() -> str:
    """Return the SHA-256 of the names and contents of the kernels' and benchmarks' sources."""
    digest = hashlib.sha256()
    for folder in ("kernels", "fastadapt/kernels", "benchmarks"):
        paths = [p for p in (ROOT / folder).rglob("*") if p.suffix in (".py", ".toml")]
        for path in sorted(paths):
            digest.update(path.relative_to(ROOT).as_posix().encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()


def _versions() -> dict[str, str]:
    versions = {}
    for name in (*PACKAGES, *PEERS):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    return versions


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
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor()
