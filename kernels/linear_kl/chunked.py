"""What happens to logits between the matrix products, in PyTorch: any device, any dtype.

The teacher's log-probabilities are kept, in the softmax dtype, for all students. Everything runs
over small blocks of rows, so that temporaries stay small, and on a CPU in cache.

V vocabulary, C tokens of a chunk.
"""

import torch
from torch import Tensor

from .chunks import Elementwise, Gradient, row_blocks


def _teacher_pass(
    logits_CV: Tensor, softcap: float | None, log_p_CV: Tensor
) -> tuple[Tensor, Tensor]:
    """Fills the log-probabilities; with them, the most probable token [C], the first of ties."""
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
    """Fills kl, cross-entropy and agreement; replaces the logits by d kl / d logits if asked."""
    log_p_CV, teacher_top1_C = teacher
    for block in row_blocks(logits_CV):
        log_p = log_p_CV[block]
        z = _capped(logits_CV[block], softcap, log_p.dtype)
        log_q = z.log_softmax(-1)
        p = log_p.exp()
        terms = (log_p - log_q).mul_(p)
        kl = terms.sum(-1)
        if kl.device.type != "cpu" or bool(kl.isnan().any()):
            # Terms with p = 0 count 0 also where a logarithm is infinite: NaN so far. Elsewhere
            # they are 0 already, and a CPU can look before it spends the two passes.
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
    """softcap * tanh(logits / softcap) in ``dtype``; ``logits`` itself where there is no work."""
    if softcap is None:
        return logits.to(dtype)
    return (logits.to(dtype) / softcap).tanh_().mul_(softcap)


def _first_argmax(z: Tensor) -> Tensor:
    """max promises the first of ties like argmax, which takes three times as long on a CPU."""
    return z.max(-1).indices


def _cross_entropy(log_q_CV: Tensor, labels_C: Tensor) -> Tensor:
    """-log q at the label; 0 at -100, NaN at other labels outside the vocabulary."""
    V = log_q_CV.shape[-1]
    picked = log_q_CV.gather(-1, labels_C.clamp(0, V - 1)[:, None])[:, 0].neg()
    picked.masked_fill_((labels_C < 0) | (labels_C >= V), torch.nan)
    return picked.masked_fill_(labels_C == -100, 0)
