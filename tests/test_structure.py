"""Check the rules of docs/design.md against the tree."""

import ast
import doctest
import importlib
import os
import re
import sys
from pathlib import Path

import pytest

import lgd_kernels as lgd
from lgd_kernels.runtime import impls

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "lgd_kernels"
OPS = impls.ops()
MADE = re.compile(r"\.(?!ci$).*|.*\.egg-info|__pycache__|build|dist|runs|v?env")  # generated folders


def folders():
    for folder, inside, _ in os.walk(ROOT):
        inside[:] = sorted(name for name in inside if not MADE.fullmatch(name))
        yield Path(folder)


def files(*endings, under=ROOT):
    found = [path for folder in folders() for path in sorted(folder.iterdir()) if path.is_file()]
    return [path for path in found if path.suffix in endings and path.is_relative_to(under)]


MODULE_FILES = files(".py", under=PACKAGE)
BENCHMARK_FILES = files(".py", under=ROOT / "benchmarks")
STUDIES = files(".py", under=ROOT / "examples")
KERNEL_FILES = files(".h", ".cpp", ".cu", ".cuh", under=ROOT / "csrc")
BINDING_FILES = files(".h", ".cpp", ".cu", ".cuh", under=ROOT / "python")
each_op = pytest.mark.parametrize("op", OPS)


def name_of(path):
    """Return the module of a file: lgd_kernels/ops/__init__.py is lgd_kernels.ops."""
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


MODULES = {name_of(path): path for path in MODULE_FILES}
OUTSIDE = {name_of(path): path for path in BENCHMARK_FILES + STUDIES}


def imports(path, lazily=True):
    """Return the modules that a file imports; without `lazily`, only those imported at the top level."""
    found, nodes = set(), list(ast.parse(path.read_text()).body)
    while nodes:
        node = nodes.pop()
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path.name} imports relatively; a full name can be searched for"
            inner = (f"{node.module}.{alias.name}" for alias in node.names)
            known = MODULES.keys() | OUTSIDE.keys()
            found.update(name if name in known or name.endswith("._C") else node.module for name in inner)
        elif isinstance(node, ast.If) and getattr(node.test, "id", "") == "TYPE_CHECKING":
            nodes.extend(node.orelse)
        elif lazily or not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            nodes.extend(ast.iter_child_nodes(node))
    return found


def in_tree(path):
    return str(path.relative_to(ROOT))


def ours(modules):
    return {name for name in modules if name.split(".")[0] == "lgd_kernels"}


def code_of(path):
    """Return C++ without its comments."""
    return re.sub(r"//[^\n]*|/\*.*?\*/", "", path.read_text(), flags=re.DOTALL)


def included(path):
    return re.findall(r'#include\s*[<"]([^>"]+)[>"]', path.read_text())


def test_this_file_sees_the_tree():
    """Find files and imports at all: if a path moved, every rule below would hold of nothing."""
    assert len(OPS) >= 2 and len(MODULE_FILES) > 20 and len(KERNEL_FILES) > 10 and len(BINDING_FILES) > 4
    assert "lgd_kernels.runtime.levels" in imports(PACKAGE / "ops" / "guided_score" / "op.py")
    table = PACKAGE / "omega" / "table.py"
    assert imports(table) - imports(table, lazily=False)


@each_op
def test_an_op_is_complete(op):
    """Every layer has the files of an op under its name."""
    pieces = [PACKAGE / "ops" / op / file for file in ("__init__.py", "op.py", "reference.py")]
    pieces += [ROOT / "csrc" / op / f"{op}.h", ROOT / "python" / f"{op}.cpp", ROOT / "tests" / f"test_{op}.py"]
    pieces += [ROOT / "benchmarks" / f"{op}.py"]
    assert [in_tree(path) for path in pieces if not path.is_file()] == []


@each_op
def test_an_op_is_public(op):
    """Its function is in its own api.py or, if it takes a rule, in guidance/api.py."""
    homes = {f"lgd_kernels.ops.{op}.api", "lgd_kernels.guidance.api"}
    assert op in lgd.__all__ and getattr(lgd, op).__module__ in homes


