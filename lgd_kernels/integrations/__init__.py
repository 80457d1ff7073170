"""Where people sample already: diffusers, k-diffusion, ComfyUI. Nothing here is imported by the package itself."""
