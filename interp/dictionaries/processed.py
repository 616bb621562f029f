"""Dictionaries of models that TransformerLens processed: what its processing makes of one site of the raw model.

TransformerLens may rewrite a model's weights on loading so that it predicts the same from other activations. A
dictionary's metadata say what was asked for, as `model_from_pretrained_kwargs`. What the processed model has at a site
is then, where it can be said at all, an exact function of what the raw model has there:

    center_writing_weights   x − mean over d_model, at the residual stream, attn_out and mlp_out; models of LayerNorm
    fold_ln                  (x − bias) / gain, at what a sublayer reads after a norm; there and at the normalized value
                             the mean of a reconstruction is lost after a LayerNorm, whose readers are centred
    fold_value_biases        x − b_V, at v and z; with fold_ln b_V holds what ln1's bias adds to it

Source: TransformerLens' `ProcessWeights`; the algebra is in `interp.core.fold`.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from interp.core.errors import ConfigError
from interp.core.site import Site
from interp.dictionaries.base import Dictionary, Transcoder

if TYPE_CHECKING:
    from interp.core.manager import HookManager
    from interp.dictionaries.space import Space

__all__ = ["check_bound", "for_model", "processing_of", "refuse_unbound"]

_FLAGS = (
    "center_writing_weights",
    "fold_ln",
    "fold_value_biases",
    "center_unembed",
    "refactor_factored_attn_matrices",
)
_STREAM = ("embed", "pos_embed", "resid_pre", "resid_mid", "resid_post", "attn_in", "mlp_in", "attn_out", "mlp_out")
_AFTER_NORM = {
    "ln1.out": "ln1",
    "attn.in": "ln1",
    "ln2.out": "ln2",
    "mlp.in": "ln2",
    "ln_final.out": "ln_final",
    "unembed.in": "ln_final",
}
_NORMALIZED = ("ln1.normalized", "ln2.normalized", "ln_final.normalized")
_REFACTORED = ("q", "k", "rot_q", "rot_k", "v", "z")
_SAME = ("q", "k", "rot_q", "rot_k", "mlp_pre", "mlp_pre_linear", "mlp_post", "router_logits")

_D = TypeVar("_D", bound=Dictionary)


def processing_of(metadata: Mapping[str, Any]) -> tuple[str, ...]:
    """Return which kinds of TransformerLens' processing a dictionary's model had, by name."""
    asked = metadata.get("model_from_pretrained_kwargs") or {}
    return tuple(name for name in _FLAGS if isinstance(asked, Mapping) and asked.get(name))


def for_model(
    dictionary: _D, hm: "HookManager", *, site: str | Site | None = None, target: str | Site | None = None
) -> _D:
    """Make a dictionary of a processed model one of a manager's own activations, in place.

    Its weights and metadata stay; `dictionary.space` says what is done to activations before and after. Of a manager
    that `hm.folded()` gave nothing needs doing. Latents are those of the processed model; reconstructions are of the
    manager's. A dictionary whose model was not processed stays as it is.

    Args:
        dictionary: of any model; the flags are in its metadata, as `model_from_pretrained_kwargs`.
        hm: the manager whose activations it will read.
        site: what it reads; None takes the one it was trained on, from its metadata.
        target: what a transcoder reconstructs; None as for `site`.

    Returns:
        The same dictionary.

    Raises:
        ConfigError: no site is known; what the processed model has there is no function of what this one has; or it was
            folded in other ways than the dictionary's model.
    """
    flags = processing_of(dictionary.cfg.metadata)
    if not flags:
        return dictionary
    place = _named(dictionary, "hook_name", site)
    if isinstance(dictionary, Transcoder):
        _bind(dictionary.space, hm, place, flags, written=False)
        _bind(dictionary.target_space, hm, _named(dictionary, "hook_name_out", target), flags, written=True)
    else:
        _bind(dictionary.space, hm, place, flags, written=True)
    weights = dictionary.W_dec
    dictionary.space.to(weights.device, weights.dtype)
    dictionary.target_space.to(weights.device, weights.dtype)
    return dictionary


def refuse_unbound(dictionary: Dictionary) -> None:
    """Refuse a dictionary that needs to be told its model.

    Raises:
        ConfigError: at its site the processed model that it was trained on has other activations than the raw one.
    """
    if names := _differences(dictionary):
        raise ConfigError(
            f"this dictionary was trained on a model that TransformerLens processed ({', '.join(names)}), whose "
            f"activations at {dictionary.cfg.metadata.get('hook_name', 'its site')} are not the raw model's. Give the "
            "model, load(folder, model=hm); or model='processed' if what you feed it comes from a processed model, "
            "such as hm.folded()"
        )


def check_bound(dictionary: Dictionary, hm: "HookManager") -> None:
    """Refuse to use a dictionary of a processed model on activations that it was not made for.

    Raises:
        ConfigError: it was made for another kind of model than the manager's, or for none and that is a raw one.
    """
    names, bound = _differences(dictionary), dictionary.space.bound
    here = "folded" if hm.is_folded else "raw"
    if names and bound != here and (bound or not hm.is_folded):
        was = f"made for a {bound} model" if bound else "not made for any model yet"
        raise ConfigError(
            f"this dictionary's model was processed ({', '.join(names)}), it was {was}, and {hm.name} is a {here} one; "
            "call interp.dictionaries.processed.for_model(dictionary, hm) with this manager"
        )


def _differences(dictionary: Dictionary) -> list[str]:
    """The flags that change what its sites hold."""
    metadata = dictionary.cfg.metadata
    flags = processing_of(metadata)
    names = ["hook_name", "hook_name_out"] if isinstance(dictionary, Transcoder) else ["hook_name"]
    if not flags:
        return []
    if any(metadata.get(name) is None for name in names):
        return list(flags)
    last = names[-1]
    changed = {f for name in names for f in _changing(Site(str(metadata[name])), flags, written=name == last)}
    return [flag for flag in flags if flag in changed]


def _named(dictionary: Dictionary, key: str, given: str | Site | None) -> Site:
    known = dictionary.cfg.metadata.get(key) if given is None else given
    if known is None:
        raise ConfigError(
            f"the dictionary's metadata have no {key}; give it as {'site' if key == 'hook_name' else 'target'}"
        )
    return Site(known)


def _changing(site: Site, flags: tuple[str, ...], *, written: bool) -> list[str]:
    """Which of the flags change what a site holds, or what becomes of a value that is written there.

    Raises:
        ConfigError: what they make of it cannot be said.
    """
    kind = site.kind
    if "refactor_factored_attn_matrices" in flags and kind in _REFACTORED:
        raise ConfigError(
            f"refactor_factored_attn_matrices gives each head another basis, so that {site.short} of the processed "
            "model cannot be had from the raw one's; run the dictionary in TransformerLens, on the model it was "
            "trained on"
        )
    mine: tuple[str, ...] = ()
    if kind in _STREAM:
        mine = ("center_writing_weights",)
    elif kind in _AFTER_NORM:
        mine = ("fold_ln",)
    elif kind in ("v", "z"):
        mine = ("fold_value_biases",)
    elif kind in _NORMALIZED:
        mine = ("fold_ln",) if written else ()
    elif kind not in _SAME and not kind.startswith(("ln1_post.", "ln2_post.")):
        raise ConfigError(
            f"what {', '.join(flags)} make of {site.short} is not known; expected a site that dictionaries read"
        )
    return [flag for flag in flags if flag in mine]


def _bind(space: "Space", hm: "HookManager", site: Site, flags: tuple[str, ...], *, written: bool) -> None:
    """Set the fixed part of a space to what the flags make of a site of this model."""
    changing = _changing(site, flags, written=written)
    if not hm.is_folded:
        space.fix(bound="raw", **_maps(hm, site, flags, changing))
        return
    if (extra := set(_changing(site, _FLAGS[:3], written=written)) - set(changing)) and _maps_anything(hm, site):
        raise ConfigError(
            f"{hm.name} has {', '.join(sorted(extra))} done to {site.short}, which the dictionary's model had not; "
            "give the manager that it was folded from"
        )
    space.fix(bound="folded")


def _maps_anything(hm: "HookManager", site: Site) -> bool:
    """Whether folding this model changes what a site holds: not the stream of one that has norms without centring."""
    return site.kind not in _STREAM or _centres(hm, site)


def _maps(hm: "HookManager", site: Site, flags: tuple[str, ...], changing: list[str]) -> dict[str, Any]:
    if "center_writing_weights" in changing:
        return {"centred": True} if _centres(hm, site) else {}
    if "fold_ln" in changing:
        return _ungained(hm, site)
    if "fold_value_biases" in changing:
        return _unbiased(hm, site, "fold_ln" in flags)
    return {}


def _centres(hm: "HookManager", site: Site) -> bool:
    """Whether TransformerLens centres what is written to this model's stream, and that is all that changes there."""
    m = hm.map
    layers = range(m.n_layers)
    norms = [(p, i) for p in ("ln1", "ln2") if m.has(p) for i in layers if m.module(hm.root, p, i) is not None]
    found = [hm.atlas.norm(*norm) for norm in [*norms, *([("ln_final", None)] if m.has("ln_final") else [])]]
    if not found or not all(norm.centred for norm in found):
        return False
    if m.has("embed_ln") and site.kind not in ("attn_out", "mlp_out"):
        raise ConfigError(
            f"{m.family} normalises its embeddings with a gain of its own, so centring leaves a part of {site.short} "
            "that cannot be told from the rest; run the dictionary in TransformerLens"
        )
    if m.has("ln1_post") or m.has("ln2_post"):
        raise ConfigError(f"{m.family} has norms on what its sublayers write; what centring makes of them is not known")
    return True


