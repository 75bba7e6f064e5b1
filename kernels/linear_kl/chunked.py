"""Linear + KL a chunk of tokens at a time, with the gradient made in the same pass.

Two buffers of [chunk, V] serve every stream: one keeps the teacher's log-probabilities, which all
students share; the other holds one student's logits, then, in place, their gradient. What is
elementwise runs over small blocks of rows, so that its temporaries stay in cache.

S students, T tokens, D width, V vocabulary, C tokens of a chunk.
"""

import torch
from torch import Tensor

_BLOCK_ELEMENTS = {"cpu": 2**19}  # of temporaries, fp32: 2 MiB
_BLOCK_ELEMENTS_ELSEWHERE = 2**24


def linear_kl_chunked(
    teacher_TD: Tensor,
    students_STD: Tensor,
    head_VD: Tensor,
    weights_T: Tensor,
    labels_T: Tensor | None,
    softcap: float | None,
    chunk_tokens: int,
    logits_dtype: torch.dtype,
    students_grad: bool,
    head_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Values and gradients in one pass over the tokens.

    Returns:
        kl [S], token_kl [S,T], token_cross_entropy [S,T] ([0] without labels), token_top1 [S,T];
        scale [T]: each token's share of kl;
        grad_students [S,T,D]: d token_kl / d hidden_students, 0 for tokens of weight 0 ([0] unless
        ``students_grad``). Unscaled, so that a float16 result does not underflow;
        grad_head [S,V,D]: d kl / d head in the softmax dtype ([0] unless ``head_grad``).
    """
    S, T, D = students_STD.shape
    V = head_VD.shape[0]
    _check_labels(labels_T, V)
    new = weights_T.new_empty
    total = weights_T.sum()
    scale_T = torch.where(total == 0, 0, weights_T / total)
    token_kl = new(S, T)
    token_ce = new(0) if labels_T is None else new(S, T)
    token_top1 = new((S, T), dtype=torch.bool)
    grad_students = torch.empty_like(students_STD, memory_format=torch.contiguous_format)
    grad_students = grad_students if students_grad else students_STD.new_empty(0)
    grad_head = weights_T.new_zeros((S, V, D) if head_grad else (0,))

    chunk = max(1, min(chunk_tokens, T))
    # Every stream's rows go through one buffer: equal hidden states give equal bits, and KL 0.
    hidden_CD = teacher_TD.new_empty(chunk, D)
    log_p_CV = new(chunk, V)
    logits_CV = new((chunk, V), dtype=logits_dtype)
    for start in range(0, T, chunk):
        rows = slice(start, min(start + chunk, T))
        n = rows.stop - start
        log_p, logits = log_p_CV[:n], logits_CV[:n]
        labels = None if labels_T is None else labels_T[rows]
        _project(hidden_CD[:n].copy_(teacher_TD[rows]), head_VD, logits)
        top1 = _teacher_log_softmax(logits, softcap, log_p)
        uncounted_C1 = (weights_T[rows] == 0)[:, None]
        for s in range(S):
            hidden = hidden_CD[:n].copy_(students_STD[s, rows])
            _project(hidden, head_VD, logits)
            _student_pass(
                log_p,
                logits,
                top1,
                labels,
                softcap,
                students_grad or head_grad,
                token_kl[s, rows],
                None if labels is None else token_ce[s, rows],
                token_top1[s, rows],
            )
            if students_grad:
                grad = grad_students[s, rows]
                _project_back(logits, head_VD, grad)
                grad.masked_fill_(uncounted_C1, 0)
            if head_grad:
                _add_head_gradient(logits, hidden, scale_T[rows], grad_head[s])
    kl = torch.where(weights_T != 0, scale_T * token_kl, 0).sum(-1)
    return kl, token_kl, token_ce, token_top1, scale_T, grad_students, grad_head


def _check_labels(labels_T: Tensor | None, V: int) -> None:
    """On a GPU the gather's own device-side check has to do: looking here would synchronise."""
    if labels_T is None or labels_T.device.type != "cpu":
        return
    wrong = ((labels_T < 0) | (labels_T >= V)) & (labels_T != -100)
    if bool(wrong.any()):
        t = int(wrong.nonzero()[0])
        raise ValueError(f"labels: expected 0..{V - 1} or -100, got {int(labels_T[t])} at {t}")


def _blocks(tensor_CV: Tensor) -> list[slice]:
    """Blocks of rows small enough for elementwise temporaries."""
    C, V = tensor_CV.shape
    elements = _BLOCK_ELEMENTS.get(tensor_CV.device.type, _BLOCK_ELEMENTS_ELSEWHERE)
    rows = max(1, elements // max(1, V))
    return [slice(start, min(start + rows, C)) for start in range(0, C, rows)]


def _capped(logits: Tensor, softcap: float | None, dtype: torch.dtype) -> Tensor:
    """softcap * tanh(logits / softcap) in ``dtype``; ``logits`` itself where there is no work."""
    if softcap is None:
        return logits.to(dtype)
    return (logits.to(dtype) / softcap).tanh_().mul_(softcap)


def _teacher_log_softmax(logits_CV: Tensor, softcap: float | None, out_CV: Tensor) -> Tensor:
    """Log-probabilities into ``out_CV``; returns the most probable token [C], the first of ties."""
    top1 = []
    for block in _blocks(logits_CV):
        z = _capped(logits_CV[block], softcap, out_CV.dtype)
        top1.append(_first_argmax(z))
        torch.log_softmax(z, -1, out=out_CV[block])
    return torch.cat(top1)


def _first_argmax(z: Tensor) -> Tensor:
    """max promises the first of ties like argmax, which takes three times as long on a CPU."""
    return z.max(-1).indices


def _student_pass(
    log_p_CV: Tensor,
    logits_CV: Tensor,
    teacher_top1_C: Tensor,
    labels_C: Tensor | None,
    softcap: float | None,
    with_gradient: bool,
    kl_C: Tensor,
    cross_entropy_C: Tensor | None,
    top1_C: Tensor,
) -> None:
    """Fills kl, cross-entropy and agreement; replaces the logits by d kl / d logits if asked."""
    for block in _blocks(logits_CV):
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
            labels = labels_C[block]
            picked = log_q.gather(-1, labels.masked_fill(labels == -100, 0)[:, None])[:, 0]
            cross_entropy_C[block] = (-picked).masked_fill_(labels == -100, 0)
        if with_gradient:
            grad = log_q.exp_().sub_(p)
            if softcap is not None:  # d cap tanh(z / cap) / dz = 1 - tanh^2
                grad.mul_(1 - z.div_(softcap).square_())
            logits_CV[block] = grad


def _project(hidden_CD: Tensor, head_VD: Tensor, out_CV: Tensor) -> None:
    """hidden @ head.T in ``out``'s dtype, without a copy of the head in that dtype."""
    dtype = out_CV.dtype
    if hidden_CD.dtype == head_VD.dtype == dtype:
        torch.mm(hidden_CD, head_VD.T, out=out_CV)
    elif _accumulates_wider(hidden_CD, head_VD, dtype):
        torch.mm(hidden_CD, head_VD.T, out_dtype=dtype, out=out_CV)
    else:
        hidden_CD = hidden_CD.to(dtype)
        for block in _blocks(head_VD):
            torch.mm(hidden_CD, head_VD[block].to(dtype).T, out=out_CV[:, block])


def _project_back(grad_CV: Tensor, head_VD: Tensor, out_CD: Tensor) -> None:
    """grad @ head, accumulated in ``grad``'s dtype and rounded once to ``out``'s."""
    dtype = grad_CV.dtype
    if head_VD.dtype == dtype == out_CD.dtype:
        torch.mm(grad_CV, head_VD, out=out_CD)
    elif _accumulates_wider(out_CD, head_VD, dtype):
        out_CD.copy_(torch.mm(grad_CV.to(head_VD.dtype), head_VD, out_dtype=dtype))
    else:
        total_CD = grad_CV.new_zeros(out_CD.shape)
        for block in _blocks(head_VD):
            total_CD.addmm_(grad_CV[:, block], head_VD[block].to(dtype))
        out_CD.copy_(total_CD)


def _add_head_gradient(grad_CV: Tensor, hidden_CD: Tensor, scale_C: Tensor, out_VD: Tensor) -> None:
    """out += grad.T @ (scale * hidden)."""
    hidden_CD = hidden_CD.to(out_VD.dtype) * scale_C[:, None]
    for block in _blocks(out_VD):
        out_VD[block].addmm_(grad_CV[:, block].to(out_VD.dtype).T, hidden_CD)


def _accumulates_wider(a: Tensor, b: Tensor, dtype: torch.dtype) -> bool:
    """Whether the device multiplies 16-bit matrices straight into a float32 result."""
    return (
        a.device.type == "cuda"
        and a.dtype == b.dtype
        and a.dtype in (torch.float16, torch.bfloat16)
        and dtype == torch.float32
    )
