"""Register the ops ``fastadapt::encode``, ``decode``, ``transcode``: fakes, autograd, formulas.

`encode` returns codes and statistics, which selective checkpointing saves. `decode` returns output
and penalty; it is recomputed and saves neither its output nor the residual. `transcode` returns the
output alone, in fewer launches, where no gradient is needed. The number of codes
depends on the data: without a plan, the fakes return it as an unbacked size. Each op's backward is
an op too, so that compilers and FLOP counters see it. The last argument of an op is the
implementation to run.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as nnf
from torch import Tensor
from torch.library import define, impl, register_autograd, register_fake

from . import sparse
from .codes import GPU_PIECE, SMALL, CodeLayout, Codes, active_codes
from .products import norms
from .reference import TranscoderOutput, TranscoderStats, accumulator, is_ranked

ops = torch.ops.fastadapt
N_CODES = len(Codes._fields)
CODES = ", ".join(f"Tensor {name}" for name in Codes._fields)
STATS = ", ".join(f"Tensor {name}" for name in TranscoderStats._fields)

define(
    "fastadapt::encode",
    "(Tensor x, Tensor W_enc, Tensor b_enc, Tensor? threshold, Tensor? weight, Tensor? padding, "
    "str activation, float k, float bandwidth, bool? dense, SymInt? capacity, bool ordered, "
    "str implementation) "
    f"-> ({CODES}, {STATS})",
)
define(
    "fastadapt::encode_backward",
    "(Tensor da, Tensor x, Tensor W_enc, Tensor? threshold, Tensor? padding, "
    f"{CODES}, float bandwidth, bool[] need, str implementation) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
)
define(
    "fastadapt::decode",
    f"({CODES}, Tensor W_dec, Tensor b_dec, Tensor? residual, Tensor? norm, Tensor? weight, "
    "float? tanh_scale, str implementation) -> (Tensor, Tensor)",
)
define(
    "fastadapt::decode_backward",
    f"(Tensor? g, Tensor? c, {CODES}, Tensor W_dec, Tensor norm, Tensor? weight, "
    "float? tanh_scale, bool need_values, bool need_W, str implementation) -> (Tensor, Tensor)",
)
define("fastadapt::norms", "(Tensor W_dec) -> Tensor")
define(
    "fastadapt::transcode",
    "(Tensor x, Tensor W_enc, Tensor b_enc, Tensor W_dec, Tensor b_dec, Tensor? threshold, "
    "Tensor? residual, Tensor? padding, str activation, float k, bool? dense, "
    "str implementation) -> Tensor",
)

#: Ops whose results selective checkpointing should save.
SAVED_OPS = [ops.encode.default, ops.norms.default]
_DENSE = [a.name for a in ops.encode.default._schema.arguments].index("dense")


def should_save(op: Any, args: Sequence[Any], output: Sequence[Tensor] | None = None) -> bool:
    """Return whether selective checkpointing should save the result of ``op(*args)``.

    Sparse codes of the encoder are saved: they are small, and a recompute then skips the encoder's
    product. Dense codes are as large as any activation and are not saved. The norms of the decoder
    are saved. Other ops are not saved.

    Args:
        op: an op overload, as passed to a policy of ``torch.utils.checkpoint``.
        args: the op's positional arguments.
        output: the op's result, or None if it has not run. Torch 2.11 calls the policy before the
            op runs, and again in the recompute; codes without a plan count as dense then.
    """
    if op is not ops.encode.default:
        return op in SAVED_OPS
    dense = args[_DENSE]
    if dense is None:
        dense = output is None or Codes(*output[:N_CODES]).dense
    return not dense


def encode_and_decode(
    x_STD: Tensor,
    W_enc_FD: Tensor,
    b_enc_F: Tensor,
    W_dec_FE: Tensor,
    b_dec_E: Tensor,
    *,
    activation: str,
    k: float | None,
    threshold: Tensor | None,
    bandwidth: float | None,
    residual_STE: Tensor | None,
    weight_ST: Tensor | None,
    padding_ST: Tensor | None,
    tanh_scale: float | None,
    return_codes: bool,
    plan: CodeLayout | None,
    implementation: str,
) -> TranscoderOutput:
    """Compute the transcoder on validated arguments with the registered ops."""
    weights = x_STD, W_enc_FD, b_enc_F, W_dec_FE, threshold
    ordered = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in weights)
    weight_N = None if weight_ST is None else weight_ST.flatten()
    results = ops.encode(
        x_STD,
        W_enc_FD,
        b_enc_F,
        threshold,
        weight_N,
        None if padding_ST is None else padding_ST.flatten(),
        activation,
        0.0 if k is None else float(k),
        0.0 if bandwidth is None else float(bandwidth),
        None if plan is None else plan.dense,
        None if plan is None else plan.capacity,
        ordered,
        implementation,
    )
    codes = Codes(*results[:N_CODES])
    n_active, counts_F, n_tokens, min_active, n_codes = results[N_CODES:]
    active = active_codes(codes, W_enc_FD.shape[0]) if return_codes else None
    residual_NE = None if residual_STE is None else residual_STE.flatten(0, 1)
    # Gradients need all norms. Without gradients, `decode` computes those of few tokens' codes.
    norm = ops.norms(W_dec_FE) if ordered or x_STD.shape[:-1].numel() > SMALL else None
    out_NE, penalty = ops.decode(
        *codes, W_dec_FE, b_dec_E, residual_NE, norm, weight_N, tanh_scale, implementation
    )
    out_STE = out_NE.view(*x_STD.shape[:-1], W_dec_FE.shape[1])
    min_active = nnf.threshold(min_active, -0.5, torch.nan)  # -1: no active value
    stats = TranscoderStats(n_active, counts_F, n_tokens, min_active, n_codes)
    return TranscoderOutput(out_STE, penalty, stats, active)


def transcode(
    x_STD: Tensor,
    W_enc_FD: Tensor,
    b_enc_F: Tensor,
    W_dec_FE: Tensor,
    b_dec_E: Tensor,
    *,
    activation: str,
    k: float | None,
    threshold: Tensor | None,
    residual_STE: Tensor | None,
    padding_ST: Tensor | None,
    dense: bool | None,
    implementation: str,
) -> Tensor:
    """Compute ``out`` [S, T, E] on validated arguments with the registered op."""
    out_NE = ops.transcode(
        x_STD,
        W_enc_FD,
        b_enc_F,
        W_dec_FE,
        b_dec_E,
        threshold,
        None if residual_STE is None else residual_STE.flatten(0, 1),
        None if padding_ST is None else padding_ST.flatten(),
        activation,
        0.0 if k is None else float(k),
        dense,
        implementation,
    )
    out: Tensor = out_NE.view(*x_STD.shape[:-1], W_dec_FE.shape[1])
    return out


# --- implementations ------------------------------------------------------------------------------


def _encode(*args: Any) -> tuple[Tensor, ...]:
    *inputs, dense, capacity, ordered, implementation = args
    plan = None if dense is None else CodeLayout(dense, capacity)
    call: tuple[Any, ...] = (*inputs, plan, ordered)
    if implementation == "sparse":
        codes, stats = sparse.encode(*call)
    else:
        from . import triton_forward

        with torch.cuda.device_of(inputs[0]):  # Triton launches kernels on the current device
            codes, stats = triton_forward.encode(*call)
    return (*codes, *stats)


def _encode_backward(da: Tensor, x: Tensor, *args: Any) -> tuple[Tensor, ...]:
    *inputs, bandwidth, need, implementation = args
    codes = Codes(*inputs[-N_CODES:])
    call: tuple[Any, ...] = (da, x.flatten(0, 1), *inputs[:-N_CODES], codes, bandwidth, need)
    if implementation == "sparse":
        dx, *others = sparse.encode_backward(*call)
    else:
        from . import triton_backward

        with torch.cuda.device_of(da):
            dx, *others = triton_backward.encode_backward(*call)
    return (dx.view(x.shape) if need[0] else dx, *others)


def _decode(*args: Any) -> tuple[Tensor, Tensor]:
    *inputs, implementation = args
    call: tuple[Any, ...] = (Codes(*inputs[:N_CODES]), *inputs[N_CODES:])
    if implementation == "sparse":
        return sparse.decode(*call)
    from . import triton_forward

    with torch.cuda.device_of(inputs[0]):
        return triton_forward.decode(*call)


def _decode_backward(g: Tensor | None, c: Tensor | None, *args: Any) -> tuple[Tensor, Tensor]:
    *inputs, implementation = args
    call: tuple[Any, ...] = (g, c, Codes(*inputs[:N_CODES]), *inputs[N_CODES:])
    if implementation == "sparse":
        return sparse.decode_backward(*call)
    from . import triton_backward

    with torch.cuda.device_of(inputs[0]):
        return triton_backward.decode_backward(*call)


def _transcode(*args: Any) -> Tensor:
    *inputs, implementation = args
    if implementation == "sparse":
        return sparse.transcode(*inputs)
    from . import triton_forward

    with torch.cuda.device_of(inputs[0]):
        return triton_forward.transcode(*inputs)


# Triton's interpreter also runs kernels on CPU tensors.
DEVICES = ("cpu", "cuda")
impl("fastadapt::encode", DEVICES, _encode)
impl("fastadapt::encode_backward", DEVICES, _encode_backward)
impl("fastadapt::decode", DEVICES, _decode)
impl("fastadapt::decode_backward", DEVICES, _decode_backward)
impl("fastadapt::norms", DEVICES, norms)
impl("fastadapt::transcode", DEVICES, _transcode)


# --- fakes ----------------------------------------------------------------------------------------


@register_fake("fastadapt::encode")
def _fake_encode(x: Tensor, W_enc: Tensor, b_enc: Tensor, *args: Any) -> tuple[Tensor, ...]:
    activation, (dense, capacity, ordered, implementation) = args[3], args[-4:]
    N, F = x.shape[0] * x.shape[1], W_enc.shape[0]
    jumps = activation == "jumprelu"
    n_values: Any = N * F
    n_codes: Any = 0
    n_window: Any = N * F if jumps else 0
    if dense is None:
        size = torch.library.get_ctx().new_dynamic_size
        n_values, n_codes, n_window = size(), size(), size() if jumps else 0
    elif not dense:
        n_values = capacity
        if capacity is None:
            n_values = torch.library.get_ctx().new_dynamic_size()
        n_codes, n_window = n_values, 0
    n_ordered = n_codes if ordered else 0
    n_pieces: Any = 0
    if ordered and implementation != "sparse" and not dense:
        n_pieces = F + 1 if dense is not None else torch.library.get_ctx().new_dynamic_size()
    return (
        x.new_empty(n_values),
        x.new_empty(n_codes, dtype=torch.int32),
        x.new_empty(N + 1, dtype=torch.int64),
        x.new_empty(n_ordered, dtype=torch.int64),
        x.new_empty(n_ordered, dtype=torch.int32),
        x.new_empty(F + 1 if ordered else 0, dtype=torch.int64),
        x.new_empty(n_pieces, dtype=torch.int32),
        x.new_empty(n_window, dtype=torch.bool),
        x.new_empty((), dtype=torch.int64),
        x.new_empty(F, dtype=torch.int64),
        x.new_empty((), dtype=torch.int64),
        x.new_empty((), dtype=torch.float32),
        x.new_empty((), dtype=torch.int64),
    )


@register_fake("fastadapt::encode_backward")
def _fake_encode_backward(
    da: Tensor, x: Tensor, W_enc: Tensor, threshold: Tensor | None, *args: Any
) -> tuple[Tensor, ...]:
    need, F = args[-2], W_enc.shape[0]
    return (
        x.new_empty(x.shape if need[0] else 0),
        x.new_empty(W_enc.shape if need[1] else 0),
        x.new_empty(F if need[2] else 0),
        (x if threshold is None else threshold).new_empty(F if need[3] else 0),
    )


@register_fake("fastadapt::decode")
def _fake_decode(*args: Any) -> tuple[Tensor, Tensor]:
    codes, W_dec = Codes(*args[:N_CODES]), args[N_CODES]
    out = W_dec.new_empty(codes.row_offsets.shape[0] - 1, W_dec.shape[1])
    return out, W_dec.new_empty((), dtype=accumulator(W_dec.dtype))


@register_fake("fastadapt::decode_backward")
def _fake_decode_backward(
    g: Tensor | None, c: Tensor | None, values: Tensor, *args: Any
) -> tuple[Tensor, Tensor]:
    W_dec, _, _, _, need_values, need_W, _ = args[N_CODES - 1 :]
    return (
        values.new_empty(values.shape if need_values else 0),
        W_dec.new_empty(W_dec.shape if need_W else 0),
    )


@register_fake("fastadapt::norms")
def _fake_norms(W_dec: Tensor) -> Tensor:
    return W_dec.new_empty(W_dec.shape[0], dtype=accumulator(W_dec.dtype))


@register_fake("fastadapt::transcode")
def _fake_transcode(x: Tensor, W_enc: Tensor, b_enc: Tensor, W_dec: Tensor, *_: Any) -> Tensor:
    return W_dec.new_empty(x.shape[0] * x.shape[1], W_dec.shape[1])


# --- autograd -------------------------------------------------------------------------------------


def _setup_encode(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, W_enc, _, threshold, _, padding, _, _, bandwidth, _, _, ordered, implementation = inputs
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*output[1:])
    ctx.bandwidth, ctx.ordered, ctx.implementation = bandwidth, ordered, implementation
    ctx.save_for_backward(x, W_enc, threshold, padding, *output[:N_CODES])


def _differentiate_encode(ctx: Any, da: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    if da is None:
        return (None,) * 13
    if not ctx.ordered:
        raise RuntimeError("fastadapt::encode: gradients need codes encoded with ordered=True")
    need = list(ctx.needs_input_grad[:4])  # x, W_enc, b_enc, threshold
    results = ops.encode_backward(da, *ctx.saved_tensors, ctx.bandwidth, need, ctx.implementation)
    gradients = (g if needed else None for g, needed in zip(results, need, strict=True))
    return (*gradients, *[None] * 9)


def _setup_decode(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *codes_and_W_dec, _, _, norm, weight, ctx.tanh_scale, ctx.implementation = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*codes_and_W_dec, norm, weight)


def _differentiate_decode(
    ctx: Any, g: Tensor | None, c: Tensor | None
) -> tuple[Tensor | None, ...]:
    need_values = ctx.needs_input_grad[0]
    need_W, need_b, need_residual = ctx.needs_input_grad[N_CODES : N_CODES + 3]
    da = dW = None
    if (need_values or need_W) and not (g is None and c is None):
        *inputs, norm, weight = ctx.saved_tensors
        norm = ops.norms(inputs[-1]) if norm is None else norm
        settings = ctx.tanh_scale, need_values, need_W, ctx.implementation
        da, dW = ops.decode_backward(g, c, *inputs, norm, weight, *settings)
    return (
        da if need_values else None,
        *[None] * (N_CODES - 1),
        dW if need_W else None,
        g.sum(0) if need_b and g is not None else None,
        g if need_residual else None,
        *[None] * 4,
    )


def _refuse(ctx: Any, *_: Any) -> None:
    raise RuntimeError("fastadapt::encode and fastadapt::decode have no second derivative")


def _refuse_gradient(ctx: Any, *_: Any) -> None:
    raise RuntimeError("fastadapt::transcode has no gradient; use encode and decode")


def _setup_norms(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.mark_non_differentiable(output)  # decode differentiates the penalty


def _differentiate_norms(ctx: Any, _: Tensor | None) -> None:
    return None


register_autograd("fastadapt::norms", _differentiate_norms, setup_context=_setup_norms)
register_autograd("fastadapt::transcode", _refuse_gradient)
register_autograd("fastadapt::encode_backward", _refuse)
register_autograd("fastadapt::decode_backward", _refuse)
register_autograd("fastadapt::encode", _differentiate_encode, setup_context=_setup_encode)
register_autograd("fastadapt::decode", _differentiate_decode, setup_context=_setup_decode)


# --- FLOPs of the products, two per multiply-add --------------------------------------------------


def _count_encode(x_shape: Any, W_enc_shape: Any, *_: Any, **__: Any) -> int:
    S, T, D = x_shape
    return int(2 * S * T * D * W_enc_shape[0])


def _count_encode_backward(*args: Any, **_: Any) -> int:
    W_enc_shape, values_shape, need = args[2], args[5], args[-2]
    return int(2 * values_shape[0] * W_enc_shape[1] * (need[0] + need[1]))


def _count_decode(*args: Any, **_: Any) -> int:
    values_shape, W_dec_shape = args[0], args[N_CODES]
    return int(2 * values_shape[0] * W_dec_shape[1])


def _count_decode_backward(*args: Any, **_: Any) -> int:
    values_shape, W_dec_shape = args[2], args[2 + N_CODES]
    need_values, need_W = args[-3:-1]
    return int(2 * values_shape[0] * W_dec_shape[1] * (need_values + need_W))


def _count_transcode(
    x_shape: Any, W_enc_shape: Any, b: Any, W_dec_shape: Any, *args: Any, **_: Any
) -> int:
    """Count the encoder's product and, if `dense`, the decoder's; codes are not known before."""
    S, T, D = x_shape
    widths = D + (W_dec_shape[1] if args[-2] else 0)
    return int(2 * S * T * W_enc_shape[0] * widths)


FLOP_FORMULAS = {
    ops.transcode: _count_transcode,
    ops.encode: _count_encode,
    ops.encode_backward: _count_encode_backward,
    ops.decode: _count_decode,
    ops.decode_backward: _count_decode_backward,
}


# --- workspace: bytes that the code for a device type allocates inside one call ------------------


def _encode_workspace(device_type: str, x: Tensor, W_enc: Tensor, *args: Any) -> int:
    """Return the bytes of z where codes replace it, of flags and ranking; on a CPU, of sorting."""
    activation, threshold, (dense, capacity) = args[4], args[1], args[-4:-2]
    n_entries, n_codes = x.shape[0] * x.shape[1] * W_enc.shape[0], capacity or 0
    ranked = is_ranked(activation, threshold)
    z = 0 if dense else x.element_size()
    if device_type == "cuda":  # ranking counts 256 digits of a token, in up to four copies
        n_tokens = x.shape[0] * x.shape[1]
        return n_entries * z + n_entries // 2 + n_tokens * 8192 * ranked
    window = 2 * accumulator(x.dtype).itemsize if activation == "jumprelu" else 0
    return n_entries * (z + 2 + 16 * ranked + window) + 64 * n_codes


def _decode_workspace(device_type: str, *args: Any) -> int:
    """Return the bytes of copies in the accumulator's dtype, which only the CPU's code makes."""
    codes, W_dec = Codes(*args[:N_CODES]), args[N_CODES]
    if device_type == "cuda":
        return 0
    wide = _wide_bytes(W_dec)
    if codes.dense:
        return codes.values.numel() * wide
    n_tokens = codes.row_offsets.shape[0] - 1
    return (W_dec.numel() + n_tokens * W_dec.shape[1]) * wide + 24 * codes.values.numel()


def _encode_backward_workspace(
    device_type: str, da: Tensor, x: Tensor, W_enc: Tensor, threshold: Tensor | None, *args: Any
) -> int:
    """Return the bytes of dz where JumpReLU's window adds entries, and of unrounded sums."""
    codes, wide = Codes(*args[1 : 1 + N_CODES]), _wide_bytes(W_enc)
    if codes.dense:
        return 0 if threshold is None else da.numel() * da.element_size()
    if device_type == "cuda":
        return _pieces(codes, W_enc)
    return (x.numel() + 2 * W_enc.numel()) * wide + 32 * da.numel()


