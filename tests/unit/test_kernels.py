"""The sparse step against plain dense formulas: same values, same gradients, less memory, the same bytes every time."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode

from interp.core.errors import ConfigError, ShapeError
from interp.dictionaries import kernels, select
from interp.dictionaries.kernels import decode_codes
from interp.dictionaries.select import Encoder, encode_topk

NAMES = ("x", "W_enc", "b_enc", "centre", "W_dec")


def weights(token: int, d_in: int, d_sae: int, *, d_out: int | None = None, seed: int = 0) -> dict[str, Tensor]:
    """Random input and weights in float64, all wanting gradients, and what the output is read with."""
    generator = torch.Generator().manual_seed(seed)
    d_out = d_out or d_in
    shapes = {"x": (token, d_in), "W_enc": (d_in, d_sae), "b_enc": (d_sae,), "centre": (d_in,), "W_dec": (d_sae, d_out)}
    made = {name: torch.randn(shape, generator=generator, dtype=torch.float64) for name, shape in shapes.items()}
    return {name: value.requires_grad_() for name, value in made.items()}


def cast(given: dict[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    return {name: value.detach().to(dtype).requires_grad_() for name, value in given.items()}


def encode(
    given: dict[str, Tensor], k: int, scale: Tensor | None = None, **dead: Any
) -> tuple[kernels.Codes, kernels.Codes | None]:
    score = None if scale is None else lambda pre, _: pre * scale
    encoder = Encoder(given["W_enc"], given["b_enc"], given["centre"], score=score, **dead)
    return encode_topk(given["x"], encoder, k=k)


def sparse(given: dict[str, Tensor], k: int, **more: Any) -> Tensor:
    codes, _ = encode(given, k, **more)
    return decode_codes(codes.values.relu(), codes, given["W_dec"])


def dense(given: dict[str, Tensor], k: int, scale: Tensor | None = None, allowed: Tensor | None = None) -> Tensor:
    """The same by matrices alone: a mask, from sorting each row, times the pre-activations."""
    pre = (given["x"] - given["centre"]) @ given["W_enc"] + given["b_enc"]
    score = pre.detach() if scale is None else pre.detach() * scale
    score = score if allowed is None else score.masked_fill(~allowed, -torch.inf)
    kept = score >= score.sort(dim=-1, descending=True).values[:, k - 1 : k]
    kept = kept if allowed is None else kept & allowed
    return (pre * kept).relu() @ given["W_dec"]


def gradients(out: Tensor, given: dict[str, Tensor]) -> dict[str, Tensor]:
    """Of the squared distance from a fixed point."""
    goal = torch.linspace(-1, 1, out.numel(), dtype=torch.float64).view_as(out).to(out.dtype)
    found = torch.autograd.grad((out - goal).pow(2).sum(), [given[name] for name in NAMES])
    return dict(zip(NAMES, found, strict=True))


def off(ours: Tensor, reference: Tensor) -> float:
    """The distance of two tensors relative to the second."""
    ours, reference = ours.detach().double(), reference.detach().double()
    return float((ours - reference).norm() / reference.norm().clamp_min(1e-300))


SHAPES = [
    pytest.param(64, 12, 40, 4, id="plain"),
    pytest.param(1, 12, 40, 4, id="one token"),
    pytest.param(64, 12, 40, 40, id="every latent"),
    pytest.param(64, 12, 40, 1, id="one latent"),
    pytest.param(5, 3, 700, 30, id="more latents than a chunk of the encoder's gradient"),
    pytest.param(200, 16, 8, 3, id="fewer latents than dimensions"),
]


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-13), (torch.float32, 1e-6)])
@pytest.mark.parametrize(("token", "d_in", "d_sae", "k"), SHAPES)
@pytest.mark.parametrize("scaled", [False, True])
def test_output_and_every_gradient_are_those_of_the_dense_formula(
    token: int, d_in: int, d_sae: int, k: int, dtype: torch.dtype, bound: float, scaled: bool
) -> None:
    exact = weights(token, d_in, d_sae, d_out=d_in + 1)
    given = cast(exact, dtype)
    scale = torch.linspace(0.2, 3, d_sae, dtype=torch.float64) if scaled else None
    ours = sparse(given, k, scale=None if scale is None else scale.to(dtype))
    reference = dense(exact, k, scale)
    assert off(ours, reference) <= bound
    expected = gradients(reference, exact)
    for name, found in gradients(ours, given).items():
        assert found.shape == expected[name].shape and off(found, expected[name]) <= bound, name


def test_gradients_are_the_slopes_of_the_function() -> None:
    given = weights(6, 4, 9, d_out=5)

    def function(*args: Tensor) -> Tensor:
        return sparse(dict(zip(NAMES, args, strict=True)), 3)

    assert torch.autograd.gradcheck(function, [given[name] for name in NAMES])


def test_values_have_gradients_of_their_own() -> None:
    given = weights(16, 6, 20)
    codes, _ = encode(given, 3)
    pre = (given["x"] - given["centre"]) @ given["W_enc"] + given["b_enc"]
    wanted = [given[name] for name in NAMES[:4]]
    ours = torch.autograd.grad(codes.values.pow(3).sum(), wanted)
    expected = torch.autograd.grad(pre.gather(-1, codes.index).pow(3).sum(), wanted)
    assert max(off(mine, theirs) for mine, theirs in zip(ours, expected, strict=True)) <= 1e-13


def test_the_gradient_of_the_centre_does_not_lose_digits_over_many_latents() -> None:
    given = cast(weights(32, 16, 49152), torch.float32)
    codes, _ = encode(given, 1500)
    pull = torch.randn_like(codes.values)
    bias, centre = torch.autograd.grad((codes.values * pull).sum(), [given["b_enc"], given["centre"]])
    # One long float32 sum is off by more than 1e-6 here.
    assert off(centre, -(given["W_enc"].double() @ bias.double())) <= 5e-7


def test_only_what_wants_a_gradient_gets_one() -> None:
    given = weights(16, 6, 20)
    expected = gradients(dense(given, 3), given)
    for name in NAMES:
        alone = {other: value.detach() for other, value in given.items()}
        alone[name].requires_grad_()
        out = sparse(alone, 3)
        goal = torch.linspace(-1, 1, out.numel(), dtype=torch.float64).view_as(out)
        (out - goal).pow(2).sum().backward()
        grad = alone[name].grad
        assert grad is not None and off(grad, expected[name]) <= 1e-13
        assert all(value.grad is None for other, value in alone.items() if other != name)


def test_an_orthonormal_dictionary_gives_back_what_was_planted_and_no_gradient_to_latents_at_rest() -> None:
    given = weights(50, 16, 16)
    rows, _ = torch.linalg.qr(given["W_dec"].detach())
    planted = torch.zeros(50, 16, dtype=torch.float64)
    planted.scatter_(1, torch.rand(50, 12).topk(3).indices, 1 + torch.rand(50, 3, dtype=torch.float64))
    given |= {"W_dec": rows.requires_grad_(), "W_enc": rows.detach().T.clone().requires_grad_()}
    given |= {"b_enc": torch.zeros(16, dtype=torch.float64).requires_grad_()}
    given["x"] = (planted @ rows + given["centre"]).detach().requires_grad_()
    codes, _ = encode(given, 3)
    assert torch.equal(codes.index.sort().values, (planted > 0).nonzero()[:, 1].view(50, 3))
    out = sparse(given, 3)
    torch.testing.assert_close(out + given["centre"], given["x"])
    found = gradients(out, given)
    resting = torch.arange(16) >= 12
    for grad in (found["W_enc"].T, found["b_enc"], found["W_dec"]):
        assert bool((grad[resting] == 0).all()) and bool((grad[~resting] != 0).any())


def test_renaming_latents_and_reordering_tokens_changes_nothing_else() -> None:
    given = weights(30, 6, 20)
    latents, tokens = torch.randperm(20), torch.randperm(30)
    moved = {
        "x": given["x"][tokens],
        "W_enc": given["W_enc"][:, latents],
        "b_enc": given["b_enc"][latents],
        "centre": given["centre"],
        "W_dec": given["W_dec"][latents],
    }
    moved = cast(moved, torch.float64)
    out, other = sparse(given, 4), sparse(moved, 4)
    torch.testing.assert_close(other, out[tokens])
    expected = torch.autograd.grad(out.pow(2).sum(), [given[name] for name in NAMES])
    found = torch.autograd.grad(other.pow(2).sum(), [moved[name] for name in NAMES])
    picked = (expected[0][tokens], expected[1][:, latents], expected[2][latents], expected[3], expected[4][latents])
    assert max(off(mine, theirs) for mine, theirs in zip(found, picked, strict=True)) <= 1e-12


@pytest.mark.parametrize("n_dead", [0, 2, 5, 20])
def test_a_second_choice_is_made_among_dead_latents(n_dead: int) -> None:
    given, dead = weights(32, 6, 20), torch.arange(20) % 20 < n_dead

    def encoded() -> tuple[kernels.Codes, kernels.Codes]:
        codes, revived = encode(given, 3, dead=dead, k_dead=5)
        assert revived is not None
        return codes, revived

    codes, revived = encoded()
    assert torch.equal(codes.values, sparse_values(given, 3))
    found = decode_codes(revived.values.relu(), revived, given["W_dec"])
    reference = dense(given, 5, allowed=dead)
    torch.testing.assert_close(found, reference, rtol=1e-12, atol=1e-12)
    expected = gradients(reference, given)
    for name, grad in gradients(found, given).items():
        torch.testing.assert_close(grad, expected[name], rtol=1e-11, atol=1e-11, msg=name)
    # Where fewer are dead, what fills the places is 0 and moves no living latent.
    assert int((revived.values != 0).sum(-1).max()) == min(n_dead, 5)
    (pushed,) = torch.autograd.grad((encoded()[1].values * 7).sum(), given["b_enc"])
    assert bool((pushed[~dead] == 0).all()) and int(pushed.sum()) == 7 * 32 * min(n_dead, 5)


def sparse_values(given: dict[str, Tensor], k: int) -> Tensor:
    return encode(given, k)[0].values


def test_no_tokens_give_no_codes_and_zero_gradients() -> None:
    given = weights(0, 6, 20)
    out = sparse(given, 3)
    assert out.shape == (0, 6)
    assert all(bool((grad == 0).all()) for grad in torch.autograd.grad(out.sum(), [given[name] for name in NAMES]))


class _Largest(TorchDispatchMode):
    """The most elements that an operation gave while this was on."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for one in out if isinstance(out, tuple | list) else [out]:
            if isinstance(one, Tensor):
                self.elements = max(self.elements, one.numel())
        return out


