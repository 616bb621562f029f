"""What SAELens trains in `dictionaries.py`, and who trains whole jobs; also the worker that it starts for each.

`python dictionaries_peers.py` answers each line on stdin, a contender and a `Job` as JSON, by one on stdout: the CPU
and wall seconds of one run of the job, and the FVU on held-out tokens of what was trained.
"""

import json
import math
import os
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from itertools import islice
from typing import Any

import capture_peers
import engine  # sets the number of threads, so before torch
from capture_peers import Setting
from engine import SEED, Call, clocked

ABOUT_LR = 2e-4  # at 2^14 latents, for both
WARMUP, DECAY = 0.02, 0.2  # shares of the steps, for both
EIGHT = 8
HELD_OUT = 2  # forwards' worth of tokens that FVUs are taken on


@dataclass(frozen=True)
class Job(Setting):
    """A model and its text, and the TopK SAE that is trained at mid-depth of it.

    Args:
        d_sae, k: of the dictionary.
        batch: tokens per step.
        train: tokens to train on, a multiple of the batch.
        buffer: tokens in the shuffling buffer, of which half is served at a time.
    """

    d_sae: int = 4096
    k: int = 32
    batch: int = 2048
    train: int = 32768
    buffer: int = 16384

    @property
    def lr(self) -> float:
        """Adam's step size."""
        return float(ABOUT_LR / (self.d_sae / 2**14) ** 0.5)

    @property
    def steps(self) -> int:
        """Optimiser steps."""
        return self.train // self.batch

    def with_text(self) -> "Job":
        """The same with as much text as a shuffled training runs: half a buffer is left over at the end."""
        return replace(self, blocks=math.ceil((self.train + self.buffer // 2) / (self.rows * self.ctx)))


@dataclass(frozen=True)
class Run:
    """What one run of a job gave: something to measure, if it trained.

    Args:
        trained: gives reconstructions of activations [token d]; None where nothing was trained.
    """

    trained: Callable[[Any], Any] | None = None


# -- SAELens --------------------------------------------------------------------------------------------------------


def saelens_sae(ours: Any, kind: str, dtype: str = "float32", *, sparse: bool = False) -> Any:
    """SAELens' training SAE of one of our kinds, "matryoshka" among them, with the same weights and settings.

    Args:
        ours: the dictionary whose weights and settings it takes.
        kind: what it is.
        dtype: of its weights.
        sparse: `use_sparse_activations`, of TopK.
    """
    import torch
    from sae_lens import saes

    size: dict[str, Any] = {"d_in": ours.cfg.d_in, "d_sae": ours.cfg.d_sae, "dtype": dtype}
    size |= {"device": str(ours.W_enc.device), "apply_b_dec_to_input": True, "normalize_activations": "none"}
    # Its default, True, gives the same latents and gradients where rows have norm 1, at the cost of more products.
    plain = {"rescale_acts_by_decoder_norm": False}
    made: Any
    if kind == "topk":
        cfg = saes.TopKTrainingSAEConfig(**size, **plain, k=ours.cfg.k, use_sparse_activations=sparse)
        made = saes.TopKTrainingSAE(cfg)
    elif kind == "batchtopk":
        made = saes.BatchTopKTrainingSAE(saes.BatchTopKTrainingSAEConfig(**size, **plain, k=float(ours.k)))
    elif kind == "matryoshka":
        widths = [*ours.objective.prefixes, ours.cfg.d_sae]
        nested = saes.MatryoshkaBatchTopKTrainingSAEConfig
        made = saes.MatryoshkaBatchTopKTrainingSAE(nested(**size, **plain, k=float(ours.k), matryoshka_widths=widths))
    elif kind == "jumprelu":
        jump = {"jumprelu_bandwidth": ours.bandwidth, "l0_coefficient": ours.terms.sparsity}
        made = saes.JumpReLUTrainingSAE(saes.JumpReLUTrainingSAEConfig(**size, **jump))
    elif kind == "standard":
        made = saes.StandardTrainingSAE(saes.StandardTrainingSAEConfig(**size, l1_coefficient=ours.terms.sparsity))
    else:
        made = saes.GatedTrainingSAE(saes.GatedTrainingSAEConfig(**size, l1_coefficient=ours.terms.sparsity))
    weights = ours.state_dict()
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            parameter.copy_(weights[name])
    return made


def saelens_trainer(
    sae: Any, provider: Any, batch: int, tokens: int, *, lr: float, decay: float = 0.0, warmup: float = WARMUP
) -> Any:
    """SAELens' trainer, without logging and checkpoints; with a decay, also a warm-up."""
    from sae_lens.config import SAETrainerConfig
    from sae_lens.training.sae_trainer import SAETrainer

    steps = tokens // batch
    schedule = {"lr_warm_up_steps": math.ceil(warmup * steps), "lr_decay_steps": int(decay * steps)} if decay else {}
    # The decay of a constant schedule ends at 0 whatever lr_end is; without a number its trainer would not start.
    cfg = SAETrainerConfig(tokens, batch, lr=lr, lr_end=lr / 10, device=str(sae.device), **schedule)
    return SAETrainer(cfg, sae, provider)


# -- whole jobs -----------------------------------------------------------------------------------------------------


def lm_alone(job: Job, model: Any, ids: Any) -> Call:
    """The floor: the backbone, cut after the block, over all tokens that the job runs."""
    import torch

    backbone = capture_peers.cut(model, job.layer)

    def call() -> Run:
        with torch.no_grad():
            for rows in ids.split(job.rows):
                backbone(rows.to(job.device), use_cache=False)
        return Run()

    return call


def step_alone(job: Job, model: Any, ids: Any) -> Call:
    """Our steps on one batch that is there already: as many as the job takes."""
    from interp.data.store import Batch

    sample = activations(job, model, ids[: 2 * math.ceil(job.batch / job.ctx)])[: job.batch]

    def call() -> Run:
        fit = our_fit(job, SEED)
        fit.scale = fit.target_scale = scale_of(sample)
        fit.dictionary.init_from(sample * fit.scale, seed=SEED)
        for _ in range(job.steps):
            fit.step(Batch(x=sample))
        return Run()

    return call


def our_job(job: Job, model: Any, ids: Any) -> Call:
    """`train_dictionary` on `ActivationStore.stream`."""
    from interp import HookManager
    from interp.train.trainer import train_dictionary

    hm, text = HookManager.load(capture_peers.twin_of(model)), capture_peers.our_text(job, ids)

    def call() -> Run:
        made = our_dictionary(job)
        train_dictionary(our_stream(job, hm, text), made, our_options(job), seed=SEED, progress=False)
        return Run(made)

    return call


def saelens_job(job: Job, model: Any, ids: Any) -> Call:
    """SAELens' trainer on its `ActivationsStore` of a `HookedTransformer`.

    It begins at the weights that ours would draw, and is told the scale, which else it would estimate from 1,000
    batches of their own.
    """
    from datasets import Dataset
    from sae_lens.training.activations_store import ActivationsStore

    wrapped, name = capture_peers.saelens_model(job, model, "HookedTransformer")
    text = Dataset.from_dict({"input_ids": ids.tolist()})
    sample = activations(job, model, ids[: math.ceil(job.buffer / job.ctx)])
    scale = scale_of(sample)
    where = {"hook_name": name, "hook_head_index": None, "d_in": job.d_model, "context_size": job.ctx}
    sizes = {"store_batch_size_prompts": job.rows, "train_batch_size_tokens": job.batch}
    sizes |= {"n_batches_in_buffer": job.buffer // job.ctx, "total_training_tokens": len(ids)}  # it counts rows
    how = {"streaming": False, "prepend_bos": False, "normalize_activations": "none"}

    def call() -> Run:
        start = our_dictionary(job)
        start.init_from(sample * scale, seed=SEED)
        sae = saelens_sae(start, "topk")
        store = ActivationsStore(wrapped, text, **where, **sizes, **how, device=job.device, dtype="float32")
        trainer = saelens_trainer(sae, store, job.batch, job.train, lr=job.lr, decay=DECAY)
        trainer.activation_scaler.scaling_factor = scale
        return Run(trainer.fit())

    return call


def eight_by_hand(job: Job, model: Any, ids: Any) -> Call:
    """Eight of our fits, each of a seed of its own, on one stream: what `interp.train.many` should cost."""
    from interp import HookManager

    hm, text = HookManager.load(capture_peers.twin_of(model)), capture_peers.our_text(job, ids)
    sample = activations(job, model, ids[: math.ceil(job.batch / job.ctx)])

    def call() -> Run:
        fits = [our_fit(job, SEED + number) for number in range(EIGHT)]
        for fit in fits:
            fit.scale = fit.target_scale = scale_of(sample)
            fit.dictionary.init_from(sample * fit.scale, seed=fit.seed)
        for batch in islice(our_stream(job, hm, text), job.steps):
            for fit in fits:
                fit.step(batch)
        for fit in fits:
            fit.finish()
        return Run(fits[0].dictionary)

    return call


def our_dictionary(job: Job) -> Any:
    """An untrained TopK SAE of a job's sizes, with the loss that SAELens has."""
    from interp.dictionaries.options import DictionaryOptions

    return DictionaryOptions(kind="topk", d_sae=job.d_sae, k=job.k, loss="mse").make(job.d_model).to(job.device)


def our_options(job: Job) -> Any:
    """How ours is trained."""
    from interp.train.config import TrainOptions

    schedule: dict[str, Any] = {"lr": job.lr, "warmup": WARMUP, "decay": DECAY}
    never_dead = 1000 * job.batch  # SAELens' default window
    sizes: dict[str, Any] = {"tokens": job.train, "batch_size": job.batch, "buffer_tokens": job.buffer}
    return TrainOptions(**sizes, **schedule, dead_after=never_dead)


def our_fit(job: Job, seed: int) -> Any:
    """A fit without a stream; its weights are still to be drawn."""
    from interp.train.trainer import DictionaryFit

    return DictionaryFit(our_dictionary(job), our_options(job), seed=seed)


def our_stream(job: Job, hm: Any, text: Any) -> Iterator[Any]:
    """Shuffled batches of float32."""
    from interp.data.store import ActivationStore

    sizes: dict[str, Any] = {"batch_size": job.batch, "buffer_tokens": job.buffer}
    return ActivationStore.stream(hm, text, job.site, **sizes, seed=SEED, repeat=True).batches()


def activations(job: Job, model: Any, ids: Any) -> Any:
    """What the site holds at some rows of ids: [token d] in float32."""
    import torch

    backbone = capture_peers.cut(model, job.layer)
    with torch.no_grad():
        parts = [backbone(rows.to(job.device), use_cache=False).last_hidden_state for rows in ids.split(job.rows)]
    return torch.cat(parts).flatten(0, 1).float()


def scale_of(sample: Any) -> float:
    """What brings tokens to a mean norm of √d."""
    return float(sample.shape[1] ** 0.5 / sample.norm(dim=-1).double().mean())


def fvu_of(trained: Callable[[Any], Any], job: Job, model: Any) -> float:
    """Share of the variance of tokens that nobody was trained on that a dictionary misses."""
    import torch

    unseen = torch.Generator().manual_seed(SEED + 1)
    x = activations(job, model, torch.randint(10, job.d_vocab, (HELD_OUT * job.rows, job.ctx), generator=unseen))
    with torch.no_grad():
        return float((x - trained(x)).pow(2).sum() / (x - x.mean(0)).pow(2).sum())


JOBS: dict[str, Callable[[Job, Any, Any], Call]] = {
    "lm": lm_alone,
    "lm_again": lm_alone,
    "step": step_alone,
    "ours": our_job,
    "saelens": saelens_job,
    "eight": eight_by_hand,
}


# -- the worker -----------------------------------------------------------------------------------------------------


def work() -> None:
    """The worker's loop: one run per line."""
    say = engine.answering()
    warnings.filterwarnings("ignore")
    held: tuple[Any, Any, Call] | None = None
    for line in sys.stdin:
        contender, sizes = json.loads(line)
        job = Job(**sizes)
        try:
            if held is None or held[0] != (contender, job):
                held = None
                model, ids = capture_peers.build(job)
                held = (contender, job), model, JOBS[contender](job, model, ids)
                JOBS[contender](replace(job, train=job.buffer), model, ids)()  # warms up what all jobs share
            cpu, wall, gave = clocked(held[2], job.device)
            fvu = None if gave.trained is None else fvu_of(gave.trained, job, held[1])
            say({"cpu": cpu, "wall": wall, "fvu": fvu})
        except Exception as error:  # noqa: BLE001 (whatever a peer raises is its result)
            say({"error": f"{type(error).__name__}: {str(error)[:200]}"})


class Worker(engine.Worker):
    """A process for a contender of its own: what one leaves in memory is nobody else's luck."""

    def __init__(self) -> None:
        command, pipe = [sys.executable, __file__], subprocess.PIPE
        quiet = {**os.environ, **capture_peers.QUIET}
        self.process = subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, env=quiet)

    def ask(self, contender: str, job: Job) -> dict[str, Any]:
        """One run, or why there was none."""
        assert self.process.stdin is not None
        if self.process.poll() is not None:
            return {"error": "its worker has ended"}
        self.process.stdin.write(json.dumps([contender, asdict(job)]) + "\n")
        self.process.stdin.flush()
        found: dict[str, Any] = self._answer()
        return found


if __name__ == "__main__":
    work()
