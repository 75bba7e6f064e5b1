"""Hypothesis's strategy for cases of the transcoder; other test files run without hypothesis."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from hypothesis import strategies as st
from transcoder_cases import PLANS, SIZES, Case

from fastadapt.kernels.testing import LAYOUTS
from fastadapt.kernels.transcoder import ACTIVATIONS


@st.composite
def cases(draw: Any, dtypes: list[torch.dtype], sizes: Sequence[int] = SIZES) -> Case:
    F = draw(st.sampled_from([*sizes, 127, 129]))
    return Case(
        activation=draw(st.sampled_from(ACTIVATIONS)),
        dtype=draw(st.sampled_from(dtypes)),
        S=draw(st.sampled_from([None, 1, 2, 3])),
        T=draw(st.sampled_from(sizes)),
        d_in=draw(st.sampled_from(sizes)),
        d_out=draw(st.sampled_from(sizes)),
        F=F,
        k=draw(st.sampled_from([0, 1, 2, 3, 5, 8, F])),
        shift=draw(st.sampled_from([-100.0, -2.0, -0.5, 0.5, 100.0])),
        coarse=draw(st.booleans()),
        inference=draw(st.booleans()),
        layouts=tuple(draw(st.sampled_from(LAYOUTS)) for _ in range(8)),
        masked=draw(st.sampled_from([None, "bool", "float"])),
        padded=draw(st.booleans()),
        residual=draw(st.booleans()),
        plan=draw(st.sampled_from(PLANS)),
        seed=draw(st.integers(0, 2**31)),
        # Far below the activations' inverse, near it, and far above, where the penalty saturates.
        tanh_scale=draw(st.sampled_from([None, 1e-3, 0.3, 4.0, 100.0])),
    )
