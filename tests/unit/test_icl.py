"""Tasks in context: templates, splits, shots and their corruptions, and tasks on disk."""

import json
from pathlib import Path

import pytest

from interp.core.errors import ArtifactError, ConfigError, DataError
from interp.data.icl import CORRUPTIONS, FunctionTask, icl_pairs, load_function_task, load_function_tasks, with_others

PLURAL = FunctionTask("plural", tuple((f"x{i}", f"x{i}s") for i in range(20)))


def test_a_prompt_is_its_shots_and_the_question_up_to_the_answer() -> None:
    assert PLURAL.prompt([("cat", "cats")], "dog") == "Q: cat\nA: cats\n\nQ: dog\nA:"
    assert PLURAL.answer("dogs") == " dogs"
    tight = PLURAL.with_template("{input}->{output},")
    assert tight.prompt([("cat", "cats")], "dog") == "cat->cats,dog->" and tight.answer("dogs") == "dogs"
    braces = PLURAL.with_template("f({input}) = {{output}}")
    assert braces.prompt([("{output}", "{input}")], "y") == "f({output}) = {{input}}f(y) = {"


@pytest.mark.parametrize("corruption", CORRUPTIONS)
def test_a_twin_asks_the_same_and_shows_something_else(corruption: str) -> None:
    task = with_others({"plural": PLURAL, "double": FunctionTask("double", tuple((x, x + x) for x in PLURAL.inputs))})
    split = task["plural"].split()
    pairs = icl_pairs(split.validation, split.train, 30, n_shots=5, corruption=corruption)
    again = icl_pairs(split.validation, split.train, 30, n_shots=5, corruption=corruption)
    assert len(pairs) == 30 and pairs == again
    assert pairs != icl_pairs(split.validation, split.train, 30, n_shots=5, corruption=corruption, seed=1)
    differ = 0
    for pair in pairs:
        clean, broken = (side.text.removesuffix("\nA:").split("\n\n") for side in (pair.clean, pair.corrupted))
        x = str(pair.meta["input"])
        assert clean[-1] == broken[-1] == f"Q: {x}" and pair.answers == (f" {x}s",)
        shown = [shot.removeprefix("Q: ").split("\nA: ") for shot in clean[:-1]]
        assert all(y == f"{a}s" for a, y in shown) and len({a for a, _ in shown}) == 5
        assert {a for a, _ in shown} <= set(split.train.inputs)
        if corruption == "zero_shot":
            assert len(broken) == 1
            continue
        other = [shot.removeprefix("Q: ").split("\nA: ") for shot in broken[:-1]]
        assert [a for a, _ in other] == [a for a, _ in shown]
        if corruption == "shuffled":
            assert sorted(y for _, y in other) == sorted(y for _, y in shown)
        else:
            assert all(y in (f"{a}s", a + a) for a, y in other)
        differ += other != shown
    assert corruption == "zero_shot" or differ > 25


def test_parts_share_no_input_and_questions_are_not_repeated_before_they_must() -> None:
    twice = FunctionTask("city", (*PLURAL.examples, ("x0", "other"), ("x1", "other")))
    split = twice.split(seed=3)
    inputs = [set(part.inputs) for part in split]
    assert sum(len(part) for part in split) == 22 and [len(i) for i in inputs] == [8, 6, 6]
    assert not (inputs[0] & inputs[1] or inputs[0] & inputs[2] or inputs[1] & inputs[2])
    assert split == twice.split(seed=3) != twice.split(seed=4)
    pairs = icl_pairs(twice, twice, 40, n_shots=2)
    asked = [pair.meta["input"] for pair in pairs]
    assert len(set(asked[:20])) == len(set(asked[20:])) == 20
    whole = icl_pairs(twice, twice, n_shots=0)
    assert [pair.meta["input"] for pair in whole] == twice.inputs and whole[0].answers == (" x0s", " other")
    assert all(x not in pair.clean.text.split("Q: ")[1:-1] for pair in pairs for x in [f"{pair.meta['input']}\nA"])


def test_tasks_are_read_from_json_and_know_each_other(tmp_path: Path) -> None:
    held: dict[str, list[tuple[str, str | int]]] = {
        "first": [("abc", "a"), ("xyz", "x"), ("only", "o")],
        "last": [("abc", "c"), ("xyz", "z"), ("one", 1)],
    }
    for name, rows in held.items():
        (tmp_path / f"{name}.json").write_text(json.dumps([{"input": x, "output": y} for x, y in rows]))
    tasks = load_function_tasks(tmp_path, template="{input}: {output}\n")
    assert list(tasks) == ["first", "last"] and tasks["last"].examples[-1] == ("one", "1")
    assert tasks["first"].others == {"abc": ("c",), "xyz": ("z",)}
    assert load_function_task(tmp_path / "first.json").name == "first"
    (tmp_path / "bad.json").write_text('[{"input": "a"}]')
    with pytest.raises(ArtifactError, match=r"bad.json, entry 0"):
        load_function_tasks(tmp_path)
    (tmp_path / "bad.json").write_text("{")
    with pytest.raises(ArtifactError, match="cannot be read as JSON"):
        load_function_task(tmp_path / "bad.json")
    (tmp_path / "more" / "inside").mkdir(parents=True)
    with pytest.raises(ArtifactError, match="holds the folders inside"):
        load_function_tasks(tmp_path / "more")


@pytest.mark.usefixtures("unchecked")
def test_what_cannot_be_shown_is_refused() -> None:
    with pytest.raises(DataError, match="once"):
        PLURAL.with_template("{output} of {input}")
    with pytest.raises(DataError, match="needs \\(input, output\\)"):
        FunctionTask("empty", (("a", " "),))
    with pytest.raises(ConfigError, match="shares"):
        PLURAL.split(test=0.7)
    with pytest.raises(DataError, match="too few"):
        FunctionTask("small", (("a", "b"), ("c", "d"))).split()
    with pytest.raises(ConfigError, match="did you mean 'shuffled'"):
        icl_pairs(PLURAL, PLURAL, corruption="shuffle")
    with pytest.raises(DataError, match="to draw 20 shots"):
        icl_pairs(PLURAL, PLURAL, n_shots=20)
    with pytest.raises(DataError, match="with_others"):
        icl_pairs(PLURAL, PLURAL, n_shots=2, corruption="others")
    with pytest.raises(ConfigError, match="n=0"):
        icl_pairs(PLURAL, PLURAL, 0)
