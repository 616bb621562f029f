"""Notebooks run from top to bottom, say true things, and are committed without their outputs."""

from pathlib import Path

import nbformat
import pytest

from tests.notebooks import NOTEBOOKS, REAL_MODELS, code_cells, run

NEED_REAL_MODELS = {"04_real_models", "06_real_models"}
"""These run to their end in tests/real."""

each_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
complete = pytest.mark.parametrize(
    "path", [path for path in NOTEBOOKS if path.stem not in NEED_REAL_MODELS], ids=lambda path: path.stem
)


def test_the_tour_is_there() -> None:
    assert "00_tour" in [path.stem for path in NOTEBOOKS]


@each_notebook
def test_a_notebook_is_committed_without_outputs(path: Path) -> None:
    for cell in code_cells(path):
        assert not cell.outputs and cell.execution_count is None


@each_notebook
def test_a_notebook_ends_by_asserting_what_it_claims(path: Path) -> None:
    assert code_cells(path)[-1].source.count("assert ") >= 3


@complete
@pytest.mark.usefixtures("unchecked")  # as a reader runs it: the type checker would take two thirds of its time
def test_a_notebook_runs_and_its_claims_hold(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    shown, stopped = run(path)
    assert not stopped
    assert len("".join(shown)) > 1000, "a notebook shows something"
    assert capsys.readouterr().out
    assert not list(tmp_path.iterdir()), "a notebook writes no files unless it cleans them up"


@pytest.mark.parametrize(
    "path", [path for path in NOTEBOOKS if path.stem in NEED_REAL_MODELS], ids=lambda path: path.stem
)
def test_without_its_models_a_notebook_says_what_it_needs_and_stops(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(REAL_MODELS, str(tmp_path))
    shown, stopped = run(path)
    assert stopped.startswith(f"set {REAL_MODELS} to a folder that holds ") and stopped.endswith(str(tmp_path))
    assert "\n" not in stopped and not "".join(shown)


@pytest.mark.slow
@complete
def test_a_notebook_runs_in_a_kernel_and_shows_something(path: Path) -> None:
    from nbclient import NotebookClient

    notebook = nbformat.read(path, as_version=4)
    NotebookClient(notebook, timeout=300, kernel_name="python3").execute()
    shown = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    assert any("text/html" in output.get("data", {}) for output in shown)
    assert not [output for output in shown if output.output_type == "error"]
