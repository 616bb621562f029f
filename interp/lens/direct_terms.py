"""What a run must read for each way of taking its final stream apart, and the terms of that way.

Every term is a number per row: a part of the stream times the direction that leads from it to the metric. Parts are
never written out where they are many (heads, neurons, latents, source tokens); directions are carried back instead.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from interp.core.decompose import embedding_terms
from interp.core.direct import DirectPath, before_output, wide
from interp.core.errors import ConfigError, SiteError
from interp.core.manager import HookManager
from interp.core.run import Run
from interp.core.site import Site
from interp.core.where import Where

if TYPE_CHECKING:
    from interp.dictionaries.base import Dictionary

__all__ = ["Slice", "Terms", "add_terms", "reads_for", "sites_of_dictionary"]

_STREAMS = ("resid_pre", "resid_mid", "resid_post")
# An attention's share that no token accounts for is a term of its own from this share of the whole on.
_OFF_PATTERN = 1e-5


@dataclass
class Terms:
    """Terms while they are gathered: what each is, and its values [row]."""

    labels: list[str] = field(default_factory=list)
    kinds: list[str] = field(default_factory=list)
    layers: list[int] = field(default_factory=list)
    heads: list[int] = field(default_factory=list)
    sources: list[int] = field(default_factory=list)
    values: list[Tensor] = field(default_factory=list)

    def add(self, label: str, kind: str, value: Float[Tensor, " row"], *, layer: int = -1, head: int = -1) -> None:
        """Take one term in."""
        self.add_all([label], kind, value[None], layer=layer, heads=[head])

    def add_all(
        self,
        labels: Sequence[str],
        kind: str,
        values: Float[Tensor, "term row"],
        *,
        layer: int = -1,
        heads: Sequence[int] | None = None,
        sources: Sequence[int] | None = None,
    ) -> None:
        """Take several terms of one kind and layer in."""
        n = len(labels)
        self.labels += labels
        self.kinds += [kind] * n
        self.layers += [layer] * n
        self.heads += heads or [-1] * n
        self.sources += sources or [-1] * n
        self.values.append(values)

    def extend(self, other: "Terms") -> None:
        """Take in all of others."""
        for name in ("labels", "kinds", "layers", "heads", "sources", "values"):
            getattr(self, name).extend(getattr(other, name))


@dataclass(frozen=True, eq=False)
class Slice:
    """A run's reads at one position of every row.

    Args:
        run: the run.
        where: that position.
    """

    run: Run
    where: Where

    @property
    def hm(self) -> HookManager:
        """The model."""
        return self.run.hm

    def __getitem__(self, name: str) -> Float[Tensor, "row *features"]:
        """Return a site's values there; a pattern's are [row n_heads src]."""
        return wide(self.run[Site(name, where=self.where)])

    def scale(self, layer: int, part: str) -> Float[Tensor, "row 1"] | None:
        """Return σ of the norm on a sublayer's output, None where there is none."""
        norm = "ln1_post" if part == "attn" else "ln2_post"
        there = (self.hm.map.attn_out if part == "attn" else self.hm.map.mlp_out) == norm
        return self[f"{layer}.{norm}.scale"] if there else None


def reads_for(hm: HookManager, by: str, where: Where, dictionary: "Dictionary | None" = None) -> list[Site]:
    """Return what a run must read: all at one position of each row, but for the values that tokens are read by.

    Args:
        hm: the model.
        by: "component", "head", "neuron", "latent" or "token".
        where: the position.
        dictionary: for "latent".
    """
    heads, neurons = by in ("head", "token"), by == "neuron"
    names = ["0.resid_pre", *(name for name in ("embed", "pos_embed") if hm.atlas.has(Site(name)))]
    for layer in range(hm.n_layers):
        names += [f"{layer}.z"] if heads else [f"{layer}.attn_out"]
        names += [f"{layer}.pattern"] if by == "token" else []
        names += [f"{layer}.ln1_post.scale"] if heads and hm.map.attn_out == "ln1_post" else []
        if hm.atlas.has(Site(f"{layer}.mlp_out")):
            names += [f"{layer}.mlp_post"] if neurons else [f"{layer}.mlp_out"]
            names += [f"{layer}.ln2_post.scale"] if neurons and hm.map.mlp_out == "ln2_post" else []
    names += [f"{hm.n_layers - 1}.resid_post"]
    if dictionary is not None:
        names += [site.short for site in sites_of_dictionary(dictionary)]
    whole = [Site(f"{layer}.v") for layer in range(hm.n_layers)] if by == "token" else []
    return [*(Site(name, where=where) for name in dict.fromkeys(names)), *whole]


