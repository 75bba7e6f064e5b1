"""linear_kl for non-finite values, zero weights, empty inputs and ties; errors for misuse."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from transcoder_cases import SLOW_INTERPRETED

from fastadapt.kernels.linear_kl import linear_kl

IMPLEMENTATIONS = ("reference", "chunked", "triton")

# numpy warns in the interpreter where kernels subtract two infinities.
pytestmark = pytest.mark.filterwarnings("ignore:.* encountered in:RuntimeWarning:triton")


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make the small vocabularies of these tests span several blocks of the Triton kernels."""
    from fastadapt.kernels.linear_kl.triton_kl import CONFIGURATIONS

    for dtype, shipped in CONFIGURATIONS.items():
        monkeypatch.setitem(CONFIGURATIONS, dtype, shipped._replace(block=8))


def example(
    device: str,
    S: int = 2,
    T: int = 11,
    D: int = 5,
    V: int = 13,
    dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(5)
    shapes = ((T, D), (S, T, D), (V, D))
    tensors = (torch.randn(s, generator=generator).to(device, dtype) for s in shapes)
    return tuple(tensors)  # type: ignore[return-value]


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("place", ["teacher", "student"])
def test_a_non_finite_token_affects_only_its_results(
    implementation: str, value: float, place: str, device: str
) -> None:
    teacher, students, head = example(device)
    labels = torch.arange(11, device=device)
    clean = linear_kl(teacher, students, head, labels=labels, implementation=implementation)
    teacher, students = teacher.clone(), students.clone()
    (teacher if place == "teacher" else students[1])[4, 2] = value
    students.requires_grad_()
    output = linear_kl(
        teacher, students, head, labels=labels, chunk_tokens=4, implementation=implementation
    )
    hit = torch.zeros(2, 11, dtype=torch.bool, device=device)
    hit[slice(None) if place == "teacher" else 1, 4] = True
    assert torch.equal(output.token_kl.isnan(), hit)
    assert not output.token_top1[hit].any()
    assert torch.equal(output.token_top1[~hit], clean.token_top1[~hit])
    assert torch.equal(output.kl.isnan(), hit.any(1))
    output.kl.sum().backward()
    assert students.grad is not None
    assert torch.equal(students.grad.isnan().any(-1), hit)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_tokens_of_weight_zero_give_no_gradient_but_token_results(
    implementation: str, device: str
) -> None:
    teacher, students, head = example(device)
    mask = torch.arange(11, device=device) % 3 != 0
    everything = linear_kl(teacher, students, head, implementation=implementation)
    students[:, 3] = math.nan
    teacher[6] = math.inf
    students.requires_grad_()
    output = linear_kl(teacher, students, head, mask=mask, implementation=implementation)
    expected = everything.token_kl[:, mask].mean(1)
    torch.testing.assert_close(output.kl.detach(), expected)
    output.kl.sum().backward()
    assert students.grad is not None
    assert not students.grad[:, ~mask].any()
    assert students.grad[:, mask].ne(0).all()
    assert output.token_kl[:, [3, 6]].isnan().all()
    assert torch.equal(output.token_kl[:, [0, 9]], everything.token_kl[:, [0, 9]])


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_no_counted_token_gives_zero_and_zero_gradient(implementation: str, device: str) -> None:
    teacher, students, head = example(device)
    students.requires_grad_()
    head.requires_grad_()
    mask = torch.zeros(11, dtype=torch.bool, device=device)
    kl = linear_kl(teacher, students, head, mask=mask, implementation=implementation).kl
    kl.sum().backward()
    assert not kl.any()
    assert students.grad is not None
    assert head.grad is not None
    assert not students.grad.any()
    assert not head.grad.any()


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_tokens_of_probability_zero_count_as_zero(implementation: str, device: str) -> None:
    """An infinite row of the head gives logit -inf where the hidden state is positive."""
    shapes = ((2, 1), (1, 2, 1), (3, 1))
    teacher, students, head = (torch.ones(shape, device=device) for shape in shapes)
    head[0] = 0
    head[1] = -math.inf
    head[2] = 1.0
    students[0, 1] = 3.0
    output = linear_kl(teacher, students, head, implementation=implementation)
    p = torch.tensor([0.0, 1.0], device=device).softmax(0)
    q = torch.tensor([0.0, 3.0], device=device).softmax(0)
    expected = (p * (p / q).log()).sum()
    torch.testing.assert_close(output.token_kl, torch.stack([expected * 0, expected])[None])
    reverse = linear_kl(-teacher, students, head, implementation=implementation)
    assert reverse.token_kl.isnan().all()  # +inf - inf in the teacher's softmax
    head[1] = -200.0  # p = exp(-200) is 0 in float32, but its logarithm is finite
    output = linear_kl(teacher, students, head, implementation=implementation)
    torch.testing.assert_close(output.token_kl, torch.stack([expected * 0, expected])[None])


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_a_student_that_excludes_a_possible_token_is_infinitely_far(
    implementation: str, device: str
) -> None:
    head = torch.tensor([[0.0], [-3e38]], device=device)
    teacher = torch.full((1, 1), 1e-38, device=device)
    students = torch.full((1, 1, 1), 10.0, device=device)  # 10 * -3e38 = -inf
    students.requires_grad_()
    output = linear_kl(teacher, students, head, implementation=implementation)
    assert output.kl.tolist() == [math.inf]
    (grad,) = torch.autograd.grad(output.kl.sum(), students)
    assert not grad.isnan().any()


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_ties_go_to_the_lowest_index(implementation: str, device: str) -> None:
    # The last row 30 times: ties also cross blocks of the Triton kernels.
    head = torch.tensor([[1.0], [2.0], [2.0], *[[0.0]] * 30, [2.0]], device=device)
    teacher = torch.tensor([[1.0], [1.0], [0.0]], device=device)
    students = torch.tensor([[[1.0], [-1.0], [0.0]]], device=device)
    output = linear_kl(teacher, students, head, implementation=implementation)
    assert output.token_top1.tolist() == [[True, False, True]]
    # All logits tie at the cap: index 0, where the uncapped teacher has index 1.
    capped = linear_kl(
        teacher + 1e3, students + 1e3, head + 5, softcap=1.0, implementation=implementation
    )
    assert capped.token_top1.all()


@pytest.mark.parametrize("softcap", [None, 4.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "implementation", ["chunked", pytest.param("triton", marks=SLOW_INTERPRETED)]
)
def test_a_student_equal_to_the_teacher_has_kl_and_gradient_zero(
    implementation: str, dtype: torch.dtype, softcap: float | None, device: str
) -> None:
    teacher, _, head = example(device, T=19, D=33, V=70, dtype=dtype)
    wide = torch.zeros(19, 41, dtype=dtype, device=device)
    wide[:, 3:36] = teacher
    students = wide[None, :, 3:36].requires_grad_()
    output = linear_kl(
        teacher, students, head, softcap=softcap, chunk_tokens=8, implementation=implementation
    )
    output.kl.sum().backward()
    assert not output.token_kl.any()
    assert students.grad is not None
    assert not students.grad.any()
    assert output.token_top1.all()


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_no_token_gives_empty_results(implementation: str, device: str) -> None:
    teacher, students, head = example(device, T=0)
    labels = torch.zeros(0, dtype=torch.int64, device=device)
    output = linear_kl(teacher, students, head, labels=labels, implementation=implementation)
    assert output.kl.tolist() == [0, 0]
    by_token: tuple[Any, ...] = output[1:]
    assert [t.shape for t in by_token] == [(2, 0)] * 3


@pytest.mark.parametrize("implementation", ["chunked", "triton"])
def test_labels_outside_the_vocabulary_raise_on_a_cpu_and_give_nan_elsewhere(
    implementation: str, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fastadapt.kernels.linear_kl.chunks._check_labels", lambda *_: None)
    teacher, students, head = example(device)
    labels = torch.tensor([0, 12, -100, 13, -1, 2**31, -(2**62), 2**62, -99, -101, 3])
    token_ce = linear_kl(
        teacher, students, head, labels=labels.to(device), implementation=implementation
    ).token_cross_entropy
    assert token_ce is not None
    assert token_ce.isnan().any(0).nonzero()[:, 0].tolist() == [3, 4, 5, 6, 7, 8, 9]
    assert token_ce[:, [0, 1, 10]].gt(0).all()
    assert not token_ce[:, 2].any()


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"hidden_teacher": [1.0]}, TypeError, "hidden_teacher: expected a tensor, got list"),
        ({"hidden_teacher": torch.ones(5)}, ValueError, r"hidden_teacher: expected \[T,D\], got"),
        (
            {"hidden_teacher": torch.ones(11, 5, dtype=torch.int64)},
            TypeError,
            "hidden_teacher: expected a floating dtype, got torch.int64",
        ),
        (
            {"hidden_students": torch.ones(2, 10, 5)},
            ValueError,
            r"hidden_students: expected \[S,11,5\], got \[2, 10, 5\]",
        ),
        ({"hidden_students": []}, ValueError, "hidden_students: expected at least one"),
        (
            {"hidden_students": [torch.ones(11, 5), torch.ones(11, 4)]},
            ValueError,
            r"hidden_students\[1\]: expected torch.float32 \[11, 5\] like the first",
        ),
        (
            {"hidden_students": [torch.ones(11, 5), None]},
            TypeError,
            r"hidden_students\[1\]: expected a tensor, got NoneType",
        ),
        (
            {"hidden_students": torch.ones(2, 11, 5).double()},
            TypeError,
            "hidden_students: expected torch.float32, got torch.float64",
        ),
        ({"head": torch.ones(13, 4)}, ValueError, r"head: expected \[V,5\] with V >= 1, got"),
        ({"head": torch.ones(0, 5)}, ValueError, "head: expected .* V >= 1"),
        ({"head": torch.ones(13, 5, device="meta")}, ValueError, "head: expected device cpu, got"),
        ({"mask": torch.ones(10)}, ValueError, r"mask: expected \[11\], got \[10\]"),
        (
            {"mask": torch.ones(11, dtype=torch.int64)},
            TypeError,
            "mask: expected bool or a floating dtype, got torch.int64",
        ),
        ({"labels": torch.ones(11)}, TypeError, "labels: expected torch.int64, got torch.float32"),
        (
            {"labels": torch.full((11,), 13)},
            ValueError,
            r"labels: expected 0\.\.12 or -100, got 13 at 0",
        ),
        ({"labels": torch.full((11,), -1)}, ValueError, "labels: expected .* got -1 at 0"),
        ({"softcap": 0.0}, ValueError, "softcap: expected None or a number > 0, got 0.0"),
        ({"softcap": math.nan}, ValueError, "softcap"),
        ({"chunk_tokens": 0}, ValueError, "chunk_tokens: expected an integer >= 1, got 0"),
        ({"logits_dtype": torch.int32}, TypeError, "logits_dtype: expected a floating dtype"),
        ({"implementation": "fast"}, ValueError, "implementation: expected one of auto, reference"),
    ],
)
def test_errors_name_argument_expected_and_got(
    change: dict[str, Any], error: type[Exception], message: str
) -> None:
    teacher, students, head = example("cpu")
    arguments = {"hidden_teacher": teacher, "hidden_students": students, "head": head} | change
    with pytest.raises(error, match=message):
        linear_kl(
            arguments.pop("hidden_teacher"),
            arguments.pop("hidden_students"),
            arguments.pop("head"),
            **arguments,
        )


def test_triton_raises_where_it_cannot_run(monkeypatch: pytest.MonkeyPatch) -> None:
    teacher, students, head = example("cpu")
    with pytest.raises(ValueError, match="computes in float32, got float64"):
        linear_kl(teacher.double(), students.double(), head, implementation="triton")
    with pytest.raises(ValueError, match="got float64 among inputs and logits_dtype"):
        linear_kl(teacher, students, head, logits_dtype=torch.float64, implementation="triton")
    monkeypatch.setattr("fastadapt.kernels.linear_kl.runs_triton", lambda device: device == "cuda")
    with pytest.raises(ValueError, match="needs a GPU, got tensors on cpu"):
        linear_kl(teacher, students, head, implementation="triton")
