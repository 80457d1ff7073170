"""Draw calls. Most are valid; in some, one argument is replaced by one that may be invalid."""

from __future__ import annotations

import math

from hypothesis import strategies as st

from fuzz import inputs
from fuzz.inputs import Call, Kernel, Lookup, Number, Rule, Seeds, Steps, T, Table, Target, Times

SHAPES = ((1,), (7,), (1, 1), (2, 3), (3, 5), (2, 31), (5, 127), (3, 64), (1, 4097), (2, 1031), (2, 8209), (4, 3, 8, 8),
          (2, 4, 16, 16), (2, 3, 7, 11), (1, 2, 3, 4, 5), (130, 3), (0, 4), (3, 0), (0,), (2, 3, 0))  # fmt: skip
NUMBERS = (0.0, 1.0, 1, 0, -1.0, 0.5, 2.5, 7, 1e-30, 1e30, math.nan, math.inf, -math.inf, True)
BAD = (None, "x", "nearest", [], [1.0], (), {}, 3, -1, 0, 1.5, True, math.nan, math.inf, -math.inf, 2**63, 1e300, b"x",
       Number("complex"), Number("numpy float32", 0.5), Number("numpy float64", 0.5), Number("numpy int64", 1),
       Number("numpy array", [1.0, 2.0]), Number("0-dim", 0.5), Number("0-dim", 1), Number("float64 0-dim", 0.5),
       T((2,)), T((2, 3)), T((0,)), T(()), Seeds((2,)), Seeds(()))  # fmt: skip

one_of = st.sampled_from
small = st.integers(0, 999)
dtypes = one_of(("float32", "float32", "float32", "bfloat16", "float16", "float64"))
layouts = one_of((*("contiguous",) * 6, *inputs.LAYOUTS))
specials = one_of((*("",) * 24, *inputs.SPECIAL))
kinds = one_of((*("",) * 24, *inputs.SOUND))
shapes = one_of(SHAPES)
impls = one_of((None, None, None, "cpu"))
predictions = one_of(("x0", "eps", "v", "flow"))
surroundings = one_of((*("",) * 24, "no_grad", "inference_mode", "autocast", "default device", "default dtype",
                       "deterministic", "low matmul precision"))  # fmt: skip


@st.composite
def tensors(draw, shape, **fixed):
    options = {"dtype": draw(dtypes), "layout": draw(layouts), "special": draw(specials), "kind": draw(kinds)} | fixed
    return T(tuple(shape), seed=draw(small), **options)


@st.composite
def per_sample(draw, batch, **fixed):
    """Draw a number, or `[B]`."""
    if draw(st.booleans()):
        return draw(one_of((0.0, 1.0, 0.5, 2, 7.5)))
    return draw(tensors((batch,), **{"positive": True, "special": ""} | fixed))


@st.composite
def in_unit(draw, batch):
    """Draw a number or `[B]` in [0, 1], such as churn, that does not round to more than 1 in half precision."""
    return draw(st.one_of(one_of((0.0, 0.0, 1.0, 0.5, 1)), tensors((batch,), positive=True, special="", kind="")))


@st.composite
def omegas(draw, batch):
    if draw(st.integers(0, 3)) == 0:
        sizes = draw(one_of(((1, 1, 1), (2, 3, 4), (3, 8, 1), (2, 1, 5))))
        return Lookup(batch, sizes, draw(dtypes), draw(one_of(("float32", "float64"))), draw(layouts), draw(small))
    return draw(per_sample(batch))


@st.composite
def seeds(draw, batch):
    number = one_of((0, 1, -1, 2**63 - 1, -(2**63), 12345))
    of_samples = st.builds(Seeds, st.just((batch,)), layouts, small)
    return draw(st.one_of(number, of_samples, st.just(Seeds(()))))


@st.composite
def steps(draw, batch, prediction="x0"):
    schedule = draw(one_of(tuple(inputs.SCHEDULES)))
    ends = draw(st.booleans()) and (prediction != "eps" or schedule not in ("flow", "cosine"))
    return Steps(batch, schedule, draw(one_of(("float32", "float64"))), draw(layouts), draw(small), ends,
                 draw(st.integers(0, 7)) == 0)  # fmt: skip


rules = st.builds(
    Rule, one_of(("cfg", "rescale", "apg", "cfg_zero_star", "tcfg", "mambo_g", "beta_cfg")), st.booleans()
)


