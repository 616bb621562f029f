"""The main job: text → tokens → activations → a trained, measured, saved dictionary."""

import dataclasses
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import torch

from interp.core.disk import differences, digest, weights_digest
from interp.core.errors import ConfigError, InterpError
from interp.core.manager import HookManager, sites_of
from interp.core.result import Provenance
from interp.core.site import Site
from interp.data.documents import Part
from interp.data.manifest import COMPLETE, Manifest
from interp.data.remote import RemoteStore, open_remote
from interp.data.remotefolder import RemoteFolder
from interp.data.store import ActivationStore, BatchStream, StreamState
from interp.data.tokens import TokenSource
from interp.data.tune import refuse_long_rows
from interp.evaluate.baseline import PCA, fit_pca
from interp.evaluate.dictionary import DictionaryEvaluation, evaluate_dictionary
from interp.train.checkpoint import SavedState
from interp.train.config import TrainConfig
from interp.train.runfolder import RunFolder
from interp.train.signals import StopSignals
from interp.train.text import token_source
from interp.train.trainer import DictionaryFit, Training, default_lr

__all__ = ["JobReport", "Plan", "plan_job", "train_job"]

Status = Literal["finished", "stopped"]
_STREAM = "stream."
_CACHE = "store-cache"  # of a run whose store is at a URL


@dataclass(frozen=True)
class Plan:
    """What a job would take, from the configurations alone.

    Attributes:
        tokens: tokens to train on.
        steps: optimiser steps.
        parameters: of the dictionary.
        model_parameters: of the language model.
        d_in: width of the site.
        d_sae: latents.
        k: latents that may be active per token.
        lr: Adam's step size.
        dictionary_bytes: weights, gradients, Adam's two moments, and one batch of pre-activations with its gradient.
        buffer_bytes: the shuffling buffer.
        model_bytes: the language model's weights.
        checkpoint_bytes: at most, what a state to resume from takes on disk; for a moment there are two.
    """

    tokens: int
    steps: int
    parameters: int
    model_parameters: int
    d_in: int
    d_sae: int
    k: int
    lr: float
    dictionary_bytes: int
    buffer_bytes: int
    model_bytes: int
    checkpoint_bytes: int

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
        record = {"out": str(self.out), "status": self.status, "signal": self.signal, **figures}
        done = self.training
        return {**record, "steps": done.steps, "tokens": done.tokens, "tokens_per_s": done.tokens_per_s}


def plan_job(cfg: TrainConfig, *, force: bool = False, resume: bool = False) -> Plan:
    """Check a configuration and estimate what the job takes, without loading weights or touching a file.

    Args:
        cfg: the configuration.
        force: allow an output folder that holds a run.
        resume: expect one that holds a run to go on with.

    Raises:
        InterpError: the model, site, sizes or output folder do not do.
    """
    _check_folder(RunFolder(cfg.out), force=force, resume=resume)
    sites = sites_of(cfg.model)
    _, shape = _vector_site(cfg.site, {site: row["shape"] for site, row in zip(sites.sites, sites.rows, strict=True)})
    if cfg.store_is_remote:
        RemoteFolder(str(cfg.store))  # known, with its package there
    d_in, options = int(shape[-1]), cfg.train
    d_sae, k = cfg.dictionary.sizes(d_in)
    from interp.core.loading import skeleton

    weights = sum(p.numel() for p in skeleton(cfg.model).parameters())
    parameters = 2 * d_in * d_sae + d_in + d_sae
    size = 4 if cfg.dtype in (None, "float32") else 2
    buffer = options.buffer_tokens * (4 * d_in + 16)
    spare = cfg.text.rows * cfg.text.ctx * (size * d_in + 16)
    return Plan(
        tokens=options.tokens,
        steps=options.steps,
        parameters=parameters,
        model_parameters=weights,
        d_in=d_in,
        d_sae=d_sae,
        k=k,
        lr=options.lr or default_lr(d_sae),
        dictionary_bytes=16 * parameters + 8 * options.batch_size * d_sae,
        buffer_bytes=buffer,
        model_bytes=weights * size,
        checkpoint_bytes=12 * parameters + 8 * d_sae + buffer + 16 * options.buffer_tokens + spare,
    )


