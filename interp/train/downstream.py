"""What a dictionary's reconstruction does to the rest of the model: batches of whole rows of text, and their loss."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable

from interp.core.errors import ConfigError, DataError
from interp.core.intervention import Intervention
from interp.core.metrics import kl_divergence
from interp.core.place import Place
from interp.core.run import Run
from interp.core.site import Site
from interp.core.where import Where
from interp.data.beyond import Beyond
from interp.data.store import ActivationStore, Batch, Rows, StreamState, row_sites
from interp.data.streamed import counted_rounds, kept_rows
from interp.data.tokens import Cursor, TokenBlock, TokenSource
from interp.train.config import DownstreamOptions

if TYPE_CHECKING:
    from interp.core.manager import HookManager

__all__ = ["RowBatches", "downstream_loss"]

_MOST_LOGITS = 1 << 24  # so many numbers of [row pos d_vocab] at once in the second forward: 64 MiB in fp32


def downstream_loss(
    hm: "HookManager",
    block: TokenBlock,
    site: str | Site,
    reconstruction: Float[Tensor, "token d"],
    *,
    loss: Literal["ce", "kl"],
    clean: Float[Tensor, "row pos d_vocab"] | None = None,
    rows: int | None = None,
) -> Float[Tensor, ""]:
    """Return the model's loss with a reconstruction in place of an activation, with its gradient.

    "ce" is the cross-entropy of the text, "kl" is KL(clean ‖ with the reconstruction); both are means over the
    predictions from a token that counts, of one that counts: real and not special. Other tokens keep their activations.

    The model runs as a whole, a few rows at a time, and each part's gradient is worked out at once and goes back as far
    as the site: nothing of the model lives on until `backward`. What lies below the site is run again, since no forward
    can begin at a site: behind layer l of L that adds l / (2 (L − l)) to what the rest takes.
    Memory, in bytes: about 6 · 4 · p · d_vocab for p positions in a part, which is 2^24 / d_vocab, or one row where
    that has more; besides, what a backward pass through the whole model needs of a part (much less where no parameter
    requires a gradient), and 8 · d for each token.

    Args:
        hm: the manager of the model, whose own parameters get no gradient.
        block: whole rows of tokens.
        site: where the reconstruction goes.
        reconstruction: at the tokens that count, in the order of the text, in the activation's own units.
        loss: which one.
        clean: the model's own logits; only for "kl", which runs the model for them when they are None.
        rows: at most so many rows at once.

    Returns:
        Nats per prediction; 0 where no prediction counts.

    Source: Braun et al. 2024 (2405.12241), §2, for "kl" (e2e). Departure: special tokens are left out.
    """
    place, keep = Site(site), block.mask & ~block.special
    counted = keep[:, :-1] & keep[:, 1:]
    n = int(counted.sum())
    if loss == "kl" and clean is None:
        clean = hm.run(block.inputs, logits="all", batch_size=rows).logits
    with_gradient = torch.is_grad_enabled() and reconstruction.requires_grad
    made = reconstruction.detach()
    whole = made.new_zeros(keep.numel(), made.shape[-1])
    at = keep.flatten().nonzero().flatten().to(made.device)
    whole = whole.index_copy_(0, at, made).view(*keep.shape, -1)
    found, value = torch.zeros_like(whole) if with_gradient else None, made.new_zeros(())
    width = max(1, min(rows or len(keep), _MOST_LOGITS // (keep.shape[1] * hm.d_vocab)))
    for start in range(0, len(keep), width):
        part = slice(start, start + width)
        if not bool(counted[part].any()):
            continue
        of = _Part(counted[part], block.ids[part], None if clean is None else clean[part], n, loss)
        edit = _StandIn(place, whole[part], where=Where(mask=keep[part]))
        if found is None:
            with torch.no_grad():
                value = value + of(hm.run(_some(block, part).inputs, write=[edit], logits="all")).to(value)
            continue
        run = hm.run(_some(block, part).inputs, read=[place], write=[edit], grad=of, logits="all")
        assert run.metric is not None and run.grad is not None
        value = value + run.metric.to(value)
        found[part] = run.grad[place.name].flatten(2).to(found)
    if found is None:
        return value
    known: Tensor = _Known.apply(reconstruction, value, found.flatten(0, 1).index_select(0, at))
    return known


@dataclass(frozen=True)
class _Part:
    """The share of some rows in a mean over all predictions that count, as a function of their run."""

    counted: Bool[Tensor, "row next"]
    ids: Int[Tensor, "row pos"]
    clean: Float[Tensor, "row pos d_vocab"] | None
    n: int
    loss: Literal["ce", "kl"]

    def __call__(self, run: Run) -> Float[Tensor, ""]:
        logits = self._chosen(run.logits)
        if self.loss == "kl":
            assert self.clean is not None
            return kl_divergence(logits, self._chosen(self.clean).to(logits.device)).sum() / self.n
        targets = self.ids[:, 1:][self.counted].to(logits.device)
        wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
        return torch.nn.functional.cross_entropy(wide, targets, reduction="sum") / self.n

    def _chosen(self, logits: Tensor) -> Float[Tensor, "prediction d_vocab"]:
        # Chosen before anything is made of them: what stands at pads may be NaN, and a gradient would be too.
        index = self.counted.flatten().nonzero().flatten().to(logits.device)
        return logits[:, :-1].flatten(0, 1).index_select(0, index)


@dataclass(frozen=True, eq=False)
class _StandIn(Intervention):
    """x ← value, [row pos d]; unlike `Replace` it may be what was there, or no number: the loss then is none either."""

    value: Tensor
    where: Where = field(default_factory=Where)

    @property
    def may_do_nothing(self) -> bool:
        """A reconstruction may be perfect."""
        return True

    def edit(self, x: Tensor, place: Place) -> Tensor:
        """Return the value."""
        return self.value.to(x.device, x.dtype, copy=True).view(x.shape)  # heads may have been side by side


class _Known(torch.autograd.Function):
    """A number whose gradient was worked out with it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, value: Tensor, gradient: Tensor) -> Tensor:
        ctx.save_for_backward(gradient)
        return value.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (gradient,) = ctx.saved_tensors
        return grad * gradient, None, None


