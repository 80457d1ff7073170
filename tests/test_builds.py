"""How setup.py builds the extensions, why a build failed, and which build a checkout loads (runtime/builds.py).

Compilers here are scripts that write empty files or fail: what they are asked to do is what is tested.
"""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from lgd_kernels.runtime import builds, impls

pytest.importorskip("pybind11")
pytest.importorskip("setuptools", minversion="77")
ROOT = Path(__file__).parents[1]
WORKS = """#!/bin/sh
# writes the digest, and no more, into the file after -o
digest=$(cat build/temp*/source_digest.h | cut -d '"' -f 2)
while [ $# -gt 1 ]; do [ "$1" = -o ] && echo "lgd-sources-$digest" > "$2"; shift; done
exit 0
"""
NO_OPENMP = (
    '#!/bin/sh\ncase " $* " in *" -fopenmp "*) echo "clang: error: no library -lomp" >&2; exit 1;; esac\n' + WORKS
)
BROKEN = (
    '#!/bin/sh\ncase "$*" in *one_cpu.cpp*) echo warming up; echo "one_cpu.cpp:3: error: no such name"; exit 1;; esac\n'
    + WORKS
)
NOTE, CUDA_NOTE = "lgd_kernels/_C.failed.log", "lgd_kernels/_C_cuda.failed.log"


def script(path, text):
    path.write_text(text)
    path.chmod(0o755)
    return str(path)


@pytest.fixture
def checkout(tmp_path):
    """Return a checkout with one source of each kind."""
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE", "MANIFEST.in", "lgd_kernels/runtime/builds.py"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    for name in ("csrc/one/one_cpu.cpp", "csrc/one/one_cuda.cu", "python/bindings.cpp", "lgd_kernels/__init__.py"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("")
    return tmp_path


@pytest.fixture
def build(checkout):
    """Run a command of setup.py with this compiler."""

    def run(compiler=WORKS, *arguments, **environment):
        path = script(checkout / "compiler", compiler) if compiler else "/no/such/compiler"
        kept = {
            name: value for name, value in os.environ.items() if not name.startswith(("LGD_", "CFLAGS", "CXXFLAGS"))
        }
        environment = {**kept, "CC": path, "CXX": path, "NVCC": "none", "LGD_BUILD_JOBS": "1", **environment}
        arguments = arguments or ("setup.py", "-q", "build_ext", "--inplace")
        return subprocess.run(
            [sys.executable, *arguments],
            cwd=checkout,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=120,
        )

    return run


def made(checkout, name="_C"):
    return builds.extension_in(checkout / "lgd_kernels", name)


def test_a_build_that_works_leaves_no_note(checkout, build):
    (checkout / NOTE).write_text("of an earlier build")
    (checkout / CUDA_NOTE).write_text("of an earlier build, with nvcc")
    run = build()
    assert run.returncode == 0 and made(checkout), run.stdout
    assert not (checkout / NOTE).exists() and not (checkout / CUDA_NOTE).exists()


def test_no_compiler(checkout, build):
    """The build goes on, and the note says what could not be run."""
    run = build(compiler=None)
    assert run.returncode == 0 and made(checkout) is None, run.stdout
    first, command, *_ = (checkout / NOTE).read_text().splitlines()
    assert first == "its build failed: error: /no/such/compiler cannot be run: No such file or directory"
    assert command.startswith("$ /no/such/compiler ") and command.endswith(".o")


def test_no_openmp(checkout, build):
    """A compiler without OpenMP builds for one thread, vectorised all the same, and the note says why."""
    logging = f'#!/bin/sh\necho "$*" >> {checkout}/log\n'
    run = build(NO_OPENMP.replace("#!/bin/sh\n", logging, 1))
    assert run.returncode == 0 and made(checkout), run.stdout
    first, command, said = (checkout / NOTE).read_text().split("\n", 2)
    assert first == "built without OpenMP, to run on one thread: clang: error: no library -lomp"
    assert command.startswith("$ ") and " -fopenmp" in command and said == "clang: error: no library -lomp\n"
    compiled = [line for line in (checkout / "log").read_text().splitlines() if "one_cpu.cpp" in line]
    assert len(compiled) == 1 and "-fopenmp-simd" in compiled[0] and "-fopenmp " not in compiled[0]
    assert build().returncode == 0 and (checkout / NOTE).exists()  # nothing to do: it is still that build
    assert build(WORKS, "setup.py", "-q", "build_ext", "--inplace", "--force").returncode == 0
    assert not (checkout / NOTE).exists()


