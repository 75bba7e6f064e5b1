"""linear_kl at the edges: what is not finite, weightless, empty or tied, and misuse."""

import math

import pytest
import torch
from torch import Tensor

from fastadapt.kernels.linear_kl import linear_kl

IMPLEMENTATIONS = ("reference", "chunked")


def example(
    S: int = 2, T: int = 11, D: int = 5, V: int = 13, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(5)
    shapes = ((T, D), (S, T, D), (V, D))
    teacher, students, head = (torch.randn(s, generator=generator).to(dtype) for s in shapes)
    return teacher, students, head


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("place", ["teacher", "student"])
def test_a_token_that_is_not_finite_shows_and_stays_alone(implementation, value, place):
    teacher, students, head = example()
    labels = torch.arange(11)
    clean = linear_kl(teacher, students, head, labels=labels, implementation=implementation)
    teacher, students = teacher.clone(), students.clone()
    (teacher if place == "teacher" else students[1])[4, 2] = value
    students.requires_grad_()
    output = linear_kl(
        teacher, students, head, labels=labels, chunk_tokens=4, implementation=implementation
    )
    hit = torch.zeros(2, 11, dtype=torch.bool)
    hit[slice(None) if place == "teacher" else 1, 4] = True
    assert torch.equal(output.token_kl.isnan(), hit)
    assert not output.token_top1[hit].any()
    assert torch.equal(output.token_top1[~hit], clean.token_top1[~hit])
    assert torch.equal(output.kl.isnan(), hit.any(1))
    output.kl.sum().backward()
    assert torch.equal(students.grad.isnan().any(-1), hit)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_tokens_of_weight_zero_take_no_part_but_are_computed(implementation):
    teacher, students, head = example()
    mask = torch.arange(11) % 3 != 0
    everything = linear_kl(teacher, students, head, implementation=implementation)
    students[:, 3] = math.nan
    teacher[6] = math.inf
    students.requires_grad_()
    output = linear_kl(teacher, students, head, mask=mask, implementation=implementation)
    expected = everything.token_kl[:, mask].mean(1)
    torch.testing.assert_close(output.kl.detach(), expected)
    output.kl.sum().backward()
    assert not students.grad[:, ~mask].any()
    assert students.grad[:, mask].ne(0).all()
    assert output.token_kl[:, [3, 6]].isnan().all()
    assert torch.equal(output.token_kl[:, [0, 9]], everything.token_kl[:, [0, 9]])


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_nothing_counted_is_zero_with_zero_gradient(implementation):
    teacher, students, head = example()
    students.requires_grad_()
    head.requires_grad_()
    mask = torch.zeros(11, dtype=torch.bool)
    kl = linear_kl(teacher, students, head, mask=mask, implementation=implementation).kl
    kl.sum().backward()
    assert not kl.any()
    assert not students.grad.any()
    assert not head.grad.any()


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_impossible_tokens_of_the_teacher_count_nothing(implementation):
    """An infinite row of the head: logit -inf where the hidden state is positive."""
    teacher, students, head = torch.ones(2, 1), torch.ones(1, 2, 1), torch.zeros(3, 1)
    head[1] = -math.inf
    head[2] = 1.0
    students[0, 1] = 3.0
    output = linear_kl(teacher, students, head, implementation=implementation)
    p = torch.tensor([0.0, 1.0]).softmax(0)
    q = torch.tensor([0.0, 3.0]).softmax(0)
    expected = (p * (p / q).log()).sum()
    torch.testing.assert_close(output.token_kl, torch.stack([expected * 0, expected])[None])
    reverse = linear_kl(-teacher, students, head, implementation=implementation)
    assert reverse.token_kl.isnan().all()  # +inf - inf in the teacher's softmax
    head[1] = -200.0  # p = exp(-200) is 0 in float32, its logarithm is not
    output = linear_kl(teacher, students, head, implementation=implementation)
    torch.testing.assert_close(output.token_kl, torch.stack([expected * 0, expected])[None])


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_a_student_that_excludes_a_possible_token_is_infinitely_far(implementation):
    head = torch.tensor([[0.0], [-3e38]])
    teacher, students = torch.full((1, 1), 1e-38), torch.full((1, 1, 1), 10.0)  # 10 * -3e38 = -inf
    students.requires_grad_()
    output = linear_kl(teacher, students, head, implementation=implementation)
    assert output.kl.tolist() == [math.inf]
    (grad,) = torch.autograd.grad(output.kl.sum(), students)
    assert not grad.isnan().any()


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_ties_go_to_the_lowest_index(implementation):
    head = torch.tensor([[1.0], [2.0], [2.0], [0.0]])
    teacher = torch.tensor([[1.0], [1.0], [0.0]])
    students = torch.tensor([[[1.0], [-1.0], [0.0]]])
    output = linear_kl(teacher, students, head, implementation=implementation)
    assert output.token_top1.tolist() == [[True, False, True]]
    # All four logits tie at the cap: index 0, where the uncapped teacher has index 1.
    capped = linear_kl(teacher + 1e3, students + 1e3, head + 5, softcap=1.0)
    assert capped.token_top1.all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_student_equal_to_the_teacher_has_kl_and_gradient_zero(dtype):
    teacher, _, head = example(T=37, D=33, V=300, dtype=dtype)
    wide = torch.zeros(37, 41, dtype=dtype)
    wide[:, 3:36] = teacher
    students = wide[None, :, 3:36].requires_grad_()
    output = linear_kl(teacher, students, head, chunk_tokens=8)
    output.kl.sum().backward()
    assert not output.token_kl.any()
    assert not students.grad.any()
    assert output.token_top1.all()


def test_no_token_gives_empty_results():
    teacher, students, head = example(T=0)
    output = linear_kl(teacher, students, head, labels=torch.zeros(0, dtype=torch.int64))
    assert output.kl.tolist() == [0, 0]
    assert [t.shape for t in output[1:]] == [(2, 0)] * 3


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
        ({"implementation": "triton"}, NotImplementedError, "not built yet for linear_kl"),
        ({"implementation": "fast"}, ValueError, "implementation: expected one of auto, reference"),
    ],
)
def test_errors_name_argument_expected_and_got(change, error, message):
    teacher, students, head = example()
    arguments = {"hidden_teacher": teacher, "hidden_students": students, "head": head} | change
    with pytest.raises(error, match=message):
        linear_kl(
            arguments.pop("hidden_teacher"),
            arguments.pop("hidden_students"),
            arguments.pop("head"),
            **arguments,
        )
