"""`Run`: what a forward pass gave."""

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from interp.core.errors import DataError, SiteError, nearest
from interp.core.site import Site
from interp.core.text import str_tokens

if TYPE_CHECKING:
    from interp.core.decompose import Decomposition
    from interp.core.manager import HookManager

__all__ = ["BySite", "Run"]


class BySite(Mapping[Site, Tensor]):
    """Tensors by site, found by `Site`, by name, or by (kind, layer)."""

    def __init__(self, values: Mapping[Site, Tensor]) -> None:
        self._values = dict(values)

    def __getitem__(self, key: Any) -> Tensor:
        return self._values[self.find(key)]

    def find(self, key: Any) -> Site:
        """Return the site that a key means.

        Raises:
            SiteError: it was not read; the message lists what was.
        """
        if isinstance(key, tuple) and len(key) == 2:
            key = f"{key[1]}.{key[0]}"
        wanted = Site(key)
        if wanted in self._values:
            return wanted
        same = [s for s in self._values if s.key == wanted.key]
        if wanted.where is None and len(same) == 1:
            return same[0]
        if same:
            raise SiteError(f"{wanted.short} was read in {len(same)} slices; say which: {', '.join(map(repr, same))}")
        known = [s.short for s in self._values]
        hint = nearest(wanted.short, known) or f"this run holds {', '.join(known[:12]) or 'no activations'}"
        raise SiteError(f"{wanted.short} was not read; add it to read=[…] ({hint})")

    def __contains__(self, key: object) -> bool:
        try:
            self.find(key)
        except (SiteError, TypeError, AttributeError):
            return False
        return True

    def __iter__(self) -> Iterator[Site]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)


class Run(BySite):
    """Activations by site, with the logits, tokens and mask of the forward pass that gave them.

    `run["2.resid_post"]`, `run["resid_post", 2]` and `run["blocks.2.hook_resid_post"]` are the same tensor. Reads own
    their memory and are detached.
    """

    def __init__(
        self,
        values: Mapping[Site, Tensor],
        *,
        tokens: Int[Tensor, "batch pos"] | None,
        mask: Bool[Tensor, "batch pos"] | None,
        logits: Float[Tensor, "batch _ d_vocab"] | None = None,
        grad: Mapping[Site, Tensor] | None = None,
        metric: Tensor | None = None,
        notes: list[str] | None = None,
        hm: "HookManager",
    ) -> None:
        super().__init__(values)
        self.tokens = tokens
        self.mask = mask
        self.hm = hm
        self.metric = metric
        self.notes: list[str] = notes if notes is not None else []
        self.gates: dict[Any, Any] = {}
        """What each `Gate` of the edits decided."""
        self._logits = logits
        self._grad = None if grad is None else BySite(grad)

    @property
    def logits(self) -> Float[Tensor, "batch _ d_vocab"]:
        """The model's logits: every position, or with logits="last" each row's last real token [batch 1 d_vocab].

        Raises:
            DataError: the run was not asked for logits.
        """
        if self._logits is None:
            raise DataError(
                "this run has no logits: activations were read, so the forward stopped early; "
                "give logits='all' or 'last'"
            )
        return self._logits

    @property
    def has_logits(self) -> bool:
        """Whether the run was asked for logits."""
        return self._logits is not None

    @property
    def grad(self) -> BySite:
        """Gradients of the metric by site, in the shapes of the reads.

        Raises:
            DataError: the run had no grad=… metric.
        """
        if self._grad is None:
            raise DataError("this run has no gradients; give run(…, grad=lambda out: metric of out)")
        return self._grad

    @property
    def sites(self) -> list[Site]:
        """The sites that were read, in the order asked."""
        return list(self)

    @property
    def str_tokens(self) -> list[list[str]]:
        """The text of every token, row by row."""
        if self.tokens is None:
            raise DataError("this forward was given embeddings, so there are no tokens")
        return str_tokens(self.hm.tokenizer, self.tokens)

    def stack(self, kind: str) -> Float[Tensor, "layer *shape"]:
        """Return one kind of site from every layer that was read, in layer order: [layer batch pos …].

        Raises:
            SiteError: no layer of it was read.
        """
        kind = Site(f"0.{kind}").kind
        found = sorted((s for s in self if s.kind == kind), key=lambda s: s.layer or 0)
        if not found:
            raise SiteError(f"no {kind} was read; add '*.{kind}' to read=[…]")
        return torch.stack([self[s] for s in found])

    def decompose_resid(self, layer: int | None = None, *, mid: bool = False) -> "Decomposition":
        """Return the terms that sum to the residual stream; see `interp.core.decompose.decompose_resid`."""
        from interp.core import decompose

        return decompose.decompose_resid(self, layer, mid=mid)

    def accumulated_resid(self, layer: int | None = None) -> "Decomposition":
        """Return the residual stream after each part; see `interp.core.decompose.accumulated_resid`."""
        from interp.core import decompose

        return decompose.accumulated_resid(self, layer)

    def stack_head_results(self, layer: int | None = None) -> "Decomposition":
        """Return each head's contribution to the residual stream; see `interp.core.decompose.stack_head_results`."""
        from interp.core import decompose

        return decompose.stack_head_results(self, layer)

    def loss_per_token(self) -> Float[Tensor, "batch next"]:
        """Return the next-token loss in nats; see `interp.core.decompose.loss_per_token`."""
        from interp.core import decompose

        return decompose.loss_per_token(self)

    def __repr__(self) -> str:
        shape = "×".join(map(str, self.tokens.shape)) if self.tokens is not None else "embeddings"
        reads = ", ".join(f"{s!r} {list(self[s].shape)}" for s in self.sites[:6])
        more = f", … {len(self) - 6} more" if len(self) > 6 else ""
        logits = "no logits" if self._logits is None else f"logits {list(self._logits.shape)}"
        return f"{type(self).__name__}({shape} tokens; {logits}; {reads or 'no reads'}{more})"
