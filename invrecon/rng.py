"""Randomness as a function of (seed, key): one generator a sample, so batching and ranks never change a result."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor

Generators = Sequence[torch.Generator]


def derive_seed(seed: int, *keys: object) -> int:
    """Returns a 63-bit seed that depends on `seed` and `keys` alone (BLAKE2b of their text).

    Args:
        seed: The run's seed.
        *keys: Anything with a stable `str`, such as a case's id, a step or a rank.
    """
    text = "\x1f".join(str(part) for part in (seed, *keys))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1


def make_generator(seed: int, *keys: object) -> torch.Generator:
    """Returns a CPU generator seeded by `derive_seed(seed, *keys)`."""
    return torch.Generator().manual_seed(derive_seed(seed, *keys))


def make_generators(seed: int, keys: Sequence[str]) -> list[torch.Generator]:
    """Returns one generator per key: the same case draws the same numbers alone, in a batch, on any rank.

    Args:
        seed: The run's seed.
        keys: The samples' identities, usually `Case.id`.
    """
    return [make_generator(seed, key) for key in keys]


def spawn(generators: Generators, num: int) -> list[torch.Generator]:
    """Returns `num` children of each generator, sample-major (`len(generators) * num` in all).

    A single child is the parent itself, so asking for one sample or for none special gives equal draws.
    """
    if num == 1:
        return list(generators)
    children = []
    for parent in generators:
        seeds = torch.randint(2**62, (num,), generator=parent)
        children += [torch.Generator().manual_seed(int(seed)) for seed in seeds]
    return children


def randn(shape: Sequence[int], generators: Generators, like: Tensor, out: Tensor | None = None) -> Tensor:
    """Returns standard normal noise `(B, *shape)` with the dtype and device of `like`.

    Drawn on the CPU, sample by sample, so that the numbers agree between devices and batch sizes.

    Args:
        shape: Shape of one sample.
        generators: One generator a sample.
        like: Gives dtype and device.
        out: Noise of an earlier call that is no longer needed: it is overwritten and returned if it fits.
    """
    size, on_cpu = (len(generators), *shape), like.device.type == "cpu"
    if out is not None:
        alike = (out.shape, out.dtype, out.device) == (size, like.dtype, like.device)
        out = out if alike and out.is_contiguous() else None  # in another order, other numbers would be drawn
    noise = out if out is not None and on_cpu else torch.empty(size, dtype=like.dtype, device="cpu")
    for row, generator in zip(noise, generators, strict=True):
        row.normal_(generator=generator)
    if on_cpu:
        return noise
    return noise.to(like.device) if out is None else out.copy_(noise)


def randint(high: int, generators: Generators) -> Tensor:
    """Returns one integer in `[0, high)` per generator, shape `(B,)`."""
    return torch.cat([torch.randint(high, (1,), generator=g) for g in generators])