def add_terms(
    terms: Terms, part: Slice, path: DirectPath, by: str, *, top_k: int, dictionary: "Dictionary | None", per_head: bool
) -> None:
    """Take in the terms of the stream that leaves the last block, taken apart in one way.

    Args:
        terms: where to.
        part: the run's reads.
        path: from the final stream to the metric.
        by: as for `reads_for`.
        top_k: neurons or latents with a term of their own.
        dictionary: for "latent".
        per_head: for "token", each head apart.
    """
    hm = part.hm
    explained = set() if dictionary is None else _add_latents(terms, part, path, dictionary, top_k)
    neurons = _largest_neurons(part, path, top_k) if by == "neuron" else {}
    if "embed" not in explained:
        for label, vector in embedding_terms(part.run):
            terms.add(label, "embed", path.of_vectors(vector.reshape(path.direction.shape)))
    for layer in range(hm.n_layers):
        if by in ("head", "token"):
            (_add_heads if by == "head" else _add_tokens)(terms, part, path, layer, per_head)
        elif f"{layer}.attn_out" not in explained:
            terms.add(f"{layer}_attn_out", "attn", path.of_vectors(part[f"{layer}.attn_out"]), layer=layer)
        if layer in neurons:
            terms.extend(neurons[layer])
        elif hm.atlas.has(Site(f"{layer}.mlp_out")) and f"{layer}.mlp_out" not in explained:
            terms.add(f"{layer}_mlp_out", "mlp", path.of_vectors(part[f"{layer}.mlp_out"]), layer=layer)


def _output_of_heads(
    part: Slice, path: DirectPath, layer: int
) -> tuple[Float[Tensor, "row n_heads d_head"], Float[Tensor, " row"]]:
    """The direction at the heads' outputs z, and what the biases behind them add."""
    weights = part.hm.weights[layer]
    back, constant = before_output(part.hm, layer, "attn", path.direction, part.scale(layer, "attn"))
    at_z = torch.einsum("rm,hdm->rhd", back, wide(weights.W_O).to(back))
    return at_z, constant + back @ wide(weights.b_O).to(back)


def _add_heads(terms: Terms, part: Slice, path: DirectPath, layer: int, _: bool) -> None:
    at_z, bias = _output_of_heads(part, path, layer)
    values = (part[f"{layer}.z"].to(at_z) * at_z).sum(-1).T
    heads = range(len(values))
    terms.add_all([f"L{layer}H{head}" for head in heads], "head", values, layer=layer, heads=heads)
    _add_bias(terms, f"{layer}_attn_bias", bias, layer)


def _add_tokens(terms: Terms, part: Slice, path: DirectPath, layer: int, per_head: bool) -> None:
    """A head's output is its pattern times the values, so each source token's share is a product too."""
    at_z, bias = _output_of_heads(part, path, layer)
    pattern, v = part[f"{layer}.pattern"].to(at_z), wide(part.run[f"{layer}.v"]).to(at_z)
    grouped = at_z.unflatten(1, (v.shape[2], -1))
    shares = torch.einsum("rskd,rkgd->rkgs", v, grouped).flatten(1, 2) * pattern
    whole = (part[f"{layer}.z"].to(at_z) * at_z).sum(-1)
    assert part.run.mask is not None
    shares = _in_own_order(shares, part.run.mask.to(shares.device))
    width = range(shares.shape[-1])
    if per_head:
        for head in range(shares.shape[1]):
            labels, owner = [f"L{layer}H{head}←{s}" for s in width], [head] * len(width)
            terms.add_all(labels, "token", shares[:, head].T, layer=layer, heads=owner, sources=width)
    else:
        terms.add_all([f"L{layer}←{s}" for s in width], "token", shares.sum(1).T, layer=layer, sources=width)
    beyond = (whole - shares.sum(-1)).sum(1)
    if bool((beyond.abs() > _OFF_PATTERN * whole.abs().sum(1).clamp(min=1.0)).any()):
        terms.add(f"{layer}_attn_off_pattern", "sink", beyond, layer=layer)
    _add_bias(terms, f"{layer}_attn_bias", bias, layer)


def _in_own_order(shares: Float[Tensor, "row head src"], mask: Bool[Tensor, "row src"]) -> Tensor:
    """Columns counted in each row's own tokens; pads, which nothing attends to, come last."""
    order = (~mask).long().argsort(dim=1, stable=True)
    return shares.gather(2, order[:, None].expand_as(shares))