@st.composite
def noisy(draw, batch, shape, arguments):
    """Draw churn, with noise or a seed if it needs one."""
    arguments["churn"] = churn = draw(in_unit(batch))
    if churn == 0 and not isinstance(churn, T):
        return arguments
    if draw(st.booleans()):
        arguments["noise"] = draw(tensors(shape))
    else:
        arguments["seed"] = draw(seeds(batch))
        arguments["first_sample"] = draw(one_of((0, 0, 3, 2**32 - 1)))
    return arguments


@st.composite
def guided_score(draw):
    shape = draw(shapes)
    arguments = {"cond": draw(tensors(shape)), "uncond": draw(tensors(shape)), "omega": draw(omegas(shape[0]))}
    if draw(st.integers(0, 3)) == 0:
        arguments["rule"] = draw(rules)
    return arguments


@st.composite
def guided_step(draw):
    shape, prediction = draw(shapes), draw(predictions)
    arguments = {name: draw(tensors(shape)) for name in ("x", "cond", "uncond")}
    arguments |= {
        "omega": draw(omegas(shape[0])),
        "levels": draw(steps(shape[0], prediction)),
        "prediction": prediction,
    }
    if draw(st.integers(0, 3)) == 0:
        arguments |= {"rule": draw(rules), "rule_space": draw(one_of(("prediction", "x0")))}
    return draw(noisy(shape[0], shape, arguments))


@st.composite
def step_with_log_prob(draw):
    shape, prediction = draw(shapes), draw(predictions)
    arguments = {name: draw(tensors(shape)) for name in ("x", "cond", "uncond")}
    arguments |= {
        "omega": draw(omegas(shape[0])),
        "levels": draw(steps(shape[0], prediction)),
        "prediction": prediction,
    }
    arguments |= {"churn": draw(one_of((1.0, 0.5, 1))), "reduction": draw(one_of(("sum", "mean")))}
    source = draw(one_of(("x_s", "noise", "seed")))
    arguments[source] = draw(seeds(shape[0])) if source == "seed" else draw(tensors(shape))
    return arguments


@st.composite
def guided_energy(draw, curve=False):
    batch, m, k, row = draw(st.tuples(one_of((0, 1, 2, 3)), one_of((2, 3, 4, 7)), one_of((1, 2, 4, 5)),
                                      one_of(((), (1,), (5,), (3, 4), (127,), (2, 130), (1031,)))))  # fmt: skip
    shape, prediction = (batch, m, *row), draw(predictions)
    arguments = {name: draw(tensors(shape)) for name in ("x", "cond", "uncond")}
    if not curve:
        arguments["omega"] = draw(omegas(batch))
    arguments |= {"levels": draw(steps(batch, prediction)), "prediction": prediction}
    target = draw(one_of(("tensor", "renoise") if curve else ("tensor", "renoise", "expected")))
    arguments["target"] = draw(tensors((batch, k, *row) if target == "tensor" else (batch, *row)))
    if not curve:
        arguments |= {"beta": draw(one_of((1.75, 1.0, 2.0, 0.5, 2))), "lam": draw(one_of((1.0, 0.0, 0.5, 1)))}
        arguments["unbiased"] = draw(st.booleans())
    if target == "renoise":
        arguments["target"] = Target(arguments["target"], k, draw(seeds(batch)))
    elif target == "expected":
        arguments |= {"target": Target(arguments["target"]), "beta": 2.0, "lam": 0.0}
    return draw(noisy(batch, shape, arguments))


columns = one_of((None, (0,), (0, 1), (0, (0, 1)), ((0, 1), (1, 0), 1), (1, 1, (0, 0))))


@st.composite
def moments(draw):
    shape, count = draw(shapes), draw(one_of((2, 2, 3, 8)))
    return {"tensors": tuple(draw(tensors(shape)) for _ in range(count)), "columns": draw(columns)}


@st.composite
def combine(draw):
    shape, count = draw(shapes), draw(one_of((2, 2, 3, 8)))
    arguments = {"tensors": tuple(draw(tensors(shape)) for _ in range(count)), "columns": draw(columns)}
    batch, outputs = shape[0], draw(one_of(((), (), (1,), (2,), (8,))))
    if batch and draw(st.integers(0, 3)) == 0:
        batch = draw(one_of((0, 1, 5)))
        arguments["source"] = Seeds((batch,), draw(layouts), draw(small), high=shape[0])
    width = count if arguments["columns"] is None else len(arguments["columns"])
    arguments["coefficients"] = draw(tensors((batch, *outputs, width)))
    if draw(st.booleans()):
        arguments["constant"] = draw(tensors((batch, *outputs)))
    if draw(st.booleans()):
        arguments["noise_scale"] = draw(st.one_of(one_of((1.0, 2, 1e5)), tensors((batch, *outputs))))
        arguments |= {"seed": draw(seeds(batch)), "first_sample": draw(one_of((0, 3, 2**32 - 1)))}
    arguments["clamp"] = draw(one_of((None, None, (-1.0, 1.0), (None, 0.5), [0, None])))
    if draw(st.integers(0, 2)) == 0:
        arguments |= {"moments": True, "written": draw(one_of((None, 0, 1)))}
    return arguments


