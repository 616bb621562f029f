"""Named places in a transformer: `Site` parses, prints and knows its axes.

Names are TransformerLens' names. Where its two classes differ, the definition in `KINDS` holds; `hm.sites()` prints it.
"""

import fnmatch
import functools
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from interp.core.errors import SiteError, nearest
from interp.core.where import Where

__all__ = ["KINDS", "Kind", "Site"]


@dataclass(frozen=True)
class Kind:
    """What one kind of site is: its TransformerLens name, axes and definition."""

    hook: str
    axes: tuple[str, ...]
    definition: str
    aliases: tuple[str, ...] = ()

    @property
    def in_block(self) -> bool:
        """Whether there is one such site per block."""
        return self.hook.startswith("blocks.{layer}.")


_STREAM = ("batch", "pos", "d_model")
_QUERY = ("batch", "pos", "n_heads", "d_head")
_KEYED = ("batch", "pos", "n_kv_heads", "d_head")
_SQUARE = ("batch", "n_heads", "pos", "src")
_SCALE = ("batch", "pos", "one")
_NEURONS = ("batch", "pos", "d_mlp")

_MODEL_KINDS: dict[str, Kind] = {
    "embed": Kind(
        "hook_embed", _STREAM, "output of the token embedding (of its norm, where it has one)", ("embed.hook_out",)
    ),
    "pos_embed": Kind("hook_pos_embed", _STREAM, "output of the learned position embedding", ("pos_embed.hook_out",)),
    "logits": Kind("logits", ("batch", "pos", "d_vocab"), "the model's own logits, after soft-cap and scaling"),
    "unembed.in": Kind("unembed.hook_in", _STREAM, "input of the unembedding: the final norm's output"),
    "unembed.out": Kind(
        "unembed.hook_out",
        ("batch", "pos", "d_vocab"),
        "output of the unembedding, before soft-cap and scaling",
        ("hook_unembed",),
    ),
}

_Row = tuple[str, tuple[str, ...], str, tuple[str, ...]]
_BLOCK_KINDS: dict[str, _Row] = {
    "resid_pre": ("hook_resid_pre", _STREAM, "residual stream entering the block", ("hook_in",)),
    "attn_in": (
        "hook_attn_in",
        _STREAM,
        "what attention's branch reads, before its norm; edits leave the stream alone",
        (),
    ),
    "attn.in": ("attn.hook_in", _STREAM, "input of the attention module, after its norm", ()),
    "q": ("attn.hook_q", _QUERY, "queries, before q-norm and rotary", ("attn.q.hook_out",)),
    "k": (
        "attn.hook_k",
        _KEYED,
        "keys, before k-norm and rotary; an edit persists in the KV cache",
        ("attn.k.hook_out",),
    ),
    "v": ("attn.hook_v", _KEYED, "values; an edit persists in the KV cache", ("attn.v.hook_out",)),
    "rot_q": ("attn.hook_rot_q", _QUERY, "queries as attention uses them: after q-norm and rotary", ()),
    "rot_k": (
        "attn.hook_rot_k",
        _KEYED,
        "keys as attention uses them: after k-norm and rotary, cached ones included",
        (),
    ),
    "attn_scores": (
        "attn.hook_attn_scores",
        _SQUARE,
        "attention scores after scale, soft-cap and mask",
        ("scores",),
    ),
    "pattern": ("attn.hook_pattern", _SQUARE, "attention weights: softmax of attn_scores", ()),
    "z": ("attn.hook_z", _QUERY, "input of the output projection, per head", ("attn.o.hook_in",)),
    "result": (
        "attn.hook_result",
        ("batch", "pos", "n_heads", "d_model"),
        "each head's own output z @ W_O, without b_O; computed when read",
        (),
    ),
    "attn_out": ("hook_attn_out", _STREAM, "what attention adds to the residual stream", ()),
    "resid_mid": ("hook_resid_mid", _STREAM, "residual stream between attention and MLP", ("mid",)),
    "mlp_in": (
        "hook_mlp_in",
        _STREAM,
        "what the MLP's branch reads, before its norm; edits leave the stream alone",
        (),
    ),
    "mlp.in": ("mlp.hook_in", _STREAM, "input of the MLP module, after its norm", ()),
    "router_logits": (
        "mlp.hook_router_logits",
        ("batch", "pos", "n_experts"),
        "a mixture of experts' router logits (read only)",
        ("mlp.gate.hook_logits",),
    ),
    "mlp_pre": (
        "mlp.hook_pre",
        _NEURONS,
        "MLP pre-activation (the gate's, where the MLP is gated)",
        ("pre", "mlp.pre"),
    ),
    "mlp_pre_linear": (
        "mlp.hook_pre_linear",
        _NEURONS,
        "the linear half of a gated MLP, before it is multiplied in",
        ("pre_linear", "mlp.pre_linear"),
    ),
    "mlp_post": (
        "mlp.hook_post",
        _NEURONS,
        "input of the MLP's output projection: the neurons",
        ("post", "mlp.post", "mlp.out.hook_in"),
    ),
    "mlp_out": ("hook_mlp_out", _STREAM, "what the MLP adds to the residual stream", ()),
    "resid_post": ("hook_resid_post", _STREAM, "residual stream leaving the block", ("hook_out",)),
}

