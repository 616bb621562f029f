"""The main job: text → tokens → activations → a trained, measured, saved dictionary."""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch

from interp.core.errors import ConfigError
from interp.core.manager import HookManager, sites_of
from interp.core.result import Provenance
from interp.core.site import Site
from interp.data.documents import Documents, Part
from interp.data.store import ActivationStore
from interp.data.tokens import TokenSource
from interp.dictionaries.topk import TopKConfig, TopKSAE
from interp.evaluate.dictionary import DictionaryEvaluation, evaluate_dictionary
from interp.train.config import TrainConfig
from interp.train.runfolder import RunFolder
from interp.train.signals import StopSignals
from interp.train.trainer import Training, default_lr, train_dictionary

if TYPE_CHECKING:
    from interp.dictionaries.base import Dictionary

__all__ = ["JobReport", "Plan", "plan_job", "train_job"]

Status = Literal["finished", "stopped"]


@dataclass(frozen=True)
class Plan:
    """What a job would take, from the configurations alone.

    Attributes:
        tokens: tokens to train on.
        steps: optimiser steps.
        parameters: of the dictionary.
        model_parameters: of the language model.
        d_in: width of the site.
        lr: Adam's step size.
        dictionary_bytes: weights, gradients, Adam's two moments, and one batch of pre-activations with its gradient.
        buffer_bytes: the shuffling buffer.
        model_bytes: the language model's weights.
    """

    tokens: int
    steps: int
    parameters: int
    model_parameters: int
    d_in: int
    lr: float
    dictionary_bytes: int
    buffer_bytes: int
    model_bytes: int

    def to_dict(self) -> dict[str, int | float]:
        """As plain numbers."""
        return dataclasses.asdict(self)


@dataclass(frozen=True)
class JobReport:
    """How a job ended.

    Attributes:
        out: the run folder.
        status: "finished", or "stopped" by a signal: then the dictionary is saved as far as it was trained, and not
            measured.
        training: what the fit came to.
        evaluation: the figures on held-out text; None when stopped.
        signal: the name of the signal that stopped it.
    """

    out: Path
    status: Status
    training: Training
    evaluation: DictionaryEvaluation | None
    signal: str | None

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON values, with the main figures at the top."""
        figures = {} if self.evaluation is None else self.evaluation.scalars()
        speed = self.training.tokens / max(self.training.seconds, 1e-9)
        record = {"out": str(self.out), "status": self.status, "signal": self.signal, **figures}
        return {**record, "steps": self.training.steps, "tokens": self.training.tokens, "tokens_per_s": speed}


def plan_job(cfg: TrainConfig, *, force: bool = False) -> Plan:
    """Check a configuration and estimate what the job takes, without loading weights or touching a file.

    Args:
        cfg: the configuration.
        force: allow an output folder that holds a run.

    Raises:
        InterpError: the model, site, sizes or output folder do not do.
    """
    RunFolder.check(cfg.out, force=force)
    sites = sites_of(cfg.model)
    _, shape = _vector_site(cfg.site, {site: row["shape"] for site, row in zip(sites.sites, sites.rows, strict=True)})
    d_in, options, d_sae = int(shape[-1]), cfg.train, cfg.dictionary.d_sae
    from interp.core.loading import skeleton

    weights = sum(p.numel() for p in skeleton(cfg.model).parameters())
    parameters = 2 * d_in * d_sae + d_in + d_sae
    size = 4 if cfg.dtype in (None, "float32") else 2
    return Plan(
        tokens=options.tokens,
        steps=-(-options.tokens // options.batch_size),
        parameters=parameters,
        model_parameters=weights,
        d_in=d_in,
        lr=options.lr or default_lr(d_sae),
        dictionary_bytes=16 * parameters + 8 * options.batch_size * d_sae,
        buffer_bytes=options.buffer_tokens * (4 * d_in + 16),
        model_bytes=weights * size,
    )


def train_job(
    cfg: TrainConfig, *, force: bool = False, progress: bool = True, tell: Callable[[str], None] | None = None
) -> JobReport:
    """Train a dictionary as configured and write its run folder.

    Ctrl-C or SIGTERM ends the training after the current step: what is there is saved, and says so.

    Args:
        cfg: the configuration.
        force: replace an earlier run in the output folder.
        progress: show a progress bar on stderr.
        tell: called with short messages on what happens.

    Returns:
        The folder, how it ended, and the figures on held-out documents.

    Raises:
        InterpError: something does not do; a folder that was begun has no `cfg.json` and so does not load.
    """
    say = tell or (lambda message: None)
    RunFolder.check(cfg.out, force=force)
    with StopSignals(lambda name: say(f"{name}: stopping after this step, and saving")) as stop:
        hm = HookManager.load(cfg.model, dtype=cfg.dtype, device=cfg.device)
        site, shape = _vector_site(cfg.site, {s: hm.atlas.shape(s) for s in hm.sites().sites})
        store = _store(cfg, hm, site)
        dictionary = _dictionary(cfg, int(shape[-1])).to(hm.device)
        # Text that cannot be read, or is too little to hold some out, is better known before training than after.
        next(_tokens(cfg, hm, "held_out").blocks())
        folder = RunFolder(cfg.out, force=force)
        folder.config(cfg.to_yaml())
        record = _record(cfg, hm, store)
        folder.provenance({**record, "status": "running"})
        ended: dict[str, Any] = {"status": "failed"}
        say(f"training {cfg.dictionary.d_sae} latents on {site.name} of {hm.name}: {cfg.train.tokens:,} tokens")
        try:
            training = train_dictionary(
                store.batches(should_stop=stop),
                dictionary,
                cfg.train,
                seed=cfg.seed,
                log=folder.log,
                should_stop=stop,
                progress=progress,
                name=site.name,
            )
            if training.steps:
                dictionary.save(folder.path, notes=_notes(cfg, hm, store, training))
            evaluation = None if stop() else _measured(cfg, hm, dictionary, site, folder, stop=stop)
            status: Status = "stopped" if evaluation is None else "finished"
            ended = {"status": status, "signal": stop.name, **dataclasses.asdict(training)}
        finally:
            folder.provenance({**record, **ended})
        return JobReport(folder.path, status, training, evaluation, stop.name)


def _store(cfg: TrainConfig, hm: HookManager, site: Site) -> ActivationStore:
    return ActivationStore(
        hm,
        _tokens(cfg, hm, "train"),
        site,
        batch_size=cfg.train.batch_size,
        buffer_tokens=cfg.train.buffer_tokens,
        seed=cfg.seed,
        repeat=True,
    )


def _notes(cfg: TrainConfig, hm: HookManager, store: ActivationStore, training: Training) -> dict[str, Any]:
    """What SAELens' metadata says of a dictionary."""
    return {
        "hook_name": store.sites[0].name,
        "model_name": hm.name,
        "model_class_name": type(hm.model).__name__,
        "context_size": cfg.text.ctx,
        "dataset_path": cfg.data,
        "prepend_bos": store.tokens.bos,
        "exclude_special_tokens": True,
        "disable_concat_sequences": cfg.text.packing == "one_doc",
        "training_tokens": training.tokens,
    }