@st.composite
def dynamic_threshold(draw):
    return {"x0": draw(tensors(draw(shapes))), "quantile": draw(one_of((0.995, 1.0, 0.0, 0.5, 1, 1 / 3))),
            "max_value": draw(one_of((math.inf, 1.0, 1, 1.5)))}  # fmt: skip


@st.composite
def philox_normal(draw):
    shape = draw(shapes)
    return {"shape": draw(one_of((shape, list(shape)))), "seed": draw(seeds(shape[0])),
            "stream": draw(one_of((0, 1, 7))), "first_sample": draw(one_of((0, 3, 2**32 - 1)))}  # fmt: skip


kernels = one_of((None, None, Kernel("Energy", (1.75,)), Kernel("Energy", (2,)), Kernel("Gaussian", (1.5,)),
                  Kernel("Gaussian", ((0.5, 1.0, 4.0),)), Kernel("Laplace", (2.0,)), Kernel("Polynomial"),
                  Kernel("RationalQuadratic", (1.5, 2.0))))  # fmt: skip
rows = one_of(((), (1,), (2,), (3,), (2, 3), (17,), (64,), (65,), (130,)))
counts = one_of((2, 3, 5, 64, 65, 131))


@st.composite
def sets(draw, leading=()):
    row = draw(rows)
    return {"x": draw(tensors((*leading, draw(counts), *row))), "y": draw(tensors((*leading, draw(counts), *row)))}


@st.composite
def energy_mmd(draw):
    leading = draw(one_of(((), (), (0,), (1,), (3,))))
    arguments = draw(sets(leading)) | {"batched": bool(leading)}
    place = len(leading)
    for name in ("x", "y"):
        if draw(st.integers(0, 2)) == 0:
            shape = arguments[name].shape[: place + 1]
            arguments[f"{name}_weights"] = draw(tensors(shape, positive=True, special="", kind=""))
    arguments |= {"lam": draw(one_of((1.0, 0.0, 0.5, 1))), "unbiased": draw(st.booleans()), "kernel": draw(kernels)}
    precision = draw(one_of((None, None, "direct", "product")))
    return arguments | {"target_term": draw(st.booleans()), "precision": precision}


@st.composite
def energy_distance(draw):
    return draw(sets()) | {"beta": draw(one_of((1.0, 0.5, 2, 1.75))), "unbiased": draw(st.booleans())}


@st.composite
def mmd_test(draw):
    return draw(sets()) | {
        "kernel": draw(kernels),
        "permutations": draw(one_of((1, 9))),
        "unbiased": draw(st.booleans()),
    }


@st.composite
def kernel_inception_distance(draw):
    return draw(sets()) | {"subsets": draw(one_of((1, 3))), "subset_size": 2}


@st.composite
def pooled(draw):
    arguments = draw(sets())
    return arguments if draw(st.booleans()) else {"x": arguments["x"]}


@st.composite
def schedule_levels(draw):
    batch = draw(one_of((0, 1, 2, 5)))
    schedule, dtype, layout, seed = (draw(one_of(("flow", "cosine", "linear", "edm"))),
                                     draw(one_of(("float32", "float64"))), draw(layouts), draw(small))  # fmt: skip
    t = T((batch,), dtype, layout, seed, positive=True)
    return {
        "schedule": schedule,
        "t": t,
        "s": draw(one_of((0, 0.0, T((batch,), dtype, layout, seed, special="all zero")))),
    }


@st.composite
def omega_table(draw):
    batch, sizes, knots = draw(one_of((0, 1, 2, 5))), draw(one_of(((1, 1, 1), (2, 3, 4)))), "float32"
    cut = draw(one_of((0.1, 0.5, 0.9)))  # s < cut <= t
    times = {name: T((batch,), knots, draw(layouts), draw(small), True, low=low, high=high)
             for name, low, high in (("s", 0.0, cut), ("t", cut, 1.0))}  # fmt: skip
    return {"table": Table(sizes, draw(dtypes), knots, draw(layouts), draw(small)),
            "c": Seeds((batch,), draw(layouts), draw(small), sizes[0]), **times}  # fmt: skip


@st.composite
def churn_from_eta(draw):
    batch = draw(one_of((0, 1, 2, 5)))
    return {"eta": draw(in_unit(batch)), "levels": draw(steps(batch))}


