"""Data as scripts: what ``static/shards.js`` unpacks.

A shard is a call, ``fastadapt.shard(name, stamp, data)``; the data are base64 of a zlib stream of::

    4 bytes     length of the head, little-endian
    head        JSON in UTF-8: {"facts": ..., "columns": [[name, type, entries], ...]}
    columns     one after the other; an entry's bytes lie apart, in as many planes as it has bytes

Base64 has no character that could end a string or a script, whatever the data say. The planes
(first all lowest bytes, then the next) are what lets zlib find the zeros of small numbers.
"""

from __future__ import annotations

import base64
import json
import zlib
from collections.abc import Mapping
from typing import Any

import numpy as np

#: Types of columns, little-endian, by the name that the pages know them by.
TYPES = {"u8": "<u1", "u32": "<u4", "f32": "<f4", "f64": "<f8"}
NONE = 2**32 - 1  # of a column of u32: no entry here
_LEVEL = 4  # 6 takes twice the time, for files smaller by one in a hundred


def shard(name: str, stamp: str, facts: Any, columns: Mapping[str, np.ndarray]) -> bytes:
    """The text of a shard.

    Args:
        name: of the file, without its ending; letters, digits, hyphens.
        stamp: of the export; the pages refuse shards of another one.
        facts: what JSON can say.
        columns: flat arrays of the types of :data:`TYPES`.
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
    """Counts as ``u32``, or as ``f64`` where one does not fit."""
    return values.astype("<u4" if values.size == 0 or values.max() < NONE else "<f8")
