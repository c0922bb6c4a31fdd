"""The direction of imports between the rooms, read from the source without importing anything."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
ROOMS = ("posttrain", "rewards", "rollout", "teachers")
HEAVY = ("torch", "ray", "vllm", "deepspeed", "transformers")
LEAVES = ("posttrain.records", "posttrain.config")


def modules_of(folder: str) -> list[Path]:
    return sorted((ROOT / folder).rglob("*.py"))


def imports(file: Path, *, top_level_only: bool = False) -> set[str]:
    """Dotted names that a module imports, type-checking imports left out: `from a.b import c` gives a.b and a.b.c."""
    tree = ast.parse(file.read_text())
    skipped = {
        id(child)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test)
        for child in ast.walk(node)
    }
    nodes = tree.body if top_level_only else list(ast.walk(tree))
    found: set[str] = set()
    for node in nodes:
        if id(node) in skipped:
            continue
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: relative import"
            found |= {node.module or ""} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def within(name: str, *packages: str) -> bool:
    return any(name == package or name.startswith(package + ".") for package in packages)


def test_the_reader_sees_imports(tmp_path):
    file = tmp_path / "m.py"
    file.write_text(
        "import a.b\nfrom c import d\nif TYPE_CHECKING:\n    import hidden\ndef f():\n    import late\n"
    )
    assert imports(file) == {"a.b", "c", "c.d", "late"}
    assert imports(file, top_level_only=True) == {"a.b", "c", "c.d"}


@pytest.mark.parametrize("leaf", LEAVES)
def test_leaves_import_nothing_of_the_project_and_no_engine(leaf):
    path = ROOT / leaf.replace(".", "/")
    files = modules_of(str(path)) if path.is_dir() else [path.with_suffix(".py")]
    found = {i for file in files for i in imports(file) if not within(i, leaf)}
    assert files and {i for i in found if within(i, *ROOMS, *HEAVY)} == set()


@pytest.mark.parametrize("room", ["rewards", "rollout", "teachers"])
def test_rooms_import_only_the_leaves(room):
    # What a process needs before vLLM is imported in it, and how an engine and an LM head compute, is said once.
    engines = ("rollout.process", "rollout.cpu", "rollout.head", "rollout.options")
    more = {"rollout": ("posttrain.data",), "teachers": (*engines, "posttrain.logits")}
    allowed = (*LEAVES, room, *more.get(room, ()))
    files = modules_of(room)
    assert files
    for file in files:
        wrong = {
            i for i in imports(file) if within(i, *ROOMS) and i != "posttrain" and not within(i, *allowed)
        }
        assert wrong == set(), file


def test_the_product_of_the_lm_head_knows_nothing_of_the_project():
    assert {i for i in imports(ROOT / "posttrain" / "logits.py") if within(i, *ROOMS)} == set()


def test_learner_knows_no_rewards_teachers_or_rollout():
    files = modules_of("posttrain/learner")
    assert files
    for file in files:
        wrong = {
            i
            for i in imports(file)
            if within(i, "rewards", "teachers", "rollout", "posttrain.runs", "posttrain.loop")
        }
        assert wrong == set(), file


def test_command_line_starts_without_engines():
    for name in ("cli", "usage", "compose", "schema"):  # leaves: above
        wrong = {
            i for i in imports(ROOT / "posttrain" / f"{name}.py", top_level_only=True) if within(i, *HEAVY)
        }
        assert wrong == set(), name


def test_test_files_have_names_of_their_own():
    """pytest collects tests/unit and tests/integration together in `make test-slow`, and knows a file by its name."""
    names = [file.name for file in (ROOT / "tests").rglob("test_*.py")]
    assert len(names) == len(set(names))
