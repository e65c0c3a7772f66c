"""The rules of the house, executed: who may import whom, and nothing happens at import."""

from __future__ import annotations

import ast
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

SRC = Path(__file__).resolve().parents[1] / "src"
PACKAGE = SRC / "patchmine"
FILES = sorted(PACKAGE.rglob("*.py"))

# What a room may import; a room is a folder or a top-level file of the package.  Downwards only.
FLOOR = {"types", "errors", "system", "strict", "settings"}
BELOW_TASKS = FLOOR | {"ops", "data", "backbones", "models"}
PARTS = BELOW_TASKS | {"task", "methods", "tasks", "train"}
BELOW_TRAINING = PARTS | {"config", "runs", "evaluate", "report"}
MAY_IMPORT = {
    "types": set(),
    "errors": set(),
    "strict": {"errors"},
    "settings": {"errors", "strict"},
    "system": {"errors"},
    "ops": {"types"},
    "data": FLOOR,
    "backbones": FLOOR | {"ops", "data"},
    "models": FLOOR | {"ops", "backbones"},
    "task": FLOOR | {"ops", "backbones", "models"},
    "methods": BELOW_TASKS - {"data"} | {"task"},
    "tasks": BELOW_TASKS - {"data"} | {"task"},
    "train": FLOOR | {"ops", "models", "task"},
    "config": PARTS,
    "runs": PARTS | {"config"},
    "evaluate": PARTS | {"config", "runs"},
    "report": PARTS | {"config", "runs", "evaluate"},
    "training": BELOW_TRAINING,
    "bench": PARTS | {"config", "runs"},
    "api": BELOW_TRAINING | {"training"},
    "cli": BELOW_TRAINING | {"bench", "training", "api", "__init__"},
    "__init__": BELOW_TRAINING | {"training", "api"},
    "__main__": {"cli"},
}

LONGEST_FILE = 400
MOST_ROOMS = 20

# Waiting for the device, which no training step may do.
BLOCKING = {"item", "cpu", "nonzero", "tolist", "numpy", "masked_select"}
NOT_IN_A_STEP = {"__init__", "panels", "begin_epoch", "param_groups"}


def module_name(path: Path) -> str:
    parts = path.relative_to(SRC).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def room(module: str) -> str:
    parts = module.split(".")
    if "settings" in parts[2:]:
        return "settings"  # of every room: below all of them, and torch-free
    return parts[1] if len(parts) > 1 else "__init__"


@cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


MODULES = {module_name(path): path for path in FILES}


@cache
def imports(path: Path) -> frozenset[str]:
    """Modules of the package that a file imports, wherever in the file it does."""
    found: set[str] = set()
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            # `from patchmine.ops import masks` names a module, `from patchmine.types import Mask` a
            # thing in one.
            for alias in node.names:
                longer = f"{node.module}.{alias.name}"
                found.add(longer if longer in MODULES else node.module)
    return frozenset(name for name in found if name.split(".")[0] == "patchmine")


def third_parties(path: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import):
            names.update(alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module.split(".")[0])
    return names - set(sys.stdlib_module_names) - {"patchmine"}


def named(path: Path) -> str:
    return path.relative_to(PACKAGE).as_posix()


@pytest.mark.parametrize("path", FILES, ids=named)
def test_imports_go_downwards_only(path: Path) -> None:
    own = room(module_name(path))
    assert own in MAY_IMPORT, f"{own} is a new room: say in this test what it may import"
    wrong = {name for name in imports(path) if room(name) not in MAY_IMPORT[own] | {own}}
    assert not wrong, f"{named(path)} may not import {sorted(wrong)}"


def test_no_method_imports_a_method() -> None:
    for path in (PACKAGE / "methods").glob("*.py"):
        if path.name != "__init__.py":
            beside = {name for name in imports(path) if room(name) == "methods"}
            assert not {name for name in beside if ".settings." not in name}, named(path)


def test_only_backbones_tell_families_of_encoders_apart() -> None:
    modules = {"VisionTransformer", "Beit", "ResNet", "VideoTransformer"}
    for path in FILES:
        if path.parent.name == "backbones":
            continue
        for node in ast.walk(tree(path)):
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "isinstance":
                asked = {each.id for each in ast.walk(node) if isinstance(each, ast.Name)}
                assert not asked & modules, f"{named(path)}:{node.lineno}: ask family_of"
        assert "is_video(" not in path.read_text(encoding="utf-8"), named(path)


def test_ops_import_torch_and_shapes_only() -> None:
    for path in (PACKAGE / "ops").glob("*.py"):
        assert third_parties(path) <= {"torch", "jaxtyping"}, named(path)


def test_training_knows_no_method() -> None:
    from patchmine.methods import METHODS

    for path in (PACKAGE / "train").glob("*.py"):
        words = {node.id.lower() for node in ast.walk(tree(path)) if isinstance(node, ast.Name)}
        words |= {
            node.value.lower()
            for node in ast.walk(tree(path))
            if isinstance(node, ast.Constant) and isinstance(node.value, str)
        }
        assert not words & set(METHODS), f"{named(path)} names a method"


