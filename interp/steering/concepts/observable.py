"""Observables: numbers that are linear in the logits, carried back through heads and MLPs as vectors of the stream.

    gender = observable(hm, [" she"], [" he"])
    gender.through(head=(3, 2)).direction()          # what head 3.2 reads of it, as a Direction at 3.resid_pre

An observable n says how each token's logit counts. Its vector y is what the stream is multiplied by on the way to it:
W_U n through the final norm, then W_V W_O y through a head, and so on back. No data is needed but for an MLP, which is
linear only near a point. Norms are taken by their gain and centring: their σ is a positive number at each point, which
leaves the direction as it is, and `estimate` puts it back.

Source: Dunefsky and Cohan (2024), "Observable Propagation: Uncovering Feature Vectors in Transformers", arXiv
2312.16291, §3. Departures: norms with a bias, norms on a sublayer's output, residual multipliers and grouped heads are
in; an MLP's point is one that the caller gives, not one found by optimisation.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from interp.core.direct import DirectPath, before_output
from interp.core.direction import Direction
from interp.core.errors import ConfigError, DataError, ShapeError, SiteError
from interp.core.inputs import Inputs
from interp.core.manager import HookManager
from interp.core.metrics import answer_logits
from interp.core.readout import Readout
from interp.core.result import Provenance, token_names
from interp.core.run import Run
from interp.core.site import Site

__all__ = ["SCALES", "Observable", "Step", "coupling", "observable"]

SCALES = ("own", "mean")


class Step(NamedTuple):
    """One sublayer on the way back.

    Attributes:
        label: "L3H2" or "3_mlp".
        layer: its block.
        head: its head; -1 for an MLP.
        constant: what it adds apart from what it reads, before the scales of norms that come later: biases of a head's
            values and of the norm before it, for each unit of attention; for an MLP the value at its point less that
            of the linear part.
    """

    label: str
    layer: int
    head: int
    constant: float


@dataclass(frozen=True, eq=False)
class Observable:
    """A number linear in the logits, as a vector of the stream at one place. Make one with `observable`.

    Attributes:
        hm: the model.
        columns: the tokens that it looks at.
        weights: how it weighs their logits.
        vector: what the stream at `site` is multiplied by, in double precision; up to the σ of norms.
        site: where the stream is read: "3.resid_pre" enters block 3, counted from 0.
        steps: the sublayers on the way, from the logits back.
        final_constant: what the biases of the final norm and of the unembedding add, in logits.
        name: for results.
    """

    hm: HookManager
    columns: Int[Tensor, " column"]
    weights: Float[Tensor, " column"]
    vector: Float[Tensor, " d_model"]
    site: str
    steps: tuple[Step, ...] = ()
    final_constant: float = 0.0
    name: str = "observable"

    def __repr__(self) -> str:
        way = " ← ".join(["logits", *(s.label for s in self.steps)])
        return f"Observable({self.name}; {way}; at {self.site}, norm {float(self.vector.norm()):.4g})"

    # -- carrying back ------------------------------------------------------------------------------------------

    def through(
        self,
        head: tuple[int, int] | None = None,
        *,
        mlp: int | None = None,
        at: Inputs | None = None,
        path: Sequence[tuple[int, int]] | None = None,
    ) -> "Observable":
        """Return the observable as a sublayer reads it from the stream.

        Args:
            head: (layer, query head): y ← W_V W_O y through its own key/value head and the norm before it, the
                attention pattern left out. What it reads stands at the positions that it attends to.
            mlp: layer of an MLP: y ← the gradient of y · mlp_out at a point, at the same position.
            at: that point: a text or one row of tokens, of which the last is taken.
            path: several heads, from the logits back.

        Raises:
            ConfigError: not exactly one of head, mlp and path, or an MLP without its point.
            SiteError: a sublayer that comes after the place where this one reads.
            ModelError: a block without the sublayer.
        """
        if sum(given is not None for given in (head, mlp, path)) != 1:
            raise ConfigError("give one of head=(layer, head), mlp=layer and path=[(layer, head), …]")
        if path is not None:
            found = self
            for step in path:
                found = found.through(step)
            return found
        if head is not None:
            if len(head) != 2:
                raise ConfigError(f"head={head!r}: expected (layer, head)")
            return self._through_head(*head)
        assert mlp is not None
        if at is None:
            raise ConfigError(f"mlp={mlp} is linear only near a point; give at=, a text that ends there")
        return self._through_mlp(mlp, at)

    def _through_head(self, layer: int, head: int) -> "Observable":
        hm = self.hm
        circuit = hm.weights.OV(layer, head)
        self._check_order(2 * layer + 1, f"head ({layer}, {head})")
        unit = torch.ones(1, 1, dtype=torch.float64)
        y, _ = before_output(hm, layer, "attn", self.vector[None], unit)
        z = _double(circuit.right) @ y[0]
        bias = hm.weights[layer].b_V[head // (hm.n_heads // hm.n_kv_heads)]
        read, constant = _double(circuit.left) @ z, float(_double(bias) @ z)
        if hm.map.module(hm.root, "ln1", layer) is not None:
            norm = hm.weights.norm_weights(layer, "ln1")
            constant += float(_double(norm.bias) @ read)
            read = hm.atlas.norm("ln1", layer).centre(read * _double(norm.gain))
        step = Step(f"L{layer}H{head}", layer, head, constant)
        return replace(self, vector=read, site=f"{layer}.resid_pre", steps=(*self.steps, step))

    def _through_mlp(self, layer: int, at: Inputs) -> "Observable":
        hm = self.hm
        self._check_order(2 * layer + 2, f"the MLP of block {layer}")
        source = f"{layer}.{'resid_pre' if hm.map.parallel else 'resid_mid'}"
        out = Site(f"{layer}.mlp_out")
        for site in (Site(source), out):
            hm.atlas.point(site)
        tokens = hm.to_tokens(at)
        if len(tokens) != 1:
            raise ShapeError(f"at= has {len(tokens)} rows; an MLP is taken at one point, so give one")
        last = int(tokens.mask[0].nonzero()[-1])
        y = self.vector

        def value(run: Run) -> Float[Tensor, " batch"]:
            x = run[out][:, last]
            return (x.to(torch.promote_types(x.dtype, torch.float32)) * y.to(x)).sum(-1)

        run = hm.run(tokens, read=[source, out], grad=value)
        gradient, point = (_double(held[source][0, last]) for held in (run.grad, run))
        if not bool(gradient.any()):
            raise DataError(
                f"the MLP of block {layer} passes nothing of {self.name} on at this point; take another one"
            )
        constant = float(_double(run[out][0, last]) @ y) - float(gradient @ point)
        step = Step(f"{layer}_mlp", layer, -1, constant)
        return replace(self, vector=gradient, site=source, steps=(*self.steps, step))

    def _check_order(self, after: int, what: str) -> None:
        """Refuse what writes after the place that is read; places are counted in half blocks."""
        if not 0 < after <= 2 * self.hm.n_layers or after > _place(self.hm, self.site):
            raise SiteError(
                f"{what} does not write before {self.site}, where this observable reads; go back from the logits, to "
                f"earlier and earlier blocks (this model has {self.hm.n_layers})"
            )

    # -- using --------------------------------------------------------------------------------------------------

    def direction(self) -> Direction:
        """Return the vector as a direction: adding it to the stream raises the observable, σ and patterns held."""
        settings = {"tokens": self.columns.tolist(), "weights": self.weights.tolist(), "path": self._path()}
        return Direction(
            vectors={self.site: self.vector.float()},
            method="observable",
            model=Provenance.of(self.hm, settings=settings),
            name=self.name if not self.steps else f"{self.name} through {', '.join(self._path())}",
            folded=self.hm.is_folded,
            notes=tuple(self._notes()),
        )

    def _path(self) -> list[str]:
        return [step.label for step in self.steps]

    def _notes(self) -> list[str]:
        notes = ["a step along it changes the logits by its length squared over the σ of the norms on the way"]
        if Readout.of(self.hm).cap is not None:
            notes.append("logits are meant before their soft-cap")
        if self.steps:
            notes.append("attention patterns are held, and weigh what each position gives")
        return notes

    def value(self, run: Run) -> Float[Tensor, " batch"]:
        """Return the observable of a run's logits at each row's last token, before the soft-cap.

        Args:
            run: a run with logits.
        """
        logits = answer_logits(run).double()[:, self.columns.to(run.logits.device)]
        cap = Readout.of(self.hm).cap
        logits = logits if cap is None else cap * torch.atanh((logits / cap).clamp(-1 + 1e-12, 1 - 1e-12))
        return (logits.cpu() * self.weights).sum(-1)

    def needed(self, layer: int | None = None) -> list[str]:
        """Return the reads that `estimate` needs of a run.

        Args:
            layer: as for `estimate`.
        """
        hm = self.hm
        reads = [self._stream(layer)]
        if hm.map.module(hm.root, "ln_final") is not None:
            reads.append("ln_final.scale")
        for step in self.steps:
            if step.head >= 0:
                reads.append(f"{step.layer}.pattern")
                reads += [f"{step.layer}.{n}.scale" for n in self._norms(step.layer)]
        return list(dict.fromkeys(reads))

    def estimate(self, run: Run, *, layer: int | None = None, scales: str = "own") -> Float[Tensor, " batch"]:
        """Return what reaches the observable of each row's last token by this way, in logits.

        With no steps this is the whole observable, biases and all. Through heads it is what they pass on of the stream
        that the earliest of them reads, weighed by the run's patterns, with the constant of that one; through an MLP
        its linear part. So the ways through an attention-only model, each read at layer=0, sum to the whole, but for
        b_O, which is no head's.

        Args:
            run: a run that has read `needed(layer)`.
            layer: read the stream that enters this block instead, of which the part that comes past the blocks between
                untouched is counted.
            scales: "own" divides by the σ of each row's norms, which is exact; "mean" by their mean over the run, as
                if every norm were linear about one point.

        Raises:
            ConfigError: unknown scales.
            SiteError: a read is missing, or a layer behind the place that is read.
        """
        if scales not in SCALES:
            raise ConfigError(f"scales={scales!r}: expected one of {', '.join(SCALES)}")
        stream = self._stream(layer)
        missing = [name for name in self.needed(layer) if name not in run]
        if missing:
            raise SiteError(f"estimate: add to read=[…] of the run: {', '.join(map(repr, missing))}")
        x = _double(run[stream])
        mask = _mask(run, x)
        last = mask.shape[1] - 1 - mask.int().flip(1).argmax(1)
        weight = torch.zeros(x.shape[:2], dtype=torch.float64)
        weight[torch.arange(len(x)), last] = 1.0
        constant = torch.full((len(x),), self.final_constant, dtype=torch.float64)
        if "ln_final.scale" in self.needed(layer):
            weight = weight / _scale(run, "ln_final.scale", mask, scales)
        for step in self.steps:
            if step.head < 0:
                constant = step.constant * weight.sum(1)
                continue
            if "ln1_post" in self._norms(step.layer):
                weight = weight / _scale(run, f"{step.layer}.ln1_post.scale", mask, scales)
            pattern = _double(run[f"{step.layer}.pattern"])[:, step.head]
            weight = torch.einsum("bd,bds->bs", weight, pattern)
            constant = step.constant * weight.sum(1)
            if "ln1" in self._norms(step.layer):
                weight = weight / _scale(run, f"{step.layer}.ln1.scale", mask, scales)
        return constant + (weight * (x @ self.vector)).sum(1)

    def _stream(self, layer: int | None) -> str:
        if layer is None:
            return self.site
        if not 0 <= layer < self.hm.n_layers or 2 * layer > _place(self.hm, self.site):
            raise SiteError(f"layer={layer}: the stream that enters it does not come before {self.site}")
        return f"{layer}.resid_pre"

    def _norms(self, layer: int) -> list[str]:
        """Norms that a head's way goes through."""
        held = ["ln1"] if self.hm.map.module(self.hm.root, "ln1", layer) is not None else []
        return held + (["ln1_post"] if self.hm.map.attn_out == "ln1_post" else [])

    # -- comparing ----------------------------------------------------------------------------------------------

    def cosine(self, other: "Observable") -> float:
        """Return the cosine of the two vectors, wherever they read."""
        return float(self.vector @ other.vector / (self.vector.norm() * other.vector.norm()))

    def coupling(self, other: "Observable") -> float:
        """Return `coupling` of this observable's vector and another's."""
        return coupling(self.vector, other.vector)


