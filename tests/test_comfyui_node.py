"""Test the folder that goes into ComfyUI's custom_nodes/, loaded as ComfyUI loads it, and the files that it opens."""

import math
import pickle
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import comfyui_standin as comfy
import pytest
import torch

import lgd_kernels as lgd
from lgd_kernels.integrations import comfyui, comfyui_files, comfyui_nodes
from lgd_kernels.omega.forms import ClampLinear, Constant, Interval
from lgd_kernels.omega.network import OmegaNetwork

SOURCE = Path(comfyui.__file__).parent / "comfyui_lgd"
ROOT = Path(lgd.__file__).parents[1]
NODE = "LGDLearnedGuidance"
OUTSIDE = (
    "LearnedGuidance: `path` is {!r}, expected the name of a file in ComfyUI's models/omega, or in a folder that "
    "extra_model_paths.yaml names under omega"
)


@pytest.fixture
def folders(tmp_path, monkeypatch):
    """Stand in for ComfyUI, with a second folder of omega, as extra_model_paths.yaml names it."""
    for name in ("models/omega/sub", "models/omega2", "more", "elsewhere", "custom_nodes"):
        (tmp_path / name).mkdir(parents=True)
    monkeypatch.setitem(sys.modules, "folder_paths", comfy.folder_paths(tmp_path / "models", omega=[tmp_path / "more"]))
    return tmp_path


@pytest.fixture(params=["V3", "V1"])
def version(request, monkeypatch):
    """Stand in for a ComfyUI with the V3 schema, and for one before it."""
    monkeypatch.setitem(sys.modules, "comfy_api", ModuleType("comfy_api"))
    monkeypatch.setitem(sys.modules, "comfy_api.latest", comfy.comfy_api() if request.param == "V3" else None)
    return request.param


def inputs_of(node):
    """Return {input: (type, options)} of either version."""
    if hasattr(node, "INPUT_TYPES"):
        required = node.INPUT_TYPES()["required"]
        combo = lambda kind: ("COMBO", {"options": kind}) if isinstance(kind, list) else (kind, {})  # noqa: E731
        return {name: (combo(kind)[0], options | combo(kind)[1]) for name, (kind, options) in required.items()}
    return {one.id: (one.io_type, one.options) for one in node.GET_SCHEMA().inputs}


def patched(node, *values):
    """Run a node of either version."""
    inputs = dict(zip(inputs_of(node), values, strict=False))
    return (getattr(node(), node.FUNCTION) if hasattr(node, "FUNCTION") else node.EXECUTE_NORMALIZED)(**inputs)[0]


def test_the_folder_in_custom_nodes(folders, version):
    """Copied or linked, under the V3 schema and before it: the same id, inputs and guidance."""
    lgd.omega.files.save(folders / "models/omega/half.safetensors", Constant(0.5))
    shutil.copytree(SOURCE, folders / "custom_nodes/copied")
    (folders / "custom_nodes/linked").symlink_to(SOURCE)
    for place in ("copied", "linked"):
        nodes, titles = comfy.load_custom_node(folders / "custom_nodes" / place)
        assert list(nodes) == list(titles) == [NODE] and titles[NODE] == "Learned Guidance (omega)"
        node = nodes[NODE]
        inputs = inputs_of(node)
        kinds = {"model": "MODEL", "omega_name": "COMBO", "condition": "INT", "strength": "FLOAT"}
        assert {name: kind for name, (kind, _) in inputs.items()} == kinds
        assert all(options["tooltip"].endswith(".") for _, options in inputs.values())
        assert inputs["omega_name"][1]["options"] == ["half.safetensors"]
        assert (inputs["condition"][1]["default"], inputs["strength"][1]["default"]) == (0, 1.0)
        about = node if version == "V1" else node.GET_SCHEMA()
        category, text = (about.CATEGORY, about.DESCRIPTION) if version == "V1" else (about.category, about.description)
        assert category == "advanced/guidance" and "omega = cfg - 1" in text
        before = comfy.Patcher()
        model = patched(node, before, "half.safetensors", 0, 2.0)
        x, cond, uncond = torch.randn(3, 2, 4, generator=torch.Generator().manual_seed(0)).unbind(0)
        found = comfy.denoised(model, x, comfy.SIGMAS[:1].expand(2), cond, uncond, 1.0)
        torch.testing.assert_close(found, 2 * cond - uncond, rtol=1e-5, atol=1e-5)
        assert "sampler_cfg_function" not in before.model_options  # the other branches of the graph keep their model


