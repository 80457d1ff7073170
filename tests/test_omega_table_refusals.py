"""Check that invalid tables and lookups raise errors."""

import math
import re

import pytest
import torch

import lgd_kernels as lgd
from lgd_kernels.sampling import solvers

PLAIN = lgd.OmegaTable(torch.tensor([[[1.0, 2.0], [3.0, 5.0]]]), torch.tensor([0.0, 0.4]), torch.tensor([0.6, 1.0]))
VALUES, KNOTS = torch.ones(1, 2, 2), torch.tensor([0.0, 0.5])


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((VALUES[0], KNOTS, KNOTS), ValueError, r"`values` is \[2, 2\] torch.float32, expected floats \[C, S, T\]"),
        ((VALUES.long(), KNOTS, KNOTS), ValueError, r"`values` is \[1, 2, 2\] torch.int64, expected floats"),
        ((VALUES[:0], KNOTS, KNOTS), ValueError, r"`values` is \[0, 2, 2\] .*, expected floats \[C, S, T\]"),
        ((VALUES, KNOTS[:1], KNOTS), ValueError, r"`s_knots` has shape \[1\], expected \[2\] for `values` of"),
        ((VALUES, KNOTS, KNOTS[None]), ValueError, r"`t_knots` has shape \[1, 2\], expected \[2\]"),
        ((VALUES, KNOTS.half(), KNOTS), TypeError, r"`s_knots` has dtype torch.float16, expected float32 or float64"),
        ((VALUES, KNOTS, KNOTS.double()), TypeError, r"`t_knots` has dtype torch.float64, .* the same for both"),
        ((VALUES, KNOTS.to("meta"), KNOTS), ValueError, r"`s_knots` is on meta, expected cpu like `values`"),
        ((VALUES, KNOTS, KNOTS.flip(0)), ValueError, r"`t_knots` must increase strictly, got \[0.5, 0.0\]"),
        ((VALUES, KNOTS * 0, KNOTS), ValueError, r"`s_knots` must increase strictly, got \[0.0, 0.0\]"),
        ((VALUES, KNOTS * math.nan, KNOTS), ValueError, r"`s_knots` must increase strictly"),
        (
            (VALUES, KNOTS, torch.tensor([0.5, math.inf])),
            ValueError,
            r"`t_knots` must increase strictly and be finite, got",
        ),
        ((VALUES, torch.tensor([-math.inf, 0.5]), KNOTS), ValueError, r"`s_knots` .* be finite"),
        ((VALUES[:, :1], KNOTS[:1] + math.nan, KNOTS), ValueError, r"`s_knots` .* be finite"),
    ],
)
def test_refuses_tables(arguments, error, message):
    with pytest.raises(error, match=f"OmegaTable: {message}"):
        lgd.OmegaTable(*arguments)


def test_refuses_predictions():
    message = "OmegaTable: `prediction` is 'epsilon', expected one of x0, eps, v, flow; did you mean 'eps'?"
    with pytest.raises(ValueError, match=re.escape(message)):
        lgd.OmegaTable(VALUES, KNOTS, KNOTS, prediction="epsilon")


C, S, T = torch.tensor([0, 0]), torch.tensor([0.1, 0.2]), torch.tensor([0.7, 0.8])


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((C.float(), S, T), TypeError, r"`c` is \[2\] torch.float32, expected integers \[B\]"),
        ((C.bool(), S, T), TypeError, r"`c` is \[2\] torch.bool, expected integers"),
        ((C[0], S, T), TypeError, r"`c` is \[\] torch.int64, expected integers \[B\]"),
        ((C, S[:1], T), ValueError, r"`s` has shape \[1\], expected \[2\] like `c`"),
        ((C, S, T[None]), ValueError, r"`t` has shape \[1, 2\], expected \[2\] like `c`"),
        ((C, S.half(), T), TypeError, r"`s` has dtype torch.float16, expected float32 or float64"),
        ((C, S, T.double()), TypeError, r"`t` has dtype torch.float64, .* the same for both"),
        ((C, S.to("meta"), T), ValueError, r"`s` is on meta, expected cpu like `values`"),
        ((C + 1, S, T), ValueError, r"`c` reaches from 1 to 1, expected conditions in \[0, 1\)"),
        ((C - 1, S, T), ValueError, r"`c` reaches from -1 to -1, expected conditions in \[0, 1\)"),
        ((C, T, S), ValueError, r"`s` is 0.7 and `t` is 0.1 in sample 0, expected s <= t: .* takes s first"),
        ((C, S, torch.tensor([0.7, 0.1])), ValueError, r"`s` is 0.2 and `t` is 0.1 in sample 1"),
        ((C, torch.tensor([3, 3]), torch.tensor([3, -1])), ValueError, r"`s` is 3 and `t` is -1 in sample 1"),
    ],
)
def test_refuses_lookups(arguments, error, message):
    with pytest.raises(error, match=rf"OmegaTable\.at: {message}"):
        PLAIN.at(*arguments)


def test_refuses_a_lookup_for_another_batch():
    three = torch.zeros(3, 4)
    with pytest.raises(ValueError, match=r"`omega` was looked up for `c` of shape \[2\], expected \[B\] = \[3\]"):
        lgd.guided_score(three, three, PLAIN.at(C, S, T))


def test_a_lookup_that_was_changed_is_refused(generator):
    table = lgd.OmegaTable(torch.rand(3, 4, 5), torch.linspace(0, 0.9, 4), torch.linspace(0.1, 1, 5))
    lookup = table.at(torch.tensor([0, 1, 2]), torch.full((3,), 0.2), torch.full((3,), 0.7))
    x = torch.randn(3, 6, generator=generator)
    particles, levels = x[:, None].repeat(1, 2, 1), lgd.RectifiedFlow().levels(torch.ones(3), torch.zeros(3))
    plan = solvers.one_step(lgd.RectifiedFlow(), torch.linspace(1, 0, 3))
    calls = (
        lambda w: lgd.guided_score(x, x, w),
        lambda w: lgd.guided_step(x, x, x, w, levels),
        lambda w: lgd.guided_energy(particles, particles, particles, w, levels, particles),
        lambda w: plan.step(0, x, x, x, w),
    )
    changes = {
        r"`omega.s_knots` has shape \[9\], expected \[4\]": {"s_knots": torch.linspace(0, 0.9, 9)},
        r"`omega.t_knots` has shape \[2\], expected \[5\]": {"t_knots": torch.tensor([0.1, 1.0])},
        r"`omega.s_knots` has shape \[4\], expected \[2\]": {"values": lookup.values[:, :2]},
        "t_knots torch.float64.*one for both knots": {"t_knots": lookup.t_knots.double()},
        "t torch.float64.*one for s and t": {"t": lookup.t.double()},
        "`omega.t_knots` is a list": {"t_knots": [0.1, 1.0]},
        "`omega.values` is on meta": {"values": lookup.values.to("meta")},
    }
    for message, change in changes.items():
        for call in calls:
            with pytest.raises(ValueError, match=f"{message}.*(OmegaTable.at\\(c, s, t\\) makes a lookup|moves it)"):
                call(lookup._replace(**change))
    outside = lgd.guided_score(x, x * 2, lookup._replace(c=torch.tensor([0, 3, -1])))
    assert outside.isnan().any(1).tolist() == [False, True, True]
