"""The transcoder's values and gradients against float64 and the formula; special inputs; errors."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from random_cases import cases
from torch import Tensor
from transcoder_cases import DTYPES, PLANS, Case, draw_inputs, run, tanh

from fastadapt.kernels.testing import assert_close
from fastadapt.kernels.transcoder import ACTIVATIONS, CodeLayout, sparse, transcoder

VARIANTS = [("reference", None), *(("sparse", plan) for plan in PLANS)]
STATS = ("n_active", "feature_counts", "n_tokens", "min_active", "n_codes")


@settings(suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
@given(case=cases(DTYPES))
def test_sparse_keeps_the_budget(case: Case) -> None:
    leaves, arguments, cotangent, c = draw_inputs(case)
    before = {name: leaf.clone() for name, leaf in leaves.items()}
    torch.use_deterministic_algorithms(True)  # fills uninitialised memory with NaN
    try:
        args = (leaves, arguments, cotangent, c)
        actual = run(*args, dtype=case.dtype, implementation="sparse", plan=case.plan)
        oracle = run(*args, dtype=torch.float64, implementation="reference")
        low = torch.float32 if case.dtype == torch.float64 else case.dtype
        peer = run(*args, dtype=low, implementation="reference")
    finally:
        torch.use_deterministic_algorithms(False)

    assert actual[0].out.dtype == case.dtype
    accumulator = torch.float64 if case.dtype == torch.float64 else torch.float32
    assert actual[0].penalty.dtype == accumulator
    assert_close(actual[0].out, oracle[0].out, peer[0].out, name="out")
    assert_close(actual[0].penalty, oracle[0].penalty, peer[0].penalty, name="penalty")
    for name, gradient in actual[1].items():
        assert gradient.dtype == case.dtype
        assert_close(gradient, oracle[1][name], peer[1][name], name=f"gradient of {name}")
        torch.testing.assert_close(leaves[name], before[name], rtol=0, atol=0, equal_nan=True)
    same = (oracle if case.dtype == torch.float64 else peer)[0].stats
    for name in STATS:
        torch.testing.assert_close(
            getattr(actual[0].stats, name), getattr(same, name), equal_nan=True, msg=name
        )


def by_formula(
    x_STD: Tensor, W_enc: Tensor, b_enc: Tensor, activation: str, **arguments: Any
) -> list[list[list[float]]]:
    """Compute a with loops over rows, tokens and features."""
    z = [
        [[float(w @ t) + float(b) for w, b in zip(W_enc, b_enc, strict=True)] for t in row]
        for row in x_STD
    ]
    a_STF: list[list[list[float]]] = []
    for row in z:
        a = [[max(v, 0.0) for v in token] for token in row]
        if activation == "jumprelu":
            theta = arguments["threshold"]
            a = [[v if v > t else 0.0 for v, t in zip(tok, theta, strict=True)] for tok in row]
        if activation == "topk":
            for token in a:
                best = sorted(range(len(token)), key=lambda i: (-token[i], i))[: arguments["k"]]
                token[:] = [v if i in best else 0.0 for i, v in enumerate(token)]
        if activation == "batch_topk":
            flat = [(-v, t, i) for t, token in enumerate(a) for i, v in enumerate(token)]
            best_places = {p[1:] for p in sorted(flat)[: math.floor(arguments["k"] * len(a))]}
            a = [
                [v if (t, i) in best_places else 0.0 for i, v in enumerate(token)]
                for t, token in enumerate(a)
            ]
        a_STF.append(a)
    return a_STF


SETTINGS: dict[str, dict[str, Any]] = {
    "relu": {},
    "topk": {"k": 2},
    "batch_topk": {"k": 1.3},
    "jumprelu": {"bandwidth": 0.5},
}


def small(activation: str, seed: int = 0) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return float64 leaves (S=2, T=5, d_in=3, d_out=4, F=6) and the activation's arguments."""
    torch.manual_seed(seed)
    leaves = {
        "x": torch.randn(2, 5, 3, dtype=torch.float64),
        "W_enc": torch.randn(6, 3, dtype=torch.float64),
        "b_enc": torch.randn(6, dtype=torch.float64),
        "W_dec": torch.randn(6, 4, dtype=torch.float64),
        "b_dec": torch.randn(4, dtype=torch.float64),
        "residual": torch.randn(2, 5, 4, dtype=torch.float64),
    }
    if activation == "jumprelu":
        leaves["threshold"] = torch.rand(6, dtype=torch.float64) + 0.2
    return leaves, {"activation": activation, **SETTINGS[activation]}


