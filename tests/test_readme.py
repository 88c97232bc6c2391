"""README says what is there: commands that parse, files that exist, Python that runs, outputs that were recorded."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import quote_records
from run_notebooks import MACHINE_PATH

ROOT = Path(__file__).parent.parent
PAGES = (ROOT / "README.md", ROOT / "artifacts" / "README.md", ROOT / "docs" / "ARCHITECTURE.md")
README = PAGES[0].read_text(encoding="utf-8")
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def fences(language: str) -> list[str]:
    """The contents of README's fenced blocks of a language."""
    return [body for kind, body in FENCE.findall(README) if kind == language]


def commands() -> list[str]:
    """Every `python -m …` of README, in a block or in a line, as it would be typed, without comments."""
    lines = [line for body in fences("sh") for line in body.replace("\\\n", " ").splitlines()]
    lines += re.findall(r"`(python -m [^`]+)`", FENCE.sub("", README))
    ours = tuple(f"python -m {package}." for package in ("gpt2_tvm", "targets", "tuning"))
    return [line for line in dict.fromkeys(lines) if line.startswith(ours)]


def test_there_are_commands() -> None:
    assert {line.split()[2] for line in commands()} >= {
        f"gpt2_tvm.{name}" for name in ("compile", "generate", "benchmark", "pack")
    }


@pytest.mark.parametrize("line", commands())
def test_a_command_of_the_readme_is_one_that_its_program_takes(line: str) -> None:
    import importlib.util

    _, _, module, *arguments = shlex.split(line, comments=True)
    from typer.main import get_command

    package = importlib.util.find_spec(module).submodule_search_locations is not None
    command = get_command(importlib.import_module(f"{module}.__main__" if package else module).app)
    command = getattr(command, "commands", {}).get(arguments[0], command) if arguments else command  # prune once
    options = {name for parameter in command.params for name in (*parameter.opts, *parameter.secondary_opts)}
    used = [argument.split("=")[0] for argument in arguments if argument.startswith("--")]
    assert [name for name in used if name not in {*options, "--help"}] == []


@pytest.mark.parametrize("module", sorted({line.split()[2] for line in commands()}))
def test_a_program_of_the_readme_has_help(module: str) -> None:
    done = subprocess.run([sys.executable, "-m", module, "--help"], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert "Usage" in done.stdout


@pytest.mark.parametrize("target", sorted(set(re.findall(r"--target (\S+?)[`\s]", README))))
def test_a_target_of_the_readme_is_there(target: str) -> None:
    from targets import load_target

    if target != "./my-gpu.toml":  # the reader's own
        assert load_target(target).name == target


def test_every_make_goal_of_the_readme_is_there() -> None:
    goals = re.findall(r"^make (\w+)", "\n".join(fences("sh")), re.MULTILINE)
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    assert goals and all(re.search(rf"^{goal}:", makefile, re.MULTILINE) for goal in goals)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.parent.name + "/" + page.name)
def test_every_file_named_is_there(page: Path) -> None:
    text = FENCE.sub("", page.read_text(encoding="utf-8"))
    roots = "gpt2_tvm|targets|tuning|tests|scripts|notebooks|docs"
    named = re.findall(rf"`((?:{roots})/[\w./-]*)`", text) + re.findall(r"\]\((?!https?:)([^)#]+)\)", text)
    assert [name for name in named if not (ROOT / name).exists()] == []


def test_every_package_has_its_place_in_the_architecture() -> None:
    text = PAGES[2].read_text(encoding="utf-8")
    packages = [
        file.parent.relative_to(ROOT)
        for top in ("gpt2_tvm", "targets", "tuning")
        for file in (ROOT / top).rglob("__init__.py")
    ]
    missing = [str(p) for p in packages if len(p.parts) <= 2 and f"`{p.as_posix()}/`" not in text]
    assert len(packages) > 20 and missing == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.parent.name + "/" + page.name)
def test_no_path_of_a_machine(page: Path) -> None:
    assert MACHINE_PATH.findall(page.read_text(encoding="utf-8")) == []


def test_the_outputs_quoted_are_those_recorded() -> None:
    assert quote_records.BLOCK.search(README)
    assert quote_records.quoted(README) == README, "run python scripts/quote_records.py"
    assert "@@" not in README


def test_the_target_file_shown_is_the_file() -> None:
    (shown,) = fences("toml")
    assert shown in [(path.read_text(encoding="utf-8").strip() + "\n") for path in (ROOT / "targets").glob("*.toml")]


@pytest.mark.heavy
def test_the_python_of_the_readme_runs(tmp_path: Path) -> None:
    (program,) = fences("python")
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
