"""`interp eval`: one command, one table, one page; the same bytes again; what it reads, writes and refuses."""

import csv
import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from interp.cli.main import main
from interp.evaluate.definitions import DEFINITIONS
from interp.evaluate.evaluations import UNKNOWN_NOISE
from tests.docs.test_cli_show import SITE, texts
from tests.families import make, word_tokenizer

FILES = ("evaluations.csv", "evaluations.json", "evaluations.html")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model, two texts, and a sweep over two sizes and two seeds."""
    folder = tmp_path_factory.mktemp("eval")
    make("Llama").save_pretrained(folder / "model")
    word_tokenizer().save_pretrained(folder / "model")
    (folder / "text.jsonl").write_text(texts(200), encoding="utf-8")
    (folder / "other.jsonl").write_text(texts(40, seed=1), encoding="utf-8")
    small = {"train.tokens": 1000, "train.batch-size": 100, "train.buffer-tokens": 300, "dictionary.d-sae": 40}
    small |= {"text.ctx": 16, "evaluation.tokens": 400, "text.rows": 4}
    words = [word for name, value in small.items() for word in (f"--{name}", str(value))]
    given = ["--model", str(folder / "model"), "--site", SITE, "--data", str(folder / "text.jsonl")]
    sweep = ["--sweep.k", "4", "6", "--sweep.seed", "0", "1"]
    assert main(["train", *given, *words, *sweep, "--out", str(folder / "sweep")]) == 0
    return folder


def rows_of(folder: Path) -> list[dict[str, str]]:
    with (folder / "evaluations.csv").open(encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_a_sweep_is_one_table_and_one_page_with_the_noise_of_its_seeds_and_the_same_bytes_again(
    made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    capsys.readouterr()
    assert main(["eval", str(made / "sweep"), "--out", str(tmp_path / "a")]) == 0
    shown = capsys.readouterr()
    assert all(str(tmp_path / "a" / name) in shown.out for name in FILES) and "measuring" in shown.err
    assert "k 4, 2 seeds: L0 " in shown.out and "PCA: FVU" in shown.out and UNKNOWN_NOISE not in shown.out
    rows = rows_of(tmp_path / "a")
    assert {row["run"] for row in rows} == {f"k-{k}_seed-{seed}" for k in (4, 6) for seed in (0, 1)}
    assert {(row["setting"], row["seed"]) for row in rows} == {(f"k {k}", s) for k in (4, 6) for s in "01"}
    assert {DEFINITIONS[row["figure"]].part for row in rows} >= {"core", "geometry", "seeds"}
    assert all(row["definition"] == DEFINITIONS[row["figure"]].meaning for row in rows)
    fvu = [row for row in rows if row["figure"] == "fvu"]
    assert all(float(row["low"]) < float(row["value"]) < float(row["high"]) and row["unit"] == "row" for row in fvu)
    assert all(float(row["smallest_difference"]) > float(row["seed_sd"]) > 0 for row in fvu)
    # What training wrote is what is measured again.
    for row in fvu:
        trained = json.loads((made / "sweep" / row["run"] / "evaluation.json").read_text())
        assert float(row["value"]) == pytest.approx(trained["fvu"])
    assert main(["eval", str(made / "sweep"), "--out", str(tmp_path / "b")]) == 0
    for name in FILES:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes(), name


def test_one_run_has_its_table_in_its_folder_and_says_that_its_noise_is_unknown(
    made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = shutil.copytree(made / "sweep" / "k-6_seed-0", tmp_path / "run")
    (run / "evaluation.json").unlink()
    capsys.readouterr()
    assert main(["eval", str(run), "--only", "core", "geometry", "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed.pop("out") == str(run) and printed.pop("files") == [str(run / name) for name in FILES]
    assert printed == json.loads((run / "evaluations.json").read_text()) and printed["notes"] == [UNKNOWN_NOISE]
    assert {row["setting"] for row in printed["rows"]} == {f"topk, 40 latents, k 6, at {SITE}"}
    assert all(row["seed_sd"] is None and row["n_seeds"] == 1 for row in printed["rows"])
    # The figures that `interp show` reads.
    figures = json.loads((run / "evaluation.json").read_text())
    assert figures["pca_rank"] == 6 and figures["text"] == f"every 20th document of {made / 'text.jsonl'}"
    before = (run / "evaluation.json").read_bytes()
    other = ["--data", str(made / "other.jsonl"), "--tokens", "100", "--pca-rank", "3", "--only", "core"]
    assert main(["eval", str(run), "--out", str(tmp_path / "other"), "--json", *other]) == 0
    rank = [row["value"] for row in json.loads(capsys.readouterr().out)["rows"] if row["figure"] == "pca_rank"]
    assert rank == [3] and (run / "evaluation.json").read_bytes() == before


def test_runs_of_several_folders_are_named_by_as_much_of_their_paths_as_tells_them_apart(
    made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("one", "two"):
        shutil.copytree(made / "sweep" / "k-4_seed-1", tmp_path / name / "run")
    runs = [str(tmp_path / name / "run") for name in ("one", "two")]
    assert main(["eval", *runs, "--only", "geometry", "--out", str(tmp_path / "out")]) == 0
    assert {row["run"] for row in rows_of(tmp_path / "out")} == {"one/run", "two/run"}
    capsys.readouterr()
    cases: list[tuple[list[Any], int, str]] = [
        ([], 2, ""),
        (runs, 2, "with --out FOLDER"),
        ([runs[0], "--out", str(made / "text.jsonl")], 2, "is a file"),
        ([runs[0], runs[0], "--out", str(tmp_path / "x")], 1, "named twice"),
        ([runs[0], "--only", "dark"], 2, "dark"),
        ([str(made / "model")], 1, "holds no cfg.json"),
    ]
    for words, code, message in cases:
        assert main(["eval", *words]) == code, words
        shown = capsys.readouterr()
        assert message in shown.err and "Traceback" not in shown.err and not shown.out, words


def test_a_sweep_that_is_not_finished_is_refused_by_name(
    made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sweep = shutil.copytree(made / "sweep", tmp_path / "sweep")
    (sweep / "k-6_seed-1" / "cfg.json").unlink()
    assert main(["eval", str(sweep)]) == 1
    assert "has not finished k-6_seed-1; interp train --resume" in capsys.readouterr().err
