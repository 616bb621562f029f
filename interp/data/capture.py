"""Writing the activations of many tokens to a disk: by one process or many, that may die and come back.

Text is cut into units of so many documents; each is packed, run and written on its own, by whoever has its lock, and
is there whole or not at all. So the bytes hang neither on how many writers there are nor on when they were stopped.
"""

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from pydantic import Field
from torch import Tensor
from tqdm import tqdm

from interp import __version__
from interp.core.checks import processes_of
from interp.core.compiled import CompiledBlocks, CompileMode
from interp.core.disk import weights_digest
from interp.core.errors import ArtifactError, ConfigError, DataError
from interp.core.result import Provenance
from interp.core.run import Run
from interp.core.settings import Settings
from interp.core.site import Site
from interp.data.ahead import Ahead
from interp.data.codec import codec_named
from interp.data.fingerprint import text_digest, tokenizer_digest
from interp.data.manifest import Manifest, SiteLayout, TextLayout
from interp.data.replica import Replica
from interp.data.store import row_sites
from interp.data.storefolder import Claim, StoreFolder
from interp.data.textloss import LOSSES, LossName
from interp.data.tokens import TokenBlock, TokenSource
from interp.data.tune import refuse_long_rows
from interp.data.writing import Writer

if TYPE_CHECKING:
    from interp.core.manager import HookManager

__all__ = ["CaptureOptions", "CapturePlan", "Captured", "capture", "plan_capture"]

_SAMPLED = 64  # documents from which the size of a unit is taken
_AHEAD = 4  # blocks that wait between two stages


class CaptureOptions(Settings):
    """How activations are kept."""

    dtype: Literal["float32", "bfloat16", "float16", "int8_row", "int8_channel"] = Field(
        default="bfloat16",
        description="in which activations are kept; int8 with a scale per row, or per channel and shard",
    )
    max_tokens: int | None = Field(
        default=None,
        gt=0,
        description="tokens after which no further unit is captured, special ones not counted; by default all text",
    )
    gradient: LossName | None = Field(
        default=None,
        description="keep a gradient beside each activation: of the row's summed loss (nats), of the summed entropy of "
        "its predictions (nats), or of the sum of its largest logits",
    )
    compile: Literal["off"] | CompileMode = Field(
        default="off",
        description="torch.compile's mode for blocks inside which nothing is read, at forwards of whole rows; "
        "'reduce-overhead' replays CUDA graphs on a GPU. The first forwards wait for the compiler",
    )
    unit_documents: int | None = Field(
        default=None, gt=0, description="documents per shard; by default as many as give about unit_bytes"
    )
    unit_bytes: int = Field(default=2**26, gt=0, description="bytes that a shard should have, about")


@dataclass(frozen=True)
class CapturePlan:
    """What a capture will write.

    Attributes:
        manifest: what is fixed when the store is begun.
        bytes_per_token: on the disk, special tokens counted.
        tokens: tokens to be kept, special ones not counted; None where only the text's end says.
    """

    manifest: Manifest
    bytes_per_token: int
    tokens: int | None


@dataclass(frozen=True)
class Captured:
    """How a capture ended.

    Attributes:
        folder: the store.
        status: "complete"; "stopped" when it was asked to; "others" when what is left is being written by others.
        rows: rows written by this call, special tokens included.
        tokens: those that count.
        bytes: of activations and columns.
        seconds: wall time.
        busy: share of it in which each stage was at work: "text", "model", "disk".
    """

    folder: Path
    status: Literal["complete", "stopped", "others"]
    rows: int
    tokens: int
    bytes: int
    seconds: float
    busy: dict[str, float]


