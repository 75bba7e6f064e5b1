"""Reference of the fused head and KL: dense PyTorch, plain autograd, all logits at once.

S students, T tokens, D width, V vocabulary size.
"""

import torch
from torch import Tensor


def linear_kl_reference(
    teacher_TD: Tensor,
    students_STD: Tensor,
    head_VD: Tensor,
    weights_T: Tensor,
    labels_T: Tensor | None,
    softcap: float | None,
    logits_dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
    """Return kl [S], token_kl [S,T], token_cross_entropy [S,T] or None, and token_top1 [S,T]."""
    softmax_dtype = weights_T.dtype

    def logits(hidden: Tensor) -> Tensor:
        z = (hidden.to(logits_dtype) @ head_VD.to(logits_dtype).T).to(softmax_dtype)
        return z if softcap is None else softcap * torch.tanh(z / softcap)

    counted_T1 = (weights_T != 0)[:, None]
    students_STD = torch.where(counted_T1, students_STD, students_STD.detach())
    with torch.no_grad():
        teacher_TV = logits(teacher_TD)
    students_STV = logits(students_STD)
    log_p, log_q = teacher_TV.log_softmax(-1), students_STV.log_softmax(-1)
    p = log_p.exp()
    token_kl = torch.where(p == 0, 0, p * (log_p - log_q)).sum(-1)

    total = weights_T.sum()
    scale_T = torch.where(total == 0, 0, weights_T / total)
    kl = torch.where(weights_T != 0, scale_T * token_kl, 0).sum(-1)

    token_kl = token_kl.detach()
    token_top1 = (students_STV.argmax(-1) == teacher_TV.argmax(-1)) & ~token_kl.isnan()
    if labels_T is None:
        return kl, token_kl, None, token_top1
    ignored_T = labels_T == -100
    index_ST1 = labels_T.masked_fill(ignored_T, 0).expand(len(log_q), -1)[..., None]
    token_ce = -log_q.detach().gather(-1, index_ST1)[..., 0]
    return kl, token_kl, token_ce.masked_fill(ignored_T, 0), token_top1
