"""The Triton kernel and its launcher."""

import triton
import triton.language as tl

from lgd_kernels.runtime.memory import sizes
from lgd_kernels.runtime.triton_common import load_tile, store_tile, tile
from lgd_kernels.runtime.triton_launch import launch, rows_argument, tiling


@triton.jit
def scaled_kernel(out, x, factor, stride, batch, row, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    rows, present, first, columns = tile(batch, row, ROWS, BLOCK)
    mask = present[:, None] & (first + columns < row)[None, :]
    by = tl.load(factor + rows * stride, mask=present).to(tl.float32)[:, None]
    store_tile(out, row, rows, first, columns, mask, by * load_tile(*x, rows, first, columns, mask))


def forward(out, a):
    grid, _, tiles = tiling(*sizes(out))
    launch(scaled_kernel, grid, out, rows_argument(a.x), a.factor, a.factor.stride(0), *tiles, like=out)
