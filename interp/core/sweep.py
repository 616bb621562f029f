"""Many edits of one batch, each tried on its own: exact patching sweeps without a forward per edit.

An edit in block l at column p changes no layer before l and, in a causal model, no column before p. So the base run is
made once; for each start column one batch of branches grows layer by layer: at block l the cells of that layer join
it, coming from the base run's stream, and the block runs once on all branches, columns p and later, with the base
run's keys and values before them. After the last block only each row's answer column is read out, and only for the
tokens that the metrics look at. Against one forward per cell, a full sweep over layers and positions has about a
quarter of the work left, in far fewer and larger calls. Branches · batch · columns are bounded by a byte budget
(`Sizes.branch_bytes`).

Each sweep checks itself on the base rows before it starts, and falls back to a slower plan where a family does not let
itself be taken apart: "wavefront" (columns and layers are saved), "layers" (whole rows, layers are saved), "naive" (one
forward per cell). Which one ran, and why, is in `notes`.
"""

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from interp.core.checks import check_residual, refuse_split
from interp.core.errors import ConfigError, HookError, InterpError, ModelError, ShapeError, SiteError
from interp.core.intervention import Intervention
from interp.core.metrics import Metric
from interp.core.passes import frame_of, refuse_inside_block
from interp.core.plan import Plan
from interp.core.readout import Readout
from interp.core.replay import Replay, answer_stream
from interp.core.run import Run
from interp.core.site import Site
from interp.core.sweep_cells import Cells, edits_at, plain_edit
from interp.core.sweep_schedule import Sizes, Wave, block_weights, check_budget, default_budget, waves

if TYPE_CHECKING:
    from interp.core.manager import HookManager

__all__ = ["ENGINES", "Finished", "Sweep", "SweepValues", "sweep"]

ENGINES = ("auto", "wavefront", "layers", "naive")
"""How a sweep may run; "auto" takes the first of the others that is exact on this model."""

_FRONT = ("embed", "pos_embed")
_EXACT, _COARSE = 1e-4, 2e-2
# What a block says that needs more than its arguments.
_UNFIT = (RuntimeError, TypeError, ValueError, LookupError, AttributeError)


@dataclass(frozen=True, eq=False)
class Finished:
    """Cells of a sweep that are done.

    Attributes:
        cells: their numbers, counted through all `Cells` in the order given.
        values: each metric with one cell edited.
    """

    cells: Int[Tensor, " n"]
    values: Float[Tensor, "metric n batch"]