def coupling(first: Float[Tensor, " d_model"], second: Float[Tensor, " d_model"]) -> float:
    """Return how far the second observable moves when the stream moves so that the first moves by 1, along the first.

    Args:
        first, second: their vectors; the coupling is not symmetric: y1 · y2 / |y1|².

    Raises:
        ShapeError: vectors of different width.
        DataError: a first vector of zero.

    Source: Dunefsky and Cohan (2024), arXiv 2312.16291, §3.4.
    """
    if first.shape != second.shape or first.ndim != 1:
        raise ShapeError(f"a coupling needs two vectors of one width, got {tuple(first.shape)}, {tuple(second.shape)}")
    a, b = _double(first), _double(second)
    if not float(a.norm()) > 0:
        raise DataError("the first vector is zero: no step along it moves anything")
    return float(a @ b / (a @ a))


def observable(
    hm: HookManager,
    positive: str | int | Sequence[str | int],
    negative: str | int | Sequence[str | int] = (),
    *,
    name: str | None = None,
) -> Observable:
    """Return the mean logit of some tokens less that of others, as a vector of the last stream.

    The vector is W_U n times the logit scale, through the final norm: times its gain, less its mean where the norm
    takes the mean off. Its bias is a constant, kept beside; a soft-cap comes after it and is left out.

    Args:
        hm: the model.
        positive: tokens that count for it: texts of one token each, with their leading space, or ids.
        negative: tokens that count against it; none gives the mean logit itself, which a shift of all logits moves.
        name: for results.

    Raises:
        DataError: no token, one on both sides or twice, or a text of several tokens.
        ModelError: the unembedding is not linear, or the final norm follows no known formula.
    """
    sides = [_ids(hm, side) for side in (positive, negative)]
    both = [*sides[0], *sides[1]]
    if not sides[0] or len(set(both)) < len(both):
        raise DataError(f"positive tokens {sides[0]} and negative ones {sides[1]}: expected each once, one at least")
    columns = torch.tensor(both)
    shares = [[sign / len(side)] * len(side) for sign, side in zip((1.0, -1.0), sides, strict=True) if side]
    weights = torch.tensor([w for side in shares for w in side], dtype=torch.float64)
    point = torch.ones(1, hm.d_model, dtype=torch.float64).cumsum(1)
    path = DirectPath.of(hm, point.to(hm.weights.W_U.device), columns, weights[None])
    texts = [token_names(hm, torch.tensor(side)) if side else [] for side in sides]
    words = " − ".join(", ".join(side) for side in texts if side)
    return Observable(
        hm=hm,
        columns=columns,
        weights=weights,
        vector=_double(path.direction[0] * path.sigma[0]),
        site=f"{hm.n_layers - 1}.resid_post",
        final_constant=float(path.norm_bias[0] + path.unembed_bias[0]),
        name=words if name is None else name,
    )