def test_every_kind_of_file_that_learn_writes(folders):
    """Each gives the omega of what was saved, at the step from sigma 5 to 1."""
    torch.manual_seed(0)
    knots = torch.tensor([0.0, 3.0, 20.0])
    kinds = {
        "constant": Constant(0.5),
        "interval": Interval(0.75, 1.0, 6.0),
        "clamp-linear": ClampLinear(2.0, -0.25),
        "table": lgd.OmegaTable(torch.rand(2, 3, 3), knots, knots),
        "network": OmegaNetwork(lgd.EDM(), classes=2, hidden=8),
    }
    assert kinds.keys() == lgd.omega.files.KINDS.keys()
    s, t = comfy.SIGMAS[2:3], comfy.SIGMAS[1:2]
    x, cond, uncond = torch.randn(3, 1, 4, generator=torch.Generator().manual_seed(0)).unbind(0)
    for name, omega in kinds.items():
        lgd.omega.files.save(folders / f"more/{name}.safetensors", omega, lgd.EDM())
        labelled = name in ("table", "network")
        model = comfyui_nodes.patched(comfy.Patcher(), f"{name}.safetensors", int(labelled))
        weight = omega(torch.tensor([1]) if labelled else None, s, t).detach()
        assert weight > 0
        found = comfy.denoised(model, x, t, cond, uncond, 7.0)
        torch.testing.assert_close(found, lgd.guided_score(cond, uncond, weight), rtol=1e-5, atol=1e-5)


def test_the_list_of_files(folders, version):
    """It is made anew each time, of the safetensors files of both folders."""
    nodes, _ = comfy.load_custom_node(SOURCE)
    listed = lambda: inputs_of(nodes[NODE])["omega_name"][1]["options"]  # noqa: E731
    assert listed() == []
    for place in ("models/omega/b.safetensors", "models/omega/sub/c.safetensors", "more/a.safetensors", "more/no.txt"):
        lgd.omega.files.save(folders / place, Constant(0.5))
    lgd.omega.files.save(folders / "models/omega2/d.safetensors", Constant(0.5))
    assert listed() == ["a.safetensors", "b.safetensors", str(Path("sub/c.safetensors"))]
    for name in listed():
        patched(nodes[NODE], comfy.Patcher(), name)
    changed = nodes[NODE].IS_CHANGED if version == "V1" else nodes[NODE].fingerprint_inputs
    assert changed(model=None, omega_name="a.safetensors", condition=0, strength=1.0) > 0
    assert math.isnan(changed(model=None, omega_name="none.safetensors"))
    assert math.isnan(changed(strength=1.0))  # the name comes from another node


def test_the_folder_keeps_endings_that_are_named(folders):
    paths = sys.modules["folder_paths"].folder_names_and_paths
    comfyui_files.register()
    assert paths["omega"] == ([str(folders / "more"), str(folders / "models/omega")], {".safetensors"})
    paths["omega"] = (["own"], {".pt"})
    comfyui_files.register()
    assert paths["omega"][1] == {".pt"}


def test_a_model_that_does_not_fit_is_refused_by_the_node(folders):
    knots = torch.linspace(0, 1, 3)
    lgd.OmegaTable(torch.ones(1, 3, 3), knots, knots).save(folders / "more/flow.safetensors", lgd.RectifiedFlow())
    with pytest.raises(ValueError, match=r"times are those of RectifiedFlow\(\), but this is no flow model"):
        comfyui_nodes.patched(comfy.Patcher(), "flow.safetensors")
    comfyui_nodes.patched(comfy.Patcher(comfy.sampling(comfy.CONST, 1.0)), "flow.safetensors")


def test_the_registrys_settings():
    """The names that the registry asks for, and the version of the package."""
    text = (SOURCE / "pyproject.toml").read_text()
    name = re.search(r'^name = "(.*)"$', text, re.M)[1]
    assert re.fullmatch(r"[a-z][a-z0-9]*(-[a-z0-9]+)*", name) and "comfyui" not in name
    assert f'version = "{lgd.__version__}"' in text and f'"lgd_kernels>={lgd.__version__}"' in text
    assert re.search(r"^\[tool\.comfy\]\nPublisherId = .*\nDisplayName = ", text, re.M)
    assert {path.name for path in SOURCE.iterdir()} - {"__pycache__"} == {"__init__.py", "README.md", "pyproject.toml"}
    kept = re.search(
        r'^"lgd_kernels.integrations.comfyui_lgd" = (\[.*?\])', (ROOT / "pyproject.toml").read_text(), re.M
    )
    assert kept[1] == '["pyproject.toml", "README.md"]'  # the wheel has the whole folder


