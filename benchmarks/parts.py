"""What is measured, part by part, at three scales: the paper's, a CPU's, and one for tests."""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from benchmarks.block_cases import nmse_case, rms_norm_case, swiglu_case
from benchmarks.case import Case
from benchmarks.head_cases import case as head_case
from benchmarks.transcoder_cases import case as transcoder_case
from benchmarks.transcoder_cases import serving_case, topk_case

__all__ = ["PARTS", "Part", "Scale", "scale"]


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
    lengths: tuple[int, ...]
    features: tuple[int, ...]
    l0s: tuple[float, ...]
    sweep: tuple[float, ...]
    l0s_of_shapes: tuple[float, ...]
    ks: tuple[int, ...]
    few: tuple[int, ...]  #: tokens of a serving step
    head_tokens: int
    head_width: int


def scale(device: str, *, quick: bool = False) -> Scale:
    """The paper's shapes on a GPU, small ones on a CPU; ``quick`` for tests of the benchmarks."""
    if quick:
        return Scale(
            device=device,
            dtype=torch.bfloat16 if device == "cuda" else torch.float32,
            backend="aot_eager",
            T=5,
            d=16,
            F=32,
            V=35,
            inner=24,
            lengths=(3,),
            features=(32,),
            l0s=(1,),
            sweep=(1,),
            l0s_of_shapes=(1,),
            ks=(2,),
            few=(1,),
            head_tokens=4,
            head_width=16,
        )
    if device == "cuda":
        return Scale(
            device=device,
            dtype=torch.bfloat16,
            backend="inductor",
            T=7500,
            d=3584,
            F=8192,
            V=152_064,
            inner=18_944,
            lengths=(512, 2048, 10_000),
            features=(8192, 16_384),
            l0s=(0.1, 1, 10, 100, 1000, 4096),
            sweep=(0, 3, 20, 30, 45, 70, 200, 500, 2000, 8192),
            l0s_of_shapes=(10, 1, 100, 0.1, 1000, 4096),
            ks=(8, 16, 32),
            few=(1, 2, 4, 8, 16, 32, 64, 128, 256),
            head_tokens=7500,
            head_width=3584,
        )
    return Scale(
        device=device,
        dtype=torch.float32,
        backend="inductor" if shutil.which("g++") or shutil.which("clang++") else None,
        T=512,
        d=256,
        F=2048,
        V=8192,
        inner=1024,
        lengths=(256,),
        features=(4096,),
        l0s=(0.1, 1, 10, 100),
        sweep=(0, 300, 2048),
        l0s_of_shapes=(10,),
        ks=(16,),
        few=(1, 16),
        head_tokens=256,
        head_width=128,
    )


def transcoder(s: Scale) -> Iterator[Case]:
    """Every implementation at the main shape, by density."""
    for l0 in s.l0s:
        full = transcoder_case(s.T, s.d, s.F, l0, s.dtype, s.device, backend=s.backend)
        yield full.only(
            *(name for name in full.steps if not name.endswith((", dense", ", sparse")))
        )


def topk(s: Scale) -> Iterator[Case]:
    """A fixed number of features per token."""
    for k in s.ks:
        yield topk_case(s.T, s.d, s.F, k, s.dtype, s.device)


def linear_kl(s: Scale) -> Iterator[Case]:
    """One student and three."""
    for S in (1, 3):
        yield head_case(S, s.head_tokens, s.head_width, s.V, s.dtype, s.device, backend=s.backend)


def serving(s: Scale) -> Iterator[Case]:
    """Few tokens, forward alone."""
    for T in s.few:
        yield serving_case(T, s.d, s.F, 10, s.dtype, s.device)


def sweep(s: Scale) -> Iterator[Case]:
    """Where codes and dense products cross: both forced, and the choice between them."""
    ours = ("sparse", "triton", "triton, dense", "triton, sparse")
    for l0 in s.sweep:
        full = transcoder_case(s.T, s.d, s.F, l0, s.dtype, s.device, backend=s.backend)
        # Codes at such a density take seconds and gigabytes; the plan never chooses them.
        kept = [name for name in ours if l0 <= 200 or not name.endswith(", sparse")]
        yield full.only("reference", "reference compiled", "encoder GEMM", *kept)


def shapes(s: Scale) -> Iterator[Case]:
    """Other numbers of tokens and features."""
    for l0, F, T in itertools.product(s.l0s_of_shapes, s.features, s.lengths):
        full = transcoder_case(T, s.d, F, l0, s.dtype, s.device, backend=None)
        yield full.only("reference", "encoder GEMM", "sparse", "triton", "triton_fused")


def block(s: Scale) -> Iterator[Case]:
    """Elementwise work: nmse, and what a frozen block does beside its products."""
    yield nmse_case(s.T, s.d, s.dtype, s.device, backend=s.backend)
    yield rms_norm_case(s.T, s.d, s.dtype, s.device, backend=s.backend)
    yield swiglu_case(s.T, s.inner, s.dtype, s.device, backend=s.backend)


@dataclass(frozen=True)
class Part:
    """``seconds``: what it may take on a GPU before it leaves rows out."""

    cases: Callable[[Scale], Iterator[Case]]
    seconds: float


# Most important first.
PARTS = {
    "transcoder": Part(transcoder, 110),
    "linear_kl": Part(linear_kl, 60),
    "topk": Part(topk, 25),
    "serving": Part(serving, 25),
    "sweep": Part(sweep, 40),
    "block": Part(block, 20),
    "shapes": Part(shapes, 30),
}
