"""Detection of AxBench's concepts by a small real model: that it runs, and that controls are at chance."""

from pathlib import Path

import interp
from interp.data.axbench import load_axbench
from interp.steering.compare import compare_methods
from interp.steering.contenders import METHODS


def test_concepts_of_axbench_are_detected_better_than_by_a_random_direction(real: Path) -> None:
    bench = load_axbench(
        real / "tasks" / "axbench" / "axbench" / "concept10" / "prod_2b_l10_v1", max_characters=160, limit=6
    )
    hm = interp.HookManager.load(str(real / "models" / "stories260K"))
    methods = {name: METHODS[name] for name in ("mean_difference", "lda", "random", "shuffled")}
    found = compare_methods(hm, bench.concepts, "2.resid_post", methods=methods)
    assert not found.failed and bool(found.steering.isnan().all())
    best, chance = found["mean_difference", "detection"], found["random", "detection"]
    assert best.mean > 0.6 and 0.25 < chance.mean < 0.75 and best.mean > chance.mean + 0.05
