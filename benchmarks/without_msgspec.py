"""Stand-in for msgspec, importable under its name where it is not installed (see checkout.py).

The modules of a training step bound the values of documents with ``msgspec.Meta`` when they are
imported. A step itself reads no document, so that no value is checked.
"""

from __future__ import annotations

from typing import Any, NoReturn

__all__ = ["Meta", "ValidationError", "convert"]


class Meta:
    """Bounds of a value, which are not used."""

    def __init__(self, **bounds: Any) -> None:
        self.bounds = bounds


class ValidationError(ValueError):
    """Never raised."""


def convert(value: Any, schema: Any, *, strict: bool) -> NoReturn:
    """Refuse to take a document for checked."""
    raise ModuleNotFoundError("msgspec, which checks documents, is not installed", name="msgspec")