@pytest.mark.parametrize("scale", [None, 0.7])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize(("implementation", "plan"), VARIANTS)
def test_forward_by_formula(
    activation: str, implementation: str, plan: CodeLayout | None, scale: float | None
) -> None:
    leaves, arguments = small(activation)
    weight = torch.rand(2, 5) + 0.1
    options: dict[str, Any] = {"implementation": implementation, "plan": plan, **tanh(scale)}
    result = transcoder(**leaves, **arguments, mask=weight, **options)
    x, W_enc, b_enc, W_dec, b_dec = list(leaves.values())[:5]
    a = torch.tensor(
        by_formula(x, W_enc, b_enc, threshold=leaves.get("threshold"), **arguments),
        dtype=torch.float64,
    )
    torch.testing.assert_close(result.out, leaves["residual"] + a @ W_dec + b_dec)
    norms = W_dec.square().sum(-1).sqrt()
    expected = sum(
        weight.double()[s, t] * (u if scale is None else math.tanh(scale * u))
        for s in range(2)
        for t in range(5)
        for u in (a[s, t] * norms).tolist()
    )
    torch.testing.assert_close(result.penalty, torch.as_tensor(expected))
    assert result.stats.n_active == (a > 0).sum()
    assert result.stats.n_tokens == 10
    assert result.stats.feature_counts.tolist() == (a > 0).sum((0, 1)).tolist()
    assert result.stats.fired.tolist() == (a > 0).any(0).any(0).tolist()
    if activation == "batch_topk":
        smallest = torch.stack([row[row > 0].min() for row in a]).mean()
        torch.testing.assert_close(result.stats.min_active, smallest.float())


