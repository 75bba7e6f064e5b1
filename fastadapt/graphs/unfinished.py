"""Store the finished parts of an unfinished graph, so that the same command goes on from them.

A graph's rows and ablations are computed in batches, in an order that depends on nothing but the
text, the settings and the weights. The ledger (:mod:`fastadapt.io.ledger`) has two fingerprints:

====================  ======================  ==================================================
fingerprint           part                    value
====================  ======================  ==================================================
``facts``             0                       what the numbers depend on, by name, as JSON
``batch``             number of the batch     its tensors, as safetensors
====================  ======================  ==================================================
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from threading import Event

from safetensors.torch import load, save
from torch import Tensor

from fastadapt.errors import RunError
from fastadapt.io.atomic import remove, remove_if_empty
from fastadapt.io.ledger import Ledger
from fastadapt.io.names import has_file
from fastadapt.io.workspace import Workspace

LEDGER = "batches.sqlite"
_ADVICE = "Finished rows are saved. Run the same command again, without --overwrite, to resume."
_RESTART = "Begin the graph again (--overwrite)."


class Stopped(Exception):  # noqa: N818
    """A graph was stopped before its next batch."""


class Batches:
    """The batches of one graph, each computed once.

    Args:
        ledger: holds the batches of an earlier call; None: there are none.
        stop: event that ends the computation before its next batch.
        create: returns the ledger that stores the batches, and is called after the first one is
            computed; None: they are stored in ``ledger``, if at all.

    Example:
        >>> import torch
        >>> Batches().next(lambda: {"x": torch.ones(2)})["x"].tolist()
        [1.0, 1.0]
    """

    def __init__(
        self,
        ledger: Ledger | None = None,
        stop: Event | None = None,
        create: Callable[[], Ledger] | None = None,
    ) -> None:
        self._ledger, self._stop, self._create = ledger, stop, create
        self._number = 0

    def next(self, compute: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
        """Return the tensors of the next batch from the ledger, or compute and store them.

        Raises:
            RunError: the file of stored batches is damaged or cannot be written.
            Stopped: the batch is not stored, and ``stop`` is set.
        """
        number, self._number = self._number, self._number + 1
        stored = None if self._ledger is None else self._ledger.get("batch", number)
        if stored is not None:
            return load(stored)
        if self._stop is not None and self._stop.is_set():
            raise Stopped
        tensors = compute()
        if self._ledger is None and self._create is not None:
            self._ledger = self._create()
        if self._ledger is not None:
            self._ledger.add([("batch", number, save(tensors))])
        return tensors

    def misfit(self) -> RunError:
        """Return the error for stored batches that contradict what was computed from the text."""
        where = "" if self._ledger is None else f"{self._ledger.path}: "
        return RunError(
            f"{where}the stored rows are not those of this computation, as with another number of "
            f"threads or another machine. Resume there, or: {_RESTART}"
        )


@contextmanager
def unfinished(
    graph: Path, facts: Mapping[str, object], *, overwrite: bool = False, stop: Event | None = None
) -> Iterator[Batches]:
    """Open the batches of the graph that is written to ``graph``; remove them after success.

    They lie in a folder beside the graph's file, with the ending ``.unfinished``.

    Args:
        graph: the graph's file, to be written inside the context.
        facts: everything that the numbers depend on, by name; values are written as JSON.
        overwrite: remove the batches of an earlier call as soon as this call's first is computed,
            so that a call that fails before loses nothing.
        stop: event that ends the computation before its next batch.

    Raises:
        UserError: the stored batches were computed from other facts, or another process computes
            this graph.
        RunError: the file of stored batches is damaged or cannot be written.
    """
    folder = graph.with_suffix(".unfinished")
    space = Workspace(
        folder, "graph", "explaining into", (), marker=LEDGER, advice=_ADVICE, unusable=RunError
    )
    path = folder / LEDGER
    with space.claimed():
        with ExitStack() as stack:

            def open_ledger() -> Ledger:
                ledger = stack.enter_context(Ledger(path, _ADVICE, _RESTART))
                _check(ledger, facts, space)
                return ledger

            def create() -> Ledger:
                with space.disk_errors():
                    _remove(path)
                return open_ledger()

            is_stored = has_file(path) and not overwrite
            yield Batches(open_ledger() if is_stored else None, stop, create)
        with space.disk_errors():
            _remove(path)
    with space.disk_errors():
        remove_if_empty(folder)


def _check(ledger: Ledger, facts: Mapping[str, object], space: Workspace) -> None:
    """Store the facts in a ledger without batches, or compare them with the stored ones."""
    packed = {name: json.dumps(value, sort_keys=True) for name, value in facts.items()}
    stored = ledger.get("facts", 0)
    if stored is None or ledger.get("batch", 0) is None:
        ledger.add([("facts", 0, json.dumps(packed).encode("utf-8", "surrogatepass"))])
        return
    before: dict[str, str] = json.loads(stored)
    differing = sorted(k for k in before.keys() | packed if before.get(k) != packed.get(k))
    if differing:
        raise space.refusal(
            f"has finished rows of a graph with other {', '.join(differing)}. Give the same "
            "settings and weights to resume, begin again (--overwrite), or give another --output"
        )


def _remove(ledger: Path) -> None:
    for path in (ledger, ledger.with_name(f"{ledger.name}-journal")):
        remove(path)
