"""Read untrusted safetensors files, and check dtype, shape and finiteness of their tensors.

The format has no checksum, and casting the integer codes of a quantized weight gives wrong values
without an error. Errors name the file and the tensor.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from fastadapt.errors import UserError
from fastadapt.io.files import one_line, open_regular

#: Dtypes of weights. Tensors of other dtypes hold quantized codes.
FLOATING = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
#: Elements checked at once: the check needs 4 MiB instead of a second tensor.
_CHUNK = 1 << 22


class TensorError(UserError):
    """A safetensors file cannot be read, or a tensor in it has a wrong dtype, shape or value."""


@contextmanager
def open_tensors(path: str | os.PathLike[str], device: torch.device | str = "cpu") -> Iterator[Any]:
    """Yield a file opened with ``safe_open``. Errors inside the context are ``TensorError``.

    Raises:
        TensorError: the file is missing, truncated or damaged.
    """
    from safetensors import SafetensorError, safe_open

    try:
        open_regular(path).close()  # raise for a pipe, on which safetensors would block
        with safe_open(os.fspath(path), framework="pt", device=str(device)) as file:
            yield file
    except FileNotFoundError:
        raise TensorError(f"{path} is missing") from None
    except SafetensorError as error:
        raise TensorError(f"{path} is truncated or damaged: {one_line(error)}") from error
    # ValueError: the path contains a NUL, or the header is not UTF-8.
    except (OSError, ValueError) as error:
        if isinstance(error, UserError):
            raise
        raise TensorError(f"{path} cannot be read: {one_line(error)}") from error


def read_tensors(
    path: str | os.PathLike[str],
    shapes: Mapping[str, Collection[int]] | None = None,
    *,
    finite: bool = False,
) -> dict[str, Tensor]:
    """Return every tensor of a file of weights, in host memory.

    Args:
        path: path of the file.
        shapes: shapes of all tensors that the file must hold, by name; None for any.
        finite: raise for NaN and infinity, at the cost of one pass over each tensor.

    Raises:
        TensorError: a tensor is missing or unexpected; see also :func:`open_tensors` and
            :func:`check_tensor`.
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
    """Check that a tensor has a floating dtype and ``shape`` and, if ``finite`` is set, is finite.

    Args:
        tensor: a tensor from a file, on any device.
        source: file or checkpoint, for messages.
        name: name of the tensor in the file.
        shape: expected shape; None for any.
        finite: raise for NaN and infinity, at the cost of one pass over the tensor without a copy.

    Raises:
        TensorError: a check fails; the message names ``source`` and ``name``.

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
    """Raise :class:`TensorError`, prefixed by ``where``, if a value is NaN or infinite."""
    for chunk in tensor.detach().flatten().split(_CHUNK):
        if not bool(torch.isfinite(chunk).all()):
            n = int((~torch.isfinite(chunk)).sum())
            raise TensorError(f"{where}: expected finite values, got {n:,} NaN or infinite")


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
