"""Process logits between the matrix products in PyTorch, on any device and in any dtype.

The teacher's log-probabilities are stored in the softmax dtype for all students. Rows are processed
in small blocks, so that temporaries stay small and, on a CPU, in cache.

V vocabulary size, C tokens of a chunk.
"""

import torch
from torch import Tensor

from .chunks import Elementwise, Gradient, row_blocks


def _teacher_pass(
    logits_CV: Tensor, softcap: float | None, log_p_CV: Tensor
) -> tuple[Tensor, Tensor]:
    """Fill the log-probabilities; return them and the most probable token [C] (first of ties)."""
    top1 = []
    for block in row_blocks(logits_CV):
        z = _capped(logits_CV[block], softcap, log_p_CV.dtype)
        top1.append(_first_argmax(z))
        torch.log_softmax(z, -1, out=log_p_CV[block])
    return log_p_CV, torch.cat(top1)


def _student_pass(
    teacher: tuple[Tensor, ...],
    logits_CV: Tensor,
    labels_C: Tensor | None,
    softcap: float | None,
    gradient: Gradient | None,
    kl_C: Tensor,
    cross_entropy_C: Tensor | None,
    top1_C: Tensor,
) -> None:
    """Fill kl, cross-entropy and top-1 agreement; write d kl / d logits over the logits."""
    log_p_CV, teacher_top1_C = teacher
    for block in row_blocks(logits_CV):
        log_p = log_p_CV[block]
        z = _capped(logits_CV[block], softcap, log_p.dtype)
        log_q = z.log_softmax(-1)
        p = log_p.exp()
        terms = (log_p - log_q).mul_(p)
        kl = terms.sum(-1)
        if kl.device.type != "cpu" or bool(kl.isnan().any()):
            # Terms with p = 0 and an infinite logarithm are NaN so far and must count as 0. A CPU
            # can check for NaN first, which saves two passes.
            kl = terms.masked_fill_(p == 0, 0).sum(-1)
        kl_C[block] = kl
        top1_C[block] = (_first_argmax(z) == teacher_top1_C[block]) & ~kl.isnan()
        if cross_entropy_C is not None and labels_C is not None:
            cross_entropy_C[block] = _cross_entropy(log_q, labels_C[block])
        if gradient is not None:
            grad = log_q.exp_().sub_(p)
            if softcap is not None:  # d cap tanh(z / cap) / dz = 1 - tanh^2
                grad.mul_(1 - z.div_(softcap).square_())
            if gradient.unit != 1:
                grad.mul_(gradient.unit)
            gradient.rows[block] = grad


CHUNKED = Elementwise(keeps_logits=False, teacher=_teacher_pass, student=_student_pass)


def _capped(logits: Tensor, softcap: float | None, dtype: torch.dtype) -> Tensor:
    """Return softcap * tanh(logits / softcap) in ``dtype``; without softcap, the cast logits."""
    if softcap is None:
        return logits.to(dtype)
    return (logits.to(dtype) / softcap).tanh_().mul_(softcap)


def _first_argmax(z: Tensor) -> Tensor:
    """Return the first argmax of each row; max takes a third of argmax's time on a CPU."""
    return z.max(-1).indices


def _cross_entropy(log_q_CV: Tensor, labels_C: Tensor) -> Tensor:
    """Return -log q at the label: 0 for label -100, NaN for labels outside the vocabulary."""
    V = log_q_CV.shape[-1]
    picked = log_q_CV.gather(-1, labels_C.clamp(0, V - 1)[:, None])[:, 0].neg()
    picked.masked_fill_((labels_C < 0) | (labels_C >= V), torch.nan)
    return picked.masked_fill_(labels_C == -100, 0)
