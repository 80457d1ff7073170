"""Test images with captions, predictions in files, CLIP's reward, and the command that learns for a pipeline."""

import json
import re

import numpy as np
import pytest
import torch

from lgd_kernels.learn import Settings, Trainer, captions, sources
from lgd_kernels.omega.network import OmegaNetwork
from lgd_kernels.runtime.progress import silent

diffusers = pytest.importorskip("diffusers")
transformers = pytest.importorskip("transformers")

import pipelines  # noqa: E402

from lgd_kernels.learn import command  # noqa: E402
from lgd_kernels.learn import diffusers as learning  # noqa: E402
from lgd_kernels.learn.clip import ClipReward  # noqa: E402


@pytest.fixture(autouse=True)
def one_thread(same_threads_after):
    torch.set_num_threads(1)


# Images with captions.


@pytest.fixture
def folder(tmp_path):
    Image = pytest.importorskip("PIL.Image")
    for i in range(4):
        Image.fromarray(np.full((8 + 2 * i, 8, 3), 60 * i, np.uint8)).save(tmp_path / f"{i}.png")
    return tmp_path


def metadata(folder, *rows):
    (folder / "metadata.jsonl").write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows))


def test_metadata_with_several_captions(folder):
    metadata(folder, {"file_name": "1.png", "text": ["a cat", "cat"]}, "", {"file_name": "0.png", "caption": ""})
    found = captions.captioned(folder)
    assert [(one.path.name, one.captions) for one in found] == [("1.png", ("a cat", "cat")), ("0.png", ("",))]
    known = {"a cat": 1.0, "cat": 2.0, "": 3.0}
    data = captions.encoded(found, 8, lambda images: images[:, :1], lambda text: torch.tensor([known[text]]), silent)
    assert len(data) == 3 and data.c.flatten().tolist() == [1.0, 2.0, 3.0] and data.groups.tolist() == [0, 0, 1]
    assert torch.allclose(data[1][0], torch.full((1, 8, 8), 60 / 127.5 - 1)) and torch.equal(
        data[2][0], -torch.ones(1, 8, 8)
    )


def test_captions_beside_images_and_folders_of_classes(folder):
    for i, text in enumerate(("a cat\n", "two\nthree\n\n", "", "four")):
        (folder / f"{i}.txt").write_text(text)
    found = [one.captions for one in captions.captioned(folder)]
    assert found == [("a cat",), ("two", "three"), ("",), ("four",)]
    for i in range(4):
        part = folder / "classes" / ("even" if i % 2 == 0 else "odd")
        part.mkdir(parents=True, exist_ok=True)
        (folder / f"{i}.png").rename(part / f"{i}.png")
    found = captions.captioned(folder / "classes")
    assert [(one.path.name, one.captions) for one in found][:3] == [
        ("0.png", ("even",)),
        ("2.png", ("even",)),
        ("1.png", ("odd",)),
    ]


@pytest.mark.parametrize(
    "rows, message",
    [
        (['{"file_name": '], "line 1 of .*metadata.jsonl is no JSON"),
        ([{"text": "a cat"}], 'line 1 of .* has no "file_name"'),
        ([{"file_name": "0.png"}], 'line 1 of .* has no caption: "text" is None, expected a text, or a list'),
        ([{"file_name": "0.png", "text": []}], "has no caption"),
        (["", {"file_name": "9.png", "text": "x"}], "line 2 of .* names 9.png, which is not in the folder"),
        ([], "holds no images, expected images with a metadata.jsonl"),
    ],
)
def test_refused_metadata(folder, rows, message):
    metadata(folder, *rows)
    with pytest.raises(ValueError, match=f"--data: .*{message}"):
        captions.captioned(folder)


def test_refused_folders(folder):
    with pytest.raises(ValueError, match="0.png has no caption, expected 0.txt beside it"):
        captions.captioned(folder)
    with pytest.raises(ValueError, match="absent is no folder, expected images with a metadata.jsonl"):
        captions.captioned(folder / "absent")
    metadata(folder, {"file_name": "metadata.jsonl", "text": "x"})
    with pytest.raises(ValueError, match="metadata.jsonl cannot be read"):
        captions.encoded(captions.captioned(folder), 8, lambda x: x, lambda text: torch.ones(1), silent)


