"""Gumbel-max sampling with random numbers that do not depend on the batch.

For ``g_v = -log(-log u_v)`` with uniform u, the v that maximises ``log p_v + g_v`` is an exact
sample of p. The u are a function of (seed, request, repetition, position, v), not a generator's
stream. A request therefore has the same random numbers in every batch and order, resumed or not.

N rows, V vocabulary.
"""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

from fastadapt.evaluation.splitmix import STEP, mix


def request_seed(seed: int, request: str, repetition: int) -> int:
    """Return the 63-bit seed of a repetition of a request."""
    name = f"{seed}\0{request}\0{repetition}".encode()
    return int.from_bytes(hashlib.blake2b(name, digest_size=8).digest(), "big") >> 1


def position_key(request: int, position: int) -> tuple[int, int]:
    """Return the key of a position's random numbers as two int32, by SplitMix64.

    Args:
        request: seed of the request, see :func:`request_seed`.
        position: index in the sequence of the token to be sampled.
    """
    z = mix(request + (position + 1) * STEP)
    return _signed(z >> 32 & 0xFFFFFFFF), _signed(z & 0xFFFFFFFF)


def gumbel(high_N: Tensor, low_N: Tensor, vocabulary: int) -> Tensor:
    """Return Gumbel noise, float32 ``[N, V]``.

    ``u = (k + ½) / 2³²``, where k mixes the key and v to 32 bits. That many bits give tokens as
    improbable as float32 logits can express. The mixer is murmur3's finaliser, a bijection of 32
    bits with two multiplications, applied to v once with each half of the key.

    Args:
        high_N, low_N: int32 ``[N]``, the halves of the keys of :func:`position_key`.
        vocabulary: V.
    """
    index_V = torch.arange(vocabulary, device=high_N.device, dtype=torch.int32)
    bits_NV = _mix(_mix(index_V ^ low_N[:, None]) ^ high_N[:, None])
    k_NV = bits_NV.float()
    u_NV = (torch.where(bits_NV < 0, k_NV + 2.0**32, k_NV) + 0.5) * 2.0**-32
    # -log(1 - u) is exact for small values: those give the large noise that decides the sample.
    exponential_NV = -torch.log1p(-u_NV.clamp_max(1 - 2.0**-24))
    return -torch.log(exponential_NV)


def _mix(x: Tensor) -> Tensor:
    """Apply murmur3's finaliser to int32. The multiplications wrap around."""
    x = (x ^ _shift(x, 16)) * _signed(0x85EBCA6B)
    x = (x ^ _shift(x, 13)) * _signed(0xC2B2AE35)
    return x ^ _shift(x, 16)


def _shift(x: Tensor, bits: int) -> Tensor:
    """Shift right without sign extension, which torch lacks for signed integers."""
    return (x >> bits) & ((1 << (32 - bits)) - 1)


def _signed(x: int) -> int:
    return x - (1 << 32) if x >= 1 << 31 else x
