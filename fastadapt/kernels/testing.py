"""Compare a result with a float64 reference (the *oracle*) under a computed error budget.

The *oracle* is the op's reference, run in float64 on the same inputs, which are already rounded to
the tested dtype. The *peer* is the same reference run in the tested dtype, i.e. the result of plain
PyTorch. The error of an implementation may be at most twice the peer's error, plus rounding:

    error <= 2 * (error(peer) + eps(dtype) * max|oracle|)

The bound applies to the largest error and to the root mean square. The module needs torch only.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["LAYOUTS", "ErrorBudget", "assert_close", "error_budget", "with_layout"]

#: Memory layouts of :func:`with_layout`.
LAYOUTS = ("contiguous", "transposed", "sliced", "parent", "offset", "expanded")


class ErrorBudget(NamedTuple):
    """Absolute errors of a result against the float64 reference, and the errors allowed."""

    max_error: float  #: infinite if NaN or infinities are not where the oracle has them
    rms_error: float  #: infinite where ``max_error`` is.
    max_budget: float  #: largest ``max_error`` that is allowed.
    rms_budget: float  #: largest ``rms_error`` that is allowed.
    worst: tuple[int, ...]  #: coordinates of the largest error; () for a scalar or empty tensor

    @property
    def within(self) -> bool:
        """Whether the maximum and the RMS error are within their budgets."""
        return self.max_error <= self.max_budget and self.rms_error <= self.rms_budget


def error_budget(actual: Tensor, oracle: Tensor, peer: Tensor | None = None) -> ErrorBudget:
    """Measure ``actual`` against ``oracle`` and compute the error budget.

    For a float64 ``actual``, pass a **float32** peer: the float64 reference is the oracle itself.
    The peer's error is scaled by eps(float64) / eps(float32). The budget is doubled, because the
    oracle's rounding is as large as that of ``actual``.

    Where the oracle, rounded to ``actual``'s dtype, is NaN or infinite, ``actual`` and the peer
    must have the same value. Errors are computed over the other entries.

    Args:
        actual: floating tensor of any shape and device: the result under test.
        oracle: float64 tensor of the same shape: the reference's result.
        peer: the reference's result in ``actual``'s dtype; None counts as an exact peer.

    Raises:
        ValueError: the tensors cannot be compared (shape, dtype, a peer that overflowed).

    Example:
        >>> exact = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)
        >>> error_budget(exact.float(), exact).within
        True
    """
    actual, oracle = actual.detach(), oracle.detach()
    _check_comparable(actual, oracle, peer)
    info = torch.finfo(actual.dtype)
    oracle_rounded = oracle.to(actual.dtype)
    error = _error(actual, oracle, oracle_rounded)
    finite_oracle = oracle[torch.isfinite(oracle_rounded)]
    scale = float(finite_oracle.abs().max()) if finite_oracle.numel() else 0.0
    unit = info.eps * max(scale, info.tiny)  # eps * tiny is the spacing of subnormals
    peer_max = peer_rms = 0.0
    if peer is not None:
        peer = peer.detach()
        peer_error = _error(peer, oracle, oracle.to(peer.dtype))
        peer_max, peer_rms = _max(peer_error), _rms(peer_error)
        if not math.isfinite(peer_max):
            raise ValueError(
                "peer: expected NaN and infinities at the same entries as in the float64 oracle; "
                "pass a peer that does not overflow"
            )
        ratio = info.eps / torch.finfo(peer.dtype).eps  # 1, except for a float64 actual
        peer_max, peer_rms = peer_max * ratio, peer_rms * ratio
    factor = 4 if actual.dtype == torch.float64 else 2
    return ErrorBudget(
        max_error=_max(error),
        rms_error=_rms(error),
        max_budget=factor * (peer_max + unit),
        rms_budget=factor * (peer_rms + unit),
        worst=_worst(error),
    )


def assert_close(
    actual: Tensor, oracle: Tensor, peer: Tensor | None = None, *, name: str = ""
) -> None:
    """Assert that ``actual`` is within the :func:`error_budget` of ``oracle``.

    Integer and boolean tensors must be equal. The error message contains the maximum and the RMS
    error, their budgets, and the coordinates of the largest error.

    Args:
        actual, oracle, peer: see :func:`error_budget`.
        name: name of the tensor, at the start of the error message.

    Raises:
        AssertionError: an error exceeds its budget, or shapes or dtypes do not agree.
    """
    title = name or "tensor"
    if actual.shape != oracle.shape:
        raise AssertionError(
            f"{title}: expected shape {tuple(oracle.shape)}, got {tuple(actual.shape)}"
        )
    if not actual.dtype.is_floating_point:
        _assert_equal(actual, oracle, title)
        return
    try:
        budget = error_budget(actual, oracle, peer)
    except ValueError as error:
        raise AssertionError(f"{title}: {error}") from error
    if budget.within:
        return
    where = budget.worst
    raise AssertionError(
        f"{title}: {actual.dtype} {tuple(actual.shape)} is too far from its float64 oracle\n"
        f"  max error {budget.max_error:.3e}, budget {budget.max_budget:.3e}\n"
        f"  RMS error {budget.rms_error:.3e}, budget {budget.rms_budget:.3e}\n"
        f"  worst at {where}: got {float(actual.detach()[where]):.9g}, "
        f"expected {float(oracle.detach()[where]):.9g}"
        + ("" if peer is None else f", peer {float(peer.detach()[where]):.9g}")
    )


def with_layout(tensor: Tensor, layout: str) -> Tensor:
    """Return a tensor with the values of ``tensor`` in the given memory layout.

    Memory between the entries is filled with NaN (integers: the dtype's maximum).

    Args:
        tensor: a tensor of any shape.
        layout: one of :data:`LAYOUTS`. "transposed": the last two dimensions are swapped in memory;
            "sliced": every second row of a taller tensor; "parent": columns of a wider tensor;
            "offset": storage with an unaligned start; "expanded": the first row repeated with
            stride 0. A scalar uses "offset" for every layout but "contiguous".

    Raises:
        ValueError: the layout does not exist.

    Example:
        >>> with_layout(torch.zeros(4, 3), "transposed").stride()
        (1, 4)
    """
    if layout not in LAYOUTS:
        raise ValueError(f"layout: expected one of {', '.join(LAYOUTS)}, got {layout!r}")
    if layout == "contiguous":
        return tensor.contiguous()
    shape = tensor.shape
    if tensor.ndim == 0 or layout == "offset":
        return _filled(tensor, (tensor.numel() + 3,))[3:].view(shape).copy_(tensor)
    if layout == "expanded":
        return tensor[:1].contiguous().expand(shape) if len(tensor) else tensor
    if layout == "sliced":
        return _filled(tensor, (2 * shape[0] + 1, *shape[1:]))[1::2].copy_(tensor)
    if layout == "parent":
        wide = _filled(tensor, (*shape[:-1], shape[-1] + 5))
        return wide[..., 2 : 2 + shape[-1]].copy_(tensor)
    if tensor.ndim == 1:  # one dimension cannot be transposed: take a column of a matrix
        return _filled(tensor, (shape[0], 2))[:, 1].copy_(tensor)
    return tensor.transpose(-1, -2).contiguous().transpose(-1, -2)


def _filled(tensor: Tensor, shape: tuple[int, ...]) -> Tensor:
    if tensor.dtype.is_floating_point:
        return tensor.new_full(shape, torch.nan)
    return tensor.new_full(
        shape, 1 if tensor.dtype == torch.bool else torch.iinfo(tensor.dtype).max
    )


def _check_comparable(actual: Tensor, oracle: Tensor, peer: Tensor | None) -> None:
    if not actual.dtype.is_floating_point:
        raise ValueError(f"actual: expected a floating dtype, got {actual.dtype}")
    if oracle.dtype != torch.float64:
        raise ValueError(f"oracle: expected dtype torch.float64, got {oracle.dtype}")
    if actual.shape != oracle.shape:
        raise ValueError(f"actual: expected shape {tuple(oracle.shape)}, got {tuple(actual.shape)}")
    if peer is None:
        return
    if peer.shape != oracle.shape:
        raise ValueError(f"peer: expected shape {tuple(oracle.shape)}, got {tuple(peer.shape)}")
    scaled = actual.dtype == torch.float64 and peer.dtype == torch.float32
    if peer.dtype != actual.dtype and not scaled:
        raise ValueError(f"actual: expected the peer's dtype {peer.dtype}, got {actual.dtype}")


def _error(result: Tensor, oracle: Tensor, oracle_rounded: Tensor) -> Tensor:
    """Return the absolute errors of ``result`` against the float64 reference.

    An error is infinite where only one of the two is finite, and 0 where both are the same
    non-finite value. The oracle's device computes the errors, since it supports float64.
    """
    result, oracle_rounded = result.to(oracle.device).double(), oracle_rounded.double()
    error = (result - oracle).abs()
    same = (result == oracle_rounded) | (result.isnan() & oracle_rounded.isnan())
    special = ~(torch.isfinite(result) & torch.isfinite(oracle_rounded))
    return torch.where(special, torch.where(same, 0.0, torch.inf), error)


def _max(error: Tensor) -> float:
    return float(error.max()) if error.numel() else 0.0


def _rms(error: Tensor) -> float:
    """Return the root mean square; scaling by the maximum avoids under- and overflow of squares."""
    top = _max(error)
    if top == 0.0 or math.isinf(top):
        return top
    return top * float((error / top).square().mean().sqrt())


def _worst(error: Tensor) -> tuple[int, ...]:
    if error.numel() == 0:
        return ()
    flat = int(error.argmax())
    return tuple(int(i) for i in torch.unravel_index(torch.tensor(flat), error.shape))


def _assert_equal(actual: Tensor, oracle: Tensor, title: str) -> None:
    if actual.dtype != oracle.dtype:
        raise AssertionError(f"{title}: expected dtype {oracle.dtype}, got {actual.dtype}")
    wrong = actual.cpu() != oracle.cpu()
    if not bool(wrong.any()):
        return
    where = _worst(wrong.double())
    raise AssertionError(
        f"{title}: {int(wrong.sum())} of {wrong.numel()} entries differ; first at {where}: "
        f"got {actual[where].item()}, expected {oracle[where].item()}"
    )
