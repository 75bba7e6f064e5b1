"""Tracker of the bytes of live tensors and of their peak, for fake tensors and real ones.

Memory that an op allocates and frees internally is not counted.
"""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter


class LiveBytes(TorchDispatchMode):
    """Count the storages of all tensors that ops return inside the context.

    Attributes:
        alive: bytes of the storages that still exist.
        peak: maximum of ``alive``.
    """

    def __init__(self) -> None:
        super().__init__()
        self.alive = self.peak = 0
        self._storages: weakref.WeakKeyDictionary[Any, bool] = weakref.WeakKeyDictionary()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in tree_iter(out):
            if isinstance(tensor, torch.Tensor):
                self.see(tensor)
        return out

    def see(self, tensor: torch.Tensor) -> None:
        """Count a tensor that existed before the context."""
        storage = tensor.untyped_storage()
        if storage in self._storages:
            return
        self._storages[storage] = True
        n = storage.nbytes()
        weakref.finalize(storage, self._release, n)
        self.alive += n
        self.peak = max(self.peak, self.alive)

    def _release(self, n: int) -> None:
        self.alive -= n