@each_op
def test_an_implementation_has_a_launcher(op):
    offered = importlib.import_module(f"lgd_kernels.ops.{op}.op").IMPLEMENTATIONS
    assert "reference" in offered and set(offered) <= set(impls.NAMES)
    for impl in offered:
        generic = impl == "cpu" and isinstance(impls.launcher(op, impl), impls.Bindings)
        assert generic or (PACKAGE / "ops" / op / f"{impl}.py").is_file()


def test_no_files_without_an_op():
    """csrc/ and python/ hold nothing that belongs to no op."""
    assert {path.name for path in (ROOT / "csrc").iterdir()} == {"common", *OPS}
    cuda = {name for name in OPS if "cuda" in importlib.import_module(f"lgd_kernels.ops.{name}.op").IMPLEMENTATIONS}
    assert {path.stem for path in (ROOT / "python").glob("*.cpp")} == {
        "bindings",
        "omega_table",
        "philox",
        "rules",
        *OPS,
    }
    assert {path.stem for path in (ROOT / "python" / "cuda").glob("*.cpp")} == {"bindings", *cuda}


GROUPS = {  # each may import itself and these: no arrow runs upward
    "runtime": set(),
    "ops": {"runtime"},
    "guidance": {"runtime", "ops"},
    "sampling": {"runtime", "ops", "guidance"},
    "omega": {"runtime", "sampling"},
    "metrics": {"runtime", "ops"},
    "testing": {"runtime", "sampling", "omega"},
    "learn": {"runtime", "ops", "guidance", "sampling", "omega", "metrics"},
    "integrations": {"runtime", "ops", "guidance", "sampling", "omega", "__init__"},
    "__main__": {"runtime", "learn", "__init__"},
}


def group_of(name):
    """Return the group of a module: ops for lgd_kernels.ops.moments.api, __init__ for lgd_kernels itself."""
    return name.split(".")[1] if "." in name else "__init__"


@pytest.mark.parametrize("path", [path for path in MODULE_FILES if path != PACKAGE / "__init__.py"], ids=name_of)
def test_import_arrows(path):
    group = group_of(name_of(path))
    reached = {group_of(name) for name in ours(imports(path))} - {group}
    assert reached <= GROUPS[group], f"{name_of(path)} imports {sorted(reached - GROUPS[group])}"


def test_every_group_is_listed():
    """No other module lies at the top of the package."""
    assert {group_of(name) for name in MODULES} == {*GROUPS, "__init__"}


@pytest.mark.parametrize("modules", [MODULES, OUTSIDE], ids=["lgd_kernels", "outside"])
def test_no_import_circles(modules):
    """Imports inside functions count too."""
    arrows = {name: (imports(path) & modules.keys()) - {name} for name, path in modules.items()}
    while leaves := {name for name, reached in arrows.items() if not reached}:
        arrows = {name: reached - leaves for name, reached in arrows.items() if name not in leaves}
    while sources := arrows.keys() - set().union(*arrows.values()):
        arrows = {name: reached for name, reached in arrows.items() if name not in sources}
    assert arrows == {}


@pytest.mark.parametrize("path", files(".py", under=PACKAGE / "ops"), ids=name_of)
def test_an_op_knows_no_other(path):
    """Each op can be read, changed and removed alone."""
    if path.parent.name == "ops":
        assert imports(path) == set()
        return
    own = f"lgd_kernels.ops.{path.parent.name}"
    assert [name for name in imports(path) if name.startswith("lgd_kernels.ops") and not name.startswith(own)] == []


