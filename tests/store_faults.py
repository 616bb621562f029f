"""Small stores of activations for the tests, what is known of them without a store, and what befalls a process."""

import hashlib
import os
import random
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from interp.core.manager import HookManager
from interp.data.capture import Captured, CaptureOptions, capture
from interp.data.documents import Documents
from interp.data.tokens import TokenSource
from tests.families import manager, word_tokenizer

SITES = ["0.resid_post", "1.z"]
NAMES = ["blocks.0.hook_resid_post", "blocks.1.attn.hook_z"]


def random_texts(n: int, seed: int = 0) -> list[str]:
    """Texts of 3 to 19 words."""
    generator = torch.Generator().manual_seed(seed)
    sizes = torch.randint(3, 20, (n,), generator=generator).tolist()
    rows = [torch.randint(1, 120, (size,), generator=generator).tolist() for size in sizes]
    return [" ".join(f"w{i}" for i in row) for row in rows]


def source(data: Any, **options: Any) -> TokenSource:
    """Rows of 16 tokens, four at a time, with BOS."""
    return TokenSource(data, word_tokenizer(), **{"ctx": 16, "rows": 4, "bos": True, **options})


def take(
    folder: Path,
    tokens: TokenSource,
    *,
    sites: Any = SITES,
    hm: HookManager | None = None,
    resume: bool = False,
    should_stop: Callable[[], bool] | None = None,
    **options: Any,
) -> Captured:
    """Capture in fp32, without a progress bar."""
    chosen = CaptureOptions.model_validate({"dtype": "float32", **options})
    model = manager("Llama") if hm is None else hm
    return capture(model, tokens, sites, folder, chosen, resume=resume, should_stop=should_stop, progress=False)


def tree(folder: Path, *, locks: bool = False) -> dict[str, str]:
    """The SHA-256 of every file of a folder, those of locks left out."""
    found = {str(p.relative_to(folder)): p for p in sorted(folder.rglob("*")) if p.is_file()}
    kept = {name: path for name, path in found.items() if locks or not name.startswith("locks/")}
    return {name: hashlib.sha256(path.read_bytes()).hexdigest() for name, path in kept.items()}


def drafts(folder: Path) -> list[str]:
    """What somebody has begun to write and not put in its place."""
    return [str(p.relative_to(folder)) for p in folder.rglob(".*.tmp")]


def units(tokens: TokenSource, size: int) -> Iterator[list[tuple[int, str]]]:
    """The documents of each unit, counted by our own arithmetic."""
    documents = list(tokens.documents.read())
    for first in range(0, documents[-1][0] + 1, size):
        yield [(i, text) for i, text in documents if first <= i < first + size]


def expected(hm: HookManager, tokens: TokenSource, size: int, sites: list[str]) -> dict[str, Tensor]:
    """What a store of such a text must hold, row by row: columns, and the sites as `hm.run` gives them."""
    found: dict[str, list[Tensor]] = {name: [] for name in ("ids", "document", "position", "special", *sites)}
    for documents in units(tokens, size):
        for block in tokens.pack(documents):
            run = hm.run(block.inputs, read=sites)
            columns = {"ids": block.ids, "document": block.doc, "position": block.pos, "special": block.special}
            for name, column in columns.items():
                found[name].append(column[block.mask])
            for site in sites:
                found[site].append(run[site][block.mask].flatten(1))
    return {name: torch.cat(parts) for name, parts in found.items()}


def planted(documents: Documents, longest: int | None = None) -> list[tuple[int, int, int]]:
    """(document, position, id) of every word of a text."""
    texts = list(documents.read())
    return [(d, p, int(w[1:])) for d, text in texts for p, w in enumerate(text.split()[:longest])]


class TooLong(BaseException):
    """Something did not end."""


@contextmanager
def within(seconds: float) -> Iterator[None]:
    """Raise where the main thread hangs, rather than hang."""

    def raise_(*_: object) -> None:
        raise TooLong(f"not done within {seconds} s")

    before = signal.signal(signal.SIGALRM, raise_)
    # Again and again: what hangs may hang once more while it is cleaned up.
    signal.setitimer(signal.ITIMER_REAL, seconds, 0.5)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


