"""Frozen blocks in host memory, each on the GPU only while it is walked, with PyTorch's FSDP2.

The setting ``pair.offload``. Of every decoder block all that is frozen (attention, norms, the
target's MLP, the base's) lies in pinned host memory; it is copied to the GPU while the block before
it runs, in the forward pass and again in the backward pass, and let go of when the layer is left
(:meth:`fastadapt.models.replacement.ReplacementModel.leave`). Adapters, their gradients and
moments, the embeddings, the last norm and the head stay on the GPU. The numbers do not change by a
bit.

FSDP2 shards over a group of processes; here it has one.
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
    """A process group of this process alone, for as long as the context lasts.

    Raises:
        UserError: there are several ranks, which share the weights out already.
    """
    if ranks.world > 1:
        raise UserError(
            "pair.offload is for one process; several share the frozen weights out already"
        )
    backend = "nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield
    finally:
        dist.destroy_process_group()


def offload(model: ReplacementModel, device: torch.device) -> None:
    """Leave the frozen part of the blocks in host memory, and put the rest on ``device``.

    Call inside :func:`group_of_one`, before anything refers to the parameters.

    Args:
        model: in host memory; changed in place.
        device: where it runs.
    """
    mesh = init_device_mesh(device.type, (1,))
    policy = CPUOffloadPolicy(pin_memory=device.type == "cuda")
    model.adapters.to(device)
    trained = set(model.adapters.parameters())
    units: list[FSDPModule] = []
    for block in model.blocks:
        # Not resharded after a call, since a layer is called up to three times in a row.
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
