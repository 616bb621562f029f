"""Where each site of one model is: which module, which side of it, and how the tensors correspond."""

from dataclasses import dataclass
from typing import Any

from torch import nn

from interp.core.errors import ModelError, SiteError, nearest
from interp.core.modelmap import ModelMap
from interp.core.norms import NormSpec, identify_norm
from interp.core.site import KINDS, Site
from interp.core.views import Columns, Heads, NormHeads, Same, Scaled, View, fused_rows

__all__ = ["Atlas", "Point"]

_NORM_PARTS = ("scale", "normalized", "out")
_IN = {
    "resid_pre": "block",
    "attn_in": "ln1",
    "attn.in": "attn",
    "resid_mid": "ln2",
    "mlp_in": "ln2",
    "mlp.in": "mlp",
    "mlp_post": "mlp.out",
    "z": "attn.o",
    "unembed.in": "unembed",
}
_OUT = {
    "embed": "embed",
    "pos_embed": "pos_embed",
    "resid_post": "block",
    "router_logits": "mlp.router",
    "unembed.out": "unembed",
    "result": "attn.o",
}
_TAP = ("rot_q", "rot_k", "attn_scores", "pattern")


@dataclass(frozen=True, eq=False)
class Point:
    """Where one site is.

    Args:
        site: the site.
        path: module path; "" is the model itself.
        module: that module.
        side: "in" (its input), "out" (its output), "tap" (the attention kernel that it asks for) or "inside" (the
            softmax or attention that it calls itself).
        view: how the module's tensor and the site's correspond.
        part: "scale" or "normalized" for the inside of a norm; "result" for heads' outputs; "logits" for the model's.
        norm: the formula, where part needs it.
        in_place: an edit must reach the tensor itself, which the block goes on using as its residual stream.
        read_only: why the site cannot be edited, or "".
        n_heads, n_kv_heads: query and key/value heads, where they are needed.
    """

    site: Site
    path: str
    module: nn.Module
    side: str
    view: View
    part: str = ""
    norm: NormSpec | None = None
    in_place: bool = False
    read_only: str = ""
    n_heads: int = 0
    n_kv_heads: int = 0


