"""What was promised, against what was measured. A bound that is missed is recorded as such."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from benchmarks.case import Row

__all__ = ["bounds"]

GB = 1e9
MAIN = {"T": 7500, "d": 3584, "F": 8192}
OURS = ("triton", "triton_fused")
LOOSE = 1.05  # times as long as the compiled reference, at most, at any density
PEERS_OF_HEAD = ("fla-core", "liger-kernel", "liger-kernel chunked")


def bounds(parts: dict[str, list[Row]], gpu: str) -> list[dict[str, Any]]:
    """Every claim that these rows speak of: ``claim``, ``bound``, ``measured``, ``met``.

    Claims are about the paper's width; rows of another say nothing of them.
    """
    parts = {
        name: [r for r in rows if r.get("shape", {}).get("d") == MAIN["d"]]
        for name, rows in parts.items()
    }
    return [
        *_adapter(parts, gpu),
        *_never_slower(parts),
        *_topk(parts),
        *_head(parts),
        *_few(parts),
    ]


def _adapter(parts: dict[str, list[Row]], gpu: str) -> Iterator[dict[str, Any]]:
    at_one, at_ten = (1.6, 2.8) if "H100" in gpu else (1.45, 2.3)
    rows = [r for r in parts.get("transcoder", []) if _is_main(r)]
    for l0, over_gemm, over_reference in (
        (0.1, at_one, 4.5),
        (1, at_one, 4.5),
        (10, at_ten, 2.8),
    ):
        timed = _timed(r for r in rows if r["shape"]["L0"] == l0)
        best = _best(timed, OURS)
        if best is None:
            continue
        if "encoder GEMM" in timed:
            ratio = timed[best]["median_s"] / timed["encoder GEMM"]["median_s"]
            yield _bound(f"L0 {l0:g}: time over the encoder GEMM's ({best})", over_gemm, ratio)
        if "reference" in timed:
            ratio = timed["reference"]["median_s"] / timed[best]["median_s"]
            claim = f"L0 {l0:g}: times as fast as the reference ({best})"
            yield _bound(claim, over_reference, ratio, at_least=True)


def _never_slower(parts: dict[str, list[Row]]) -> Iterator[dict[str, Any]]:
    worst: tuple[float, float] | None = None
    rows = [r for part in ("transcoder", "sweep") for r in parts.get(part, []) if _is_main(r)]
    for l0 in sorted({r["shape"]["L0"] for r in rows}):
        timed = _timed(r for r in rows if r["shape"]["L0"] == l0)
        if "triton" in timed and "reference compiled" in timed:
            ratio = timed["triton"]["median_s"] / timed["reference compiled"]["median_s"]
            worst = max(worst or (0.0, 0.0), (ratio, l0))
    if worst is not None:
        claim = f"any L0: time over the compiled reference's, worst at L0 {worst[1]:g}"
        yield _bound(claim, LOOSE, worst[0])


def _topk(parts: dict[str, list[Row]]) -> Iterator[dict[str, Any]]:
    rows = parts.get("topk", [])
    for k in sorted({r["shape"]["k"] for r in rows}):
        timed = _timed(r for r in rows if r["shape"]["k"] == k)
        best, peer = _best(timed, OURS), timed.get("eai-sparsify")
        if best is None or peer is None:
            continue
        ratio = peer["median_s"] / timed[best]["median_s"]
        yield _bound(f"k {k}: times as fast as eai-sparsify ({best})", 1.5, ratio, at_least=True)
        memory = timed[best]["peak_bytes"] / peer["peak_bytes"]
        yield _bound(f"k {k}: peak memory over eai-sparsify's ({best})", 1.0, memory)


def _head(parts: dict[str, list[Row]]) -> Iterator[dict[str, Any]]:
    rows = parts.get("linear_kl", [])
    for S in sorted({r["shape"]["S"] for r in rows}):
        timed = _timed(r for r in rows if r["shape"]["S"] == S)
        own = timed.get("triton")
        if own is None:
            continue
        students = f"{S} student{'s' if S > 1 else ''}"
        if "GEMMs" in timed:
            ratio = own["median_s"] / timed["GEMMs"]["median_s"]
            yield _bound(f"{students}: time over the GEMMs'", 1.2, ratio)
        peers = [timed[name]["median_s"] for name in PEERS_OF_HEAD if name in timed]
        if S == 1 and peers:
            ratio = min(peers) / own["median_s"]
            claim = f"{students}: times as fast as the fastest of fla-core and liger-kernel"
            yield _bound(claim, 1.4, ratio, at_least=True)
        single = timed.get(f"triton, {S} single calls")
        if single is not None:
            ratio = single["median_s"] / own["median_s"]
            claim = f"{students}: times as fast as {S} single calls"
            yield _bound(claim, 1.2, ratio, at_least=True)
        over = (own["peak_bytes"] - own["result_bytes"]) / GB
        yield _bound(f"{students}: GB over inputs and outputs", 1.5, over)


def _few(parts: dict[str, list[Row]]) -> Iterator[dict[str, Any]]:
    rows = [r for r in parts.get("serving", []) if r["shape"]["T"] <= 64]
    for T in sorted({r["shape"]["T"] for r in rows}):
        timed = _timed(r for r in rows if r["shape"]["T"] == T)
        shares = [r["share_of_copy"] for n, r in timed.items() if n.endswith(", encoder")]
        if shares:
            claim = f"T {T}: encoder's share of copy bandwidth"
            yield _bound(claim, 0.7, max(shares), at_least=True)


def _is_main(row: Row) -> bool:
    return all(row["shape"].get(key) == value for key, value in MAIN.items())


def _timed(rows: Iterator[Row]) -> dict[str, Row]:
    return {r["implementation"]: r for r in rows if "median_s" in r}


def _best(timed: dict[str, Row], names: Sequence[str]) -> str | None:
    key: Callable[[str], float] = lambda name: timed[name]["median_s"]  # noqa: E731
    return min((name for name in names if name in timed), key=key, default=None)


def _bound(claim: str, bound: float, measured: float, *, at_least: bool = False) -> dict[str, Any]:
    return {
        "claim": claim,
        "bound": f"{'≥' if at_least else '≤'} {bound:g}",
        "measured": measured,
        "met": measured >= bound if at_least else measured <= bound,
    }
