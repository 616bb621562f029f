"""`interp testbed`: every command, as a person at a shell meets it."""

import json
from pathlib import Path

import pytest

import interp
from interp.cli.main import main
from interp.testbed.text import TASKS, Text
from interp.testbed.words import LABELS


def run(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    code = main(["testbed", *words])
    said = capsys.readouterr()
    return code, said.out, said.err


def test_describe_names_models_tasks_and_labels(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, "describe")
    assert code == 0 and all(word in out for word in ("testbed-llama", *TASKS, *LABELS))
    code, out, _ = run(capsys, "describe", "--json")
    assert code == 0 and set(json.loads(out)["tasks"]) == set(TASKS)


def test_tasks_show_a_prompt_and_its_answer(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, "tasks", "--json")
    rows = json.loads(out)
    assert code == 0 and [row["task"] for row in rows] == list(TASKS)
    assert all(row["prompt"] and row["answers"] for row in rows)
    code, out, _ = run(capsys, "tasks")
    assert code == 0 and out.count("held out by") == len(TASKS)


def test_samples_are_the_texts_documents(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, "sample", "--n", "3", "--seed", "4", "--task", "ioi", "--json")
    assert code == 0 and json.loads(out) == [d.text for d in Text(4, tasks=["ioi"]).documents(3)]
    code, out, _ = run(capsys, "sample", "--n", "1", "--task", "years", "--labels")
    assert code == 0 and "role start_year" in out
    code, _, err = run(capsys, "sample", "--task", "ioo")
    assert code == 1 and "ioi" in err


def test_pairs_are_written_once_and_read_back(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    file = tmp_path / "ioi.json"
    code, out, _ = run(capsys, "pairs", "--task", "ioi", "--n", "7", "--out", str(file))
    assert code == 0 and str(file) in out and len(interp.PromptPairs.load(file)) == 7
    before = file.read_bytes()
    code, _, err = run(capsys, "pairs", "--task", "ioi", "--out", str(file))
    assert code == 1 and "already" in err and file.read_bytes() == before


def test_a_card_of_few_examples_prints_every_task(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, "card", "--n", "4", "--json")
    assert code == 0 and [row["task"] for row in json.loads(out)["tasks"]] == list(TASKS)
    code, out, _ = run(capsys, "card", "--n", "4", "--markdown")
    assert code == 0 and out.startswith("# testbed") and "| ioi |" in out


def test_rebuild_says_what_it_would_do_and_does_it(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    out_dir = tmp_path / "run"
    code, out, _ = run(capsys, "rebuild", "--out", str(out_dir), "--steps", "3", "--dry-run")
    assert code == 0 and "steps: 3" in out and not out_dir.exists()
    code, out, _ = run(capsys, "rebuild", "--out", str(out_dir), "--steps", "2")
    assert code == 0 and str(out_dir / "final") in out
    assert interp.HookManager.load(out_dir / "final").n_layers == 4
    code, _, err = run(capsys, "rebuild", "--out", str(out_dir), "--steps", "2")
    assert code == 1 and "already holds" in err


@pytest.mark.parametrize("words", [(), ("sampel",), ("sample", "--n", "none"), ("card", "--what")])
def test_bad_usage_is_told_and_exits_with_2(words: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = run(capsys, *words)
    assert code == 2 and not out and err