def _measured(
    cfg: TrainConfig, hm: HookManager, dictionary: "Dictionary", site: Site, folder: RunFolder, *, stop: StopSignals
) -> DictionaryEvaluation | None:
    """Measure on held-out text; None when a signal came before the end."""
    tokens = _tokens(cfg, hm, "held_out")
    try:
        evaluation = evaluate_dictionary(
            hm, dictionary, tokens, site, max_tokens=cfg.evaluation.tokens, should_stop=stop
        )
    except KeyboardInterrupt:
        return None
    held_out = cfg.evaluation.data or f"every {cfg.text.hold_out_every}th document of the training text, not trained on"
    folder.evaluation({**evaluation.scalars(), "text": held_out, "special_tokens": "left out"})
    return evaluation


def _tokens(cfg: TrainConfig, hm: HookManager, part: Part) -> TokenSource:
    own = part == "held_out" and cfg.evaluation.data is not None
    whole: Part = "all" if own or cfg.evaluation.data is not None else part
    documents = Documents(
        cfg.evaluation.data if own else cfg.data,
        field=cfg.text.field,
        split=cfg.text.split,
        part=whole,
        hold_out_every=cfg.text.hold_out_every,
    )
    text = cfg.text
    return TokenSource(documents, hm.tokenizer, ctx=text.ctx, rows=text.rows, packing=text.packing, bos=text.bos)


def _dictionary(cfg: TrainConfig, d_in: int) -> TopKSAE:
    options = cfg.dictionary
    return TopKSAE(
        TopKConfig(d_in=d_in, d_sae=options.d_sae, k=options.k),
        k_aux=options.k_aux,
        aux_coef=options.aux_coef,
        unit_norm=options.unit_norm,
    )


def _vector_site(name: str, shapes: dict[Site, Any]) -> tuple[Site, Any]:
    site = Site(name)
    if site not in shapes:
        near = ", ".join(s.short for s in shapes if s.kind == site.kind) or "`interp sites MODEL` lists what it has"
        raise ConfigError(f"this model has no site {site.short}; {near}")
    if len(site.axes) != 3:
        raise ConfigError(f"{site.short} has axes {site.axes}; a dictionary reads one vector a token: try 3.resid_post")
    return site, shapes[site]


def _record(cfg: TrainConfig, hm: HookManager, store: ActivationStore) -> dict[str, Any]:
    provenance = dataclasses.asdict(Provenance.of(hm, settings=cfg.model_dump(mode="json"), seed=cfg.seed))
    return {**provenance, "store": store.describe(), "threads": torch.get_num_threads(), "device": str(hm.device)}
