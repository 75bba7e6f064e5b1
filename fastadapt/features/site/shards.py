"""Writes the pages' data as scripts (shards), which ``static/shards.js`` unpacks.

A shard is the call ``fastadapt.shard(name, stamp, data)``. The data are base64 of a zlib stream
of::

    4 bytes     length of the head, little-endian
    head        JSON in UTF-8: {"facts": ..., "columns": [[name, type, entries], ...]}
    columns     in order, each as one plane per byte of its type: first the lowest byte of every
                entry, then the next, ...

Base64 has no character that can end a string or a script. Planes let zlib compress the zero bytes
of small numbers.
"""

from __future__ import annotations

import base64
import json
import zlib
from collections.abc import Mapping
from typing import Any

import numpy as np

#: Little-endian types of columns by their names in ``shards.js``.
TYPES = {"u8": "<u1", "u32": "<u4", "f32": "<f4", "f64": "<f8"}
NONE = 2**32 - 1  # missing value of a u32 column
_LEVEL = 4  # level 6 takes twice the time for files that are 1% smaller


def shard(name: str, stamp: str, facts: Any, columns: Mapping[str, np.ndarray]) -> bytes:
    """Return the script that hands a shard's facts and columns to a page.

    Args:
        name: name of the file without suffix: letters, digits and hyphens.
        stamp: stamp of the export. Pages reject shards with a different stamp than theirs.
        facts: a JSON value.
        columns: arrays of the types in :data:`TYPES`; they are flattened.
    """
    listed, planes = [], []
    for key, column in columns.items():
        kind = next(k for k, dtype in TYPES.items() if column.dtype == np.dtype(dtype))
        listed.append([key, kind, column.size])
        flat = np.ascontiguousarray(column).reshape(-1)
        planes.append(flat.view(np.uint8).reshape(-1, column.itemsize).T.tobytes())
    head = json.dumps(
        {"facts": facts, "columns": listed},
        ensure_ascii=False,
        allow_nan=False,
        separators=(",", ":"),
    ).encode("utf-8")
    packed = zlib.compress(b"".join([len(head).to_bytes(4, "little"), head, *planes]), _LEVEL)
    return f'fastadapt.shard("{name}","{stamp}","{base64.b64encode(packed).decode()}");\n'.encode()


def integers(values: np.ndarray) -> np.ndarray:
    """Convert counts to ``u32``, or to ``f64`` if one does not fit.

    Example:
        >>> integers(np.array([1.0, 2.0])).dtype, integers(np.array([2.0**40])).dtype
        (dtype('uint32'), dtype('float64'))
    """
    return values.astype("<u4" if values.size == 0 or values.max() < NONE else "<f8")