def _largest_neurons(part: Slice, path: DirectPath, top_k: int) -> dict[int, Terms]:
    """Each layer's terms: those of its neurons that are among the largest of the model, and all its others together."""
    hm = part.hm
    found: dict[int, tuple[Tensor, Tensor, Tensor, Tensor]] = {}
    for layer in (n for n in range(hm.n_layers) if hm.atlas.has(Site(f"{n}.mlp_out"))):
        weights = hm.weights[layer]
        back, constant = before_output(hm, layer, "mlp", path.direction, part.scale(layer, "mlp"))
        shares = part[f"{layer}.mlp_post"].reshape(len(back), -1).to(back) * (back @ wide(weights.W_out).to(back).T)
        units, size = _largest(shares, top_k)
        bias = constant + back @ wide(weights.b_out).to(back)
        found[layer] = units, size, shares.index_select(1, units).T, torch.stack([shares.sum(1), bias])
    if not found:
        return {}
    sizes = torch.cat([size for _, size, _, _ in found.values()])
    chosen = torch.zeros(len(sizes), dtype=torch.bool)
    chosen[sizes.topk(min(top_k, len(sizes))).indices.cpu()] = True
    made: dict[int, Terms] = {}
    for layer, own in zip(found, chosen.split([len(size) for _, size, _, _ in found.values()]), strict=True):
        (units, _, values, (total, bias)), held = found[layer], Terms()
        kept = own.nonzero()[:, 0].to(units.device)
        values = values.index_select(0, kept)
        names = [f"L{layer}N{unit}" for unit in units[kept].tolist()]
        held.add_all(names, "neuron", values, layer=layer)
        held.add(f"{layer}_mlp_rest", "rest", total - values.sum(0), layer=layer)
        _add_bias(held, f"{layer}_mlp_bias", bias, layer)
        made[layer] = held
    return made


def _largest(shares: Float[Tensor, "row unit"], top_k: int) -> tuple[Tensor, Tensor]:
    """The units whose mean size is largest, in order, and that size."""
    sizes = shares.abs().mean(0)
    units = sizes.topk(min(top_k, len(sizes))).indices.sort().values
    return units, sizes[units]


def _add_bias(terms: Terms, label: str, bias: Float[Tensor, " row"], layer: int) -> None:
    if bool(bias.any()):
        terms.add(label, "bias", bias, layer=layer)


def sites_of_dictionary(dictionary: "Dictionary") -> tuple[Site, Site]:
    """Return the site that a dictionary reads and the part of the stream that it explains.

    Raises:
        SiteError: its metadata names no site, or one that is neither the stream nor what a sublayer adds to it.
        ConfigError: it is of a processed model, or normalises each activation, so it is no sum over latents here.
    """
    about = dictionary.cfg.metadata
    read = Site(str(about.get("hook_name")))
    given = Site(str(about.get("hook_name_out") or read.name))
    if given.kind not in (*_STREAMS, "attn_out", "mlp_out") or given.layer is None:
        raise SiteError(
            f"a dictionary of {given.short} is no part of the stream; expected one of resid_pre, resid_mid, "
            "resid_post, attn_out or mlp_out"
        )
    for space in (dictionary.space, dictionary.target_space):
        if space.needs_context or space.fixed_names:
            raise ConfigError(
                f"this dictionary sees activations {space.extra_repr()}, so what it gives is no sum of its latents in "
                "the raw stream; use one of raw activations"
            )
    return read, given


def _add_latents(terms: Terms, part: Slice, path: DirectPath, dictionary: "Dictionary", top_k: int) -> set[str]:
    """Take in the latents' terms; returns the components whose sum they stand for."""
    read, given = sites_of_dictionary(dictionary)
    layer, target = given.layer or 0, part[given.short]
    with torch.no_grad():
        x = part[read.short].to(dictionary.W_dec)
        latents = dictionary.encode(x)
        rows, bias = wide(dictionary.W_dec), wide(dictionary.decode_own(torch.zeros_like(latents[:1])))[0]
        made = wide(latents) @ rows + bias
        skip = wide(dictionary.reconstructed(latents, x)).reshape(made.shape) - made
    shares = wide(latents).to(path.direction) * (path.direction @ rows.to(path.direction).T)
    units, _ = _largest(shares, top_k)
    values = shares.index_select(1, units).T
    name = f"{layer}_{given.kind}"
    terms.add_all([f"{name} latent {unit}" for unit in units.tolist()], "latent", values, layer=layer)
    terms.add(f"{name} other latents", "rest", shares.sum(1) - values.sum(0), layer=layer)
    terms.add(f"{name} b_dec", "bias", path.of_vectors(bias.expand_as(target)), layer=layer)
    if dictionary.has_skip:
        terms.add(f"{name} skip", "skip", path.of_vectors(skip), layer=layer)
        made = made + skip
    terms.add(f"{name} error", "error", path.of_vectors(target - made.to(target)), layer=layer)
    if given.kind in ("attn_out", "mlp_out"):
        return {given.short}
    before = [f"{n}.{part}" for n in range(layer) for part in ("attn_out", "mlp_out")]
    own = {"resid_pre": [], "resid_mid": ["attn_out"], "resid_post": ["attn_out", "mlp_out"]}[given.kind]
    return {"embed", *before, *(f"{layer}.{part}" for part in own)}
