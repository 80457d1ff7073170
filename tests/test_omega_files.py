"""Test files of omega: what `load` returns, what it refuses, and how `save` writes."""

import errno
import json
import os
import pickle
import sys

import pytest
import torch
from test_omega import FLOW, SCHEDULES, times

import lgd_kernels as lgd
from lgd_kernels.omega import files
from lgd_kernels.omega.files import described, load, save, schedule_of
from lgd_kernels.omega.forms import ClampLinear, Constant, Interval
from lgd_kernels.omega.network import OmegaNetwork
from lgd_kernels.omega.table import TableModule


def everything():
    torch.manual_seed(0)
    knots = torch.linspace(0, 1, 3)
    return {
        "network": OmegaNetwork(FLOW, classes=3, hidden=8),
        "network of Discrete": OmegaNetwork(lgd.Discrete.ddpm(20), embedding=4, hidden=8).double(),
        "table": lgd.OmegaTable(torch.rand(2, 3, 3).half(), knots, knots),
        "constant": Constant(0.5),
        "interval": Interval(0.95, 0.2, 0.8),
        "clamp-linear": ClampLinear(1.0, -0.5),
    }


def arguments(omega, schedule):
    count = torch.arange(4) % 2
    return (torch.randn(4, 4) if getattr(omega, "embedding", None) else count, *times(4, schedule))


@pytest.mark.parametrize("name", everything())
def test_comes_back_bit_for_bit(name, tmp_path):
    omega = everything()[name]
    schedule = getattr(omega, "schedule", FLOW)
    save(tmp_path / "omega", omega, schedule)
    state = torch.get_rng_state()
    again = load(tmp_path / "omega", schedule)
    assert torch.equal(torch.get_rng_state(), state) and type(again) is type(omega)
    assert os.listdir(tmp_path) == ["omega"]
    where = arguments(omega, schedule)
    assert torch.equal(again(*where), omega(*where))
    if isinstance(again, torch.nn.Module):
        again(*where).sum().backward()  # training can continue
        assert all(p.requires_grad and p.grad is not None for p in again.parameters())
        before, after = omega.state_dict(), again.state_dict()
        assert all(before[key].dtype == after[key].dtype for key in before)


@pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda schedule: type(schedule).__name__)
def test_schedules_are_described_exactly(schedule):
    text = json.dumps(described(schedule))
    again = schedule_of(json.loads(text))
    assert described(again) == described(schedule) and type(again) is type(schedule)
    s, t = times(5, schedule)
    assert all(torch.equal(a, b) for a, b in zip(again.levels(t, s), schedule.levels(t, s), strict=True))
    assert all(described(schedule) != described(other) for other in SCHEDULES if other is not schedule)


def rewrite(path, header=None, drop=None, **tensors):
    """Write the same file with another header or other tensors."""
    from safetensors import safe_open
    from safetensors.torch import save_file

    with safe_open(path, framework="pt") as file:
        found = file.metadata(), {name: file.get_tensor(name) for name in file.keys() if name != drop}
    entries = {name: text for name, text in {**found[0], **(header or {})}.items() if text is not None}
    save_file({**found[1], **tensors}, path, entries)


FOREIGN = {
    "version": ({"header": {"version": "2"}}, "has version 2, expected 1; update"),
    "kind": ({"header": {"kind": "oracle"}}, "holds a oracle, expected one of network"),
    "format": ({"header": {"format": "other"}}, "holds no omega: its format is other"),
    "header": ({"header": {"settings": "{"}}, "the header of .* cannot be read"),
    "schedule": ({"header": {"schedule": '{"name": "Mine"}'}}, "the schedule is Mine, expected one of"),
    "unknown setting": ({"header": {"settings": '{"depth": 3}'}}, "does not hold what its header says"),
    "size": ({"header": {"settings": '{"classes": 3, "hidden": 1000000000}'}}, r"expected floats \[1000000000"),
    "kind of others": ({"header": {"kind": "table"}}, "expected values, s_knots, t_knots"),
    "missing": ({"drop": "head.0.bias"}, "it holds the tensors"),
    "too many": ({"more": torch.zeros(1)}, "it holds the tensors"),
    "shape": ({"head.0.bias": torch.zeros(9)}, r"`head.0.bias` is torch.float32 \[9\], expected floats \[8\]"),
    "dtype": ({"head.0.bias": torch.zeros(8, dtype=torch.int64)}, "`head.0.bias` is torch.int64"),
    "NaN": ({"head.0.bias": torch.full((8,), torch.nan)}, "`head.0.bias` is not finite"),
}


