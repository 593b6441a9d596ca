"""What a stranger relies on: the README's commands, the licence, the import rule."""

import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml

from ssl2rl_ray.cli import _parser

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "tune_configs").glob("*.yaml"))]


def commands(path: Path) -> list[str]:
    """Every ``ssl2rl`` command line of a document; continued lines are joined."""
    text = re.sub(r"\\\n[ #]*", "", path.read_text())
    lines = re.findall(r"^(?:#\s+)?(ssl2rl .*)$", text, re.MULTILINE)
    return lines + re.findall(r"`(ssl2rl [a-z]+ [^`]*(?:--|\.yaml)[^`]*)`", text)


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_every_documented_command_is_one_that_the_program_takes(path):
    found = commands(path)
    assert found or path.suffix == ".yaml"
    for line in found:
        try:
            _parser().parse_args(shlex.split(line)[1:])
        except SystemExit:
            pytest.fail(f"{path.name}: not a command: {line}")


def test_documented_files_exist():
    for name in re.findall(r"(?:tune_configs|benchmarks|docs)/[\w./-]+\w", README):
        assert (ROOT / name).exists(), name
    for name in re.findall(r"\]\(([^)#:]+)\)", README):
        assert (ROOT / name).exists(), name


def test_ci_runs_the_readmes_test_command_last():
    script = (ROOT / ".ci" / "run").read_text()
    install, command = re.findall(r"&& (pip install .*\[test\]') && (\w.*)$", README, re.MULTILINE)[
        0
    ]
    assert script.strip().splitlines()[-1] == command
    assert install.removeprefix("pip install ") in script


def test_the_project_is_what_it_says():
    project = PROJECT["project"]
    assert project["scripts"] == {"ssl2rl": "ssl2rl_ray.cli:main"}
    assert set(project["optional-dependencies"]) == {"bo", "em", "test"}
    assert project["license"] == "Apache-2.0"
    licence = (ROOT / "LICENSE").read_text()
    assert "Apache License" in licence and "END OF TERMS AND CONDITIONS" in licence
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["version"] == project["version"]
    assert f"## {project['version']}" in (ROOT / "CHANGELOG.md").read_text()


def test_decisions_are_listed_and_short():
    folder = ROOT / "docs" / "decisions"
    index = (folder / "README.md").read_text()
    for path in folder.glob("0*.md"):
        assert f"({path.name})" in index
        assert len(path.read_text().splitlines()) <= 60, path.name


@pytest.mark.slow
def test_the_import_rule_holds():
    done = subprocess.run(
        [sys.executable, "-c", "from importlinter.cli import lint_imports_command as c; c()"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
