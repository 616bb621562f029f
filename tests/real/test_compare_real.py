"""Detection of AxBench's concepts by a small real model: that it runs, and that nothing is found where nothing is."""

from pathlib import Path

import interp
from interp.data.axbench import load_axbench
from interp.steering.concepts.compare import compare_methods
from interp.steering.concepts.contenders import METHODS


def test_a_model_of_260_thousand_parameters_tells_no_concept_of_axbench_better_than_its_controls(real: Path) -> None:
    bench = load_axbench(
        real / "tasks" / "axbench" / "axbench" / "concept10" / "prod_2b_l10_v1", max_characters=100, limit=6
    )
    hm = interp.HookManager.load(str(real / "models" / "stories260K"))
    methods = {name: METHODS[name] for name in ("mean_difference", "lda", "random", "shuffled")}
    found = compare_methods(hm, bench.concepts, "2.resid_post", methods=methods)
    assert not found.failed and bool(found.steering.isnan().all())
    assert all(0.3 < found[name, "detection"].mean < 0.7 for name in methods)
    assert not found.beats_control("mean_difference", "detection") and not found.beats_control("lda", "detection")
    assert not bool(found.hard.isnan().any())
