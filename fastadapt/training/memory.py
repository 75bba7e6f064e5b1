"""Bytes of a training step, counted from shapes: what stays, what is kept, what is alive at once.

The bytes are counts of the tensors that are alive together at the worst moment, at the worst cutoff
(the earliest one that makes both bridges) and at full density, as at the first steps, where about
half of all features fire and the codes are kept dense. What is not counted: the interpreter, its
libraries and their scratch space, and what an allocator holds beyond the tensors in it.

B sequences, T tokens, N = B T, D width, I width inside the MLP, F features, V vocabulary, L layers.
"""

from __future__ import annotations

from fastadapt.training.shapes import FP32, Shapes

# --- what stays -----------------------------------------------------------------------------------


def _weights(s: Shapes) -> dict[str, int]:
    adapters = s.layers * s.adapter_parameters
    return {
        "frozen target": s.target_parameters * s.element_bytes,
        "frozen base MLPs": s.mlp_parameters * s.element_bytes,
        "adapters": adapters * s.element_bytes,
        "fp32 masters": adapters * FP32 if s.masters else 0,
        "moments": 2 * adapters * s.moment_bytes,
    }


def _gradient(s: Shapes) -> int:
    """Of one layer's adapter, as it is kept until the update."""
    return s.adapter_parameters * s.moment_bytes


# --- what a forward pass keeps for the backward pass ----------------------------------------------


def _kept_streams(s: Shapes, layer: int) -> int:
    """Inputs of checkpointed blocks, and the difference that the NMSE's gradient is made of."""
    streams = s.rows(layer) + s.bridges(layer) + 1
    return streams * s.tokens * s.width * s.element_bytes


def _kept_codes(s: Shapes, layer: int) -> int:
    """Dense codes [N, F]; fewer bytes as soon as they are sparse."""
    if s.dense_kernel and s.checkpoint:
        return 0
    per_entry = s.element_bytes + s.windowed
    return s.rows(layer) * s.tokens * s.features * per_entry


def _kept_blocks(s: Shapes, layer: int) -> int:
    """Activations of blocks that are not recomputed."""
    if s.checkpoint:
        return 0
    adapted = _block_activations(s, s.rows(layer)) + _adapter_activations(s, s.rows(layer))
    return adapted + s.bridges(layer) * _block_activations(s, 1)


def _kept(s: Shapes, layer: int) -> int:
    return _kept_streams(s, layer) + _kept_codes(s, layer) + _kept_blocks(s, layer)