def train_job(
    cfg: TrainConfig,
    *,
    force: bool = False,
    resume: bool = False,
    progress: bool = True,
    tell: Callable[[str], None] | None = None,
) -> JobReport:
    """Train a dictionary as configured and write its run folder.

    Ctrl-C or SIGTERM ends the training after the current step, SIGUSR1 does not; all three save a state to resume from,
    and so does every `train.checkpoint_every`-th step. A resumed run ends with the same weights, to the bit, as one
    that was left alone, on the same machine with as many threads.

    Args:
        cfg: the configuration.
        force: replace an earlier run in the output folder.
        resume: go on with the run in it; all settings that decide the outcome must be as they were.
        progress: show a progress bar on stderr.
        tell: called with short messages on what happens.

    Returns:
        The folder, how it ended, and the figures on held-out documents.

    Raises:
        ConfigError: among others, a resume with other settings, weights, text, device or thread count; names them.
        InterpError: something does not do; a folder that was begun has no `cfg.json` and so does not load.
    """
    folder, say = RunFolder(cfg.out), tell or (lambda message: None)
    _check_folder(folder, force=force, resume=resume)
    phase = _Phase(say)
    with StopSignals(phase.stopping, save=phase.saving) as stop:
        job = _Job(cfg, folder, stop)
        resumed_at = job.go_on(say) if resume else job.begin(force=force)
        record = {**job.origin(), "resumed_at_step": resumed_at}
        folder.provenance({**record, "status": "running"})
        d_sae, k = job.dictionary.cfg.d_sae, job.cfg.dictionary.k
        todo = f"{cfg.train.tokens:,} tokens" + (f", from step {resumed_at:,} on" if resumed_at else "")
        say(f"training {d_sae:,} latents (k {k}) on {job.site.name} of {job.hm.name}: {todo}")
        try:
            training = job.train(progress)
            phase.trained = True
            evaluation = None if stop() else job.measured()
        except BaseException:
            # What went wrong is to be heard, even if the disk is so full that this cannot be written either.
            with suppress(InterpError):
                folder.provenance({**record, "status": "failed", "signal": stop.name})
            raise
        ended = {**record, "signal": stop.name, **dataclasses.asdict(training)}
        if evaluation is None:
            folder.provenance({**ended, "status": "stopped"})
            return JobReport(folder.path, "stopped", training, None, stop.name)
        folder.finish(ended)
        job.remove_cache()
        return JobReport(folder.path, "finished", training, evaluation, stop.name)


class _Phase:
    """What a signal means depends on what is being done."""

    def __init__(self, say: Callable[[str], None]) -> None:
        self.say, self.trained = say, False

    def stopping(self, name: str) -> None:
        self.say(f"{name}: stopping" + ("" if self.trained else " after this step, and saving"))

    def saving(self, name: str) -> None:
        done = "the training is done and saved" if self.trained else "saving a checkpoint after this step, and going on"
        self.say(f"{name}: {done}")


