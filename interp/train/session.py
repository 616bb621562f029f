"""One training under way: the model, one stream of activations, and the dictionaries that are fitted to it."""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from typing import Any

import torch

from interp.core.disk import differences, digest, weights_digest
from interp.core.errors import ConfigError
from interp.core.manager import HookManager
from interp.core.result import Provenance
from interp.core.site import Site
from interp.data.remote import RemoteStore
from interp.data.store import Batch, BatchStream, StreamState
from interp.data.tune import refuse_long_rows
from interp.dictionaries.across import ALONE
from interp.dictionaries.base import Dictionary
from interp.dictionaries.heads import reading
from interp.evaluate.baseline import PCA, fit_pca
from interp.evaluate.dictionary import DictionaryEvaluation, evaluate_dictionaries
from interp.evaluate.place import place_of, target_of
from interp.evaluate.sums import Subject
from interp.train.activations import check_store, open_store, tokens_of, vector_site
from interp.train.checkpoint import SavedState
from interp.train.config import TrainConfig
from interp.train.downstream import RowBatches
from interp.train.runfolder import RunFolder
from interp.train.start import followed, started
from interp.train.trackers import Trackers, clear_trackers
from interp.train.trainer import DictionaryFit, Training, run_fits
from interp.train.world import Agreed, World, gathered

__all__ = ["Member", "Session"]

_STREAM = "stream."


class Member:
    """One dictionary of a training, with its folder.

    Args:
        cfg: its own configuration.
        name: of it among the others; "" where it is alone.
        hm: the manager of the model.
        folder: its run folder.
        world: the processes that train it.
    """

    def __init__(self, cfg: TrainConfig, name: str, hm: HookManager, folder: RunFolder, world: World) -> None:
        self.name, self.hm, self.folder, self.world = name, hm, folder, world
        shapes = {s: hm.atlas.shape(s) for s in hm.sites().sites}
        self.site, d_in = vector_site(cfg.site, shapes)
        self.target: Site | None = None
        d_out = d_in
        if cfg.target is not None:
            self.target, d_out = vector_site(cfg.target, shapes)
        self.cfg = followed(cfg, d_in, d_out).sized(d_in)
        self.start = started(self.cfg)
        made = self.cfg.dictionary.make(d_in, d_out) if self.start is None else self.start.dictionary
        reading(made, self.site).join(world.across)  # before it is on the device, which may not hold the whole
        self.dictionary = made.to(hm.device)
        shown = self.site.name if self.target is None else f"{self.site.name} → {self.target.name}"
        shown, again = f"{name} {shown}".strip(), self.start is not None
        self.fit = DictionaryFit(self.dictionary, cfg.train, seed=cfg.seed, name=shown, trained=again)
        self.trackers: Trackers | None = None

    @property
    def sites(self) -> list[Site]:
        """What it reads, and what it reconstructs."""
        return [self.site] if self.target is None else [self.site, self.target]

    def track(self, *, resumed: bool) -> None:
        """Begin to send metrics to trackers, or go on after the last line that an earlier part of the run has left."""
        if not self.world.first:
            return
        folder, settings = self.folder.path, self.cfg.model_dump(mode="json")
        if not resumed:
            clear_trackers(folder)
        before = self.folder.lines() if resumed else None
        group = folder.parent.name if self.name else None
        self.trackers = Trackers(self.cfg.train.track, folder, settings=settings, before=before, group=group)

    def log(self, line: dict[str, int | float]) -> None:
        """Write a line of metrics, and send it to trackers."""
        self.folder.log(line)
        if self.trackers is not None:
            self.trackers.log(line)

    def record(self) -> dict[str, Any]:
        """Where its fit stands, as plain JSON."""
        # Before the first step nothing has been written; a run that this one replaces does not count.
        return {"fit": self.fit.record(), "metrics_bytes": self.folder.metrics_bytes() if self.fit.steps else 0}

    def tensors(self) -> dict[str, torch.Tensor]:
        """What its fit is made of, by name."""
        return {f"{self.name}/{name}": value for name, value in self.fit.tensors().items()}

    def restore(self, saved: SavedState) -> None:
        """Go back to a saved state."""
        mark = f"{self.name}/"
        mine = {name.removeprefix(mark): v for name, v in saved.tensors.items() if name.startswith(mark)}
        self.fit.restore(saved.record["members"][self.name]["fit"], mine)

    def finish(self) -> Training:
        """Fold what training scaled, and write the dictionary as far as it was trained."""
        training = self.fit.finish()
        whole = self._whole()
        if whole is not None:
            self.dictionary = whole.frozen()
            if training.steps:
                with self.folder.writing():
                    self.dictionary.save(self.folder.path, notes=self._notes(training))
        return training

    def _whole(self) -> Dictionary | None:
        """What was trained, in the first process; None in the others."""
        shards = self.world.across.latents.size
        parts = {f"weights.{name}": value for name, value in self.dictionary.state_dict().items()}
        tensors = gathered(self.world.across, parts) if shards > 1 else {}
        if not self.world.first:
            return None
        if shards == 1:
            self.dictionary.across = ALONE
            return self.dictionary
        made = self.cfg.dictionary.make(self.dictionary.cfg.d_in, self.dictionary.d_out)
        made.set_cfg(self.dictionary.cfg)
        made.load_state_dict({name.removeprefix("weights."): value for name, value in tensors.items()})
        # On the CPU: it was split because a device may not hold it.
        return made.eval().requires_grad_(False)

    def subject(self, pca: PCA | None) -> Subject:
        """The dictionary as it is measured, beside a baseline."""
        place = place_of(self.hm, self.dictionary, self.site)
        return Subject(self.dictionary, place, target_of(self.hm, self.dictionary, place, self.target), pca)

    def measured(self, evaluation: DictionaryEvaluation) -> None:
        """Write the figures."""
        cfg = self.cfg
        of_training = f"every {cfg.text.hold_out_every}th document of the training text, not trained on"
        text = cfg.evaluation.data or of_training
        self.folder.evaluation({**evaluation.scalars(), "text": text, "special_tokens": "left out"})
        if self.trackers is not None:
            self.trackers.figures(evaluation.scalars(), self.fit.steps)

    def _notes(self, training: Training) -> dict[str, Any]:
        """What SAELens' metadata says of a dictionary."""
        cfg = self.cfg
        options = cfg.dictionary.model_dump(mode="json", exclude_defaults=True, exclude={"kind"})
        return {
            "hook_name": self.site.name,
            **({} if self.target is None else {"hook_name_out": self.target.name}),
            "model_name": self.hm.name,
            "model_class_name": type(self.hm.model).__name__,
            "context_size": cfg.text.ctx,
            "dataset_path": cfg.data,
            "prepend_bos": tokens_of(cfg, self.hm, "train").bos,
            "exclude_special_tokens": True,
            "disable_concat_sequences": cfg.text.packing == "one_doc",
            "training_tokens": training.tokens,
            "training_architecture": cfg.dictionary.kind,
            "training_architecture_details": options,
            **({} if self.start is None else {"started_from": self.start.record}),
        }


