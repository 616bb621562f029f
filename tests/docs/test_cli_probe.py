"""`interp probe`: a label, a table, a folder of tables; files, JSON, refusals."""

import csv
import json
from pathlib import Path

import pytest

from interp.cli.main import main
from interp.cli.probe import ProbeConfig
from interp.core.direction import Direction
from interp.core.errors import ConfigError, DataError
from interp.data.contrast_files import contrast_from_file, contrasts_in_folder
from interp.probing.detect import Transfer
from interp.probing.result import ProbeResult
from interp.probing.sparse_result import SparseProbes
from interp.testbed.concepts import world_concept
from interp.testbed.tasks import task_pairs

LABEL = [
    "--model",
    "testbed",
    "--data.label",
    "gender",
    "--data.n",
    "30",
    "--data.per-class",
    "40",
    "--n-bootstrap",
    "50",
]


LIKED = ("glad", "success", "loved", "recommend", "positive")


def table(path: Path, *, held_out: bool, n: int = 40) -> None:
    """Texts of the small world that end in whether something was liked, as a table."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["text", "label", "group"])
        for i, pair in enumerate(task_pairs("sentiment", n, held_out=held_out)):
            writer.writerow([f"{pair.clean.text}{pair.answers[0]}", pair.answers[0].strip() in LIKED, f"g{i}"])


def test_a_label_leaves_scores_a_page_a_result_and_a_direction(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "probe"
    words = ["probe", *LABEL, "--sites", "0.resid_pre", "1.resid_post", "--out", str(out)]
    assert main([*words, "--json"]) == 0
    said = json.loads(capfd.readouterr().out)
    held = ProbeResult.load(out / "result")
    assert said["probes"]["gender"]["auroc"] == list(held.get("auroc")) and held.get("auroc").mean > 0.9
    assert {p.name for p in out.iterdir()} == {
        "settings.yaml",
        "scores.csv",
        "probe.html",
        "result",
        "direction.safetensors",
    }
    assert Direction.load(out / "direction.safetensors").sites == held.sites
    assert main(words) == 2 and "give another folder, or --force" in capfd.readouterr().err
    assert main([*words, "--force", "--kind", "lda"]) == 0
    assert ProbeResult.load(out / "result").kind == "lda" and "selectivity" in capfd.readouterr().out


def test_few_neurons_leave_a_table_of_neurons(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "sparse"
    assert main(["probe", *LABEL, "--sites", "0.post", "--k", "1", "4", "--out", str(out), "--json"]) == 0
    said = json.loads(capfd.readouterr().out)
    held = SparseProbes.load(out / "result")
    assert said["best"]["4"]["units"] == held.chosen(4) and len(held.chosen(4)) == 4
    rows = list(csv.DictReader((out / "neurons.csv").read_text().splitlines()))
    assert len(rows) == 10 and {"site", "layer", "unit", "mcc"} <= set(rows[0])


def test_tables_of_a_folder_are_probed_and_tried_on_one_another(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    folder, out = tmp_path / "data", tmp_path / "out"
    folder.mkdir()
    for name in "ab":
        table(folder / f"{name}.csv", held_out=name == "b")
    line = [
        "probe",
        "--model",
        "testbed",
        "--data.folder",
        str(folder),
        "--sites",
        "2.resid_post",
        "--n-bootstrap",
        "20",
    ]
    assert main([*line, "--out", str(out), "--json"]) == 0
    said = json.loads(capfd.readouterr().out)
    assert set(said["probes"]) == {"a", "b"}
    across = Transfer.load(out / "transfer")
    assert across.probes == across.datasets == ["a", "b"] and (out / "a" / "direction.safetensors").is_file()
    assert main([*line, "--k", "2", "--out", str(tmp_path / "k")]) == 2
    assert "no folder" in capfd.readouterr().err
    assert main([*line, "--data.label-column", "group", "--out", str(tmp_path / "no")]) == 1
    assert "Give positive" in capfd.readouterr().err and not (tmp_path / "no").exists()


def test_a_dry_run_says_what_would_be_probed_and_the_shipped_config_is_read(
    repo: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    config = repo / "configs" / "probe-testbed.yaml"
    assert ProbeConfig.from_yaml(config).data.label == "sentiment"
    words = [str(config), "--data.n", "40", "--out", str(tmp_path / "out"), "--dry-run"]
    assert main(["probe", *words, "--json"]) == 0
    said = json.loads(capfd.readouterr().out)
    assert said["sites"] == ["0.resid_pre", *[f"{i}.resid_post" for i in range(4)]]
    assert set(said["tokens"]["sentiment"]) == {"negative", "positive"} and not list(tmp_path.iterdir())
    assert main(["probe", *words]) == 0 and "MiB of activations" in capfd.readouterr().out


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (["--data.file", "x.csv"], 2, "give one of label, file and folder, got label and file"),
        (["--kind", "svm"], 2, "svm"),
        (["--k", "0"], 2, "at least 1"),
        (["--data.label", "gendr"], 1, "did you mean 'gender'"),
        (["--sites", "9.resid_post"], 1, "9.resid_post"),
    ],
)
def test_wrong_lines_are_refused_in_one_line_and_leave_nothing(
    words: list[str], code: int, message: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert main(["probe", *LABEL, *words, "--out", str(tmp_path / "out")]) == code
    err = " ".join(capfd.readouterr().err.replace("│", " ").split())
    assert message in err and "Traceback" not in err
    assert not (tmp_path / "out").exists()
    assert main(["probe", "--model", "testbed", "--out", str(tmp_path / "out")]) == 2
    assert "give --data.label" in capfd.readouterr().err


def test_a_table_is_read_with_its_groups_and_what_is_wrong_with_it_is_said(tmp_path: Path) -> None:
    def write(name: str, body: str) -> Path:
        (tmp_path / name).write_text(body, encoding="utf-8")
        return tmp_path / name

    lines = write(
        "a.jsonl", '{"text": "x, y", "label": true, "group": "g"}\n\n{"text": "z", "label": false, "group": "h"}\n'
    )
    held = contrast_from_file(lines)
    assert [p.text for p in held.positive] == ["x, y"] and held.groups == (("g",), ("h",)) and held.name == "a"
    quoted = write("b.csv", '\ufefftext,label\n"two\nlines, one text",yes\nplain,no\nmore,no\n')
    held = contrast_from_file(quoted)
    assert held.positive[0].text == "two\nlines, one text" and len(held.negative) == 2 and held.groups is None
    tabs = write("c.tsv", "said\tkind\nx\tcat\ny\tdog\nz\tcow\n")
    held = contrast_from_file(tabs, text="said", label="kind", positive="dog", name="dogs")
    assert (len(held.positive), len(held.negative), held.name) == (1, 2, "dogs")
    for path, message in (
        (write("d.csv", "txt,label\nx,1\n"), "did you mean 'txt'"),
        (write("e.csv", "text,label\nx,cat\ny,dog\n"), "Give positive"),
        (write("f.csv", "text,label\nx,1\ny,1\n"), "both kinds"),
        (write("g.csv", "text,label\nx,1\n,0\n"), "line 3: no 'text'"),
        (write("h.csv", "text,label\nx,1,2\ny,0\n"), "columns are named"),
        (write("i.jsonl", "{\n"), "line 1: not JSON"),
        (write("j.jsonl", "[1]\n"), "expected an object"),
        (write("k.txt", "x"), "is none of"),
        (write("l.csv", "text,label\n"), "holds no rows"),
        (tmp_path / "a.json", "did you mean 'a.jsonl'"),
    ):
        with pytest.raises(DataError, match=message):
            contrast_from_file(path)
    (tmp_path / "two").mkdir()
    with pytest.raises(DataError, match="it is empty"):
        contrasts_in_folder(tmp_path / "two")
    for name in ("x.csv", "x.tsv"):
        (tmp_path / "two" / name).write_text(quoted.read_text(), encoding="utf-8")
    with pytest.raises(DataError, match="two files named 'x'"):
        contrasts_in_folder(tmp_path / "two")


def test_a_table_is_read_as_it_was_written_or_refused(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    file.write_text(
        json.dumps({"text": "one\u2028two", "label": 1}, ensure_ascii=False) + '\n{"text": "x", "label": 0}'
    )
    assert contrast_from_file(file).positive[0].text == "one\u2028two"
    file = tmp_path / "a.csv"
    file.write_text('text,label\none\x85two,1\n"three\nfour",0\n', encoding="utf-8")
    held = contrast_from_file(file)
    assert (held.positive[0].text, held.negative[0].text) == ("one\x85two", "three\nfour")
    for body, said in (
        ("text,text,label\na,b,1\nc,d,0\n", "two columns 'text'"),
        (f"text,label\n{'y' * 200_000},1\nx,0\n", "is a quote left open"),
        ("text,label\n   ,1\nx,0\n", "expected a text"),
    ):
        file.write_text(body)
        with pytest.raises(DataError, match=said):
            contrast_from_file(file)
    file = tmp_path / "b.jsonl"
    file.write_text('{"text": ["a", "b"], "label": 1}\n{"text": "c", "label": 0}')
    with pytest.raises(DataError, match=r"line 1: 'text' is \['a', 'b'\]; expected a text"):
        contrast_from_file(file)


def test_a_table_that_is_called_as_a_result_is_refused_before_work_starts(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    for name in ("a", "transfer"):
        table(tmp_path / f"{name}.csv", held_out=False, n=8)
    words = ["probe", "--model", "testbed", "--data.folder", str(tmp_path), "--out", str(tmp_path / "out")]
    assert main(words) == 1 and "a table named 'transfer'" in capfd.readouterr().err
    assert not (tmp_path / "out").exists()
    (tmp_path / "bad.yaml").write_bytes(b"\xff\xfe")
    assert main(["probe", str(tmp_path / "bad.yaml")]) == 2 and "is not YAML" in capfd.readouterr().err


def test_a_class_is_asked_for_once() -> None:
    with pytest.raises(ConfigError, match="each once"):
        world_concept(None, "sentiment", 4, classes=["positive", "positive"])


def test_a_full_disk_is_named(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(self: ProbeResult, path: Path) -> Path:
        raise OSError(28, "No space left on device")

    table(tmp_path / "a.csv", held_out=False)
    monkeypatch.setattr(ProbeResult, "to_html", full)
    words = ["probe", "--model", "testbed", "--data.file", str(tmp_path / "a.csv"), "--sites", "1.resid_post"]
    assert main([*words, "--n-bootstrap", "0", "--out", str(tmp_path / "out")]) == 1
    assert "cannot be written: No space left on device; make room" in capfd.readouterr().err