class _Job:
    """Model, text, dictionary and fit of one run, with what ties them to its folder."""

    def __init__(self, cfg: TrainConfig, folder: RunFolder, stop: StopSignals) -> None:
        self.hm = HookManager.load(cfg.model, dtype=cfg.dtype, device=cfg.device)
        self.site, shape = _vector_site(cfg.site, {s: self.hm.atlas.shape(s) for s in self.hm.sites().sites})
        self.cfg, self.folder, self.stop = cfg.sized(int(shape[-1])), folder, stop
        if cfg.store is not None:
            _check_store(cfg, self.hm, self.site)
        self.dictionary = self.cfg.dictionary.make(int(shape[-1])).to(self.hm.device)
        # Text that cannot be read, rows too long for the model, or too little text to hold some out are better known
        # before training than after.
        first = next(_tokens(cfg, self.hm, "train").blocks())
        refuse_long_rows(self.hm, first)
        next(_tokens(cfg, self.hm, "held_out").blocks())
        self.settings = _settings(self.cfg, self.hm, digest(first.ids, first.special))
        self.fit = DictionaryFit(self.dictionary, cfg.train, seed=cfg.seed, name=self.site.name)
        # Last: the cache of a store at a URL is made here, and its first shards are fetched with the first stream.
        self.store = _store(self.cfg, self.hm, self.site)
        self.stream: BatchStream  # of `begin` or `go_on`

    def begin(self, *, force: bool) -> int:
        """Make the folder of a new run; gives the step that it begins after."""
        self.stream = self._batches()
        self.folder.begin(self._state(), self.cfg.to_yaml(), force=force or _holds_cache_alone(self.folder))
        return 0

    def remove_cache(self) -> None:
        """Remove the store's cache, if it is this run's own."""
        if isinstance(self.store, RemoteStore) and self.cfg.store_cache is None:
            del self.stream  # with what it reads ahead
            self.store.remove_cache()

    def go_on(self, say: Callable[[str], None]) -> int:
        """Take everything back to how it was at the saved state; gives its step.

        Raises:
            ConfigError: what decides the outcome is not as it was.
        """
        # Of this function alone: the state is as large as the buffer and three dictionaries.
        saved = self.folder.saved()
        record = saved.record
        others = list(differences(record["settings"], self.settings))
        if others:
            raise ConfigError(
                f"the run in {self.folder.path} was begun with other settings: {'; '.join(others)}. Resume with those "
                "it was begun with, or begin anew in another folder"
            )
        if changed := list(differences(record["versions"], _versions(self.hm))):
            say(f"resuming with other versions ({'; '.join(changed)}): the bits may differ from those of one run")
        self.folder.go_on(saved, self.cfg.to_yaml())
        if record["step"]:
            self.fit.restore(record["fit"], saved.tensors)
        self.stream = self._restored(record["stream"] if record["step"] else {}, saved)
        return int(record["step"])

    def train(self, progress: bool) -> Training:
        """Take the steps, and write the dictionary as far as it was trained."""
        self.fit.run(
            self.stream,
            log=self.folder.log,
            save=lambda: self.folder.save_state(self._state()),
            save_wanted=self.stop.save_wanted,
            should_stop=self.stop,
            progress=progress,
        )
        training = self.fit.finish()
        self.dictionary = self.dictionary.frozen()
        if training.steps:
            with self.folder.writing():
                self.dictionary.save(self.folder.path, notes=_notes(self.cfg, self.hm, training))
        return training

    def measured(self) -> DictionaryEvaluation | None:
        """Measure on held-out text; None when a signal came before the end."""
        cfg, tokens = self.cfg, _tokens(self.cfg, self.hm, "held_out")
        common: Any = {"max_tokens": cfg.evaluation.tokens, "should_stop": self.stop}
        rank = cfg.dictionary.k if cfg.evaluation.pca_rank is None else cfg.evaluation.pca_rank
        try:
            pca = self._pca(rank, common) if rank else None
            evaluation = evaluate_dictionary(self.hm, self.dictionary, tokens, self.site, pca=pca, **common)
        except KeyboardInterrupt:
            return None
        of_training = f"every {cfg.text.hold_out_every}th document of the training text, not trained on"
        text = cfg.evaluation.data or of_training
        self.folder.evaluation({**evaluation.scalars(), "text": text, "special_tokens": "left out"})
        return evaluation

    def _pca(self, rank: int, common: dict[str, Any]) -> PCA:
        rank = min(rank, self.dictionary.cfg.d_in)
        return fit_pca(self.hm, _tokens(self.cfg, self.hm, "train"), self.site, rank=rank, **common)

    def origin(self) -> dict[str, Any]:
        """Where the run comes from, for its record."""
        provenance = Provenance.of(self.hm, settings=self.cfg.model_dump(mode="json"), seed=self.cfg.seed)
        store = self.store.describe()
        threads, device = torch.get_num_threads(), str(self.hm.device)
        return {**dataclasses.asdict(provenance), "store": store, "threads": threads, "device": device}

    def _state(self) -> SavedState:
        """All that the rest of the training depends on; before the first step, how it begins."""
        fit = self.fit
        stream, tensors = self._stream_state()
        record = {
            "step": fit.steps,
            "tokens": fit.tokens,
            "fit": fit.record(),
            "stream": stream,
            # Before the first step nothing has been written; a run that this one replaces does not count.
            "metrics_bytes": self.folder.metrics_bytes() if fit.steps else 0,
            "settings": self.settings,
            "versions": _versions(self.hm),
            "config": self.cfg.model_dump(mode="json"),
        }
        return SavedState(record, {**fit.tensors(), **tensors} if fit.steps else {})

    def _stream_state(self) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
        if self.fit.complete:
            return {}, {}
        if self.fit.ahead:
            # The first weights are drawn from batches beyond this step: all that came so far comes again.
            return {"skip": self.fit.steps}, {}
        state = self.stream.state()
        return state.record, {_STREAM + name: value for name, value in state.tensors.items()}

    def _restored(self, record: dict[str, Any], saved: SavedState) -> BatchStream:
        named = {k.removeprefix(_STREAM): v for k, v in saved.tensors.items() if k.startswith(_STREAM)}
        stream = self._batches(StreamState(record, named) if record and "skip" not in record else None)
        for _ in islice(stream, record.get("skip", 0)):
            pass
        return stream

    def _batches(self, state: StreamState | None = None) -> BatchStream:
        return self.store.batches(x=self.site, should_stop=self.stop, state=state)


def _check_folder(folder: RunFolder, *, force: bool, resume: bool) -> None:
    if force and resume:
        raise ConfigError("force replaces a run and resume goes on with it: give one of them")
    if resume:
        folder.check_resume()
    elif not _holds_cache_alone(folder):
        folder.check(force=force)


def _holds_cache_alone(folder: RunFolder) -> bool:
    """Whether a run ended before it had begun, with nothing but the shards that it would have read."""
    return folder.path.is_dir() and [path.name for path in folder.path.iterdir()] == [_CACHE]