def test_only_few_rooms_see_the_settings_of_a_run_whole() -> None:
    whole = {"config", "runs", "training", "api", "cli", "__init__"}
    for name, path in MODULES.items():
        if room(name) not in whole:
            text = path.read_text(encoding="utf-8")
            assert "RunConfig" not in text, f"{named(path)}: take the block that is needed"


def test_settings_need_no_torch() -> None:
    names = [name for name in MODULES if room(name) == "settings"]
    assert not {"torch", "timm", "numpy", "PIL", "yaml"} & loaded_after(
        f"import {', '.join(names)}"
    )


def test_no_import_goes_in_a_circle() -> None:
    graph = {name: imports(path) & set(MODULES) - {name} for name, path in MODULES.items()}
    done: set[str] = set()

    def visit(name: str, trail: tuple[str, ...]) -> None:
        assert name not in trail, " -> ".join([*trail[trail.index(name) :], name])
        if name not in done:
            for other in sorted(graph[name]):
                visit(other, (*trail, name))
            done.add(name)

    for name in graph:
        visit(name, ())


def is_main_guard(node: ast.stmt) -> bool:
    return isinstance(node, ast.If) and "__name__" in ast.unparse(node.test)


@pytest.mark.parametrize("path", FILES, ids=named)
def test_import_does_no_work(path: Path) -> None:
    for node in tree(path).body:
        if isinstance(node, ast.Expr):
            assert isinstance(node.value, ast.Constant), (
                f"{named(path)}:{node.lineno} runs at import"
            )
        if isinstance(node, ast.If):
            assert "TYPE_CHECKING" in ast.unparse(node.test) or is_main_guard(node), (
                f"{named(path)}:{node.lineno}"
            )
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            text = ast.unparse(node)
            assert "environ" not in text, (
                f"{named(path)}:{node.lineno} reads the environment at import"
            )
            assert "getenv" not in text, (
                f"{named(path)}:{node.lineno} reads the environment at import"
            )
            assert "open(" not in text, f"{named(path)}:{node.lineno} opens a file at import"


def loaded_after(statement: str) -> set[str]:
    program = f"import sys; {statement}; print(*sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=60
    )
    return set(done.stdout.split())


@pytest.mark.parametrize("module", ["patchmine", "patchmine.cli.app", "patchmine.errors"])
def test_torch_waits_until_there_is_work(module: str) -> None:
    heavy = {"torch", "timm", "lightning", "torchvision", "matplotlib", "numpy", "PIL"}
    assert not heavy & loaded_after(f"import {module}")


@pytest.mark.parametrize("path", FILES, ids=named)
def test_heavy_modules_are_imported_where_they_are_used(path: Path) -> None:
    heavy = {
        "lightning",
        "matplotlib",
        "transformers",
        "sklearn",
        "skimage",
        "wandb",
        "tensorboard",
        "pyarrow",
    }
    for node in tree(path).body:
        if isinstance(node, ast.Import):
            names = {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = {node.module.split(".")[0]}
        else:
            continue
        assert not names & heavy, (
            f"{named(path)}:{node.lineno}: import it inside the function that uses it"
        )


def functions(path: Path) -> list[ast.FunctionDef]:
    """Functions and methods of a file, without what cannot be part of a step."""
    return [
        n
        for n in ast.walk(tree(path))
        if isinstance(n, ast.FunctionDef) and n.name not in NOT_IN_A_STEP
    ]


@pytest.mark.parametrize(
    "path", [p for p in FILES if p.parent.name in ("methods", "ops")], ids=named
)
def test_a_step_does_not_wait_for_the_device(path: Path) -> None:
    for function in functions(path):
        for node in ast.walk(function):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
                where = f"{named(path)}:{node.lineno} in {function.name}"
                assert node.func.attr not in BLOCKING, (
                    f"{where}: .{node.func.attr}() waits for the device"
                )


def test_the_package_has_few_rooms() -> None:
    rooms = {path.relative_to(PACKAGE).parts[0].removesuffix(".py") for path in FILES}
    rooms -= {"__init__", "__main__"}
    assert len(rooms) <= MOST_ROOMS, f"put what belongs together into one room: {sorted(rooms)}"


def test_files_stay_short_enough_to_read() -> None:
    lengths = {named(path): len(path.read_text(encoding="utf-8").splitlines()) for path in FILES}
    long = {name: lines for name, lines in lengths.items() if lines > LONGEST_FILE}
    assert not long, f"split these at a seam: {long}"


def test_the_package_ships_its_types_and_recipes(repository: Path) -> None:
    assert (PACKAGE / "py.typed").is_file()
    assert list((PACKAGE / "config" / "recipes").glob("*.yaml"))
    assert (repository / "LICENSE").read_text(encoding="utf-8").count("Apache License") >= 1