def test_a_source_that_does_not_compile(checkout, build):
    """The note has the command and its last lines; an extension built in place before stays."""
    assert build().returncode == 0
    before = made(checkout)
    (checkout / "csrc/one/one_cpu.cpp").write_text("// newer")
    run = build(BROKEN)
    assert run.returncode == 0, run.stdout
    first, command, *said = (checkout / NOTE).read_text().splitlines()
    assert first == "its build failed: one_cpu.cpp:3: error: no such name"
    assert "csrc/one/one_cpu.cpp" in command and said == ["warming up", "one_cpu.cpp:3: error: no such name"]
    assert made(checkout) == before
    assert list(checkout.glob("build/lib*/lgd_kernels/_C.*so")) == []  # so a wheel would not contain the old one


def test_a_required_extension_says_why_at_the_end(checkout, build):
    run = build(NO_OPENMP.replace(WORKS, BROKEN), LGD_REQUIRE_EXT="1")
    assert run.returncode == 1
    *_, title, command, warming, error = run.stdout.strip().splitlines()
    assert title == "error: lgd_kernels._C: its build failed: one_cpu.cpp:3: error: no such name"
    assert command.startswith("$ ") and (warming, error) == ("warming up", "one_cpu.cpp:3: error: no such name")
    assert (checkout / NOTE).is_file()


def test_nvcc_that_fails(checkout, build):
    """The CUDA kernels are left out, and the CPU kernels are built."""
    nvcc = script(
        checkout / "nvcc", '#!/bin/sh\necho "nvcc fatal   : Unsupported gpu architecture compute_1"\nexit 1\n'
    )
    run = build(NVCC=nvcc, LGD_REQUIRE_EXT="1")
    assert run.returncode == 0 and made(checkout) and made(checkout, "_C_cuda") is None, run.stdout
    first, command, *_ = (checkout / CUDA_NOTE).read_text().splitlines()
    assert first == "its build failed: nvcc fatal   : Unsupported gpu architecture compute_1"
    assert command.startswith(f"$ {nvcc} ") and not (checkout / NOTE).exists()


@pytest.mark.parametrize("compiler", [WORKS, None], ids=["works", "none"])
def test_an_editable_install_is_a_path_file(checkout, build, compiler):
    """mypy and pyright follow a path, not a finder's hook; and a build that fails leaves the install whole."""
    code = "from setuptools import build_meta; build_meta.build_editable('wheels')"
    run = build(compiler, "-c", code)
    assert run.returncode == 0, run.stdout
    assert bool(made(checkout)) == bool(compiler) != (checkout / NOTE).is_file()
    (wheel,) = (checkout / "wheels").glob("*.whl")
    shutil.unpack_archive(wheel, checkout / "site", "zip")
    (path,) = [path for path in (checkout / "site").iterdir() if path.suffix == ".pth"]
    assert path.read_text().strip() == str(checkout)
    assert list((checkout / "site").glob("*finder*")) == []


def test_a_wheel_holds_the_note(checkout, build):
    """`info` can then show the note, wherever the package was installed."""
    run = build(None, "-c", "from setuptools import build_meta; build_meta.build_wheel('wheels')")
    assert run.returncode == 0, run.stdout
    (wheel,) = (checkout / "wheels").glob("*.whl")
    shutil.unpack_archive(wheel, checkout / "site", "zip")
    assert (checkout / "site" / NOTE).read_text().startswith("its build failed: error: /no/such/compiler")
    (entry,) = (checkout / "site").glob("*.dist-info/entry_points.txt")
    assert "lgd_kernels = lgd_kernels.__main__:command" in entry.read_text()


@pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")
def test_the_digest_is_compiled_in(checkout, build):
    """A change that no file time shows, such as a removed source, makes a new build."""
    shutil.copy(ROOT / "python" / "sources.h", checkout / "python" / "sources.h")
    (checkout / "python" / "bindings.cpp").write_text(
        '#include "sources.h"\nconst char* x() { return lgd::source_digest; }'
    )
    (checkout / "python" / "other.cpp").write_text("")
    compiler = '#!/bin/sh\nexec g++ "$@"\n'
    found = []
    for change in ("nothing", "remove"):
        if change == "remove":
            (checkout / "python" / "other.cpp").unlink()
        run = build(compiler)
        assert run.returncode == 0, run.stdout
        found.append(builds.digest_in(made(checkout)))
        assert found[-1] == builds.digest(checkout) != ""
    assert found[0] != found[1]


def test_the_digest_is_of_names_and_contents(checkout):
    first = builds.digest(checkout)
    source = checkout / "python" / "bindings.cpp"
    for text in (b"a\nb\n", b"a\r\nb\r\n"):
        source.write_bytes(text)
        os.utime(source, (0, len(text)))
        (checkout / "python" / "notes.swp").write_bytes(text)
        changed = builds.digest(checkout)
        assert changed != first
    source.write_bytes(b"a\nb\n")
    assert builds.digest(checkout) == changed  # however lines end
    source.rename(source.with_name("renamed.cpp"))
    assert builds.digest(checkout) not in (first, changed)
    shutil.rmtree(checkout / "csrc")
    assert builds.digest(checkout) == ""


@pytest.fixture
def installed(tmp_path):
    """Return a checkout without an extension, and a folder of packages with one built from the checkout's sources."""
    own = builds.extension_in(builds.PACKAGE, "_C") or pytest.skip("lgd_kernels._C is not built in place")
    checkout, site = tmp_path / "checkout", tmp_path / "site"
    shutil.copytree(
        ROOT / "lgd_kernels", checkout / "lgd_kernels", ignore=shutil.ignore_patterns("*.so", "__pycache__")
    )
    for name in ("csrc", "python"):
        shutil.copytree(ROOT / name, checkout / name)
    (site / "lgd_kernels").mkdir(parents=True)
    (site / "lgd_kernels" / "__init__.py").write_text("raise ImportError('the checkout comes first')")
    data, old = own.read_bytes(), builds.digest_in(own)
    if not old:
        pytest.skip("lgd_kernels._C is older than its sources")
    here = builds.digest(checkout)
    (site / "lgd_kernels" / own.name).write_bytes(data.replace(old.encode(), here.encode()))
    return checkout, site / "lgd_kernels" / own.name


def in_checkout(checkout, built, *arguments):
    environment = {**os.environ, "PYTHONPATH": str(built.parents[1]), "PYTHONDONTWRITEBYTECODE": "1"}
    run = subprocess.run(
        [sys.executable, *arguments], cwd=checkout, env=environment, capture_output=True, text=True, timeout=120
    )
    assert run.returncode == 0, run.stderr
    return run.stdout, run.stderr


SAYS = """
import json, torch, lgd_kernels as lgd
from lgd_kernels.runtime import impls
lgd.guided_score(torch.ones(1, 2), torch.ones(1, 2), 1.0)
lgd.philox_normal((2, 2), seed=1)
file = getattr(impls.extension(), "__file__", None)
print(json.dumps([lgd.__file__, file, lgd.why_not("guided_score", "cpu"), lgd.available_impls("guided_score")]))
from lgd_kernels.__main__ import info
info()
"""


def test_a_checkout_loads_what_was_installed_from_it(installed):
    """After `pip install .`, Python in the checkout imports the checkout's own package, which is as fast."""
    checkout, built = installed
    out, errors = in_checkout(checkout, built, "-c", SAYS)
    said, _, info = out.partition("\n")
    package, extension, why_not, available = json.loads(said)
    assert Path(package).parent == checkout / "lgd_kernels" and Path(extension) == built
    assert errors == "" and why_not == [] and available == ["cpu", "reference"]
    assert "C++ extension: built by" in info and f"    loaded from {built}\n" in info