def functions_of_ops():
    """Yield (file, function, whether it is a Triton kernel) for every function in ops/."""
    for path in files(".py", under=PACKAGE / "ops"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                yield path, node, any("triton.jit" in ast.unparse(one) for one in node.decorator_list)


def test_functions_of_ops_take_few_positions():
    """At most eight; keyword-only arguments, which public functions have, do not count."""
    long = [
        f"{in_tree(path)}: {node.name}"
        for path, node, compiled in functions_of_ops()
        if not compiled and len(node.args.posonlyargs) + len(node.args.args) > 8
    ]
    assert long == []


def test_kernels_take_few_parameters():
    """At most 32: Triton's binder pays for each in every launch."""
    kernels = [(path, node) for path, node, compiled in functions_of_ops() if compiled and node.name.endswith("kernel")]
    assert len(kernels) > 10
    assert [node.name for _, node in kernels if len(node.args.args) > 32] == []


def test_the_formatter_formats_nearly_everything():
    """The formatter leaves each line with `# fmt: skip` as it is, so few have one."""
    written = MODULE_FILES + BENCHMARK_FILES + files(".py", under=ROOT / "examples")
    assert sum(path.read_text().count("# fmt: " + "skip") for path in written) < 40


INSIDE = {  # which files of an op may import which others of it; op.py imports launchers lazily, by name
    "reference": set(),
    "triton": {
        "triton_backward",
        "triton_finish",
        "triton_particles",
        "triton_points",
        "triton_tiles",
        "triton_values",
    },
    "triton_backward": {"triton_particles"},
    "triton_finish": set(),
    "triton_particles": set(),
    "triton_points": {"triton_values"},
    "triton_tiles": {"triton_values"},
    "triton_values": set(),
    "cpu": set(),
    "cuda": set(),
    "op": {"reference"},
}
WORDS = {"structs", "targets", "statistics", "kernels"}  # structs that every file of an op may use


@pytest.mark.parametrize("path", files(".py", under=PACKAGE / "ops"), ids=name_of)
def test_arrows_inside_an_op(path):
    own = f"lgd_kernels.ops.{path.parent.name}."
    reached = {name.removeprefix(own) for name in imports(path) if name.startswith(own)} - WORDS
    assert path.stem not in INSIDE or reached <= INSIDE[path.stem]


@pytest.mark.parametrize("path", files(".py", under=PACKAGE / "omega"), ids=name_of)
def test_omega_knows_no_op(path):
    """Of sampling, omega imports the schedules only."""
    reached = {name for name in ours(imports(path)) if group_of(name) == "sampling"}
    assert reached <= {"lgd_kernels.sampling.schedules"}


@pytest.mark.parametrize("path", MODULE_FILES, ids=name_of)
def test_triton_and_the_extension_are_imported_lazily(path):
    """`import lgd_kernels` works without them, and does not wait for them."""
    if path.stem.startswith("triton"):
        return
    heavy = re.compile(r"triton(\..*)?|lgd_kernels\.(_C|runtime\.triton_common|ops\.\w+\.(triton|cpu|cuda))")
    assert [name for name in imports(path, lazily=False) if heavy.fullmatch(name)] == []


@pytest.mark.parametrize("path", MODULE_FILES, ids=name_of)
def test_only_torch_and_numpy_are_imported_by_all(path):
    """Other packages are optional, or imported where they are used."""
    allowed = {"lgd_kernels", "torch", "numpy", *sys.stdlib_module_names}
    if path.stem.startswith("triton"):
        allowed.add("triton")
    if path.parent == PACKAGE / "integrations":
        allowed.add(path.stem.split("_")[0])  # its namesake: diffusers.py and diffusers_scheduler.py, diffusers
    assert {name.split(".")[0] for name in imports(path, lazily=False)} <= allowed


def test_nothing_knows_its_integrations():
    """They are leaves: the package works without the libraries that they plug into."""
    outside = [path for path in MODULE_FILES if not path.is_relative_to(PACKAGE / "integrations")]
    assert [name_of(path) for path in outside if any("integrations" in name for name in imports(path))] == []


def test_public_names_are_only_imported():
    """The package's own file only imports names."""
    body = ast.parse((PACKAGE / "__init__.py").read_text()).body
    assert [node for node in body if isinstance(node, ast.If) and ast.unparse(node.test) != "TYPE_CHECKING"] == []
    assert all(isinstance(node, (ast.Expr, ast.Import, ast.ImportFrom, ast.Assign, ast.If)) for node in body)
    assert sorted(lgd.__all__) == sorted(set(lgd.__all__)) and all(hasattr(lgd, name) for name in lgd.__all__)


@each_op
def test_a_workload_file_only_declares(op):
    """The runner verifies and times all of them alike."""
    beside = {"benchmarks.workload", "lgd_kernels", "lgd_kernels.testing"}
    beside |= {f"lgd_kernels.runtime.{name}" for name in ("arguments", "columns", "levels")}
    beside |= {f"lgd_kernels.ops.{op}{part}" for part in ("", ".reference", ".structs")}  # a reference takes a struct
    imported = imports(ROOT / "benchmarks" / f"{op}.py")
    assert "benchmarks.workload" in imported
    assert {op for op in imported if op.startswith("benchmarks") or op in MODULES} <= beside


def test_workloads_of_rules_only_declare():
    """Workloads of rules only declare, too."""
    imported = imports(ROOT / "benchmarks" / "rules.py")
    beside = {
        "benchmarks.providers",
        "benchmarks.workload",
        "lgd_kernels",
        "lgd_kernels.runtime.levels",
        "lgd_kernels.guidance.rules",
    }
    beside |= {"lgd_kernels.testing"}
    assert {name for name in imported if name.startswith("benchmarks") or name in MODULES} <= beside


def test_benchmarks_and_examples_stay_outside():
    """The package imports neither; examples import benchmarks, and not the other way round."""
    assert [path.name for path in BENCHMARK_FILES if len(path.read_text().splitlines()) > 200] == []
    for paths, outside in ((MODULE_FILES, ("benchmarks", "examples")), (BENCHMARK_FILES, ("examples",))):
        assert [name_of(path) for path in paths if any(name.startswith(outside) for name in imports(path))] == []


@each_op
def test_python_binds_each_op(op):
    """Its binding registers itself. A header of the op's structs serves the CPU and CUDA."""
    binding = ROOT / "python" / f"{op}.cpp"
    headers = [binding, *(path for path in [binding.with_suffix(".h")] if path.is_file())]
    assert f"../csrc/{op}/{op}.h" in {op for path in headers for op in included(path)}
    assert "const Binding binding(" in binding.read_text()


@pytest.mark.parametrize(
    "path", [path for path in MODULE_FILES + BENCHMARK_FILES + STUDIES if path.stat().st_size], ids=name_of
)
def test_modules_say_what_they_are_for(path):
    assert ast.get_docstring(ast.parse(path.read_text()))


@pytest.mark.parametrize("name", lgd.__all__)
def test_public_names_have_an_example(name):
    """The example is in their docstring, or in that of one of their methods."""
    tests = doctest.DocTestFinder(exclude_empty=True).find(getattr(lgd, name), name)
    assert getattr(lgd, name).__doc__ and any(test.examples for test in tests)


@pytest.mark.parametrize("path", [path for path in MODULE_FILES if ">>> " in path.read_text()], ids=name_of)
def test_examples_run(path):
    if path.name.startswith("diffusers"):
        pytest.importorskip("diffusers")
    module = importlib.import_module(name_of(path))
    runner = doctest.DocTestRunner(verbose=False)
    said = []
    for test in doctest.DocTestFinder(exclude_empty=True).find(module):
        runner.run(test, out=said.append)
    assert runner.summarize(verbose=False).failed == 0, "".join(said)
    assert runner.tries


def test_version_is_said_once_more_in_the_metadata():
    metadata = (ROOT / "pyproject.toml").read_text()
    assert f'version = "{lgd.__version__}"' in metadata


def test_no_empty_folders():
    """No folder is kept for symmetry."""
    assert [in_tree(path) for path in folders() if set(os.listdir(path)) <= {"__pycache__"}] == []


def test_packages_are_packages():
    """The wheel leaves out a folder without __init__.py."""
    homes = {path.parent for path in MODULE_FILES}
    assert [in_tree(home) for home in homes if not (home / "__init__.py").is_file()] == []


TEXT = files(".py", ".h", ".cpp", ".cu", ".cuh", ".md", ".toml", ".txt", ".yml", ".yaml", ".json", "")


@pytest.mark.parametrize("path", files(".py", ".h", ".cpp", ".cu", ".cuh"), ids=in_tree)
def test_files_are_short(path):
    assert len(path.read_text().splitlines()) <= 400


def test_no_machine_paths():
    pattern = re.compile(r"(?<![\w.])/(home|root|work|Users|mnt)/\w")
    assert [path.name for path in TEXT if pattern.search(path.read_text())] == []


def test_no_banners_and_no_loose_ends():
    """Sections are files and functions; a TODO names its follow-up."""
    banner, loose = re.compile(r"^\s*(#|//)\s*[-=*#]{4,}", re.MULTILINE), re.compile(r"\b(TODO|FIXME|XXX)\b(?! ?\()")
    written = [path for path in TEXT if path.suffix in (".py", ".h", ".cpp", ".cu", ".cuh") and path != Path(__file__)]
    assert [path.name for path in written if banner.search(path.read_text()) or loose.search(path.read_text())] == []