def _ids(hm: HookManager, tokens: str | int | Sequence[str | int]) -> list[int]:
    given = [tokens] if isinstance(tokens, str | int) else list(tokens)
    held = [hm.to_single_token(t) if isinstance(t, str) else int(t) for t in given]
    wrong = next((i for i in held if not 0 <= i < hm.weights.W_U.shape[1]), None)
    if wrong is not None:
        raise DataError(f"token {wrong} is outside the vocabulary 0 … {hm.weights.W_U.shape[1] - 1}")
    return held


def _place(hm: HookManager, site: str) -> int:
    """Where a stream stands, in half blocks from the embedding."""
    found = Site(site)
    assert found.layer is not None
    return 2 * found.layer + {"resid_pre": 0, "resid_mid": 1, "resid_post": 2}[found.kind]


def _scale(run: Run, site: str, mask: Tensor, scales: str) -> Float[Tensor, "batch pos"]:
    """σ of a norm at each position; ones at pads, where nothing is read."""
    sigma = _double(run[site])[..., 0]
    sigma = torch.where(mask, sigma, 1.0)
    return sigma if scales == "own" else torch.full_like(sigma, float(sigma[mask].mean()))


def _mask(run: Run, x: Tensor) -> Tensor:
    return torch.ones(x.shape[:2], dtype=torch.bool) if run.mask is None else run.mask.bool().cpu()


def _double(x: Float[Tensor, "*n"]) -> Float[Tensor, "*n"]:
    return x.detach().double().cpu()
