"""Register the ops' FLOP formulas with ``torch.utils.flop_counter.FlopCounterMode``."""

from functools import cache

__all__ = ["register_flop_formulas"]


@cache
def register_flop_formulas() -> None:
    """Register the formula of every op of ``fastadapt.kernels`` with torch's counter.

    Call this function before counting; repeated calls do nothing. Importing the ops does not
    register the formulas, because the counter imports triton and importing fastadapt must not.

    A formula receives the op's arguments, with every tensor replaced by its shape, and
    ``out_shape``. It returns the floating-point operations of one call; a multiply-add counts as
    two.
    """
    from torch.utils.flop_counter import register_flop_formula

    from fastadapt.kernels.linear_kl import autograd as linear_kl
    from fastadapt.kernels.nmse import autograd as nmse
    from fastadapt.kernels.transcoder import autograd as transcoder

    for formulas in (linear_kl.FLOP_FORMULAS, nmse.FLOP_FORMULAS, transcoder.FLOP_FORMULAS):
        for op, formula in formulas.items():
            register_flop_formula(op)(formula)
