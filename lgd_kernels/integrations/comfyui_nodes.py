"""Define the ComfyUI node: for ComfyUI's V3 schema, and for versions before it.

`entrypoint` needs a ComfyUI that has comfy_api.latest; `NODE_CLASS_MAPPINGS` works in all. Both have the same id,
inputs and outputs. The folder comfyui_lgd/, which users copy into custom_nodes/, hands ComfyUI one of the two.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

from lgd_kernels.integrations.comfyui import CFGFunction, load
from lgd_kernels.integrations.comfyui_files import FOLDER, changed, names

NODE = "LGDLearnedGuidance"
TITLE = "Learned Guidance (omega)"
CATEGORY = "advanced/guidance"
DESCRIPTION = (
    "Guides with a weight omega(c, s, t) that was learned, in place of cfg: cond + omega (cond - uncond), a weight for "
    "each step and sample. The sampler's cfg has no effect; omega = cfg - 1."
)
PATCHED = "patched_model"
PATCHED_TIP = "The model with learned guidance as its CFG function."
INPUTS: dict[str, tuple[str, dict[str, Any]]] = {
    "model": ("Model", {"tooltip": "The model to guide. A CFG function that it had is replaced."}),
    "omega_name": (
        "Combo",
        {"tooltip": f"A file in models/{FOLDER}, written by `python -m lgd_kernels learn` or lgd_kernels.omega."},
    ),
    "condition": (
        "Int",
        {
            "default": 0,
            "min": 0,
            "max": 2**31 - 1,
            "tooltip": "The row of a table, or the class of a network with classes. 0 for a file without labels; a "
            "network on prompts reads the pooled embedding of the positive prompt.",
        },
    ),
    "strength": (
        "Float",
        {
            "default": 1.0,
            "min": 0.0,
            "max": 100.0,
            "step": 0.01,
            "tooltip": "Multiplies omega. 1 is what was learned, 0 the conditional prediction alone.",
        },
    ),
}


def patched(model: Any, omega_name: str, condition: int = 0, strength: float = 1.0) -> Any:
    """Return a clone of a ComfyUI model with learned guidance. Raises ValueError for an omega that does not fit."""
    function = CFGFunction(load(omega_name), condition, strength)
    if hasattr(model, "get_model_object"):
        function.check_model(model.get_model_object("model_sampling"))
    guided = model.clone()
    guided.set_model_sampler_cfg_function(function, disable_cfg1_optimization=True)
    return guided


class LearnedGuidance:
    """Set a `CFGFunction` on a model: the node for ComfyUI's first interface."""

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        """Return the inputs of the node, with the files that there are now."""
        return {
            "required": {
                name: (names() if kind == "Combo" else kind.upper(), options)
                for name, (kind, options) in INPUTS.items()
            }
        }

    @classmethod
    def IS_CHANGED(cls, omega_name: str | None = None, **_: Any) -> float:
        """Return a number that changes when the file does."""
        return changed(omega_name)

    RETURN_TYPES = ("MODEL",)
    RETURN_NAMES = (PATCHED,)
    OUTPUT_TOOLTIPS = (PATCHED_TIP,)
    FUNCTION = "patch"
    CATEGORY = CATEGORY
    DESCRIPTION = DESCRIPTION

    def patch(self, model: Any, omega_name: str, condition: int = 0, strength: float = 1.0) -> tuple[Any]:
        """Return a clone of the model with learned guidance."""
        return (patched(model, omega_name, condition, strength),)


NODE_CLASS_MAPPINGS = {NODE: LearnedGuidance}
NODE_DISPLAY_NAME_MAPPINGS = {NODE: TITLE}


def entrypoint() -> Callable[[], Awaitable[Any]]:
    """Return `comfy_entrypoint` for ComfyUI's V3 schema. Raises ImportError where ComfyUI has no comfy_api.latest."""
    from comfy_api.latest import ComfyExtension, io  # type: ignore[import-not-found]

    class LearnedGuidanceV3(io.ComfyNode):
        """Set a `CFGFunction` on a model: the node for the V3 schema."""

        @classmethod
        def define_schema(cls) -> Any:
            """Return the schema, with the files that there are now."""
            return io.Schema(
                node_id=NODE,
                display_name=TITLE,
                category=CATEGORY,
                description=DESCRIPTION,
                inputs=[
                    getattr(io, kind).Input(name, **({"options": names()} if kind == "Combo" else {}), **options)
                    for name, (kind, options) in INPUTS.items()
                ],
                outputs=[io.Model.Output(display_name=PATCHED, tooltip=PATCHED_TIP)],
            )

        @classmethod
        def fingerprint_inputs(cls, omega_name: str | None = None, **_: Any) -> float:
            """Return a number that changes when the file does."""
            return changed(omega_name)

        @classmethod
        def execute(cls, model: Any, omega_name: str, condition: int = 0, strength: float = 1.0) -> Any:
            """Return a clone of the model with learned guidance."""
            return io.NodeOutput(patched(model, omega_name, condition, strength))

    class Extension(ComfyExtension):
        """List the nodes of this package."""

        async def get_node_list(self) -> list[type]:
            """Return the one node."""
            return [LearnedGuidanceV3]

    async def comfy_entrypoint() -> Any:
        """Return the extension, for ComfyUI's loader."""
        return Extension()

    return comfy_entrypoint
