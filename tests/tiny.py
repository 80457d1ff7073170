"""Build tiny, random diffusers models, and the schedulers that sample them: diffusers' and ours."""

import functools
import inspect

import diffusers
import pytest
import torch

from lgd_kernels.integrations.diffusers import FusedScheduler

BATCH = 3
STABLE = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
DPM, DDIM, FLOW = "DPMSolverMultistepScheduler", "DDIMScheduler", "FlowMatchEulerDiscreteScheduler"
EULER, ANCESTRAL = "EulerDiscreteScheduler", "EulerAncestralDiscreteScheduler"
SINGLE, UNIPC, DEIS = "DPMSolverSinglestepScheduler", "UniPCMultistepScheduler", "DEISMultistepScheduler"
KARRAS = STABLE | {"use_karras_sigmas": True}
PLAIN, SDE = STABLE | {"clip_sample": False}, {"algorithm_type": "sde-dpmsolver++"}
WAN = {"use_flow_sigmas": True, "prediction_type": "flow_prediction", "flow_shift": 3.0}
ZERO_SNR = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing", "prediction_type": "v_prediction"}
USUAL = {  # the configurations of one line: scheduler, its settings, arguments of its steps, and of set_timesteps
    "ddim": (DDIM, PLAIN, {}),
    "ddim eta 1": (DDIM, PLAIN, {"eta": 1.0}),
    "ddim zero snr": (DDIM, PLAIN | ZERO_SNR, {}),
    "ddim v": (DDIM, PLAIN | {"prediction_type": "v_prediction"}, {}),
    "ddpm": ("DDPMScheduler", PLAIN, {}),
    "euler": (EULER, STABLE, {}),
    "euler karras": (EULER, KARRAS, {}),
    "euler exponential": (EULER, STABLE | {"use_exponential_sigmas": True}, {}),
    "euler beta": (EULER, STABLE | {"use_beta_sigmas": True}, {}),
    "euler trailing": (EULER, STABLE | {"timestep_spacing": "trailing"}, {}),
    "ancestral": (ANCESTRAL, STABLE, {}),
    "heun": ("HeunDiscreteScheduler", STABLE, {}),
    "lms": ("LMSDiscreteScheduler", STABLE, {}),
    "pndm": ("PNDMScheduler", STABLE | {"skip_prk_steps": True}, {}),
    "2m": (DPM, STABLE, {}),
    "2m karras": (DPM, KARRAS, {}),
    "2m sde": (DPM, STABLE | SDE, {}),
    "2m sde karras": (DPM, KARRAS | SDE, {}),
    "3m": (DPM, STABLE | {"solver_order": 3}, {}),
    "singlestep": (SINGLE, STABLE | {"lower_order_final": True}, {}),
    "unipc": (UNIPC, STABLE, {}),
    "unipc karras": (UNIPC, KARRAS, {}),
    "unipc flow": (UNIPC, WAN, {}),
    "lcm": ("LCMScheduler", STABLE, {}),
    "tcd": ("TCDScheduler", STABLE, {}),
    "deis": (DEIS, STABLE, {}),
    "flow": (FLOW, {"shift": 3.0}, {}),
    "flow dynamic": (FLOW, {"use_dynamic_shifting": True}, {}, {"mu": 0.8}),
    "flow karras": (FLOW, {"use_karras_sigmas": True}, {}),
    "flow heun": ("FlowMatchHeunDiscreteScheduler", {"shift": 3.0}, {}),
}
RUNS = USUAL | {
    "ddim eta": (DDIM, PLAIN | {"timestep_spacing": "trailing"}, {"eta": 0.6}),
    "ddim to index 0": (DDIM, PLAIN | {"set_alpha_to_one": False, "steps_offset": 1}, {}),
    "flow stochastic": (FLOW, {"stochastic_sampling": True}, {}),
    "ddpm large": ("DDPMScheduler", PLAIN | {"variance_type": "fixed_large", "timestep_spacing": "trailing"}, {}),
    "euler karras v": (EULER, KARRAS | {"prediction_type": "v_prediction"}, {}),
    "heun v": ("HeunDiscreteScheduler", KARRAS | {"prediction_type": "v_prediction"}, {}),
    "lms v": ("LMSDiscreteScheduler", KARRAS | {"prediction_type": "v_prediction"}, {}),
    "pndm v": (
        "PNDMScheduler",
        STABLE | {"skip_prk_steps": True, "prediction_type": "v_prediction", "timestep_spacing": "linspace"},
        {},
    ),
    "2m ends above the data": (DPM, STABLE | {"final_sigmas_type": "sigma_min"}, {}),
    "2m ends with euler": (DPM, STABLE | {"final_sigmas_type": "sigma_min", "euler_at_final": True}, {}),
    "2m flow": (DPM, WAN, {}),
    "2m heun": (DPM, STABLE | {"solver_type": "heun"}, {}),
    "2m sde heun": (DPM, STABLE | SDE | {"solver_type": "heun"}, {}),
    "3m sde": (DPM, STABLE | SDE | {"solver_order": 3}, {}),
    "1": (DPM, STABLE | {"solver_order": 1}, {}),
    "singlestep 3": (SINGLE, KARRAS | {"lower_order_final": True, "solver_order": 3}, {}),
    "singlestep 3 heun": (SINGLE, STABLE | {"lower_order_final": True, "solver_order": 3, "solver_type": "heun"}, {}),
    "unipc bh1": (UNIPC, STABLE | {"solver_type": "bh1", "final_sigmas_type": "sigma_min"}, {}),
    "unipc 1": (UNIPC, STABLE | {"solver_order": 1}, {}),
    "lcm v": ("LCMScheduler", STABLE | {"prediction_type": "v_prediction", "timestep_scaling": 0.01}, {}),
    "tcd gamma": ("TCDScheduler", STABLE, {"eta": 0.7}),
    "deis 3": (DEIS, KARRAS | {"solver_order": 3}, {}),
    "deis flow": (DEIS, WAN, {}),
}
ROUGH = {"deis flow": 2e-4}  # diffusers takes differences of logarithms in float32


