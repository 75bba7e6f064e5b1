"""Cases of the transcoder: implementations, plans and costs."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as nnf

from benchmarks import peers
from benchmarks.case import Case, Cost, Inputs, Results, Step, cast, compiled, copies
from benchmarks.transcoder_steps import (
    BEFORE_TOPK,
    LEAVES,
    differentiated,
    encoder_gemm,
    gradients,
    make_inputs,
    plain,
    reference,
    step,
    truth,
    truth_of_topk,
)
from fastadapt.kernels.device import runs_triton
from fastadapt.kernels.flops import register_flop_formulas
from fastadapt.kernels.transcoder import CodeLayout, plan_for, transcode

__all__ = ["case", "implementations", "plan_of", "serving_case", "topk_case"]

NARROW = 16  # width of the decoder in steps that time the encoder only
NO_STATISTICS = "no statistics"


def implementations(device: str) -> list[str]:
    """Return the op's implementations on a device, except for the reference."""
    names = ["sparse"] if device == "cpu" else []
    return [*names, "triton"] if runs_triton(device) else names


def count_codes(inputs: Inputs) -> int:
    """Return the number of active entries."""
    with torch.no_grad():
        z = nnf.linear(inputs["x"], inputs["W_enc"], inputs["b_enc"])
        return int((z > 0).sum())


def plan_of(n_codes: int, T: int, F: int, dtype: torch.dtype, device: str) -> CodeLayout:
    """Return the plan that training uses after a step with ``n_codes`` codes."""
    return plan_for(n_codes / T, T, F, dtype, device)


def cost(T: int, d: int, F: int, n_codes: int, dtype: torch.dtype) -> Cost:
    """Return the cost of forward and backward on codes: FLOPs by the op's formulas, least bytes."""
    from torch.utils.flop_counter import FlopCounterMode

    register_flop_formulas()
    shapes = {"x": (T, d), "W_enc": (F, d), "b_enc": (F,), "W_dec": (F, d), "b_dec": (d,)}
    shapes |= {"residual": (T, d), "g": (T, d), "c": ()}
    meta = {
        name: torch.empty(shape, dtype=dtype, device="meta", requires_grad=name in LEAVES)
        for name, shape in shapes.items()
    }
    with FlopCounterMode(display=False) as counter:
        step(meta, "auto", CodeLayout(dense=False, capacity=max(n_codes, 1)))
    live = min(F, n_codes)  # rows of W_dec
    elements = T * d * 6 + F * d + live * d + 2 * F * d  # x, residual, out, g, dx, x again; weights
    return Cost(counter.get_total_flops(), elements * dtype.itemsize)


def make_planned(
    T: int,
    d: int,
    F: int,
    l0: float,
    dtype: torch.dtype,
    device: str,
    *,
    n_sets: int,
    k: int | None = None,
) -> list[Inputs]:
    """Return sets of inputs, with training's plan for the largest number of codes of a set."""
    sets = [make_inputs(T, d, F, l0, dtype, device, seed) for seed in range(n_sets)]
    n_codes = k * T if k else max(count_codes(inputs) for inputs in sets)
    plan = plan_of(n_codes, T, F, dtype, device)
    forced = CodeLayout(dense=False, capacity=round(1.25 * n_codes) + 1024)
    plans = {"plan": plan, "dense plan": CodeLayout(dense=True), "sparse plan": forced}
    return [inputs | plans | {"n_codes": n_codes} for inputs in sets]


def facts(sets: Sequence[Inputs]) -> dict[str, Any]:
    """Return the measured L0 and the plan of the inputs."""
    inputs = sets[0]
    plan: CodeLayout = inputs["plan"]
    return {
        "measured_L0": inputs["n_codes"] / len(inputs["x"]),
        "plan": "dense" if plan.dense else f"sparse, {plan.capacity} codes",
    }


def planned(implementation: str, plan: str = "plan", **options: Any) -> Callable[[Inputs], Results]:
    """Return an implementation's step with a plan of the inputs; `sparse` runs without a plan."""
    plans = implementation not in ("reference", "sparse")
    return lambda i: step(i, implementation, i[plan] if plans else None, **options)


def case(
    T: int,
    d: int,
    F: int,
    l0: float,
    dtype: torch.dtype,
    device: str,
    *,
    backend: str | None = "inductor",
) -> Case:
    """Build a case of ReLU at one density. With ``backend`` None, skip compilation."""
    n_sets = copies(6 * F * d * dtype.itemsize, device)

    def fast(function: Callable[..., Any], note: str) -> dict[str, Step]:
        if backend is None:
            return {}
        run = differentiated(compiled(function, backend, False))
        return {f"{function.__name__} compiled": Step(run, "reference", note)}

    steps = {"encoder GEMM": Step(encoder_gemm, "floor", cost=Cost(2.0 * T * d * F, 0))}
    for name in implementations(device):
        steps[name] = Step(planned(name))
        if name != "sparse":
            for path in ("dense", "sparse"):
                steps[f"{name}, {path}"] = Step(planned(name, f"{path} plan"))
    steps["reference"] = Step(planned("reference"), "reference")
    steps["plain"] = Step(differentiated(plain), "reference", NO_STATISTICS)
    steps |= fast(reference, backend or "") | fast(plain, NO_STATISTICS)
    return Case(
        "transcoder",
        {"T": T, "d": d, "F": F, "L0": l0},
        dtype,
        device,
        lambda: make_planned(T, d, F, l0, dtype, device, n_sets=n_sets),
        steps,
        truth,
        lambda sets: cost(T, d, F, sets[0]["n_codes"], dtype),
        facts,
    )


