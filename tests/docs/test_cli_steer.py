"""`interp steer`: a direction with its controls, the sweep of its doses, A/B questions, refusals."""

import json
from pathlib import Path

import pytest

from interp.cli.main import main
from interp.core.direction import Direction
from interp.core.result import Result
from interp.steering.evaluating.sweep_result import SteeringSweep
from interp.steering.fitting.direction_fit import DirectionFit

TASK = ["--model", "testbed", "--data.task", "sentiment", "--data.positive", " glad", " loved", "--data.n", "24"]
SMALL = ["--sites", "2.resid_post", "--doses", "-1", "0", "1", "--controls", "1", "--n-generated", "2"]


def test_a_direction_is_fitted_saved_swept_and_used_again(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "steer"
    assert main(["steer", *TASK, *SMALL, "--max-new-tokens", "4", "--out", str(out), "--json"]) == 0
    said = json.loads(capfd.readouterr().out)
    held = SteeringSweep.load(out / "result")
    assert said["cells"] == len(held) == 6 and held.slopes("sentiment").mean.low > 0
    assert isinstance(Result.load(out / "fit"), DirectionFit)
    assert {"settings.yaml", "direction.safetensors", "fit.csv", "sweep.csv", "steering.html"} <= {
        p.name for p in out.iterdir()
    }
    direction = out / "direction.safetensors"
    assert Direction.load(direction).sites == ["2.resid_post"]
    assert main(["steer", *TASK, *SMALL, "--out", str(out)]) == 2
    assert "--force" in capfd.readouterr().err
    again = tmp_path / "again"
    words = ["--direction", str(direction), "--where", "answer", "--unit", "sigma", "--n-generated", "0"]
    assert main(["steer", *TASK, *SMALL, *words, "--out", str(again)]) == 0
    assert not (again / "fit").exists() and SteeringSweep.load(again / "result").unit == "sigma"


@pytest.mark.filterwarnings("ignore:a control separates")  # the model answers with a letter, whatever the question
def test_questions_are_asked_both_ways_round(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    colours = ["pink", "black", "white", "green", "brown", "blue"]
    records = [
        {
            "question": f"Which colour is the shirt? Options:\n (A) {a}\n (B) {b}",
            "answer_matching_behavior": "(A)" if i % 2 else "(B)",
            "answer_not_matching_behavior": "(B)" if i % 2 else "(A)",
        }
        for i, (a, b) in enumerate((a, b) for a in colours for b in colours if a != b)
    ]
    file = tmp_path / "questions.json"
    file.write_text(json.dumps(records))
    words = ["--model", "testbed", "--data.questions", str(file), "--data.n", "20", "--doses", "0", "1"]
    out = tmp_path / "ab"
    small = ["--sites", "3.resid_post", "--controls", "0", "--n-generated", "1", "--max-new-tokens", "2"]
    assert main(["steer", *words, *small, "--out", str(out), "--json"]) == 0
    capfd.readouterr()
    assert (out / "answers.csv").is_file() and (out / "answers.html").is_file()
    fitted = DirectionFit.load(out / "fit")
    assert "letter" in fitted.read_at, "the letter tells the answers apart, not the bracket after it"


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (["--data.positive", " glad", "--data.texts", "x.csv"], 2, "positive goes with task"),
        ([*TASK[2:], "--data.texts", "x.csv"], 2, "one of task, texts, questions"),
        (["--data.task", "sentiment", "--data.positive", " gladd"], 1, "has one of"),
        ([*TASK[2:], "--method", "psychic"], 2, "method"),
        ([], 2, "give one of data.task"),
        ([*TASK[2:], "--sites", "9.resid_post"], 1, "9.resid_post"),
        ([*TASK[2:], "--direction", "nowhere.safetensors"], 1, "cannot be read as a direction"),
    ],
)
def test_what_cannot_be_is_refused(
    words: list[str], code: int, said: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert main(["steer", "--model", "testbed", *words, "--out", str(tmp_path / "out")]) == code
    assert said in capfd.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_dry_run_says_what_it_would_do(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    words = ["steer", *TASK, *SMALL, "--out", str(tmp_path / "out"), "--dry-run", "--json"]
    assert main(words) == 0
    said = json.loads(capfd.readouterr().out)
    assert said["cells"] == 6 and said["sites"] == ["2.resid_post"] and not (tmp_path / "out").exists()