def _inputs(s: Shapes) -> int:
    """Embeddings of one and of two stacked streams, rotary embeddings, masks where rows differ."""
    embeddings = 3 * s.tokens * s.width * s.element_bytes
    rotary = 2 * 3 * s.tokens * (s.query // s.heads) * s.element_bytes
    mask = 3 * s.tokens * (s.tokens // s.sequences) if s.sequences > 1 else 0
    return embeddings + rotary + mask


# --- what one block makes -------------------------------------------------------------------------


def _block_activations(s: Shapes, rows: int) -> int:
    """Saved by a block of attention and frozen MLP: frozen products save no input.

    Per token: fp32 copies at the norms; query and key after rotation, value, both repeated to all
    heads, output and its contiguous copy; log-sum-exp; the residual and the normed stream between
    attention and MLP, and two outputs; gate, its activation, and the up projection.
    """
    e = s.element_bytes
    norms = s.norms * s.width * s.upcast
    attention = (5 * s.query + 2 * s.key) * e + s.heads * FP32
    if s.eager:
        attention += s.heads * (s.tokens // s.sequences) * (2 * e + FP32)
    return rows * s.tokens * (norms + attention + 4 * s.width * e + 3 * s.inner * e)


def _adapter_activations(s: Shapes, rows: int) -> int:
    """Saved by the reference kernel: pre-activations, activations, and their fp32 copy."""
    if not s.dense_kernel:
        return 0
    return rows * s.tokens * s.features * (2 * s.element_bytes + s.upcast)


def _forward_scratch(s: Shapes, rows: int) -> int:
    """Alive inside a block whose activations are dropped: four MLP widths, streams, flags."""
    e = s.element_bytes
    flags = 2 + s.upcast + (24 if s.ranked and s.dense_kernel else 16 if s.ranked else 0)
    per_token = 4 * s.inner * e + 6 * s.width * max(e, FP32) + s.features * flags
    return rows * s.tokens * per_token + _adapter_activations(s, rows)


def _backward_scratch(s: Shapes, rows: int) -> int:
    """Beyond the block's activations, the largest of: adapter, MLP, attention.

    Adapter: the gradient of the codes, the penalty's share, their sum, what passes the activation
    (the latter three in fp32), and rounded copies; for the weights, the penalty's gradient of
    W_dec beside the decoder's, and gradients in the parameters' dtype before they reach a master.
    """
    e, n, f = s.element_bytes, rows * s.tokens, s.features
    codes = n * f * (e + 3 * FP32 + s.upcast + (e if s.upcast else 0))
    weights = 3 * f * s.width * FP32 + (2 * f * s.width * e if s.masters else 0)
    mlp = 3 * n * s.inner * e
    attention = 4 * n * s.query * e + 4 * n * s.width * max(e, FP32)
    if s.eager:
        attention += 2 * n * s.heads * (s.tokens // s.sequences) * FP32
    return max(codes + weights, mlp, attention)


def _block_backward(s: Shapes, layer: int) -> int:
    """The larger of the replacement's block and the bridge's, with the streams' gradients."""
    rows, bridges = s.rows(layer), s.bridges(layer)
    recomputed = _block_activations(s, rows) + _adapter_activations(s, rows) if s.checkpoint else 0
    streams = (2 * rows + bridges + 2) * s.tokens * s.width * s.element_bytes
    return recomputed + _backward_scratch(s, rows) + streams


# --- the head -------------------------------------------------------------------------------------


def _students(s: Shapes) -> int:
    return 3 if s.forked else 1


def _logits(s: Shapes) -> int:
    """Teacher's log-probabilities and one student's logits, a chunk of each, and block scratch."""
    chunk = 2 * s.chunk * s.vocabulary * s.logit_bytes
    scratch = min(s.scratch_elements, s.chunk * s.vocabulary) * s.logit_bytes
    return chunk + 6 * scratch + 2 * s.chunk * s.width * s.logit_bytes


def _last_streams(s: Shapes) -> int:
    """Last hidden states, normed ones with fp32 copies, stacked students."""
    streams = (s.rows(s.layers - 1) + s.bridges(s.layers - 1) + 1) * s.element_bytes
    normed = (1 + _students(s)) * (s.element_bytes + s.upcast)
    return s.tokens * s.width * (streams + normed + _students(s) * s.element_bytes)


def _student_gradients(s: Shapes, in_backward: bool) -> int:
    per_element = s.element_bytes + (2 * s.logit_bytes + s.element_bytes if in_backward else 0)
    return _students(s) * s.tokens * s.width * per_element


# --- together -------------------------------------------------------------------------------------


def phases(s: Shapes) -> dict[str, int]:
    """Bytes alive at the worst moment of each phase of a step."""
    fixed = sum(_weights(s).values()) + _inputs(s)
    gradients = [_gradient(s)] * s.layers
    earlier = sum(gradients) if s.accumulate else 0  # of the micro-batches before this one
    kept = [_kept(s, layer) for layer in range(s.layers)]
    top = s.layers - 1
    backward = max(
        sum(kept[: layer + 1])
        + (sum(gradients) if s.accumulate else sum(gradients[layer:]))
        + _block_backward(s, layer)
        for layer in range(s.layers)
    )
    whole = fixed + earlier + sum(kept)
    streams = 4 * s.tokens * s.width * s.element_bytes
    return {
        "forward": whole + streams + _forward_scratch(s, s.rows(top)),
        "head": whole + _last_streams(s) + _student_gradients(s, False) + _logits(s),
        "head, backward": whole + _last_streams(s) + _student_gradients(s, True),
        "backward": fixed + backward,
        "update": fixed + sum(gradients),
    }


def parts(s: Shapes) -> dict[str, int]:
    """Bytes by part, each at its own largest."""
    layers, top = range(s.layers), s.layers - 1
    sizes = {
        **_weights(s),
        "gradients": s.layers * _gradient(s),
        "checkpointed streams": _inputs(s) + sum(_kept_streams(s, layer) for layer in layers),
        "codes": sum(_kept_codes(s, layer) for layer in layers),
        "blocks not recomputed": sum(_kept_blocks(s, layer) for layer in layers),
        "one block, recomputed": max(_block_backward(s, layer) for layer in (0, top)),
        "logits of a chunk": _logits(s),
        "streams at the head": _last_streams(s) + _student_gradients(s, True),
    }
    return {name: size for name, size in sizes.items() if size}
