"""Sampling whose random numbers belong to a request, not to the batch that it is in.

The Gumbel-max way: where ``g_v = -log(-log u_v)`` with u uniform, the v that maximises
``log p_v + g_v`` is drawn from p exactly. The u are no stream of a generator but a function of
(seed, request, repetition, position, v), so a request draws the same numbers whatever runs beside
it, in whatever order, resumed or not. N rows, V vocabulary.
"""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

from fastadapt.data.splitmix import STEP, mix


def request_seed(seed: int, request: str, repetition: int) -> int:
    """63 bits that are a request's own."""
    name = f"{seed}\0{request}\0{repetition}".encode()
    return int.from_bytes(hashlib.blake2b(name, digest_size=8).digest(), "big") >> 1


def position_key(request: int, position: int) -> tuple[int, int]:
    """Two int32 of a request's seed and the position of the token to be drawn: SplitMix64."""
    z = mix(request + (position + 1) * STEP)
    return _signed(z >> 32 & 0xFFFFFFFF), _signed(z & 0xFFFFFFFF)


def gumbel(high_N: Tensor, low_N: Tensor, vocabulary: int) -> Tensor:
    """Float32 ``[N, V]`` of Gumbel noise, from int32 keys ``[N]`` of :func:`position_key`.

    ``u = (k + ½) / 2³²`` with k a mix of key and v: 32 bits, so that the rarest token that can be
    drawn is as rare as float32 logits can say. The mixer is a bijection of 32 bits with two
    multiplications (murmur3's), applied to v under each half of the key.
    """
    index_V = torch.arange(vocabulary, device=high_N.device, dtype=torch.int32)
    bits_NV = _mix(_mix(index_V ^ low_N[:, None]) ^ high_N[:, None])
    k_NV = bits_NV.float()
    u_NV = (torch.where(bits_NV < 0, k_NV + 2.0**32, k_NV) + 0.5) * 2.0**-32
    # -log(1 - u) is exact where it is small: where the noise is large, and the draw decided.
    exponential_NV = -torch.log1p(-u_NV.clamp_max(1 - 2.0**-24))
    return -torch.log(exponential_NV)


def _mix(x: Tensor) -> Tensor:
    """murmur3's finaliser on int32; multiplication wraps."""
    x = (x ^ _shift(x, 16)) * _signed(0x85EBCA6B)
    x = (x ^ _shift(x, 13)) * _signed(0xC2B2AE35)
    return x ^ _shift(x, 16)


def _shift(x: Tensor, bits: int) -> Tensor:
    """The logical shift to the right, which torch has not for signed integers."""
    return (x >> bits) & ((1 << (32 - bits)) - 1)


def _signed(x: int) -> int:
    return x - (1 << 32) if x >= 1 << 31 else x
