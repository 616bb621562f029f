"""What a shipped sweep finds of the small world's labels, with every control held to the same union."""

from pathlib import Path

import pytest
import yaml

import interp
from interp.core.resources import resource
from interp.evaluate.labels import label_scores
from interp.evaluate.labels_any import labels_found_by_any
from interp.testbed.text import WORLD_TASKS, Text
from interp.train.config import TrainConfig
from interp.train.job import train_sweep

CONFIG = "configs/labels-testbed.yaml"
# A part of the shipped sweep, which a test has time for; it finds less than the whole.
SIZES, TOKENS = [512, 1024], 400_000


@pytest.mark.slow
def test_thirty_labels_are_found_by_some_latent_of_a_small_sweep_and_few_by_what_has_no_meaning(tmp_path: Path) -> None:
    settings = yaml.safe_load(Path(resource(CONFIG)).read_text(encoding="utf-8"))
    train, sweep = {**settings["train"], "tokens": TOKENS}, {**settings["sweep"], "d_sae": SIZES}
    changed = {"train": train, "sweep": sweep, "evaluation": {"tokens": 2000, "pca_rank": 0}}
    cfg = TrainConfig.model_validate({**settings, **changed, "out": str(tmp_path / "sweep")})
    report = train_sweep(cfg, progress=False)
    hm = interp.HookManager.load("testbed")
    rows = Text("evaluation", tasks=WORLD_TASKS).labelled_rows(1200, cfg.text.ctx)
    made = {name: interp.SAE.load(member.out) for name, member in report.members.items()}
    # Each has random directions of its own, as many as it has latents and levels.
    scores = {name: label_scores(hm, one, rows, seed=seed) for seed, (name, one) in enumerate(made.items())}
    found = labels_found_by_any(scores)
    said = found.figures()
    # Measured: 63 (interval 60 to 68), 21 in context; controls 0, 1 and 1.
    assert said["labels_found_by_any"] >= 45 and found.found_interval[0] >= 30, found.summary()
    assert said["labels_found_by_any_in_context"] >= 14, found.summary()
    assert said["labels_found_by_any_shuffled"] <= 1, found.summary()
    assert max(said["labels_found_by_any_random"], said["labels_found_by_any_pca"]) <= 6, found.summary()
    assert len(set(found.dictionary[found.found].tolist())) > 1, "one dictionary finds all that is found"
