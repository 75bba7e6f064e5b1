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

_LOW = (torch.bfloat16, torch.float16)


def shard(model: ReplacementModel, ranks: Ranks, device: torch.device, *, masters: bool) -> None:
    """Spread the blocks over ``ranks``, one after the other, and put the rest on ``device``.

    Rank 0 comes with the weights, in host memory, and sends them block by block: no other host
    reads them, and no GPU ever holds more than one whole block. Call before anything refers to the
    parameters.

    Args:
        model: changed in place; that of ranks other than 0 is on the meta device.
        ranks: more than one.
        device: where the shares go.
        masters: hold the adapters' shares in fp32 where they are of lower precision.

    Raises:
        RunError: the models of two ranks differ in a tensor's name, shape or dtype.
    """
    mesh = init_device_mesh(device.type, (ranks.world,))
    dtype = next(model.pair.base_mlps.parameters()).dtype
    # The sum over ranks is made in fp32 also where the gradients are of lower precision.
    wide = torch.float32 if dtype in _LOW else dtype
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=wide, cast_forward_inputs=False)
    if masters:
        for parameter in model.adapters.parameters():
            parameter.data = parameter.data.to(wide)
    _check_same(model, ranks)
    blocks: list[FSDPModule] = []
    unit: FSDPModule
    for block in model.blocks:
        _send(block, ranks, device)
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
    embeddings, head = model.model.get_input_embeddings(), model.model.get_output_embeddings()
    tied = embeddings.weight is head.weight
    for name, module in decoder.named_children():
        if name != model.paths.layers:
            _send(module, ranks, device)
    if tied:
        head.weight = embeddings.weight
    else:
        _send(head, ranks, device)
    # The decoder runs first in every traversal, which makes it the root: one set of streams for
    # all blocks.
    whole = {p for p in decoder.parameters() if not isinstance(p, DTensor)}
    fully_shard(decoder, mesh=mesh, ignored_params=whole)


def _check_same(model: ReplacementModel, ranks: Ranks) -> None:
    ours = {
        name: (tuple(t.shape), str(t.dtype))
        for name, t in chain(model.named_parameters(), model.named_buffers())
    }
    theirs = ranks.lead(lambda: ours)
    if odd := sorted(name for name, _ in ours.items() ^ theirs.items()):
        raise RunError(
            f"rank {ranks.rank}: the model is not that of rank 0 ({odd[0]}: "
            f"{ours.get(odd[0], 'none')}, there {theirs.get(odd[0], 'none')}). Use the same "
            "versions and the same files on every machine."
        )


def _send(module: nn.Module, ranks: Ranks, device: torch.device) -> None:
    """Bring rank 0's weights of a module to ``device``, on every rank."""
    if ranks.leads:
        module.to(device)
    else:
        module.to_empty(device=device)
    for tensor in chain(module.parameters(), module.buffers()):
        ranks.send(tensor.detach())


def whole_adapters(model: ReplacementModel) -> nn.ModuleList:
    """The adapters as one process has them, in host memory on rank 0 (empty on others).

    All ranks must take part. Unsharded ones are returned as they are.
    """
    if not isinstance(model.blocks[0], FSDPModule):
        return model.adapters
    leads = torch.distributed.get_rank() == 0
    whole = nn.ModuleList()
    for block, sharded in zip(model.blocks, model.adapters, strict=True):
        unit = cast(FSDPModule, block)
        unit.unshard()
        if leads:
            tensors = dict(sharded.named_parameters()) | dict(sharded.named_buffers())
            held = {name: t.detach().to("cpu", copy=True) for name, t in tensors.items()}
            whole.append(_like(sharded, held))
        unit.reshard()
    return whole


def _like(adapter: nn.Module, tensors: dict[str, torch.Tensor]) -> nn.Module:
    """An adapter of the same kind and shape that holds ``tensors``."""
    if isinstance(adapter, TunedWeights):
        return type(adapter)(adapter.d_in, tensors)
    assert isinstance(adapter, TranscoderAdapter)
    made = TranscoderAdapter(adapter.d_in, adapter.config, d_out=adapter.d_out, device="meta")
    made.load_state_dict(tensors, assign=True)
    return made
