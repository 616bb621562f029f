"""What a training reads: its text, the sites of the model, and the store of their activations."""

from collections.abc import Mapping, Sequence
from math import prod
from pathlib import Path
from typing import Any

from interp.core.disk import weights_digest
from interp.core.errors import ConfigError
from interp.core.manager import HookManager
from interp.core.result import Provenance
from interp.core.site import Site
from interp.data.documents import Part
from interp.data.manifest import COMPLETE, Manifest
from interp.data.remote import open_remote
from interp.data.remotefolder import RemoteFolder
from interp.data.store import ActivationStore
from interp.data.tokens import TokenSource
from interp.dictionaries.across import ALONE, Across
from interp.dictionaries.space import has_heads
from interp.train.config import TrainConfig
from interp.train.downstream import RowBatches
from interp.train.text import token_source

__all__ = ["CACHE", "check_store", "open_store", "tokens_of", "vector_site"]

CACHE = "store-cache"  # of a run whose store is at a URL


def tokens_of(cfg: TrainConfig, hm: HookManager, part: Part) -> TokenSource:
    """The text of a training, or what is held out of it to measure on."""
    own = part == "held_out" and cfg.evaluation.data is not None
    whole: Part = "all" if cfg.evaluation.data is not None else part
    return token_source(str(cfg.evaluation.data if own else cfg.data), cfg.text, hm.tokenizer, part=whole)


def vector_site(name: str, shapes: Mapping[Site, Any]) -> tuple[Site, int]:
    """A site that has one vector for each token, and its width; heads of q, k, v and z side by side count as one.

    Raises:
        ConfigError: the model has no such site, or it has more than a vector.
    """
    site = Site(name)
    if site not in shapes:
        near = ", ".join(s.short for s in shapes if s.kind == site.kind) or "`interp sites MODEL` lists what it has"
        raise ConfigError(f"this model has no site {site.short}; {near}")
    if has_heads(site):
        return site, int(prod(shapes[site][2:]))
    if len(site.axes) != 3:
        raise ConfigError(f"{site.short} has axes {site.axes}; a dictionary reads one vector a token: try 3.resid_post")
    return site, int(shapes[site][-1])


def open_store(cfg: TrainConfig, hm: HookManager, sites: Sequence[Site], across: Across = ALONE) -> ActivationStore:
    """The store that a training reads: streamed from the model, on a disk, or at a URL.

    Args:
        cfg: the configuration.
        hm: the manager of the model.
        sites: what is read.
        across: the processes that train, of which each takes its part of every batch.
    """
    store = _opened(cfg, hm, sites)
    store.ranks, store.part = across.every, (across.tokens.rank, across.tokens.size)
    return store


def _opened(cfg: TrainConfig, hm: HookManager, sites: Sequence[Site]) -> ActivationStore:
    sizes: Any = {"batch_size": cfg.train.batch_size, "buffer_tokens": cfg.train.buffer_tokens, "seed": cfg.seed}
    if cfg.downstream.loss != "none":
        whole = cfg.text.model_copy(update={"rows": cfg.train.batch_size // cfg.text.ctx})
        text = tokens_of(cfg.model_copy(update={"text": whole}), hm, "train")
        return RowBatches(hm, text, list(sites), cfg.downstream, rows=cfg.text.rows, repeat=True)
    if cfg.store is None:
        return ActivationStore.stream(hm, tokens_of(cfg, hm, "train"), list(sites), repeat=True, **sizes)
    pin = hm.device.type == "cuda"
    if not cfg.store_is_remote:
        return ActivationStore.open(cfg.store, repeat=True, pin=pin, **sizes)
    cache = cfg.store_cache or Path(cfg.out) / CACHE
    store = open_remote(cfg.store, cache, cache_bytes=cfg.store_cache_bytes, repeat=True, **sizes)
    store.pin = pin
    return store


def check_store(cfg: TrainConfig, hm: HookManager, sites: Sequence[Site], *, gradient: bool) -> None:
    """Refuse a store that these dictionaries cannot be trained on, before anything is made.

    Args:
        cfg: the configuration.
        hm: the manager of the model.
        sites: what is read.
        gradient: whether gradients of the model's loss are needed.

    Raises:
        ConfigError: there is none, or it is of other sites, another model, another text, or not complete.
    """
    if cfg.store is None and gradient:
        raise ConfigError(
            "a g-SAE needs gradients of the model's loss; `interp capture --store.gradient loss` keeps them, and "
            "--store takes what it wrote"
        )
    if cfg.store is None:
        return
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
    if missing := [site.short for site in sites if site not in held]:
        raise ConfigError(f"the store in {where} holds {[s.short for s in held]}, not {', '.join(missing)}")
    if gradient and made.gradient is None:
        raise ConfigError(f"the store in {where} holds no gradients; a g-SAE needs them: --store.gradient loss")
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
