"""What mkdocs.yml asks for beside the pages of this folder: README.md as the first one, and a page for each op and each
module that users import, made of their docstrings."""

from __future__ import annotations

import re
from pathlib import Path

import griffe
from mkdocs.structure.files import File

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "lgd_kernels"
INSIDE = {"api", "kernels", "bandwidth", "targets", "curve"}  # of a room: what its users see
BESIDE = (
    "sampling.schedules runtime.levels sampling.churn runtime.philox guidance.rules guidance.stateful "
    "sampling.solvers sampling.step_plan sampling.sampler sampling.log_prob "
    "metrics.distance metrics.permutation metrics.kid metrics.frechet metrics.bandwidth runtime.impls "
    "omega.table omega.network omega.forms omega.files "
    "learn.frozen learn.particles learn.losses learn.marginal learn.objective learn.reward "
    "learn.fit learn.trainer learn.batches learn.logs learn.distributed runtime.progress "
    "integrations.diffusers integrations.diffusers_scheduler integrations.k_diffusion integrations.comfyui"
).split()


def on_files(files, config):
    def page(name, text):
        files.append(File.generated(config, name, content=text))

    readme = (ROOT / "README.md").read_text()
    page("index.md", re.sub(r"\]\(docs/", "](", readme))
    page("api/guidance.md", _members("guidance", ["lgd_kernels.guidance.api"]))
    for room in sorted(path.parent for path in PACKAGE.glob("ops/*/api.py")):
        modules = sorted(path.stem for path in room.glob("*.py") if path.stem in INSIDE)
        page(f"api/{room.name}.md", _members(room.name, [f"lgd_kernels.ops.{room.name}.{one}" for one in modules]))
    for module in BESIDE:
        page(f"api/{module}.md", _members(module, [f"lgd_kernels.{module}"]))
    return files


def _members(title: str, modules: list[str]) -> str:
    return f"# {title}\n" + "".join(f"\n::: {module}\n" for module in modules)


class Fences(griffe.Extension):
    """Examples, `>>> `, are code; Markdown would read them as quotations."""

    def on_object(self, *, obj, **others) -> None:
        if obj.is_module and obj.name == "api":
            obj.docstring = None  # the page is its function's
        elif obj.docstring:
            example = r"^( *)>>> .*(?:\n.*\S.*)*"
            fence = lambda found: f"{found[1]}```pycon\n{found[0]}\n{found[1]}```"  # noqa: E731
            obj.docstring.value = re.sub(example, fence, obj.docstring.value, flags=re.MULTILINE)
