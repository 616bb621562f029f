"""What the tests of the layout and of the README read out of the library's source, without importing it."""

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path

REPO = Path(__file__).resolve().parents[1]
PACKAGE = REPO / "interp"
# The rooms of the methods.
FAMILIES = {"lens", "patching", "steering", "probing", "activations", "surgery"}


def modules() -> list[Path]:
    """Every Python file of the library."""
    return sorted(PACKAGE.rglob("*.py"))


@cache
def tree(path: Path) -> ast.Module:
    """The parsed source of a file."""
    return ast.parse(path.read_text(encoding="utf-8"), filename=str(path))


def dotted(path: Path) -> str:
    """The import name of a library file."""
    parts = path.relative_to(REPO).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(path: Path, *, inside_functions: bool = True) -> Iterator[tuple[int, str]]:
    """Yield the line and name of all a file imports, `import_module("…")` included, TYPE_CHECKING left out."""
    yield from _found(path, inside_functions)


@cache
def _found(path: Path, inside_functions: bool) -> tuple[tuple[int, str], ...]:
    return tuple(_imports(tree(path), inside_functions))


def _imports(node: ast.AST, inside_functions: bool) -> Iterator[tuple[int, str]]:
    if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
        for other in node.orelse:
            yield from _imports(other, inside_functions)
        return
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda) and not inside_functions:
        return
    if isinstance(node, ast.Import):
        for alias in node.names:
            yield node.lineno, alias.name
    if isinstance(node, ast.ImportFrom) and node.module:
        for alias in node.names:
            yield node.lineno, f"{node.module}.{alias.name}"
    if isinstance(node, ast.Call) and called(node).endswith("import_module") and node.args:
        name = node.args[0]
        if isinstance(name, ast.Constant) and isinstance(name.value, str):
            yield node.lineno, name.value
    for child in ast.iter_child_nodes(node):
        yield from _imports(child, inside_functions)


def called(node: ast.Call) -> str:
    """The last name of what a call calls: `c` of `a.b.c()`, nothing of a call of an expression."""
    return getattr(node.func, "attr", "") or getattr(node.func, "id", "")


def exported(path: Path) -> list[str] | None:
    """The names in a file's `__all__`, in their written order; None where it has none."""
    for node in tree(path).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
            return list(ast.literal_eval(node.value))
    return None


def public_functions(path: Path) -> Iterator[tuple[str, ast.FunctionDef | ast.AsyncFunctionDef]]:
    """Yield the qualified name and node of each public function of a file, and of each public method of its classes."""
    for node in tree(path).body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and not node.name.startswith("_"):
            yield node.name, node
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
            for method in node.body:
                if isinstance(method, ast.FunctionDef | ast.AsyncFunctionDef) and not method.name.startswith("_"):
                    yield f"{node.name}.{method.name}", method
