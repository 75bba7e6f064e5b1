"""Offload of the blocks' frozen weights to pinned host memory, with FSDP2 (``pair.offload``).

The frozen weights of a decoder block (attention, norms, target MLP, base MLP) are copied to the GPU
while the block before it runs, in the forward and in the backward pass, and freed after the layer
(:meth:`fastadapt.models.replacement.ReplacementModel.reshard_layer`). Adapters, their gradients and
moments, embeddings, last norm and head stay on the GPU. Results are bitwise those without offload.

FSDP2 needs a process group, which has one process here.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, fully_shard

from fastadapt.distributed.ranks import Ranks
from fastadapt.errors import UserError
from fastadapt.models.replacement import ReplacementModel


@contextmanager
def group_of_one(device: torch.device, ranks: Ranks) -> Iterator[None]:
    """Create a process group that holds only this process, inside the context.

    Raises:
        UserError: the run has several ranks, which shard the weights already.
    """
    if ranks.world > 1:
        raise UserError(
            "pair.offload needs a single process; several ranks shard the frozen weights already. "
            "Use --pair.offload false"
        )
    backend = "nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield
    finally:
        dist.destroy_process_group()


def offload(model: ReplacementModel, device: torch.device) -> None:
    """Keep the frozen weights of the blocks in host memory and move all else to ``device``.

    Call this function inside :func:`group_of_one`, before anything refers to the parameters.

    Args:
        model: model in host memory, changed in place.
        device: device that computes.
    """
    mesh = init_device_mesh(device.type, (1,))
    policy = CPUOffloadPolicy(pin_memory=device.type == "cuda")
    model.adapters.to(device)
    trained = set(model.adapters.parameters())
    units: list[FSDPModule] = []
    for block in model.blocks:
        # A layer is called up to three times in a row, so a call must not reshard the block.
        units.append(
            fully_shard(
                block,
                mesh=mesh,
                reshard_after_forward=False,
                offload_policy=policy,
                ignored_params=trained,
            )
        )
    for unit, following in pairwise(units):
        unit.set_modules_to_forward_prefetch([following])
        following.set_modules_to_backward_prefetch([unit])
    decoder = getattr(model.model, model.paths.decoder)
    for name, module in decoder.named_children():
        if name != model.paths.layers:
            module.to(device)
    model.model.get_output_embeddings().to(device)
    # The decoder runs first in every traversal, which makes it the root: one set of streams.
    in_blocks = {p for block in model.blocks for p in block.parameters()}
    whole = (set(decoder.parameters()) - in_blocks) | trained
    fully_shard(decoder, mesh=mesh, ignored_params=whole)