@pytest.mark.parametrize("case", FOREIGN)
def test_refuses_what_does_not_fit(case, tmp_path):
    change, message = FOREIGN[case]
    save(tmp_path / "omega", OmegaNetwork(FLOW, classes=3, hidden=8))
    rewrite(tmp_path / "omega", **change)
    with pytest.raises(ValueError, match=message):
        load(tmp_path / "omega")


def test_refuses_other_files(tmp_path):
    class Trap:
        def __reduce__(self):
            return (exec, ("raise SystemExit('a pickle was executed')",))

    (tmp_path / "pickle").write_bytes(pickle.dumps(Trap()))
    (tmp_path / "empty").write_bytes(b"")
    save(tmp_path / "cut", Constant(1.0))
    (tmp_path / "cut").write_bytes((tmp_path / "cut").read_bytes()[:-1])
    for name in ("pickle", "empty", "cut"):
        with pytest.raises(ValueError, match="is no safetensors file, or a damaged one"):
            load(tmp_path / name)
    from safetensors.torch import save_file

    save_file({"weight": torch.zeros(2)}, tmp_path / "foreign")
    with pytest.raises(ValueError, match="holds no omega: its format is None"):
        load(tmp_path / "foreign")
    with pytest.raises(FileNotFoundError):
        load(tmp_path / "nothing")


def test_refuses_another_schedule(tmp_path):
    save(tmp_path / "omega", OmegaNetwork(lgd.Discrete.ddpm(20), 3, hidden=8))
    with pytest.raises(
        ValueError, match=r"was saved with the schedule Discrete of 20 steps, expected RectifiedFlow\(\)"
    ):
        load(tmp_path / "omega", FLOW)
    with pytest.raises(ValueError, match="was saved with the schedule"):
        load(tmp_path / "omega", lgd.Discrete.ddpm(21))
    with pytest.raises(ValueError, match="but omega was made for"):
        save(tmp_path / "omega", OmegaNetwork(FLOW, 3), lgd.EDM())
    with pytest.raises(ValueError, match="`schedule` is missing; the times of a table"):
        save(tmp_path / "omega", everything()["table"])
    with pytest.raises(TypeError, match="`omega` is a Linear, expected one of OmegaNetwork"):
        save(tmp_path / "omega", torch.nn.Linear(1, 1))

    class Own(lgd.RectifiedFlow):
        pass

    with pytest.raises(TypeError, match="`schedule` is a Own.*cannot be saved"):
        save(tmp_path / "omega", Interval(1.0, 0.0, 1.0), Own())


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    save(tmp_path / "omega", Constant(1.0))

    def broken(descriptor):
        raise OSError("disk full")

    monkeypatch.setattr(os, "fsync", broken)
    with pytest.raises(OSError, match="disk full"):
        save(tmp_path / "omega", Constant(2.0))
    assert os.listdir(tmp_path) == ["omega"] and float(load(tmp_path / "omega").omega.detach()) == 1.0


def test_a_file_that_changes_does_not_reach_what_was_loaded(tmp_path):
    """Rewrite a loaded file in place, then truncate it: a mapped tensor would change, then end the process."""
    for name, weight in (("omega", 0.5), ("other", 2.0)):
        knots = torch.linspace(0, 1, 64)
        save(tmp_path / name, lgd.OmegaTable(torch.full((10, 64, 64), weight), knots, knots), FLOW)
    table = load(tmp_path / "omega")
    with open(tmp_path / "omega", "r+b") as file:
        file.write((tmp_path / "other").read_bytes())
        assert bool((table.values == 0.5).all())
        file.truncate(100)
    assert bool((table.values == 0.5).all()) and table.s_knots[-1] == 1
    save(tmp_path / "omega", table, FLOW)  # to the file that it was loaded from
    assert torch.equal(load(tmp_path / "omega").values, table.values)


def test_every_bit_counts(tmp_path):
    path = tmp_path / "omega"
    save(path, Constant(0.5))
    content = path.read_bytes()
    for place in range(8 * len(content)):
        damaged = bytearray(content)
        damaged[place // 8] ^= 1 << place % 8
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match="load: .*omega"):
            load(path)
    for end in range(len(content)):
        path.write_bytes(content[:end])
        with pytest.raises(ValueError, match="load: .*omega"):
            load(path)
    path.write_bytes(content + b"0")
    with pytest.raises(ValueError, match="load: .*omega"):
        load(path)


def test_a_value_that_was_changed_is_damage(tmp_path):
    save(tmp_path / "omega", Constant(1.0))
    content = (tmp_path / "omega").read_bytes()
    (tmp_path / "omega").write_bytes(content[:-4] + torch.tensor(2.0).numpy().tobytes())
    with pytest.raises(ValueError, match="omega is damaged: its digest does not match"):
        load(tmp_path / "omega")
    (tmp_path / "omega").write_bytes(content[:-4] + torch.tensor(torch.nan).numpy().tobytes())
    with pytest.raises(ValueError, match=r"`omega` is not finite \(its digest does not match"):
        load(tmp_path / "omega")


