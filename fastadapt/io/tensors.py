"""Read safetensors files that anyone may have written: errors name the file and the tensor.

The format has no checksum, and a reader that casts takes codes of a quantised weight for its
values. What is read through here is of the dtype, the shape and, where asked for, of the finite
values that the caller expects.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from fastadapt.errors import UserError
from fastadapt.io.files import open_regular

#: Dtypes of weights that are read as they are. Of any other the numbers are codes.
FLOATING = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
#: Elements that are looked at together, so that the check needs 4 MiB and not a second tensor.
_CHUNK = 1 << 22


class TensorError(UserError):
    """A safetensors file cannot be read, or a tensor in it is not what is expected."""


@contextmanager
def open_tensors(path: str | os.PathLike[str], device: torch.device | str = "cpu") -> Iterator[Any]:
    """Yield the ``safe_open`` of a file.

    Raises:
        TensorError: the file is missing, truncated or damaged; also while it is read.
    """
    from safetensors import SafetensorError, safe_open

    try:
        open_regular(path).close()  # or a pipe would be waited for
        with safe_open(os.fspath(path), framework="pt", device=str(device)) as file:
            yield file
    except FileNotFoundError:
        raise TensorError(f"{path} is missing") from None
    except SafetensorError as error:
        raise TensorError(f"{path} is truncated or damaged: {_line(error)}") from error
    # ValueError: a NUL in the path, or a header that is not UTF-8.
    except (OSError, ValueError) as error:
        if isinstance(error, UserError):
            raise
        raise TensorError(f"{path} cannot be read: {_line(error)}") from error


def read_tensors(
    path: str | os.PathLike[str],
    shapes: Mapping[str, Collection[int]] | None = None,
    *,
    finite: bool = False,
) -> dict[str, Tensor]:
    """Return every tensor of a file of weights, in host memory.

    Args:
        path: of the file.
        shapes: of all tensors that the file must hold, by name; None for any.
        finite: whether NaN and infinity are refused, in one pass over each tensor.

    Raises:
        TensorError: see :func:`open_tensors` and :func:`check_tensor`; a missing or extra tensor.
    """
    with open_tensors(path) as file:
        names = set(file.keys())
        wanted = dict.fromkeys(names) if shapes is None else dict(shapes)
        for name in sorted(names ^ wanted.keys()):
            expected = tuple(wanted[name] or ()) if name in wanted else "none"
            got = tuple(file.get_slice(name).get_shape()) if name in names else "none"
            raise TensorError(f"{path}: tensor {name}: expected {expected}, got {got}")
        tensors = {}
        for name in sorted(names):
            tensor = file.get_tensor(name)
            check_tensor(tensor, str(path), name, shape=wanted[name], finite=finite)
            tensors[name] = tensor
    return tensors


def check_tensor(
    tensor: Tensor,
    source: str,
    name: str,
    *,
    shape: Collection[int] | None = None,
    finite: bool = False,
) -> None:
    """Raise where a tensor is not of floating point, of ``shape`` and, if asked, ``finite``.

    Args:
        tensor: as it was read, of any device.
        source: the file or the checkpoint, for messages.
        name: of the tensor in it.
        shape: the expected one; None for any.
        finite: whether NaN and infinity are refused. Costs one pass over the tensor; no copy.

    Raises:
        TensorError: names ``source`` and ``name``.

    Example:
        >>> check_tensor(torch.ones(2, dtype=torch.int8), "layer_0.safetensors", "W_enc")
        Traceback (most recent call last):
            ...
        fastadapt.io.tensors.TensorError: layer_0.safetensors: tensor W_enc: expected floating \
point (float32, bfloat16, float16, float64), got int8
    """
    where = f"{source}: tensor {name}"
    if shape is not None and tuple(tensor.shape) != tuple(shape):
        raise TensorError(f"{where}: expected {tuple(shape)}, got {tuple(tensor.shape)}")
    if tensor.dtype not in FLOATING:
        allowed = ", ".join(map(_dtype_name, FLOATING))
        raise TensorError(
            f"{where}: expected floating point ({allowed}), got {_dtype_name(tensor.dtype)}"
        )
    if finite:
        check_finite(tensor, where)


def check_finite(tensor: Tensor, where: str) -> None:
    """Raise :class:`TensorError`, which begins with ``where``, if a value is NaN or infinite."""
    for chunk in tensor.detach().flatten().split(_CHUNK):
        if not bool(torch.isfinite(chunk).all()):
            odd = int((~torch.isfinite(chunk)).sum())
            raise TensorError(f"{where}: expected finite values, got {odd:,} NaN or infinite")


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]
