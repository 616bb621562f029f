"""Training that goes on from a trained dictionary: what follows from it, and it itself."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from interp.core.disk import digest
from interp.core.errors import ArtifactError, ConfigError
from interp.core.site import Site
from interp.dictionaries.base import Dictionary
from interp.dictionaries.batchtopk import BatchTopKDictionary, BatchTopKSAE, BatchTopKTranscoder
from interp.dictionaries.folder import CFG, WEIGHTS, read_cfg
from interp.dictionaries.topk import GradientTopKSAE
from interp.train.config import TrainConfig

__all__ = ["Start", "bring_to_norm", "followed", "started"]

# SAELens' name of a saved architecture → the kinds that it can go on as, its own first.
_KINDS: dict[str, tuple[str, ...]] = {
    "topk": ("topk", "gradient_topk"),
    "standard": ("standard",),
    "gated": ("gated",),
    "jumprelu": ("jumprelu", "batchtopk"),
    "transcoder": ("standard",),
    "skip_transcoder": ("standard",),
    "jumprelu_transcoder": ("jumprelu", "batchtopk"),
    "jumprelu_skip_transcoder": ("jumprelu", "batchtopk"),
}
_NOT_SAID = "topk"  # the default of dictionary.kind, which is then whatever the folder holds
_NEVER = 1e30
_ROUNDING = 1e-3  # by which a decoder row's norm may miss 1 and count as 1


@dataclass(frozen=True)
class Start:
    """A dictionary that a training goes on from, ready for it, and where it comes from.

    Attributes:
        dictionary: of raw activations, in fp32, on the CPU.
        record: folder, digest of the weights, architecture, and the site and model it was trained on, where known.
    """

    dictionary: Dictionary
    record: dict[str, Any]


def followed(cfg: TrainConfig, d_in: int, d_out: int) -> TrainConfig:
    """Return a configuration with kind and sizes of the dictionary it starts from; as it is where it starts anew.

    Args:
        cfg: of one dictionary.
        d_in: width of the site.
        d_out: width of what is reconstructed.

    Raises:
        ArtifactError: there is no dictionary in the folder.
        ConfigError: it is of another form, site or width, or of another kind or size than was asked for.
    """
    if cfg.start is None:
        return cfg
    if not (Path(cfg.start) / CFG).is_file() or not (Path(cfg.start) / WEIGHTS).is_file():
        raise ConfigError(
            f"start {cfg.start} is no folder of SAELens' layout, which training goes on from; of what else "
            f"interp.SAE.load reads make one: `interp export {cfg.start} --to saelens --out FOLDER`"
        )
    held, asked = read_cfg(Path(cfg.start)), cfg.dictionary
    architecture, where = str(held["architecture"]), f"the dictionary in {cfg.start}"
    kinds = _KINDS.get(architecture)
    if kinds is None:
        raise ConfigError(f"{where} is a {architecture!r}, which training cannot go on from; known: {sorted(_KINDS)}")
    _check_place(cfg, held, d_in, d_out)
    kind = kinds[0] if asked.kind == _NOT_SAID else asked.kind
    if kind not in kinds:
        raise ConfigError(f"{where} is a {architecture!r}, which goes on as {' or '.join(kinds)}, not as {kind}")
    sizes: dict[str, Any] = {"d_sae": int(held["d_sae"])}
    if "k" in held:
        sizes["k"] = int(held["k"])
    for name, size in sizes.items():
        if getattr(asked, name) not in (None, size):
            raise ConfigError(
                f"{where} has {name} {size} and dictionary.{name} is {getattr(asked, name)}; leave it out"
            )
    if kind == "batchtopk" and asked.k is None:
        sizes["k"] = _k_of_training(held, where)
    return cfg.model_copy(update={"dictionary": asked.model_copy(update={"kind": kind, **sizes})})


def started(cfg: TrainConfig) -> Start | None:
    """Return the dictionary that a training goes on from, with its own objective; None where it starts anew.

    Where the objective keeps decoder rows at norm 1, rows of other norms are brought to it, which changes no
    reconstruction. What BatchTopK saved, a JumpReLU dictionary, has its thresholds as the first ones; as batchtopk it
    has their mean until batches say otherwise.

    Args:
        cfg: what `followed` gave, with all sizes.

    Raises:
        ArtifactError: the folder's weights are missing or damaged, or no numbers.
        ConfigError: rows have other norms than 1, and their latents are chosen in a way that norms decide.
    """
    if cfg.start is None:
        return None
    loaded = Dictionary.load(cfg.start)
    for name, value in loaded.state_dict().items():
        # A threshold of a latent that is never active may be infinite.
        if bool(value.isnan().any()) or (name != "threshold" and bool(value.isinf().any())):
            raise ArtifactError(f"{cfg.start} holds {name} with NaN or infinite numbers; save it again, or train anew")
    made = _for_training(loaded, cfg)
    bring_to_norm(made)
    weights = loaded.state_dict()
    known = {n: loaded.cfg.metadata.get(n) for n in ("hook_name", "hook_name_out", "model_name")}
    record = {
        "folder": cfg.start,
        "weights": digest(*(part for name in sorted(weights) for part in (name, weights[name]))),
        "architecture": loaded.cfg.architecture,
        **{name: value for name, value in known.items() if value is not None},
    }
    return Start(made, record)


@torch.no_grad()
def _for_training(loaded: Dictionary, cfg: TrainConfig) -> Dictionary:
    settings = loaded.cfg.model_copy(update={"dtype": "float32", "metadata": {}})
    options, state = cfg.dictionary, dict(loaded.state_dict())
    if options.kind == "batchtopk":
        shared: Any = BatchTopKSAE if options.form == "sae" else BatchTopKTranscoder
        made: Any = shared(settings, options, k=options.k)
        assert isinstance(made, BatchTopKDictionary)
        threshold = state.pop("threshold").double()
        there = threshold[threshold.isfinite()]
        made.least.fill_(float(there.mean()) if len(there) else 0.0)
        made.weight.fill_(1.0)
    else:
        if "threshold" in state:
            # Of a latent that is never active; its estimated gradient would be ∞ · 0.
            state["threshold"] = state["threshold"].nan_to_num(posinf=_NEVER)
        # A union of classes, whose common base does not say how they are made.
        kind: Any = GradientTopKSAE if options.kind == "gradient_topk" else type(loaded)
        made = kind(settings, options)
    made.load_state_dict({**made.state_dict(), **state})
    found: Dictionary = made
    return found


@torch.no_grad()
def bring_to_norm(dictionary: Any) -> None:
    """Bring decoder rows to norm 1 where steps would, so that these do not change what is reconstructed, in place.

    Args:
        dictionary: one that is trained or about to be.

    Raises:
        ConfigError: rows have other norms, and latents are chosen in a way that norms decide.
    """
    norm = dictionary.W_dec.norm(dim=-1)
    if not dictionary.terms.unit_norm or bool(((norm - 1).abs() < _ROUNDING).all()):
        return
    if isinstance(dictionary, BatchTopKDictionary):
        # Its own refuses, for tokens would share the budget in another way; so they will after the first step.
        super(BatchTopKDictionary, dictionary).fold_decoder_norm()
        return
    try:
        dictionary.fold_decoder_norm()
    except ConfigError as err:
        raise ConfigError(
            f"decoder rows have norms from {float(norm.min()):.3g} to {float(norm.max()):.3g}, and {err}; let them be: "
            "dictionary.unit_norm false"
        ) from err


def _check_place(cfg: TrainConfig, held: dict[str, Any], d_in: int, d_out: int) -> None:
    """Refuse a dictionary of another form, site or width."""
    where, architecture = f"the dictionary in {cfg.start}", str(held["architecture"])
    form = "skip_transcoder" if "skip" in architecture else "transcoder" if "transcoder" in architecture else "sae"
    if form != cfg.dictionary.form:
        raise ConfigError(f"{where} is a {architecture!r}; dictionary.form is {cfg.dictionary.form}, give {form}")
    for name, width in (("d_in", d_in), ("d_out", d_out)):
        if int(held.get(name, width)) != width:
            place = cfg.target or cfg.site if name == "d_out" else cfg.site
            raise ConfigError(f"{where} has {name} {held[name]}, and {place} of {cfg.model} is {width} wide")
    metadata = held.get("metadata") or {}
    for key, asked in (("hook_name", cfg.site), ("hook_name_out", cfg.target)):
        known = metadata.get(key)
        if known is not None and asked is not None and Site(str(known)) != Site(asked):
            raise ConfigError(f"{where} was trained on {known}, not on {asked}; give the site that it is of")


def _k_of_training(held: dict[str, Any], where: str) -> int:
    metadata = held.get("metadata") or {}
    k = (metadata.get("training_architecture_details") or {}).get("k")
    if metadata.get("training_architecture") != "batchtopk" or k is None:
        raise ConfigError(f"{where} does not say how many latents are active; give dictionary.k to go on as batchtopk")
    return int(k)
