"""Add to the site what mkdocs.yml cannot: the pages that lie outside this folder, a page of docstrings for each op and
module that users import, and the navigation."""

from __future__ import annotations

import re
from pathlib import Path

import griffe
from mkdocs.structure.files import File

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "lgd_kernels"
INSIDE = {"api", "kernels", "bandwidth", "targets", "curve"}  # of an op: the modules with public names
ABOVE = {"index.md": "README.md", "contributing.md": "CONTRIBUTING.md", "changelog.md": "CHANGELOG.md"}
GUIDES = {
    "Learn guidance": "learning.md",
    "Learn for a pipeline": "pipelines.md",
    "Where omega comes from": "omega.md",
    "Every function": "functions.md",
    "Guidance rules and solvers": "rules.md",
    "diffusers, k-diffusion, ComfyUI": "integrations.md",
    "Policy gradients": "rl.md",
    "energy_mmd": "energy_mmd.md",
    "Metrics": "metrics.md",
    "Study: digits": "digits.md",
    "Study: a mixture": "mixture.md",
}
REFERENCE = {  # a group of the navigation: ops, and modules of the package
    "Guide and sample": "guidance guidance.rules guidance.weights guidance.stateful runtime.levels sampling.schedules "
    "sampling.churn sampling.solvers sampling.step_plan sampling.sampler sampling.log_prob",
    "Losses and distances": "guided_energy energy_mmd metrics.distance metrics.permutation metrics.kid metrics.frechet "
    "metrics.bandwidth",
    "Sums and combinations": "moments combine dynamic_threshold",
    "omega": "omega.table omega.network omega.forms omega.files",
    "Learn": "learn.frozen learn.particles learn.losses learn.marginal learn.objective learn.reward learn.fit "
    "learn.runs learn.diffusers learn.clip learn.trainer learn.batches learn.logs learn.distributed",
    "Other libraries": "integrations.diffusers integrations.diffusers_scale integrations.diffusers_scheduler "
    "integrations.k_diffusion integrations.comfyui integrations.comfyui_times integrations.rl "
    "integrations.rl_coefficients",
    "Noise, implementations": "runtime.philox runtime.impls runtime.progress",
}
INTERNALS = {
    "The mathematics": "math.md",
    "Rounding and noise": "numerics.md",
    "Design": "design.md",
    "CUDA kernels without a GPU": "cuda.md",
    "Benchmarks": "benchmarks.md",
    "Contributing": "contributing.md",
    "Changelog": "changelog.md",
}
LABELS = {page: label for group in (GUIDES, INTERNALS) for label, page in group.items()}


def on_config(config):
    """Set the navigation."""
    reference = [{group: [_label(name) for name in names.split()]} for group, names in REFERENCE.items()]
    guides, internals = ([{label: page} for label, page in pages.items()] for pages in (GUIDES, INTERNALS))
    config.nav = [
        {"Start": "index.md"},
        {"Guides": guides},
        {"Reference": reference},
        {"Internals": internals},
    ]
    return config


def on_files(files, config):
    """Add the pages that lie outside docs/, and those of docstrings."""
    for name, source in ABOVE.items():
        text = (ROOT / source).read_text(encoding="utf-8")
        head = "---\nhide: [navigation]\n---\n" if name == "index.md" else ""  # the tabs are enough there
        files.append(File.generated(config, name, content=head + text))
    named = {name for names in REFERENCE.values() for name in names.split()}
    missing = {path.parent.name for path in PACKAGE.glob("ops/*/api.py")} - named
    if missing:
        raise ValueError(f"docs/pages.py: no group of REFERENCE holds the ops {sorted(missing)}")
    for name in sorted(named):
        files.append(File.generated(config, f"api/{name}.md", content=_members(name)))
    return files


def on_page_markdown(markdown, page, **others):
    """Make a link to a page outside docs/ one to its copy here, and a link to a file of the source plain text."""
    here = page.file.src_uri

    def link(found):
        text, target = found.groups()
        if target is None:  # code
            return found[0]
        path, _, anchor = target.partition("#")
        path = path.removeprefix("../")
        if here in ABOVE:
            path = path.removeprefix("docs/")
        for name, source in ABOVE.items():
            path = name if path == source else path
        if re.match(r"https?:|$", path):
            return found[0]
        if path.endswith((".md", ".png")):
            text = LABELS.get(path, text) if text.endswith(path) else text
            return f"[{text}]({path}{'#' * bool(anchor)}{anchor})"
        return text

    code = r"```.*?```|`[^`]*`"
    links = rf"{code}|\[([^\[\]]*)\]\(([^)\s]+)\)"
    return markdown if here.startswith("api/") else re.sub(links, link, markdown, flags=re.DOTALL)


def _label(name: str) -> dict[str, str]:
    return {name.rpartition(".")[2]: f"api/{name}.md"}


def _members(name: str) -> str:
    """Return the page of an op, of the functions that take a rule, or of a module."""
    if name == "guidance":
        modules = ["guidance.api"]
    elif (op := PACKAGE / "ops" / name).is_dir():
        modules = [f"ops.{name}.{path.stem}" for path in sorted(op.glob("*.py")) if path.stem in INSIDE]
    else:
        modules = [name]
    return f"# {name}\n" + "".join(f"\n::: lgd_kernels.{module}\n" for module in modules)


class Fences(griffe.Extension):
    """Fence examples, `>>> `, as code: Markdown would read them as quotations."""

    def on_object(self, *, obj, **others) -> None:
        if obj.is_module and obj.name == "api":
            obj.docstring = None  # the page is its function's
        elif obj.docstring:
            example = r"^( *)>>> .*(?:\n.*\S.*)*"
            fence = lambda found: f"{found[1]}```pycon\n{found[0]}\n{found[1]}```"  # noqa: E731
            obj.docstring.value = re.sub(example, fence, obj.docstring.value, flags=re.MULTILINE)