def topk_case(T: int, d: int, F: int, k: int, dtype: torch.dtype, device: str) -> Case:
    """Build a case of TopK; peers of fixed k compute neither penalty nor statistics."""
    n_sets = copies(6 * F * d * dtype.itemsize, device)
    topk: dict[str, Any] = {"activation": "topk", "k": k}
    steps = {
        "reference": Step(planned("reference", **topk), "reference"),
        "encoder GEMM": Step(encoder_gemm, "floor", cost=Cost(2.0 * T * d * F, 0)),
    }
    peer = peers.sparsify_topk() if device == "cuda" else None
    if peer is not None:

        def run(inputs: Inputs) -> Results:
            values, indices = peer.encode(inputs["x"], inputs["W_enc"], inputs["b_enc"], k)
            decoded = peer.decode(indices, values, inputs["W_dec"])
            out = inputs["residual"] + (decoded + inputs["b_dec"])
            return {"out": out.detach()} | gradients(inputs, [out], [inputs["g"]])

        unpenalised = functools.partial(truth_of_topk, k=k, penalised=False)
        steps["eai-sparsify"] = Step(run, "peer", peer.note, unpenalised)
    steps |= {name: Step(planned(name, **topk)) for name in implementations(device)}
    l0 = BEFORE_TOPK * k
    return Case(
        "transcoder topk",
        {"T": T, "d": d, "F": F, "k": k},
        dtype,
        device,
        lambda: make_planned(T, d, F, l0, dtype, device, n_sets=n_sets, k=k),
        steps,
        functools.partial(truth_of_topk, k=k, penalised=True),
        lambda _: cost(T, d, F, k * T, dtype),
        lambda _: {"positives": l0},
    )


def serving_case(T: int, d: int, F: int, l0: float, dtype: torch.dtype, device: str) -> Case:
    """Build a case of the forward pass on few tokens, with the whole and with a narrow decoder."""
    n_sets = copies(F * d * dtype.itemsize, device)  # encoder rows read little beside W_enc
    size, on_gpu = dtype.itemsize, device == "cuda"
    encoder = Cost(2.0 * T * d * F, (F * d + T * d) * size)

    def make() -> list[Inputs]:
        sets = make_planned(T, d, F, l0, dtype, device, n_sets=n_sets)
        for inputs in sets:
            inputs["narrow W_dec"] = inputs["W_dec"].detach()[:, :NARROW].contiguous()
            inputs["narrow b_dec"] = inputs["b_dec"].detach()[:NARROW].clone()
        return sets

    def whole(sets: Sequence[Inputs]) -> Cost:
        n_codes = sets[0]["n_codes"]
        elements = F * d + min(F, n_codes) * d + 3 * T * d
        return Cost(encoder.flops + 2.0 * n_codes * d, elements * size)

    def forward(inputs: Inputs, implementation: str, encoder_only: bool) -> Results:
        leaves = {name: inputs[name] for name in LEAVES}
        if encoder_only:
            leaves |= {name: inputs[f"narrow {name}"] for name in ("W_dec", "b_dec")}
            del leaves["residual"]
        with torch.no_grad():
            return {"out": transcode(**leaves, implementation=implementation)}

    def expected(inputs: Inputs, wanted: torch.dtype, encoder_only: bool) -> Results:
        return forward(cast(inputs, wanted), "reference", encoder_only)

    run = functools.partial
    steps = {
        "reference": Step(
            run(forward, implementation="reference", encoder_only=False), "reference"
        ),
        "encoder GEMM": Step(encoder_gemm, "floor", cost=encoder, graph=on_gpu),
    }
    encoder_truth = run(expected, encoder_only=True)
    for name in implementations(device):
        steps[name] = Step(run(forward, implementation=name, encoder_only=False), graph=on_gpu)
        steps[f"{name}, encoder"] = Step(
            run(forward, implementation=name, encoder_only=True),
            note=f"decoder of width {NARROW}",
            truth=encoder_truth,
            cost=encoder,
            graph=on_gpu,
        )
    shape = {"T": T, "d": d, "F": F, "L0": l0}
    whole_truth = run(expected, encoder_only=False)
    return Case("serving", shape, dtype, device, make, steps, whole_truth, whole, facts)
