"""Seeded random misuse: each call must end in a typed error, leave no hook, and leave the next run right.

    python -m tests.contract.bad_calls [COUNT]    prints what went wrong, one line each

They run without the tests' type checker: a wrong type must meet the library's own error, as it does with users.
"""

import random
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from interp.core.errors import InterpError
from interp.core.intervention import (
    Ablate,
    Add,
    Affine,
    Edit,
    FreezePattern,
    FreezeScale,
    Project,
    Replace,
    Rotate,
    SetProjection,
    Splice,
)
from interp.core.manager import HookManager
from interp.core.site import Site
from interp.core.text import Tokens
from interp.core.where import Where
from tests.families import VOCAB, manager, tokens

BATCH, POS = 2, 6
IDS = tokens(BATCH, POS, seed=5)


class MyError(Exception):
    """An exception type that only a user could have raised."""


@dataclass(frozen=True)
class BadCall:
    """One misuse.

    Attributes:
        text: What is wrong, for the failure message.
        call: Does it.
        own: The user's own exception types that must come through instead of an InterpError.
    """

    text: str
    call: Callable[[HookManager], object]
    own: tuple[type[BaseException], ...] = ()

    @property
    def expected(self) -> tuple[type[BaseException], ...]:
        """What the call may raise."""
        return self.own or (InterpError,)


def hooks_on(model: nn.Module) -> list[tuple[str, int]]:
    """Every module that carries hooks of any kind, or a forward of its own, with their number."""
    found = []
    for path, module in model.named_modules():
        kinds = [key for key in vars(module) if key.endswith("_hooks") and key.startswith(("_forward", "_backward"))]
        count = sum(len(vars(module)[key]) for key in kinds) + ("forward" in vars(module))
        if count:
            found.append((path, count))
    return found


def _any(rng: random.Random, options: Sequence[Any]) -> Any:
    """One of the options, of a type that no annotation would let through."""
    return rng.choice(options)


def _misspelt(rng: random.Random) -> str:
    name = rng.choice(["0.resid_post", "1.z", "blocks.1.attn.hook_q", "ln_final.hook_out", "blocks.0.hook_mlp_out"])
    place = rng.randrange(1, len(name))
    return name[:place] + rng.choice("XQ#é ") + name[place + rng.randint(0, 1) :]


def _names(rng: random.Random, hm: HookManager) -> Iterator[BadCall]:
    name = _misspelt(rng)
    yield BadCall(f"read {name!r}", lambda hm: hm.run(IDS, read=[name]))
    yield BadCall(f"write {name!r}", lambda hm: hm.run(IDS, write=[Ablate(name)]))
    layer = hm.n_layers + rng.randrange(40)
    kind = rng.choice(["resid_pre", "z", "pattern", "mlp_out", "ln1.scale"])
    yield BadCall(f"read layer {layer}", lambda hm: hm.run(IDS, read=[f"{layer}.{kind}"]))
    yield BadCall(f"write layer {layer}", lambda hm: hm.run(IDS, write=[Ablate(f"{layer}.{kind}")]))
    yield BadCall("negative layer", lambda hm: hm.run(IDS, read=[f"-{1 + layer}.{kind}"]))
    thing = _any(rng, [None, 3, 1.5, b"0.z", object(), {"0.z": 1}, ["0.z"], torch.zeros(2)])
    yield BadCall(f"a {type(thing).__name__} as a site", lambda hm: hm.run(IDS, read=[thing]))
    yield BadCall(f"edit at a {type(thing).__name__}", lambda hm: hm.run(IDS, write=[Ablate(thing)]))
    text = rng.choice(["", "3", "blocks.x.hook_z", "z", "0.", ".z", "0.z.z", "blocks.0", "0..z", "0.Z", "resid_post.0"])
    yield BadCall(f"Site({text!r})", lambda hm: Site(text))
    yield BadCall(f"a glob of nothing {text!r}", lambda hm: hm.run(IDS, read=[f"*.{kind}X"]))
    yield BadCall("asking for what was not read", lambda hm: hm.run(IDS, read=["0.z"])["1.z"])
    yield BadCall("asking for nonsense", lambda hm: hm.run(IDS, read=["0.z"])[name])
    yield BadCall("stacking what was not read", lambda hm: hm.run(IDS, read=["0.z"]).stack("resid_pre"))
    yield BadCall("gradients that were not asked", lambda hm: hm.run(IDS, read=["0.z"]).grad["0.z"])
    yield BadCall("logits that were not asked", lambda hm: hm.run(IDS, read=["0.z"]).logits.shape)
    yield BadCall("weights of a layer that is not there", lambda hm: hm.weights[layer].W_Q)


