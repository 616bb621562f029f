"""Running a prompt once and holding what is not linear in it; `frozen` says what is made of it."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from interp.core.errors import ConfigError, DataError
from interp.core.readout import Readout
from interp.core.site import Site
from interp.dictionaries.base import Transcoder
from interp.dictionaries.processed import check_bound
from interp.patching.features.frozen import FrozenModel, FrozenNorm, FrozenTranscoder
from interp.patching.features.frozen_parts import CLOSE, check_formula, frozen_attention, frozen_norm, wide

if TYPE_CHECKING:
    from interp.core.manager import HookManager
    from interp.core.run import Run

__all__ = ["freeze"]

_READS = ("mlp.in", "ln2.out", "ln2.normalized", "ln1.out", "ln1.normalized", "mlp_in", "resid_mid", "resid_pre")


def freeze(hm: "HookManager", transcoders: Mapping[int, Transcoder], tokens: Any) -> FrozenModel:
    """Run a prompt once and hold σ, patterns and active latents as they were.

    Sums over what is frozen are exact up to the model's own rounding: about 1e-6 in fp32; a bf16 model's stream is not
    the sum of what was written into it to better than about 1 %.

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
    values = {site.short: wide(run[site][0]) for site in run}
    attention, outs, streams, held = [], [], [], {}
    for layer in range(hm.n_layers):
        pre = values[f"{layer}.resid_pre"]
        attn = frozen_attention(hm, layer, values)
        mid = pre if hm.map.parallel else values.get(f"{layer}.resid_mid", pre)
        out = values.get(f"{layer}.mlp_out")
        after = pre + values.get(f"{layer}.attn_out", 0) + (0 if out is None else out)
        end = values.get(f"{layer + 1}.resid_pre", values[f"{hm.n_layers - 1}.resid_post"])
        check_formula(hm, layer, "the stream after it", after, end)
        attention.append(attn)
        outs.append(out)
        streams.append((pre, mid))
        if layer in transcoders:
            if out is None:
                raise ConfigError(f"transcoders has layer {layer}, and block {layer} has no MLP")
            held[layer] = _transcoder(hm, layer, transcoders[layer], places[layer], values, mid)
    resid = values[f"{hm.n_layers - 1}.resid_post"]
    final = None if hm.map.module(hm.root, "ln_final") is None else frozen_norm(hm, None, "ln_final", values)
    Readout.of(hm).check(run[f"{hm.n_layers - 1}.resid_post"], run.logits)
    assert run.tokens is not None
    return FrozenModel(
        hm, run.tokens[0], _start(values), attention, outs, held, final, resid, streams, wide(run.logits[0])
    )


def _start(values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Token and position embedding where they are what the stream begins with; else the stream's start as one."""
    start = values["0.resid_pre"]
    parts = {name: values[name] for name in ("embed", "pos_embed") if name in values}
    if parts and all(p.shape == start.shape for p in parts.values()):
        off = (sum(parts.values()) - start).abs().max()
        if bool(off <= 1e-5 * start.abs().max().clamp_min(1)):
            return parts
    return {"embed": start}


def _transcoder(
    hm: "HookManager", layer: int, t: Transcoder, place: Site, values: Mapping[str, Tensor], mid: Tensor
) -> FrozenTranscoder:
    x, norm = values[place.short], None
    kind, parallel = place.kind, hm.map.parallel
    part = "ln2" if f"{layer}.ln2.scale" in values else "ln1" if parallel and f"{layer}.ln1.scale" in values else None
    if kind not in ("mlp_in", "resid_mid", "resid_pre") and part is not None:
        norm = frozen_norm(hm, layer, part, values)
        if kind.endswith(".normalized"):
            norm = FrozenNorm(norm.scale, torch.ones_like(norm.gain), torch.zeros_like(norm.bias), norm.centred)
    check_formula(hm, layer, f"what goes into {place.short}", mid if norm is None else norm.linear(mid) + norm.bias, x)
    latents = wide(t.encode(x).detach())
    pre = wide(t.space.fixed(x) @ t.W_enc.to(x) + t.b_enc.to(x))
    pos, latent = (latents != 0).nonzero().T
    value = latents[pos, latent]
    gap = (value - pre[pos, latent]).abs().max() if len(value) else value.new_zeros(())
    if not bool(gap <= CLOSE * value.abs().amax().clamp_min(1) if len(value) else True):
        raise ConfigError(
            f"active latents of {type(t).__name__} (layer {layer}) are not their pre-activations (off by "
            f"{float(gap):.1e}), so they are no linear function of what it reads; use a ReLU, TopK, BatchTopK or "
            "JumpReLU transcoder"
        )
    made = t.reconstructed(t.encode(x), x).detach().to(x)
    return FrozenTranscoder(t, norm, pos, latent, value, values[f"{layer}.mlp_out"] - made, x)
