"""The tasks of the function vectors paper under GPT-2's own tokenizer, and the method on a real model."""

from pathlib import Path

import pytest
import transformers as tf

from interp.core.errors import ArtifactError
from interp.core.manager import HookManager
from interp.data.icl import FunctionTask, icl_pairs, load_function_tasks
from interp.steering.function_vectors.effects import head_effects
from interp.steering.function_vectors.evaluate import evaluate_function_vector
from interp.steering.function_vectors.options import ICLOptions
from interp.steering.function_vectors.vector import function_vector

FOLDER = Path("tasks", "function_vectors", "dataset_files")


@pytest.mark.parametrize(("kind", "n"), [("abstractive", 27), ("extractive", 28)])
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


def test_answers_of_several_tokens_are_scored_whole_on_a_real_model(real: Path) -> None:
    hm = HookManager.load(str(real / "models" / "stories260K"))
    words = ("cat", "dog", "ball", "tree", "bird", "fish", "car", "hat", "box", "toy", "cake", "park", "boy", "girl")
    # Repeating a word is what so small a model can do from examples.
    task = FunctionTask("say again", tuple((w, w) for w in words), "The {input} and the {output}. ")
    options = ICLOptions(n_trials=6, n_prompts=6, n_shots=4, corruption="zero_shot")
    effects = head_effects(hm, task, options=options)
    made = function_vector(hm, task, effects=effects, options=options)
    scores = evaluate_function_vector(hm, made, task, n_random=2, options=options)
    assert len({len(a) for a in icl_pairs(task, task, n_shots=0).tokens(hm).answers for a in a}) > 1
    assert bool((scores.full <= scores.right[:, :, scores.layers.index(scores.layer)]).all())
    assert float(effects.aie.abs().max()) > 0 and scores.accuracy().mean >= 0
