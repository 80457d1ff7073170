"""Define the noise: every implementation draws these integers, and these normals to 1e-6.

Philox4x32-10 (Salmon, Moraes, Dror, Shaw: "Parallel random numbers: as easy as 1, 2, 3", SC 2011) is counter-based:
the noise of an element depends on the seed and on the place of the element, never on how the work is divided.

    key     = seed as two uint32 (low, high)
    counter = (element >> 2 low 32 bits, element >> 34, sample, stream)
    lane    = element & 3: which of the four words

`sample` is the index of the sample in the batch plus `first_sample`, `element` the row-major index within the sample.
With a seed for each sample (`[B]`), `sample` is 0, and the noise of a sample does not depend on its place.
Words become normals by Box-Muller, u = (word + 1/2) 2^-32 in float32 and kept below 1:

    lanes 0, 1: z_0 = sqrt(-2 ln u_0) cos(2 pi u_1),  z_1 = sqrt(-2 ln u_0) sin(2 pi u_1);  lanes 2, 3 likewise
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lgd_kernels.runtime import checks, impls
from lgd_kernels.runtime.arguments import Seed

STREAM_USER, STREAM_STEP, STREAM_TARGETS = 0, 1, 2  # uses of one seed share no noise
STREAM_PARTICLES, STREAM_REWARD = 3, 4  # of learning omega: x_t, and the steps of a black-box reward

_MULTIPLY = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_LOW = 0xFFFFFFFF


def philox_normal(
    shape: tuple[int, ...],
    seed: int | Tensor,
    *,
    stream: int = STREAM_USER,
    first_sample: int = 0,
    device: torch.device | str | None = None,
) -> Tensor:
    """Return standard normals of the given shape `[B, ...]`: exactly the noise that the kernels draw.

    Args:
        shape: `[B, ...]`; the first dimension counts samples, the rest elements (row-major) within one.
        seed: an int in [-2^63, 2^63), a 0-dim int64 tensor, or int64 `[B]`: one for each sample, whose noise then
            does not depend on its place in the batch.
        stream: 0 is free for users. `guided_step` draws from 1: `philox_normal(x.shape, seed, stream=1)` is the noise
            of `guided_step(..., seed=seed)`.
        first_sample: index of the first sample, for a batch that is split over processes. Of no effect on a
            `[B]` seed.
        device: of the result; by default the seed's, or the CPU.

    Returns float32; nothing is differentiable. The formula is in the module's docstring. Raises TypeError or
    ValueError for a bad seed, stream or shape.

    >>> import lgd_kernels as lgd
    >>> whole = lgd.philox_normal((4, 3), seed=7)
    >>> part = lgd.philox_normal((2, 3), seed=7, first_sample=2)
    >>> bool((whole[2:] == part).all())
    True
    """
    if not isinstance(shape, (tuple, list)) or not shape or any(not _is_size(size) for size in shape):
        raise ValueError(f"philox_normal: `shape` is {shape}, expected (B, ...), integers of 0 or more")
    shape = tuple(shape)
    if not isinstance(stream, int) or not 0 <= stream <= _LOW:
        raise ValueError(f"philox_normal: `stream` is {stream}, expected an integer from 0 to 2^32 - 1")
    checks.seed("philox_normal", seed, first_sample, shape[0], None)
    if device is None:
        device = seed.device if isinstance(seed, Tensor) else "cpu"
    device = torch.device(device)
    extension = impls.extension() if device.type == "cpu" and not torch.compiler.is_compiling() else None
    if extension is None:
        return normal(shape, seed, stream, first_sample, device)
    out = torch.empty(shape, dtype=torch.float32, device=device)
    if isinstance(seed, Tensor):
        seed = seed.to(device).clone()  # a zero tensor of forward AD gets memory
    if out.numel():
        extension.philox_normal(out, 0, stream, Seed.of(seed, first_sample), torch.get_num_threads())
    return out


def _is_size(value: int) -> bool:
    return isinstance(value, (int, torch.SymInt)) and not isinstance(value, bool) and value >= 0


def normal(
    shape: tuple[int, ...],
    seed: int | Tensor,
    stream: int,
    first_sample: int,
    device: torch.device,
    particles: int = 1,
) -> Tensor:
    """Return `philox_normal` in plain PyTorch, the specification: float64 from float32 u, rounded once.

    `particles` consecutive samples make an item. With a seed for each item, its particles are samples 0 to
    particles - 1.
    """
    batch, elements = shape[0], math.prod(shape[1:])
    quads = torch.arange((elements + 3) // 4, device=device)
    sample = torch.arange(batch, device=device) + first_sample
    seed = seed.to(device) if isinstance(seed, Tensor) else torch.full((), seed, dtype=torch.int64, device=device)
    if seed.ndim == 1:
        sample = torch.arange(batch, device=device) % particles
        seed = seed.repeat_interleave(particles)
    key = (seed & _LOW, (seed >> 32) & _LOW)
    words = philox(
        (quads & _LOW, quads >> 32, (sample & _LOW)[:, None], torch.full_like(quads, stream)),
        (_column(key[0]), _column(key[1])),
    )
    z = torch.stack(box_muller(words), -1)  # [B, quads, 4]
    return z.flatten(1)[:, :elements].reshape(shape)


def philox(counter: tuple[Tensor, ...], key: tuple[Tensor, Tensor], rounds: int = 10) -> tuple[Tensor, ...]:
    """Return four uint32 words (held in int64) for each counter of four words and key of two, which broadcast."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(rounds):
        high0, low0 = _multiply(_MULTIPLY[0], c0)
        high1, low1 = _multiply(_MULTIPLY[1], c2)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + _WEYL[0]) & _LOW, (k1 + _WEYL[1]) & _LOW
    return tuple(torch.broadcast_tensors(c0, c1, c2, c3))


def box_muller(words: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Return four standard normals, float32, of four words."""
    u = [(word.to(torch.float32) * 2.0**-32 + 2.0**-33).clamp(max=1 - 2.0**-24).double() for word in words]
    pairs = []
    for radius, angle in ((u[0], u[1]), (u[2], u[3])):
        r = torch.sqrt(-2 * torch.log(radius))
        pairs += [r * torch.cos(2 * torch.pi * angle), r * torch.sin(2 * torch.pi * angle)]
    return tuple(z.float() for z in pairs)


def _column(word: Tensor) -> Tensor:
    """Return the words of seeds `[B]` as `[B, 1]`; one word stays 0-dim."""
    return word[:, None] if word.ndim else word


def _multiply(constant: int, word: Tensor) -> tuple[Tensor, Tensor]:
    """Return the high and low half of a 32 by 32 bit product, in int64 (whose own product would overflow)."""
    upper = constant * (word >> 16) + ((constant * (word & 0xFFFF)) >> 16)  # below 2^49
    return upper >> 16, (constant * word) & _LOW
