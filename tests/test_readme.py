"""Check the README and docs: their snippets run, their commands exist, their links lead somewhere."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import lgd_kernels as lgd

ROOT = Path(__file__).parent.parent
ABOVE = [ROOT / name for name in ("README.md", "CHANGELOG.md", "CONTRIBUTING.md")]
PAGES = [*ABOVE, *sorted((ROOT / "docs").glob("*.md"))]


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(), flags=re.M | re.S)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_python_snippets_run_one_after_the_other(page, tmp_path, monkeypatch):
    namespace = {}
    monkeypatch.chdir(tmp_path)  # one writes a file
    for snippet in blocks(page, "python"):
        for line, needs in {"import diffusers": "diffusers"}.items():
            if line in snippet:  # optional; last on its page
                pytest.importorskip(needs)
        exec(compile(snippet, page.name, "exec"), namespace)


def test_they_run_without_a_compiler_too():
    """As where neither extension was built."""
    program = """
import sys
sys.modules |= {"lgd_kernels._C": None, "lgd_kernels._C_cuda": None}
import pytest
from lgd_kernels.runtime import impls
assert impls.extension_error()
sys.exit(pytest.main(["-q", "-p", "no:xdist", f"{sys.argv[1]}::test_python_snippets_run_one_after_the_other"]))
"""
    environment = {name: value for name, value in os.environ.items() if name != "LGD_REQUIRE_EXT"}
    run = subprocess.run(
        [sys.executable, "-c", program, __file__], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stdout + run.stderr


def test_the_first_snippet_of_the_readme_is_short_and_does_what_it_says():
    """The model predicts the condition, so guided samples end at (1 + omega) condition."""
    hero, namespace = blocks(ROOT / "README.md", "python")[0], {}
    exec(hero, namespace)
    expected = (1 + namespace["omega"]) * namespace["condition"]
    assert (namespace["x"] - expected[:, None]).abs().max() < 1e-5
    assert len([line for line in hero.splitlines() if line]) <= 10


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    """To a file, and to a heading of it if there is a #."""
    for target, anchor in re.findall(r"\]\(([^)#\s]*)#?([^)\s]*)\)", page.read_text()):
        if not target.startswith("https://"):
            assert (page.parent / target).exists(), target
            assert not anchor or anchor in headings(page.parent / target if target else page), f"{target}#{anchor}"


def headings(page: Path) -> set[str]:
    """Return the anchors of a page's headings, as GitHub and the site make them."""
    titles = re.findall(r"^#+ (.*)", page.read_text(), flags=re.M)
    return {re.sub(r"[^\w\- ]", "", title.lower()).strip().replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_row_of_a_table_is_a_line(page):
    inside = False
    for line in page.read_text().splitlines():
        inside ^= line.startswith("```")
        if not inside:
            assert "|---" not in line or line.startswith("|"), line
            assert not line.startswith("|") or line.rstrip().endswith("|"), line


def test_make_targets_exist():
    targets = set(re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), flags=re.M))
    named = {word for page in PAGES for line in blocks(page, "bash") for word in re.findall(r"^make (\w+)", line, re.M)}
    assert {"demo", "test"} <= named <= targets
    assert "make test" in (ROOT / ".ci" / "run").read_text()


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
def test_make_understands_its_file():
    for target in ("demo", "test", "bench", "gpu"):
        run = subprocess.run(["make", "-n", target], cwd=ROOT, capture_output=True, text=True)
        assert run.returncode == 0, run.stderr


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
@pytest.mark.parametrize("link", ["other.md", "absent.md", "other.md#absent"])
def test_make_docs_fails_on_a_broken_link(tmp_path, link):
    """Run the target with the settings as they are, on two pages; a good build prints nothing."""
    pytest.importorskip("material")
    pytest.importorskip("mkdocstrings")
    for name in ("Makefile", "mkdocs.yml"):
        shutil.copy(ROOT / name, tmp_path)
    pages = {"index.md": f"# One\n\n[a link]({link})\n", "other.md": "# Two\n", "pages.py": ""}
    (tmp_path / "docs").mkdir()
    for name, text in pages.items():
        (tmp_path / "docs" / name).write_text(text)
    mkdocs = tmp_path / "venv" / "bin" / "mkdocs"
    mkdocs.parent.mkdir(parents=True)
    mkdocs.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m mkdocs "$@"\n')
    mkdocs.chmod(0o755)
    command = ["make", "-s", "docs", "VENV=venv", "-o", "venv/installed"]  # nothing to install
    run = subprocess.run(
        command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=120
    )
    if "absent" in link:
        assert run.returncode != 0 and link in run.stdout and "1 warnings in strict mode" in run.stdout
    else:
        assert run.returncode == 0 and run.stdout == "" and (tmp_path / "build/site/index.html").is_file(), run.stdout


def test_paths_in_the_docs_exist():
    """Check `lgd_kernels/...`, `csrc/...` and the like; `<op>` stands for `moments`, the model of docs/design.md."""
    for page in PAGES:
        for path in re.findall(r"`((?:lgd_kernels|csrc|python|tests|docs|benchmarks)/[\w./<>]*)`", page.read_text()):
            assert (ROOT / path.replace("<op>", "moments")).exists(), f"{page.name}: {path}"


def test_every_public_name_is_in_the_docs():
    text = "".join(page.read_text() for page in PAGES)
    assert [name for name in lgd.__all__ if name not in text] == []


def test_the_readme_of_a_package_index_has_no_relative_links():
    """They would lead nowhere there."""
    run = subprocess.run(
        [sys.executable, "setup.py", "-q", "--long-description"], cwd=ROOT, capture_output=True, text=True
    )
    assert run.stdout.startswith("# lgd_kernels"), run.stdout + run.stderr
    assert set(re.findall(r"\]\((\w+)", run.stdout)) == {"https"} and "![" not in run.stdout