def test_without_triton_and_without_the_package(tmp_path):
    """The first works; the second says what to install, and where."""
    script = f"""
import sys
sys.modules |= dict.fromkeys(sys.argv[1:])
sys.path[:0] = [{str(Path(comfy.__file__).parent)!r}]
import comfyui_standin as comfy
sys.modules["folder_paths"] = comfy.folder_paths({str(tmp_path)!r})
print(list(comfy.load_custom_node({str(SOURCE)!r})[0]))
"""
    for absent, said in (("triton", NODE), ("lgd_kernels", "comfyui_lgd needs lgd_kernels in ComfyUI's Python: ")):
        run = subprocess.run([sys.executable, "-c", script, absent], cwd=ROOT, capture_output=True, text=True)
        assert said in run.stdout + run.stderr, run.stderr
        assert said == NODE or f"{sys.executable} -m pip install" in run.stderr


def one_line(error):
    assert "\n" not in str(error.value) and str(error.value).startswith("LearnedGuidance: ")
    return str(error.value)


class Code:
    def __reduce__(self):
        return print, ("run",)


BAD = {
    "folder": lambda path: path.mkdir(),
    "empty": lambda path: path.write_bytes(b""),
    "text": lambda path: path.write_text("omega"),
    "code": lambda path: path.write_bytes(pickle.dumps(Code(), 2)),
    "code in torch.save": lambda path: torch.save(Code(), path),
    "another": lambda path: torch.save(torch.ones(3), path),
    "keys": lambda path: torch.save({"values": torch.ones(1, 1, 1)}, path),
}


@pytest.mark.parametrize("kind", [*BAD, "missing"])
def test_a_bad_path_is_one_line(tmp_path, kind, capsys):
    """Check that all bad paths have the same message, so that a workflow cannot explore a disk."""
    if kind in BAD:
        BAD[kind](tmp_path / "omega.safetensors")
    path = str(tmp_path / "omega.safetensors")
    for read in (comfyui.load, lambda path: comfyui_nodes.LearnedGuidance().patch(comfy.Patcher(), path)):
        with pytest.raises(ValueError) as error:
            read(path)
        assert one_line(error) == (
            f"LearnedGuidance: `path` is {path!r}, which holds no omega; python -m lgd_kernels learn and "
            "lgd_kernels.omega.files.save(path, omega, schedule) write files that do"
        )
    assert "run" not in capsys.readouterr().out
    for odd in ("", "\0", "a" * 5000):
        with pytest.raises(ValueError, match="holds no omega"):
            comfyui.load(odd)


def test_in_comfyui_only_its_folders_are_read(folders):
    good = ("models/omega/a.pt", "models/omega/sub/b.pt", "more/c.pt")
    for place in (*good, "models/omega2/d.pt", "elsewhere/e.pt"):
        lgd.omega.files.save(folders / place, Constant(0.25))
    named = ("a.pt", "sub/b.pt", "c.pt", "sub/../a.pt", str(folders / "models/omega/a.pt"))
    for path in named:
        assert comfyui.load(path).omega.item() == 0.25
        assert comfyui_files.changed(path) > 0
    (folders / "models/omega/link.pt").symlink_to(folders / "elsewhere/e.pt")  # links are allowed
    comfyui.load("link.pt")
    elsewhere = "../../../etc/passwd ../../elsewhere/e.pt ../../elsewhere/missing.pt ../omega2/d.pt"
    refused = ["", "\0", *f"missing.pt sub .. /etc/passwd {elsewhere}".split()]
    refused += [str(folders / path) for path in ("elsewhere/e.pt", "models/omega2/d.pt", "models/omega")]
    for path in (3, b"a.pt"):
        with pytest.raises(ValueError, match=f"`path` is a {type(path).__name__}, expected the name of a file"):
            comfyui.load(path)
        assert math.isnan(comfyui_files.changed(path))
    for path in refused:
        with pytest.raises(ValueError) as error:
            comfyui.load(path)
        assert one_line(error) == OUTSIDE.format(path)
        assert math.isnan(comfyui_files.changed(path))


def test_a_node_that_runs_in_inference_mode(folders):
    """ComfyUI runs every node in it. The tensors are ordinary ones, which can be moved outside it too."""
    lgd.omega.files.save(folders / "more/half.safetensors", Constant(0.5))
    with torch.inference_mode():
        function = comfyui_nodes.patched(comfy.Patcher(), "half.safetensors").model_options["sampler_cfg_function"]
    assert not function.omega.omega.is_inference() and not function.omega.omega.requires_grad
