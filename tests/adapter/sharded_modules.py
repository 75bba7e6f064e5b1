"""Shard modules with FSDP2 and compare them with whole ones; run under torchrun, gloo, on CPUs.

Each rank has its part of the batch. Gradients are averaged over ranks, so the whole module's loss
is the mean of the ranks' losses.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor

from fastadapt import SAE, AdapterConfig, Transcoder, TranscoderAdapter

D, F = 12, 42  # F: shards of equal size on two ranks, not on four
CONFIG = AdapterConfig(F, "jumprelu", bandwidth=0.1, initial_threshold=0.05)
KINDS: dict[str, Callable[[], Any]] = {
    "adapter": lambda: TranscoderAdapter(D, CONFIG, dtype=torch.float64),
    "skip": lambda: Transcoder(D, CONFIG, 9, skip=True, dtype=torch.float64),
    "centred": lambda: SAE(D, CONFIG, subtract_b_dec=True, dtype=torch.float64),
}


def loss(module: Any, x: torch.Tensor) -> torch.Tensor:
    options = {} if isinstance(module, TranscoderAdapter) else {"return_aux": True}
    out, aux = module(x, **options)
    return out.square().mean() + 0.1 * aux.penalty / len(x)


def compare(name: str, rank: int, world: int) -> None:
    """Raise unless a sharded module takes the step of a whole one."""
    torch.manual_seed(0)
    whole = KINDS[name]()
    with torch.no_grad():
        for parameter in (whole.W_dec, whole.b_dec, whole.b_enc):
            parameter.normal_(0, 0.3)
    sharded = copy.deepcopy(whole)
    fully_shard(sharded, mesh=init_device_mesh("cpu", (world,)))
    register_fsdp_forward_method(sharded, "encode")
    assert all(isinstance(p, DTensor) for p in sharded.parameters())
    assert sharded.W_enc.to_local().shape[0] == F // world

    x = torch.randn(world, 8, D, dtype=torch.float64)
    for module, batch in ((whole, x), (sharded, x[rank][None])):
        optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
        total = sum((loss(module, part) for part in batch), torch.zeros((), dtype=x.dtype))
        (total / len(batch)).backward()
        optimizer.step()
    assert list(sharded.state_dict()) == list(whole.state_dict())
    for key, tensor in sharded.state_dict().items():
        expected = whole.state_dict()[key]
        torch.testing.assert_close(tensor.full_tensor(), expected, rtol=1e-12, atol=1e-12, msg=key)
    with torch.no_grad():
        torch.testing.assert_close(sharded.encode(x[0]), whole.encode(x[0]))


if __name__ == "__main__":
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    for kind in KINDS:
        compare(kind, dist.get_rank(), dist.get_world_size())
    if dist.get_rank() == 0:
        print(*KINDS)
    dist.destroy_process_group()
