"""Hand ComfyUI the node of lgd_kernels. This folder goes into custom_nodes/; updating lgd_kernels updates the node."""

import sys

try:
    from lgd_kernels.integrations import comfyui_files, comfyui_nodes
except ImportError as error:
    raise ImportError(
        f"comfyui_lgd needs lgd_kernels in ComfyUI's Python: {sys.executable} -m pip install (the checkout of "
        f"lgd_kernels); {error}"
    ) from error

comfyui_files.register()
try:
    comfy_entrypoint = comfyui_nodes.entrypoint()
except ImportError:  # a ComfyUI before the V3 schema; a newer one would take these first
    NODE_CLASS_MAPPINGS = comfyui_nodes.NODE_CLASS_MAPPINGS
    NODE_DISPLAY_NAME_MAPPINGS = comfyui_nodes.NODE_DISPLAY_NAME_MAPPINGS