class Atlas:
    """The sites of one model; points are made when first asked for and kept.

    Args:
        model: the Hugging Face model, or any module that `modelmap` fits; may be on the meta device.
        modelmap: its map.
    """

    def __init__(self, model: nn.Module, modelmap: ModelMap) -> None:
        self.model = model
        self.map = modelmap
        self._points: dict[tuple[str, int | None], Point] = {}
        self._norms: dict[str, NormSpec] = {}
        self._all: list[Site] | None = None

    def point(self, site: Site) -> Point:
        """Return where a site is.

        Raises:
            SiteError: this model has no such site; the message says why.
        """
        point = self._points.get(site.key)
        if point is None:
            point = self._points[site.key] = self._locate(Site(site.short))
        return point

    def sites(self) -> list[Site]:
        """Return every site of this model, in the order of the forward pass."""
        if self._all is None:
            layered = [Site(f"{i}.{k}") for i in range(self.map.n_layers) for k, kind in KINDS.items() if kind.in_block]
            whole = [Site(k) for k, kind in KINDS.items() if not kind.in_block]
            before = [s for s in whole if s.kind in ("embed", "pos_embed")]
            after = sorted((s for s in whole if s not in before), key=_final_order)
            self._all = [s for s in (*before, *layered, *after) if self.has(s)]
        return self._all

    def has(self, site: Site | str) -> bool:
        """Whether this model has a site."""
        try:
            self.point(Site(site))
        except (SiteError, ModelError):
            return False
        return True

    def expand(self, name: "Site | str") -> list[Site]:
        """Return the sites that a name or a glob stands for.

        Raises:
            SiteError: the name is unknown, the layer does not exist, or the glob matches nothing.
        """
        if not isinstance(name, str | Site):
            raise SiteError(f"a site is a name such as '6.resid_post', got {type(name).__name__}: {name!r}")
        if isinstance(name, str) and any(c in name for c in "*?["):
            found = Site.match(name, self.sites())
            if not found:
                raise SiteError(self._no_match(name))
            return found
        site = Site(name)
        self.point(site)
        return [site]

    def _no_match(self, pattern: str) -> str:
        kind = pattern.rpartition("*.")[2]
        if kind in KINDS:
            layer = 0 if KINDS[kind].in_block else None
            return f"{pattern!r} matches nothing: {self._why(kind, layer)}"
        hint = nearest(kind, KINDS) or "hm.sites() lists them all"
        return f"{pattern!r} matches no site of this {self.map.family} model; {hint}"

    def norm(self, part: str, layer: int | None = None) -> NormSpec:
        """Return the formula of a norm, such as part "ln1" of layer 3; checked against the module.

        Raises:
            ModelError: the module follows no known formula.
        """
        path = self.map.path(part, layer)
        if path not in self._norms:
            width = self.map.d_head if part.endswith(("q_norm", "k_norm")) else self.map.d_model
            self._norms[path] = identify_norm(self.model.get_submodule(path), path, width)
        return self._norms[path]

    # -- finding ------------------------------------------------------------------------------------------------

    def _why(self, kind: str, layer: int | None) -> str:
        reasons, family = self.map.reasons, self.map.family
        why = reasons.get(kind) or reasons.get(kind.split(".")[0])
        near = "" if layer is None else f" in block {layer}"
        return (
            f"{family} has no {kind}{near}: {why}"
            if why
            else f"{family} has no {kind}{near}: its blocks have no such part"
        )

    def _absent(self, site: Site) -> SiteError:
        return SiteError(f"site {site.short!r} ({site.name}): {self._why(site.kind, site.layer)}")

    def _module(self, part: str, site: Site) -> tuple[str, nn.Module]:
        module = self.map.module(self.model, part, site.layer)
        if module is None:
            raise self._absent(site)
        return self.map.path(part, site.layer), module

    def _locate(self, site: Site) -> Point:
        kind, layer = site.kind, site.layer
        if layer is not None and layer >= self.map.n_layers:
            raise SiteError(
                f"site {site.short!r}: this model has {self.map.n_layers} layers (0 to {self.map.n_layers - 1})"
            )
        if kind in self.map.reasons or (kind.split(".")[0] in self.map.reasons and kind not in _IN):
            raise self._absent(site)
        if kind == "logits":
            return Point(site, "", self.model, "out", Same(), part="logits")
        if kind.endswith(_NORM_PARTS) and kind.split(".")[0] in _NORM_NAMES:
            return self._norm_point(site)
        if kind in _TAP:
            return self._tap_point(site)
        if kind in ("q", "k", "v"):
            return self._projection(site)
        if kind in ("attn_out", "mlp_out"):
            return self._added(site)
        if kind in ("mlp_pre", "mlp_pre_linear"):
            return self._pre_activation(site)
        return self._plain(site)

    def _plain(self, site: Site) -> Point:
        m = self.map
        side = "in" if site.kind in _IN else "out"
        part = (_IN if side == "in" else _OUT)[site.kind]
        if site.kind == "resid_mid" and not m.parallel and "ln2" not in m.paths:
            part = "mlp"  # no norm before the MLP: the stream itself goes in
        if site.kind in ("attn_in", "mlp_in") and part not in m.paths and f"{part}_post" in m.paths:
            part = "attn" if site.kind == "attn_in" else "mlp"
        if site.kind == "embed" and "embed_ln" in m.paths:
            part = "embed_ln"  # BLOOM normalises what it embeds
        if site.kind == "mlp_post" and "mlp.out" not in m.paths:
            raise self._absent(site)
        path, module = self._module(part, site)
        heads = site.kind == "z"
        return Point(
            site,
            path,
            module,
            side,
            Heads(m.n_heads, m.d_head) if heads else Same(),
            part="result" if site.kind == "result" else "",
            in_place=site.kind == "resid_mid",
            n_heads=m.n_heads,
            read_only="its choice of experts is made in the same module" if site.kind == "router_logits" else "",
        )

    def _norm_point(self, site: Site) -> Point:
        name, _, what = site.kind.partition(".")
        part = f"attn.{name}" if name in ("q_norm", "k_norm") else name
        path, module = self._module(part, site)
        heads = name in ("q_norm", "k_norm")
        n = self.map.n_heads if name == "q_norm" else self.map.n_kv_heads
        view: View = NormHeads(n, self.map.qk_norm_heads_first, cut=what != "scale") if heads else Same()
        if what == "out":
            return Point(site, path, module, "out", view)
        return Point(site, path, module, "out", view, part=what, norm=self.norm(part, site.layer))

    def _tap_point(self, site: Site) -> Point:
        path, module = self._module("attn", site)
        side = "inside" if self.map.attention == "inside" else "tap"
        return Point(site, path, module, side, Same(), n_kv_heads=self.map.n_kv_heads)

    def _projection(self, site: Site) -> Point:
        m = self.map
        n = m.n_heads if site.kind == "q" else m.n_kv_heads
        if m.qkv_layout is None:
            path, module = self._module(f"attn.{site.kind}", site)
            return Point(site, path, module, "out", Heads(n, m.d_head))
        path, module = self._module("attn.qkv", site)
        rows = fused_rows(m.qkv_layout, m.n_heads, m.n_kv_heads, m.d_head)["qkv".index(site.kind)]
        return Point(site, path, module, "out", Columns(rows, n, m.d_head))

    def _added(self, site: Site) -> Point:
        part = self.map.attn_out if site.kind == "attn_out" else self.map.mlp_out
        path, module = self._module(part, site)
        factor = self.map.residual_multiplier
        return Point(site, path, module, "out", Same() if factor == 1.0 else Scaled(factor))

    def _pre_activation(self, site: Site) -> Point:
        m = self.map
        if m.has("mlp.gate_up") and m.d_mlp is not None:
            import torch

            path, module = self._module("mlp.gate_up", site)
            first = 0 if site.kind == "mlp_pre" else m.d_mlp
            return Point(site, path, module, "out", Columns(torch.arange(first, first + m.d_mlp), 0, 0))
        gated = m.has("mlp.gate")
        if site.kind == "mlp_pre_linear" and not gated:
            raise self._absent(site)
        path, module = self._module("mlp.gate" if gated and site.kind == "mlp_pre" else "mlp.in", site)
        return Point(site, path, module, "out", Same())

    def shape(self, site: Site) -> tuple[Any, ...]:
        """Return the site's shape, with names for batch and positions, such as ("batch", "pos", 12, 64)."""
        m = self.map
        sizes: dict[str, int | None] = {
            "d_model": m.d_model,
            "n_heads": m.n_heads,
            "n_kv_heads": m.n_kv_heads,
            "d_head": m.d_head,
        }
        sizes |= {"d_mlp": m.d_mlp, "d_vocab": m.d_vocab, "one": 1}
        return tuple(sizes.get(axis) or axis for axis in site.axes)


_NORM_NAMES = ("ln1", "ln1_post", "ln2", "ln2_post", "ln_final", "q_norm", "k_norm")


def _final_order(site: Site) -> int:
    order = ("ln_final.scale", "ln_final.normalized", "ln_final.out", "unembed.in", "unembed.out", "logits")
    return order.index(site.kind)
