"""The packages: what each may import, and what each says of itself."""

import ast
from pathlib import Path

import pytest

import ones_lib

ROOT = Path(ones_lib.__file__).parent
#: A package, and the packages it may import besides itself. The core is the modules of ``ones_lib`` itself and ``gathering``.
ALLOWED = {
    "core": set(),
    "models": {"core"},
    "data": set(),
    "checkpoints": {"core", "models", "data"},
    "study": {"core", "models", "data", "checkpoints"},
    "views": {"core", "models", "data", "checkpoints", "study"},
}
FILES = sorted(path for path in ROOT.rglob("*.py") if path not in (ROOT / "__init__.py", ROOT / "records.py"))


def package(parts: tuple[str, ...]) -> str:
    return parts[0] if parts[0] in ALLOWED else "core"


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_package_imports_only_what_stands_above_it(path):
    """Imports inside functions count too."""
    own = package(path.relative_to(ROOT).with_suffix("").parts)
    for node in ast.walk(ast.parse(path.read_text())):
        modules = []
        if isinstance(node, ast.Import):
            modules = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0
            modules = (
                [f"{node.module}.{alias.name}" for alias in node.names] if node.module == "ones_lib" else [node.module]
            )
        for module in modules:
            if module.startswith("ones_lib."):
                found = package(tuple(module.split(".")[1:]))
                assert found == own or found in ALLOWED[own], f"{own} imports {module}"


@pytest.mark.parametrize("name", [*ALLOWED, "gathering"])
def test_a_package_says_what_it_is_for(name):
    path = ROOT / "__init__.py" if name == "core" else ROOT / name / "__init__.py"
    assert len(ast.get_docstring(ast.parse(path.read_text())).split()) > 8


def test_no_check_is_an_assert():
    """Python leaves these out with -O or PYTHONOPTIMIZE."""
    asserts = [
        f"{path.relative_to(ROOT)}:{node.lineno}"
        for path in ROOT.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Assert)
    ]
    assert asserts == []


def test_a_public_function_has_a_docstring():
    missing = []
    for path in FILES:
        for node in ast.parse(path.read_text()).body:
            public = isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_")
            if public and not ast.get_docstring(node) and len(node.body) > 1:
                missing.append(f"{path.relative_to(ROOT)}: {node.name}")
    assert missing == []