class Sweep:
    """A sweep that is ready to run; see the module's text.

    Args:
        hm: the model.
        tokens: the batch that is edited; whatever `hm.run` takes.
        cells: what to try, site by site.
        metrics: what to measure; a `Metric` needs the logits of its own tokens alone, any other function of a `Run` is
            given each branch's last logits [batch 1 d_vocab].
        write: edits that the base run and every branch are made with, such as noise at "embed"; at the embedding only.
        engine: one of `ENGINES`. One that is named and not exact on this model is refused.
        budget_bytes: how much a block call may take; None decides from the device.

    Attributes:
        plan: "wavefront", "layers" or "naive".
        notes: which plan runs and why, and what was left out.
        base: each metric without any edit.
        unchanged: cells that change nothing, which are not run: their values are exactly the base's.
        changed_rows: rows that a cell edits; the others' values are exactly the base's.

    Raises:
        SiteError: a site that this model does not have or that cannot be edited.
        ShapeError: cells for another batch, or a metric that is not one number per example.
        ModelError: the engine asked for is not exact on this model; says by how much.
    """

    def __init__(
        self,
        hm: "HookManager",
        tokens: Any,
        cells: Sequence[Cells],
        metrics: Sequence[Metric | Callable[[Run], Tensor]],
        *,
        write: Sequence[Intervention] = (),
        engine: str = "auto",
        budget_bytes: int | None = None,
    ) -> None:
        if engine not in ENGINES:
            raise ConfigError(f"engine={engine!r}: expected one of {', '.join(ENGINES)}")
        check_budget(budget_bytes)
        hm._refuse_training("a sweep")
        refuse_inside_block(hm, "sweep")
        self.hm, self.tokens = hm, hm.to_tokens(tokens)
        self.cells, self.metrics, self.write = list(cells), list(metrics), list(write)
        self.batch, self.length = self.tokens.ids.shape
        self._check()
        self.ends = frame_of(self.tokens, 0, self.batch).ends()
        self._index()
        self.notes: list[str] = list(hm.notes_for(self.tokens))
        self._prepare(engine)
        device = hm.device
        self.budget_bytes = default_budget(device) if budget_bytes is None else budget_bytes

    def __len__(self) -> int:
        return len(self._layers)

    # -- before it runs -----------------------------------------------------------------------------------------

    def _check(self) -> None:
        if not self.cells or not self.metrics:
            raise ShapeError("a sweep needs at least one Cells and one metric")
        kinds = set()
        inside = next((e for e in self.write if Site(e.site).kind not in _FRONT), None)
        if inside is not None:
            raise SiteError(f"write=[…] of a sweep acts at the embedding, not at {Site(inside.site).short}; edit there")
        for held in (part for given in self.cells for part in given.parts):
            site = Site(held.site)
            point = self.hm.atlas.point(site)
            if point.read_only:
                raise SiteError(f"{site.short!r} can be read but not edited: {point.read_only}")
            if tuple(held.columns.shape[1:]) != (self.batch, self.length):
                raise ShapeError(
                    f"cells at {site.short} have columns {tuple(held.columns.shape)}; this batch is "
                    f"[{self.batch}, {self.length}] [batch pos]"
                )
            kinds.add(site.kind)
        points = tuple(self.hm.atlas.point(Site(p.site)) for c in self.cells for p in c.parts)
        refuse_split(self.hm.model, Plan((), (), points))
        if kinds & {"attn_out", "mlp_out"}:
            check_residual(self.hm)

    def _index(self) -> None:
        """Where each cell is, which rows it edits and from which column on."""
        real = self.tokens.mask.cpu()
        edited = [torch.stack([part.columns.cpu() for part in c.parts]).any(0) for c in self.cells]
        columns = torch.cat(edited) & real
        layers = [Site(c.site).layer for c in self.cells]
        self._owner = torch.repeat_interleave(
            torch.arange(len(self.cells)), torch.tensor([len(c) for c in self.cells], dtype=torch.long)
        )
        self._offset = torch.tensor([0, *(len(c) for c in self.cells)]).cumsum(0)
        self._layers = torch.tensor([-1 if n is None else n for n in layers], dtype=torch.long)[self._owner]
        self.changed_rows: Bool[Tensor, "cell batch"] = columns.any(2)
        self.unchanged: Bool[Tensor, " cell"] = ~self.changed_rows.any(1)
        self._starts = columns.any(1).int().argmax(1)

    def _prepare(self, engine: str) -> None:
        """Make the base run and choose the plan."""
        self.replay: Replay | None = None
        self.readout: Readout | None = None
        why = ""
        if engine != "naive":
            why = self._try_replay(engine)
        if engine == "naive" or self.replay is None:
            if engine not in ("auto", "naive"):
                raise ModelError(f"engine={engine!r} is not exact here: {why}; use engine='auto' or 'naive'")
            self.plan, logits = "naive", self.hm.run(self.tokens, write=self.write, logits="last").logits
            self.notes.append("naive plan: one forward per cell" + (f" ({why})" if why else ""))
        else:
            logits = self.replay.logits
        run = Run({}, tokens=self.tokens.ids, mask=self.tokens.mask, logits=logits.detach(), hm=self.hm)
        self.base: Float[Tensor, "metric batch"] = torch.stack([self._measured(m, run) for m in self.metrics])

    def _try_replay(self, engine: str) -> str:
        """Set the replay and the fastest plan that is exact; return why another one is not."""
        late = [
            Site(c.site).short for c in self.cells if Site(c.site).layer is None and Site(c.site).kind not in _FRONT
        ]
        if late:
            return f"{late[0]} lies after the last block"
        try:
            replay = Replay(self.hm, self.tokens, self.write)
            readout = Readout.of(self.hm)
            readout.check(answer_stream(replay.resid[-1][None], self.ends)[0], replay.logits[:, 0])
        except (HookError, ModelError) as err:
            return str(err)
        exact = self.hm.dtype in (torch.float32, torch.float64)
        tolerance, why = _EXACT if exact else _COARSE, replay.why_whole
        starts = sorted(set(self._starts[~self.unchanged].tolist()) - {0})
        if engine in ("auto", "wavefront") and not why:
            tried = {starts[len(starts) // 2], starts[-1]} if starts else {0}
            why = self._off(replay, sorted(tried), tolerance)
            if not why:
                self.plan, self.replay, self.readout = "wavefront", replay, readout
                self.notes.append("wavefront plan: layers and columns before an edit are taken from one base run")
                return ""
        if engine == "wavefront":
            return why
        whole = self._off(replay, [0], tolerance)
        if whole:
            return f"{why}; {whole}" if why else whole
        self.plan, self.replay, self.readout = "layers", replay, readout
        self.notes.append(
            "layers plan: layers before an edit are taken from one base run" + (f" ({why})" if why else "")
        )
        self._starts = torch.zeros_like(self._starts)
        return ""

    @staticmethod
    def _off(replay: Replay, starts: list[int], tolerance: float) -> str:
        """Why blocks called by themselves are not the model's, or ""."""
        for start in starts:
            try:
                off = replay.off(start)
            except InterpError:
                raise
            except (
                RuntimeError,
                TypeError,
                ValueError,
                LookupError,
                AttributeError,
            ) as err:  # a family whose block needs more than its arguments
                return f"a block of {replay.hm.map.family} cannot be called by itself ({type(err).__name__}: {err})"
            if not off <= tolerance:
                return f"replayed blocks of {replay.hm.map.family} are off by {off:.1e} from column {start} on"
        return ""

    # -- running ------------------------------------------------------------------------------------------------

    def __iter__(self) -> Iterator[Finished]:
        return self.finished()

    def finished(self, skip: Bool[Tensor, " cell"] | None = None) -> Iterator[Finished]:
        """Run the cells and yield them as they are done, in an order that depends on the cells alone.

        Args:
            skip: cells that are known already, such as those of a sweep that was interrupted.
        """
        left = torch.ones(len(self), dtype=torch.bool) if skip is None else ~skip
        still = (left & self.unchanged).nonzero()[:, 0]
        if len(still):
            yield Finished(still, self.base[:, None].expand(-1, len(still), -1).clone())
        todo = (left & ~self.unchanged).nonzero()[:, 0]
        if self.plan == "naive":
            yield from self._naive(todo)
            return
        queue = waves(self._starts[todo], self._layers[todo], todo, self._most)[::-1]
        while queue:
            wave = queue.pop()
            try:
                values = self._wave(wave)
            except torch.OutOfMemoryError as err:
                if len(wave.cells) == 1:
                    raise ModelError(
                        f"out of memory with one branch of {self.batch} rows of {self.length} tokens; give fewer rows"
                    ) from err
                torch.cuda.empty_cache()
                queue.extend(wave.halves()[::-1])
                continue
            yield Finished(wave.cells, self._settled(wave.cells, values))

    def _most(self, start: int) -> int:
        return self.sizes.most(start, self.budget_bytes)

    @property
    def sizes(self) -> Sizes:
        """What decides how many branches fit."""
        hm, m = self.hm, self.hm.map
        wide = [
            len(c) if isinstance(c := getattr(metric, "columns", None), Tensor) else m.d_vocab
            for metric in self.metrics
        ]
        # A mixture of experts says no width; its tokens pass a few experts of at most this many neurons together.
        d_mlp = m.d_mlp if m.d_mlp is not None else 8 * m.d_model
        itemsize = torch.empty((), dtype=hm.dtype).element_size()
        return Sizes(self.batch, self.length, m.d_model, m.n_heads, m.n_kv_heads, m.d_head, d_mlp, max(wide), itemsize)

    def _wave(self, wave: Wave) -> Float[Tensor, "metric n batch"]:
        """Run one wave through the layers and measure its branches."""
        assert self.replay is not None
        replay, start = self.replay, wave.start
        x: Tensor | None = None
        at = 0
        if wave.first < 0:
            at = int((wave.layers < 0).sum())
            x = replay.front(at, self._edits(wave, 0, at, start), start=start)
        for layer in range(max(0, wave.first), self.hm.n_layers):
            new = int((wave.layers == layer).sum())
            edits = (*self._edits(wave, at, new, start), *self._later(wave, layer, at + new, start))
            fresh = replay.resid[layer][:, start:].repeat(new, 1, 1) if new else None
            parts = [p for p in (x, fresh) if p is not None]
            x = parts[0] if len(parts) == 1 else torch.cat([parts[0].to(parts[1].device), parts[1]])
            del parts, fresh
            x = replay.block(layer, x, start=start, edits=edits)
            at += new
        assert x is not None
        stream = answer_stream(x.unflatten(0, (-1, self.batch)), self.ends - start)
        return self._values(stream)

    def _edits(self, wave: Wave, low: int, n: int, start: int) -> tuple[Any, ...]:
        """The edits of the branches low … low + n, which lie side by side for each site."""
        numbers = wave.cells[low : low + n]
        owners = self._owner[numbers]
        jobs = []
        for owner in owners.unique().tolist():
            mine = (owners == owner).nonzero()[:, 0]
            jobs.append((self.cells[owner], numbers[mine] - self._offset[owner], low + int(mine[0])))
        return edits_at(jobs, batch=self.batch, first=start)

    def _later(self, wave: Wave, layer: int, n: int, start: int) -> tuple[Any, ...]:
        """The edits of a block that go with cells which began at it or before."""
        owners = self._owner[wave.cells[:n]]
        jobs = []
        for owner in owners.unique().tolist():
            mine = (owners == owner).nonzero()[:, 0]
            pick = wave.cells[mine] - self._offset[owner]
            jobs += [(part, pick, int(mine[0])) for part in self.cells[owner].then if Site(part.site).layer == layer]
        return edits_at(jobs, batch=self.batch, first=start)

    @torch.no_grad()
    def _values(self, stream: Float[Tensor, "n batch d"]) -> Float[Tensor, "metric n batch"]:
        """Every metric of branches, from the stream at their answer columns."""
        assert self.readout is not None
        n = len(stream)
        rows = torch.arange(self.batch, device=stream.device).repeat(n)
        flat, found = stream.flatten(0, 1), []
        whole = self.readout.logits(flat) if any(_needs_all(m) for m in self.metrics) else None
        for metric in self.metrics:
            if not isinstance(metric, Metric):
                assert whole is not None
                branches = whole.unflatten(0, (n, self.batch))
                found.append(torch.stack([self._measured(metric, self._run(logits)) for logits in branches]))
                continue
            logits = whole if metric.columns is None else self.readout.logits(flat, metric.columns)
            assert logits is not None
            logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
            found.append(metric.of(logits, rows.to(logits.device)).float().cpu().unflatten(0, (n, self.batch)))
        return torch.stack(found)

    def _run(self, logits: Float[Tensor, "batch d_vocab"]) -> Run:
        return Run({}, tokens=self.tokens.ids, mask=self.tokens.mask, logits=logits[:, None], hm=self.hm)

    def _measured(self, metric: Callable[[Run], Tensor], out: Run) -> Float[Tensor, " batch"]:
        value = metric(out)
        if not isinstance(value, Tensor) or value.shape != (self.batch,):
            what = f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
            raise ShapeError(
                f"the metric returned {what}; expected one number per example [batch] = [{self.batch}], such as "
                "logit_diff gives"
            )
        return value.detach().float().cpu()

    def _settled(self, cells: Int[Tensor, " n"], values: Float[Tensor, "metric n batch"]) -> Tensor:
        """Values with those of rows that were not edited, exactly the base's."""
        return torch.where(self.changed_rows[cells], values, self.base[:, None])

    def _naive(self, cells: Int[Tensor, " n"]) -> Iterator[Finished]:
        """One forward per cell, through an ordinary edit: the oracle of the other plans."""
        for number in cells.tolist():
            owner = int(self._owner[number])
            pick = torch.tensor([number - int(self._offset[owner])])
            edits = [one for part in self.cells[owner].parts if (one := plain_edit(part, pick, self.tokens.mask.cpu()))]
            with _quiet():
                out = self.hm.run(self.tokens, write=[*self.write, *edits], logits="last")
            values = torch.stack([self._measured(metric, out) for metric in self.metrics])[:, None]
            yield Finished(torch.tensor([number]), self._settled(torch.tensor([number]), values))

    # -- what it costs ------------------------------------------------------------------------------------------

    def flop_factor(self) -> float:
        """Return the naive loop's work over this sweep's, in multiplications by weights (attention scores left out).

        The naive loop runs every cell through all layers, columns and the whole unembedding at every column.
        """
        blocks = [self.hm.map.module(self.hm.root, "block", i) for i in range(self.hm.n_layers)]
        after = block_weights([sum(p.numel() for p in b.parameters() if p.ndim > 1) for b in blocks if b is not None])
        unembed = self.hm.d_model * self.hm.d_vocab
        naive = len(self) * self.length * (int(after[0]) + unembed)
        if self.plan == "naive":
            return 1.0
        ran = ~self.unchanged
        own = (self.length - self._starts[ran]).double() * after[self._layers[ran].clamp(min=0)].double()
        read = int(ran.sum()) * self.hm.d_model * self.sizes.n_logits
        return naive / max(1.0, float(own.sum()) + read + self.length * (int(after[0]) + unembed))


@dataclass(frozen=True, eq=False)
class SweepValues:
    """What a whole sweep gave.

    Attributes:
        values: each metric with one cell edited.
        base: each metric without an edit.
        unchanged: cells that change nothing.
        plan: the plan that ran.
        notes: why, and what a reader should know.
    """

    values: Float[Tensor, "metric cell batch"]
    base: Float[Tensor, "metric batch"]
    unchanged: Bool[Tensor, " cell"]
    plan: str
    notes: list[str] = field(default_factory=list)


def sweep(
    hm: "HookManager",
    tokens: Any,
    cells: Sequence[Cells],
    metrics: Sequence[Metric | Callable[[Run], Tensor]],
    *,
    write: Sequence[Intervention] = (),
    engine: str = "auto",
    budget_bytes: int | None = None,
) -> SweepValues:
    """Try many edits of one batch, each on its own, and return every metric for each of them.

    Memory: the values; the base run's streams, keys and values; and `budget_bytes` for the branches.

    Args:
        hm, tokens, cells, metrics, write, engine, budget_bytes: as for `Sweep`.

    Returns:
        Values in the order of the cells.

    Raises:
        InterpError: as for `Sweep`.
    """
    ready = Sweep(hm, tokens, cells, metrics, write=write, engine=engine, budget_bytes=budget_bytes)
    values = torch.full((len(ready.metrics), len(ready), ready.batch), torch.nan)
    for done in ready:
        values[:, done.cells] = done.values
    return SweepValues(values, ready.base, ready.unchanged, ready.plan, ready.notes)


def _needs_all(metric: Any) -> bool:
    return not isinstance(metric, Metric) or metric.columns is None


@contextmanager
def _quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*changed nothing")
        yield