def away_from_kinks(activation: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return inputs whose active entries do not change within the difference quotient."""
    for seed in range(100):
        leaves, arguments = small(activation, seed)
        z = leaves["x"] @ leaves["W_enc"].T + leaves["b_enc"]
        gaps = z.flatten().abs()
        if activation == "jumprelu":
            gaps = (z - leaves["threshold"]).abs().flatten()
        if activation in ("topk", "batch_topk"):
            gaps = torch.cat([gaps, z.flatten().sort().values.diff()])
        if gaps.min() > 1e-4:
            return leaves, arguments
    raise AssertionError("no draw is away from the kinks")


@pytest.mark.quick(
    "reference-None-relu",
    "reference-None-batch_topk",
    "sparse-None-relu",
    "sparse-None-topk",
    "sparse-None-batch_topk",
    "sparse-None-jumprelu",
    "sparse-plan2-relu",
    "sparse-plan4-topk",
)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize(("implementation", "plan"), VARIANTS)
def test_gradcheck(activation: str, implementation: str, plan: CodeLayout | None) -> None:
    check_gradients(activation, implementation, plan)


@pytest.mark.quick("sparse-None-relu", "sparse-plan2-jumprelu")
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize(("implementation", "plan"), VARIANTS)
def test_gradcheck_of_tanh(activation: str, implementation: str, plan: CodeLayout | None) -> None:
    check_gradients(activation, implementation, plan, **tanh(0.7))


def check_gradients(
    activation: str, implementation: str, plan: CodeLayout | None, **penalty: Any
) -> None:
    """Compare gradients of both outputs with difference quotients, with weights and padding."""
    leaves, arguments = away_from_kinks(activation)
    padding = torch.zeros(2, 5, dtype=torch.bool)
    padding[1, 3:] = True
    fixed = {"threshold": leaves.pop("threshold")} if activation == "jumprelu" else {}

    def function(*tensors: Any) -> tuple[Tensor, Tensor]:
        result = transcoder(
            **dict(zip(leaves, tensors, strict=True)),
            **fixed,
            **arguments,
            **penalty,
            mask=torch.linspace(0, 1, 10).view(2, 5),
            padding=padding,
            implementation=implementation,
            plan=plan,
        )
        return result.out, result.penalty

    inputs = [leaf.requires_grad_() for leaf in leaves.values()]
    assert torch.autograd.gradcheck(function, inputs, eps=1e-6, atol=1e-7, rtol=1e-6)


@pytest.mark.parametrize("scale", [None, 0.7])
@pytest.mark.parametrize(("implementation", "plan"), VARIANTS)
def test_straight_through_gradient_of_theta(
    implementation: str, plan: CodeLayout | None, scale: float | None
) -> None:
    leaves, arguments = small("jumprelu")
    leaves["threshold"].requires_grad_()
    arguments["bandwidth"] = 1.0
    weight = torch.rand(2, 5, dtype=torch.float64)
    options: dict[str, Any] = {"implementation": implementation, "plan": plan, **tanh(scale)}
    result = transcoder(**leaves, **arguments, mask=weight, **options)
    g, c = torch.randn_like(result.out), torch.randn((), dtype=torch.float64)
    torch.autograd.backward([result.out, result.penalty], [g, c])

    z = leaves["x"] @ leaves["W_enc"].T + leaves["b_enc"]
    expected, inactive_in_window = torch.zeros(6, dtype=torch.float64), 0
    for i, theta in enumerate(leaves["threshold"].tolist()):
        for s in range(2):
            for t in range(5):
                if abs(float(z[s, t, i]) - theta) < arguments["bandwidth"] / 2:
                    row = leaves["W_dec"][i]
                    a = float(z[s, t, i]) * (float(z[s, t, i]) > theta)
                    slope = 1 if scale is None else scale / math.cosh(scale * a * row.norm()) ** 2
                    upstream = g[s, t] @ row + c * weight[s, t] * slope * row.norm()
                    expected[i] -= theta / arguments["bandwidth"] * upstream
                    inactive_in_window += float(z[s, t, i]) <= theta
    assert inactive_in_window > 0
    torch.testing.assert_close(leaves["threshold"].grad, expected)


@pytest.mark.parametrize(("implementation", "plan"), VARIANTS)
def test_non_finite_and_tiny_values(implementation: str, plan: CodeLayout | None) -> None:
    values = [math.nan, math.inf, -math.inf, -0.0, 0.0, 1e-40, 1.0, 1.0, 2.0, -1.0]
    active = {
        "relu": [0, 1, 5, 6, 7, 8],
        1: [0],
        2: [0, 1],
        3: [0, 1, 8],
        4: [0, 1, 6, 8],  # of two equal values, the lower index
        10: [0, 1, 5, 6, 7, 8],
    }
    for k, expected in active.items():
        ranking: dict[str, Any] = {} if k == "relu" else {"activation": "topk", "k": k}
        result = transcoder(
            torch.zeros(3, 1),
            torch.ones(10, 1),
            torch.tensor(values),
            torch.ones(10, 2),
            torch.zeros(2),
            **ranking,
            implementation=implementation,
            plan=plan,
        )
        assert result.stats.fired.nonzero().flatten().tolist() == expected, k
        assert result.out.isnan().all()
        assert result.penalty.isnan()


@pytest.mark.parametrize(("implementation", "plan"), VARIANTS)
def test_infinity_reaches_the_output(implementation: str, plan: CodeLayout | None) -> None:
    result = transcoder(
        torch.zeros(1, 1),
        torch.ones(2, 1),
        torch.tensor([math.inf, -math.inf]),
        torch.tensor([[1.0, -1.0], [1.0, 1.0]]),
        torch.zeros(2),
        implementation=implementation,
        plan=plan,
    )
    assert result.out.tolist() == [[math.inf, -math.inf]]
    assert result.stats.fired.tolist() == [True, False]


@pytest.mark.parametrize(("implementation", "plan"), VARIANTS)
def test_batch_topk_ranks_each_row_alone(implementation: str, plan: CodeLayout | None) -> None:
    leaves, _ = small("batch_topk")
    leaves["x"][1] *= 10  # in a joint ranking, this row would have all codes
    padding = torch.zeros(2, 5, dtype=torch.bool)
    padding[0, 1:3] = True
    both: dict[str, Any] = {
        "activation": "batch_topk",
        "k": 0.7,
        "implementation": implementation,
        "plan": plan,
    }
    together = transcoder(**leaves, **both, padding=padding)
    for s, n_tokens in [(0, 3), (1, 5)]:
        one = leaves | {"x": leaves["x"][s], "residual": leaves["residual"][s]}
        alone = transcoder(**one, **both, padding=padding[s])
        torch.testing.assert_close(together.out[s], alone.out)
        assert alone.stats.n_active == math.floor(0.7 * n_tokens)
        assert alone.stats.n_tokens == n_tokens


@pytest.mark.parametrize(("implementation", "plan"), VARIANTS)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_padding_has_no_code_for_any_value(
    activation: str, implementation: str, plan: CodeLayout | None
) -> None:
    leaves, arguments = small(activation)
    padding = torch.zeros(2, 5, dtype=torch.bool)
    padding[:, 3:] = True
    leaves["x"][padding] = math.nan
    for leaf in leaves.values():
        leaf.requires_grad_()
    result = transcoder(
        **leaves, **arguments, padding=padding, implementation=implementation, plan=plan
    )
    torch.testing.assert_close(
        result.out[padding], (leaves["residual"] + leaves["b_dec"])[padding], rtol=0, atol=0
    )
    torch.autograd.backward(
        [result.out, result.penalty], [torch.randn_like(result.out), result.penalty.new_ones(())]
    )
    for name, leaf in leaves.items():
        assert leaf.grad is not None
        assert leaf.grad.isfinite().all(), name
    assert not leaves["x"].grad[padding].any()
    assert result.stats.n_tokens == 6


def test_more_features_than_16_bits_can_index() -> None:
    torch.manual_seed(0)
    F = 65_537
    b_enc = torch.full((F,), -10.0)
    b_enc[[0, 65_535, 65_536]] = 10.0
    leaves = {
        "x": torch.randn(3, 2),
        "W_enc": torch.randn(F, 2),
        "b_enc": b_enc,
        "W_dec": torch.randn(F, 2),
        "b_dec": torch.zeros(2),
    }
    args: tuple[Any, ...] = (leaves, {}, torch.randn(3, 2), torch.tensor(0.5))
    actual, gradients = run(*args, dtype=torch.float32, implementation="sparse")
    expected, expected_gradients = run(*args, dtype=torch.float32, implementation="reference")
    assert {0, 65_535, 65_536} <= set(actual.stats.fired.nonzero().flatten().tolist())
    torch.testing.assert_close(actual.out, expected.out)
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, expected_gradients[name])


@pytest.mark.parametrize("share", [0.0, 0.001, 0.01, 0.03, 0.06, 0.5, 1.0])
def test_exact_with_codes_and_with_dense_products(share: float) -> None:
    torch.manual_seed(0)
    T, D, F = 96, 16, 256
    x, W_enc = torch.randn(T, D), torch.randn(F, D)
    cut = torch.quantile((x @ W_enc.T).flatten(), 1 - share)
    leaves = {
        "x": x,
        "W_enc": W_enc,
        "b_enc": torch.full((F,), float(-cut) + (100 if share == 1 else 0)),
        "W_dec": torch.randn(F, D),
        "b_dec": torch.randn(D),
    }
    args: tuple[Any, ...] = (leaves, {}, torch.randn(T, D), torch.tensor(0.1))
    oracle = run(*args, dtype=torch.float64, implementation="reference")
    peer = run(*args, dtype=torch.float32, implementation="reference")
    actual = run(*args, dtype=torch.float32, implementation="auto")
    assert_close(actual[0].out, oracle[0].out, peer[0].out)
    for name, gradient in actual[1].items():
        assert_close(gradient, oracle[1][name], peer[1][name], name=name)
    assert actual[0].stats.n_active == peer[0].stats.n_active


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_features_that_fire_on_most_tokens(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    T, D, F = 2000, 8, 40
    b_enc = torch.full((F,), -6.0)
    b_enc[::9] = 6.0  # long sums, which must stay accurate
    b_enc[3] = -0.0
    leaves = {
        "x": torch.randn(T, D) + 1,
        "W_enc": torch.randn(F, D),
        "b_enc": b_enc,
        "W_dec": torch.randn(F, D),
        "b_dec": torch.randn(D),
    }
    leaves = {name: leaf.to(dtype) for name, leaf in leaves.items()}
    args: tuple[Any, ...] = (leaves, {}, torch.randn(T, D).to(dtype) + 1, torch.tensor(0.1))
    oracle = run(*args, dtype=torch.float64, implementation="reference")
    peer = run(*args, dtype=dtype, implementation="reference")
    actual = run(*args, dtype=dtype, implementation="sparse", plan=CodeLayout(dense=False))
    assert (actual[0].stats.feature_counts > 1800).any()
    assert_close(actual[0].out, oracle[0].out, peer[0].out)
    for name, gradient in actual[1].items():
        assert_close(gradient, oracle[1][name], peer[1][name], name=name)


@pytest.mark.parametrize("lead", [(), (5,), (0,), (2, 5), (2, 3, 5), (2, 0, 5), (1, 2, 3, 5)])
@pytest.mark.parametrize("implementation", ["reference", "sparse"])
def test_any_leading_shape(implementation: str, lead: tuple[int, ...]) -> None:
    leaves, _ = small("batch_topk")
    d_in, d_out = leaves["x"].shape[-1], leaves["W_dec"].shape[1]
    by_token: dict[str, Any] = {
        "x": torch.randn(*lead, d_in, dtype=torch.float64),
        "residual": torch.randn(*lead, d_out, dtype=torch.float64),
        "mask": torch.rand(lead),
        "padding": torch.rand(lead) < 0.3,
    }
    options: dict[str, Any] = {
        "activation": "batch_topk",
        "k": 1.5,
        "implementation": implementation,
    }
    result = transcoder(**leaves | by_token, **options, return_codes=True)
    S, T = math.prod(lead[:-1]), lead[-1] if lead else 1
    rows = {name: t.reshape(S, T, *t.shape[len(lead) :]) for name, t in by_token.items()}
    expected = transcoder(**leaves | rows, **options, return_codes=True)
    assert result.out.shape == (*lead, d_out)
    assert torch.equal(result.out.reshape(S, T, d_out), expected.out)
    assert torch.equal(result.penalty, expected.penalty)
    assert result.codes is not None
    assert expected.codes is not None
    for a, b in zip(
        (*result.stats, *result.codes), (*expected.stats, *expected.codes), strict=True
    ):
        assert torch.equal(a.nan_to_num(-1), b.nan_to_num(-1))


def tanh_and_l1(
    implementation: str, plan: CodeLayout | None, scale: float, dtype: torch.dtype
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return the penalty divided by its scale, and L1, each with its gradients by name."""
    leaves, arguments = small("jumprelu")
    more: dict[str, Any] = {"implementation": implementation, "plan": plan}
    results = []
    for penalty in ({}, tanh(scale)):
        inputs = {name: t.float().to(dtype).requires_grad_() for name, t in leaves.items()}
        value = transcoder(**inputs, **arguments, **penalty, **more).penalty
        value = value / scale if penalty else value
        names = ["x", "W_enc", "b_enc", "W_dec", "threshold"]
        gradients = torch.autograd.grad(value, [inputs[name] for name in names])
        results.append({"penalty": value, **dict(zip(names, gradients, strict=True))})
    return results[1], results[0]


@pytest.mark.parametrize(("implementation", "plan"), VARIANTS)
def test_tanh_becomes_l1_as_its_scale_vanishes(
    implementation: str, plan: CodeLayout | None
) -> None:
    """``tanh(cu)/c = u - c² u³/3``: a tenth of c, a hundredth of every difference."""
    errors = []
    for scale in (1e-2, 1e-3):
        by_tanh, by_l1 = tanh_and_l1(implementation, plan, scale, torch.float64)
        errors.append({name: (by_tanh[name] - by_l1[name]).norm() for name in by_l1})
    for name, large in errors[0].items():
        assert large > 0, name
        assert 98 < large / errors[1][name] < 102, name
    # Near 0, tanh loses no digits: it is as close to the exact L1 as L1 itself.
    actual, peer = tanh_and_l1(implementation, plan, 1e-6, torch.float32)
    for name, value in actual.items():
        assert_close(value, by_l1[name], peer[name], name=name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("implementation", "plan"), VARIANTS)
def test_tanh_saturates(implementation: str, plan: CodeLayout | None, dtype: torch.dtype) -> None:
    """Strong features cost 1 and have no gradient; rows of norm 0 cost nothing and have none."""
    large = float(torch.finfo(dtype).max)
    W_dec = torch.tensor([[3.0, 4.0], [0.0, 0.0], [large**0.5 / 2, 0.0]], dtype=dtype)
    leaves: dict[str, Any] = {
        "x": torch.tensor([[1.0], [2.0]], dtype=dtype),
        "W_enc": torch.full((3, 1), large / 16, dtype=dtype),
        "b_enc": torch.zeros(3, dtype=dtype),
        "W_dec": W_dec,
        "b_dec": torch.zeros(2, dtype=dtype),
    }
    leaves = {name: leaf.requires_grad_() for name, leaf in leaves.items()}
    weight = torch.tensor([1.0, 0.25])
    options: dict[str, Any] = {"implementation": implementation, "plan": plan, **tanh(4.0)}
    result = transcoder(**leaves, mask=weight, **options)
    assert result.penalty == 2 * 1.25  # of three active features, one with a row of norm 0
    gradients = torch.autograd.grad(result.penalty, list(leaves.values()), allow_unused=True)
    for gradient in gradients:
        assert gradient is None or torch.equal(gradient, torch.zeros_like(gradient))


@pytest.mark.parametrize("plan", [CodeLayout(dense=True), CodeLayout(dense=False)])
def test_a_penalty_without_its_slope_is_noticed(
    plan: CodeLayout, monkeypatch: pytest.MonkeyPatch
) -> None:
    leaves, arguments = small("relu")
    args: tuple[Any, ...] = (
        leaves,
        arguments | tanh(0.7),
        torch.zeros_like(leaves["residual"]),
        torch.tensor(1.0),
    )
    monkeypatch.setattr(sparse, "ENTRIES", 3 * 6)  # three tokens at once, and one at the end
    (_, penalty, *_), oracle = run(*args, dtype=torch.float64, implementation="reference")
    for slope, equal in ((sparse.slopes_, True), (lambda u, scale: u.fill_(scale), False)):
        monkeypatch.setattr(sparse, "slopes_", slope)
        result, gradients = run(*args, dtype=torch.float64, implementation="sparse", plan=plan)
        torch.testing.assert_close(result.penalty, penalty)
        for name in ("x", "W_enc", "b_enc", "W_dec"):
            assert torch.allclose(gradients[name], oracle[name], rtol=1e-9) == equal, name


def wrong(**changes: Any) -> dict[str, Any]:
    return {
        "x": torch.zeros(5, 3),
        "W_enc": torch.zeros(6, 3),
        "b_enc": torch.zeros(6),
        "W_dec": torch.zeros(6, 4),
        "b_dec": torch.zeros(4),
    } | changes


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"x": torch.zeros(())}, r"x must be of shape \[\.\.\., d_in\]; got \[\]"),
        ({"x": torch.zeros(5, 3).long()}, "x must be of a floating dtype; got torch.int64"),
        ({"x": torch.zeros(5, 2)}, r"W_enc must be of shape \[6, 2\].*got \[6, 3\]"),
        ({"W_enc": torch.zeros(6)}, r"W_enc must be of shape \[F, d_in\]; got \[6\]"),
        ({"b_enc": torch.zeros(7)}, r"b_enc must be of shape \[6\].*got \[7\]"),
        ({"W_dec": torch.zeros(4, 6)}, r"W_dec must be of shape \[6, 6\].*got \[4, 6\]"),
        ({"b_dec": torch.zeros(3)}, r"b_dec must be of shape \[4\].*got \[3\]"),
        ({"b_dec": torch.zeros(4).double()}, "b_dec must be of x's dtype.*got torch.float64"),
        ({"b_dec": torch.zeros(4, device="meta")}, "b_dec must be on x's device, cpu; got meta"),
        ({"residual": torch.zeros(5, 3)}, r"residual must be of shape \[5, 4\].*got \[5, 3\]"),
        ({"mask": torch.ones(4)}, r"mask must be of shape \[5\].*got \[4\]"),
        ({"mask": torch.ones(5).long()}, "mask must be bool or floating weights; got torch.int64"),
        ({"padding": torch.ones(5)}, "padding must be of dtype bool; got torch.float32"),
        ({"activation": "gelu"}, "activation must be one of .*got 'gelu'"),
        ({"k": 3}, "k must be None with relu; got 3"),
        ({"activation": "topk"}, "k must be given for activation 'topk'; got None"),
        ({"activation": "topk", "k": 7}, r"k must be in 0\.\.6, the number of features; got 7"),
        ({"activation": "topk", "k": 1.5}, "k must be a whole number for topk; got 1.5"),
        ({"activation": "batch_topk", "k": -1}, r"k must be in 0\.\.6"),
        ({"activation": "batch_topk", "k": 1, "threshold": torch.ones(())}, "k must be None with"),
        ({"threshold": torch.ones(6)}, "threshold must be None with relu; got a tensor"),
        (
            {"activation": "jumprelu", "bandwidth": 0.1},
            r"threshold must be a tensor of shape \[6\]",
        ),
        ({"activation": "jumprelu", "threshold": torch.ones(6)}, "bandwidth must be given"),
        (
            {"activation": "jumprelu", "threshold": torch.ones(6), "bandwidth": 0.0},
            r"bandwidth must be positive and finite; got 0\.0",
        ),
        (
            {"activation": "jumprelu", "threshold": torch.ones(5), "bandwidth": 0.1},
            r"threshold must be of shape \[6\]; got \[5\]",
        ),
        ({"penalty": "l0"}, "penalty must be one of .*got 'l0'"),
        ({"penalty_scale": 4.0}, r"penalty_scale must be None with l1; got 4\.0"),
        ({"penalty": "tanh"}, "penalty_scale must be given for tanh; got None"),
        (
            {"penalty": "tanh", "penalty_scale": 0.0},
            r"penalty_scale must be positive and finite; got 0\.0",
        ),
        ({"implementation": "cuda"}, "implementation must be one of .*got 'cuda'"),
        (
            {"b_enc": torch.ones(6), "plan": CodeLayout(False, 29)},
            "plan.capacity must be at least the number of codes, 30; got 29; raise it",
        ),
    ],
)
def test_misuse_raises_one_clear_error(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"transcoder: {message}"):
        transcoder(**wrong(**changes))


def test_wrong_types() -> None:
    with pytest.raises(TypeError, match="W_dec must be a tensor; got list"):
        transcoder(**wrong(W_dec=[1.0]))
    with pytest.raises(TypeError, match="plan must be a CodeLayout or None; got dict"):
        transcoder(**wrong(plan={}))
    with pytest.raises(TypeError, match="threshold must be a tensor; got float"):
        transcoder(**wrong(activation="jumprelu", threshold=0.1, bandwidth=0.1))
