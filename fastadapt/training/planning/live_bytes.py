"""Count the bytes of living tensors, fake or real, from the storages that ops return."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter


class LiveBytes(TorchDispatchMode):
    """Counts the storages of all tensors that ops return while the mode is on.

    Args:
        workspaces: by op, a function of the op's arguments that returns the bytes which the op
            allocates and frees inside one call. Without a function these bytes do not count.

    Attributes:
        alive: bytes of the storages that still exist.
        peak: the largest ``alive`` since the start, or since ``peak`` was set; workspaces count.
        workspace: the largest workspace of each op, in bytes.
    """

    def __init__(self, workspaces: Mapping[Any, Callable[..., int]] | None = None) -> None:
        super().__init__()
        self.alive = self.peak = 0
        self.workspace: dict[Any, int] = {}
        self._workspaces = workspaces or {}
        self._makers: weakref.WeakKeyDictionary[Any, Any] = weakref.WeakKeyDictionary()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_iter(out):
            if isinstance(tensor, torch.Tensor):
                self.see(tensor, func)
        if func in self._workspaces:
            n = self._workspaces[func](*args)
            self.workspace[func] = max(n, self.workspace.get(func, 0))
            self.peak = max(self.peak, self.alive + n)
        return out

    def see(self, tensor: torch.Tensor, maker: Any = None) -> None:
        """Count a tensor that exists already, as a result of the op ``maker``."""
        storage = tensor.untyped_storage()
        if storage in self._makers:
            return
        self._makers[storage] = maker
        n = storage.nbytes()
        weakref.finalize(storage, self._free, n)
        self.alive += n
        self.peak = max(self.peak, self.alive)

    def alive_of(self, maker: Any) -> int:
        """Return the bytes alive of the results of one op."""
        return sum(storage.nbytes() for storage, op in self._makers.items() if op is maker)

    def _free(self, n: int) -> None:
        self.alive -= n
