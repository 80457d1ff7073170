"""Stand in for ComfyUI: what the node and its function use of it, with the same contract.

ModelPatcher   clone() copies model_options; set_model_sampler_cfg_function(fn, disable_cfg1_optimization) stores fn;
               get_model_object("model_sampling") is an object of a class made of two: how sigma counts, and what the
               model predicts (EPS and its subclasses; CONST and COSMOS_RFLOW for flows)
a sampler      calls the model at sigma [B]. A conditioning is a dict, with pooled_output, strength, area, mask,
               timestep_start and timestep_end, uuid. A negative is skipped at cfg 1, unless that is disabled;
               predictions that were not evaluated are zeros. cfg_function calls fn with one dict and takes x - x0 from
               it.
folder_paths   models_dir, folder_names_and_paths {name: (folders, endings)}, add_model_folder_path, get_filename_list
comfy_api      latest.io (ComfyNode, Schema, Model, Combo, Int, Float, NodeOutput) and latest.ComfyExtension
nodes.py       a folder of custom_nodes is imported by its path. NODE_CLASS_MAPPINGS is taken before comfy_entrypoint,
               whose extension lists classes; a class has GET_SCHEMA and EXECUTE_NORMALIZED.
"""

import asyncio
import copy
import importlib.util
import inspect
import math
import os
import sys
from types import ModuleType, SimpleNamespace

import torch

SIGMAS = torch.tensor([14.0, 5.0, 1.0, 0.2, 0.0])
FLOW_SIGMAS = torch.tensor([1.0, 0.7, 0.4, 0.1, 0.0])
NEGATIVE = [{"uuid": 1}]  # conditionings
POSITIVE = [{"uuid": 0}]


class EPS: ...


class V_PREDICTION(EPS): ...  # noqa: N801


class CONST: ...


class COSMOS_RFLOW: ...  # noqa: N801


class Levels:
    """Hold the largest sigma of a model."""

    def __init__(self, sigma_max=14.6):
        self.sigma_max = torch.tensor(sigma_max)


def sampling(kind=EPS, sigma_max=14.6):
    return type("ModelSampling", (Levels, kind), {})(sigma_max)


class Patcher:
    def __init__(self, model_sampling=None):
        self.model_options = {"transformer_options": {}}
        self.model_sampling = model_sampling or sampling()

    def clone(self):
        other = Patcher(self.model_sampling)
        other.model_options = copy.copy(self.model_options)
        return other

    def get_model_object(self, name):
        return getattr(self, name)

    def set_model_sampler_cfg_function(self, function, disable_cfg1_optimization=False):
        if len(inspect.signature(function).parameters) == 3:  # the old way
            wrapped = function
            function = lambda args: wrapped(args["cond"], args["uncond"], args["cond_scale"])  # noqa: E731
        self.model_options["sampler_cfg_function"] = function
        if disable_cfg1_optimization:
            self.model_options["disable_cfg1_optimization"] = True


def guided_by(function, model_sampling=None):
    """Return a model with this CFG function."""
    patcher = Patcher(model_sampling)
    patcher.set_model_sampler_cfg_function(function, disable_cfg1_optimization=True)
    return patcher


def cfg_function(patcher, cond, uncond, scale, x, sigma, positive, negative, sigmas=SIGMAS, **changes):
    """Return the guided x0. `changes` replace arguments of the function; `...` leaves one out, as an older one does."""
    options = {**patcher.model_options, "transformer_options": {"sample_sigmas": sigmas}}
    if "sampler_cfg_function" not in options:
        return uncond + (cond - uncond) * scale
    args = {
        "cond": x - cond,
        "uncond": x - uncond,
        "cond_scale": scale,
        "timestep": sigma,
        "input": x,
        "sigma": sigma,
        "cond_denoised": cond,
        "uncond_denoised": uncond,
        "model": SimpleNamespace(model_sampling=patcher.model_sampling),
        "model_options": options,
        "input_cond": positive,
        "input_uncond": negative,
    }
    args = {name: value for name, value in (args | changes).items() if value is not ...}
    return x - options["sampler_cfg_function"](args)