@st.composite
def solver(draw):
    """Draw a plan, and a step of it."""
    name = draw(
        one_of(
            ("one_step", "consistency", "edm_euler", "edm_heun", "adams_bashforth", "deis", "dpm_solver_2m", "unipc")
        )
    )
    sigmas = name.startswith("edm") or name == "adams_bashforth"
    schedule = "edm" if sigmas else draw(one_of(tuple(inputs.SCHEDULES)))
    batch, prediction = draw(one_of((0, 0, 3))), draw(predictions)
    zero = draw(st.booleans()) or schedule == "discrete"
    times = Times(draw(one_of((1, 2, 3, 10))), schedule, batch, draw(one_of(("float32", "float64"))), zero)
    plan = {"times": times, "prediction": prediction} | ({} if sigmas else {"schedule": schedule})
    if name == "one_step":
        plan["churn"] = draw(one_of((0.0, 1.0, 0.5)))
    elif name.startswith("edm"):
        plan["s_churn"] = draw(one_of((0.0, 4.0)))
    elif name in ("adams_bashforth", "deis"):
        plan["order"] = draw(one_of((1, 2, 3)))
    elif name == "dpm_solver_2m":
        plan["stochastic"] = draw(st.booleans())
    elif name == "unipc":
        plan["variant"] = draw(one_of(("bh1", "bh2")))
    shape = draw(one_of(((3, 5), (3, 4, 8, 8), (3, 1031))))
    step = {"x": draw(tensors(shape)), "cond": draw(tensors(shape)), "uncond": draw(tensors(shape)),
            "omega": draw(omegas(3)), "seed": draw(seeds(3))}  # fmt: skip
    return {"solver": name, **plan, "step": tuple(step.items())}


FUNCTIONS = {
    "guided_score": (guided_score, 10), "guided_step": (guided_step, 16), "guided_energy": (guided_energy, 12),
    "guided_energy_curve": (lambda: guided_energy(curve=True), 4), "energy_mmd": (energy_mmd, 14),
    "moments": (moments, 8), "combine": (combine, 14), "dynamic_threshold": (dynamic_threshold, 6),
    "philox_normal": (philox_normal, 5), "median_bandwidth": (pooled, 3), "energy_distance": (energy_distance, 3),
    "mmd_test": (mmd_test, 2), "kernel_inception_distance": (kernel_inception_distance, 2),
    "frechet_distance": (sets, 2), "step_with_log_prob": (step_with_log_prob, 8), "churn_from_eta": (churn_from_eta, 3),
    "levels": (schedule_levels, 3), "OmegaTable.at": (omega_table, 3), "solvers": (solver, 6),
}  # fmt: skip  # (strategy of the arguments, how often)


@st.composite
def odd(draw, value):
    """Draw another value for an argument, or an unusual variant of it."""
    if isinstance(value, T) and draw(st.booleans()):
        changes = [{"kind": draw(one_of(inputs.ODD))}, {"special": draw(one_of(inputs.SPECIAL))},
                   {"dtype": draw(one_of(("int64", "int32", "uint8", "bool", "float8_e4m3fn")))}]  # fmt: skip
        return T(**{f: getattr(value, f) for f in T.__dataclass_fields__} | draw(one_of(changes)))
    if isinstance(value, Seeds) and draw(st.booleans()):
        return T(value.shape, draw(one_of(("int32", "float32", "bool"))))
    if isinstance(value, tuple) and value and draw(st.booleans()):
        place = draw(st.integers(0, len(value) - 1))
        return (*value[:place], draw(odd(value[place])), *value[place + 1 :])
    return draw(one_of((*NUMBERS, *BAD)))


FIXED = ("solver", "schedule", "table", "step", "times")  # describe a call of several functions
IMPLS = ("guided_score", "guided_step", "guided_energy", "guided_energy_curve", "energy_mmd", "moments", "combine",
         "dynamic_threshold", "energy_distance", "step_with_log_prob")  # fmt: skip


@st.composite
def calls(draw, names=None):
    weighted = [name for name, (_, often) in FUNCTIONS.items() for _ in range(often) if not names or name in names]
    name = draw(one_of(weighted))
    arguments = draw(FUNCTIONS[name][0]())
    if name in IMPLS:
        arguments["impl"] = draw(impls)
    good = draw(st.integers(0, 3)) > 0
    if not good:
        changed = draw(one_of([argument for argument in arguments if argument not in FIXED] or [None]))
        if changed is not None:
            arguments[changed] = draw(odd(arguments[changed]))
    return Call(name, arguments, good, draw(surroundings))