def test_captions_of_an_image_are_held_out_together():
    groups = torch.arange(30) // 3
    data = captions.Latents(torch.randn(10, 2), groups, torch.arange(30).float()[:, None])
    learnt, held = sources.parted(data, "0.3", seed=1)
    sides = [{int(c[0]) // 3 for _, c in side} for side in (learnt, held)]
    assert not sides[0] & sides[1] and sides[0] | sides[1] == set(range(10)) and len(sides[1]) == 3


# CLIP's reward.


@pytest.fixture
def clip(tmp_path):
    with torch.random.fork_rng():
        torch.manual_seed(1)
        layers = {"hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
        special = {"bos_token_id": 52, "eos_token_id": 53, "pad_token_id": 53}
        text = {"vocab_size": 54, "max_position_embeddings": 16, **layers, **special}
        vision = {"image_size": 16, "patch_size": 4, **layers}
        config = transformers.CLIPConfig(
            text_config=text, vision_config=vision, projection_dim=6, initializer_factor=20.0
        )
        transformers.CLIPModel(config).save_pretrained(tmp_path)
    pipelines.clip_tokenizer().save_pretrained(tmp_path)
    transformers.CLIPImageProcessor(size=16, crop_size=16).save_pretrained(tmp_path)
    return tmp_path


def test_clip_reward_is_the_cosine_and_has_a_gradient(clip):
    pipe = pipelines.sd15()
    for part in (pipe.vae, pipe.unet):
        part.requires_grad_(False)
    frozen = learning.frozen_of(pipe)
    reward = ClipReward(clip, frozen.denoiser, chunk=2)
    c = frozen.denoiser.condition(["a cat", "dog", "a cat"])
    x0 = torch.randn(3, 4, 8, 8, requires_grad=True)
    found = reward(x0, c)
    model = transformers.CLIPModel.from_pretrained(clip).eval()
    processor = transformers.CLIPImageProcessor.from_pretrained(clip)
    with torch.no_grad():
        pixels = torch.nn.functional.interpolate(
            learning.images_of(pipe, x0) / 2 + 0.5, (16, 16), mode="bicubic", antialias=True
        ).clamp(0, 1)
        mean, std = (torch.tensor(v).view(3, 1, 1) for v in (processor.image_mean, processor.image_std))
        tokens = pipelines.clip_tokenizer()(["a cat", "dog", "a cat"], padding=True, return_tensors="pt")
        both = model(**tokens, pixel_values=(pixels - mean) / std)
        expected = (both.image_embeds * both.text_embeds).sum(1)
    assert torch.allclose(found, expected, atol=1e-5) and found.std() > 0.01
    (grad,) = torch.autograd.grad(found.sum(), x0)
    step = 1e-2 * grad / grad.norm()
    with torch.no_grad():
        slope = (reward(x0 + step, c).sum() - reward(x0 - step, c).sum()) / 2
    assert slope > 0 and torch.isclose(slope, 1e-2 * grad.norm(), rtol=0.05)
    with pytest.raises(ValueError, match="clip: there is no folder"):
        ClipReward(clip / "absent", frozen.denoiser)


# Predictions in files.


def trained(folder, frozen, data, updates=3, **options):
    torch.manual_seed(0)
    network = OmegaNetwork(frozen.schedule, embedding=data[1].shape[1], hidden=8)
    settings = Settings(**{"batch": 4, "particles": 2, "cache": 10, **options})
    trainer = Trainer(network, frozen, data, settings, cache_folder=folder)
    trainer.train(updates)
    return trainer


def test_predictions_in_files_train_the_same_and_are_read_again(tmp_path, monkeypatch):
    frozen = learning.frozen_of(pipelines.sd15().to(torch.bfloat16))
    data = torch.randn(6, 4, 8, 8), frozen.denoiser.condition([*"abcdef"])
    held = trained(None, frozen, data).ema.state_dict()
    first = trained(tmp_path / "cache", frozen, data)
    assert first.batches.cached.cond.dtype == torch.bfloat16 and (tmp_path / "cache" / "predictions.json").is_file()
    calls, predict = [], frozen.predict
    monkeypatch.setattr(frozen, "predict", lambda *one: calls.append(len(one[0])) or predict(*one))
    second = trained(tmp_path / "cache", frozen, data)
    assert calls == [4]  # two items, twice: the check
    for name, weights in held.items():
        assert torch.equal(weights, first.ema.state_dict()[name]) and torch.equal(
            weights, second.ema.state_dict()[name]
        )


def test_files_of_other_predictions_are_refused(tmp_path):
    frozen = learning.frozen_of(pipelines.sd15())
    data = torch.randn(6, 4, 8, 8), frozen.denoiser.condition([*"abcdef"])
    trained(tmp_path, frozen, data)
    other = learning.frozen_of(pipelines.sd15(), negative_prompt="z")
    other.denoiser.condition([*"abcdef"])
    for changed in (
        lambda: trained(tmp_path, other, data),
        lambda: trained(tmp_path, frozen, (data[0] + 1, data[1])),
        lambda: trained(tmp_path, frozen, data, cache=11),
        lambda: trained(tmp_path, frozen, data, seed=1),
        lambda: trained(tmp_path, frozen, data, particles=3),
    ):
        with pytest.raises(
            ValueError, match="cache_folder: .* holds predictions of another model, other data or other"
        ):
            changed()
    (tmp_path / "cond.bin").write_bytes(b"short")
    with pytest.raises(ValueError, match="cond.bin is damaged; remove its folder"):
        trained(tmp_path, frozen, data)


# The command.


@pytest.fixture
def saved(tmp_path, folder, monkeypatch):
    """Save a pipeline, and images with captions beside it; work there."""
    Image = pytest.importorskip("PIL.Image")
    (tmp_path / "images").mkdir()
    rows = []
    for i in range(24):
        name = f"{i}.png"
        Image.fromarray(np.full((8, 8, 3), 10 * i, np.uint8)).save(tmp_path / "images" / name)
        rows.append({"file_name": name, "text": ["a cat", "cat"] if i % 2 else "dog"})
    metadata(tmp_path / "images", *rows)
    monkeypatch.chdir(tmp_path)
    return tmp_path


SHORT = ["--steps", "2", "--batch", "4", "--m", "2", "--sample-steps", "3", "--samples", "16", "--held-out", "0.4"]


@pytest.mark.parametrize("name", ["sd15", "sdxl", "sd3", "flux", "pixart"])
def test_the_command_learns_for_a_pipeline_and_its_lines_run(name, saved, capsys):
    getattr(pipelines, name)().save_pretrained("pipe")
    size = ["--size", "16"] if name == "flux" else []
    call = ["--pipeline", "pipe", "--data", "images", "--items", "8", "--out", "out", *SHORT, *size]
    assert command.main(call) == 0
    printed = capsys.readouterr().out
    lines = printed[printed.index("import torch\n") :]
    exec(compile(lines, "lines", "exec"), {})
    assert (saved / "out" / "sample.png").is_file() and "energy distance" in printed


def test_the_command_learns_from_a_reward_and_files_in_bfloat16(saved, clip, capsys):
    pipelines.sd15().save_pretrained("pipe")
    call = ["--pipeline", "pipe", "--data", "images", "--out", "out", *SHORT, "--dtype", "bfloat16", "--cache", "8"]
    call += ["--cache-folder", "kept", "--reward", f"clip:{clip}", "--gamma", "0.5", "--negative-prompt", "sky"]
    assert command.main(call) == 0
    printed = capsys.readouterr().out
    assert (saved / "kept" / "cond.bin").is_file() and ".to(torch.bfloat16)" in printed
    assert 'negative_prompt=["sky"' in printed and "LearnedScale(omega, pipe, condition_of(pipe, prompts))" in printed


def test_the_command_learns_for_classes(saved, capsys):
    pipelines.dit().save_pretrained("pipe")
    index = json.loads((saved / "pipe" / "model_index.json").read_text())
    (saved / "pipe" / "model_index.json").write_text(json.dumps(index | {"id2label": {"3": "class 3, thing"}}))
    for i in range(24):
        part = saved / "classes" / ("class 3" if i % 2 else "7")
        part.mkdir(parents=True, exist_ok=True)
        (saved / "images" / f"{i}.png").rename(part / f"{i}.png")
    call = ["--pipeline", "pipe", "--data", "classes", "--items", "8", "--out", "out", *SHORT]
    assert command.main(call) == 0
    printed = capsys.readouterr().out
    exec(compile(printed[printed.index("import torch\n") :], "lines", "exec"), {})
    assert (saved / "out" / "sample.png").is_file()
    (saved / "classes" / "7").rename(saved / "classes" / "zebra")
    assert command.main([*call, "--out", "other"]) == 2
    assert "'zebra' is no class of the pipeline; name each folder by the number" in capsys.readouterr().err


@pytest.mark.parametrize(
    "changed, message",
    [
        (["--model", "math:tau"], "pass one of --model MODULE:NAME and --pipeline FOLDER"),
        (["--prediction", "eps"], "--prediction is an option of --model; a pipeline's configuration says it"),
        (["--cache-folder", "x"], "--cache-folder keeps cached predictions: pass --cache N"),
        (["--chunk", "0"], "--chunk is 0, expected 1 or more"),
        (["--pipeline", "absent"], "--pipeline: absent holds no model_index.json.*save_pretrained"),
        (["--data", "absent"], "--data: absent is no folder, expected images with a metadata.jsonl"),
        (["--omega", "table"], "--omega table: a table's conditions are labels"),
        (["--reward", "clip:absent", "--gamma", "1"], "clip: there is no folder absent"),
    ],
)
def test_refused_options(changed, message, saved, capsys):
    pipelines.sd15().save_pretrained("pipe")
    call = ["--pipeline", "pipe", "--data", "images", "--out", "out", "--batch", "2", *SHORT[:2], *changed]
    try:
        assert command.main(call) == 2
    except SystemExit as exit:
        assert exit.code == 2
    assert re.search(message, capsys.readouterr().err)


def test_options_of_a_pipeline_need_one(capsys):
    with pytest.raises(SystemExit):
        command.main(["--data", "x", "--model", "math:tau", "--dtype", "float16"])
    assert "--dtype is an option of --pipeline" in capsys.readouterr().err
    assert command.main(["--data", "x", "--model", "math:tau", "--reward", "clip:x", "--gamma", "1"]) == 2