def denoised(patcher, x, sigma, cond, uncond, scale, negative=NEGATIVE, positive=POSITIVE, **changes):
    """Return the guided x0 of one call of the sampler with these predictions. `negative` are conditionings; None, as
    from BasicGuider, or limits that exclude sigma leave zeros."""
    if math.isclose(scale, 1.0) and not patcher.model_options.get("disable_cfg1_optimization", False):
        negative = None
    limits = ((one.get("timestep_start", 1e9), one.get("timestep_end", 0.0)) for one in negative or ())
    if not any(low <= sigma[0] <= high for high, low in limits):
        uncond = torch.zeros_like(cond)
    return cfg_function(patcher, cond, uncond, scale, x, sigma, positive, negative, **changes)


def dual(patcher, x, sigma, x0, scales, style, conditionings):
    """Return the guided x0 of DualCFGGuider: x0 of (first, second, negative); it calls the function once."""
    first, second, negative = x0
    if style == "nested":
        inner = cfg_function(patcher, first, second, scales[0], x, sigma, conditionings[0], conditionings[1])
        return negative + scales[1] * (inner - negative)
    outer = cfg_function(patcher, second, negative, scales[1], x, sigma, conditionings[1], conditionings[2])
    return outer + (first - second) * scales[0]


def folder_paths(models_dir, **named):
    """Make the module folder_paths, with these folders already named, as extra_model_paths.yaml does."""
    module = ModuleType("folder_paths")
    module.models_dir = str(models_dir)
    module.folder_names_and_paths = {name: ([str(one) for one in folders], set()) for name, folders in named.items()}

    def add_model_folder_path(name, folder):
        module.folder_names_and_paths.setdefault(name, ([], set()))[0].append(folder)

    def get_filename_list(name):
        folders, endings = module.folder_names_and_paths[name]
        found = (
            os.path.relpath(os.path.join(at, file), folder)
            for folder in folders
            for at, _, files in os.walk(folder)
            for file in files
        )
        return sorted({file for file in found if not endings or os.path.splitext(file)[1] in endings})

    module.add_model_folder_path, module.get_filename_list = add_model_folder_path, get_filename_list
    return module


class ComfyNode:
    @classmethod
    def GET_SCHEMA(cls):  # noqa: N802
        return cls.define_schema()

    @classmethod
    def EXECUTE_NORMALIZED(cls, **inputs):  # noqa: N802
        return cls.execute(**inputs).args


def comfy_api():
    """Make the module comfy_api.latest."""

    def kind(io_type):
        make = lambda name=None, **options: SimpleNamespace(id=name, io_type=io_type, options=options)  # noqa: E731
        return SimpleNamespace(Input=make, Output=make)

    module = ModuleType("comfy_api.latest")
    kinds = {name: kind(name.upper()) for name in ("Model", "Combo", "Int", "Float")}
    output = lambda *args: SimpleNamespace(args=args)  # noqa: E731
    module.io = SimpleNamespace(ComfyNode=ComfyNode, Schema=SimpleNamespace, NodeOutput=output, **kinds)
    module.ComfyExtension = type("ComfyExtension", (), {})
    return module


def load_custom_node(path):
    """Import a folder of custom_nodes; return its nodes and their titles."""
    name = str(path).replace(".", "_x_")
    spec = importlib.util.spec_from_file_location(name, os.path.join(path, "__init__.py"))
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    if getattr(module, "NODE_CLASS_MAPPINGS", None) is not None:
        return module.NODE_CLASS_MAPPINGS, module.NODE_DISPLAY_NAME_MAPPINGS

    async def listed():
        extension = await module.comfy_entrypoint()
        assert isinstance(extension, sys.modules["comfy_api.latest"].ComfyExtension)
        return await extension.get_node_list()

    schemas = {node: node.GET_SCHEMA() for node in asyncio.run(listed())}
    nodes = {schema.node_id: node for node, schema in schemas.items()}
    return nodes, {schema.node_id: schema.display_name for schema in schemas.values()}
