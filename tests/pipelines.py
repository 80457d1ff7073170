"""Build whole pipelines of diffusers, tiny and random: networks of a few thousand weights, tokenizers of letters."""

import functools

import diffusers
import torch
import transformers

STABLE = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
LETTERS = "abcdefghijklmnopqrstuvwxyz"
SIDE = 8  # of images and latents: the VAE keeps the size


def seeded(make):
    """Build a pipeline with weights that are the same in every call; build it once."""

    @functools.wraps(make)
    def same(*args, **kwargs):
        with torch.random.fork_rng():
            torch.manual_seed(0)
            pipe = make(*args, **kwargs)
        pipe.set_progress_bar_config(disable=True)
        return pipe

    return same


def clip_tokenizer():
    words = [*LETTERS, *(letter + "</w>" for letter in LETTERS), "<|startoftext|>", "<|endoftext|>"]
    return transformers.CLIPTokenizer(
        vocab={word: index for index, word in enumerate(words)}, merges=[], model_max_length=16
    )


def t5_tokenizer():
    words = ["<pad>", "</s>", "<unk>", "▁", *LETTERS]
    return transformers.T5Tokenizer(
        vocab=[(word, -1.0 * (index > 2)) for index, word in enumerate(words)], extra_ids=0, model_max_length=16
    )


def clip(projection=False, strength=4.0):
    """Make a text encoder whose embeddings are large, so that the network's prediction depends on the prompt."""
    kind = transformers.CLIPTextModelWithProjection if projection else transformers.CLIPTextModel
    config = transformers.CLIPTextConfig(
        vocab_size=54, hidden_size=8, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=16, projection_dim=8, bos_token_id=52, eos_token_id=53, pad_token_id=53,
        initializer_factor=20.0,
    )  # fmt: skip
    model = kind(config).eval()
    for name, weights in model.named_parameters():
        if "final_layer_norm.weight" in name:
            weights.data.mul_(strength)
    return model


def t5(strength=4.0, kind="T5"):
    config = getattr(transformers, f"{kind}Config")(
        vocab_size=30, d_model=8, d_kv=4, d_ff=16, num_layers=1, num_heads=2, pad_token_id=0, eos_token_id=1,
    )  # fmt: skip
    model = getattr(transformers, f"{kind}EncoderModel")(config).eval()
    for name, weights in model.named_parameters():
        if "shared" in name or "embed_tokens" in name:
            weights.data.normal_()
        if "final_layer_norm" in name:
            weights.data.mul_(strength)
    return model


def vae(channels=4, **options):
    return diffusers.AutoencoderKL(
        block_out_channels=(4,), down_block_types=("DownEncoderBlock2D",), up_block_types=("UpDecoderBlock2D",),
        latent_channels=channels, norm_num_groups=2, sample_size=SIDE, layers_per_block=1, **options,
    ).eval()  # fmt: skip


def unet(width=8, **options):
    return diffusers.UNet2DConditionModel(
        sample_size=SIDE, layers_per_block=1, block_out_channels=(8,), down_block_types=("CrossAttnDownBlock2D",),
        up_block_types=("CrossAttnUpBlock2D",), mid_block_type=None, cross_attention_dim=width, attention_head_dim=4,
        norm_num_groups=4, **({"in_channels": 4, "out_channels": 4} | options),
    ).eval()  # fmt: skip


