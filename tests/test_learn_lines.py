"""What `learn` prints beside the losses: lines that sample as printed, and whether the prediction fits the data."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from learning import environment
from test_learn_command import learn, place  # noqa: F401

import lgd_kernels as lgd
from lgd_kernels.learn import Frozen, Trainer, readings
from lgd_kernels.metrics import energy_distance
from lgd_kernels.omega.files import load, save
from lgd_kernels.omega.forms import Constant, Interval
from lgd_kernels.omega.network import OmegaNetwork
from lgd_kernels.omega.table import TableModule
from lgd_kernels.runtime.levels import PREDICTIONS
from lgd_kernels.sampling import sampler, solvers

FLOW = lgd.RectifiedFlow()


def printed(out: str) -> str:
    """The last paragraph."""
    return out.strip().rpartition("\n\n")[2]


def by_hand(space: dict, schedule, prediction: str, omega) -> torch.Tensor:
    """The samples of the lines, from their x, step by step."""
    x, c, null, times = (space[name] for name in ("x", "c", "null", "times"))
    for t, s in zip(times[:-1], times[1:], strict=True):
        t, s = t.expand(len(x)), s.expand(len(x))
        with torch.no_grad():
            cond, uncond, w = space["model"](x, t, c), space["model"](x, t, null), omega(c, s, t)
        x = lgd.guided_step(x, cond, uncond, w, schedule.levels(t, s), prediction=prediction)
    return x


CASES = {
    "network": (FLOW, "flow", ["--model", "my_model:flow"]),
    "table": (FLOW, "flow", ["--model", "my_model:flow", "--omega", "table", "--items", "2000", "--knots", "4"]),
    "constant": (FLOW, "flow", ["--model", "my_model:flow", "--omega", "constant"]),
    "interval": (lgd.Discrete.ddpm(), "x0", ["--omega", "interval", "--schedule", "ddpm"]),
    "module": (lgd.EDM(sigma_max=10.0), "x0", ["--model", "my_model:make(some file.pt)", "--schedule", "my_model:edm"]),
    "eps": (FLOW, "eps", ["--model", "my_model:eps", "--null", "2"]),
    "zeros": (FLOW, "x0", ["--data", "my_model:embedded()", "--model", "my_model:half", "--null", "zeros"]),
    "vector": (
        FLOW,
        "x0",
        ["--data", "my_model:embedded()", "--model", "my_model:half", "--null", "my_model:null_vector"],
    ),
    "function": (
        FLOW,
        "x0",
        ["--data", "my_model:embedded()", "--model", "my_model:half", "--null", "my_model:null_like"],
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_the_lines_run_as_printed(name, capsys):
    schedule, prediction, options = CASES[name]
    assert learn(*options, "--prediction", prediction) == 0
    said = capsys.readouterr()
    assert said.err == ""  # the reading that was chosen fits
    exec(printed(said.out), space := {})
    omega = load("out/omega.safetensors", schedule, prediction=prediction)
    assert (
        space["schedule"] is not None
        and space["prediction"] == prediction
        and space["samples"].shape == (len(space["c"]), 3)
    )
    torch.testing.assert_close(space["samples"], by_hand(space, schedule, prediction, omega), rtol=1e-4, atol=1e-4)


def test_the_lines_run_in_a_session_of_their_own(capsys):
    """Pasted, and what comes out is the data: read as x0, the same model gives something else."""
    assert (
        learn("--omega", "table", "--items", "2000", "--knots", "4", "--prediction", "flow", model="my_model:flow") == 0
    )
    lines = ["import torch", "torch.manual_seed(0)", *printed(capsys.readouterr().out).splitlines()]
    lines += ["wrong = sample(model, x, solvers.one_step(schedule, times), c, null, omega)"]
    lines += ["torch.save((c, samples, wrong), 'samples.pt')", ""]
    run = subprocess.run(
        [sys.executable, "-i"], input="\n".join(lines), env=environment(), capture_output=True, text=True, timeout=120
    )
    assert run.returncode == 0 and "Traceback" not in run.stderr, run.stderr
    c, samples, wrong = torch.load("samples.pt")
    sys.path.insert(0, str(Path.cwd()))
    import my_model

    x0, labels = my_model.pairs()
    for label in range(2):
        data = x0[labels == label]
        assert float(energy_distance(samples[c == label], data)) < 0.2
        assert float(energy_distance(wrong[c == label], data)) > 1


def test_learn_says_which_reading_fits_better(capsys):
    fits = ["--omega", "constant", "--items", "64"]
    assert learn(*fits, model="my_model:flow", out="wrong") == 0  # the default is x0
    said = capsys.readouterr().err
    assert said.startswith(
        "learn: warning: --prediction is x0, but read as flow the model's output fits the data better"
    )
    assert said.rstrip().endswith("if the model returns flow, pass --prediction flow") and said.count("\n") == 1
    assert learn(*fits, "--prediction", "flow", model="my_model:flow", out="right") == 0
    assert learn(*fits, model="my_model:exact", out="exact") == 0
    assert capsys.readouterr().err == ""


def posterior(schedule, returned: str, means: torch.Tensor, std: float):
    """The exact model of one normal for each class."""

    def model(x, t, c):
        signal, noise = (one[:, None].double() for one in schedule.signal_noise(t))
        mean, wide = means[c].double(), x.double()
        x0 = mean + std**2 * signal / (std**2 * signal**2 + noise**2) * (wide - signal * mean)
        z = (wide - signal * x0) / noise
        v = (signal * z - noise * x0) / (signal**2 + noise**2).sqrt()
        return {"x0": x0, "eps": z, "v": v, "flow": z - x0}[returned].float()

    return model


@pytest.mark.parametrize("schedule", [FLOW, lgd.VPCosine(), lgd.Discrete.ddpm()], ids=lambda one: type(one).__name__)
@pytest.mark.parametrize("returned", PREDICTIONS)
def test_readings_of_an_exact_model(schedule, returned):
    generator = torch.Generator().manual_seed(0)
    means, c = torch.randn(4, 2, generator=generator), torch.arange(320) % 4
    x0 = means[c] + 0.3 * torch.randn(320, 2, generator=generator)
    frozen = Frozen(posterior(schedule, returned, means, 0.3), schedule, null=0)
    found = readings.readings(frozen, x0, c)
    assert {chosen: readings.better(found, chosen) for chosen in PREDICTIONS} == {
        chosen: None if chosen == returned else returned for chosen in PREDICTIONS
    }
    assert found[returned].bias < 0.1


def known(prediction="flow"):
    knots = torch.linspace(0, 1, 4)
    return lgd.OmegaTable(torch.ones(2, 3, 3), knots[:-1], knots[1:], schedule=lgd.VPCosine(), prediction=prediction)


def test_prediction_and_schedule_travel_with_omega(tmp_path):
    path = tmp_path / "omega.safetensors"
    save(path, known())
    table = load(path, lgd.VPCosine(), prediction="flow")
    assert table.prediction == "flow" and table.schedule == lgd.VPCosine()
    module = TableModule(table)
    assert (module.table().prediction, module.table().schedule) == ("flow", lgd.VPCosine())
    with pytest.raises(ValueError, match="was learned with prediction='flow', expected 'x0'; pass what the model"):
        load(path, prediction="x0")
    with pytest.raises(ValueError, match="omega was learned with prediction='flow', expected 'eps'"):
        save(path, table, prediction="eps")
    for form in (Constant(1.0), Interval(1.0, 0.0, 1.0), OmegaNetwork(FLOW, 3, hidden=8)):
        save(path, form, FLOW)
        assert getattr(load(path, prediction="v"), "prediction", None) is None  # a file that does not know
        save(path, form, FLOW, "eps")
        again = load(path)
        assert (again.prediction, again.schedule) == ("eps", FLOW)
    baked, _ = again.bake(torch.linspace(0, 0.9, 3), torch.linspace(0.1, 1, 3))
    assert (baked.prediction, baked.schedule) == ("eps", FLOW)
    unknown = "`prediction` is 'epsilon', expected one of x0, eps, v, flow; did you mean 'eps'?"
    with pytest.raises(ValueError, match=re.escape(f"OmegaTable: {unknown}")):
        known("epsilon")
    with pytest.raises(ValueError, match=re.escape(f"save: {unknown}")):
        save(path, Constant(1.0), prediction="epsilon")
    with pytest.raises(ValueError, match=re.escape(f"load: {unknown}")):
        load(path, prediction="epsilon")
    form.prediction = "epsilon"
    with pytest.raises(ValueError, match=re.escape(f"save: omega: {unknown}")):
        save(path, form, FLOW)
    knots = table.s_knots
    with pytest.raises(TypeError, match="OmegaTable: `schedule` is a str, expected one of lgd_kernels"):
        lgd.OmegaTable(table.values, knots, table.t_knots, schedule="flow")
    lgd.OmegaTable(table.values, knots, table.t_knots).save(path, FLOW, "v")
    assert (load(path).schedule, load(path).prediction) == (FLOW, "v")


def test_a_trainer_knows_what_it_learned_for():
    frozen = Frozen(lambda x, t, c: x, lgd.VPCosine(), "v", null=0)
    data = torch.zeros(20, 2), torch.zeros(20, dtype=torch.int64)
    knots = torch.linspace(0, 1, 4)
    trainer = Trainer(lgd.OmegaTable(torch.ones(2, 3, 3), knots[:-1], knots[1:]), frozen, data)
    assert (trainer.ema.table().prediction, trainer.ema.table().schedule) == ("v", lgd.VPCosine())


def test_a_plan_of_another_prediction_is_noticed(recwarn):
    times = torch.linspace(0.9, 0, 4)
    plans = [solvers.one_step(FLOW, times, prediction=name) for name in PREDICTIONS]
    plans += [
        solvers.dpm_solver_2m(FLOW, times),
        solvers.adams_bashforth(times, prediction="v"),
        solvers.edm_heun(times),
    ]
    assert [plan.prediction for plan in plans] == [*PREDICTIONS, "x0", "v", "x0"]
    sampler.same_prediction(known(), plans[3].to("cpu", torch.float64))
    sampler.same_prediction(torch.ones(3), plans[0])
    sampler.same_prediction(lgd.OmegaTable(torch.ones(1, 1, 1), times[-1:], times[:1]), plans[0])
    assert not recwarn.list
    with pytest.warns(UserWarning, match="learned with prediction='flow', but the plan has prediction='x0'; make the"):
        sampler.same_prediction(known(), plans[0])