@pytest.mark.parametrize("name", everything())
def test_the_first_files_had_no_digest(name, tmp_path):
    omega = everything()[name]
    save(tmp_path / "omega", omega, schedule := getattr(omega, "schedule", FLOW))
    rewrite(tmp_path / "omega", header={"digest": None})
    where = arguments(omega, schedule)
    assert torch.equal(load(tmp_path / "omega", schedule)(*where), omega(*where))
    rewrite(tmp_path / "omega", header={"later": "an entry that came after the digest"})
    with pytest.raises(ValueError, match="is damaged: its digest"):
        load(tmp_path / "omega")


NAN, INF = float("nan"), float("inf")
REFUSED_TABLES = {
    "NaN": ({"values": torch.tensor([[[1.0, NAN, 1.0]]])}, "`values` is not finite"),
    "infinite": ({"values": torch.tensor([[[1.0, INF, 1.0]]])}, "`values` is not finite"),
    "infinite knot": ({"t_knots": torch.tensor([0.1, 0.5, INF])}, "`t_knots` is not finite"),
    "NaN knot": ({"s_knots": torch.tensor([NAN])}, "`s_knots` is not finite"),
    "unsorted": ({"t_knots": torch.tensor([0.1, 0.9, 0.5])}, "`t_knots` must increase strictly"),
    "twice": ({"t_knots": torch.tensor([0.1, 0.5, 0.5])}, "`t_knots` must increase strictly"),
    "half knots": ({"t_knots": torch.tensor([0.1, 0.5, 0.9]).half()}, "`t_knots` has dtype torch.float16"),
    "integers": ({"values": torch.ones(1, 1, 3).long()}, "`values` is torch.int64"),
    "shape": ({"values": torch.ones(1, 3, 1)}, "`s_knots` has shape"),
    "empty": ({"values": torch.ones(0, 1, 3)}, "`values` is "),
}


@pytest.mark.parametrize("digest", [True, False])
@pytest.mark.parametrize("case", REFUSED_TABLES)
def test_refuses_tables(case, digest, tmp_path):
    """Check invalid tables, with a digest that matches and with none."""
    change, message = REFUSED_TABLES[case]
    save(tmp_path / "omega", lgd.OmegaTable(torch.ones(1, 1, 3), torch.zeros(1), torch.tensor([0.1, 0.5, 0.9])), FLOW)
    rewrite(tmp_path / "omega", **({} if digest else {"header": {"digest": None}}), **change)
    with pytest.raises(ValueError, match=f"load: .*omega .*{message}"):
        load(tmp_path / "omega")


ABSURD = [
    '{"name": "EDM", "sigma_min": 80.0, "sigma_max": 0.002, "rho": 7.0}',
    '{"name": "EDM", "sigma_min": -1.0, "sigma_max": 80.0, "rho": 7.0}',
    '{"name": "EDM", "sigma_min": 0.002, "sigma_max": NaN, "rho": 7.0}',
    '{"name": "EDM", "sigma_min": 0.002, "sigma_max": Infinity, "rho": 7.0}',
    '{"name": "EDM", "sigma_min": 0.002, "sigma_max": 80.0, "rho": 0.0}',
    '{"name": "EDM", "sigma_min": "low", "sigma_max": 80.0, "rho": 7.0}',
    '{"name": "VPLinear", "beta_min": -0.1, "beta_max": -20.0, "scaled": false}',
    '{"name": "VPLinear", "beta_min": -0.1, "beta_max": 20.0, "scaled": false}',
    '{"name": "VPLinear", "beta_min": -0.1, "beta_max": 20.0, "scaled": true}',
    '{"name": "VPLinear", "beta_min": 0.0, "beta_max": 0.0, "scaled": false}',
    '{"name": "VPLinear", "beta_min": 0.1, "beta_max": NaN, "scaled": false}',
    '{"name": "Discrete", "alphas_cumprod": ["float32", [0.9, 1.5]], "dtype": "float32"}',
    '{"name": "Discrete", "alphas_cumprod": ["float32", [0.9, -0.5]], "dtype": "float32"}',
    '{"name": "Discrete", "alphas_cumprod": ["float32", [0.5, 0.9]], "dtype": "float32"}',
    '{"name": "Discrete", "alphas_cumprod": ["float32", [0.9, NaN]], "dtype": "float32"}',
    '{"name": "Discrete", "alphas_cumprod": ["float32", []], "dtype": "float32"}',
    '{"name": "Discrete", "alphas_cumprod": ["int64", [1, 0]], "dtype": "float32"}',
    '{"name": "Discrete", "alphas_cumprod": 3, "dtype": "float32"}',
    '{"name": "Discrete"}',
    '{"name": "RectifiedFlow", "shift": 3.0}',
    '["RectifiedFlow"]',
    "3",
    "null",
    "[" * 100_000,
]


