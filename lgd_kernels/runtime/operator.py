"""Define an op for PyTorch: schema, fake, dispatch, autograd and the direct call, once for all ops.

An op declares its arguments as a NamedTuple that mirrors its struct in csrc/; a field may be such a struct itself. The
operator takes the leaves of that tree, one after the other, and then `impl`; its schema is read off the annotations.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import cache
from typing import Any, NamedTuple, get_type_hints

import torch
from torch import Tensor

from lgd_kernels.runtime import impls
from lgd_kernels.runtime.arguments import requires_grad

LIBRARY = torch.library.Library("lgd", "FRAGMENT")
TAGS = (torch.Tag.pt2_compliant_tag, torch.Tag.needs_exact_strides)
DEVICES = ("CPU", "CUDA", "MPS", "XPU")
SCHEMA = {
    Tensor: "Tensor",
    Tensor | None: "Tensor?",
    list[Tensor]: "Tensor[]",
    float: "float",
    bool: "bool",
    int: "SymInt",
    int | None: "SymInt?",
    str: "str",
    str | None: "str?",
    torch.dtype: "ScalarType",
    list[int]: "int[]",
    list[bool]: "bool[]",
    list[float]: "float[]",
}
UNNAMED = ("tensor", "scalars", "read", "combine")  # fields that add nothing to the names of the leaves below them


class Leaf(NamedTuple):
    """A field of a struct that is no struct itself: its name in the schema, its type, and how a lambda reads it."""

    name: str
    kind: Any
    read: str


class Shape(NamedTuple):
    """How a struct is taken apart and put together again."""

    leaves: list[Leaf]
    flatten: Callable[[tuple], tuple]
    build: Callable[[Sequence], tuple]
    tensors: Callable[[tuple], tuple]  # all tensors, and then those in its lists
    # Between forward and backward the tensors are where autograd watches them. The first leaf is the upstream gradient.
    saved_tensors: Callable[[tuple], tuple]
    saved_rest: Callable[[tuple], tuple]  # all other leaves; of a list of tensors its length
    restore: Callable[[Any, tuple, tuple], tuple]  # (upstream, tensors, rest) -> the struct


@cache
def shape_of(struct: type) -> Shape:
    """The functions are compiled from source, as those of a NamedTuple are: every call of an op pays for them."""
    leaves: list[Leaf] = []
    types = {"new": tuple.__new__}  # which takes half the time of NamedTuple's own constructor

    def template(kind: type, path: str, name: str) -> str:
        """Return source that makes the struct, with a replacement field for each leaf."""
        types[kind.__name__] = kind
        fields = []
        for place, (field, hint) in enumerate(get_type_hints(kind).items()):
            full = "_".join(part for part in (name, field) if part and part not in UNNAMED)
            if hasattr(hint, "_fields"):
                fields.append(template(hint, f"{path}[{place}]", full))
            else:
                fields.append(f"{{{len(leaves)}}}")
                leaves.append(Leaf(full, hint, f"{path}[{place}]"))
        return f"new({kind.__name__}, ({', '.join(fields)},))"

    source = template(struct, "a", "")

    def compiled(arguments: str, body: str) -> Callable[..., Any]:
        return eval(f"lambda {arguments}: {body}", types)

    def in_tuple(reads: Iterable[str]) -> str:
        return "(" + "".join(f"{read}, " for read in reads) + ")"

    def tensors(leaves: list[Leaf]) -> list[str]:
        single = [leaf.read for leaf in leaves if leaf.kind in (Tensor, Tensor | None)]
        return single + [f"*{leaf.read}" for leaf in leaves if leaf.kind == list[Tensor]]

    others = leaves[1:]
    saved, restored = tensors(others), ["u"]
    rest: list[str] = []
    first = str(sum(not read.startswith("*") for read in saved))  # of the tensors of the next list
    for leaf in others:
        if leaf.read in saved:
            restored.append(f"t[{saved.index(leaf.read)}]")
        elif leaf.kind == list[Tensor]:
            end = f"{first} + r[{len(rest)}]"
            restored.append(f"list(t[{first}:{end}])")
            rest.append(f"len({leaf.read})")
            first = end
        else:
            restored.append(f"r[{len(rest)}]")
            rest.append(leaf.read)
    return Shape(
        leaves,
        compiled("a", in_tuple(leaf.read for leaf in leaves)),
        compiled("f", source.format(*(f"f[{place}]" for place in range(len(leaves))))),
        compiled("a", in_tuple(tensors(leaves))),
        compiled("a", in_tuple(saved)),
        compiled("a", in_tuple(rest)),
        compiled("u, t, r", source.format(*restored)),
    )


class Raw(NamedTuple):
    """An operator that is not differentiable: `torch.ops.lgd.<name>`."""

    forward: Callable[[Any, str | None], Any]  # (struct, impl) -> its outputs; None for one that is not wanted
    dispatched: Callable
    flatten: Callable[[tuple], tuple]
    tensors: Callable[[tuple], tuple]

    def __call__(self, a: tuple, impl: str | None) -> Any:
        return self.run(a, impl, impls.direct(*self.tensors(a)))

    def run(self, a: tuple, impl: str | None, direct: bool) -> Any:
        """`direct` leaves out the dispatch, and with it whatever may be watching (`impls.direct`)."""
        return self.forward(a, impl) if direct else self.dispatched(*self.flatten(a), impl)


def define(struct: type, name: str, returns: str, forward: Callable, fake: Callable) -> Raw:
    """Register `torch.ops.lgd.<name>`. `fake(struct)` gives empty outputs.

    An operator cannot return None, so a None among its outputs becomes a tensor without elements.
    """
    shape = shape_of(struct)
    fields = ", ".join(f"{SCHEMA[leaf.kind]} {leaf.name}" for leaf in shape.leaves)
    LIBRARY.define(f"{name}({fields}, str? impl) -> {returns}", tags=TAGS)

    def run(*flat):
        return _without_none(forward(shape.build(flat), flat[-1]), flat[0])

    for device in DEVICES:
        LIBRARY.impl(name, run, device)
    empty = lambda *flat: _without_none(fake(shape.build(flat)), flat[0])  # noqa: E731
    torch.library.register_fake(f"lgd::{name}", empty, lib=LIBRARY)
    return Raw(forward, getattr(torch.ops.lgd, name).default, shape.flatten, shape.tensors)


def _without_none(outputs: Any, like: Tensor | list[Tensor]) -> Any:
    if isinstance(outputs, Tensor):
        return outputs
    like = like if isinstance(like, Tensor) else like[0]
    return tuple(like.new_empty(0) if one is None else one for one in outputs)


class Operator(NamedTuple):
    """A differentiable op.

    The backward reads the struct that `save` makes. Its first field is the upstream gradient, or a tuple of them if the
    op has several outputs; `save` may put anything there.
    """

    name: str
    raw: Raw
    reference: Callable[[Any], Any]  # struct -> outputs; plain PyTorch, for transforms and impl="reference"
    leaves: Callable[[Any], tuple]  # struct -> the tensors that may get a gradient
    saved: Shape  # of the struct that backward reads
    save: Callable[[Any, Any, Any], Any]  # (struct, outputs, which leaves want a gradient) -> that struct
    backward: Callable[[Any, str | None, bool], Sequence]  # (that, impl, direct) -> a gradient for each leaf
    reference_backward: Callable[[Any], Sequence]  # the same as a formula that autograd and vmap can go through
    outputs: int = 1  # differentiable ones, the first
    recorded: Callable[[Any, tuple], Any] | None = None  # (struct, wanted) -> the struct of a call with gradients

    def __call__(self, a: tuple, impl: str | None) -> Any:
        if impls.through_reference(self.name, impl):
            return self.reference(a)
        if torch.is_grad_enabled():
            leaves = self.leaves(a)
            if requires_grad(*leaves):
                return _Recorded.apply(self, a, impl, *leaves)
        raw = self.raw  # run here: for a small sample every call of Python counts
        found = raw.forward(a, impl) if impls.direct(*raw.tensors(a)) else raw.run(a, impl, False)
        return found if isinstance(found, Tensor) else found[0] if self.outputs == 1 else found[: self.outputs]


class _Recorded(torch.autograd.Function):
    @staticmethod
    def forward(ctx, op, a, impl, *leaves):
        ctx.op, ctx.impl, ctx.wanted = op, impl, ctx.needs_input_grad[3:]
        a = a if op.recorded is None else op.recorded(a, ctx.wanted)
        ctx.plain = impls.direct(*op.raw.tensors(a))
        found = op.raw.run(a, impl, ctx.plain)
        saved = op.save(a, found, ctx.wanted)
        ctx.save_for_backward(*op.saved.saved_tensors(saved))
        ctx.rest = op.saved.saved_rest(saved)
        return found if isinstance(found, Tensor) else found[0] if op.outputs == 1 else found[: op.outputs]

    @staticmethod
    def backward(ctx, *upstream):
        op = ctx.op
        saved = op.saved.restore(upstream[0] if len(upstream) == 1 else upstream, ctx.saved_tensors, ctx.rest)
        if torch.is_grad_enabled() or impls.transforms_active() or any(map(impls.batched, upstream)):
            grads = op.reference_backward(saved)
        else:
            grads = op.backward(saved, ctx.impl, ctx.plain and impls.direct(*upstream))
        return None, None, None, *(grad if want else None for grad, want in zip(grads, ctx.wanted, strict=True))