def _vectors(rng: random.Random, hm: HookManager) -> Iterator[BadCall]:
    site = rng.choice(["0.resid_post", "1.resid_pre", "1.mlp_out", "0.attn_out"])
    d = hm.d_model
    bad = _any(
        rng,
        [
            torch.zeros(d + rng.choice([-1, 1, 7])),
            torch.zeros(BATCH + 1, d),
            torch.zeros(BATCH, POS + 2, d),
            torch.zeros(BATCH, POS, d, 1),
            torch.zeros(0),
            torch.zeros(d, 2),
            torch.zeros(BATCH, POS),
            torch.zeros(d, dtype=rng.choice([torch.long, torch.bool, torch.int8, torch.complex64])),
            torch.zeros(d, device="meta"),
            torch.zeros(BATCH, POS, d, device="meta"),
            np.zeros(d, dtype=np.float32),
            [0.0] * d,
            None,
            "a vector",
            3.0,
        ],
    )
    what = f"{tuple(bad.shape)} {bad.dtype} {bad.device}" if isinstance(bad, Tensor) else type(bad).__name__
    yield BadCall(f"Add {what} at {site}", lambda hm: hm.run(IDS, write=[Add(site, bad)]))
    yield BadCall(f"Replace by {what} at {site}", lambda hm: hm.run(IDS, write=[Replace(site, bad)]))
    yield BadCall(f"Project {what}", lambda hm: hm.run(IDS, write=[Project(site, _wide(bad, d))]))
    yield BadCall(f"SetProjection {what}", lambda hm: hm.run(IDS, write=[SetProjection(site, _wide(bad, d))]))
    yield BadCall(f"Affine {what}", lambda hm: hm.run(IDS, write=[Affine(site, _wide(bad, d))]))
    yield BadCall("Rotate in no plane", lambda hm: hm.run(IDS, write=[Rotate(site, torch.ones(2, d), 0.5)]))
    yield BadCall("Rotate by three", lambda hm: hm.run(IDS, write=[Rotate(site, torch.randn(3, d), 0.5)]))
    scale = _any(rng, [float("nan"), float("inf"), -float("inf"), "2", None, True, [1.0, 2.0], 1j, torch.ones(2, 2)])
    yield BadCall(f"scale {scale!r}", lambda hm: hm.run(IDS, write=[Add(site, torch.ones(d), scale=scale)]))
    rows = torch.ones(BATCH + rng.randint(1, 4))
    yield BadCall("a scale for more rows", lambda hm: hm.run(IDS, write=[Add(site, torch.ones(d), scale=rows)]))
    gone = torch.tensor([1.0, float("nan")])
    yield BadCall("a NaN scale per row", lambda hm: hm.run(IDS, write=[Add(site, torch.ones(d), scale=gone)]))
    width = hm.d_head + rng.choice([-1, 1, 3])
    yield BadCall(
        "a wrong head width", lambda hm: hm.run(IDS, write=[Add("0.z", torch.ones(width), where=Where(head=1))])
    )
    square = torch.ones(BATCH, hm.n_heads, POS, POS + rng.randint(1, 3))
    yield BadCall("a wrong pattern", lambda hm: hm.run(IDS, write=[Replace("1.pattern", square)]))
    how = _any(rng, ["Zero", "none", "", None, 0])
    yield BadCall(f"Ablate({how!r})", lambda hm: hm.run(IDS, write=[Ablate(site, how)]))
    yield BadCall("resample one row", lambda hm: hm.run(IDS[:1], write=[Ablate(site, "resample")]))
    yield BadCall("freeze no pattern", lambda hm: hm.run(IDS, write=[FreezePattern(site)]))
    yield BadCall("freeze no scale", lambda hm: hm.run(IDS, write=[FreezeScale("0.z")]))


