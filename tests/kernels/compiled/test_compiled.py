"""Checks of the kernels as compiled for GPUs, without a GPU.

``make test`` compiles every kernel for sm_90 in bfloat16 at small widths. ``make proof`` compiles
for all targets, dtypes and shapes, with the installed Triton and with the oldest supported one. If
FASTADAPT_RESOURCES names a folder, each record is written there.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from device_code import GATHERS, SUMS

PROGRAM = Path(__file__).with_name("compile_ops.py")
KERNELS = Path(__file__).parents[3] / "kernels"
DTYPES = "bfloat16,float16,float32"
TARGETS = ("sm_80", "sm_90", "sm_100", "gfx942")
#: A folder that holds only Triton 3.6; `make proof` creates one.
OLDEST_TRITON = os.environ.get("FASTADAPT_OLDEST_TRITON")
#: Shared memory of a block in bytes. A kernel that needs more compiles, but cannot run.
SHARED = {"sm_80": 163 * 1024, "sm_90": 227 * 1024, "sm_100": 227 * 1024, "gfx942": 64 * 1024}
#: Least warps of an H100's processor, of 64, while a kernel that gathers rows runs.
WARPS = {
    "sum_by_token": 24,
    "sum_by_feature": 24,
    "sum_further_pieces": 24,
    "decode_flagged": 28,
    "sampled_product": 28,
    "cost_by_token": 36,
}
# Reasons for a stack.
OCCUPANCY = "the assembler spills a few values for more threads"
OLDER_TRITON = "one value, in a kernel of two programs a call"
#: Allowed bytes of a thread's stack by kernel, target and condition; 0 for other kernels.
MAY_SPILL = {
    ("scan", "sm_80", "Triton 3.6"): (8, OLDER_TRITON),
    ("scan", "sm_90", "Triton 3.6"): (8, OLDER_TRITON),
    ("mark", "sm_80", "odd F"): (8, OCCUPANCY),
    ("sum_by_token", "sm_80", "odd F"): (24, OCCUPANCY),
}


def allowed_stack(kernel: dict[str, Any], target: str, triton: str) -> int:
    """Return the allowed bytes of a thread's stack."""
    features = re.search(r" F=(\d+)", kernel["case"])
    conditions = [f"Triton {triton.rpartition('.')[0]}"]
    if features is not None and int(features[1]) % 2 == 1:
        conditions.append("odd F")
    rows = [MAY_SPILL.get((kernel["kernel"], target, each), (0, "")) for each in conditions]
    return max(allowed for allowed, _ in rows)