def _decode_backward_workspace(
    device_type: str, g: Tensor | None, c: Tensor | None, *args: Any
) -> int:
    """Return the bytes of the penalty's gradient at every entry, and of unrounded sums."""
    codes, W_dec = Codes(*args[:N_CODES]), args[N_CODES]
    wide = _wide_bytes(W_dec)
    if device_type == "cuda":
        return 0 if codes.dense else _pieces(codes, W_dec)
    if codes.dense:
        return codes.values.numel() * (accumulator(W_dec.dtype).itemsize + wide)
    n_tokens = codes.row_offsets.shape[0] - 1
    return (n_tokens * W_dec.shape[1] + 2 * W_dec.numel()) * wide + 40 * codes.values.numel()


def _transcode_workspace(
    device_type: str, x: Tensor, W_enc: Tensor, b_enc: Tensor, W_dec: Tensor, *args: Any
) -> int:
    """Return the bytes of z and of flags; on a CPU also of wide copies, of all entries at most."""
    n_tokens, n_entries = x.shape[0] * x.shape[1], x.shape[0] * x.shape[1] * W_enc.shape[0]
    if device_type == "cuda":
        return n_entries * x.element_size() + n_entries // 4 + n_tokens * 8192
    wide = (W_dec.numel() + n_tokens * W_dec.shape[1]) * _wide_bytes(W_dec)
    return n_entries * (x.element_size() + 18) + wide


def _wide_bytes(t: Tensor) -> int:
    """Return the bytes per element of a copy in the accumulator's dtype; 0 where none is made."""
    return 0 if accumulator(t.dtype) == t.dtype else accumulator(t.dtype).itemsize


def _pieces(codes: Codes, W: Tensor) -> int:
    """Return the bytes of the fp32 sums of a feature's codes after the first ``GPU_PIECE``."""
    return codes.values.numel() // GPU_PIECE * W.shape[1] * 4


WORKSPACE_FORMULAS: dict[Any, Any] = {
    ops.encode.default: _encode_workspace,
    ops.transcode.default: _transcode_workspace,
    ops.encode_backward.default: _encode_backward_workspace,
    ops.decode.default: _decode_workspace,
    ops.decode_backward.default: _decode_backward_workspace,
}
