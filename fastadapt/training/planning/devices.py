"""The device that a run is planned for: its memory, and its rate of matrix products.

The rate of this machine's device is measured. The rate of another GPU comes from its data sheet and
is never reached in practice, so a time computed from it is a lower bound.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch

from fastadapt.errors import UserError

#: Source of a rate that was measured on this machine.
MEASURED = "measured here on large products"
#: Bytes of a GPU reserved for the driver, libraries' workspaces and fragmentation.
RESERVED = 4_000_000_000


@dataclass(frozen=True)
class Device:
    """A device that a run is planned for.

    Attributes:
        name: name for messages.
        kind: ``cuda`` or ``cpu``.
        memory_bytes: total memory.
        flops_per_s: rate of large matrix products in the run's dtype, in FLOP/s.
        source: source of the rate, for messages.
    """

    name: str
    kind: str
    memory_bytes: int
    flops_per_s: float
    source: str

    @property
    def is_here(self) -> bool:
        """Whether the device is this machine's, so that its rates can be measured."""
        return self.source == MEASURED

    @property
    def usable_bytes(self) -> int:
        """Memory without the reserve, which a run's tensors may fill, in bytes."""
        reserved = RESERVED if self.kind == "cuda" else self.memory_bytes // 10
        return self.memory_bytes - reserved


#: Name, memory in bytes, and rate of dense 16-bit products in FLOP/s, by data sheet (SXM).
DATA_SHEETS = {
    "a100": ("NVIDIA A100 80GB", 80_000_000_000, 312e12),
    "h100": ("NVIDIA H100 80GB", 80_000_000_000, 989.4e12),
    "h200": ("NVIDIA H200 141GB", 141_000_000_000, 989.4e12),
}


def planned_device(gpu: str | None, kind: str, dtype: torch.dtype, *, timed: bool = True) -> Device:
    """Return the GPU ``gpu``; without a name, this machine's device of type ``kind``, or an H100.

    Args:
        gpu: a key of :data:`DATA_SHEETS`, or None.
        kind: ``cuda`` or ``cpu``, the device type that the run uses; ignored if ``gpu`` is given.
        dtype: dtype of the products.
        timed: measure the rate of this machine's device.

    Raises:
        UserError: ``gpu`` has no data sheet here, or ``dtype`` is wider than its rate applies to.
    """
    if gpu is None and (kind == "cpu" or torch.cuda.is_available()):
        return this_device(kind, measured_rate(kind, dtype)) if timed else this_device(kind)
    name = (gpu or "h100").lower()
    if name not in DATA_SHEETS:
        raise UserError(f"--gpu: expected one of {', '.join(DATA_SHEETS)}, got {name!r}")
    title, memory, rate = DATA_SHEETS[name]
    if dtype.itemsize > 2:
        raise UserError(
            f"--gpu {name}: expected a 16-bit pair.dtype, since its data sheet states the rate "
            f"of 16-bit products; got {str(dtype)[6:]}. Plan with --pair.dtype bfloat16, or on "
            "the machine itself"
        )
    return Device(title, "cuda", memory, rate, "data sheet, an upper bound")


def this_device(kind: str, rate: float = float("nan")) -> Device:
    """Return this machine's GPU or CPU, with a measured ``rate`` in FLOP/s."""
    if kind == "cpu":
        memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        return Device("this CPU", "cpu", memory, rate, MEASURED)
    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    return Device(properties.name, "cuda", properties.total_memory, rate, MEASURED)


def measured_rate(kind: str, dtype: torch.dtype) -> float:
    """Measure a large square product on this machine: median over half a second, in FLOP/s."""
    from torch.utils.benchmark import Timer

    n = 8192 if kind == "cuda" else 1024
    a, b = (torch.randn(n, n, device=kind).to(dtype) for _ in range(2))
    timer = Timer("a @ b", globals={"a": a, "b": b}, num_threads=torch.get_num_threads())
    return 2 * n**3 / timer.blocked_autorange(min_run_time=0.5).median
