"""The tasks of the function vectors paper under GPT-2's own tokenizer, and the method on a real model."""

from dataclasses import replace
from pathlib import Path

import pytest
import transformers as tf

from interp.core.errors import ArtifactError
from interp.core.manager import HookManager
from interp.core.where import Where
from interp.data.icl import FunctionTask, icl_pairs, load_function_tasks
from interp.steering.function_vectors.evaluate import evaluate_function_vector
from interp.steering.function_vectors.options import ICLOptions
from interp.steering.function_vectors.vector import function_vector

FOLDER = Path("tasks", "function_vectors", "dataset_files")


@pytest.mark.parametrize(("kind", "n"), [("abstractive", 27), ("extractive", 26)])
def test_every_task_loads_and_its_prompts_fit_the_tokenizer_of_gpt2(real: Path, kind: str, n: int) -> None:
    tokenizer = tf.AutoTokenizer.from_pretrained(str(real / "models" / "tok-gpt2"))
    tasks = load_function_tasks(real / FOLDER / kind)
    assert len(tasks) == n and min(len(task) for task in tasks.values()) >= 190
    for name, task in tasks.items():
        split = task.split()
        assert not set(split.test.inputs) & set(split.train.inputs)
        pairs = icl_pairs(split.validation, split.train, 3, n_shots=5)
        assert not [p for p in pairs.problems(tokenizer, same_length=False) if p.fatal], name
        held = pairs.tokens(tokenizer, side="left", same_length=False)
        for pair, answers in zip(pairs, held.answers, strict=True):
            assert [tokenizer.decode(list(a)) for a in answers] == list(pair.answers), name
    if kind == "abstractive":
        assert tasks["capitalize_first_letter"].others, "tasks over the same words know each other"
        split = tasks["antonym"].split()
        assert icl_pairs(split.test, split.train, 1)[0].clean.text.startswith("Q: ")
    with pytest.raises(ArtifactError, match="holds the folders abstractive, extractive"):
        load_function_tasks(real / FOLDER)


def test_whole_answers_of_several_tokens_are_what_greedy_decoding_gives(real: Path) -> None:
    hm = HookManager.load(str(real / "models" / "stories260K"))
    words = ("cat", "dog", "ball", "tree", "bird", "fish", "car", "hat", "box", "toy", "cake", "park", "boy", "girl")
    # To repeat a word is what so small a model can do.
    task = FunctionTask("say again", tuple((w, w) for w in words), "The {input} and the {output}. ")
    options = ICLOptions(n_prompts=6, n_shots=4, corruption="zero_shot")
    made = function_vector(hm, task, heads=[(1, 1), (3, 1)], layer=2, options=options)
    made = replace(made, parts=10 * made.parts)
    worded = "Tom saw a {input}. He liked the {output}. "
    scores = evaluate_function_vector(hm, made, task, templates=[worded], n_random=1, options=options)
    split, several = task.split(), 0
    for condition, where in (
        ("zero_shot", Where.last_prompt()),
        (worded, Where.last_prompt() | Where.generated()),
    ):
        asked = split.test.with_template(worded) if condition == worded else split.test
        prompts = icl_pairs(asked, split.train, n_shots=0)
        answers = [a[0] for a in prompts.tokens(hm, same_length=False).answers]
        several += sum(len(answer) > 1 for answer in answers)
        for v, write in enumerate(([], made.as_interventions(where=where))):
            said = hm.generate([p.clean.text for p in prompts], max_new_tokens=max(map(len, answers)), write=write)
            found = [tuple(row[: len(a)].tolist()) == a for row, a in zip(said.new_tokens, answers, strict=True)]
            assert [bool(x) for x in scores.full[scores.conditions.index(condition), v]] == found
    assert several > 2 and 0 < float(scores.full.mean()) < 1