_NORMS = {
    "ln1": "the norm before attention",
    "ln1_post": "the norm on attention's output",
    "ln2": "the norm before the MLP",
    "ln2_post": "the norm on the MLP's output",
}


def _norm_kinds() -> dict[str, _Row]:
    """Scale, normalised value and output of every norm inside a block."""
    rows: dict[str, _Row] = {}
    for norm, what in _NORMS.items():
        rows[f"{norm}.scale"] = (f"{norm}.hook_scale", _SCALE, f"σ of {what}: what it divides by (eps included)", ())
        normalized = f"{what}: centred and divided by σ, before the gain"
        rows[f"{norm}.normalized"] = (f"{norm}.hook_normalized", _STREAM, normalized, ())
        rows[f"{norm}.out"] = (f"{norm}.hook_out", _STREAM, f"{what}: its output, gain and bias applied", ())
    for norm, axes in (("q_norm", _QUERY), ("k_norm", _KEYED)):
        rows[f"{norm}.scale"] = (f"attn.{norm}.hook_scale", (*axes[:3], "one"), f"σ of {norm}, per head", ())
        rows[f"{norm}.normalized"] = (f"attn.{norm}.hook_normalized", axes, f"{norm}, before its gain", ())
        rows[f"{norm}.out"] = (f"attn.{norm}.hook_out", axes, f"{norm}'s output, before rotary", ())
    return rows


_NORMS_AFTER = {
    "attn_in": ("ln1",),
    "v": ("q_norm", "k_norm"),
    "result": ("ln1_post",),
    "mlp_in": ("ln2",),
    "mlp_post": ("ln2_post",),
}


def _kinds() -> dict[str, Kind]:
    """All kinds, those of a block in the order of its forward pass (edits at one module happen in this order)."""
    kinds, norms = dict(_MODEL_KINDS), _norm_kinds()
    rows: dict[str, _Row] = {}
    for name, row in _BLOCK_KINDS.items():
        rows[name] = row
        for norm in _NORMS_AFTER.get(name, ()):
            rows.update({k: r for k, r in norms.items() if k.startswith(f"{norm}.")})
    for name, (hook, axes, definition, aliases) in rows.items():
        kinds[name] = Kind(f"blocks.{{layer}}.{hook}", axes, definition, aliases)
    kinds["ln_final.scale"] = Kind("ln_final.hook_scale", _SCALE, "σ of the final norm")
    kinds["ln_final.normalized"] = Kind("ln_final.hook_normalized", _STREAM, "the final norm before its gain")
    kinds["ln_final.out"] = Kind("ln_final.hook_out", _STREAM, "the final norm's output")
    return kinds


KINDS: dict[str, Kind] = _kinds()


def _spellings() -> dict[str, str]:
    """Every accepted spelling of a kind, without the layer, → the kind."""
    table: dict[str, str] = {}
    for name, kind in KINDS.items():
        for spelling in (name, kind.hook.removeprefix("blocks.{layer}."), *kind.aliases):
            table.setdefault(spelling, name)
    return table


_SPELLINGS = _spellings()