def _wide(bad: Any, d: int) -> Any:
    """The bad value, or where its shape could be right for this edit, one of a wrong width."""
    fits = isinstance(bad, Tensor) and bad.is_floating_point() and bad.shape[-1:] == (d,)
    return torch.ones(d + 1) if fits or (isinstance(bad, Tensor) and bad.device.type == "cpu" and bad.ndim > 1) else bad


def _places(rng: random.Random, hm: HookManager) -> Iterator[BadCall]:
    site, far = rng.choice(["0.resid_post", "1.z", "1.pattern", "0.v", "1.mlp_out"]), POS + rng.randrange(50)
    wheres: list[tuple[str, Callable[[], Any]]] = [
        (f"pos={far}", lambda: Where(pos=far)),
        (f"pos=-{far + 1}", lambda: Where(pos=-far - 1)),
        (f"pos=[0, {far}]", lambda: Where(pos=[0, far])),
        ("pos=1.5", lambda: Where(pos=1.5)),
        ("pos='last'", lambda: Where(pos="last")),
        ("pos=[]", lambda: Where(pos=[])),
        ("pos=True", lambda: Where(pos=True)),
        ("pos float tensor", lambda: Where(pos=torch.ones(2))),
        ("pos tensor of other rows", lambda: Where(pos=torch.zeros(BATCH + 1, dtype=torch.long))),
        ("pos 3-D", lambda: Where(pos=torch.zeros(2, 2, 2, dtype=torch.long))),
        (f"pos={far}:", lambda: Where(pos=slice(far, far + 3))),
        (f"rows={far}", lambda: Where(rows=far)),
        ("rows=[0, -3]", lambda: Where(rows=[0, -3])),
        ("rows='all'", lambda: Where(rows="all")),
        ("mask of other shape", lambda: Where(mask=torch.ones(BATCH, far + 1, dtype=torch.bool))),
        ("mask of numbers", lambda: Where(mask=torch.ones(BATCH, POS))),
        ("mask 1-D", lambda: Where(mask=torch.ones(POS, dtype=torch.bool))),
        ("mask of nothing", lambda: Where(mask=torch.zeros(BATCH, POS, dtype=torch.bool))),
        ("mask a list", lambda: Where(mask=[True])),
        ("tokens absent", lambda: Where(tokens=0)),
        ("tokens='a'", lambda: Where(tokens="a")),
        ("name unknown", lambda: Where(name="assistant")),
        ("phase unknown", lambda: Where(phase="answer")),
        ("generated in a run", Where.generated),
        (f"head={hm.n_heads + far}", lambda: Where(head=hm.n_heads + far)),
        ("head=1.0", lambda: Where(head=1.0)),
        ("not a Where", lambda: _any(rng, [3, "all", None, slice(0, 2), {"pos": 0}])),
    ]
    text, where = rng.choice(wheres)
    yield BadCall(f"edit {site} at {text}", lambda hm: hm.run(IDS, write=[Ablate(site, where=where())]))
    yield BadCall(f"function at {text}", lambda hm: hm.run(IDS, write=[Edit(site, torch.sin, where=where())]))
    yield BadCall(f"read at {far}", lambda hm: hm.run(IDS, read=[Site(site).at(pos=far)]))
    yield BadCall("read a head too far", lambda hm: hm.run(IDS, read=[Site("0.z").at(head=hm.n_heads + far)]))
    yield BadCall("read a head of the stream", lambda hm: hm.run(IDS, read=[Site("0.resid_post").at(head=0)]))
    yield BadCall("edit a head of the stream", lambda hm: hm.run(IDS, write=[Ablate("0.mlp_out", where=Where(head=0))]))
    yield BadCall("read rows too far", lambda hm: hm.run(IDS, read=[Site("0.z").at(rows=BATCH + far)]))
    yield BadCall("keys of what has none", lambda hm: hm.run(IDS, write=[Ablate("0.z", where=Where(src=0))]))
    yield BadCall("keys too far", lambda hm: hm.run(IDS, write=[Ablate("0.pattern", where=Where(src=far))]))
    yield BadCall("an edit at a slice", lambda hm: hm.run(IDS, write=[Ablate(Site("0.z").at(pos=1))]))


