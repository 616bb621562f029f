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
# A part of the shipped sweep, which a test has time for; it need not find as much as the whole.
SMALLER = {
    "dictionary": {"d_sae": 1024, "k": 6},
    "sweep": {"site": ["1.resid_post", "3.resid_post", "1.mlp_out", "2.mlp_out"]},
    "evaluation": {"tokens": 2000, "pca_rank": 0},
}


@pytest.mark.slow
def test_thirty_labels_are_found_by_some_latent_of_a_small_sweep_and_few_by_what_has_no_meaning(tmp_path: Path) -> None:
    settings = yaml.safe_load(Path(resource(CONFIG)).read_text(encoding="utf-8"))
    train = {**settings["train"], "tokens": 400_000}
    cfg = TrainConfig.model_validate({**settings, **SMALLER, "train": train, "out": str(tmp_path / "sweep")})
    report = train_sweep(cfg, progress=False)
    hm = interp.HookManager.load("testbed")
    rows = Text("evaluation", tasks=WORLD_TASKS).labelled_rows(1200, cfg.text.ctx)
    made = {name: interp.SAE.load(member.out) for name, member in report.members.items()}
    found = labels_found_by_any({name: label_scores(hm, one, rows) for name, one in made.items()})
    said = found.figures()
    assert said["labels_found_by_any"] >= 30, found.summary()
    assert found.found_interval[0] >= 25, found.summary()
    assert said["labels_found_by_any_in_context"] >= 10, found.summary()
    assert said["labels_found_by_any_shuffled"] <= 1, found.summary()
    assert said["labels_found_by_any_random"] <= 0.2 * said["labels_found_by_any"], found.summary()
    assert said["labels_found_by_any_pca"] <= 0.2 * said["labels_found_by_any"], found.summary()
    # The union is more than the best of its parts, and no part finds all of it.
    assert len(set(found.dictionary[found.found].tolist())) > 1
