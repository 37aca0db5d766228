"""The commands that the pages show name files and targets that exist, with flags that their programs take."""

import re
import shlex
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
from accelerate.commands.launch import launch_command_parser

from launch.config import parse
from launch.methods import METHODS

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
OURS = "data models evaluation trainers launch ds_configs benchmarks docs tests".split()


def commands(page: Path) -> list[str]:
    """Return the commands of a page's ```bash blocks: continued lines joined, comments gone."""
    if not page.is_file():
        return []  # test_readme_shows_how_to_start fails then
    blocks = re.findall(r"^ *```bash\n(.*?)^ *```", page.read_text(), re.DOTALL | re.MULTILINE)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    return [line.strip() for line in lines if line.strip() and not line.strip().startswith("#")]


COMMANDS = sorted({command for page in PAGES for command in commands(page)})


@cache
def makefile_targets() -> set[str]:
    return set(re.findall(r"^([a-z][a-z-]*):", (ROOT / "Makefile").read_text(), re.MULTILINE))


@cache
def flags_of(script: str) -> set[str]:
    """Return the flags in a script's own --help."""
    done = subprocess.run([sys.executable, script, "--help"], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, f"{script} --help: {done.stderr}"
    return set(re.findall(r"(?<![\w-])--?[a-z][\w.-]*", done.stdout))


def check_flags(script: str, arguments: list[str]) -> None:
    if script == "launch/train.py":
        parse(arguments)  # values too; exits with the reason when one is wrong
        return
    unknown = {word.split("=")[0] for word in arguments if re.match(r"--?[a-z]", word)} - flags_of(script)
    assert not unknown, f"{script} does not take {sorted(unknown)}"


def check(command: str) -> None:
    """Raise unless everything that a command names exists and its flags are taken."""
    words = shlex.split(command, comments=True)
    while words and re.match(r"[A-Z_]+=", words[0]):  # settings of the environment
        words.pop(0)
    words[:1] = [word.removeprefix(".venv/bin/") for word in words[:1]]
    for word in words:
        if word.split("/")[0] in OURS and "/" in word:
            assert list(ROOT.glob(word)), f"{word} does not exist"
    match words:
        case ["make", *targets]:
            missing = {t for t in targets if "=" not in t} - makefile_targets()
            assert not missing, f"the Makefile has no {missing}"
        case ["accelerate", "launch", *rest]:
            given = launch_command_parser().parse_args(rest)
            check_flags(given.training_script, given.training_script_args)
        case ["python", script, *arguments] if script.endswith(".py"):
            check_flags(script, arguments)


def test_readme_shows_how_to_start() -> None:
    shown = commands(ROOT / "README.md")
    assert "make quickstart" in shown
    assert any(command.startswith("accelerate launch launch/train.py") for command in shown)


@pytest.mark.parametrize("page", PAGES, ids=[str(page.relative_to(ROOT)) for page in PAGES])
def test_links_of_a_page_lead_to_files(page: Path) -> None:
    links = re.findall(r"\]\((?!\w+:)([^)#\s]+)", page.read_text())
    missing = [link for link in links if not (page.parent / link).exists()]
    assert not missing, f"{page.name} leads to {missing}"


def test_every_method_has_a_page() -> None:
    linked = re.findall(r"^\| \[(.+?)\]\(docs/methods/", (ROOT / "README.md").read_text(), re.MULTILINE)
    names = {name for cell in linked for name in re.findall(r"`([\w-]+)`", cell)}
    unnamed = {
        name for name in METHODS if name not in names and not any(name.endswith(n) for n in names if n[0] == "-")
    }
    assert unnamed <= {"ur4rec-pretrain"}, "a stage that the page of ur4rec has"


@pytest.mark.parametrize("command", COMMANDS)
def test_command_of_a_page(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    check(command)


@pytest.mark.parametrize(
    "command",
    [
        "make no-such-target",
        "accelerate launch launch/no_such_script.py",
        "accelerate launch --config_file launch/accelerate/no_such.yaml launch/train.py",
        "accelerate launch --no_such_flag 1 launch/train.py",
        "accelerate launch launch/train.py --train.no_such_flag 1",
        "CUDA_VISIBLE_DEVICES=0 accelerate launch launch/train.py --train.epochs many",
        "python launch/no_such_script.py",
    ],
)
def test_a_planted_mistake_is_found(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    with pytest.raises((AssertionError, SystemExit)):
        check(command)
