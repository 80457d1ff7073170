"""Test guided_step in a compiled loop, one graph for every step, omega and batch, and in a captured CUDA graph, which
draws fresh noise at each replay."""

import functools

import pytest
import torch

import lgd_kernels as lgd
from lgd_kernels.sampling import solvers

SCHEDULE = lgd.RectifiedFlow()
FUSED = {"rtol": 1e-5, "atol": 1e-5}  # the compiler contracts products and sums of the network
FUSED_GRADIENT = {"rtol": 1e-4, "atol": 1e-5}  # likewise; a sum over the elements of a sample


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()


def denoiser(x, t, c):
    return torch.tanh(x * t.view(-1, 1, 1, 1) + c.view(-1, 1, 1, 1))


def step(x, t, s, c, omega, seed, churn):
    """Call the network and take the step."""
    cond, uncond = denoiser(x, t, c), denoiser(x, t, 0 * c)
    return lgd.guided_step(x, cond, uncond, omega, SCHEDULE.levels(t, s), churn=churn, seed=seed)


def run(step, batch, steps=6, omega=None, seed=None, churn=0.5, shape=(4, 8, 8)):
    x = lgd.philox_normal((batch, *shape), seed=1)
    c, times = torch.linspace(-1, 1, batch), torch.linspace(1, 0, steps + 1)
    omega = torch.linspace(0, 3, batch) if omega is None else omega
    for i in range(steps):
        t, s = times[i].expand(batch), times[i + 1].expand(batch)
        x = step(x, t, s, c, omega, torch.tensor(i) if seed is None else seed + i, churn)
    return x


def compiled(function, **options):
    from torch._dynamo.testing import CompileCounterWithBackend

    counter = CompileCounterWithBackend("aot_eager")
    return torch.compile(function, backend=counter, fullgraph=True, **options), counter


def test_one_graph_for_all_steps_and_batches():
    """Nothing compiles twice over batches of 2 to 9, runs of 6 steps, a seed for each step, and other omegas."""
    fast, counter = compiled(step, dynamic=True)
    for batch in (2, 5, 3, 9):
        torch.testing.assert_close(run(fast, batch), run(step, batch), **FUSED)
    assert counter.frame_count == 1


def test_one_graph_for_numbers():
    """omega, churn and the seed are Python numbers, different ones in each call."""
    fast, counter = compiled(step, dynamic=True)
    for n in range(5):
        numbers = {"omega": 0.3 + 0.7 * n, "seed": 100 * n + 7, "churn": 0.15 + 0.1 * n}
        torch.testing.assert_close(run(fast, 3, **numbers), run(step, 3, **numbers), **FUSED)
    assert counter.frame_count == 1


def test_a_whole_loop_is_one_graph():
    whole = functools.partial(run, step, 3)
    fast, counter = compiled(lambda seed: whole(seed=seed))
    for n in range(3):
        seed = torch.tensor(n)
        torch.testing.assert_close(fast(seed), whole(seed=seed), **FUSED)
    assert counter.frame_count == 1


def test_a_plan_by_a_step_on_the_device():
    """The index of the step is data, so every step of a solver is the same graph."""
    plan = solvers.dpm_solver_2m(SCHEDULE, torch.linspace(1, 0, 9, dtype=torch.float64), stochastic=True)
    plan = plan.to("cpu", torch.float32)

    def step(index, x, kept, seed):
        t = plan.times.to(x.dtype).index_select(0, index.view(1)).expand(x.shape[0])
        c = torch.ones(x.shape[0])
        return plan.step(index, x, denoiser(x, t, c), denoiser(x, t, 0 * c), 0.5, kept, seed=seed)

    fast, counter = compiled(step, dynamic=True)
    for batch in (3, 5):
        ends = []
        for one in (step, fast):
            x = lgd.philox_normal((batch, 4, 8, 8), seed=1)
            kept = torch.zeros_like(x)
            for i in range(len(plan)):
                x, kept = one(torch.tensor(i), x, kept, torch.tensor(i))
            ends.append(x)
        torch.testing.assert_close(ends[1], ends[0], **FUSED)
    assert counter.frame_count == 1


def test_training_compiles_whole():
    """The gradient to omega goes through two steps."""
    omega = torch.rand(3, requires_grad=True)
    fast, counter = compiled(lambda omega: run(step, 3, steps=2, omega=omega).square().sum())
    (expected,) = torch.autograd.grad(run(step, 3, steps=2, omega=omega).square().sum(), omega)
    (found,) = torch.autograd.grad(fast(omega), omega)
    torch.testing.assert_close(found, expected, **FUSED_GRADIENT)
    assert counter.frame_count == 1


@pytest.mark.gpu
@pytest.mark.parametrize("impl", ["triton", "cuda"])
def test_a_captured_loop_draws_fresh_noise(impl):
    """A sampling loop is one CUDA graph. The seed is a tensor: set it, and a replay is the run of that seed."""
    if lgd.why_not("guided_step", impl, torch.empty(0, device="cuda")):
        pytest.skip("; ".join(lgd.why_not("guided_step", impl, torch.empty(0, device="cuda"))))
    times = torch.linspace(1, 0, 7, device="cuda")
    c, omega = torch.linspace(-1, 1, 4, device="cuda"), torch.linspace(0, 3, 4, device="cuda")
    start, seed = lgd.philox_normal((4, 4, 16, 16), seed=1, device="cuda"), torch.tensor(0, device="cuda")

    def loop():
        x = start
        for i in range(6):
            t, s = times[i].expand(4), times[i + 1].expand(4)
            cond, uncond = denoiser(x, t, c), denoiser(x, t, 0 * c)
            levels = SCHEDULE.levels(t, s)
            x = lgd.guided_step(x, cond, uncond, omega, levels, churn=0.5, seed=seed + (i << 32), impl=impl)
        return x

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        loop()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = loop()
    found = []
    for number in (3, 4, 3):
        seed.fill_(number)
        graph.replay()
        found.append(captured.clone())
        torch.testing.assert_close(found[-1], loop(), **FUSED)
    assert torch.equal(found[0], found[2]) and not torch.equal(found[0], found[1])