def _inputs(rng: random.Random, hm: HookManager) -> Iterator[BadCall]:
    beyond = IDS.clone()
    beyond[rng.randrange(BATCH), rng.randrange(POS)] = rng.choice([-1, -100, VOCAB, VOCAB + 50, 10**9])
    bad = _any(rng, [
            [], "", [""], ["w1", ""], [[]], [[1, 2], []], None, 3, 3.5, object(), {"ids": [1]}, ["w1", 3], [[1, "w2"]],
            [[1.5, 2.0]], beyond, beyond.tolist(), IDS.float(), IDS.bool(), IDS[None], IDS[:0], IDS[:, :0],
            IDS.to("meta"), IDS.to(torch.complex64), np.zeros((2, 3)), b"w1 w2",
        ]
    )  # fmt: skip
    what = f"{tuple(bad.shape)} {bad.dtype}" if isinstance(bad, Tensor) else repr(bad)[:40]
    yield BadCall(f"run({what})", lambda hm: hm.run(bad))
    yield BadCall(f"generate({what})", lambda hm: hm.generate(bad, max_new_tokens=2))
    mask = _any(rng, [torch.ones(BATCH, POS + 1, dtype=torch.bool), torch.ones(POS, dtype=torch.bool), "left", [1, 1]])
    yield BadCall("a mask of other shape", lambda hm: hm.run(IDS, mask=mask))
    empty = torch.ones(BATCH, POS, dtype=torch.bool)
    empty[rng.randrange(BATCH)] = False
    yield BadCall("a row of pads", lambda hm: hm.run(IDS, mask=empty))
    places = _any(rng, [torch.zeros(BATCH, POS - 1, dtype=torch.long), torch.zeros(BATCH, POS), "0..5"])
    whole = torch.ones(BATCH, POS, dtype=torch.bool)
    yield BadCall("position ids that do not fit", lambda hm: hm.run(Tokens(IDS, whole, position_ids=places)))
    size = _any(rng, [0, -1, 1.5, "2", True])
    yield BadCall(f"batch_size={size!r}", lambda hm: hm.run(IDS, batch_size=size))
    logits = _any(rng, ["some", "", 3, True, ["all"]])
    yield BadCall(f"logits={logits!r}", lambda hm: hm.run(IDS, logits=logits))
    device = _any(rng, ["nowhere", "cuda:99", 3.5, ""])
    yield BadCall(f"to={device!r}", lambda hm: hm.run(IDS, read=["0.z"], to=device))
    write = _any(rng, ["0.z", ("0.z", 1), None, torch.sin, [Ablate("0.z")], {"0.z": 0}, 3, Ablate])
    yield BadCall(f"write=[{write!r:.30}]", lambda hm: hm.run(IDS, write=[write]))
    word = rng.choice(["w1 w2", "", "w1 w2 w3"])
    yield BadCall(f"to_single_token({word!r})", lambda hm: hm.to_single_token(word))
    model = _any(rng, ["no/such/folder-here", "", None, object(), 3, nn.Linear(2, 2), nn.Sequential()])
    yield BadCall(f"load({model!r:.30})", lambda hm: HookManager.load(model))
    yield BadCall("train mode", _in_train_mode)