def test_memory_does_not_grow_with_tokens_times_latents(monkeypatch: pytest.MonkeyPatch) -> None:
    given, dead = weights(300, 8, 400), torch.arange(400) < 90
    more: dict[str, Any] = {"dead": dead, "k_dead": 4, "scale": torch.ones(400, dtype=torch.float64)}
    at_once = gradients(sparse(given, 4, **more), given)
    monkeypatch.setattr(select, "_CHUNK_BYTES", {"cpu": 7 * 400 * 8})
    with _Largest() as largest:
        in_chunks = gradients(sparse(given, 4, **more), given)
    # The weights (8 · 400) and the entries' rows, but 120 000 pre-activations at no time.
    assert largest.elements <= 8 * 400
    with _Largest() as teeth:
        dense(given, 4)
    assert teeth.elements >= 300 * 400
    assert max(off(in_chunks[name], at_once[name]) for name in NAMES) <= 1e-12


def test_nothing_as_large_as_the_pre_activations_waits_for_the_gradient() -> None:
    given = weights(300, 8, 400)

    def kept(function: Callable[[], Tensor]) -> int:
        sizes: list[int] = []
        with saved_tensors_hooks(lambda t: sizes.append(t.numel()) or t, lambda t: t):  # type: ignore[func-returns-value]
            function()
        return max(sizes)

    assert kept(lambda: sparse(given, 4)) <= 8 * 400
    assert kept(lambda: dense(given, 4)) >= 300 * 400