class RowBatches(ActivationStore):
    """Whole rows of text in their order, each batch with the loss of what stands in for the activations in it.

    Nothing is shuffled: a loss behind the site needs the other tokens of a row. Special tokens are left out of the
    batches, so that a batch has fewer tokens than rows · ctx. Where a stream stands is a place in the text.

    Memory, in bytes, with `d` the sum of the sites' widths: `tokens.rows · ctx · d · size(model dtype)` for a batch,
    for "kl" `tokens.rows · ctx · d_vocab · size(model dtype)` for its clean logits, once however many dictionaries are
    trained, and what `downstream_loss` takes. Batches that wait, as those that the first weights are drawn from, keep
    no logits: those are made again, with one more forward.

    Args:
        hm: the manager whose model is run.
        tokens: the text; `tokens.rows` rows make a batch.
        sites: all that is read.
        options: which loss, and how it weighs.
        rows: at most so many rows in one forward.
        repeat: start over when the text ends.

    Raises:
        ConfigError: no loss is asked for, or a site without a row per token.
    """

    def __init__(
        self,
        hm: "HookManager",
        tokens: TokenSource,
        sites: str | Site | Sequence[str | Site],
        options: DownstreamOptions,
        *,
        rows: int | None = None,
        repeat: bool = False,
    ) -> None:
        if options.loss == "none":
            raise ConfigError("batches of whole rows are for a loss behind the site; give downstream.loss kl or ce")
        self.hm, self.tokens, self.sites, self.options = hm, tokens, row_sites(sites), options
        self.rows, self.repeat = rows or tokens.rows, repeat
        self.batch_size, self.seed = tokens.rows * tokens.ctx, 0
        self._last: tuple[TokenBlock, Tensor] | None = None

    def describe(self) -> dict[str, object]:
        """What was decided about tokens, for a run's record."""
        return {
            "tokens": self.tokens.describe(),
            "sites": [site.name for site in self.sites],
            "rows_per_step": self.tokens.rows,
            "order": "as in the text",
            "special_tokens": "left out",
        }

    def check(self, replaced: Sequence[Site]) -> None:
        """Refuse sites whose activations cannot be replaced, or that the logits do not depend on, with a trial run.

        Args:
            replaced: the sites that are reconstructed.

        Raises:
            ConfigError: nothing behind the site depends on it.
            SiteError: the site cannot be edited.
        """
        for block, _ in counted_rounds(self.tokens):
            counts = block.mask & ~block.special
            good = (counts[:, :-1] & counts[:, 1:]).any(1).nonzero().flatten().tolist()
            if not good:
                continue
            one = _some(block, slice(good[0], good[0] + 1))
            run = self.hm.run(one.inputs, read=list(replaced), logits="none")
            kept = (one.mask & ~one.special).flatten().nonzero().flatten()
            for number, site in enumerate(replaced):
                x = kept_rows(run, replaced, one, kept, self.hm.device).values[number].requires_grad_(True)
                value = downstream_loss(self.hm, one, site, x, loss="ce")
                (gradient,) = torch.autograd.grad(value, x)
                if not bool(gradient.any()):
                    raise ConfigError(
                        f"the logits of {self.hm.name} do not depend on {site.short}, so a loss behind it says nothing "
                        "of a reconstruction; choose another site, or downstream.loss none"
                    )
            return
        raise DataError(f"{self.tokens.documents.describe()} has no two tokens in a row that count; give more text")

    def _stream(self, should_stop: Callable[[], bool], state: StreamState | None) -> "_InOrder":
        return _InOrder(self, should_stop, state)

    def _read(self, block: TokenBlock, keep: Int[Tensor, "token"]) -> "_TextRows":
        with_logits = self.options.loss == "kl"
        self._last = None  # before the next ones are made
        logits: Any = "all" if with_logits else "none"
        run = self.hm.run(block.inputs, read=self.sites, logits=logits, batch_size=self.rows)
        if with_logits:
            self._last = block, run.logits
        made = kept_rows(run, self.sites, block, keep, self.hm.device)
        return _TextRows(made.values, made.tokens, made.positions, block=block, store=self)

    def _clean(self, block: TokenBlock) -> Tensor | None:
        """The model's own logits of a block; those of the last block that was asked for are kept, and no others."""
        if self.options.loss != "kl":
            return None
        if self._last is None or self._last[0] is not block:
            self._last = None
            self._last = block, self.hm.run(block.inputs, logits="all", batch_size=self.rows).logits
        return self._last[1]

    def _beyond(self, block: TokenBlock, site: Site) -> Beyond:
        kind: Any = self.options.loss

        def loss(made: Tensor) -> Tensor:
            return downstream_loss(self.hm, block, site, made, loss=kind, clean=self._clean(block), rows=self.rows)

        given = self.options
        return Beyond(loss, kind, given.weight, given.reconstruction, given.balance)


