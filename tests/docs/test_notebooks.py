"""Notebooks run from top to bottom, say true things, and are committed without their outputs."""

import ast
from pathlib import Path
from typing import Any

import nbformat
import pytest

FOLDER = Path(__file__).resolve().parents[2] / "notebooks"
NOTEBOOKS = sorted(FOLDER.rglob("*.ipynb"))

each_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def code_cells(path: Path) -> list[Any]:
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def run_cell(source: str, name: str, names: dict[str, Any]) -> str:
    """Run a cell as a notebook does; what its last expression shows, as HTML or text."""
    body = ast.parse(source, name).body
    last = body.pop() if isinstance(body[-1], ast.Expr) else None
    exec(compile(ast.Module(body, []), name, "exec"), names)
    if not isinstance(last, ast.Expr):
        return ""
    value = eval(compile(ast.Expression(last.value), name, "eval"), names)
    show = getattr(value, "_repr_html_", None) or (lambda: repr(value))
    return "" if value is None else str(show())


def test_the_tour_is_there() -> None:
    assert "00_tour" in [path.stem for path in NOTEBOOKS]


@each_notebook
def test_a_notebook_is_committed_without_outputs(path: Path) -> None:
    for cell in code_cells(path):
        assert not cell.outputs and cell.execution_count is None


@each_notebook
def test_a_notebook_ends_by_asserting_what_it_claims(path: Path) -> None:
    assert code_cells(path)[-1].source.count("assert ") >= 3


@each_notebook
def test_a_notebook_runs_and_its_claims_hold(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {"__name__": "__main__"}
    shown = [run_cell(cell.source, f"{path.name}[{n}]", names) for n, cell in enumerate(code_cells(path))]
    assert len("".join(shown)) > 1000, "a notebook shows something"
    assert capsys.readouterr().out
    assert not list(tmp_path.iterdir()), "a notebook writes no files unless it cleans them up"


@pytest.mark.slow
@each_notebook
def test_a_notebook_runs_in_a_kernel_and_shows_something(path: Path) -> None:
    from nbclient import NotebookClient

    notebook = nbformat.read(path, as_version=4)
    NotebookClient(notebook, timeout=300, kernel_name="python3").execute()
    shown = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    assert any("text/html" in output.get("data", {}) for output in shown)
    assert not [output for output in shown if output.output_type == "error"]
