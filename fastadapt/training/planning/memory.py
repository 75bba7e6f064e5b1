"""Bytes of a training step, counted from shapes: what stays, what is kept, what is alive at once.

The bytes are counts of the tensors that are alive together at the worst moment, at the worst cutoff
(the earliest one that makes both bridges) and at the worse of two densities: that of the first
steps, where about half of all features fire and products are dense, and the highest at which codes
are kept (``dense=False``). What is not counted: the interpreter, its libraries and their scratch
space, and what an allocator holds beyond the tensors in it.

B sequences, T tokens, N = B T, D width, I width inside the MLP, F features, V vocabulary, L layers.
"""

from __future__ import annotations

from fastadapt.kernels.transcoder.codes import HEADROOM
from fastadapt.training.planning.shapes import FP32, Shapes

#: Of a code beside its value: feature and token (int32), and its place in the order (int64).
_CODE_BYTES = 4 + 4 + 8

# --- what stays -----------------------------------------------------------------------------------


def _weights(s: Shapes) -> dict[str, int]:
    """A rank's share of the blocks, where several share them, and two blocks that are whole.

    Shares of adapters with masters are the masters. Blocks whose frozen weights are in host memory
    (:mod:`fastadapt.distributed.offload`) are gathered likewise, without their adapters, and the
    copy from the host is alive beside what is gathered from it.
    """
    e, n, adapters = s.element_bytes, s.ranks, s.trained_parameters
    blocks = s.target_parameters - s.whole_parameters
    frozen_block = (blocks + s.mlp_parameters) // s.layers
    gathered = 4 * frozen_block * s.offload
    if n > 1:
        gathered = 2 * (frozen_block + s.adapter_parameters)
    here = 0 if s.offload else 1 / n
    return {
        "frozen target": (s.whole_parameters + int(blocks * here)) * e,
        "frozen base MLPs": int(s.mlp_parameters * here) * e,
        "adapters": 0 if n > 1 and s.masters else adapters // n * e,
        "fp32 masters": adapters // n * FP32 if s.masters else 0,
        "moments": int(2 * adapters // n * s.moment_bytes),
        "gathered blocks": gathered * e,
    }


def host_bytes(s: Shapes) -> int:
    """Of frozen weights in host memory."""
    blocks = s.target_parameters - s.whole_parameters + s.mlp_parameters
    return blocks * s.element_bytes * s.offload


def _gradient(s: Shapes) -> int:
    """Of one layer's adapter, as it is kept until the update."""
    return s.adapter_parameters // s.ranks * s.gradient_bytes


# --- what a forward pass keeps for the backward pass ----------------------------------------------


def _kept_streams(s: Shapes, layer: int) -> int:
    """Inputs of recomputed blocks, and the difference that the NMSE's gradient is made of."""
    inputs = 0 if s.checkpoint == "none" else s.rows(layer) + s.bridges(layer)
    return (inputs + s.nmse) * s.tokens * s.width * s.element_bytes


def _kept_codes(s: Shapes, layer: int, dense: bool) -> int:
    """Of the adapter. Dense ones [N, F] are recomputed where anything is."""
    tokens = s.rows(layer) * s.tokens
    if not s.features:
        return 0
    if s.dense_kernel or dense:
        kept = s.checkpoint == "none" and not s.dense_kernel
        return tokens * s.features * (s.element_bytes + s.windowed) * kept
    each = HEADROOM * s.codes_per_token * (s.element_bytes + _CODE_BYTES)
    return int(tokens * (each + 8)) + 8 * s.features


def _kept_blocks(s: Shapes, layer: int) -> int:
    """What the policy keeps of a block beside its input.

    Nothing of the lowest block has a gradient but its adapter. (Its norms do, where they are
    trained, and an MLP that is trained there is counted with its block.)
    """
    rows, bridges = s.rows(layer), s.bridges(layer)
    if s.checkpoint == "full" or (s.checkpoint == "attention" and s.eager):
        return 0
    if s.checkpoint == "attention":
        per_token = s.query * s.element_bytes + s.heads * FP32
        return (rows + bridges) * s.tokens * per_token
    adapter = _adapter_activations(s, rows)
    if layer == 0 and s.features:
        return adapter + rows * s.tokens * s.width * s.element_bytes
    adapted = _block_activations(s, rows, True) + adapter
    return adapted + bridges * _block_activations(s, 1, False)


def _kept(s: Shapes, layer: int, dense: bool) -> int:
    return _kept_streams(s, layer) + _kept_codes(s, layer, dense) + _kept_blocks(s, layer)


def _inputs(s: Shapes) -> int:
    """Embeddings of one and of two stacked streams, rotary embeddings, masks where rows differ."""
    embeddings = 3 * s.tokens * s.width * s.element_bytes
    rotary = 2 * 3 * s.tokens * (s.query // s.heads) * s.element_bytes
    mask = 3 * s.tokens * (s.tokens // s.sequences) if s.sequences > 1 else 0
    return embeddings + rotary + mask


# --- what one block makes -------------------------------------------------------------------------


def _block_activations(s: Shapes, rows: int, adapted: bool) -> int:
    """Saved by a block of attention and frozen MLP: frozen products save no input.

    Per token: what each norm reads, in fp32 or wider; query and key after rotation, value, output,
    log-sum-exp; gate, its activation, and the up projection; the adapter's input. Where sequences
    are padded, key and value are repeated to all heads. Trained weights have inputs to save: an
    MLP's last product reads that of gate and up, a norm's weight what was normed.
    """
    e = s.element_bytes
    norms = s.norms * s.width * max(e, FP32) * (2 if adapted and s.kind == "norms" else 1)
    read = s.width * e if adapted and s.kind != "norms" else 0
    inner = (4 if adapted and s.kind == "mlp" else 3) * s.inner
    attention = (2 * s.query + 2 * s.key) * e + s.heads * FP32
    if s.sequences > 1:
        attention += 2 * s.query * e
    if s.eager:  # the softmax, in fp32 and rounded; the capped scores
        attention += s.heads * (s.tokens // s.sequences) * (e + FP32 + e * s.capped)
    return rows * s.tokens * (norms + attention + read + inner * e)


def _adapter_activations(s: Shapes, rows: int) -> int:
    """Saved by the reference kernel: pre-activations, activations, and their fp32 copy."""
    if not s.dense_kernel:
        return 0
    return rows * s.tokens * s.features * (2 * s.element_bytes + s.upcast)


def _forward_scratch(s: Shapes, rows: int, dense: bool) -> int:
    """Alive inside a block that keeps nothing: three MLP widths, or the encoder's [N, F].

    Beside them the block's streams, and on a CPU the kernel's flags and fp32 copies.
    """
    e = s.element_bytes
    flags = 2 + s.upcast + (24 if s.ranked and s.dense_kernel else 16 if s.ranked else 0)
    if s.on_gpu and not s.dense_kernel:
        flags = e + 1 + (4 if s.ranked else 0)  # z, a bit per entry in words, digits of a rank
    adapter = s.features * flags
    per_token = max(3 * s.inner * e, adapter)
    if s.eager:  # scores, masked scores, and their softmax in fp32 and rounded
        per_token = max(per_token, s.heads * (s.tokens // s.sequences) * (3 * e + FP32))
    streams = 2 * s.width * max(e, FP32)
    return rows * s.tokens * (per_token + streams) + _adapter_activations(s, rows)


def _op_scratch(s: Shapes, rows: int, dense: bool) -> int:
    """Of the adapter's backward pass.

    Dense: the gradient of the codes and, on a CPU in fp32, the penalty's share, their sum, and what
    passes the activation. For the weights, the penalty's gradient of W_dec beside the decoder's,
    and gradients in the parameters' dtype before they reach a master.
    """
    e, n, f = s.element_bytes, rows * s.tokens, s.features
    if not f:
        return s.adapter_parameters * e
    codes = 0
    if dense or s.dense_kernel:
        wide = e if s.on_gpu else 3 * FP32 + s.upcast + (e if s.upcast else 0)
        codes = n * f * (e + wide)
    weights = 3 * f * s.width * FP32 + (2 * f * s.width * e if s.masters else 0)
    return codes + weights


def _backward_scratch(s: Shapes, rows: int, dense: bool) -> int:
    """Beyond the block's activations, the largest of: adapter, MLP, attention."""
    e, n = s.element_bytes, rows * s.tokens
    mlp = 3 * n * s.inner * e
    attention = 4 * n * s.query * e + 4 * n * s.width * max(e, FP32)
    if s.eager:
        attention += n * s.heads * (s.tokens // s.sequences) * FP32
    return max(_op_scratch(s, rows, dense), mlp, attention)


def _block_backward(s: Shapes, layer: int, dense: bool) -> int:
    """The larger of the replacement's block and the bridge's, with the streams' gradients."""
    rows, bridges, recomputed = s.rows(layer), s.bridges(layer), 0
    if s.checkpoint != "none":
        recomputed = _block_activations(s, rows, True) + _adapter_activations(s, rows)
        if dense and not s.dense_kernel:
            recomputed += rows * s.tokens * s.features * (s.element_bytes + s.windowed)
    streams = (rows + bridges) * s.tokens * s.width * s.element_bytes
    return recomputed + _backward_scratch(s, rows, dense) + streams


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
    by_density = [_phases(s, dense) for dense in (True, False)]
    return {name: max(each[name] for each in by_density) for name in by_density[0]}


def _phases(s: Shapes, dense: bool) -> dict[str, int]:
    fixed = sum(_weights(s).values()) + _inputs(s)
    gradients = [_gradient(s)] * s.layers
    earlier = sum(gradients) if s.accumulate else 0  # of the micro-batches before this one
    kept = [_kept(s, layer, dense) for layer in range(s.layers)]
    top = s.layers - 1
    backward = max(
        sum(kept[: layer + 1])
        + (sum(gradients) if s.accumulate else sum(gradients[layer:]))
        + _block_backward(s, layer, dense)
        for layer in range(s.layers)
    )
    whole = fixed + earlier + sum(kept)
    streams = 2 * s.tokens * s.width * s.element_bytes
    return {
        "forward": whole + streams + _forward_scratch(s, s.rows(top), dense),
        "head": whole + _last_streams(s) + _student_gradients(s, False) + _logits(s),
        "head, backward": whole + _last_streams(s) + _student_gradients(s, True),
        "backward": fixed + backward,
        "update": fixed + sum(gradients),
    }


def parts(s: Shapes) -> dict[str, int]:
    """Bytes by part, each at its own largest."""
    layers, densities = range(s.layers), (True, False)
    sizes = {
        **_weights(s),
        "gradients": s.layers * _gradient(s),
        "checkpointed streams": _inputs(s) + sum(_kept_streams(s, layer) for layer in layers),
        "codes": max(sum(_kept_codes(s, layer, dense) for layer in layers) for dense in densities),
        "kept of blocks": sum(_kept_blocks(s, layer) for layer in layers),
        "one block, backward": max(
            _block_backward(s, layer, dense) for layer in (0, s.layers - 1) for dense in densities
        ),
        "logits of a chunk": _logits(s),
        "streams at the head": _last_streams(s) + _student_gradients(s, True),
    }
    return {name: size for name, size in sizes.items() if size}
