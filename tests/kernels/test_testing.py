"""The comparison fails exactly for results outside their budget."""

import math

import pytest
import torch

from fastadapt.kernels.testing import LAYOUTS, assert_close, error_budget, with_layout

LOW = [torch.float32, torch.bfloat16, torch.float16]


def example(dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Return a product in ``dtype`` and in float64 of the same rounded inputs."""
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(17, 64, generator=generator).to(dtype)
    b = torch.randn(64, 13, generator=generator).to(dtype)
    return a @ b, a.double() @ b.double()


@pytest.mark.parametrize("dtype", LOW)
def test_the_peer_itself_passes(dtype: torch.dtype) -> None:
    result, oracle = example(dtype)
    assert_close(result, oracle, result)


@pytest.mark.parametrize("dtype", LOW)
def test_correct_rounding_passes_without_a_peer(dtype: torch.dtype) -> None:
    _, oracle = example(dtype)
    assert_close(oracle.to(dtype), oracle)


@pytest.mark.parametrize("dtype", LOW)
def test_one_wrong_row_fails_and_is_named(dtype: torch.dtype) -> None:
    result, oracle = example(dtype)
    wrong = result.clone()
    wrong[11] = result[10]
    with pytest.raises(AssertionError, match=r"scores: .*(?s:.)*worst at \(11, \d+\)"):
        assert_close(wrong, oracle, result, name="scores")


def test_the_message_holds_errors_budgets_and_values() -> None:
    actual = torch.tensor([1.0, 2.0, 4.0])
    oracle = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)
    with pytest.raises(AssertionError) as caught:
        assert_close(actual, oracle, oracle.float())
    message = str(caught.value)
    for part in ("max error 1.000e+00", "RMS error 5.774e-01", "budget", "(2,)", "got 4", "peer 3"):
        assert part in message


def test_the_budget_is_the_formula() -> None:
    oracle = torch.tensor([1.0, -8.0, 3.0], dtype=torch.float64)
    peer = torch.tensor([1.5, -8.0, 3.0])
    actual = torch.tensor([1.0, -8.0, 3.25])
    budget = error_budget(actual, oracle, peer)
    unit = torch.finfo(torch.float32).eps * 8
    assert budget.max_error == 0.25
    assert budget.rms_error == pytest.approx(0.25 / math.sqrt(3))
    assert budget.max_budget == pytest.approx(2 * (0.5 + unit))
    assert budget.rms_budget == pytest.approx(2 * (0.5 / math.sqrt(3) + unit))
    assert budget.worst == (2,)
    assert budget.within


def test_many_small_errors_fail_on_the_rms_alone() -> None:
    oracle = torch.zeros(100, dtype=torch.float64)
    peer = torch.zeros(100)
    peer[0] = 1.0
    actual = torch.full((100,), 0.9)
    budget = error_budget(actual, oracle, peer)
    assert budget.max_error <= budget.max_budget
    assert not budget.within


def test_wrong_shape_and_dtype_fail() -> None:
    result, oracle = example(torch.bfloat16)
    with pytest.raises(AssertionError, match=r"expected shape \(17, 13\), got \(13, 17\)"):
        assert_close(result.T, oracle)
    with pytest.raises(AssertionError, match=r"peer's dtype torch.bfloat16, got torch.float32"):
        assert_close(oracle.float(), oracle, result)
    with pytest.raises(AssertionError, match=r"oracle: expected dtype torch.float64"):
        assert_close(result, oracle.float())
    with pytest.raises(ValueError, match="floating"):
        error_budget(torch.ones(3, dtype=torch.int64), torch.ones(3).double())
    with pytest.raises(ValueError, match=r"actual: expected shape \(4,\), got \(3,\)"):
        error_budget(torch.ones(3), torch.ones(4).double())
    with pytest.raises(AssertionError, match=r"peer: expected shape \(3,\), got \(1,\)"):
        assert_close(torch.ones(3), torch.ones(3).double(), torch.ones(1))


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_special_values_must_be_where_the_oracle_has_them(value: float) -> None:
    oracle = torch.tensor([1.0, value, 3.0], dtype=torch.float64)
    assert_close(oracle.float(), oracle, oracle.float())
    for other in (torch.tensor([1.0, 2.0, 3.0]), torch.tensor([value, value, 3.0])):
        with pytest.raises(AssertionError, match="max error inf"):
            assert_close(other, oracle, oracle.float())
    swapped = torch.tensor([1.0, -math.inf if value == math.inf else math.inf, 3.0])
    with pytest.raises(AssertionError, match="max error inf"):
        assert_close(swapped, oracle)


def test_a_peer_with_additional_nan_is_an_error() -> None:
    oracle = torch.ones(2, dtype=torch.float64)
    with pytest.raises(AssertionError, match="peer"):
        assert_close(torch.ones(2), oracle, torch.tensor([1.0, math.nan]))


def test_the_oracle_overflows_to_infinity_in_the_tested_dtype() -> None:
    oracle = torch.tensor([1e6, 1.0], dtype=torch.float64)
    assert_close(torch.tensor([math.inf, 1.0], dtype=torch.float16), oracle)
    with pytest.raises(AssertionError, match="inf"):
        assert_close(torch.tensor([65504.0, 1.0], dtype=torch.float16), oracle)


def test_subnormals_are_compared_by_their_spacing() -> None:
    oracle = torch.tensor([3e-8, 1e-7], dtype=torch.float64)
    assert_close(oracle.half(), oracle)
    with pytest.raises(AssertionError):
        assert_close(torch.tensor([0.0, 3e-7], dtype=torch.float16), oracle)


def test_float64_scales_a_float32_peer_to_its_eps() -> None:
    generator = torch.Generator().manual_seed(1)
    a = torch.randn(9, 501, dtype=torch.float64, generator=generator)
    oracle = a.sum(1)
    shuffled = a[:, torch.randperm(501, generator=generator)].cumsum(1)[:, -1]
    peer = a.float().cumsum(1)[:, -1]
    assert_close(shuffled, oracle, peer)
    with pytest.raises(AssertionError, match="max error"):
        assert_close(shuffled + 1e-11, oracle, peer)


def test_integers_and_booleans_must_be_equal() -> None:
    counts = torch.tensor([[1, 2], [3, 4]])
    assert_close(counts, counts.clone())
    assert_close(counts > 2, counts > 2)
    with pytest.raises(AssertionError, match=r"1 of 4 .* first at \(1, 0\): got 5, expected 3"):
        assert_close(torch.tensor([[1, 2], [5, 4]]), counts)
    with pytest.raises(AssertionError, match="dtype"):
        assert_close(counts, counts.int())


def test_empty_and_scalar() -> None:
    assert_close(torch.empty(0, 3), torch.empty(0, 3).double(), torch.empty(0, 3))
    assert_close(torch.tensor(2.0), torch.tensor(2.0).double())
    with pytest.raises(AssertionError, match=r"worst at \(\): got 2, expected 3"):
        assert_close(torch.tensor(2.0), torch.tensor(3.0).double())


def test_results_that_require_grad_are_accepted() -> None:
    result = torch.ones(3, requires_grad=True) * 2
    assert_close(result, torch.full((3,), 2.0).double(), result)
    assert result.requires_grad


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", [(), (7,), (5, 3), (2, 5, 3), (0, 3)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.int64, torch.bool])
def test_layouts_keep_the_values(layout: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    values = torch.arange(math.prod(shape)).reshape(shape).to(dtype)
    laid_out = with_layout(values, layout)
    assert laid_out.shape == values.shape
    assert laid_out.dtype == dtype
    repeats = layout == "expanded" and values.ndim > 0
    assert torch.equal(laid_out, values[:1].expand(shape) if repeats else values)
    assert laid_out.untyped_storage().data_ptr() != values.untyped_storage().data_ptr() or (
        layout in ("contiguous", "expanded") or values.numel() == 0
    )


def test_layouts_have_the_strides_they_name() -> None:
    values = torch.zeros(2, 5, 3)
    strides = {layout: with_layout(values, layout).stride() for layout in LAYOUTS}
    assert strides == {
        "contiguous": (15, 3, 1),
        "transposed": (15, 1, 5),
        "sliced": (30, 3, 1),
        "parent": (40, 8, 1),
        "offset": (15, 3, 1),
        "expanded": (0, 3, 1),
    }
    assert with_layout(values, "offset").storage_offset() == 3
    with pytest.raises(ValueError, match="layout: expected one of contiguous"):
        with_layout(values, "diagonal")