def _in_train_mode(hm: HookManager) -> object:
    hm.model.train()
    try:
        return hm.run(IDS)
    finally:
        hm.model.eval()


class _Dictionary:
    """A dictionary that misbehaves in one way."""

    def __init__(self, fault: str) -> None:
        self.fault = fault

    def encode(self, x: Tensor) -> Tensor:
        """Latents."""
        if self.fault == "raises":
            raise MyError("encode")
        return x

    def decode(self, latents: Tensor) -> Any:
        """A reconstruction of a wrong width or type."""
        return None if self.fault == "none" else latents[..., :-1]


def _functions(rng: random.Random, hm: HookManager) -> Iterator[BadCall]:
    sites = ["0.resid_post", "1.z", "0.v", "1.ln1.scale", "embed", "1.pattern", "1.attn_scores"]
    site = rng.choice(sites)
    returns = _any(rng, [
        lambda x: None, lambda x: x[..., :-1], lambda x: x[:1, :1, None], lambda x: 3.0, lambda x: x.to("meta"),
        lambda x: x.bool(), lambda x: (x,), lambda x: x.numpy(), lambda x: "x", lambda x: x.long()]
    )  # fmt: skip
    yield BadCall(f"a function of {site} that returns nonsense", lambda hm: hm.run(IDS, write=[Edit(site, returns)]))
    kind: type[BaseException] = rng.choice(
        [MyError, ValueError, KeyError, RuntimeError, ZeroDivisionError, StopIteration, KeyboardInterrupt, SystemExit,
         AttributeError, MemoryError, AssertionError]
    )  # fmt: skip

    def fails(*_: Any) -> Any:
        raise kind("mine")

    yield BadCall(f"{kind.__name__} in {site}", lambda hm: hm.run(IDS, write=[Edit(site, fails)]), (kind,))
    read = ["1.resid_post", "1.pattern"]
    yield BadCall(f"{kind.__name__} in a metric", lambda hm: hm.run(IDS, read=read, grad=fails), (kind,))
    yield BadCall(
        f"{kind.__name__} in generate",
        lambda hm: hm.generate(IDS, max_new_tokens=2, write=[Edit(site, fails, where=Where())]),
        (kind,),
    )
    yield BadCall(f"{kind.__name__} in hooked", lambda hm: _in_hooked(hm, [Edit(site, fails)], None), (kind,))
    yield BadCall(f"{kind.__name__} in the body", lambda hm: _in_hooked(hm, [Ablate(site)], fails), (kind,))
    metric = _any(rng, [
        lambda out: 3, lambda out: None, lambda out: out.logits.detach().sum(), lambda out: out.logits[0],
        lambda out: out.logits, lambda out: torch.ones(2), lambda out: "x"]
    )  # fmt: skip
    yield BadCall("a metric that is none", lambda hm: hm.run(IDS, read=read, grad=metric))
    yield BadCall("a metric that cannot be called", lambda hm: hm.run(IDS, read=read, grad=_any(rng, [3, "sum"])))
    yield BadCall("gradients of nothing", lambda hm: hm.run(IDS, grad=lambda out: out.logits.sum()))
    yield BadCall("a function that cannot be called", lambda hm: hm.run(IDS, write=[Edit(site, _any(rng, [3, None]))]))
    fault = rng.choice(["none", "narrow"])
    yield BadCall(f"a dictionary: {fault}", lambda hm: hm.run(IDS, write=[Splice("0.resid_post", _Dictionary(fault))]))
    splice = [Splice("0.resid_post", _Dictionary("raises"))]
    yield BadCall("a dictionary that raises", lambda hm: hm.run(IDS, write=splice), (MyError,))
    yield BadCall("no dictionary", lambda hm: hm.run(IDS, write=[Splice("0.resid_post", _any(rng, [3, None, "sae"]))]))