@dataclass
class _TextRows(Rows):
    """The rows of a block of text, whose batches know what comes behind."""

    block: TokenBlock | None = None
    store: RowBatches | None = None

    def batch(self, x: int, target: int | None) -> Batch:
        """As the item that a loss takes."""
        assert self.block is not None and self.store is not None
        site = self.store.sites[x if target is None else target]
        return replace(super().batch(x, target), beyond=self.store._beyond(self.block, site))


class _InOrder(Iterator[Rows]):
    """One stream over the text."""

    def __init__(self, store: RowBatches, should_stop: Callable[[], bool], state: StreamState | None) -> None:
        self.store, self.should_stop, self.cursor = store, should_stop, None
        if state is not None and state.record:
            was = {name: state.record.get(name) for name in self._sizes()}
            if was != self._sizes():
                raise ConfigError(f"this state is of a store with {was}; this one has {self._sizes()}")
            self.cursor = Cursor(*state.record["cursor"])
        self.blocks = counted_rounds(store.tokens, self.cursor, repeat=store.repeat)

    cursor: Cursor | None

    def __next__(self) -> Rows:
        if self.should_stop():
            raise StopIteration
        found = next(self.blocks, None)
        if found is None:
            if self.cursor is None:
                text = self.store.tokens.documents.describe()
                raise DataError(f"{text} has only special tokens; give text")
            raise StopIteration
        block, keep = found
        rows = self.store._read(block, keep)
        self.cursor = block.cursor
        return rows

    def state(self) -> StreamState:
        return StreamState({} if self.cursor is None else {**self._sizes(), "cursor": list(self.cursor)}, {})

    def _sizes(self) -> dict[str, Any]:
        return {"sites": [site.name for site in self.store.sites], "batch_size": self.store.batch_size}


def _some(block: TokenBlock, part: slice) -> TokenBlock:
    """Some rows of a block."""
    columns = {name: getattr(block, name)[part] for name in ("ids", "mask", "special", "doc", "pos")}
    positions = None if block.position_ids is None else block.position_ids[part]
    return replace(block, **columns, position_ids=positions)
