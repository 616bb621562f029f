"""The committed notebooks, and how tests run one without a kernel."""

import ast
from pathlib import Path
from typing import Any

import nbformat

__all__ = ["NOTEBOOKS", "REAL_MODELS", "code_cells", "run"]

NOTEBOOKS = sorted((Path(__file__).resolve().parents[1] / "notebooks").rglob("*.ipynb"))

REAL_MODELS = "INTERP_REAL_MODELS"
"""What names the folder of real models to a notebook; one that needs it and lacks them exits, and says so."""


def code_cells(path: Path) -> list[Any]:
    """Return the code cells of a notebook that is valid."""
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def run(path: Path) -> tuple[list[str], str]:
    """Run a notebook in this process; what its cells show, and with what words it exited before its end, if it did."""
    names: dict[str, Any] = {"__name__": "__main__"}
    shown: list[str] = []
    for n, cell in enumerate(code_cells(path)):
        try:
            shown.append(_run_cell(cell.source, f"{path.name}[{n}]", names))
        except SystemExit as stop:
            return shown, str(stop)
    return shown, ""


def _run_cell(source: str, name: str, names: dict[str, Any]) -> str:
    """Run a cell as a notebook does; what its last expression shows, as HTML or text."""
    body = ast.parse(source, name).body
    last = body.pop() if isinstance(body[-1], ast.Expr) else None
    exec(compile(ast.Module(body, []), name, "exec"), names)
    if not isinstance(last, ast.Expr):
        return ""
    value = eval(compile(ast.Expression(last.value), name, "eval"), names)
    show = getattr(value, "_repr_html_", None) or (lambda: repr(value))
    return "" if value is None else str(show())
