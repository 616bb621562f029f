"""One forward pass in which every receiver reads an input of its own: the exact evaluation of any set of edges.

With a_u what sender u writes in this very forward and ã_u the value that a removed edge carries instead, receiver v
reads

    in_v = stream before v + Σ_u removed_uv (ã_u − a_u)

over the senders u before v. The stream itself is left alone: it holds a_u, biases and all, so b_O (and whatever else
no sender owns) always stays. Each input then goes through the model's own norm module and the head's own weights, and
is written at `q`, `k`, `v`, before q/k-norm and rotary, which stay the model's own; an MLP's is written before its
norm, that of the logits onto the stream that leaves the last block. Receivers that lose no edge are not touched.

What a head writes is z_h W_O^h, times the family's residual multiplier. Where a norm follows the sum of the heads
(Gemma 2, OLMo 2), it is the head's share of the norm's output: its own centred vector, divided by the σ of that
forward's whole sum, times the gain. The shares add up to what attention writes, so a full circuit is the model and an
empty one the other run here too; but σ belongs to all heads together, and a removed edge carries the share of the
other run at the other run's σ.

Source: the form with one buffer of differences follows Miller et al. (2024), arXiv 2407.08734, §3.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from interp.core.errors import ModelError
from interp.core.intervention import Intervention
from interp.core.norms import NormSpec
from interp.core.place import Place
from interp.core.text import Tokens
from interp.patching.graph import Graph

if TYPE_CHECKING:
    from interp.core.manager import HookManager

__all__ = ["EdgeModel", "EdgePass", "Senders"]

_KINDS = ("q", "k", "v")
Senders = Mapping[str, Tensor]
"""What removed edges carry, by site: "0.resid_pre" and "3.mlp_out" [batch pos d_model], "3.z" [batch pos n_heads
d_head], or "3.heads" [batch pos n_heads d_model], the heads' outputs themselves. A missing site carries zero."""


@dataclass(frozen=True, eq=False)
class _Visit(Intervention):
    """Look at, or replace, a site's whole tensor; the function keeps what it needs for later sites."""

    fn: Callable[[Tensor], Tensor]

    @property
    def may_do_nothing(self) -> bool:
        """Only looking is what some are for."""
        return True

    @property
    def needs_whole_batch(self) -> bool:
        """The function holds tensors of exactly this batch."""
        return True

    def edit(self, x: Tensor, place: Place) -> Tensor:
        """Return what the function returns."""
        return self.fn(x)


@dataclass(frozen=True, eq=False)
class _PostNorm:
    """A norm between the sum of a block's heads and the stream."""

    spec: NormSpec
    gain: Float[Tensor, " d_model"]
    bias: Float[Tensor, " d_model"]


@dataclass(frozen=True, eq=False)
class _Block:
    """What of one block is needed to give each of its receivers an input of its own."""

    weights: dict[str, Float[Tensor, "heads d_model d_head"]]
    biases: dict[str, Float[Tensor, "heads d_head"]]
    w_o: Float[Tensor, "n_heads d_head d_model"]
    b_o: Float[Tensor, " d_model"]
    factor: float
    post: _PostNorm | None
    norm: nn.Module | None
    mlp_site: str
    mlp_norm: nn.Module | None

    def project(self, kind: str, heads: Sequence[int], x: Float[Tensor, "batch pos d_model"]) -> Tensor:
        """Queries, keys or values [batch pos head d_head] of some heads, of a normalised input."""
        at = torch.tensor(heads, device=x.device)
        w, b = (which[kind].index_select(0, at).to(x.dtype) for which in (self.weights, self.biases))
        return torch.einsum("bpd,hde->bphe", x, w) + b

    def sends(self, heads: Sequence[int], z: Float[Tensor, "batch pos n_heads d_head"]) -> Tensor:
        """What some heads write into the stream: [head batch pos d_model]."""
        at = torch.tensor(heads, device=z.device)
        w_o = self.w_o.to(z.dtype)
        found = torch.einsum("bphe,hed->hbpd", z.index_select(2, at), w_o.index_select(0, at))
        if self.post is None:
            return found if self.factor == 1.0 else found * self.factor
        spec = self.post.spec
        whole = z.flatten(2) @ w_o.flatten(0, 1) + self.b_o.to(z.dtype)
        sigma = spec.scale(spec.centre(whole))
        return (spec.centre(found) / sigma * self.post.gain.to(sigma.dtype)).to(z.dtype)


