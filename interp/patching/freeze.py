"""Running a prompt once and holding what is not linear in it; see `interp.patching.frozen` for what is made of it."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from interp.core.errors import ConfigError, DataError, ModelError
from interp.core.readout import Readout
from interp.core.site import Site
from interp.dictionaries.base import Transcoder
from interp.dictionaries.processed import check_bound
from interp.patching.frozen import FrozenAttention, FrozenModel, FrozenNorm, FrozenTranscoder

if TYPE_CHECKING:
    from interp.core.manager import HookManager
    from interp.core.run import Run

__all__ = ["freeze"]

_READS = ("mlp.in", "ln2.out", "ln2.normalized", "ln1.out", "ln1.normalized", "mlp_in", "resid_mid", "resid_pre")
_OFF = 1e-3  # how far a layer's formula may be off what the model computed, relative to the largest value


def freeze(hm: "HookManager", transcoders: Mapping[int, Transcoder], tokens: Any) -> FrozenModel:
    """Run a prompt once and hold σ, patterns and active latents as they were.

    Memory: patterns, n_layers · n_heads · pos² numbers; streams, 3 · n_layers · pos · d_model; logits, pos · d_vocab.

    Args:
        hm: the model.
        transcoders: layer → transcoder of that layer's MLP; layers may be missing.
        tokens: one prompt: whatever `hm.run` takes, of one row. Pads are taken out.

    Raises:
        DataError: several prompts.
        ConfigError: a transcoder that reads or writes elsewhere, or whose latents are not its pre-activations.
        ModelError: a block does something that is not written out here; it is named.
    """
    given = hm.to_tokens(tokens)
    if len(given.ids) != 1:
        raise DataError(f"a frozen model is of one prompt, got {len(given.ids)}; freeze them one at a time")
    ids = given.ids[0][given.mask[0]]
    places = {layer: _place(hm, layer, t) for layer, t in transcoders.items()}
    with torch.no_grad():
        run = hm.run(ids[None], read=[*_needed(hm), *places.values()], logits="all")
        return _assembled(hm, transcoders, places, run)


def _place(hm: "HookManager", layer: int, t: Transcoder) -> Site:
    """What a transcoder reads, after every check of it."""
    if not isinstance(t, Transcoder):
        raise ConfigError(f"transcoders[{layer}] is a {type(t).__name__}; expected a transcoder of the MLP of a layer")
    if layer not in range(hm.n_layers):
        raise ConfigError(f"transcoders has layer {layer!r}; this model has layers 0 to {hm.n_layers - 1}")
    check_bound(t, hm)
    reads, gives = (t.cfg.metadata.get(key) for key in ("hook_name", "hook_name_out"))
    if reads is None or gives is None:
        raise ConfigError(
            f"the transcoder of layer {layer} does not say what it reads and writes; set cfg.metadata['hook_name'] "
            f"and ['hook_name_out'], such as 'blocks.{layer}.mlp.hook_in' and 'blocks.{layer}.hook_mlp_out'"
        )
    place, target = Site(reads), Site(gives)
    if place.layer != layer or place.kind not in _READS or (target.layer, target.kind) != (layer, "mlp_out"):
        raise ConfigError(
            f"the transcoder of layer {layer} maps {place.short} to {target.short}; expected one of "
            f"{', '.join(_READS[:3])} of that layer, to {layer}.mlp_out"
        )
    if t.space.normalize != "none":
        raise ConfigError(
            f"the transcoder of layer {layer} normalises each token it reads ({t.space.normalize}), which is not "
            "linear; use one that was trained without"
        )
    if (t.cfg.d_in, t.d_out) != (hm.d_model, hm.d_model):
        raise ConfigError(
            f"the transcoder of layer {layer} maps {t.cfg.d_in} to {t.d_out} dimensions; the model has "
            f"d_model {hm.d_model}"
        )
    hm.atlas.point(place)
    return place


def _needed(hm: "HookManager") -> list[Site]:
    n = hm.n_layers
    kinds = ("resid_pre", "resid_mid", "pattern", "attn_out", "mlp_out", "ln1.scale", "ln1_post.scale", "ln2.scale")
    names = [f"{layer}.{kind}" for layer in range(n) for kind in kinds]
    names += [f"{n - 1}.resid_post", "embed", "pos_embed", "ln_final.scale"]
    return [Site(name) for name in names if hm.atlas.has(name)]


def _assembled(
    hm: "HookManager", transcoders: Mapping[int, Transcoder], places: Mapping[int, Site], run: "Run"
) -> FrozenModel:
    values = {site.short: _wide(run[site][0]) for site in run}
    attention, outs, streams, held = [], [], [], {}
    for layer in range(hm.n_layers):
        pre = values[f"{layer}.resid_pre"]
        attn = _attention(hm, layer, values)
        mid = pre if hm.map.parallel else values.get(f"{layer}.resid_mid", pre)
        out = values.get(f"{layer}.mlp_out")
        after = pre + values.get(f"{layer}.attn_out", 0) + (0 if out is None else out)
        end = values.get(f"{layer + 1}.resid_pre", values[f"{hm.n_layers - 1}.resid_post"])
        _check(hm, layer, "the stream after it", after, end)
        attention.append(attn)
        outs.append(out)
        streams.append((pre, mid))
        if layer in transcoders:
            if out is None:
                raise ConfigError(f"transcoders has layer {layer}, and block {layer} has no MLP")
            held[layer] = _transcoder(hm, layer, transcoders[layer], places[layer], values, mid)
    resid = values[f"{hm.n_layers - 1}.resid_post"]
    final = None if hm.map.module(hm.root, "ln_final") is None else _norm(hm, None, "ln_final", values)
    Readout.of(hm).check(run[f"{hm.n_layers - 1}.resid_post"], run.logits)
    assert run.tokens is not None
    return FrozenModel(
        hm, run.tokens[0], _start(values), attention, outs, held, final, resid, streams, _wide(run.logits[0])
    )


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _start(values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Token and position embedding where they are what the stream begins with; else the stream's start as one."""
    start = values["0.resid_pre"]
    parts = {name: values[name] for name in ("embed", "pos_embed") if name in values}
    if parts and all(p.shape == start.shape for p in parts.values()):
        off = (sum(parts.values()) - start).abs().max()
        if bool(off <= 1e-5 * start.abs().max().clamp_min(1)):
            return parts
    return {"embed": start}


