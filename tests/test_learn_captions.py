"""Test images with captions, predictions in files, CLIP's reward, and the command that learns for a pipeline."""

import errno
import json
import os
import re
import subprocess
import sys

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


def test_lines_of_one_image_and_marks_in_the_text(folder):
    rows = {"file_name": "1.png", "text": None, "caption": "a\u2028b"}, {"file_name": "./1.png", "text": "c"}
    text = "\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    (folder / "metadata.jsonl").write_text(text, encoding="utf-8-sig")
    (one,) = captions.captioned(folder)
    assert one.captions == ("a\u2028b", "c")
    (folder / "metadata.jsonl").unlink()
    for i in range(4):
        (folder / f"{i}.txt").write_text("a cat\r\nb\x0bc\n", encoding="utf-8-sig")
    assert captions.captioned(folder)[0].captions == ("a cat", "b\x0bc")
    (folder / "0.txt").write_bytes("é".encode("latin-1"))
    with pytest.raises(ValueError, match="--data: .*0.txt is not in UTF-8 .*; convert it"):
        captions.captioned(folder)


def test_folders_that_mix_captions_are_refused(folder):
    part = folder / "10_dog"
    part.mkdir()
    (folder / "0.png").rename(part / "0.png")
    (part / "0.txt").write_text("a dog")
    for i in range(1, 4):
        (folder / f"{i}.txt").write_text("x")
    with pytest.raises(ValueError, match="holds images, and so does .*10_dog; pass one of them"):
        captions.captioned(folder)
    for i in range(1, 4):
        (folder / f"{i}.png").unlink()
    with pytest.raises(ValueError, match=r"10_dog holds captions of its own \(0.txt\), so it is no class; pass --data"):
        captions.captioned(folder)
    (part / "0.txt").unlink()
    metadata(part, {"file_name": "0.png", "text": "a dog"})
    with pytest.raises(ValueError, match=r"captions of its own \(metadata.jsonl\)"):
        captions.captioned(folder)
    assert captions.captioned(part)[0].captions == ("a dog",)  # as the message says


def test_orientation_transparency_and_16_bits(tmp_path):
    Image = pytest.importorskip("PIL.Image")
    wide = Image.fromarray(np.array([[[255, 0, 0], [0, 0, 255]]], np.uint8))  # red, blue
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees
    wide.save(tmp_path / "turned.png", exif=exif)
    Image.fromarray(np.array([[[255, 0, 0, 0], [255, 0, 0, 255]]], np.uint8)).save(tmp_path / "clear.png")
    Image.fromarray(np.array([[0, 32896, 65535]], np.uint16)).save(tmp_path / "deep.png")
    read = {name: sources.pixels(sources.opener()(tmp_path / f"{name}.png")) for name in ("turned", "clear", "deep")}
    assert read["turned"].shape == (3, 2, 1) and read["turned"][:, 0, 0].tolist() == [1, -1, -1]
    assert read["clear"][:, 0].T.tolist() == [[1, 1, 1], [1, -1, -1]]
    assert torch.allclose(read["deep"][0, 0], torch.tensor([-1.0, 0.0, 1.0]), atol=0.01)
    (tmp_path / "cut.png").write_bytes((tmp_path / "turned.png").read_bytes()[:60])
    with pytest.raises(ValueError, match="--data: .*cut.png cannot be read"):
        sources.opener()(tmp_path / "cut.png")


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
    near = learning.frozen_of(pipelines.sd15())
    near.denoiser.condition([*"abcdef"])
    near.denoiser.network.conv_out.weight.data.mul_(1.001)
    last = data[1].clone()
    last[5] = data[1][0]
    for changed in (
        lambda: trained(tmp_path, other, data),
        lambda: trained(tmp_path, near, data),
        lambda: trained(tmp_path, frozen, (data[0] + 1, data[1])),
        lambda: trained(tmp_path, frozen, (data[0], last)),
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
    (tmp_path / "predictions.json").unlink()  # as after an interruption; a smaller cache goes over larger files
    trained(tmp_path, frozen, data, cache=4)


def test_a_full_disk_and_another_process(tmp_path, monkeypatch):
    frozen = learning.frozen_of(pipelines.sd15())
    data = torch.randn(6, 4, 8, 8), frozen.denoiser.condition([*"abcdef"])

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(os, "posix_fallocate", full)
        with pytest.raises(OSError, match="No space left on device: .*c.bin"):
            trained(tmp_path / "cache", frozen, data)
    held = """
import pathlib, sys
from lgd_kernels.learn import checkpoint
with checkpoint.locked(pathlib.Path(sys.argv[1]), "x"):
    print("held", flush=True)
    sys.stdin.read()
"""
    with subprocess.Popen(
        [sys.executable, "-c", held, str(tmp_path / "cache")], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as other:
        other.stdout.readline()
        with pytest.raises(ValueError, match="cache_folder is .*, where another run is at work"):
            trained(tmp_path / "cache", frozen, data)
        other.communicate(b"")
    trained(tmp_path / "cache", frozen, data)


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


def test_an_empty_negative_prompt_is_printed_where_it_differs_from_none(saved, capsys):
    pipelines.sdxl().save_pretrained("pipe")  # without a negative prompt it uses zeros
    call = ["--pipeline", "pipe", "--data", "images", "--items", "8", "--out", "out", *SHORT, "--negative-prompt", ""]
    assert command.main(call) == 0
    assert 'negative_prompt=["", ' in capsys.readouterr().out


def test_the_command_learns_from_a_reward_and_files_in_bfloat16(saved, clip, capsys):
    pipelines.sd15().save_pretrained("pipe")
    call = ["--pipeline", "pipe", "--data", "images", "--out", "out", *SHORT, "--dtype", "bfloat16", "--cache", "8"]
    call += ["--cache-folder", "kept", "--reward", f"clip:{clip}", "--gamma", "0.5", "--negative-prompt", "sky"]
    assert command.main(call) == 0
    printed = capsys.readouterr().out
    assert (saved / "kept" / "cond.bin").is_file() and "dtype=torch.bfloat16)" in printed
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
