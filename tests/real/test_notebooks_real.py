"""The notebooks that need real models run to their end, and their claims hold."""

import time
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.notebooks import NOTEBOOKS, REAL_MODELS, run


class _Shown(NamedTuple):
    """What a notebook shows at the least: frames, figures, and words that it prints."""

    frames: int
    figures: int
    says: str


SHOWN = {
    "06_real_models": _Shown(2, 8, "13 of 23 edges"),
    "04_real_models": _Shown(0, 5, "One day, Tom went to the park. | She saw"),
}


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("stem", SHOWN)
def test_real_models(
    real: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], stem: str
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv(REAL_MODELS, str(real / "models"))
    (path,) = (path for path in NOTEBOOKS if path.stem == stem)
    start = time.process_time()
    shown, stopped = run(path)
    assert not stopped and time.process_time() - start < 60
    frames, figures, says = SHOWN[stem]
    assert sum("<iframe" in part for part in shown) == frames and sum("plotly" in part for part in shown) >= figures
    assert says in capsys.readouterr().out
    assert not list(tmp_path.iterdir()), "a notebook writes no files unless it cleans them up"
