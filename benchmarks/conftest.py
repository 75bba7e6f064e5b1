"""Print a comparison with the reference after pytest-benchmark's table."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import torch


def pytest_benchmark_update_machine_info(config: Any, machine_info: dict[str, Any]) -> None:
    """Record torch's version and the number of threads with the results."""
    machine_info["torch"] = torch.__version__
    machine_info["threads"] = torch.get_num_threads()


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Print medians and ratios to the reference (of pairs, if measured), one line per group."""
    session = getattr(terminalreporter.config, "_benchmarksession", None)
    groups: dict[str, dict[str, Any]] = defaultdict(dict)
    for bench in session.benchmarks if session else []:
        if "implementation" in bench.extra_info and bench.stats.rounds:
            groups[bench.group][bench.extra_info["implementation"]] = bench
    if not groups:
        return
    terminalreporter.section(f"against the reference, {torch.get_num_threads()} threads")
    for group, benches in groups.items():
        reference = benches.get("reference")
        parts = []
        for name, bench in benches.items():
            median = bench.stats.median
            ratio = bench.extra_info.get("ratio")
            if ratio is None and reference is not None:
                ratio = reference.stats.median / median
            shown = "" if ratio is None or name == "reference" else f" ({ratio:.2f}x)"
            parts.append(f"{name} {median * 1e3:.1f} ms{shown}")
        terminalreporter.write_line(f"{group}: {', '.join(parts)}")
