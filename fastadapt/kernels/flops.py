"""FLOP formulas of the ops, for ``torch.utils.flop_counter.FlopCounterMode``.

``torch.utils.flop_counter`` imports triton, which importing fastadapt must not. So a formula waits
here until somebody imports the counter; whoever counts has done so.
"""

import importlib.util
import sys
from collections.abc import Callable, Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

__all__ = ["register"]

_COUNTER = "torch.utils.flop_counter"
_waiting: list[tuple[Any, Callable[..., int]]] = []


def register(op: Any, formula: Callable[..., int]) -> None:
    """Registers ``formula`` for ``op`` (an overload packet, ``torch.ops.fastadapt.name``).

    The formula gets the op's arguments with every tensor replaced by its shape, and ``out_shape``;
    it returns the floating-point operations of one call, a multiply-add counting as two.
    """
    _waiting.append((op, formula))
    if _COUNTER in sys.modules:
        _hand_over(sys.modules[_COUNTER])
    elif not any(isinstance(finder, _AfterImport) for finder in sys.meta_path):
        sys.meta_path.insert(0, _AfterImport())


def _hand_over(counter: ModuleType) -> None:
    while _waiting:
        op, formula = _waiting.pop()
        counter.register_flop_formula(op)(formula)


class _AfterImport:
    """Finds nothing but the counter, once, and hands the formulas over after it has loaded."""

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name != _COUNTER:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is None or spec.loader is None:
            return spec
        execute = spec.loader.exec_module

        def exec_module(module: ModuleType) -> None:
            execute(module)
            _hand_over(module)

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec
