"""Test the ComfyUI node with networks on the prompt's pooled embedding."""

import pytest
import torch
from comfyui_standin import SIGMAS, denoised, guided_by

import lgd_kernels as lgd
from lgd_kernels.integrations import comfyui
from lgd_kernels.omega.network import OmegaNetwork

SIGMA = SIGMAS[1].expand(3)


@pytest.fixture
def net():
    torch.manual_seed(0)
    net = OmegaNetwork(lgd.EDM(), embedding=6, hidden=16)
    with torch.no_grad():
        net.head[-1].weight.mul_(30)  # omegas of prompts differ by more than the tolerance
    return net


def prompts(count, seed=3):
    return torch.randn(count, 6, generator=torch.Generator().manual_seed(seed))


def omega(net, pooled):
    """Return omega `[B]` of a step from SIGMAS[1] to SIGMAS[2]."""
    return net(pooled, SIGMAS[2].expand(len(pooled)), SIGMAS[1].expand(len(pooled))).detach()


def weight(net, positive, negative=({"uuid": 1},), **changes):
    """Return the omega `[3]` that a call has used: x0 is 1 with the prompt and 0 without."""
    x, cond, uncond = torch.randn(3, 4, 8, 8), torch.ones(3, 4, 8, 8), torch.zeros(3, 4, 8, 8)
    model = guided_by(comfyui.CFGFunction(net))
    found = denoised(model, x, SIGMA, cond, uncond, 7.0, list(negative), positive, **changes)
    assert float(found.flatten(1).std(1).max()) < 1e-5
    return found.flatten(1).mean(1) - 1


def close(found, expected):
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_one_prompt_and_a_batch_of_prompts(net):
    """ComfyUI repeats conditionings to the batch, over and over, and cuts them."""
    for count in (1, 2, 3, 5):
        pooled = prompts(count)
        close(weight(net, [{"uuid": 0, "pooled_output": pooled}]), omega(net, pooled[torch.arange(3) % count]))
    assert len(set(omega(net, prompts(3)).tolist())) == 3


def test_several_conditionings(net):
    """By hand: strengths 1 and 3; an area of a quarter; a mask of a half with strength 0.5; time ranges."""
    a, b = ({"uuid": name, "pooled_output": prompts(1, seed)} for name, seed in ((0, 3), (5, 4)))
    first, second = (omega(net, one["pooled_output"]).expand(3) for one in (a, b))
    assert float((first - second).abs().min()) > 0.05
    close(weight(net, [a, b]), (first + second) / 2)
    close(weight(net, [a, b | {"strength": 3.0}]), (first + 3 * second) / 4)
    close(weight(net, [a, b | {"area": (4, 4, 0, 0)}]), (first + 0.25 * second) / 1.25)
    close(weight(net, [a, b | {"area": (99, 99, 0, 0)}]), (first + second) / 2)  # cut to the picture
    half = torch.zeros(1, 8, 8)
    half[:, :4] = 1
    close(weight(net, [a, b | {"mask": half, "mask_strength": 0.5}]), (first + 0.25 * second) / 1.25)
    each = torch.stack([torch.full((8, 8), share) for share in (0.0, 1.0, 3.0)])  # a mask for each sample
    share = torch.tensor([0.0, 1.0, 3.0])
    close(weight(net, [a, b | {"mask": each}]), (first + share * second) / (1 + share))
    for limits in ({"timestep_start": 4.0}, {"timestep_end": 6.0}):  # 5 is before the first, and after the second
        close(weight(net, [a, b | limits]), first)
    close(weight(net, [a, b | {"timestep_start": 5.0, "timestep_end": 5.0}]), (first + second) / 2)


def test_an_area_that_only_the_negative_has(net):
    """ComfyUI copies the negative's conditioning to the positive for it; its embedding is not the positive's."""
    a = {"uuid": 0, "pooled_output": prompts(1)}
    other = {"uuid": 1, "pooled_output": prompts(1, 9), "area": (4, 4, 0, 0)}
    close(weight(net, [a, dict(other)], [other]), omega(net, prompts(1)).expand(3))


def test_what_is_refused(net):
    for missing in ({}, {"pooled_output": None}):
        with pytest.raises(ValueError, match=r"has no pooled_output, but omega is a network on pooled .* \[B, 6\]"):
            weight(net, [{"uuid": 0, **missing}])
    with pytest.raises(ValueError, match=r"positive prompt is \[1, 7\], but .* \[B, 6\]; take the text encoders"):
        weight(net, [{"uuid": 0, "pooled_output": torch.ones(1, 7)}])
    for changes in ({"input_cond": ...}, {"input_cond": []}):
        with pytest.raises(ValueError, match="the program passes no input_cond; update ComfyUI, or bake a table"):
            weight(net, [], **changes)


def test_the_remedy_of_a_baked_table(net):
    """Two prompts as the rows of a table, at the knots of the step."""
    table, _ = net.bake(SIGMAS[2:3], SIGMAS[1:2], prompts(2))
    function = comfyui.CFGFunction(table, condition=1)
    x, cond, uncond = torch.zeros(3, 4), torch.ones(3, 4), torch.zeros(3, 4)
    found = denoised(guided_by(function), x, SIGMA, cond, uncond, 7.0)
    close(found, 1 + omega(net, prompts(2))[1].expand(3, 4))


def test_the_network_of_the_caller_is_left_alone(net):
    function = comfyui.CFGFunction(net)
    with torch.no_grad():
        net.head[-1].bias.add_(1)
    assert all(one.requires_grad for one in net.parameters()) and float(function.omega.head[-1].bias) == 1