@seeded
def sd15(kind=diffusers.StableDiffusionPipeline, **options):
    return kind(
        vae=vae(), text_encoder=clip(), tokenizer=clip_tokenizer(), unet=unet(**options),
        scheduler=diffusers.PNDMScheduler(**STABLE, skip_prk_steps=True, steps_offset=1), safety_checker=None,
        feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip


@seeded
def sdxl(kind=diffusers.StableDiffusionXLPipeline):
    return kind(
        vae=vae(), text_encoder=clip(), text_encoder_2=clip(projection=True), tokenizer=clip_tokenizer(),
        tokenizer_2=clip_tokenizer(), scheduler=diffusers.EulerDiscreteScheduler(**STABLE),
        unet=unet(
            16, addition_embed_type="text_time", addition_time_embed_dim=8,
            projection_class_embeddings_input_dim=6 * 8 + 8,
        ),
    )  # fmt: skip


@seeded
def sd3(kind=diffusers.StableDiffusion3Pipeline):
    transformer = diffusers.SD3Transformer2DModel(
        sample_size=SIDE, patch_size=2, in_channels=4, out_channels=4, num_layers=2, attention_head_dim=4,
        num_attention_heads=2, joint_attention_dim=16, caption_projection_dim=8, pooled_projection_dim=16,
        pos_embed_max_size=8,
    )  # fmt: skip
    return kind(
        transformer=transformer.eval(), scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=vae(shift_factor=0.1),
        text_encoder=clip(projection=True), tokenizer=clip_tokenizer(), text_encoder_2=clip(projection=True),
        tokenizer_2=clip_tokenizer(), text_encoder_3=t5_wide(), tokenizer_3=t5_tokenizer(),
    )  # fmt: skip


def t5_wide():
    config = transformers.T5Config(
        vocab_size=30, d_model=16, d_kv=4, d_ff=16, num_layers=1, num_heads=2, pad_token_id=0, eos_token_id=1,
    )  # fmt: skip
    return transformers.T5EncoderModel(config).eval()


@seeded
def flux(guidance=False, kind=diffusers.FluxPipeline):
    transformer = diffusers.FluxTransformer2DModel(
        patch_size=1, in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=8, num_attention_heads=2,
        joint_attention_dim=8, pooled_projection_dim=8, guidance_embeds=guidance, axes_dims_rope=(2, 2, 4),
    )  # fmt: skip
    return kind(
        transformer=transformer.eval(), scheduler=diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        vae=vae(shift_factor=0.1), text_encoder=clip(), tokenizer=clip_tokenizer(), text_encoder_2=t5(),
        tokenizer_2=t5_tokenizer(),
    )  # fmt: skip


@seeded
def pixart():
    transformer = diffusers.PixArtTransformer2DModel(
        num_attention_heads=2, attention_head_dim=4, in_channels=4, out_channels=8, num_layers=2, cross_attention_dim=8,
        sample_size=SIDE, patch_size=2, caption_channels=8, use_additional_conditions=False,
    )  # fmt: skip
    return diffusers.PixArtAlphaPipeline(
        transformer=transformer.eval(), scheduler=diffusers.DPMSolverMultistepScheduler(), vae=vae(),
        text_encoder=t5(), tokenizer=t5_tokenizer(),
    )  # fmt: skip


@seeded
def dit():
    transformer = diffusers.DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=4, in_channels=4, out_channels=8, num_layers=2, sample_size=SIDE,
        patch_size=2, num_embeds_ada_norm=1000,
    )  # fmt: skip
    return diffusers.DiTPipeline(
        transformer=transformer.eval(), vae=vae(), scheduler=diffusers.DDIMScheduler(clip_sample=False),
        id2label={index: f"class {index}" for index in range(10)},
    )  # fmt: skip


@seeded
def wan():
    transformer = diffusers.WanTransformer3DModel(
        patch_size=(1, 2, 2), num_attention_heads=2, attention_head_dim=12, in_channels=4, out_channels=4, text_dim=8,
        freq_dim=8, ffn_dim=16, num_layers=2, rope_max_seq_len=32,
    )  # fmt: skip
    return diffusers.WanPipeline(
        transformer=transformer.eval(), vae=wan_vae(), text_encoder=t5(40.0, "UMT5"), tokenizer=t5_tokenizer(),
        scheduler=diffusers.UniPCMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0, num_train_timesteps=1000
        ),
    )  # fmt: skip


def wan_vae():
    return diffusers.AutoencoderKLWan(
        base_dim=2, z_dim=4, dim_mult=[1, 1, 1, 1], num_res_blocks=1, temperal_downsample=[False, True, True],
        latents_mean=[0.0] * 4, latents_std=[1.0] * 4,
    ).eval()  # fmt: skip


@seeded
def kandinsky3():
    unet = diffusers.Kandinsky3UNet(
        in_channels=4, time_embedding_dim=4, groups=2, attention_head_dim=4,
        layers_per_block=3, block_out_channels=(32, 64), cross_attention_dim=8, encoder_hid_dim=8,
    )  # fmt: skip
    movq = diffusers.VQModel(
        block_out_channels=(32, 32), down_block_types=("DownEncoderBlock2D", "AttnDownEncoderBlock2D"),
        up_block_types=("AttnUpDecoderBlock2D", "UpDecoderBlock2D"), norm_num_groups=4, latent_channels=4,
        num_vq_embeddings=8, vq_embed_dim=4, norm_type="spatial",
    )  # fmt: skip
    return diffusers.Kandinsky3Pipeline(
        tokenizer=t5_tokenizer(), text_encoder=t5(), unet=unet.eval(), movq=movq.eval(),
        scheduler=diffusers.DDPMScheduler(clip_sample=True),
    )  # fmt: skip