class _Input(NamedTuple):
    """What some receivers read: in these circuits (None: in all), these receivers, [circuit·batch pos d_model]."""

    circuits: Int[Tensor, " circuit"] | None
    receivers: list[int]
    stream: Float[Tensor, "row pos d_model"]


class EdgeModel:
    """A model's own parts, as an evaluation of edges needs them; checked against the model before anything is said.

    Args:
        hm: the model.

    Raises:
        ModelError: a family whose heads do not read norm → linear map, or that has no per-head weights.
    """

    def __init__(self, hm: "HookManager") -> None:
        self.hm = hm
        self.graph = Graph.of(hm)
        self.blocks = [self._block(layer) for layer in range(hm.n_layers)]

    @property
    def reads(self) -> list[str]:
        """The sites whose values of another run are what removed edges carry."""
        sites = ["0.resid_pre"]
        for layer, mlp in enumerate(self.graph.mlps):
            sites += [f"{layer}.z"] + ([f"{layer}.mlp_out"] if mlp else [])
        return sites

    def _block(self, layer: int) -> _Block:
        hm, m = self.hm, self.hm.map
        w, post = hm.weights[layer], None
        if m.attn_out == "ln1_post":
            norm = hm.weights.norm_weights(layer, "ln1_post")
            post = _PostNorm(hm.atlas.norm("ln1_post", layer), norm.gain, norm.bias)
        pre = m.module(hm.root, "ln1", layer)
        shared = not hm.atlas.has(f"{layer}.mlp_in")
        site = f"{layer}.{'mlp.in' if shared else 'mlp_in'}" if self.graph.mlps[layer] else ""
        if site and not hm.atlas.has(site):
            raise ModelError(f"{m.family} offers no place to write what its MLP reads ({site}); see hm.sites()")
        return _Block(
            weights={"q": w.W_Q, "k": w.W_K, "v": w.W_V},
            biases={"q": w.b_Q, "k": w.b_K, "v": w.b_V},
            w_o=w.W_O,
            b_o=w.b_O,
            factor=m.residual_multiplier,
            post=post,
            norm=pre,
            mlp_site=site,
            mlp_norm=pre if shared else None,
        )

    def check(self, tokens: Tokens) -> None:
        """Compare the parts with the model itself on one row.

        Args:
            tokens: prompts; the first is run.

        Raises:
            ModelError: q, k, v or what attention writes come out otherwise in the model.
        """
        n, first = int(tokens.lengths[0]), tokens.ids[:1][tokens.mask[:1]][None]
        sites = [
            f"{layer}.{kind}" for layer in range(len(self.blocks)) for kind in ("resid_pre", *_KINDS, "z", "attn_out")
        ]
        sites += [block.mlp_site for block in self.blocks if block.mlp_norm is not None and block.mlp_site]
        with torch.no_grad():
            out = self.hm.run(first[:, :n], read=sites)
            for layer, block in enumerate(self.blocks):
                x = out["resid_pre", layer]
                read = _normed(block.norm, x)
                for kind in _KINDS:
                    own = out[kind, layer]
                    self._same(f"{layer}.{kind}", block.project(kind, range(own.shape[2]), read), own)
                z = out["z", layer]
                total = block.sends(range(z.shape[2]), z).sum(0) + self._constant(block, z)
                self._same(f"{layer}.attn_out", total, out["attn_out", layer])
                if block.mlp_norm is not None and block.mlp_site:
                    self._same(block.mlp_site, _normed(block.mlp_norm, x), out[block.mlp_site])

    def _constant(self, block: _Block, z: Tensor) -> Tensor:
        """What attention writes that belongs to no head."""
        b_o = block.b_o.to(z.dtype)
        if block.post is None:
            return b_o * block.factor
        spec = block.post.spec
        sigma = spec.scale(spec.centre(z.flatten(2) @ block.w_o.flatten(0, 1).to(z.dtype) + b_o))
        return (spec.centre(b_o) / sigma * block.post.gain.to(sigma) + block.post.bias.to(sigma)).to(z.dtype)

    def _same(self, site: str, ours: Tensor, own: Tensor) -> None:
        off, size = float((ours.float() - own.float()).abs().max()), max(1.0, float(own.abs().max()))
        exact = own.dtype in (torch.float32, torch.float64)
        if not off <= (1e-4 if exact else 5e-2) * size:
            raise ModelError(
                f"{self.hm.map.family} computes {site} otherwise than norm → weights → bias of the stream (off by "
                f"{off:.1e}), so its edges cannot be replaced one by one; patch whole activations instead"
            )


