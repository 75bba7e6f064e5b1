"""A replacement model spread over ranks, with PyTorch's FSDP2.

Every decoder block, with its target MLP, base MLP and adapter, is one unit: each rank holds its
share of the rows of each weight, and the whole block exists while a layer is walked and again while
its gradient is made. Gradients come back as shares, so the optimiser's moments are shares too. What
lies outside the blocks (embeddings, last norm, head) is frozen, used in every step, and held whole
by every rank.

Where the adapters have masters (:class:`fastadapt.training.optimizer.OptimizerConfig`), the shares
*are* the fp32 masters: they are rounded to working copies as they are gathered, and gradients are
added up over ranks in fp32, as they are over micro-batches.
"""

from __future__ import annotations

from itertools import pairwise
from typing import cast

import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from fastadapt.adapter import TranscoderAdapter
from fastadapt.models import ReplacementModel
from fastadapt.ranks import Ranks

_LOW = (torch.bfloat16, torch.float16)


def shard(model: ReplacementModel, ranks: Ranks, device: torch.device, *, masters: bool) -> None:
    """Spread the blocks over ``ranks``, one after the other, and put the rest on ``device``.

    The model comes in whole, in host memory; no GPU ever holds more than one whole block of it.
    All ranks must come with the same weights. Call before anything refers to the parameters.

    Args:
        model: changed in place.
        ranks: more than one.
        device: where the shares go.
        masters: hold the adapters' shares in fp32 where they are of lower precision.
    """
    mesh = init_device_mesh(device.type, (ranks.world,))
    dtype = next(model.pair.base_mlps.parameters()).dtype
    # The sum over ranks is made in fp32 also where the gradients are of lower precision.
    wide = torch.float32 if dtype in _LOW else dtype
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=wide, cast_forward_inputs=False)
    if masters:
        for parameter in model.adapters.parameters():
            parameter.data = parameter.data.to(wide)
    blocks: list[FSDPModule] = []
    unit: FSDPModule
    for block in model.blocks:
        # Not resharded after a call, since a layer is called up to three times in a row:
        # ReplacementModel.leave does it.
        unit = fully_shard(block, mesh=mesh, reshard_after_forward=False, mp_policy=policy)
        # Weights of micro-batches add up to 1 over all ranks: gradients are summed as they are.
        unit.set_gradient_divide_factor(1.0)
        unit.set_force_sum_reduction_for_comms(True)
        blocks.append(unit)
    for unit, following in pairwise(blocks):
        unit.set_modules_to_forward_prefetch([following])
        following.set_modules_to_backward_prefetch([unit])

    decoder = getattr(model.model, model.paths.decoder)
    rest = [m for name, m in decoder.named_children() if name != model.paths.layers]
    for module in (*rest, model.model.get_output_embeddings()):
        module.to(device)
    # The decoder runs first in every traversal, which makes it the root: one set of streams for
    # all blocks.
    whole = {p for p in decoder.parameters() if not isinstance(p, DTensor)}
    fully_shard(decoder, mesh=mesh, ignored_params=whole)


def whole_adapters(model: ReplacementModel) -> nn.ModuleList:
    """The adapters as one process has them, in host memory on rank 0 (empty on others).

    All ranks must take part. Unsharded ones are returned as they are.
    """
    if not isinstance(model.blocks[0], FSDPModule):
        return model.adapters
    leads = torch.distributed.get_rank() == 0
    whole = nn.ModuleList()
    for block, sharded in zip(model.blocks, model.adapters, strict=True):
        sharded = cast(TranscoderAdapter, sharded)
        unit = cast(FSDPModule, block)
        unit.unshard()
        if leads:
            adapter = TranscoderAdapter(
                sharded.d_in, sharded.config, d_out=sharded.d_out, device="meta"
            )
            tensors = dict(sharded.named_parameters()) | dict(sharded.named_buffers())
            held = {name: t.detach().to("cpu", copy=True) for name, t in tensors.items()}
            adapter.load_state_dict(held, assign=True)
            whole.append(adapter)
        unit.reshard()
    return whole