class Session:
    """Model, text and stream of one training, and its dictionaries, which take each step together.

    Args:
        cfg: the configuration.
        folder: the run folder; a sweep's dictionaries have their own in it.
        stop: what signals have asked for.
        world: the processes that train; every one of them has such a session.
    """

    def __init__(self, cfg: TrainConfig, folder: RunFolder, stop: Agreed, world: World) -> None:
        if not world.first:
            from transformers.utils.logging import disable_progress_bar

            disable_progress_bar()
        self.hm = HookManager.load(cfg.model, dtype=cfg.dtype, device=world.device(cfg.device))
        if cfg.downstream.loss != "none":
            # Else each forward would keep what gradients of the weights are made of.
            self.hm.model.requires_grad_(False)
        self.folder, self.stop, self.world = folder, stop, world
        self.members = [
            Member(one, name, self.hm, world.folder(one.out) if name else folder, world)
            for name, one in cfg.members().items()
        ]
        self.cfg = cfg if cfg.sweep.any else self.members[0].cfg
        self.sites = list(dict.fromkeys(site for member in self.members for site in member.sites))
        needs_gradient = any(member.cfg.dictionary.kind == "gradient_topk" for member in self.members)
        check_store(cfg, self.hm, self.sites, gradient=needs_gradient)
        # Text that cannot be read, rows too long for the model, or too little text to hold some out are better known
        # before training than after.
        first = next(tokens_of(cfg, self.hm, "train").blocks())
        refuse_long_rows(self.hm, first)
        next(tokens_of(cfg, self.hm, "held_out").blocks())
        self.start = self.members[0].start  # of all of them
        self.settings = _settings(self.cfg, self.hm, digest(first.ids, first.special))
        if self.start is not None:
            self.settings["start_weights"] = self.start.record["weights"]
        # Last: the cache of a store at a URL is made here, and its first shards are fetched with the first stream.
        self.store = open_store(self.cfg, self.hm, self.sites, world.across)
        if isinstance(self.store, RowBatches):
            self.store.check(list(dict.fromkeys(member.sites[-1] for member in self.members)))
        self.stream: BatchStream  # of `begin` or `go_on`

    @property
    def first(self) -> DictionaryFit:
        """The fit of the first dictionary: all of them stand at the same step."""
        return self.members[0].fit

    def begin(self, *, force: bool) -> int:
        """Make the folders of a new run; gives the step that it begins after."""
        self.stream = self._stream()
        self.folder.begin(self._state(), self.cfg.to_yaml(), force=force)
        for member in self._own():
            member.folder.begin_in(member.cfg.to_yaml())
        for member in self.members:
            member.track(resumed=False)
        return 0

    def close(self) -> None:
        """Let what was sent to trackers arrive."""
        for member in self.members:
            if member.trackers is not None:
                member.trackers.close()

    def remove_cache(self) -> None:
        """Remove the store's cache, if it is this run's own."""
        if isinstance(self.store, RemoteStore) and self.cfg.store_cache is None:
            del self.stream  # with what it reads ahead
            if self.world.first:
                self.store.remove_cache()

    def go_on(self, say: Callable[[str], None]) -> int:
        """Take everything back to how it was at the saved state; gives its step.

        Raises:
            ConfigError: what decides the outcome is not as it was.
        """
        # Of this function alone: the state is as large as the buffer and three times the dictionaries.
        saved = self.folder.saved()
        record = saved.record
        others = list(differences(record["settings"], self.settings))
        if others:
            raise ConfigError(
                f"the run in {self.folder.path} was begun with other settings: {'; '.join(others)}. Resume with those "
                "it was begun with, or begin anew in another folder"
            )
        if changed := list(differences(record["versions"], self._versions())):
            say(f"resuming with other versions ({'; '.join(changed)}): the bits may differ from those of one run")
        for member in self.members:
            held = record["members"][member.name]
            member.folder.cut_back(record["step"], held["metrics_bytes"], member.cfg.to_yaml())
        self.folder.go_on(record["step"], self.cfg.to_yaml())
        if record["step"]:
            for member in self.members:
                member.restore(saved)
        self.stream = self._restored(record["stream"] if record["step"] else {}, saved)
        for member in self.members:
            member.track(resumed=True)
        return int(record["step"])

    def train(self, progress: bool) -> list[Training]:
        """Take the steps, and write the dictionaries as far as they were trained."""
        run_fits(
            [member.fit for member in self.members],
            self._batches(),
            [member.log for member in self.members],
            save=lambda: self.folder.save_state(self._state()),
            save_wanted=self.stop.save_wanted,
            should_stop=self.stop,
            progress=progress,
        )
        return [member.finish() for member in self.members]

    def measured(self, progress: bool) -> list[DictionaryEvaluation] | None:
        """Measure on held-out text, in the first process alone; None when a signal came before the end."""
        if not all(_fits(member.dictionary, self.hm.device) for member in self.members):
            # Slow, and better than nothing: the device may not hold what was trained in shards.
            self.hm = HookManager.load(self.cfg.model, dtype=self.cfg.dtype, device="cpu")
        for member in self.members:
            member.hm, member.dictionary = self.hm, member.dictionary.to(self.hm.device)
        wanted = [self._baseline(member) for member in self.members]
        ranks = {site: max(rank for other, rank in wanted if other == site) for site, _ in wanted}
        stop = self.stop.signals
        try:
            fitted = {site: self._pca(site, rank, progress) for site, rank in ranks.items()}
            # Of the same baseline there is one object: it is measured once.
            known = {key: None if (pca := fitted[key[0]]) is None else pca.truncated(key[1]) for key in set(wanted)}
            subjects = [m.subject(known[key] if key[1] else None) for m, key in zip(self.members, wanted, strict=True)]
            text, most = tokens_of(self.cfg, self.hm, "held_out"), self.cfg.evaluation.tokens
            sizes: Any = {"max_tokens": most, "should_stop": stop, "progress": progress}
            found = evaluate_dictionaries(self.hm, subjects, text, **sizes)
        except KeyboardInterrupt:
            return None
        for member, evaluation in zip(self.members, found, strict=True):
            member.measured(evaluation)
        return found

    def origin(self) -> dict[str, Any]:
        """Where the run comes from, for its record."""
        provenance = Provenance.of(self.hm, settings=self.cfg.model_dump(mode="json"), seed=self.cfg.seed)
        store = self.store.describe()
        threads, device = torch.get_num_threads(), str(self.hm.device)
        many = {"processes": self.world.size} if self.world.size > 1 else {}
        known = {**dataclasses.asdict(provenance), "store": store, "threads": threads, "device": device, **many}
        return known if self.start is None else {**known, "started_from": self.start.record}

    def _versions(self) -> dict[str, str]:
        """What the bits depend on besides the settings."""
        hm, across = self.hm, self.world.across
        gpu = {"gpu": torch.cuda.get_device_name(hm.device)} if hm.device.type == "cuda" else {}
        many = {"processes": f"{across.tokens.size} x {across.latents.size}"} if self.world.size > 1 else {}
        return {**Provenance.of(hm).versions, **gpu, **many}

    def _own(self) -> Sequence[Member]:
        """The members that have a folder of their own."""
        return [member for member in self.members if member.name]

    def _baseline(self, member: Member) -> tuple[Site, int]:
        """The site of the PCA that is measured beside a dictionary, and its rank; 0 for none."""
        cfg, width = member.cfg, member.dictionary.cfg.d_in
        if member.target is not None:
            return member.site, 0  # of the input it says nothing
        rank = cfg.dictionary.k if cfg.evaluation.pca_rank is None else cfg.evaluation.pca_rank
        return member.site, min(rank or 0, width)

    def _pca(self, site: Site, rank: int, progress: bool) -> PCA | None:
        if not rank:
            return None
        sizes: Any = {"rank": rank, "max_tokens": self.cfg.evaluation.tokens, "progress": progress}
        return fit_pca(self.hm, tokens_of(self.cfg, self.hm, "train"), site, should_stop=self.stop.signals, **sizes)

    def _state(self) -> SavedState:
        """All that the rest of the training depends on; before the first step, how it begins."""
        # The others have the same buffer; of a dictionary in shards each has its part of what is saved.
        stream, tensors = self._stream_state() if self.world.first else ({}, {})
        record = {
            "step": self.first.steps,
            "tokens": self.first.tokens,
            "members": {member.name: member.record() for member in self.members},
            "stream": stream,
            "settings": self.settings,
            "versions": self._versions(),
            "config": self.cfg.model_dump(mode="json"),
        }
        if not self.first.steps:
            return SavedState(record, {})
        for member in self.members:
            tensors |= member.tensors()
        return SavedState(record, tensors)

    def _stream_state(self) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
        if self.first.complete:
            return {}, {}
        if self.first.ahead:
            # The first weights are drawn from batches beyond this step: all that came so far comes again.
            return {"skip": self.first.steps}, {}
        state = self.stream.state()
        return state.record, {_STREAM + name: value for name, value in state.tensors.items()}

    def _restored(self, record: dict[str, Any], saved: SavedState) -> BatchStream:
        named = {k.removeprefix(_STREAM): v for k, v in saved.tensors.items() if k.startswith(_STREAM)}
        stream = self._stream(StreamState(record, named) if record and "skip" not in record else None)
        for _ in islice(stream, record.get("skip", 0)):
            pass
        return stream

    def _stream(self, state: StreamState | None = None) -> BatchStream:
        # What reads a store ahead is a thread, in which processes cannot agree; the loop asks before each step anyway.
        alone_or_here = self.world.size == 1 or self.cfg.store is None
        return self.store.batches(x=self.sites[0], should_stop=self.stop if alone_or_here else None, state=state)

    def _batches(self) -> Iterator[list[Batch]]:
        """For each step, a batch per member: the same tokens, each at its own sites."""
        at = [
            (self.store.place(m.site), None if m.target is None else self.store.place(m.target)) for m in self.members
        ]
        for rows in self.stream.rows():
            yield [rows.batch(x, target) for x, target in at]


def _settings(cfg: TrainConfig, hm: HookManager, first_tokens: str) -> dict[str, Any]:
    """All that decides the outcome, as plain JSON: what a resume must find unchanged."""
    free: Any = {"out": True, "device": True, "evaluation": {"tokens", "pca_rank"}}
    free["train"] = {"checkpoint_every", "track", "shards"}
    free |= {"store_cache": True, "store_cache_bytes": True}
    free |= {} if cfg.start else {"start": True}
    free |= {} if cfg.downstream.loss != "none" else {"downstream": True}
    return {
        "format": 1,
        **cfg.model_dump(mode="json", exclude=free),
        "model_config": Provenance.of(hm).config_hash,
        "model_weights": weights_digest(hm.model),
        "first_tokens": first_tokens,
        "device": hm.device.type,
        "threads": torch.get_num_threads(),
    }


def _fits(dictionary: Dictionary, device: torch.device) -> bool:
    """Whether a dictionary is on a device, or that has room for it and as much again."""
    if dictionary.W_enc.device == device:
        return True
    size = sum(p.numel() * p.element_size() for p in dictionary.parameters())
    return device.type != "cuda" or torch.cuda.mem_get_info(device)[0] > 2 * size
