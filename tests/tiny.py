"""Build tiny, random diffusers models, and the schedulers that sample them: diffusers' and ours."""

import functools

import diffusers
import torch

from lgd_kernels.integrations.diffusers import FusedScheduler

BATCH = 3
STABLE = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
DPM, DDIM, FLOW = "DPMSolverMultistepScheduler", "DDIMScheduler", "FlowMatchEulerDiscreteScheduler"
EULER, ANCESTRAL = "EulerDiscreteScheduler", "EulerAncestralDiscreteScheduler"
KARRAS = STABLE | {"use_karras_sigmas": True}
RUNS = {  # scheduler, its settings, arguments of its steps
    "ddim": (DDIM, STABLE | {"clip_sample": False}, {}),
    "ddim v": (DDIM, STABLE | {"clip_sample": False, "prediction_type": "v_prediction"}, {}),
    "ddim eta": (DDIM, STABLE | {"clip_sample": False, "timestep_spacing": "trailing"}, {"eta": 0.6}),
    "ddim to index 0": (DDIM, STABLE | {"clip_sample": False, "set_alpha_to_one": False, "steps_offset": 1}, {}),
    "flow": (FLOW, {"shift": 3.0}, {}),
    "flow stochastic": (FLOW, {"stochastic_sampling": True}, {}),
    "euler": (EULER, STABLE, {}),
    "euler karras": (EULER, KARRAS | {"prediction_type": "v_prediction"}, {}),
    "ancestral": (ANCESTRAL, STABLE, {}),
    "2m": (DPM, STABLE, {}),
    "2m karras": (DPM, KARRAS, {}),
    "2m ends above the data": (DPM, STABLE | {"final_sigmas_type": "sigma_min"}, {}),
    "2m ends with euler": (DPM, STABLE | {"final_sigmas_type": "sigma_min", "euler_at_final": True}, {}),
    "2m sde": (DPM, STABLE | {"algorithm_type": "sde-dpmsolver++"}, {}),
    "2m flow": (DPM, {"use_flow_sigmas": True, "prediction_type": "flow_prediction", "flow_shift": 3.0}, {}),
    "1": (DPM, STABLE | {"solver_order": 1}, {}),
}


def pair(run, steps=20):
    """Return diffusers' scheduler and ours, with their timesteps set."""
    kind, settings, options = RUNS[run]
    theirs = getattr(diffusers, kind)(**settings)
    ours = FusedScheduler(getattr(diffusers, kind)(**settings))
    for one in (theirs, ours):
        one.set_timesteps(steps)
    return theirs, ours, options


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
