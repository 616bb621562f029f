"""Loaders of task files on small files made here: what they read, and what they say of files that are not so."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas
import pytest

from interp.core.errors import ArtifactError, ConfigError, DataError
from interp.core.where import Where
from interp.data.axbench import load_axbench
from interp.data.concept import Concept
from interp.data.contrast import Contrast
from interp.data.task_files import load_ab_questions, load_refusal_splits, load_repe, load_word_pairs
from tests.families import word_tokenizer

EVAL = "inference/latent_eval_data.parquet"


def write(path: Path, what: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(what if isinstance(what, str) else json.dumps(what), encoding="utf-8")
    return path


def texts(contrast: Contrast) -> tuple[list[str], list[str]]:
    return [p.text for p in contrast.positive], [p.text for p in contrast.negative]


# -- A/B questions -----------------------------------------------------------------------------------------------


def test_questions_of_a_folder_or_a_file(tmp_path: Path) -> None:
    row = {"question": "Well?\n (A) Yes\n (B) No", "answer_matching_behavior": " (A)"}
    row["answer_not_matching_behavior"] = " (B)"
    write(tmp_path / "agree.jsonl", json.dumps(row) + "\n\n" + json.dumps(row))
    write(tmp_path / "other.json", [row])
    found = load_ab_questions(tmp_path)
    assert {name: len(held) for name, held in found.items()} == {"agree": 2, "other": 1}
    assert found["agree"].letters == {"A": 2} and list(load_ab_questions(tmp_path / "other.json")) == ["other"]
    write(tmp_path / "bad.json", [{"question": "Well?", "answer": "A"}])
    with pytest.raises(
        ArtifactError, match=r"bad\.json has no 'answer_matching_behavior'; it has 'question', 'answer'"
    ):
        load_ab_questions(tmp_path)
    with pytest.raises(ArtifactError, match=r"has no \.json or \.jsonl file"):
        load_ab_questions(write(tmp_path / "empty" / "a.txt", "x").parent)


# -- refusal -----------------------------------------------------------------------------------------------------


def test_refusal_splits_are_balanced_and_drawn_by_seed(tmp_path: Path) -> None:
    bad = [{"instruction": f"bad {i}", "category": "c" if i else None} for i in range(4)]
    good = [{"instruction": f"good {i}", "category": None} for i in range(9)]
    write(tmp_path / "dataset/splits/harmful_train.json", [*bad, bad[1]])
    write(tmp_path / "dataset/splits/harmless_train.json", good)
    write(tmp_path / "dataset/splits/harmful_val.json", bad[:1])
    splits = load_refusal_splits(tmp_path)
    assert splits.harmful["train"] == ("bad 0", "bad 1", "bad 2", "bad 3"), "a text that stands twice counts once"
    assert splits.categories["train"] == (None, "c", "c", "c")
    pair = splits.contrast()
    assert len(pair.positive) == len(pair.negative) == 4 and not pair.paired
    assert texts(pair) == texts(splits.contrast()) and texts(pair) != texts(splits.contrast(seed=1))
    assert {t.split()[0] for t in texts(pair)[1]} == {"good"}
    with pytest.raises(DataError, match=r"has no harmless_val\.json; of that kind it has harmless_train\.json"):
        splits.contrast("val")
    with pytest.raises(DataError, match="4 harmful and 9 harmless"):
        splits.contrast(n=5)
    with pytest.raises(ConfigError, match="split='trian'"):
        splits.contrast("trian")
    write(tmp_path / "dataset/splits/harmful_val.json", [{"text": "bad"}])
    with pytest.raises(ArtifactError, match=r"entry 0 of .*harmful_val\.json has no 'instruction'; it has 'text'"):
        load_refusal_splits(tmp_path / "dataset")


# -- representation reading --------------------------------------------------------------------------------------


def test_an_emotion_is_told_from_the_others_and_facts_by_their_label(tmp_path: Path) -> None:
    write(tmp_path / "data/emotions/anger.json", ["a cut", "a row", "both"])
    write(tmp_path / "data/emotions/fear.json", ["a bear", "both"])
    write(
        tmp_path / "data/facts/facts_true_false.csv",
        'statement,label\n"Rome, Italy.",1\nBerlin is small.,0\nBoth,1\nBoth,0\n',
    )
    found = load_repe(tmp_path)
    assert list(found) == ["anger", "fear", "facts"]
    assert texts(found["anger"]) == (["a cut", "a row", "both"], ["a bear"])
    assert texts(found["facts"]) == (["Rome, Italy."], ["Berlin is small."])
    write(tmp_path / "data/facts/facts_true_false.csv", "statement,truth\nRome,1\n")
    with pytest.raises(ArtifactError, match="no column 'label'; its columns are 'statement', 'truth'"):
        load_repe(tmp_path)
    write(tmp_path / "data/emotions/fear.json", {"a": 1})
    with pytest.raises(ArtifactError, match=r"fear\.json holds a dict of 1; expected a list of texts"):
        load_repe(tmp_path)
    with pytest.raises(ArtifactError, match=r"has no emotions/\*\.json or facts/\*\.csv; .*has data"):
        load_repe(write(tmp_path / "x/data/y.txt", "z").parents[1])


# -- word pairs --------------------------------------------------------------------------------------------------


def test_word_pairs_are_read_by_concept(tmp_path: Path) -> None:
    write(tmp_path / "[male - female].txt", "king\tqueen\nhe\tshe\n\nking\tqueen\n")
    write(tmp_path / "capitals.txt", "France Paris\n")
    assert load_word_pairs(tmp_path) == {
        "male - female": (("king", "queen"), ("he", "she")),
        "capitals": (("France", "Paris"),),
    }
    assert list(load_word_pairs(tmp_path / "capitals.txt")) == ["capitals"]
    write(tmp_path / "capitals.txt", "France Paris\nNew York City\n")
    with pytest.raises(ArtifactError, match=r"line 2 of .*capitals\.txt is 'New York City'"):
        load_word_pairs(tmp_path)
    with pytest.raises(ArtifactError, match=r"no\.txt is no file of word pairs"):
        load_word_pairs(tmp_path / "no.txt")
    with pytest.raises(ArtifactError, match=r"no folder with \.txt files; .*empty has a\.json"):
        load_word_pairs(write(tmp_path / "empty" / "a.json", "x").parent)


# -- AxBench -----------------------------------------------------------------------------------------------------


def row(number: int, category: str, said: str, **more: Any) -> Mapping[str, Any]:
    held = {"input": f"w1 {category.split()[0][:1]}", "output": said, "output_concept": f"concept {number}"}
    return {**held, "concept_genre": "text", "category": category, "concept_id": number, **more}


def axbench(folder: Path, *, train: Sequence[Any] = (), held: Sequence[Any] = ()) -> Path:
    default = [row(i, "positive", f"w5{i} w2") for i in (0, 1)] + [row(-1, "negative", "w7")]
    default += [row(-1, "negative", "w8", concept_genre="math")]
    tests = [row(i, kind, f" w5{i} w3 ") for i in (0, 1) for kind in ("positive", "negative")]
    tests += [row(0, "hard negative", "w9"), row(0, "hard negative", "  ")]
    for name, rows in (("generate/train_data.parquet", train or default), (EVAL, held or tests)):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        pandas.DataFrame(list(rows)).to_parquet(folder / name)
    return folder


def test_axbench_concepts_share_the_negatives_of_their_genre_and_name_the_output(tmp_path: Path) -> None:
    found = load_axbench(axbench(tmp_path))
    assert len(found) == 2 and found.numbers == (0, 1) and found.genres == ("text", "text")
    first = found[0]
    assert isinstance(first.fit, Contrast) and isinstance(first.held_out, Contrast)
    assert texts(first.fit) == (["w1 p\nw50 w2"], ["w1 n\nw7"]), "negatives of the other genre are left out"
    assert texts(first.held_out) == (["w1 p\nw50 w3"], ["w1 n\nw50 w3"])
    assert [p.text for p in first.hard] == ["w1 h\nw9"] and found.skipped == 1 and not found[1].hard
    assert first.where == Where(name="output") and found.instructions == ("w1 p", "w1 n", "w1 h")
    tokenizer = word_tokenizer()
    data = first.fit.tokens(tokenizer, where=first.where)
    read = [tokenizer.decode(r[m].tolist()) for r, m in zip(data.tokens.ids, data.read, strict=True)]
    assert read == ["w50 w2", "w7"]
    chat = load_axbench(tmp_path, template="<u>{input}<a>{output}<e>", max_characters=3, limit=1)
    assert len(chat) == 1 and isinstance(chat[0].fit, Contrast)
    assert texts(chat[0].fit) == (["<u>w1 <a>w50<e>"], ["<u>w1 <a>w7<e>"])


def test_axbench_folders_that_lack_something_say_what_they_have(tmp_path: Path) -> None:
    axbench(tmp_path)
    (tmp_path / EVAL).rename(tmp_path / "elsewhere.parquet")
    with pytest.raises(ArtifactError, match=r"has elsewhere\.parquet, generate/train_data\.parquet"):
        load_axbench(tmp_path)
    pandas.DataFrame([{"input": "a", "answer": "b"}]).to_parquet(tmp_path / EVAL)
    with pytest.raises(ArtifactError, match="no column 'output'; its columns are 'input', 'answer'"):
        load_axbench(tmp_path)
    axbench(tmp_path, train=[row(0, "positive", "w5", concept_genre="code"), row(-1, "negative", "w7")])
    with pytest.raises(DataError, match=r"concept 0 .* has no negative training text"):
        load_axbench(tmp_path)
    for template in ("{input}{output}", "{output} {input}", "{input} {input} {output}"):
        with pytest.raises(ConfigError, match=r"expected \{"):
            load_axbench(tmp_path, template=template)
    with pytest.raises(ArtifactError, match="is no folder"):
        load_axbench(tmp_path / "nothing")


# -- the noun ----------------------------------------------------------------------------------------------------


def test_a_concept_gives_its_parts_as_tokens_and_refuses_what_contradicts() -> None:
    fit, held = Contrast.make(["w1 w5"] * 3, ["w1 w6"] * 3), Contrast.make(["w2 w5"], ["w2 w6"])
    tokenizer = word_tokenizer()
    hard = (*Contrast.make(["w3"], ["w4 w4"]).positive,)
    concept = Concept("five", fit, held, hard=hard)
    assert concept.tokens(tokenizer, "hard").labels.max(1).values.tolist() == [1, 0]
    split = Concept.of(fit, hm=tokenizer, share=0.34)
    assert len(split.tokens(tokenizer)) == 4 and len(split.tokens(tokenizer, "held_out")) == 2
    with pytest.raises(DataError, match="no hard negatives"):
        split.tokens(tokenizer, "hard")
    with pytest.raises(DataError, match="give hm="):
        Concept.of(fit)
    with pytest.raises(DataError, match="a word of the concept and of its opposite"):
        Concept("x", fit, held, words=(" a",), opposite=(" a",))
    with pytest.raises(DataError, match="hard negatives are texts"):
        Concept("x", fit, fit.tokens(tokenizer), hard=hard)


# -- files that are damaged or careless ---------------------------------------------------------------------------


def test_a_line_separator_within_a_text_ends_no_line(tmp_path: Path) -> None:
    row = {"question": "Well?\u2028\n (A) Yes\n (B) No", "answer_matching_behavior": " (A)"}
    row["answer_not_matching_behavior"] = " (B)"
    path = write(tmp_path / "a.jsonl", json.dumps(row, ensure_ascii=False) + "\n")
    assert "\u2028" in load_ab_questions(path)["a"][0].question
    write(tmp_path / "facts/facts_true_false.csv", 'statement,label\n"two\nlines",1\none\x85line,0\n')
    assert texts(load_repe(tmp_path)["facts"]) == (["two\nlines"], ["one\x85line"])


def test_what_is_no_text_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "r/harmful_train.json", [{"instruction": ["a", "b"]}])
    with pytest.raises(ArtifactError, match=r"'instruction' of entry 0 .* expected a text"):
        load_refusal_splits(tmp_path / "r")
    write(tmp_path / "facts/facts_true_false.csv", f"statement,label\n{'x' * 200_000},1\ny,0\n")
    with pytest.raises(ArtifactError, match=r"cannot be read as CSV \(field larger"):
        load_repe(tmp_path)
    write(tmp_path / "facts/facts_true_false.csv", "statement,label\nx,1\n")
    with pytest.raises(ArtifactError, match="1 true and 0 false statements"):
        load_repe(tmp_path)


def test_axbench_rows_without_text_and_negatives_that_name_their_concept(tmp_path: Path) -> None:
    train = [row(0, "positive", "o1"), row(-1, "negative", "o2")]
    held = [row(0, "positive", "o3"), row(0, "negative", "o4"), row(0, "positive", "o7", input=None)]
    more = [row(0, "positive", "o5", output=None), row(0, "negative", "o6")]
    found = load_axbench(axbench(tmp_path, train=[*train, *more], held=held))
    assert isinstance(found[0].fit, Contrast) and isinstance(found[0].held_out, Contrast)
    assert texts(found[0].fit) == (["w1 p\no1"], ["w1 n\no2", "w1 n\no6"]), "a null is no text, negatives are negative"
    assert texts(found[0].held_out) == (["w1 p\no3"], ["w1 n\no4"]) and found.skipped == 2
    assert found.instructions == ("w1 p", "w1 n")
    for limit, most in ((0, None), (None, -1)):
        with pytest.raises(ConfigError, match="expected a whole number"):
            load_axbench(tmp_path, limit=limit, max_characters=most)
    named = [{**one, "concept_id": str(one["concept_id"])} for one in train]
    with pytest.raises(ArtifactError, match=r"concept_id .* expected numbers"):
        load_axbench(axbench(tmp_path, train=named, held=held))