def plan_capture(
    hm: "HookManager",
    tokens: TokenSource,
    sites: str | Site | Sequence[str | Site],
    options: CaptureOptions | None = None,
) -> CapturePlan:
    """Say what a capture will write, from the model's config and the text's beginning; nothing is run.

    Args:
        hm: the manager of the model.
        tokens: the text; its `rows` are the rows per forward.
        sites: sites with something for each token.
        options: how activations are kept.

    Raises:
        ConfigError: a site that cannot be stored, or rows that are too long for the model.
        SiteError: one that the model does not have.
        DataError: the text cannot be read, or gives no token.
    """
    options, places, text = options or CaptureOptions(), row_sites(sites), tokens.documents
    for site in places:
        hm.atlas.point(site)
    if options.compile != "off" and options.gradient is not None:
        raise ConfigError(f"compile={options.compile!r} goes with no gradient yet; leave one of the two off")
    if processes_of(hm.model) > 1 and options.gradient is not None:
        raise ConfigError(
            "gradients of a model that is split among processes are not kept yet; load it with device_map"
        )
    documents, rows, first = _beginning(tokens)
    refuse_long_rows(hm, first)
    model_dtype = str(hm.dtype).removeprefix("torch.")
    layout = TextLayout(
        source=text.describe(),
        fingerprint=text_digest(text),
        part=text.part,
        hold_out_every=text.hold_out_every,
        ctx=tokens.ctx,
        rows=tokens.rows,
        packing=tokens.packing,
        bos=tokens.bos,
        tokenizer=tokenizer_digest(tokens.tokenizer),
        unit_documents=options.unit_documents or 1,
    )
    made = Manifest(
        writer=__version__,
        model=str(hm.name),
        revision=hm.revision,
        config_hash=str(Provenance.of(hm).config_hash),
        weights=weights_digest(hm.model),
        model_dtype=model_dtype,
        sites=tuple(SiteLayout(name=s.name, shape=tuple(hm.atlas.shape(s)[2:])) for s in places),
        dtype=options.dtype,
        gradient=options.gradient,
        compile=options.compile,
        processes=processes_of(hm.model),
        text=layout,
    )
    if options.unit_documents is None:
        layout = layout.model_copy(update={"unit_documents": _unit(documents, rows, options, made.bytes_per_row)})
    return CapturePlan(made.model_copy(update={"text": layout}), made.bytes_per_row, options.max_tokens)


def capture(
    hm: "HookManager",
    tokens: TokenSource,
    sites: str | Site | Sequence[str | Site],
    folder: str | Path,
    options: CaptureOptions | None = None,
    *,
    resume: bool = False,
    should_stop: Callable[[], bool] | None = None,
    progress: bool = True,
) -> Captured:
    """Write the activations of a text to a folder; all sites in one pass, which stops after the last of them.

    Any number of processes, on as many machines as share the folder's disk, may do this with the same arguments at once
    (`resume` for all but the first): each takes the next unit that nobody has taken. One that is stopped or killed
    loses the unit that it was at, and no other; whoever comes next makes it again, to the same bytes on the same kind
    of machine with as many threads.

    Text is made ready, the model runs, and the disk is written in three threads. Memory, in bytes: the model's forward,
    and `9 · rows · ctx · bytes_per_row` for what waits between them; with "int8_channel" a whole shard besides.

    Args:
        hm: the manager of the model.
        tokens: the text; must be readable more than once. Special tokens are kept, and marked.
        sites: one site or several, with something for each token; heads stay axes.
        folder: to write; it must hold nothing yet, or with `resume` this very store.
        options: how activations are kept.
        resume: go on with a store, or extend it to more `max_tokens`.
        should_stop: asked before each forward; when it says True, the unit is dropped and the capture ends.
        progress: show a progress bar on stderr, with what the others wait for.

    Returns:
        How it ended; `ActivationStore.open(folder)` reads what is there.

    Raises:
        ConfigError: a resume with another model, text or settings; names them.
        ArtifactError: the folder holds something else, or the disk is full; whole shards stay.
    """
    options = options or CaptureOptions()
    plan = plan_capture(hm, tokens, sites, options)
    replica = Replica.of(hm)
    if replica is not None and not replica.leads:
        return _run_along(hm, replica, plan.manifest, Path(folder))
    store = StoreFolder(Path(folder))
    manifest = store.begin(plan.manifest, resume=resume, free_unit=options.unit_documents is None)
    store.wants(options.max_tokens)
    ended: Captured | None = None
    try:
        with _Job(hm, tokens, manifest, store, options, should_stop or _never, progress, replica) as job:
            ended = job.run()
    finally:
        if replica is not None:
            replica.lead(None, ended)
    return ended


def _run_along(hm: "HookManager", replica: Replica, manifest: Manifest, folder: Path) -> Captured:
    """Make the forwards that another process of the same model asks for; what comes of them is for it to keep."""
    forwards = _Forwards(hm, manifest)
    while True:
        block, ended = replica.follow()
        if block is None:
            break
        forwards.run(block)
    if ended is None:
        raise ArtifactError(f"the process that writes {folder} has failed; its own error says why")
    found: Captured = ended
    return found