def compile_ops(*arguments: str, cache: Path, triton: str | None = None) -> dict[str, Any]:
    """Run compile_ops.py in a process without Triton's interpreter; return its record."""
    environment = os.environ | {"TRITON_CACHE_DIR": str(cache), "OMP_NUM_THREADS": "1"}
    environment.pop("TRITON_INTERPRET", None)
    if triton is not None:
        environment["PYTHONPATH"] = triton
    result = subprocess.run(
        [sys.executable, str(PROGRAM), *arguments],
        env=environment,
        capture_output=True,
        text=True,
        timeout=1200,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    record: dict[str, Any] = json.loads(result.stdout)
    if folder := os.environ.get("FASTADAPT_RESOURCES"):
        name = f"{record['target']}-{arguments[1]}-{arguments[2]}-triton-{record['triton']}.json"
        (Path(folder) / name).write_text(json.dumps(record, indent=1))
    return record


def check(record: dict[str, Any]) -> None:
    """Check compilation, shared memory, register spills and 64-bit offsets of every kernel."""
    target = record["target"]
    problems = {f"{f['kernel']} does not compile: {f['error']}" for f in record["failures"]}
    for kernel in record["kernels"]:
        name = f"{kernel['kernel']} {kernel['constants']} ({kernel['case']})"
        if kernel["stack"] > allowed_stack(kernel, target, record["triton"]) and target in (
            "sm_80",
            "sm_90",
        ):
            problems.add(f"{name} has {kernel['stack']} bytes of stack")
        if kernel["shared"] > SHARED[target]:
            problems.add(f"{name} needs {kernel['shared']} bytes of shared memory")
        if kernel["narrow_products"]:
            problems.add(f"{name} has 32-bit products in addresses: {kernel['narrow_products']}")
        if target == "sm_90" and is_large_product(kernel) and not kernel["wgmma"]:
            problems.add(f"{name} multiplies without wgmma")
    assert not problems, "\n".join(sorted(problems))
    assert sorted({kernel["kernel"] for kernel in record["kernels"]}) == record["launched"]


def is_large_product(kernel: dict[str, Any]) -> bool:
    """Return whether a kernel's product can use wgmma: 64 rows or more, 16-bit (fp32 is exact)."""
    dot = kernel["dot"]
    return dot is not None and dot["rows"] >= 64 and dot["dtype"] in ("bf16", "f16")


def compilations(record: dict[str, Any]) -> dict[str, int]:
    """Count compilations per kernel, constants and pointers."""
    counts: dict[str, int] = defaultdict(int)
    for kernel in record["kernels"]:
        parts = ("kernel", "constants", "pointers", "num_warps", "num_stages")
        counts[json.dumps([kernel[part] for part in parts])] += 1
    return counts


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("triton")


@pytest.fixture(scope="module")
def lengths(cache: Path) -> dict[str, Any]:
    """Return the record of 20 lengths, at which every kernel is launched."""
    return compile_ops("sm_90", "bfloat16", "lengths", cache=cache)


def test_compiles_for_hopper(lengths: dict[str, Any]) -> None:
    check(lengths)
    assert any(is_large_product(kernel) for kernel in lengths["kernels"])


def test_lengths_do_not_recompile(lengths: dict[str, Any]) -> None:
    counts = compilations(lengths)
    assert counts
    assert {name: count for name, count in counts.items() if count > 2} == {}


# --- the checks detect faults ---------------------------------------------------------------------


@pytest.mark.slow
def test_detects_a_removed_cast_and_a_specialised_length(cache: Path) -> None:
    cast = without_cast("transcoder", "triton_dense", "cost_of_rows")
    old = '@triton.jit(do_not_specialize=["N"])\ndef sum_columns('
    changes = (*cast, old, "@triton.jit\ndef sum_columns(")
    record = compile_ops("sm_90", "bfloat16", "lengths", *changes, cache=cache)
    assert not record["failures"]
    assert narrow_kernels(record) == {"cost_of_rows"}
    repeated = {json.loads(name)[0] for name, n in compilations(record).items() if n > 2}
    assert repeated == {"sum_columns"}


def narrow_kernels(record: dict[str, Any]) -> set[str]:
    return {kernel["kernel"] for kernel in record["kernels"] if kernel["narrow_products"]}


def without_cast(op: str, file: str, kernel: str) -> tuple[str, str, str, str]:
    """Return a change that removes the first cast to 64 bits from a kernel."""
    source = (KERNELS / op / f"{file}.py").read_text()
    body = re.search(rf"^def {kernel}\(.*?\.to\(tl\.int64\)", source, re.DOTALL | re.MULTILINE)
    assert body is not None, f"{kernel} has no cast to 64 bits"
    return op, file, body[0], body[0].removesuffix(".to(tl.int64)")


# --- every target, dtype and Triton --------------------------------------------------------------


@pytest.fixture(scope="module")
def proof(cache: Path) -> Iterator[dict[tuple[str, str], Future[dict[str, Any]]]]:
    """Yield records by Triton and target; two processes compute them in the tests' order."""
    tritons = {"installed": None, "oldest": OLDEST_TRITON}
    with ThreadPoolExecutor(2) as pool:
        yield {
            (name, target): pool.submit(
                compile_ops, target, DTYPES, "shapes", cache=cache, triton=folder
            )
            for name, folder in tritons.items()
            if name == "installed" or folder is not None
            for target in TARGETS
        }
        pool.shutdown(cancel_futures=True)


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("triton", ["installed", "oldest"])
def test_compiles(
    proof: dict[tuple[str, str], Future[dict[str, Any]]], triton: str, target: str
) -> None:
    if (triton, target) not in proof:
        pytest.skip("FASTADAPT_OLDEST_TRITON names no folder; `make proof` makes one")
    record = proof[triton, target].result()
    assert triton != "oldest" or record["triton"].startswith("3.6.")
    check(record)


FROZEN = {
    "rms_norm_kernel",
    "rms_norm_backward_kernel",
    "gated_kernel",
    "gated_backward_kernel",
    "rope_kernel",
}


def occupancy(kernel: dict[str, Any]) -> int:
    """Return the warps that an H100 holds per processor: by registers, blocks, shared memory."""
    registers = 32 * -(-kernel["registers"] // 8) * 8  # of a warp, allocated in steps of 8 a lane
    blocks = min(32, 65_536 // registers // kernel["num_warps"])
    if kernel["shared"]:
        blocks = min(blocks, SHARED["sm_90"] // kernel["shared"])
    return min(64, blocks * kernel["num_warps"])


def at_full_width(
    proof: dict[tuple[str, str], Future[dict[str, Any]]], triton: str
) -> list[dict[str, Any]]:
    """Return the kernels that gather rows, of 16 bits and the paper's widths, for an H100."""
    if (triton, "sm_90") not in proof:
        pytest.skip("FASTADAPT_OLDEST_TRITON names no folder; `make proof` makes one")
    return [
        kernel
        for kernel in proof[triton, "sm_90"].result()["kernels"]
        if kernel["kernel"] in GATHERS and " F=8192" in kernel["case"]
        if kernel["pointers"].get("table_ptr", kernel["pointers"].get("W_ptr")) != "*fp32"
    ]


@pytest.mark.slow
@pytest.mark.parametrize("triton", ["installed", "oldest"])
def test_sums_gather_whole_vectors_without_barriers(
    proof: dict[tuple[str, str], Future[dict[str, Any]]], triton: str
) -> None:
    """128-bit loads in flight together; neither barriers nor shared memory in these loops."""
    kernels = [kernel for kernel in at_full_width(proof, triton) if kernel["kernel"] in SUMS]
    assert {kernel["kernel"] for kernel in kernels} == SUMS
    for kernel in kernels:
        name = f"{kernel['kernel']} {kernel['constants']}"
        gathers = [loop for loop in kernel["loops"] if loop.get("LDG.E.128", 0) > 1]
        assert gathers, name
        # The loop over blocks of words, around the loop that gathers, has a sum over lanes.
        gathers = gathers[:1] if kernel["kernel"] == "decode_flagged" else gathers
        for loop in gathers:
            waits = [op for op in loop if op.startswith(("BAR", "LDS", "STS", "SHFL"))]
            assert not waits, f"{name}: {loop}"


@pytest.mark.slow
@pytest.mark.parametrize("triton", ["installed", "oldest"])
def test_gathers_hide_latency_by_many_warps(
    proof: dict[tuple[str, str], Future[dict[str, Any]]], triton: str
) -> None:
    """No spills, and at least these warps of a processor's 64."""
    kernels = at_full_width(proof, triton)
    assert {kernel["kernel"] for kernel in kernels} == set(GATHERS)
    for kernel in kernels:
        name = f"{kernel['kernel']} {kernel['constants']}"
        assert kernel["stack"] == 0, name
        assert occupancy(kernel) >= WARPS[kernel["kernel"]], f"{name}: {occupancy(kernel)}"


@pytest.mark.slow
@pytest.mark.parametrize("triton", ["installed", "oldest"])
def test_frozen_blocks_move_whole_vectors(
    proof: dict[tuple[str, str], Future[dict[str, Any]]], triton: str
) -> None:
    """At the 7B model's widths: 128 bits a load and store, but for a row's 1/rms; 28 warps."""
    if (triton, "sm_90") not in proof:
        pytest.skip("FASTADAPT_OLDEST_TRITON names no folder; `make proof` makes one")
    record = proof[triton, "sm_90"].result()
    kernels = [k for k in record["kernels"] if k["case"].startswith("frozen (3584")]
    assert {k["kernel"] for k in kernels} == FROZEN
    for kernel in kernels:
        assert kernel["num_warps"] in (4, 8)
        narrow = {op: n for op, n in kernel["accesses"].items() if not op.endswith(".v4")}
        assert sum(narrow.values()) <= kernel["kernel"].startswith("rms_norm"), kernel
        if "*fp32" not in kernel["pointers"].values():
            assert occupancy(kernel) >= 28, kernel


@pytest.mark.slow
@pytest.mark.parametrize(
    ("op", "file", "kernel"),
    [
        ("transcoder", "triton_encode", "mark"),
        ("transcoder", "triton_encode", "multiply_few_mark"),
        ("transcoder", "triton_decode", "decode_flagged"),
        ("transcoder", "triton_sums", "sampled_product"),
        ("transcoder", "triton_sums", "sum_by_feature"),
        ("linear_kl", "triton_kl", "row_statistics_kernel"),
        ("nmse", "triton_nmse", "row_sums"),
    ],
)
def test_detects_any_removed_cast(cache: Path, op: str, file: str, kernel: str) -> None:
    changed = without_cast(op, file, kernel)
    record = compile_ops("sm_90", "bfloat16", "lengths", *changed, cache=cache)
    assert not record["failures"]
    assert narrow_kernels(record) == {kernel}
