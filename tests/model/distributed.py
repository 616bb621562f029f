"""Run by `test_distributed` under torchrun: `distributed.py JOBS OUT`; each process writes what it saw of the jobs."""

import contextlib
import io
import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import torch

from interp.cli.main import main as command
from interp.core.errors import InterpError
from interp.data.store import Batch
from interp.dictionaries.options import DictionaryOptions
from interp.train import session, trainer
from interp.train.config import TrainConfig, TrainOptions
from interp.train.job import train_job, train_sweep
from interp.train.trainer import DictionaryFit
from interp.train.world import World

RANK = int(os.environ.get("RANK", "0"))
_STEP, _FITS = DictionaryFit.step, session._fits


def stop_after(step: int, rank: int, number: int) -> None:
    """Let one of the processes get a signal right after a step."""

    def stepped(self: DictionaryFit, batch: Batch) -> None:
        _STEP(self, batch)
        if self.steps == step and rank == RANK:
            os.kill(os.getpid(), number)

    DictionaryFit.step = stepped  # type: ignore[method-assign]


def spoil(step: int, rank: int) -> None:
    """Let one of the processes get activations that are no numbers."""

    def stepped(self: DictionaryFit, batch: Batch) -> None:
        if self.steps == step and rank == RANK:
            batch.x.fill_(torch.nan)
        _STEP(self, batch)

    DictionaryFit.step = stepped  # type: ignore[method-assign]


def do(job: dict[str, Any]) -> dict[str, Any]:
    """One training; gives how it ended. Its first weights are from few batches: the stream is ahead of them soon."""
    before, trainer._SAMPLE_TOKENS = trainer._SAMPLE_TOKENS, 1000
    if "stop" in job:
        stop_after(*job["stop"])
    if "spoil" in job:
        spoil(*job["spoil"])
    session._fits = _FITS if "small" not in job else lambda *_: False
    told: list[str] = []
    try:
        cfg = TrainConfig.model_validate(job["cfg"])
        train = train_sweep if cfg.sweep.any else train_job
        report = train(cfg, resume=job.get("resume", False), progress=False, tell=told.append)
        ended = {"status": report.status, "signal": report.signal}
    except InterpError as err:
        ended = {"error": type(err).__name__, "said": str(err)}
    DictionaryFit.step = _STEP  # type: ignore[method-assign]
    trainer._SAMPLE_TOKENS = before
    return {**ended, "told": told}


def dtensors() -> bool:
    """Whether the DTensors of a dictionary in two shards are views of it, and make the whole."""
    torch.manual_seed(0)
    made = DictionaryOptions(kind="jumprelu", d_sae=10).make(6)
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter)
    expected = {name: value.clone() for name, value in made.state_dict().items()}
    with World.joined(TrainOptions(shards=2)) as world:
        made.join(world.across)
        found = world.across.dtensors(made)
        shared = found["W_enc"].to_local().data_ptr() == made.W_enc.data_ptr() and made.W_enc.shape == (6, 5)
        return shared and all(torch.equal(found[name].full_tensor(), value) for name, value in expected.items())


def main(jobs: Path, out: Path) -> None:
    """Do the jobs, then one by the command line."""
    torch.set_num_threads(1)
    found: dict[str, Any] = {name: do(job) for name, job in json.loads(jobs.read_text()).items()}
    found["dtensors"] = dtensors()
    written = io.StringIO()
    with contextlib.redirect_stdout(written):
        code = command(["train", str(out / "cli.yaml")])
    found["cli"] = {"code": code, "stdout": written.getvalue()}
    (out / f"rank{RANK}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    main(Path(sys.argv[1]), Path(sys.argv[2]))