def test_a_checkout_says_once_that_what_was_installed_is_stale(installed):
    checkout, built = installed
    with open(checkout / "csrc" / "common" / "scalar.h", "a") as file:
        file.write("// edited\n")
    reason = (
        f"the extension lgd_kernels._C is not built: {built} was built from other sources than those in {checkout}; "
        f"`pip install {checkout}` builds it again"
    )
    out, errors = in_checkout(checkout, built, "-c", SAYS)
    said, _, info = out.partition("\n")
    _, extension, why_not, available = json.loads(said)
    assert extension is None and why_not == [reason] and available == ["reference"]
    assert errors.count(f"UserWarning: {reason}") == errors.count("Warning") == 1
    assert f"  C++ extension: {reason}\n" in info


@pytest.fixture
def places(tmp_path, monkeypatch):
    """Return two package folders, this one's and an installed one, of files that are never loaded."""
    here, there = tmp_path / "here" / "lgd_kernels", tmp_path / "there" / "lgd_kernels"
    for folder in (here, there):
        folder.mkdir(parents=True)
        (folder / "__init__.py").write_text("")
    monkeypatch.setattr(builds, "PACKAGE", here)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)  # this one's
    monkeypatch.setattr(sys, "path", ["", str(here.parent), str(here.parent / ".." / "here"), str(there.parent)])
    monkeypatch.chdir(here.parent)
    return here, there


def test_other_places(places, monkeypatch):
    here, there = places
    assert builds.others() == [there]
    assert builds.elsewhere("_C") == [] and builds.why_missing("_C").endswith(
        "(it needs a C++17 compiler at install time)"
    )
    assert builds.why_missing("_C_cuda").endswith("(it needs nvcc at install time)")
    monkeypatch.setattr(builds, "digest", lambda: "a" * 64)  # a checkout, of which nothing was built yet
    assert builds.why_missing("_C").endswith(f"(`pip install {here.parent}` builds it where there is a C++17 compiler)")


def test_why_missing_gives_every_reason(places):
    here, there = places
    (there / "_C.so").write_bytes(b"no digest")
    (here / "_C.cpython-999-x86_64-linux-gnu.so").write_bytes(b"")
    (there / "_C.failed.log").write_text("its build failed: no -lomp\n$ g++\n")
    said = builds.why_missing("_C")
    assert "is not built: its build failed: no -lomp (`python -m lgd_kernels info` shows the command" in said
    assert (
        f"{there / '_C.so'} is hidden by {here}" in said and "_C.cpython-999-x86_64-linux-gnu.so is for another" in said
    )


def test_an_extension_built_in_place_may_be_stale(places, monkeypatch):
    """A stale extension is loaded all the same, and `info` says that it is stale."""
    here, there = places
    monkeypatch.setattr(builds, "digest", lambda: "a" * 64)
    for folder, again in ((here, "python setup.py build_ext --inplace"), (there, f"pip install {here.parent}")):
        (folder / "_C.so").write_bytes(b"\0lgd-sources-" + b"a" * 64 + b"\0")
        assert builds.stale(folder / "_C.so") == ""
        (folder / "_C.so").write_bytes(b"\0lgd-sources-" + b"b" * 64 + b"\0")
        assert builds.stale(folder / "_C.so").startswith("built from other sources than those in")
        assert again in builds.stale(folder / "_C.so")
    monkeypatch.setattr(builds, "digest", lambda: "")  # an installed package has no sources beside it
    assert builds.stale(here / "_C.so") == ""


def test_info_shows_the_note(monkeypatch, capsys):
    from lgd_kernels import __main__ as program

    monkeypatch.setattr(impls, "_load", lambda name: (None, f"the extension lgd_kernels.{name} is not built (as if)"))
    monkeypatch.setattr(
        builds, "note", lambda name, folder=None: "its build failed: oh\n$ g++\nlast" if name == "_C" else ""
    )
    program.info()
    said = capsys.readouterr().out
    assert "_C is not built (as if)\n    its build failed: oh\n    $ g++\n    last\n  CUDA extension:" in said
