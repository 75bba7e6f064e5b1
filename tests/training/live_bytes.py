"""How many bytes of tensors are alive, and were at most: a tracker for fake tensors and real ones.

What an op allocates and frees within itself is not seen.
"""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter


class LiveBytes(TorchDispatchMode):
    """Counts the storages of all tensors that ops give while it is on.

    Attributes:
        alive: bytes of those that still exist.
        peak: the most that ever was.
    """

    def __init__(self) -> None:
        super().__init__()
        self.alive = self.peak = 0
        self._known: weakref.WeakKeyDictionary[Any, bool] = weakref.WeakKeyDictionary()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in tree_iter(out):
            if isinstance(tensor, torch.Tensor):
                self.see(tensor)
        return out

    def see(self, tensor: torch.Tensor) -> None:
        """Count a tensor that exists already."""
        storage = tensor.untyped_storage()
        if storage in self._known:
            return
        self._known[storage] = True
        n = storage.nbytes()
        weakref.finalize(storage, self._gone, n)
        self.alive += n
        self.peak = max(self.peak, self.alive)

    def _gone(self, n: int) -> None:
        self.alive -= n