@contextmanager
def nothing_left(folder: Path) -> Iterator[None]:
    """What runs inside leaves neither a thread, nor an open file below the folder, nor a draft in it."""
    before = set(threading.enumerate())
    yield
    # Of tqdm's own thread there is one in a process, whoever shows the first bar.
    threads = [t for t in threading.enumerate() if t not in before and type(t).__name__ != "TMonitor"]
    assert not threads, f"left running: {threads}"
    held = [str(path.readlink()) for path in Path("/proc/self/fd").iterdir() if path.is_symlink()]
    assert not [name for name in held if name.startswith(str(folder))], f"left open: {held}"
    assert not drafts(folder)


def child(work: Callable[[], None]) -> int:
    """Do something in a process forked from this one, which has a single thread; gives its number."""
    number = os.fork()
    if number == 0:
        try:
            work()
        except BaseException as err:  # noqa: BLE001 - the child tells, and ends
            print(f"{type(err).__name__}: {err}", file=sys.stderr, flush=True)
            os._exit(1)
        os._exit(0)
    return number


def ended(number: int) -> int:
    """Wait for a child: its exit code, or minus the signal that ended it."""
    _, status = os.waitpid(number, 0)
    return -os.WTERMSIG(status) if os.WIFSIGNALED(status) else os.WEXITSTATUS(status)


KILLED_TEXTS, KILLED_UNIT = 60, 5


def killed(folder: Path) -> None:
    """The capture that is killed: twelve units."""
    take(folder, source(random_texts(KILLED_TEXTS)), resume=True, unit_documents=KILLED_UNIT)


def kill_loop(folder: Path, kills: int) -> None:
    """Kill captures at random moments, each time going on with the next, until so many have been killed.

    Runs in a process of its own, with everything imported. Moments are drawn on the child's own clock (SIGPROF, which
    nothing handles, ends it as SIGKILL does) or on the wall's (SIGALRM, alike), so that waits for the disk are met too.
    """
    manager("Llama")
    draw, count, number, died_at = random.Random(kills), 0, 0, list[int]()
    began, cpu = time.perf_counter(), os.times()
    assert ended(child(lambda: killed(folder / "whole"))) == 0
    wall = time.perf_counter() - began
    used = os.times().children_user + os.times().children_system - cpu.children_user - cpu.children_system
    while count < kills:
        out = folder / f"store-{number}"
        number += 1
        for _ in range(4):
            clock = draw.choice([signal.ITIMER_PROF, signal.ITIMER_REAL])
            moment = draw.uniform(1e-3, used if clock == signal.ITIMER_PROF else wall)

            def work(clock: Any = clock, moment: float = moment, out: Path = out) -> None:
                signal.setitimer(clock, moment)
                killed(out)

            code = ended(child(work))
            assert code in (0, -signal.SIGPROF, -signal.SIGALRM), f"a child ended with {code}"
            if code == 0:
                break
            count += 1
            died_at.append(len(list((out / "shards").glob("[0-9]*"))) if out.is_dir() else -1)
        assert ended(child(lambda out=out: killed(out))) == 0, f"{out} cannot be resumed"  # type: ignore[misc]
    # The kills were spread over the work, or they would prove little.
    assert kills < 20 or len(set(died_at)) > 4, died_at
    (folder / "done").write_text(f"{count} {number}")


def at_once(folder: Path, processes: int, unit: int, texts: int, max_tokens: int | None = None) -> None:
    """Have several processes capture into one folder at the same time; runs in a process of its own."""
    manager("Llama")
    tokens = source(random_texts(texts))
    gate, go = os.pipe()

    def work() -> None:
        os.close(go)
        os.read(gate, 1)  # ends for all of them when the parent lets go
        take(folder, tokens, resume=True, unit_documents=unit, max_tokens=max_tokens)

    children = [child(work) for _ in range(processes)]
    os.close(go)
    codes = [ended(number) for number in children]
    assert codes == [0] * processes, codes