def pair(run, steps=20):
    """Return diffusers' scheduler and ours, with their timesteps set."""
    kind, settings, options, *more = RUNS[run]
    if "use_beta_sigmas" in settings:
        pytest.importorskip("scipy")
    theirs = getattr(diffusers, kind)(**settings)
    ours = FusedScheduler(getattr(diffusers, kind)(**settings))
    for one in (theirs, ours):
        one.set_timesteps(steps, **(more[0] if more else {}))
    return theirs, ours, options


def draws(run, seed=7):
    """Return a generator for the steps of a run, if diffusers' step takes one."""
    step = getattr(diffusers, RUNS[run][0]).step
    return drawn_from(seed) if "generator" in inspect.signature(step).parameters else {}


def below(times):
    """Return s of every call of a run: the largest of its times below t, or the last."""
    return torch.stack([max((one for one in times if one < t), default=times[-1]) for t in times[:-1]])


def noise(seed, shape=(BATCH, 4, 8, 8)):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def toy(x, t):
    """Return a prediction that depends smoothly on the sample and on the time."""
    return 0.5 * torch.tanh(x) + 0.1 * torch.sin(torch.as_tensor(t).float() / 100).view(-1, *(1,) * (x.ndim - 1))


def drawn_from(seed):
    return {"generator": torch.Generator().manual_seed(seed)}


def assert_close(found, expected, limit=1e-5):
    difference = ((found - expected).abs().max() / expected.abs().max()).item()
    assert difference <= limit, f"{difference:.3g}"


@functools.cache
def unet(**options):
    """Make a U-Net of a few thousand weights, the same in every call."""
    torch.manual_seed(0)
    return diffusers.UNet2DConditionModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        layers_per_block=1,
        block_out_channels=(8,),
        down_block_types=("CrossAttnDownBlock2D",),
        up_block_types=("CrossAttnUpBlock2D",),
        mid_block_type=None,
        cross_attention_dim=8,
        attention_head_dim=4,
        norm_num_groups=4,
        **options,
    ).eval()


def sdxl_unet(**options):
    """Make one with the additional conditions of SDXL."""
    dimension = 6 * 8 + 8
    return unet(
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=dimension,
        **options,
    )


@functools.cache
def transformer():
    torch.manual_seed(0)
    return diffusers.SD3Transformer2DModel(
        sample_size=8, patch_size=2, in_channels=4, out_channels=4, num_layers=2, attention_head_dim=4,
        num_attention_heads=2, joint_attention_dim=8, caption_projection_dim=8, pooled_projection_dim=8,
        pos_embed_max_size=8,
    ).eval()  # fmt: skip


def call_unet(x, t, inputs):
    return unet()(x, t, encoder_hidden_states=inputs.prompt_embeds, return_dict=False)[0]


def call_transformer(x, t, inputs):
    return transformer()(
        x, timestep=t.expand(x.shape[0]), encoder_hidden_states=inputs.prompt_embeds,
        pooled_projections=inputs.pooled, return_dict=False,
    )[0]  # fmt: skip


def prompts():
    """Return inputs of the network, (with, without) the prompt."""
    return {"prompt_embeds": (noise(1, (BATCH, 5, 8)), noise(2, (BATCH, 5, 8))), "pooled": (noise(3, (BATCH, 8)),) * 2}


@torch.no_grad()
def denoise(network, scheduler, guider, steps=20, seed=0, calls=None, **options):
    """Run the loop of diffusers' modular pipelines, with exactly the calls that it makes."""
    scheduler.set_timesteps(steps)
    x, inputs = noise(seed) * float(getattr(scheduler, "init_noise_sigma", 1.0)), prompts()
    for i, t in enumerate(scheduler.timesteps):
        guider.set_state(step=i, num_inference_steps=steps, timestep=t)
        batches = guider.prepare_inputs(inputs)
        scaled = scheduler.scale_model_input(x, t) if hasattr(scheduler, "scale_model_input") else x
        for batch in batches:
            guider.prepare_models(None)
            batch.noise_pred = network(scaled, t, batch)
            guider.cleanup_models(None)
        if calls is not None:
            calls.append(len(batches))
        x = scheduler.step(guider(batches)[0], t, x, **options, return_dict=False)[0]
    return x
