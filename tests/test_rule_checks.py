"""A rule with wrong or missing parameters is refused by name, before anything is computed."""

import functools

import pytest
import torch

import lgd_kernels as lgd
from lgd_kernels.guidance import rules
from lgd_kernels.guidance.rules import Guidance
from lgd_kernels.guidance.stateful import Momentum

C, U = torch.ones(2, 2, 3).unbind(0)
misspelt = functools.partial(rules.apg, ete=1)
WRONG = {
    "misspelt": (misspelt, "`rule` apg has no parameter `ete`, expected eta, radius"),
    "inner": (functools.partial(rules.rescale, phi=0.5, rule=misspelt), "`rule` apg has no parameter `ete`"),
    "none": (functools.partial(rules.cfg, scale=2.0), "cfg has no parameter `scale`, expected none beside moments"),
    "missing": (
        rules.interval,
        r"`rule` interval lacks its parameter `t`, expected t, low, high; functools",
    ),
    "one of three": (functools.partial(rules.interval, t=0.5, low=0.1), "interval lacks its parameter `high`"),
    "by position": (functools.partial(rules.apg, 0.5), "`rule` apg takes 2 arguments by position, expected"),
    "moments alone": (lambda m: Guidance(1.0, 1.0), "`rule` <lambda> takes 1 arguments by position"),
    "own": (lambda m, omega, power: Guidance(1.0, omega**power), "lacks its parameter `power`, expected power"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_parameters(name, monkeypatch):
    rule, message = WRONG[name]
    monkeypatch.setattr("lgd_kernels.guidance.run._run", None)  # not reached
    with pytest.raises(TypeError, match=f"^guided_score: .*{message}"):
        lgd.guided_score(C, U, 1.0, rule=rule)
    with pytest.raises(TypeError, match=f"^Momentum: .*{message}"):
        Momentum(rule, 0.5)


def test_what_fits_is_called():
    """Call rules with defaults, *args and **kwargs, methods and classes."""

    class Rule:
        def of(self, m, omega, scale=1.0):
            return Guidance(1.0, scale * omega)

        def __call__(self, m, omega):
            return Guidance(1.0, omega)

    def wrapped(*args, **named):
        return rules.cfg(*args)

    rule = Rule()
    every = (
        rule,
        rule.of,
        wrapped,
        functools.partial(wrapped, anything=1),
        functools.partial(rule.of, scale=1.0),
        lambda m, omega, scale=1.0, *, other=0: Guidance(1.0, omega),
        functools.partial(lambda scale, m, omega: Guidance(1.0, scale * omega), 1.0),
    )
    expected = lgd.guided_score(C, U - 1, 2.0)
    assert all(torch.equal(lgd.guided_score(C, U - 1, 2.0, rule=one), expected) for one in every)
