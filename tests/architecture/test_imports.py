"""Imports run one way, no folder hides a known package, nothing reads a pickle or runs a hub's code."""

import ast
import importlib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = ["data", "models", "evaluation", "trainers", "launch"]  # each may import those before it
PICKLES = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
HIDING_OTHERS = {
    "datasets",
    "evaluate",
    "utils",
    "common",
    "helpers",
}  # HF packages, or names that say nothing


def modules(folder: str) -> list[Path]:
    found = sorted((ROOT / folder).rglob("*.py"))
    assert found, f"{folder}/ has no modules: was it renamed?"
    return found


def imported(tree: ast.Module) -> Iterator[tuple[int, str, int]]:
    """Yield (line, first part of the name, dots of a relative import) of every import, wherever it stands."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name.split(".")[0], 0) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.lineno, (node.module or "").split(".")[0], node.level


def against_the_order(folder: str, depth: int, source: str) -> list[str]:
    """Return the imports of a module, `depth` folders below `folder`, that go where they may not."""
    allowed = FOLDERS[: FOLDERS.index(folder) + 1]
    return [
        f"line {line}: {'.' * level}{name}"
        for line, name, level in imported(ast.parse(source))
        if (level == 0 and name in [*FOLDERS, "tests", "benchmarks"] and name not in allowed) or level > depth + 1
    ]


def unsafe_loads(source: str) -> list[str]:
    """Return the places of a module that can run code from a file or a hub."""
    tree = ast.parse(source)
    found = [f"line {line}: import {name}" for line, name, _ in imported(tree) if name in PICKLES]
    for call in (node for node in ast.walk(tree) if isinstance(node, ast.Call)):
        name = ast.unparse(call.func)
        given = {keyword.arg: ast.unparse(keyword.value) for keyword in call.keywords}
        if (
            (name == "torch.load" and given.get("weights_only") != "True")
            or name.endswith("read_pickle")
            or given.get("allow_pickle", "False") != "False"
            or given.get("trust_remote_code", "False") != "False"
        ):
            found.append(f"line {call.lineno}: {ast.unparse(call)}")
    return found


@pytest.mark.parametrize("folder", FOLDERS)
def test_imports_run_one_way(folder: str) -> None:
    wrong = {
        str(path.relative_to(ROOT)): found
        for path in modules(folder)
        if (found := against_the_order(folder, len(path.relative_to(ROOT).parts) - 2, path.read_text()))
    }
    assert not wrong, f"{folder} may import {FOLDERS[: FOLDERS.index(folder)]} only"


@pytest.mark.parametrize("folder", FOLDERS)
def test_nothing_is_unpickled(folder: str) -> None:
    wrong = {
        str(path.relative_to(ROOT)): found for path in modules(folder) if (found := unsafe_loads(path.read_text()))
    }
    assert not wrong, "weights are read from safetensors, settings from JSON or YAML, hub code never runs"


@pytest.mark.parametrize(
    ("folder", "depth", "source"),
    [
        ("data", 0, "from models.base import Loss"),
        ("models", 0, "def late():\n    import evaluation.metrics"),
        (
            "evaluation",
            0,
            "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from trainers import loop",
        ),
        ("trainers", 0, "from launch.config import parse"),
        ("launch", 0, "from tests.conftest import SHARED"),
        ("models", 0, "from ..data.splits import Split"),
    ],
)
def test_a_planted_import_is_found(folder: str, depth: int, source: str) -> None:
    assert against_the_order(folder, depth, source)


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from joblib import load",
        "torch.load(path)",
        "torch.load(path, weights_only=False)",
        "np.load(path, allow_pickle=True)",
        "AutoModel.from_pretrained(name, trust_remote_code=config.trust)",
    ],
)
def test_a_planted_load_is_found(source: str) -> None:
    assert unsafe_loads(source)


def test_what_the_project_needs_is_let_through() -> None:
    assert not against_the_order("trainers", 0, "from data.splits import Split\nfrom .progress import Progress\n")
    assert not against_the_order("models", 1, "from ..base import Recommender\n")
    assert not unsafe_loads("torch.load(path, weights_only=True)\nload(name, trust_remote_code=False)\n")


@pytest.mark.parametrize("folder", FOLDERS)
def test_folders_are_ours(folder: str) -> None:
    found = importlib.import_module(folder).__file__
    assert found == str(ROOT / folder / "__init__.py"), f"another installed package is called {folder}"


def test_no_folder_hides_a_package() -> None:
    folders = {path for name in [*FOLDERS, "tests"] for path in (ROOT / name).rglob("*") if path.is_dir()}
    folders |= {path for path in ROOT.iterdir() if path.is_dir()}
    assert not [str(path.relative_to(ROOT)) for path in folders if path.name in HIDING_OTHERS]


def too_early(source: str) -> list[str]:
    """Return the imports of a command that would fail in a clone which is not installed."""
    lines = source.splitlines()
    made = next((i for i, line in enumerate(lines, start=1) if line.startswith("sys.path.insert(")), 0)
    return [
        f"line {line}: {name}" for line, name, level in imported(ast.parse(source)) if line < made and name in FOLDERS
    ]


@pytest.mark.parametrize(
    "path", [*modules("launch"), *sorted((ROOT / "benchmarks").glob("*.py"))], ids=lambda p: p.name
)
def test_a_command_finds_the_clone_before_it_imports_from_it(path: Path) -> None:
    assert not too_early(path.read_text())


def test_an_import_above_the_path_is_found() -> None:
    assert too_early("import sys\nfrom data.splits import Split\nsys.path.insert(0, here)\n") == ["line 2: data"]


@pytest.mark.parametrize("folder", FOLDERS)
def test_objects_are_gathered_from_host_to_host(folder: str) -> None:
    """Accelerate's own would take them through the memory of the GPU (`models.devices.gather_object`)."""
    for path in modules(folder):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and node.module == "accelerate.utils":
                assert "gather_object" not in {alias.name for alias in node.names}, path