def _ungained(hm: "HookManager", site: Site) -> dict[str, Any]:
    """(x − bias) / gain, and the mean of what is written is lost."""
    part = _AFTER_NORM.get(site.kind) or site.kind.removesuffix(".normalized")
    if part == "ln2" and not hm.map.has("ln2"):
        part = "ln1"  # attention and MLP that share a norm
    norm = hm.weights.norm_weights(site.layer, part)
    centred = {"read_centred": norm.kind == "LN"}
    if site.kind in _NORMALIZED:
        return centred
    if bool((norm.gain == 0).any()):
        raise ConfigError(
            f"{part} has a gain of 0 in {int((norm.gain == 0).sum())} dimensions, so that {site.short} does not say "
            "what the processed model has there; use its normalized site"
        )
    scale = 1 / norm.gain.float()
    return {**centred, "scale": scale, "shift": -norm.bias.float() * scale}


def _unbiased(hm: "HookManager", site: Site, with_norm: bool) -> dict[str, Any]:
    """x − b_V, at z for each query head of its key/value head."""
    assert site.layer is not None
    attention = hm.map.module(hm.root, "attn", site.layer)
    if attention is not None and any("sink" in name for name, _ in attention.named_parameters()):
        raise ConfigError(
            f"attention of {hm.map.family} has sinks, so that rows of its pattern sum to less than 1 and the value "
            f"biases in {site.short} depend on the token"
        )
    block = hm.weights[site.layer]
    bias = block.b_V.double()
    if with_norm and hm.map.has("ln1"):
        bias = bias + torch.einsum(
            "m,hmd->hd", hm.weights.norm_weights(site.layer, "ln1").bias.double(), block.W_V.double()
        )
    if site.kind == "z":
        bias = bias.repeat_interleave(hm.n_heads // hm.n_kv_heads, dim=0)
    return {"shift": -bias.flatten().float()}