class _Forwards:
    """The model at work: one forward per block of tokens."""

    def __init__(self, hm: "HookManager", manifest: Manifest) -> None:
        self.hm, self.manifest = hm, manifest
        self.sites = [Site(site.name) for site in manifest.sites]
        self.blocks = None if manifest.compile == "off" else CompiledBlocks(hm, self.sites, manifest.compile)
        self.fitting: int | None = None  # rows that memory holds, where that is fewer than the layout's
        self.notes: list[str] = []  # what there is to say of it

    def run(self, block: TokenBlock) -> Run:
        """Run the model on some tokens, and read."""
        if (name := self.manifest.gradient) is not None:
            return self.hm.run(block.inputs, read=self.sites, grad=lambda run: LOSSES[name](run, block.mask))
        # The last rows of a unit are fewer, and some are padded: they run as they are.
        layout = self.manifest.text
        whole = bool(block.mask.all()) and block.ids.shape == (layout.rows, layout.ctx) and self.fitting is None
        with self.blocks.active() if self.blocks is not None and whole else nullcontext():
            run = self.hm.run(block.inputs, read=self.sites, logits="none", batch_size=self.fitting)
        split = next((note for note in run.notes if note.startswith("out of memory")), None)
        if split is not None:
            # From here on, parts that memory holds.
            self.fitting = max(1, (self.fitting or layout.rows) // 2)
            self.notes.append(f"{split}; fewer --text.rows would be faster")
        return run


class _Job:
    """One process at work on a store."""

    def __init__(
        self,
        hm: "HookManager",
        tokens: TokenSource,
        manifest: Manifest,
        store: StoreFolder,
        options: CaptureOptions,
        should_stop: Callable[[], bool],
        progress: bool,
        replica: Replica | None,
    ) -> None:
        self.tokens, self.manifest, self.store, self.options = tokens, manifest, store, options
        self.should_stop, self.replica = should_stop, replica
        self.forwards = _Forwards(hm, manifest)
        self.codec = codec_named(manifest.dtype)
        self.codecs = {(part, site.name): self.codec for part in manifest.parts for site in manifest.sites}
        self.text_seconds = self.model_seconds = 0.0
        self.claimed: list[Claim] = []  # those whose unit is not whole, should this end before
        self.bar = tqdm(
            total=options.max_tokens,
            initial=store.tokens_held(),
            unit="tok",
            unit_scale=True,
            desc="capturing",
            disable=not progress,
        )
        # Last: from here on there is something to end.
        self.writer = Writer(_AHEAD)
        self.ahead = Ahead(self._units(), _AHEAD)

    def __enter__(self) -> "_Job":
        return self

    def __exit__(self, *_: object) -> None:
        self.ahead.close()
        self.writer.drop()
        for claim in self.claimed:
            claim.release()
        self.bar.close()

    def run(self) -> Captured:
        """Capture what is there to be captured."""
        began, stopped = time.perf_counter(), False
        for claim, block, documents in self.ahead:
            if self.should_stop():
                stopped = True
                break
            if documents is not None:
                self.writer.end({"first_document": documents.start, "end_document": documents.stop})
            elif block is None:
                self.writer.begin(self.store.place(claim.number), self.codecs, claim)
            else:
                started = time.perf_counter()
                columns, values = self._captured(block)
                self.model_seconds += time.perf_counter() - started
                self.writer.append(columns, values)
                self._report(int((columns["special"] == 0).sum()), began)
        if not stopped:
            self.writer.finish()
        done = False if stopped else self.store.finish(self._limit())
        stopped = stopped or (not done and self.should_stop())
        seconds = time.perf_counter() - began
        return Captured(
            folder=self.store.path,
            status="stopped" if stopped else "complete" if done else "others",
            rows=self.writer.rows,
            tokens=self.writer.tokens,
            bytes=self.writer.rows * self.manifest.bytes_per_row,
            seconds=seconds,
            busy=self._busy(seconds),
        )

    def _units(self) -> Iterator[tuple[Claim, TokenBlock | None, range | None]]:
        """In a thread of its own: each unit that nobody has taken, as its claim, its blocks, and its documents."""
        size, text = self.manifest.text.unit_documents, _Forward(self.tokens)
        for claim in self.store.claims(self._limit, self.should_stop):
            self.claimed = [*(held for held in self.claimed if held.held), claim]
            wanted = range(claim.number * size, (claim.number + 1) * size)
            found = text.documents(wanted)
            if found is None:
                self.store.ends_at(claim.number)
                claim.release()
                continue
            yield claim, None, None
            counted, blocks = 0, self.tokens.pack(found)
            while True:
                started = time.perf_counter()
                block = next(blocks, None)
                self.text_seconds += time.perf_counter() - started
                if block is None:
                    break
                counted += int((~block.special & block.mask).sum())
                yield claim, block, None
            self.store.counts(claim.number, counted)
            yield claim, None, wanted

    def _limit(self) -> int | None:
        """The number of units that the store will have, as soon as that is known."""
        return self.store.limit(self.options.max_tokens)

    def _captured(self, block: TokenBlock) -> tuple[dict[str, Tensor], dict[tuple[str, str], Tensor]]:
        """What a forward gives at the tokens that are no pads."""
        if self.replica is not None:
            self.replica.lead(block)
        run = self.forwards.run(block)
        while self.forwards.notes:
            self.bar.write(self.forwards.notes.pop(), file=sys.stderr)
        keep = block.mask.flatten().nonzero()[:, 0]
        values = {}
        for site in self.forwards.sites:
            for part in self.manifest.parts:
                x = run[site.name] if part == "values" else run.grad[site.name]
                # Each on the device of its layer.
                rows = x.detach().flatten(0, 1).index_select(0, keep.to(x.device, non_blocking=True)).flatten(1)
                values[part, site.name] = rows if self.codec.scale else rows.to(self.codec.dtype)
        columns = {"ids": block.ids, "document": block.doc, "position": block.pos, "special": block.special}
        return {name: column.flatten()[keep] for name, column in columns.items()}, values

    def _busy(self, seconds: float) -> dict[str, float]:
        """The share of so many seconds in which each stage was at work."""
        spent = {"text": self.text_seconds, "model": self.model_seconds, "disk": self.writer.seconds}
        return {name: value / max(seconds, 1e-9) for name, value in spent.items()}

    def _report(self, tokens: int, began: float) -> None:
        self.bar.update(tokens)
        busy = self._busy(time.perf_counter() - began)
        slowest = max(busy, key=lambda name: busy[name])
        written = self.writer.rows * self.manifest.bytes_per_row
        self.bar.set_postfix_str(f"{written / 1e9:.2f} GB, {slowest} {busy[slowest]:.0%} busy", refresh=False)


class _Forward:
    """Documents by their index, read in one go where they are asked for in order."""

    def __init__(self, tokens: TokenSource) -> None:
        self.source = tokens.documents
        self._open: Iterator[tuple[int, str]] = iter(())
        self._next: tuple[int, str] | None = None
        self._at: int | None = None

    def documents(self, wanted: range) -> list[tuple[int, str]] | None:
        """The documents of a range that are this part's; None where the text has ended before it."""
        if self._at is None or wanted.start < self._at:
            self._open = self.source.read(wanted.start)
            self._next = next(self._open, None)
        while self._next is not None and self._next[0] < wanted.start:
            self._next = next(self._open, None)
        self._at = wanted.stop
        if self._next is None:
            return None
        found = []
        while self._next is not None and self._next[0] < wanted.stop:
            found.append(self._next)
            self._next = next(self._open, None)
        return found


def _beginning(tokens: TokenSource) -> tuple[int, int, TokenBlock]:
    """How many documents the text's beginning has, how many rows they give, and the first block of them.

    Raises:
        DataError: the text cannot be read, or gives no token.
    """
    documents, end = tokens.documents.read(), 0
    while held := list(islice(documents, _SAMPLED)):
        end = held[-1][0] + 1
        blocks = list(tokens.pack(held))
        if blocks:
            return end, sum(int(block.mask.sum()) for block in blocks), blocks[0]
    part = "" if tokens.documents.part == "all" else f" in its {tokens.documents.part!r} part"
    raise DataError(f"{tokens.documents.describe()} gives no tokens{part}; give more text")


def _unit(documents: int, rows: int, options: CaptureOptions, bytes_per_row: int) -> int:
    """Documents per shard, so that one has about the wanted bytes, and a limit on tokens is met within a twentieth."""
    wanted = options.unit_bytes / bytes_per_row
    if options.max_tokens is not None:
        wanted = min(wanted, options.max_tokens / 20)
    return max(1, round(wanted * documents / rows))


def _never() -> bool:
    return False