@dataclass(eq=False)
class EdgePass:
    """One forward of several circuits at once, as extra rows: circuit 0's rows first, then circuit 1's, ….

    Memory: circuits × used senders × rows × positions × d_model numbers, where a sender is used when an edge of it is
    removed in one of the circuits; inputs of receivers come on top, at most `max_bytes` of them at once.

    Args:
        model: the parts of the model.
        removed: the edges to replace, per circuit; on the CPU.
        carries: what they carry, for the rows of one circuit.
        rows: rows of one circuit.
        max_bytes: of the inputs of receivers that are held at once.
    """

    model: EdgeModel
    removed: Bool[Tensor, "circuit sender receiver"]
    carries: Senders
    rows: int
    max_bytes: int = 2**26
    used: list[int] = field(init=False)
    _buffer: Tensor | None = field(init=False, default=None)
    _streams: dict[str, Tensor] = field(init=False, default_factory=dict)
    _heads: dict[str, list[tuple[Tensor | None, list[int], Tensor]]] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        self.used = self.removed.any(0).any(1).nonzero().flatten().tolist()
        self._touched = self.removed.any(0).any(0)

    def edits(self) -> list[Intervention]:
        """Return the edits of this forward; use them for one run of (circuits · rows) rows."""
        graph = self.model.graph
        found: list[Intervention] = []
        for layer, block in enumerate(self.model.blocks):
            columns = self._columns(layer, _KINDS)
            if layer == 0 and 0 in self.used:
                found.append(_Visit("0.resid_pre", self._send_input))
            if columns:
                found.append(_Visit(f"{layer}.resid_pre", self._attention(layer, columns)))
                kinds = sorted({graph.receivers[c].kind for c in columns})
                found += [_Visit(f"{layer}.{kind}", self._put(f"{layer}.{kind}")) for kind in kinds]
            heads = [s for s in self.used if graph.senders[s][1:3] == ("head", layer)]
            if heads:
                found.append(_Visit(f"{layer}.z", self._send_heads(layer, heads)))
            for column in self._columns(layer, ("mlp",)):
                stream = f"{layer}.resid_pre" if block.mlp_norm is not None else ""
                if stream:
                    found.append(_Visit(stream, self._remember(stream)))
                found.append(_Visit(block.mlp_site, self._one(column, stream, block.mlp_norm)))
            sender = [s for s in self.used if graph.senders[s][1:3] == ("mlp", layer)]
            if sender:
                found.append(_Visit(f"{layer}.mlp_out", self._send_mlp(layer, sender[0])))
        last = len(graph.receivers) - 1
        if bool(self._touched[last]):
            found.append(_Visit(f"{graph.n_layers - 1}.resid_post", self._one(last)))
        return found

    def _columns(self, layer: int, kinds: Sequence[str]) -> list[int]:
        nodes = self.model.graph.receivers
        return [c for c, n in enumerate(nodes) if n.layer == layer and n.kind in kinds and bool(self._touched[c])]

    # -- senders ------------------------------------------------------------------------------------------------

    def _keep(self, senders: Sequence[int], own: Tensor, other: Tensor | None) -> None:
        """Note ã − a of some senders: own [sender circuit·batch pos d], other [sender batch pos d]."""
        circuits = len(self.removed)
        own = own.unflatten(1, (circuits, self.rows)).transpose(0, 1)
        if self._buffer is None:
            self._buffer = own.new_empty(circuits, len(self.used), *own.shape[2:])
        first = self.used.index(senders[0])
        part = self._buffer[:, first : first + len(senders)]
        if other is None:
            torch.neg(own, out=part)
        else:
            torch.sub(other.to(own)[None], own, out=part)

    def _send_input(self, x: Tensor) -> Tensor:
        other = self.carries.get("0.resid_pre")
        self._keep([0], x[None], None if other is None else other[None])
        return x

    def _send_mlp(self, layer: int, sender: int) -> Callable[[Tensor], Tensor]:
        def visit(x: Tensor) -> Tensor:
            other = self.carries.get(f"{layer}.mlp_out")
            self._keep([sender], x[None], None if other is None else other[None])
            return x

        return visit

    def _send_heads(self, layer: int, senders: Sequence[int]) -> Callable[[Tensor], Tensor]:
        block = self.model.blocks[layer]
        heads = [self.model.graph.senders[s].head for s in senders]

        def visit(z: Tensor) -> Tensor:
            made, other = self.carries.get(f"{layer}.heads"), self.carries.get(f"{layer}.z")
            theirs = None if other is None else block.sends(heads, other.to(z))
            if made is not None:
                theirs = made.movedim(2, 0)[heads]
            self._keep(senders, block.sends(heads, z), theirs)
            return z

        return visit

    # -- receivers ----------------------------------------------------------------------------------------------

    def _inputs(self, columns: Sequence[int], x: Tensor) -> Iterator[_Input]:
        """What the receivers of one place read; those that lost the same edges in every circuit share one input."""
        before = self.model.graph.allowed[self.used, columns[0]]
        known = int(before.sum())  # the used senders before this place: all of them have written
        removed = self.removed[:, self.used[:known]][:, :, list(columns)]
        distinct, which = removed.permute(2, 0, 1).unique(dim=0, return_inverse=True)
        members = [[columns[i] for i in (which == j).nonzero().flatten().tolist()] for j in range(len(distinct))]
        assert self._buffer is not None
        differences, streams = self._buffer[:, :known].flatten(2), x.unflatten(0, (len(removed), self.rows))
        everywhere = distinct.any(2).all(1)
        whole = everywhere.nonzero().flatten()
        for part in whole.split(max(1, self.max_bytes // (x.numel() * x.element_size()))):
            shift = torch.bmm(distinct[part].transpose(0, 1).to(x), differences)  # [circuit distinct n]
            for at, j in enumerate(part.tolist()):
                yield _Input(None, members[j], x + shift[:, at].reshape(x.shape))
        for j in (~everywhere).nonzero().flatten().tolist():
            # Circuits that remove nothing here, and senders that keep everything, cost nothing.
            on, senders = (distinct[j].any(axis).nonzero().flatten().to(x.device) for axis in (1, 0))
            weights = distinct[j].to(x)[on][:, senders, None]
            shift = (weights * differences[on[:, None], senders]).sum(1)
            stream = streams.index_select(0, on)
            yield _Input(on, members[j], (stream + shift.reshape(stream.shape)).flatten(0, 1))

    def _attention(self, layer: int, columns: list[int]) -> Callable[[Tensor], Tensor]:
        block, nodes = self.model.blocks[layer], self.model.graph.receivers

        def visit(x: Tensor) -> Tensor:
            for one in self._inputs(columns, x):
                read = _normed(block.norm, one.stream)
                for kind in _KINDS:
                    heads = [nodes[c].head for c in one.receivers if nodes[c].kind == kind]
                    if heads:
                        new = (one.circuits, heads, block.project(kind, heads, read))
                        self._heads.setdefault(f"{layer}.{kind}", []).append(new)
            return x

        return visit

    def _put(self, site: str) -> Callable[[Tensor], Tensor]:
        def visit(x: Tensor) -> Tensor:
            new = x.clone()
            rows = new.unflatten(0, (len(self.removed), self.rows))
            for circuits, heads, values in self._heads.pop(site):
                for at, head in enumerate(heads):
                    value = values[:, :, at].to(x.dtype)
                    if circuits is None:
                        new[:, :, head] = value
                    else:
                        rows[circuits, :, :, head] = value.unflatten(0, (len(circuits), self.rows))
            return new

        return visit

    def _remember(self, site: str) -> Callable[[Tensor], Tensor]:
        def visit(x: Tensor) -> Tensor:
            self._streams[site] = x
            return x

        return visit

    def _one(self, column: int, site: str = "", norm: nn.Module | None = None) -> Callable[[Tensor], Tensor]:
        """Replace what the only receiver of a place reads: the stream itself, or what a norm makes of it."""

        def visit(x: Tensor) -> Tensor:
            (one,) = self._inputs([column], self._streams.pop(site) if site else x)
            value = _normed(norm, one.stream).to(x.dtype)
            if one.circuits is None:
                return value
            new = x.clone()
            new.unflatten(0, (len(self.removed), self.rows))[one.circuits] = value.unflatten(0, (-1, self.rows))
            return new

        return visit


def _normed(norm: nn.Module | None, x: Tensor) -> Tensor:
    """What the sublayer reads of a stream, by the module's own forward; its hooks belong to the model's own call."""
    if norm is None:
        return x
    made: Any = norm.forward(x)
    if not isinstance(made, Tensor):
        raise ModelError(f"{type(norm).__name__} gives {type(made).__name__}, no tensor")
    return made
