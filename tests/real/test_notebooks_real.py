"""The notebooks that need real models run to their end, and their claims hold."""

import time
from pathlib import Path

import pytest

from tests.notebooks import NOTEBOOKS, REAL_MODELS, run


@pytest.mark.usefixtures("unchecked")
def test_circuits_of_real_models(
    real: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv(REAL_MODELS, str(real / "models"))
    (path,) = (path for path in NOTEBOOKS if path.stem == "06_real_models")
    start = time.process_time()
    shown, stopped = run(path)
    assert not stopped and time.process_time() - start < 60
    assert sum("<iframe" in part for part in shown) == 2 and sum("plotly" in part for part in shown) >= 8
    assert "13 of 23 edges" in capsys.readouterr().out
    assert not list(tmp_path.iterdir()), "a notebook writes no files unless it cleans them up"
