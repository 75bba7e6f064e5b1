"""What a run is planned for: a device's memory, and the rate of matrix products there.

Where the plan is for this machine the rate is measured here. For another one it is its data
sheet's, which no product reaches: a time made from it is a lower bound.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch

from fastadapt.errors import UserError

#: Bytes of a GPU that a plan leaves to the driver, to libraries' workspaces, to fragmentation.
RESERVED = 4_000_000_000


@dataclass(frozen=True)
class Device:
    """Where a run is to take place.

    Attributes:
        name: in words.
        kind: ``cuda`` or ``cpu``.
        memory_bytes: all of it.
        flops_per_s: of large matrix products in the run's dtype.
        source: where that rate comes from, in words.
    """

    name: str
    kind: str
    memory_bytes: int
    flops_per_s: float
    source: str

    @property
    def usable_bytes(self) -> int:
        """What a plan may fill."""
        reserved = RESERVED if self.kind == "cuda" else self.memory_bytes // 10
        return self.memory_bytes - reserved


#: Memory, and the data sheets' dense rate of 16-bit products: SXM modules.
DATA_SHEETS = {
    "a100": ("NVIDIA A100 80GB", 80_000_000_000, 312e12),
    "h100": ("NVIDIA H100 80GB", 80_000_000_000, 989.4e12),
    "h200": ("NVIDIA H200 141GB", 141_000_000_000, 989.4e12),
}


def planned_device(gpu: str | None, kind: str, dtype: torch.dtype) -> Device:
    """The named GPU; or else this machine, if it has such a device; or else an H100.

    Args:
        gpu: a key of :data:`DATA_SHEETS`, or None.
        kind: ``cuda`` or ``cpu``: what the run asks for where ``gpu`` is None.
        dtype: of the products.

    Raises:
        UserError: no data sheet of this GPU.
    """
    if gpu is None and (kind == "cpu" or torch.cuda.is_available()):
        return this_device(kind, measured_rate(kind, dtype))
    name = (gpu or "h100").lower()
    if name not in DATA_SHEETS:
        raise UserError(f"--gpu: expected one of {', '.join(DATA_SHEETS)}, got {name!r}")
    title, memory, rate = DATA_SHEETS[name]
    if dtype.itemsize > 2:
        raise UserError(
            f"--gpu {name}: its data sheet's rate is of 16-bit products, pair.dtype is "
            f"{str(dtype)[6:]}; plan with --pair.dtype bfloat16, or on the machine itself"
        )
    return Device(title, "cuda", memory, rate, "data sheet: no run reaches it")


def this_device(kind: str, rate: float = float("nan")) -> Device:
    """This machine's GPU or CPU; ``rate`` as measured."""
    source = "measured here, large products"
    if kind == "cpu":
        memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        return Device("this CPU", "cpu", memory, rate, source)
    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    return Device(properties.name, "cuda", properties.total_memory, rate, source)


def measured_rate(kind: str, dtype: torch.dtype) -> float:
    """FLOP/s of a large square product on this machine: the median of half a second of them."""
    from torch.utils.benchmark import Timer

    n = 8192 if kind == "cuda" else 1024
    a, b = (torch.randn(n, n, device=kind).to(dtype) for _ in range(2))
    timer = Timer("a @ b", globals={"a": a, "b": b}, num_threads=torch.get_num_threads())
    return 2 * n**3 / timer.blocked_autorange(min_run_time=0.5).median