@pytest.fixture
def only_deterministic() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def both_choices(given: dict[str, Tensor], dead: Tensor) -> list[Tensor]:
    codes, revived = encode(given, 4, dead=dead, k_dead=9)
    assert revived is not None
    out = decode_codes(codes.values.relu(), codes, given["W_dec"])
    out = out + decode_codes(revived.values, revived, given["W_dec"])
    return [out, *torch.autograd.grad(out.pow(2).sum(), [given[name] for name in NAMES])]


@pytest.mark.usefixtures("only_deterministic")
def test_the_same_input_gives_the_same_bytes() -> None:
    given, dead = cast(weights(500, 24, 300), torch.float32), torch.arange(300) < 40
    first, second = both_choices(given, dead), both_choices(given, dead)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.gpu
@pytest.mark.usefixtures("only_deterministic")
def test_a_gpu_gives_the_same_without_waiting_for_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    exact, dead = weights(500, 24, 300), torch.arange(300) < 40
    given = {name: value.detach().cuda().requires_grad_() for name, value in exact.items()}
    expected = both_choices(exact, dead)
    dead = dead.cuda()
    first = both_choices(given, dead)
    torch.cuda.set_sync_debug_mode("error")
    try:
        second = both_choices(given, dead)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert max(off(a.cpu(), b) for a, b in zip(first, expected, strict=True)) <= 1e-12


@pytest.mark.usefixtures("unchecked")
def test_what_cannot_be_encoded_is_refused() -> None:
    given = weights(5, 6, 20)
    encoder = Encoder(given["W_enc"], given["b_enc"])
    with pytest.raises(ShapeError, match=r"shape \(5, 7\) for an encoder of d_in 6"):
        encode_topk(torch.zeros(5, 7), encoder, k=3)
    with pytest.raises(ShapeError, match=r"give \[token 6\]"):
        encode_topk(torch.zeros(2, 5, 6), encoder, k=3)
    for k in (0, 21):
        with pytest.raises(ConfigError, match=rf"k is {k} for 20 latents"):
            encode(given, k)
    for k_dead in (0, 21):
        with pytest.raises(ConfigError, match=rf"k_dead is {k_dead} for 20 latents"):
            encode(given, 3, dead=torch.ones(20, dtype=torch.bool), k_dead=k_dead)
