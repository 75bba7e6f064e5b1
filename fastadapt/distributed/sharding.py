"""Sharding of a replacement model over ranks, with PyTorch's FSDP2.

Every decoder block, with its target MLP, base MLP and adapter, is one FSDP unit. Each rank holds a
shard of the rows of each weight. The whole block exists only during its forward and its backward
pass. Gradients are reduced to shards, so the optimizer's moments are sharded too. Embeddings, last
norm and head are frozen and replicated on every rank.

With fp32 master weights (:class:`fastadapt.training.optimizer.OptimizerConfig`), the shards *are*
the master weights: all-gather rounds them to the working dtype, and gradients are summed over ranks
in fp32, as they are over micro-batches.
"""

from __future__ import annotations

from itertools import chain, pairwise
from typing import cast

import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from fastadapt.adapter.module import TranscoderAdapter
from fastadapt.distributed.ranks import Ranks
from fastadapt.errors import RunError
from fastadapt.models.baselines import TunedWeights
from fastadapt.models.replacement import ReplacementModel
from fastadapt.models.sources.low_rank import share_parameter

_LOW = (torch.bfloat16, torch.float16)


def shard(model: ReplacementModel, ranks: Ranks, device: torch.device, *, masters: bool) -> None:
    """Shard the blocks over ``ranks``, one after the other, and move all else to ``device``.

    Rank 0 has the weights in host memory and broadcasts them block by block. No other host reads
    them, and no GPU holds more than one whole block. Call this function before anything refers to
    the parameters.

    Args:
        model: model, changed in place; on ranks other than 0 it is on the meta device.
        ranks: ranks of the run, more than one.
        device: device of the shards.
        masters: keep fp32 master weights: adapters of lower precision have shards in fp32.

    Raises:
        RunError: the models of two ranks differ in a tensor's name, shape or dtype.
    """
    mesh = init_device_mesh(device.type, (ranks.world,))
    dtype = next(model.pair.base_mlps.parameters()).dtype
    # Gradients of lower precision are summed over ranks in fp32 too.
    wide = torch.float32 if dtype in _LOW else dtype
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=wide, cast_forward_inputs=False)
    if masters:
        for parameter in model.adapters.parameters():
            parameter.data = parameter.data.to(wide)
    _check_same(model, ranks)
    blocks: list[FSDPModule] = []
    unit: FSDPModule
    for block in model.blocks:
        _broadcast(block, ranks, device)
        # A layer is called up to three times in a row, so a call must not reshard the block:
        # ReplacementModel.reshard_layer does.
        # Frozen weights of more bits, as DoRA's gains, stay whole: the policy would round them.
        wider = {
            p for p in block.parameters() if not p.requires_grad and p.itemsize > dtype.itemsize
        }
        unit = fully_shard(
            block,
            mesh=mesh,
            reshard_after_forward=False,
            mp_policy=policy,
            ignored_params=wider,
        )
        # The weights of micro-batches add up to 1 over all ranks: the sum needs no division.
        unit.set_gradient_divide_factor(1.0)
        unit.set_force_sum_reduction_for_comms(True)
        blocks.append(unit)
    for unit, following in pairwise(blocks):
        unit.set_modules_to_forward_prefetch([following])
        following.set_modules_to_backward_prefetch([unit])

    decoder = getattr(model.model, model.paths.decoder)
    embeddings, head = model.model.get_input_embeddings(), model.model.get_output_embeddings()
    tied = embeddings.weight is head.weight
    for name, module in decoder.named_children():
        if name != model.paths.layers:
            _broadcast(module, ranks, device)
    if tied:
        head.weight = embeddings.weight
    else:
        _broadcast(head, ranks, device)
    # The decoder runs first in every traversal, which makes it the root: one set of streams for
    # all blocks.
    whole = {p for p in decoder.parameters() if not isinstance(p, DTensor)}
    fully_shard(decoder, mesh=mesh, ignored_params=whole)


def _check_same(model: ReplacementModel, ranks: Ranks) -> None:
    ours = {
        name: (tuple(t.shape), str(t.dtype))
        for name, t in chain(model.named_parameters(), model.named_buffers())
    }
    theirs = ranks.on_main(lambda: ours)
    if odd := sorted(name for name, _ in ours.items() ^ theirs.items()):
        raise RunError(
            f"rank {ranks.rank}: the model differs from rank 0's: {odd[0]} is "
            f"{ours.get(odd[0], 'missing')} here and {theirs.get(odd[0], 'missing')} on rank 0. "
            "Use the same versions and the same files on every machine."
        )


def _broadcast(module: nn.Module, ranks: Ranks, device: torch.device) -> None:
    """Broadcast rank 0's weights of a module to ``device`` of every rank."""
    if ranks.is_main:
        module.to(device)
    else:
        names = dict(module.named_parameters(remove_duplicate=False))
        module.to_empty(device=device)  # which gives each name a parameter of its own
        first: dict[int, str] = {}
        for name, parameter in names.items():
            if (other := first.setdefault(id(parameter), name)) != name:
                share_parameter(module, name, other)
    for tensor in chain(module.parameters(), module.buffers()):
        ranks.broadcast(tensor.detach())


def whole_adapters(model: ReplacementModel) -> nn.ModuleList:
    """Return unsharded adapters in host memory on rank 0, and an empty list on other ranks.

    All ranks must call this function. Adapters that are not sharded are returned unchanged.
    """
    if not isinstance(model.blocks[0], FSDPModule):
        return model.adapters
    is_main = torch.distributed.get_rank() == 0
    whole = nn.ModuleList()
    for block, sharded in zip(model.blocks, model.adapters, strict=True):
        unit = cast(FSDPModule, block)
        unit.unshard()
        if is_main:
            tensors = dict(sharded.named_parameters()) | dict(sharded.named_buffers())
            held = {name: t.detach().to("cpu", copy=True) for name, t in tensors.items()}
            whole.append(_like(sharded, held))
        unit.reshard()
    return whole


def _like(adapter: nn.Module, tensors: dict[str, torch.Tensor]) -> nn.Module:
    """Return an adapter of the class and shape of ``adapter`` that holds ``tensors``."""
    if isinstance(adapter, TunedWeights):
        return type(adapter)(adapter.d_in, tensors)
    assert isinstance(adapter, TranscoderAdapter)
    unsharded = TranscoderAdapter(adapter.d_in, adapter.config, d_out=adapter.d_out, device="meta")
    unsharded.load_state_dict(tensors, assign=True)
    return unsharded