def _in_hooked(hm: HookManager, write: list[Any], body: Callable[[], Any] | None) -> None:
    with hm.hooked(write=write):
        hm.model(IDS)
        if body is not None:
            body()


def _generation(rng: random.Random, hm: HookManager) -> Iterator[BadCall]:
    new = _any(rng, [-1, 1.5, "3", None, True, float("nan")])
    yield BadCall(f"max_new_tokens={new!r}", lambda hm: hm.generate(IDS, max_new_tokens=new))
    heat = _any(rng, [-0.5, float("nan"), "hot", float("inf")])
    yield BadCall(f"temperature={heat!r}", lambda hm: hm.generate(IDS, max_new_tokens=2, temperature=heat))
    name = _misspelt(rng)
    yield BadCall(f"generate read {name!r}", lambda hm: hm.generate(IDS, max_new_tokens=2, read=[name]))
    short = torch.ones(hm.d_model + 1)
    yield BadCall(
        "generate with a wrong width", lambda hm: hm.generate(IDS, max_new_tokens=2, write=[Add("0.resid_post", short)])
    )
    seen: list[int] = []

    def later(x: Tensor) -> Tensor:
        seen.append(1)
        if len(seen) > 2:
            raise MyError("third step")
        return x + 1

    write = [Edit("0.resid_post", later)]
    yield BadCall("an error at the third step", lambda hm: hm.generate(IDS, max_new_tokens=6, write=write), (MyError,))
    far = POS + 20 + rng.randrange(20)
    yield BadCall(
        "a position that is never reached",
        lambda hm: hm.generate(IDS, max_new_tokens=2, write=[Ablate("0.z", where=Where(pos=far))]),
    )


VICTIMS = ("GPT2", "Llama", "Gemma2", "Bloom", "Falcon", "Mixtral", "GPTNeo", "OPT")
"""The families that the bad calls are made on."""

GROUPS = (_names, _vectors, _places, _inputs, _functions, _generation)


def bad_calls(hm: HookManager, count: int, seed: int = 0) -> Iterator[BadCall]:
    """Yield `count` seeded random misuses of a manager, from every group in turn."""
    rng = random.Random(seed)
    for index in range(count):
        yield rng.choice(list(GROUPS[index % len(GROUPS)](rng, hm)))


def _verdict(bad: BadCall, hm: HookManager) -> str | None:
    try:
        bad.call(hm)
    except bad.expected as err:
        return None if bad.own or len(str(err)) > 20 else f"says only {str(err)!r}"
    except BaseException as err:  # noqa: BLE001 - whatever else comes is the finding
        return f"{type(err).__name__}: {str(err)[:200]}"
    return "nothing was raised"


def failures(name: str, count: int, seed: int) -> Iterator[str]:
    """Run `count` bad calls on one family; yield a line for each that went wrong or left a trace."""
    hm = manager(name)
    read = ["1.z", "1.resid_post"]
    want, before = hm.run(IDS, read=read, logits="all"), hooks_on(hm.model)
    for bad in bad_calls(hm, count, seed):
        if (verdict := _verdict(bad, hm)) is not None:
            yield f"{name}: {bad.text}: {verdict}"
        if hooks_on(hm.model) != before:
            yield f"{name}: {bad.text}: left hooks at {hooks_on(hm.model)}"
        again = hm.run(IDS, read=read, logits="all")
        if not all(torch.equal(a, b) for a, b in [(again.logits, want.logits), *((again[s], want[s]) for s in read)]):
            yield f"{name}: {bad.text}: the next run differs"


def main() -> int:
    """Make the bad calls, spread over the families."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    each = int(sys.argv[1]) // len(VICTIMS) if len(sys.argv) > 1 else 125
    lines = [line for seed, name in enumerate(VICTIMS) for line in failures(name, each, seed)]
    print("\n".join([*lines, f"{each * len(VICTIMS)} bad calls, {len(lines)} findings"]))
    return 1 if lines else 0


if __name__ == "__main__":
    sys.exit(main())
