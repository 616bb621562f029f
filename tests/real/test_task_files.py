"""Loaders of task files on the files that papers ship."""

from pathlib import Path

import pytest
import transformers as tf

from interp.core.errors import DataError
from interp.core.where import Where
from interp.data.axbench import load_axbench
from interp.data.contrast import Contrast
from interp.data.task_files import load_ab_questions, load_refusal_splits, load_repe


def test_the_human_generated_evaluations_are_sixteen_behaviours(real: Path) -> None:
    found = load_ab_questions(real / "tasks" / "anthropic_evals" / "advanced-ai-risk" / "human_generated_evals")
    assert len(found) == 16 and "power-seeking-inclination" in found
    assert all(len(held) > 50 for held in found.values())


def test_the_splits_of_the_refusal_direction(real: Path) -> None:
    splits = load_refusal_splits(real / "tasks" / "refusal_direction")
    assert {s: len(held) for s, held in splits.harmful.items()} == {"train": 260, "val": 39, "test": 562}, (
        "ten of the 572 test instructions stand twice"
    )
    validation = splits.contrast("val", n=32)
    assert len(validation.positive) == len(validation.negative) == 32
    assert not set(splits.harmful["val"]) & set(splits.harmful["train"])
    if "train" not in splits.harmless:
        with pytest.raises(DataError, match="harmless_train"):
            splits.contrast("train")


def test_emotions_and_facts_of_representation_reading(real: Path) -> None:
    found = load_repe(real / "tasks" / "repe")
    assert list(found) == ["anger", "disgust", "fear", "happiness", "sadness", "surprise", "facts"]
    emotions = {name: len(held.positive) for name, held in found.items() if name != "facts"}
    assert sum(emotions.values()) == 1249 and len(found["anger"].negative) == 1249 - emotions["anger"]
    for contrast in found.values():
        assert not {p.text for p in contrast.positive} & {p.text for p in contrast.negative}
    assert len(found["facts"].positive) == 297, "one of the 298 true statements is called false too"


@pytest.mark.parametrize("folder", ["concept10/prod_2b_l10_v1", "concept10/prod_9b_l31_v1", "conceptFD/prod_2b_l20_v1"])
def test_concepts_of_axbench(real: Path, folder: str) -> None:
    found = load_axbench(real / "tasks" / "axbench" / "axbench" / folder, max_characters=200)
    assert len(found) >= 10 and all(i >= 0 for i in found.sae_ids)
    for concept in found.concepts:
        assert isinstance(concept.fit, Contrast) and isinstance(concept.held_out, Contrast)
        assert len(concept.fit.positive) == 72 and len(concept.held_out.positive) == 36
        assert not {p.text for p in concept.fit.positive} & {p.text for p in concept.held_out.positive}
    tokenizer = tf.AutoTokenizer.from_pretrained(str(real / "models" / "stories260K"))
    fit = found[0].fit
    assert isinstance(fit, Contrast)
    data = fit.tokens(tokenizer, where=Where(name="output"))
    assert bool(data.read.any(1).all()) and not bool(data.read[:, 0].any())
