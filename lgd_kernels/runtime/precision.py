"""Take matrix products in full precision, whatever precision the caller has set."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch


def full_precision(device: torch.device) -> contextlib.AbstractContextManager[None]:
    """Turn off autocast and reduced float32 products (TF32 on a GPU, bfloat16 in oneDNN) in a `with` block.

    A squared distance formed from a product in bfloat16 is off by 4e-3 of the squared norms, in TF32 by 5e-4. The
    precision of float32 products is a setting of the whole process, restored at the end of the block: keep it short.

    >>> import torch
    >>> x = torch.randn(4, 4)
    >>> with torch.autocast("cpu", dtype=torch.bfloat16), full_precision(x.device):
    ...     (x @ x).dtype
    torch.float32
    """
    products = (torch.backends.cuda if device.type == "cuda" else torch.backends.mkldnn).matmul
    set_to = products.fp32_precision
    reduced = set_to not in ("none", "ieee")
    if not reduced and not torch.is_autocast_enabled(device.type):
        return contextlib.nullcontext()
    return _full_precision(device, products, set_to if reduced else None)


@contextlib.contextmanager
def _full_precision(device: torch.device, products, restore: str | None) -> Iterator[None]:
    with torch.autocast(device.type, enabled=False):
        try:
            if restore is not None:
                products.fp32_precision = "ieee"
            yield
        finally:
            if restore is not None:
                products.fp32_precision = restore