def _settings(cfg: TrainConfig, hm: HookManager, first_tokens: str) -> dict[str, Any]:
    """All that decides the outcome, as plain JSON: what a resume must find unchanged."""
    free: Any = {"out": True, "device": True, "evaluation": {"tokens", "pca_rank"}, "train": {"checkpoint_every"}}
    free |= {"store_cache": True, "store_cache_bytes": True}
    return {
        "format": 1,
        **cfg.model_dump(mode="json", exclude=free),
        "model_config": Provenance.of(hm).config_hash,
        "model_weights": weights_digest(hm.model),
        "first_tokens": first_tokens,
        "device": hm.device.type,
        "threads": torch.get_num_threads(),
    }


def _versions(hm: HookManager) -> dict[str, str]:
    """What the bits depend on besides the settings."""
    gpu = {"gpu": torch.cuda.get_device_name(hm.device)} if hm.device.type == "cuda" else {}
    return {**Provenance.of(hm).versions, **gpu}


def _store(cfg: TrainConfig, hm: HookManager, site: Site) -> ActivationStore:
    sizes: Any = {"batch_size": cfg.train.batch_size, "buffer_tokens": cfg.train.buffer_tokens, "seed": cfg.seed}
    if cfg.store is None:
        return ActivationStore.stream(hm, _tokens(cfg, hm, "train"), site, repeat=True, **sizes)
    pin = hm.device.type == "cuda"
    if not cfg.store_is_remote:
        return ActivationStore.open(cfg.store, repeat=True, pin=pin, **sizes)
    cache = cfg.store_cache or Path(cfg.out) / _CACHE
    store = open_remote(cfg.store, cache, cache_bytes=cfg.store_cache_bytes, repeat=True, **sizes)
    store.pin = pin
    return store


def _check_store(cfg: TrainConfig, hm: HookManager, site: Site) -> None:
    """Refuse a store that this dictionary cannot be trained on, before anything is made."""
    where = str(cfg.store)
    if cfg.store_is_remote:
        remote = RemoteFolder(where)
        made, complete = remote.manifest(), remote.read(COMPLETE) is not None
        if made is None:
            raise ConfigError(f"{where} holds no store of activations; `interp store send FOLDER {where}` sends one")
        way_on = f"interp store send FOLDER {where}"
    else:
        made, complete = Manifest.read(Path(where)), (Path(where) / COMPLETE).is_file()
        way_on = f"interp capture --resume --out {where}"
    held = [Site(each.name) for each in made.sites]
    if site not in held:
        raise ConfigError(f"the store in {where} holds {[s.short for s in held]}, not {site.short}")
    if made.config_hash != Provenance.of(hm).config_hash or made.weights != weights_digest(hm.model):
        raise ConfigError(f"the store in {where} was captured from {made.model}, which is not {cfg.model}")
    if not complete:
        raise ConfigError(f"the store in {where} is not complete; `{way_on}`")
    parted = made.text.part == "train" and made.text.hold_out_every == cfg.text.hold_out_every
    if cfg.evaluation.data is None and not parted:
        raise ConfigError(
            f"the store in {where} holds {made.text.part!r} documents, so none of {cfg.data} are known to be held "
            "out; capture with --text.part train, or give evaluation.data"
        )


def _notes(cfg: TrainConfig, hm: HookManager, training: Training) -> dict[str, Any]:
    """What SAELens' metadata says of a dictionary."""
    return {
        "hook_name": Site(cfg.site).name,
        "model_name": hm.name,
        "model_class_name": type(hm.model).__name__,
        "context_size": cfg.text.ctx,
        "dataset_path": cfg.data,
        "prepend_bos": _tokens(cfg, hm, "train").bos,
        "exclude_special_tokens": True,
        "disable_concat_sequences": cfg.text.packing == "one_doc",
        "training_tokens": training.tokens,
    }


def _tokens(cfg: TrainConfig, hm: HookManager, part: Part) -> TokenSource:
    own = part == "held_out" and cfg.evaluation.data is not None
    whole: Part = "all" if cfg.evaluation.data is not None else part
    return token_source(str(cfg.evaluation.data if own else cfg.data), cfg.text, hm.tokenizer, part=whole)


def _vector_site(name: str, shapes: dict[Site, Any]) -> tuple[Site, Any]:
    site = Site(name)
    if site not in shapes:
        near = ", ".join(s.short for s in shapes if s.kind == site.kind) or "`interp sites MODEL` lists what it has"
        raise ConfigError(f"this model has no site {site.short}; {near}")
    if len(site.axes) != 3:
        raise ConfigError(f"{site.short} has axes {site.axes}; a dictionary reads one vector a token: try 3.resid_post")
    return site, shapes[site]
