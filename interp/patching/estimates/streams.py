"""Senders and receivers of the residual stream in factored form: what heads add, gradients as the stream has them.

A head adds z_h W_O^h; it is kept as z_h. A query head's gradient in the stream is Jᵀ W_Q^h g_q^h, with J the Jacobian
of the norm before attention; it is kept as g_q^h. Only blocks of a few tokens are ever multiplied out.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Float, Int
from torch import Tensor

from interp.core.errors import ModelError
from interp.core.intervention import Intervention
from interp.core.manager import HookManager
from interp.core.norms import NormSpec
from interp.core.rules import Fork
from interp.core.run import Run
from interp.core.site import Site

__all__ = ["Branch", "Readers", "Writers"]

INPUT = "0.resid_pre"


class Writers:
    """What the senders of a `Graph` add to the stream, in its order: the input, then each block's heads and MLP.

    Where a norm stands between the heads and the stream (Gemma 2, OLMo 2), a head adds what the norm makes of its part
    with the run's own σ; those parts sum to attn_out but for a constant.

    Args:
        hm: the model.
    """

    def __init__(self, hm: HookManager) -> None:
        self.hm = hm
        self.mlps = [hm.atlas.has(f"{layer}.mlp_out") for layer in range(hm.n_layers)]
        self.post = hm.map.attn_out == "ln1_post"

    @property
    def reads(self) -> list[str]:
        """The sites whose values are needed."""
        layers = range(self.hm.n_layers)
        return [INPUT, *(f"{i}.z" for i in layers), *(f"{i}.mlp_out" for i in layers if self.mlps[i])]

    @cached_property
    def rows(self) -> dict[str, tuple[int, int]]:
        """First and last + 1 row of each site's senders."""
        found, at = {INPUT: (0, 1)}, 1
        for layer, mlp in enumerate(self.mlps):
            found[f"{layer}.z"] = (at, at + self.hm.n_heads)
            at += self.hm.n_heads
            if mlp:
                found[f"{layer}.mlp_out"] = (at, at + 1)
                at += 1
        return found

    @property
    def n(self) -> int:
        """How many senders there are."""
        return max(end for _, end in self.rows.values())

    def values(self, run: Run) -> dict[str, Float[Tensor, "batch pos *features"]]:
        """Return what is kept of a run: its reads, with z divided by the σ of the norm behind it, if there is one."""
        found = {name: run[name] for name in self.reads}
        if self.post:
            for layer in range(self.hm.n_layers):
                z = found[f"{layer}.z"].float()
                found[f"{layer}.z"] = z / self._post_scale(layer, z)
        return found

    def _post_scale(self, layer: int, z: Tensor) -> Float[Tensor, "batch pos 1 1"]:
        weights, spec = self.hm.weights[layer], self.hm.atlas.norm("ln1_post", layer)
        whole = torch.einsum("bphd,hdm->bpm", z, weights.W_O.float()) + weights.b_O.float()
        return spec.scale(spec.centre(whole))[..., None]

    def block(
        self, values: Mapping[str, Tensor], at: Int[Tensor, " token"], name: str
    ) -> Float[Tensor, "token sender d_model"]:
        """Return what one site's senders add at some tokens.

        Args:
            values: as `values` gives them, or sums and differences of such.
            at: tokens of the flattened [batch · pos].
            name: the site.
        """
        kept = values[name].flatten(0, 1).index_select(0, at).float()
        if not name.endswith(".z"):
            return kept[:, None]
        layer = int(name.partition(".")[0])
        added = torch.einsum("thd,hdm->thm", kept, self._w_o(layer))
        return added if not self.post else self._after_post(layer, added)

    def _w_o(self, layer: int) -> Float[Tensor, "n_heads d_head d_model"]:
        factor = 1.0 if self.post else self.hm.map.residual_multiplier
        w_o = self.hm.weights[layer].W_O.float()
        return w_o if factor == 1.0 else w_o * factor

    def _after_post(self, layer: int, added: Tensor) -> Tensor:
        spec, norm = self.hm.atlas.norm("ln1_post", layer), self.hm.weights.norm_weights(layer, "ln1_post")
        return spec.centre(added) * norm.gain.to(added)


@dataclass(frozen=True)
class Branch:
    """What one sublayer reads of the stream.

    Args:
        site: where its input is forked off.
        norm: the norm between that place and the projections (None for none): formula, gain and layer.
    """

    site: str
    spec: NormSpec | None = None
    gain: Tensor | None = None