@functools.lru_cache(maxsize=4096)
def _parse(text: str) -> tuple[str, int | None]:
    head, rest = "", text
    if text.startswith("blocks."):
        head, _, rest = text.removeprefix("blocks.").partition(".")
    elif text[:1].isdigit() or text[:1] == "-":
        head, _, rest = text.partition(".")
    kind = _SPELLINGS.get(rest)
    if kind is None:
        raise SiteError(_unknown(text, rest))
    if not KINDS[kind].in_block:
        if head:
            raise SiteError(f"site {text!r}: {kind!r} belongs to the whole model, not to block {head}; write {kind!r}")
        return kind, None
    if not head:
        raise SiteError(f"site {text!r} names no layer; write for example '0.{kind}' or '*.{kind}' for every layer")
    if not head.isdigit():
        raise SiteError(f"site {text!r}: layer {head!r} is not a whole number ≥ 0; write for example '0.{kind}'")
    return kind, int(head)


def _unknown(text: str, rest: str) -> str:
    hint = nearest(rest, KINDS) or nearest(rest, _SPELLINGS) or "hm.sites() lists them all"
    return f"unknown site {text!r}: there is no {rest!r}; {hint}"


class Site:
    """A named place in a transformer, such as `Site("6.resid_post")`; immutable and hashable.

    `Site("blocks.6.hook_resid_post")` and `Site("6.resid_post")` are equal. `site.at(pos=-1, head=1)` is the same
    place read in part; the slice is taken inside the hook.

    Args:
        name: a TransformerLens hook name or its short form.

    Raises:
        SiteError: the name does not parse; the message gives the nearest names.
    """

    __slots__ = ("kind", "layer", "where")
    kind: str
    layer: int | None
    where: Where | None

    def __init__(self, name: "str | Site", *, where: Where | None = None) -> None:
        if isinstance(name, Site):
            kind, layer, where = name.kind, name.layer, where or name.where
        elif isinstance(name, str):
            kind, layer = _parse(name)
        else:
            raise SiteError(f"a site is a name such as '6.resid_post', got {type(name).__name__}: {name!r}")
        object.__setattr__(self, "kind", kind)
        object.__setattr__(self, "layer", layer)
        object.__setattr__(self, "where", where)

    def __setattr__(self, name: str, value: Any) -> None:
        raise AttributeError("a Site is immutable; make a new one, or use .at(...)")

    @property
    def name(self) -> str:
        """TransformerLens' name, such as `blocks.6.hook_resid_post`."""
        return KINDS[self.kind].hook.format(layer=self.layer)

    @property
    def short(self) -> str:
        """The short name, such as `6.resid_post`."""
        return self.kind if self.layer is None else f"{self.layer}.{self.kind}"

    @property
    def axes(self) -> tuple[str, ...]:
        """The axes of the whole site, such as `("batch", "pos", "n_heads", "d_head")`."""
        return KINDS[self.kind].axes

    @property
    def definition(self) -> str:
        """One phrase that says which tensor this is."""
        return KINDS[self.kind].definition

    @property
    def key(self) -> tuple[str, int | None]:
        """(kind, layer): the place without the slice."""
        return self.kind, self.layer

    def at(
        self,
        *,
        pos: Any = None,
        head: Any = None,
        rows: Any = None,
        src: Any = None,
        mask: Any = None,
    ) -> "Site":
        """Return this site restricted to positions, heads or rows; arguments as for `Where`.

        An integer drops its axis; a list or a slice keeps it; a mask flattens batch and position into one axis.
        """
        return Site(self, where=Where(pos=pos, head=head, rows=rows, src=src, mask=mask))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Site) and self.key == other.key and self.where == other.where

    def __hash__(self) -> int:
        return hash((self.kind, self.layer, self.where))

    def __lt__(self, other: "Site") -> bool:
        return self._order < other._order

    @property
    def _order(self) -> tuple[int, int]:
        return (-1 if self.layer is None else self.layer, list(KINDS).index(self.kind))

    def __repr__(self) -> str:
        return f"Site({self.short!r})" if self.where is None else f"Site({self.short!r}).at({self.where.describe()})"

    __str__ = __repr__

    def __reduce__(self) -> tuple[Any, ...]:
        return _restore, (self.short, self.where)

    @staticmethod
    def match(pattern: str, sites: Iterable["Site"]) -> list["Site"]:
        """Return the sites whose short or full name matches a glob such as `*.resid_post` or `blocks.*.attn.hook_z`."""
        found = []
        for site in sites:
            kind = KINDS[site.kind]
            names = [site.short, site.name]
            names += [a if site.layer is None else f"{site.layer}.{a}" for a in kind.aliases]
            if any(fnmatch.fnmatchcase(name, pattern) for name in names):
                found.append(site)
        return found


def _restore(name: str, where: Where | None) -> Site:
    return Site(name, where=where)