def _norm(hm: "HookManager", layer: int | None, part: str, values: Mapping[str, Tensor]) -> FrozenNorm:
    weights, name = hm.weights.norm_weights(layer, part), part if layer is None else f"{layer}.{part}"
    scale = values[f"{name}.scale"]
    return FrozenNorm(scale, weights.gain.to(scale), weights.bias.to(scale), weights.kind == "LN")


def _attention(hm: "HookManager", layer: int, values: Mapping[str, Tensor]) -> FrozenAttention | None:
    out = values.get(f"{layer}.attn_out")
    if out is None:
        return None
    if f"{layer}.pattern" not in values:
        raise ModelError(f"block {layer} of {hm.map.family} has attention without a pattern, which cannot be frozen")
    w, pattern = hm.weights[layer], values[f"{layer}.pattern"]
    norm = _norm(hm, layer, "ln1", values) if f"{layer}.ln1.scale" in values else None
    post = _norm(hm, layer, "ln1_post", values) if hm.map.attn_out == "ln1_post" else None
    made = FrozenAttention(
        norm, post, pattern, *(part.to(pattern) for part in (w.W_V, w.b_V, w.W_O, w.b_O)), hm.map.residual_multiplier
    )
    _check(hm, layer, "attention", made.forward(values[f"{layer}.resid_pre"]), out)
    return made


def _transcoder(
    hm: "HookManager", layer: int, t: Transcoder, place: Site, values: Mapping[str, Tensor], mid: Tensor
) -> FrozenTranscoder:
    x, norm = values[place.short], None
    kind, parallel = place.kind, hm.map.parallel
    part = "ln2" if f"{layer}.ln2.scale" in values else "ln1" if parallel and f"{layer}.ln1.scale" in values else None
    if kind not in ("mlp_in", "resid_mid", "resid_pre") and part is not None:
        norm = _norm(hm, layer, part, values)
        if kind.endswith(".normalized"):
            norm = FrozenNorm(norm.scale, torch.ones_like(norm.gain), torch.zeros_like(norm.bias), norm.centred)
    _check(hm, layer, f"what goes into {place.short}", mid if norm is None else norm.linear(mid) + norm.bias, x)
    latents = _wide(t.encode(x).detach())
    pre = _wide(t.space.fixed(x) @ t.W_enc.to(x) + t.b_enc.to(x))
    pos, latent = (latents != 0).nonzero().T
    value = latents[pos, latent]
    gap = (value - pre[pos, latent]).abs().max() if len(value) else value.new_zeros(())
    if not bool(gap <= _OFF * value.abs().amax().clamp_min(1) if len(value) else True):
        raise ConfigError(
            f"active latents of {type(t).__name__} (layer {layer}) are not their pre-activations (off by "
            f"{float(gap):.1e}), so they are no linear function of what it reads; use a ReLU, TopK, BatchTopK or "
            "JumpReLU transcoder"
        )
    made = t.reconstructed(t.encode(x), x).detach().to(x)
    return FrozenTranscoder(t, norm, pos, latent, value, values[f"{layer}.mlp_out"] - made, x)


def _check(hm: "HookManager", layer: int, what: str, ours: Tensor, theirs: Tensor) -> None:
    off, size = float((ours - theirs).abs().max()), max(1.0, float(theirs.abs().max()))
    wide = hm.dtype in (torch.float32, torch.float64)
    if not off <= (_OFF if wide else 5e-2) * size:
        raise ModelError(
            f"{what} of block {layer} of {hm.map.family} is not what frozen norms and patterns give (off by "
            f"{off:.1e}): something else stands in between, so that attributions would not add up; this family is not "
            "supported"
        )
