"""Parts of the measurements, at three scales: the paper's, a CPU's, and one for tests."""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from benchmarks.block_cases import masked_nmse_case, nmse_case, rms_norm_case, swiglu_case
from benchmarks.bounds import read_toml
from benchmarks.case import Case
from benchmarks.head_cases import case as head_case
from benchmarks.transcoder_cases import case as transcoder_case
from benchmarks.transcoder_cases import serving_case, topk_case

__all__ = ["CPU_PARTS", "PARTS", "Scale", "block", "scale"]


@dataclass(frozen=True)
class Scale:
    """Shapes and precision of all parts. T tokens, d width, F features, V vocabulary."""

    device: str
    dtype: torch.dtype
    backend: str | None  #: of torch.compile; None compiles nothing
    T: int
    d: int
    F: int
    V: int
    inner: int  #: width of SwiGLU
    lengths: list[int]
    features: list[int]
    l0s: list[float]
    sweep: list[float]
    l0s_of_shapes: list[float]
    ks: list[int]
    few: list[int]  #: tokens of a serving step
    head_tokens: int
    head_width: int
    densities: dict[str, Any] = field(default_factory=dict)
    vocabularies: list[Any] = field(default_factory=list)
    masked_nmse: list[Any] = field(default_factory=list)


def scale(device: str, *, quick: bool = False) -> Scale:
    """Return the paper's shapes for a GPU, small ones for a CPU, or tiny ones with ``quick``."""
    shapes = read_toml("shapes")["quick" if quick else device]
    dtype = "bfloat16" if device == "cuda" else shapes.pop("dtype")
    compiles = device == "cuda" or shutil.which("g++") or shutil.which("clang++")
    backend = "aot_eager" if quick else "inductor" if compiles else None
    return Scale(device, **shapes | {"dtype": getattr(torch, dtype), "backend": backend})


def transcoder(s: Scale) -> Iterator[Case]:
    """All implementations at the main shape, for several densities."""
    for l0 in s.l0s:
        full = transcoder_case(s.T, s.d, s.F, l0, s.dtype, s.device, backend=s.backend)
        yield full.only(*(n for n in full.steps if not n.endswith((", dense", ", sparse"))))


def topk(s: Scale) -> Iterator[Case]:
    """A fixed number of features per token."""
    return (topk_case(s.T, s.d, s.F, k, s.dtype, s.device) for k in s.ks)


def linear_kl(s: Scale) -> Iterator[Case]:
    """One student and three."""
    for S in (1, 3):
        yield head_case(S, s.head_tokens, s.head_width, s.V, s.dtype, s.device, backend=s.backend)


def serving(s: Scale) -> Iterator[Case]:
    """Few tokens, forward only."""
    return (serving_case(T, s.d, s.F, 10, s.dtype, s.device) for T in s.few)


def sweep(s: Scale) -> Iterator[Case]:
    """Densities around the crossing of codes and dense products: each forced, and the choice."""
    ours = ("sparse", "triton", "triton, dense", "triton, sparse")
    for l0 in s.sweep:
        full = transcoder_case(s.T, s.d, s.F, l0, s.dtype, s.device, backend=s.backend)
        # At high densities codes take seconds and gigabytes; the plan never chooses them.
        names = [name for name in ours if l0 <= 200 or not name.endswith(", sparse")]
        yield full.only("reference", "reference compiled", "encoder GEMM", *names)


def shapes(s: Scale) -> Iterator[Case]:
    """Other numbers of tokens and features."""
    for l0, F, T in itertools.product(s.l0s_of_shapes, s.features, s.lengths):
        full = transcoder_case(T, s.d, F, l0, s.dtype, s.device, backend=None)
        yield full.only("reference", "encoder GEMM", "sparse", "triton")


def block(s: Scale) -> Iterator[Case]:
    """Elementwise work: nmse, and a frozen block's RMSNorm and SwiGLU."""
    yield nmse_case(s.T, s.d, s.dtype, s.device, backend=s.backend)
    yield rms_norm_case(s.T, s.d, s.dtype, s.device, backend=s.backend)
    yield swiglu_case(s.T, s.inner, s.dtype, s.device, backend=s.backend)


def densities(s: Scale) -> Iterator[Case]:
    """`sparse` timed alternately with the reference, so that other load affects both equally."""
    shape = s.densities
    for l0 in shape["l0s"]:
        T, d, F = shape["T"], shape["d"], shape["F"]
        full = transcoder_case(T, d, F, l0, s.dtype, s.device, backend=None)
        paired = replace(full.steps["sparse"], beside=full.steps["reference"].run)
        others = ("reference", "plain") if l0 in (1, 10, 4096) else ()
        yield replace(full, steps=full.only(*others).steps | {"sparse": paired})


def vocabularies(s: Scale) -> Iterator[Case]:
    """Three students at several vocabularies, in small chunks."""
    for T, d, V, name in s.vocabularies:
        dtype = getattr(torch, name)
        full = head_case(3, T, d, V, dtype, s.device, backend=None, chunk_tokens=64)
        yield full.only("reference", "chunked")


def masked_nmse(s: Scale) -> Iterator[Case]:
    """Batches with a mask and with values per token."""
    for B, T, d, name in s.masked_nmse:
        yield masked_nmse_case(B, T, d, getattr(torch, name), s.device)


#: Functions of a scale that yield the cases of a part.
PARTS = {f.__name__: f for f in (transcoder, linear_kl, topk, serving, sweep, block, shapes)}
CPU_PARTS = {f.__name__: f for f in (densities, vocabularies, masked_nmse)}