class Readers:
    """The receivers' gradients in the space of the stream.

    Args:
        hm: the model.
        frozen: σ of the norms is a constant in the backward pass.

    Raises:
        ModelError: the family's sublayers read the stream in a way that is not known here.
    """

    def __init__(self, hm: HookManager, *, frozen: bool) -> None:
        self.hm, self.frozen = hm, frozen
        self.mlps = [hm.atlas.has(f"{layer}.mlp_out") for layer in range(hm.n_layers)]
        self.attention = [self._branch(layer, "attn") for layer in range(hm.n_layers)]
        self.mlp = [self._branch(layer, "mlp") if mlp else None for layer, mlp in enumerate(self.mlps)]

    def _branch(self, layer: int, kind: str) -> Branch:
        hm, norm = self.hm, {"attn": "ln1", "mlp": "ln2"}[kind]
        before, after = f"{layer}.{kind}_in", f"{layer}.{kind}.in"
        if hm.atlas.has(before):
            found = before
        elif hm.atlas.has(after):
            # It reads what attention's norm gives (GPT-J's MLP), or the stream itself.
            found, norm = after, "ln1" if kind == "mlp" and hm.map.parallel else ""
        else:
            hm.atlas.point(Site(before))  # says why
            raise ModelError(f"{hm.map.family}: {before} is not what the {kind} reads of the stream")
        module = hm.map.module(hm.root, norm, layer) if norm else None
        inside = module is not None and (kind == "attn" or found == after)
        if not inside or module is None:
            return Branch(found)
        spec = hm.atlas.norm(norm, layer)
        gain = spec.gain(module)
        return Branch(found, spec, None if gain is None else gain.detach())

    @property
    def forks(self) -> list[Intervention]:
        """The edits that keep the branches' gradients apart from the stream's."""
        return [Fork(b.site) for b in [*self.attention, *self.mlp] if b is not None]

    @property
    def reads(self) -> list[str]:
        """The sites whose gradients are needed."""
        n = self.hm.n_layers
        heads = [f"{layer}.{kind}" for layer in range(n) for kind in "qkv"]
        return [*heads, *(f.site for f in self.forks if isinstance(f.site, str)), f"{n - 1}.resid_post"]

    def attention_block(
        self, run: Run, layer: int, at: Int[Tensor, " token"]
    ) -> tuple[Float[Tensor, "token receiver d_model"], Float[Tensor, ""]]:
        """Return the gradients of a block's q, k and v heads, and how far their sum is off the branch's own.

        Args:
            run: a run with the gradients of `reads`.
            layer: the block.
            at: tokens of the flattened [batch · pos].
        """
        weights, branch = self.hm.weights[layer], self.attention[layer]
        parts = []
        for kind, matrix in (("q", weights.W_Q), ("k", weights.W_K), ("v", weights.W_V)):
            g = run.grad[f"{layer}.{kind}"].flatten(0, 1).index_select(0, at).float()
            parts.append(torch.einsum("thd,hmd->thm", g, matrix.float()))
        found = self._pulled(branch, run, layer, at, torch.cat(parts, dim=1))
        total, own = found.sum(1), run.grad[branch.site].flatten(0, 1).index_select(0, at).float()
        mlp = self.mlp[layer]
        if mlp is not None and mlp.spec is not None:  # behind the same norm, so in the same branch
            total = total + self.mlp_block(run, layer, at)[:, 0]
        return found, (total - own).abs().max() / own.abs().max().clamp(min=1e-6)

    def mlp_block(self, run: Run, layer: int, at: Int[Tensor, " token"]) -> Float[Tensor, "token 1 d_model"]:
        """Return the gradient of a block's MLP; arguments as for `attention_block`."""
        branch = self.mlp[layer]
        assert branch is not None
        g = run.grad[branch.site].flatten(0, 1).index_select(0, at).float()[:, None]
        return self._pulled(branch, run, layer, at, g)

    def logits_block(self, run: Run, at: Int[Tensor, " token"]) -> Float[Tensor, "token 1 d_model"]:
        """Return the gradient of the stream that the logits are read from; arguments as for `attention_block`."""
        g = run.grad[f"{self.hm.n_layers - 1}.resid_post"]
        return g.flatten(0, 1).index_select(0, at).float()[:, None]

    def _pulled(self, branch: Branch, run: Run, layer: int, at: Tensor, g: Tensor) -> Tensor:
        """Jᵀ g of the norm y = (x − μ)/σ · gain + bias: (u − mean u − x̂ ⟨x̂, u⟩/d)/σ, with u = gain ⊙ g.

        The mean goes with centring, and the last term is σ's own derivative (eps included), which a frozen σ lacks.
        """
        spec = branch.spec
        if spec is None:
            return g
        # A stream that the norm's module gets: attention's branch begins there.
        x = run[self.attention[layer].site].flatten(0, 1).index_select(0, at)
        centred = spec.centre(x).float()
        scale = spec.scale(centred)
        u = g if branch.gain is None else g * branch.gain.float()
        found = u - u.mean(-1, keepdim=True) if spec.centred else u
        if not self.frozen:
            unit = (centred / scale)[:, None]
            found = found - unit * (unit * u).mean(-1, keepdim=True)
        return found / scale[:, None]
