"""A sweep whose process is killed, and a resume file that is of other values."""

import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from interp.core.errors import ArtifactError
from interp.core.site import Site
from interp.patching.activation import activation_patch
from interp.patching.options import PatchOptions
from tests.families import manager
from tests.model.test_patching import Identity, Stopping, ragged

# The sweep writes its file after every cell, and is slow enough for a kill to find it somewhere in the middle.
JOB = """
    import sys, time
    from interp.patching.activation import activation_patch
    from interp.patching.options import PatchOptions
    from tests.families import manager
    from tests.model.test_patching import ragged

    hm, pairs = manager("GPT2"), ragged()
    metric = pairs.tokens(hm).metric()

    def logit_diff(run):
        time.sleep(0.05)
        return metric(run)

    options = PatchOptions(by="pos_head", resume=sys.argv[1], save_every=0.0, budget_bytes=1)
    activation_patch(hm, pairs, sites="z", metric=logit_diff, options=options)
"""


def logit_diff_of(pairs: object) -> Stopping:
    return Stopping(pairs, 10**9)


def test_a_sweep_that_was_killed_goes_on_to_the_same_values(tmp_path: Path) -> None:
    file = tmp_path / "sweep.safetensors"
    job = subprocess.Popen([sys.executable, "-c", textwrap.dedent(JOB), str(file)], stderr=subprocess.PIPE)
    deadline = time.monotonic() + 120
    while not file.exists() and time.monotonic() < deadline and job.poll() is None:
        time.sleep(0.02)
    time.sleep(0.1)
    os.kill(job.pid, signal.SIGKILL)
    _, err = job.communicate(timeout=60)
    assert job.returncode == -signal.SIGKILL, err.decode()
    done = load_file(file)["done"].bool()
    assert 0 < int(done.sum()) < len(done), "the kill came between two cells"
    hm, pairs = manager("GPT2"), ragged()
    options, tokens = PatchOptions(by="pos_head", resume=file, budget_bytes=1), pairs.tokens(hm)
    counted = logit_diff_of(tokens)
    resumed = activation_patch(hm, pairs, sites="z", metric=counted, options=options)
    whole = activation_patch(
        hm, pairs, sites="z", metric=logit_diff_of(tokens), options=PatchOptions(by="pos_head", budget_bytes=1)
    )
    assert torch.equal(resumed.patched, whole.patched) and not bool(whole.patched.isnan().any())
    # Both baselines are measured, the sweep's own base, and what was not done.
    assert 10**9 - counted.left <= int((~done).sum()) + 3


@pytest.mark.parametrize("what", ["values", "dictionary"])
def test_a_file_of_other_values_is_not_gone_on_with(tmp_path: Path, what: str) -> None:
    hm, pairs, file = manager("GPT2"), ragged(), tmp_path / "sweep.safetensors"

    def options(size: float) -> PatchOptions:
        if what == "values":
            value = {Site("1.z"): torch.full((hm.n_heads, hm.d_head), size)}
            return PatchOptions(ablation="given", values=value, resume=file)
        coder = Identity(hm.d_model)
        coder.W_dec = coder.W_dec * size
        return PatchOptions(by="latent", dictionary=coder, latents=[0], resume=file)

    sites = ["1.z"] if what == "values" else ["1.mlp_out"]
    activation_patch(hm, pairs, sites=sites, options=options(1.0))
    activation_patch(hm, pairs, sites=sites, options=options(1.0))
    with pytest.raises(ArtifactError, match="differs in given"):
        activation_patch(hm, pairs, sites=sites, options=options(2.0))