@pytest.mark.parametrize("schedule", ABSURD, ids=lambda text: text[:80])
def test_refuses_absurd_schedules(schedule, tmp_path):
    save(tmp_path / "omega", Interval(1.0, 0.2, 0.8), FLOW)
    rewrite(tmp_path / "omega", header={"schedule": schedule, "digest": None})
    with pytest.raises(ValueError, match="load: the header of .*omega (cannot be read|names no schedule)"):
        load(tmp_path / "omega")


def test_refuses_what_is_no_file(tmp_path):
    with pytest.raises(ValueError, match=f"load: {tmp_path} is a folder or a device"):
        load(tmp_path)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ValueError, match="load: .*pipe is a folder or a device"):
        load(tmp_path / "pipe")


@pytest.mark.parametrize(
    "omega",
    [
        lambda: lgd.OmegaTable(torch.tensor([[[NAN]]]), torch.zeros(1), torch.ones(1)),
        lambda: Interval(1.0, 0.0, INF),
        lambda: spoiled(OmegaNetwork(FLOW)),
    ],
)
def test_saves_only_what_can_be_loaded(omega, tmp_path):
    with pytest.raises(ValueError, match="save: `omega` could not be loaded again: `.*` is not finite"):
        save(tmp_path / "omega", omega(), FLOW)
    assert os.listdir(tmp_path) == []


def spoiled(network):
    torch.nn.init.constant_(network.head[-1].bias, NAN)
    return network


def test_writes_under_a_random_name(tmp_path, monkeypatch):
    """Check that temporary names are random, and that no file is left after a failure."""
    names = []

    def broken(source, target):
        names.append(source.name)
        raise OSError("cannot replace")

    monkeypatch.setattr(os, "replace", broken)
    for _ in range(2):
        with pytest.raises(OSError, match="cannot replace"):
            save(tmp_path / "omega", Constant(1.0))
    assert names[0] != names[1] and str(os.getpid()) not in names[0][1:8] and os.listdir(tmp_path) == []


def test_an_error_names_the_file_that_was_asked_for(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"'.*nowhere/omega'"):
        save(tmp_path / "nowhere" / "omega", Constant(1.0))
    (tmp_path / "folder").mkdir()
    with pytest.raises(OSError, match="'.*/folder'"):
        save(tmp_path / "folder", Constant(1.0))
    (tmp_path / "file").touch()
    with pytest.raises(NotADirectoryError, match="'.*/file/omega'"):
        save(tmp_path / "file" / "omega", Constant(1.0))
    assert sorted(os.listdir(tmp_path)) == ["file", "folder"] and os.listdir(tmp_path / "folder") == []


def test_a_full_disk_names_the_file_too(tmp_path, monkeypatch):
    def full(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left on device: '.*/omega'"):
        save(tmp_path / "omega", Constant(1.0))
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("path", [None, 3, b"omega", "", "a\0b"], ids=repr)
def test_a_path_that_names_no_file_is_named(path):
    for where, call in (("save", lambda: save(path, Constant(1.0))), ("load", lambda: load(path))):
        with pytest.raises((TypeError, ValueError), match=f"^{where}: `path` is .*, expected the name of a file$"):
            call()


def test_says_how_a_table_that_was_trained_is_saved(tmp_path):
    module = TableModule(everything()["table"])
    with pytest.raises(TypeError, match=r"`omega` is a TableModule, expected .*; its table\(\) is one"):
        save(tmp_path / "omega", module, lgd.EDM())
    save(tmp_path / "omega", module.table(), lgd.EDM())


def test_files_have_the_cpu_for_their_device(tmp_path):
    """Check that `load` returns CPU tensors under any default device."""
    save(tmp_path / "omega", everything()["table"], lgd.EDM())
    torch.set_default_device("meta")
    try:
        again = load(tmp_path / "omega")
    finally:
        torch.set_default_device(None)
    assert again.values.device.type == again.s_knots.device.type == "cpu"


def test_a_file_has_the_permissions_of_any_new_file(tmp_path):
    save(tmp_path / "omega", Constant(1.0))
    (tmp_path / "plain").touch()
    assert (tmp_path / "omega").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_says_what_is_missing(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "safetensors", None)
    with pytest.raises(ImportError, match="pip install safetensors"):
        files.save(tmp_path / "omega", Constant(1.0))
    assert os.listdir(tmp_path) == []
