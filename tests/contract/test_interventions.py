"""Every intervention against its closed form: what a read-back of the site gives, and what the logits become."""

import dataclasses
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from interp.core.errors import DataError, InterpError, ShapeError, SiteError, WhereError
from interp.core.intervention import (
    Ablate,
    Add,
    Affine,
    Edit,
    FreezePattern,
    FreezeScale,
    Intervention,
    Project,
    Replace,
    Rotate,
    SetProjection,
    Splice,
)
from interp.core.run import Run
from interp.core.where import Where
from tests.contract import plain
from tests.contract.laws import largest
from tests.contract.laws_edits import noise
from tests.families import make, manager, paddings, tokens

SITE, ROWS, POS, D = "0.resid_post", 3, 9, 32
TOLERANCE = 2e-5
families = pytest.mark.parametrize("name", ["GPT2", "Gemma2", "Llama"])
LINES = noise((3, D), seed=21)
"""Three directions that are neither orthogonal nor of unit length."""
UNIT = LINES[0] / LINES[0].norm()
SCALES = torch.tensor([2.0, -1.0, 0.5])
MATRIX, BIAS = noise((D, D), seed=22) / D**0.5, noise((D,), seed=23)


class Coder:
    """A dictionary with ReLU latents, of numbers that nothing was fitted to."""

    def __init__(self, width: int = D) -> None:
        self.W_enc, self.W_dec = noise((width, 2 * width), seed=31) / width**0.5, noise((2 * width, width), seed=32)
        self.b_dec = noise((width,), seed=33)

    def encode(self, x: Tensor) -> Tensor:
        """Latents [… 2·width]."""
        return ((x - self.b_dec) @ self.W_enc).relu()

    def decode(self, z: Tensor) -> Tensor:
        """Reconstruction [… width]."""
        return z @ self.W_dec + self.b_dec


CODER = Coder()


def turned(x: Tensor, angle: float | Tensor) -> Tensor:
    """The rotation of the plane of LINES[:2], as the exponential of its generator."""
    second = LINES[1] - (LINES[1] @ UNIT) * UNIT
    second = second / second.norm()
    generator = torch.outer(second, UNIT) - torch.outer(UNIT, second)
    angles = torch.as_tensor(angle).expand(ROWS)
    return torch.stack([row @ torch.matrix_exp(a * generator).T for row, a in zip(x, angles, strict=True)])


def without(x: Tensor, lines: Tensor) -> Tensor:
    """x without the span of the lines, by the pseudo-inverse."""
    return x - x @ (torch.linalg.pinv(lines) @ lines)


def dropped(z: Tensor) -> Tensor:
    """Edited latents, in a new tensor."""
    return torch.where(torch.arange(z.shape[-1]) % 3 == 0, torch.zeros(()), 2.0 * z)


Case = Callable[[Tensor, Tensor], tuple[Intervention, Tensor]]
"""From the clean activation and the selection: an edit, and by hand what it makes of the whole activation."""
CASES: dict[str, Case] = {
    "add": lambda x, on: (Add(SITE, BIAS, scale=-1.5), x - 1.5 * BIAS),
    "add, a scale per row": lambda x, on: (Add(SITE, BIAS, scale=SCALES), x + SCALES[:, None, None] * BIAS),
    "add, a vector per row": lambda x, on: (Add(SITE, LINES), x + LINES[:, None]),
    "add, a vector per position": lambda x, on: (Add(SITE, 0.5 * x.flip(0), scale=2.0), x + x.flip(0)),
    "replace": lambda x, on: (Replace(SITE, BIAS), BIAS.expand_as(x)),
    "replace by what was read": lambda x, on: (Replace(SITE, x.flip(1)), x.flip(1)),
    "zero": lambda x, on: (Ablate(SITE), torch.zeros_like(x)),
    "mean": lambda x, on: (Ablate(SITE, "mean"), x[on].mean(0).expand_as(x)),
    "project a line": lambda x, on: (Project(SITE, LINES[0]), x - (x @ UNIT)[..., None] * UNIT),
    "project three lines": lambda x, on: (Project(SITE, LINES), without(x, LINES)),
    "set": lambda x, on: (SetProjection(SITE, LINES[0], 3.0), x + (3.0 - x @ UNIT)[..., None] * UNIT),
    "set per row": lambda x, on: (
        SetProjection(SITE, LINES[0], SCALES),
        x + (SCALES[:, None] - x @ UNIT)[..., None] * UNIT,
    ),
    "affine, diagonal": lambda x, on: (Affine(SITE, BIAS), x * BIAS),
    "affine, matrix": lambda x, on: (Affine(SITE, MATRIX), torch.einsum("bpi,ij->bpj", x, MATRIX)),
    "affine, bias": lambda x, on: (Affine(SITE, MATRIX, BIAS), torch.einsum("bpi,ij->bpj", x, MATRIX) + BIAS),
    "rotate": lambda x, on: (Rotate(SITE, LINES[:2], 0.7), turned(x, 0.7)),
    "rotate per row": lambda x, on: (Rotate(SITE, LINES[:2], SCALES), turned(x, SCALES)),
    "splice": lambda x, on: (Splice(SITE, CODER), CODER.decode(CODER.encode(x))),
    "splice, edited": lambda x, on: (Splice(SITE, CODER, latents=dropped), CODER.decode(dropped(CODER.encode(x)))),
    "splice, edited beside its error": lambda x, on: (
        Splice(SITE, CODER, keep_error=True, latents=dropped),
        x + (dropped(CODER.encode(x)) - CODER.encode(x)) @ CODER.W_dec,
    ),
    "edit": lambda x, on: (Edit(SITE, lambda y: y.tanh()), x.tanh()),
    "edit in place": lambda x, on: (Edit(SITE, lambda y: y.mul_(2.0)), 2.0 * x),
}


def ran(name: str, write: list[Intervention], *, read: list[str] | None = None, **options: Any) -> Run:
    """Read-back and logits of three rows under edits."""
    ids = options.pop("ids", tokens(ROWS, POS))
    return manager(name).run(ids, read=read or [SITE], write=write, logits="all", **options)


def quietly(name: str, write: list[Intervention]) -> Run:
    """The same where changing nothing is what is being tested."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*changed nothing")
        return ran(name, write)


def held(name: str, case: str, on: Tensor, where: Where, ids: Tensor, mask: Tensor | None) -> None:
    """Assert that a case's read-back and logits are those of the same edit made by hand where it is on."""
    x = ran(name, [], ids=ids, mask=mask)[SITE]
    made, everywhere = CASES[case](x, on)
    edit: Any = made  # the base class does not know the fields of the others
    want = torch.where(on[..., None], everywhere, x)
    got = ran(name, [dataclasses.replace(edit, where=where)], ids=ids, mask=mask)
    by_hand = plain.run(name, make(name), ids, write={("resid_post", 0): lambda _: want}, mask=mask)
    real = torch.ones_like(on) if mask is None else mask
    assert largest(want, x) > 0.1
    assert largest(got[SITE], want) <= TOLERANCE
    assert torch.equal(got[SITE][~on], x[~on])
    assert largest(got.logits[real], by_hand.logits[real]) <= TOLERANCE


@families
@pytest.mark.parametrize("case", list(CASES))
def test_an_edit_is_its_closed_form_in_the_read_back_and_in_the_logits(name: str, case: str) -> None:
    held(name, case, torch.ones(ROWS, POS, dtype=torch.bool), Where(), tokens(ROWS, POS), None)


@pytest.mark.parametrize("case", list(CASES))
def test_an_edit_at_some_rows_and_positions_is_its_closed_form_there_and_nothing_elsewhere(case: str) -> None:
    on = torch.zeros(ROWS, POS, dtype=torch.bool)
    on[1, [2, POS - 1]] = True
    held("Llama", case, on, Where(rows=1, pos=[2, -1]), tokens(ROWS, POS), None)


@pytest.mark.parametrize("case", list(CASES))
@pytest.mark.parametrize("side", [0, 1], ids=["left", "right"])
def test_an_edit_of_a_padded_batch_leaves_the_pads_alone_and_out_of_its_mean(case: str, side: int) -> None:
    _, ids, mask = list(paddings(tokens(ROWS, POS)))[side]
    held("GPT2", case, mask, Where(), ids, mask)


def test_values_per_selected_position_and_for_one_head_land_where_they_belong() -> None:
    values, x = noise((ROWS, 2, D)), ran("Llama", [], read=[SITE, "1.z"])
    got = ran("Llama", [Add(SITE, values, where=Where(pos=[1, -1]))])[SITE]
    assert largest(got[:, [1, POS - 1]], x[SITE][:, [1, POS - 1]] + values) <= TOLERANCE
    at_head = noise((2, 8))
    edits: list[Intervention] = [
        Project("1.z", at_head, where=Where(head=1)),
        Add("1.z", BIAS[:8], where=Where(head=3)),
    ]
    got = ran("Llama", edits, read=["1.z"])["1.z"]
    want = x["1.z"].clone()
    want[:, :, 1] = without(want[:, :, 1], at_head)
    want[:, :, 3] += BIAS[:8]
    assert largest(got, want) <= TOLERANCE


def test_a_run_stands_for_the_value_at_the_edits_own_site() -> None:
    read = ["0.mlp_out", "1.mlp_out"]
    other = ran("Gemma2", [], read=read, ids=tokens(ROWS, POS, seed=5))
    got = ran("Gemma2", [Replace("*.mlp_out", other)], read=read)
    assert all(torch.equal(got[site], other[site]) for site in read)
    with pytest.raises(SiteError, match=r"0\.z was not read"):
        ran("Gemma2", [Replace("0.z", other)])


def test_resampling_gives_every_row_to_another_one_as_its_seed_says() -> None:
    x, orders = ran("Llama", [], ids=tokens(5, POS))[SITE], []
    for seed in (0, 0, 1, 2, 3):
        got = ran("Llama", [Ablate(SITE, "resample", seed=seed)], ids=tokens(5, POS))[SITE]
        order = [next(j for j in range(5) if torch.equal(row, x[j])) for row in got]
        assert sorted(order) == list(range(5))
        assert all(i != j for i, j in enumerate(order))
        orders.append(order)
    assert orders[0] == orders[1]
    assert len({tuple(order) for order in orders}) > 1


def test_resampling_a_padded_batch_would_mix_pads_with_tokens_and_is_refused() -> None:
    for _, ids, mask in paddings(tokens(ROWS, POS)):
        with pytest.raises(WhereError, match="rows of one length"):
            ran("Llama", [Ablate(SITE, "resample")], ids=ids, mask=mask)


@families
def test_projecting_is_idempotent_and_leaves_nothing_along_any_of_its_directions(name: str) -> None:
    once = quietly(name, [Project(SITE, LINES)])[SITE]
    twice = quietly(name, [Project(SITE, LINES), Project(SITE, LINES)])[SITE]
    assert largest(once, twice) <= TOLERANCE
    assert float((once @ LINES.T).abs().max()) <= 1e-4
    assert float((ran(name, [])[SITE] @ LINES.T).abs().max()) > 1


@pytest.mark.parametrize("lines", [LINES[[0, 0]], torch.stack([LINES[0], LINES[1], LINES[0] - 2 * LINES[1]])])
def test_directions_that_depend_on_each_other_remove_their_span_and_no_more(lines: Tensor) -> None:
    got = ran("Llama", [Project(SITE, lines)])[SITE]
    assert largest(got, without(ran("Llama", [])[SITE], lines)) <= TOLERANCE


def test_rotations_keep_norms_add_their_angles_and_turn_the_first_vector_to_the_second() -> None:
    def at(*angles: float) -> Tensor:
        return quietly("Llama", [Rotate(SITE, LINES[:2], angle) for angle in angles])[SITE]

    x = ran("Llama", [])[SITE]
    assert torch.equal(at(0.0), x)
    assert largest(at(1.1).norm(dim=-1), x.norm(dim=-1)) <= TOLERANCE
    assert largest(at(0.4, 0.9), at(1.3)) <= TOLERANCE
    assert largest(at(0.8, -0.8), x) <= TOLERANCE
    along = [Replace(SITE, LINES[0]), Rotate(SITE, LINES[:2], torch.pi / 2)]
    got, second = ran("Llama", along)[SITE], LINES[1] - (LINES[1] @ UNIT) * UNIT
    assert largest(got, (LINES[0].norm() * second / second.norm()).expand_as(got)) <= TOLERANCE


def test_a_splice_that_keeps_its_error_changes_nothing_until_a_latent_is_edited() -> None:
    x = ran("Llama", [])
    got = quietly("Llama", [Splice(SITE, CODER, keep_error=True)])
    assert torch.equal(got[SITE], x[SITE]) and torch.equal(got.logits, x.logits)
    same = quietly("Llama", [Splice(SITE, CODER, keep_error=True, latents=torch.clone)])
    assert torch.equal(same[SITE], x[SITE])


def test_latents_may_be_edited_in_place() -> None:
    def set_one(z: Tensor) -> Tensor:
        z[..., 3] = 5.0
        return z

    x = ran("Llama", [])[SITE]
    got = quietly("Llama", [Splice(SITE, CODER, keep_error=True, latents=set_one)])[SITE]
    change = (5.0 - CODER.encode(x)[..., 3])[..., None] * CODER.W_dec[3]
    assert largest(got, x + change) <= TOLERANCE


def test_a_function_that_works_in_place_reaches_neither_beyond_where_nor_into_other_reads() -> None:
    kept: list[Tensor] = []

    def scramble(y: Tensor) -> Tensor:
        kept.append(y.fill_(7.0))
        return y

    clean = ran("Bloom", [], read=["0.resid_post", "1.resid_pre", "0.mlp_out"])
    write: list[Intervention] = [Edit("0.resid_post", scramble, where=Where(rows=0, pos=3))]
    got = ran("Bloom", write, read=["0.resid_post", "1.resid_pre", "0.mlp_out"])
    assert torch.equal(got["0.mlp_out"], clean["0.mlp_out"])
    for site in ("0.resid_post", "1.resid_pre"):
        assert bool((got[site][0, 3] == 7.0).all())
        assert torch.equal(got[site][1:], clean[site][1:]) and torch.equal(got[site][0, :3], clean[site][0, :3])
    kept[0].zero_()  # the user's own tensor: nothing of the run may change with it
    assert bool((got["0.resid_post"][0, 3] == 7.0).all())


# -- frozen patterns ----------------------------------------------------------------------------------------------


def _metric(logits: Tensor) -> Tensor:
    return logits[:, -1, 5] - 0.5 * logits[:, -2, 7]


def _with_patterns(name: str, ids: Tensor, patterns: list[Tensor]) -> plain.PlainRun:
    """The plain model with z = pattern @ v in every layer, v its own: logits, and gradients at the embeddings."""
    heads, seen = plain.heads_of(name), {}

    def write(layer: int) -> dict[tuple[str, int], plain.EditFn]:
        def keep(v: Tensor) -> Tensor:
            seen[layer] = v.repeat_interleave(heads.n // heads.kv, dim=2)
            return v

        return {
            ("v", layer): keep,
            ("z", layer): lambda _: torch.einsum("bhqk,bkhd->bqhd", patterns[layer], seen[layer]),
        }

    edits = {key: edit for layer in range(len(patterns)) for key, edit in write(layer).items()}
    return plain.run(
        name, make(name), ids, read=[("resid_pre", 0)], write=edits, metric=lambda logits: _metric(logits).sum()
    )


def _at_the_start(name: str, write: list[Intervention]) -> Tensor:
    out = manager(name).run(tokens(ROWS, POS), read=["0.resid_pre"], write=write, grad=lambda out: _metric(out.logits))
    return out.grad["0.resid_pre"]


PATTERNED = pytest.mark.parametrize("name", ["GPT2", "Gemma2", "Llama", "Bloom"])


@PATTERNED
def test_patterns_of_another_run_move_the_values_of_this_one(name: str) -> None:
    other = ran(name, [], read=["*.pattern"], ids=tokens(ROWS, POS, seed=5))
    got = ran(name, [FreezePattern(value=other)], read=["*.pattern"])
    assert torch.equal(got.stack("pattern"), other.stack("pattern"))
    want = _with_patterns(name, tokens(ROWS, POS), list(other.stack("pattern")))
    assert largest(got.logits, want.logits) <= TOLERANCE * 5
    assert largest(got.logits, ran(name, []).logits) > 0.05
    one = ran(name, [FreezePattern("1.pattern", other["1.pattern"])], read=["0.pattern", "1.pattern"])
    assert torch.equal(one["1.pattern"], other["1.pattern"])
    assert largest(one["0.pattern"], ran(name, [], read=["0.pattern"])["0.pattern"]) <= TOLERANCE


@PATTERNED
def test_frozen_patterns_are_constants_of_the_backward_pass(name: str) -> None:
    patterns = list(ran(name, [], read=["*.pattern"]).stack("pattern"))
    want = _with_patterns(name, tokens(ROWS, POS), patterns).grads["resid_pre", 0]
    frozen, free = _at_the_start(name, [FreezePattern("*.pattern")]), _at_the_start(name, [])
    size = float(want.abs().max())
    assert largest(frozen / size, want / size) <= TOLERANCE * 5
    assert largest(free / size, want / size) > 0.01


def test_what_freezing_a_layer_takes_from_the_gradient_is_the_sum_over_its_heads() -> None:
    free = _at_the_start("Llama", [])
    layer = free - _at_the_start("Llama", [FreezePattern("1.pattern")])
    heads = [free - _at_the_start("Llama", [FreezePattern("1.pattern", where=Where(head=h))]) for h in range(4)]
    assert largest(torch.stack(heads).sum(0), layer) <= 1e-4 * float(free.abs().max())
    assert min(float(part.abs().max()) for part in heads) > 1e-3


# -- frozen scales ------------------------------------------------------------------------------------------------


def _norms(model: nn.Module) -> dict[str, nn.Module]:
    return {path: m for path, m in model.named_modules() if type(m).__name__.endswith(("LayerNorm", "RMSNorm"))}


def _held_scale(module: Any, x: Tensor, scale: Tensor | None) -> tuple[Tensor, Tensor]:
    """The output of LayerNorm, RMSNorm or Gemma's RMSNorm with σ a constant, and that σ."""
    centred = x - x.mean(-1, keepdim=True) if isinstance(module, nn.LayerNorm) else x
    eps = getattr(module, "variance_epsilon", None) or module.eps
    sigma = (centred.pow(2).mean(-1, keepdim=True) + eps).sqrt().detach() if scale is None else scale
    gain = module.weight + 1.0 if "Gemma" in type(module).__name__ else module.weight
    return centred / sigma * gain + (getattr(module, "bias", None) if hasattr(module, "bias") else 0.0), sigma


def _plain_held(name: str, paths: list[str], scale: Tensor | None = None) -> plain.PlainRun:
    """The plain model with the σ of some norms held; logits, and gradients at the embeddings."""
    model = make(name)
    for path in paths:
        model.get_submodule(path).register_forward_hook(lambda m, args, out: _held_scale(m, args[0], scale)[0])
    return plain.run(
        name, model, tokens(ROWS, POS), read=[("resid_pre", 0)], metric=lambda logits: _metric(logits).sum()
    )


FINAL = {"GPT2": "transformer.ln_f", "Gemma2": "model.norm", "Llama": "model.norm"}


@families
@pytest.mark.parametrize("which", ["*.scale", "ln_final.scale"])
def test_frozen_scales_are_constants_of_the_backward_pass(name: str, which: str) -> None:
    paths = [FINAL[name]] if which == "ln_final.scale" else list(_norms(make(name)))
    want = _plain_held(name, paths)
    out = manager(name).run(
        tokens(ROWS, POS), read=["0.resid_pre"], write=[FreezeScale(which)], grad=lambda out: _metric(out.logits)
    )
    size = float(want.grads["resid_pre", 0].abs().max())
    assert len(paths) == 1 or len(paths) >= 2 * manager(name).n_layers + 1
    assert largest(out.logits, want.logits) <= TOLERANCE * 5
    assert largest(out.grad["0.resid_pre"] / size, want.grads["resid_pre", 0] / size) <= TOLERANCE * 5
    assert largest(_at_the_start(name, []) / size, want.grads["resid_pre", 0] / size) > 0.005


@families
def test_the_scale_of_another_run_divides_this_ones_stream(name: str) -> None:
    other = ran(name, [], read=["*.scale"], ids=tokens(ROWS, POS, seed=5))
    write: list[Intervention] = [FreezeScale("ln_final.scale", other)]
    got = ran(name, write, read=["ln_final.scale"])
    assert torch.equal(got["ln_final.scale"], other["ln_final.scale"])
    want = _plain_held(name, [FINAL[name]], other["ln_final.scale"])
    assert largest(got.logits, want.logits) <= TOLERANCE * 5
    every = ran(name, [FreezeScale(value=other)], read=["*.scale"])
    assert all(torch.equal(every[site], other[site]) for site in other.sites)
    assert len(other.sites) == len(_norms(make(name)))


# -- refusals -----------------------------------------------------------------------------------------------------

ANY: list[Any] = [BIAS, 3, lambda y: None]
"""Arguments of types that no annotation lets through."""
NAN, HOLE = torch.full((D,), torch.nan), torch.zeros(2, D)
AT_ONCE: dict[str, tuple[Callable[[], Any], str]] = {
    "add nothing": (lambda: Add(SITE, torch.zeros(0)), r"Add\(vector=…\) is empty: \(0,\)"),
    "add a list": (lambda: Add(SITE, [1.0]), r"Add\(vector=…\) needs a tensor, got list"),
    "add integers": (lambda: Add(SITE, torch.ones(D, dtype=torch.long)), r"floating-point tensor, got torch.int64"),
    "add NaN": (lambda: Add(SITE, NAN), r"Add\(vector=…\) holds NaN"),
    "add from nowhere": (lambda: Add(SITE, torch.ones(D, device="meta")), r"meta device"),
    "a NaN scale": (lambda: Add(SITE, BIAS, scale=float("nan")), r"Add\(scale=nan\): expected a finite number"),
    "a scale of two axes": (lambda: Add(SITE, BIAS, scale=torch.ones(2, 2)), r"got shape \(2, 2\)"),
    "an infinite scale per row": (lambda: Add(SITE, BIAS, scale=SCALES / 0), r"Add\(scale=…\) holds NaN or infinity"),
    "replace by NaN": (lambda: Replace(SITE, NAN), r"Replace\(value=…\) holds NaN"),
    "project NaN": (lambda: Project(SITE, NAN), r"Project\(directions=…\) holds NaN"),
    "project three axes": (lambda: Project(SITE, torch.ones(1, 1, D)), r"needs \[d\] or \[k, d\], got \(1, 1, 32\)"),
    "project a zero": (lambda: Project(SITE, HOLE), r"zero vector"),
    "set along two": (lambda: SetProjection(SITE, LINES), r"non-zero vector \[d\], got \(3, 32\)"),
    "set along zero": (lambda: SetProjection(SITE, HOLE[0]), r"non-zero vector \[d\], got \(32,\)"),
    "an oblong matrix": (lambda: Affine(SITE, torch.ones(D, 4)), r"needs \[d, d\] or a diagonal \[d\], got \(32, 4\)"),
    "an infinite bias": (lambda: Affine(SITE, MATRIX, BIAS / 0), r"Affine\(bias=…\) holds NaN or infinity"),
    "three vectors of a plane": (lambda: Rotate(SITE, LINES, 1.0), r"two vectors \[2, d\], got \(3, 32\)"),
    "a flat plane": (lambda: Rotate(SITE, LINES[[0, 0]], 1.0), r"parallel"),
    "ablate by median": (lambda: Ablate(SITE, "median"), r"how='median'\): expected 'zero', 'mean' or 'resample'"),
    "splice a tensor": (lambda: Splice(SITE, BIAS), r"Tensor lacks \['encode', 'decode'\]"),
    "edit by a tensor": (lambda: Edit(SITE, ANY[0]), r"Edit needs a function of the activation, got Tensor"),
    "freeze NaN": (lambda: FreezePattern("0.pattern", NAN), r"FreezePattern\(value=…\) holds NaN"),
    "freeze an empty scale": (lambda: FreezeScale("0.ln1.scale", NAN[:0]), r"FreezeScale\(value=…\) is empty"),
    "where no Where": (lambda: Add(SITE, BIAS, where=ANY[1]), r"Add\(where=…\) needs a Where, got int"),
}
AT_THE_SITE: dict[str, tuple[Callable[[], Intervention], str]] = {
    "add": (lambda: Add(SITE, BIAS[:-1]), r"Add at 0\.resid_post: got shape \(31,\); the activation is \(3, 9, 32\)"),
    "replace": (lambda: Replace(SITE, noise((ROWS, 4, D))), r"Replace at 0\.resid_post: got shape \(3, 4, 32\)"),
    "more rows": (lambda: Replace(SITE, noise((4, D))), r"Replace at 0\.resid_post: got shape \(4, 32\)"),
    "project": (lambda: Project(SITE, LINES[:, :8]), r"Project at 0\.resid_post: width 8, .* last axis is 32"),
    "set": (lambda: SetProjection(SITE, BIAS[:8]), r"SetProjection at 0\.resid_post: width 8, .* is 32"),
    "affine": (lambda: Affine(SITE, MATRIX[:8, :8]), r"Affine at 0\.resid_post: width 8, .* is 32"),
    "bias": (lambda: Affine(SITE, MATRIX, BIAS[:8]), r"Affine at 0\.resid_post: width 8, .* is 32"),
    "rotate": (lambda: Rotate(SITE, LINES[:2, :8], 1.0), r"Rotate at 0\.resid_post: width 8, .* is 32"),
    "splice": (lambda: Splice(SITE, _Narrow()), r"Splice at 0\.resid_post returned \(3, 9, 8\).* is \(3, 9, 32\)"),
    "edit": (lambda: Edit(SITE, lambda y: y[:, :4]), r"Edit at 0\.resid_post returned \(3, 4, 32\)"),
    "edit to nothing": (lambda: Edit(SITE, ANY[2]), r"Edit at 0\.resid_post returned NoneType"),
    "pattern": (lambda: FreezePattern("0.pattern", torch.ones(ROWS, 4, POS, 2)), r"0\.pattern: got \(3, 4, 9, 2\)"),
    "scale": (lambda: FreezeScale("0.ln1.scale", torch.ones(ROWS, 4, 1)), r"0\.ln1\.scale: got shape \(3, 4, 1\)"),
}


class _Narrow(Coder):
    def decode(self, z: Tensor) -> Tensor:
        return z[..., :8]


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("case", list(AT_ONCE))
def test_an_edit_that_can_never_work_is_refused_when_it_is_made(case: str) -> None:
    make_it, message = AT_ONCE[case]
    with pytest.raises(ShapeError, match=message):
        make_it()


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("case", list(AT_THE_SITE))
def test_an_edit_that_does_not_fit_names_the_site_what_came_and_what_is_there(case: str) -> None:
    make_it, message = AT_THE_SITE[case]
    with pytest.raises(ShapeError, match=message):
        ran("Llama", [make_it()])


def test_a_coefficient_for_other_rows_is_refused_by_the_name_of_the_site() -> None:
    with pytest.raises(ShapeError, match=r"Add at 0\.resid_post: .*3 rows"):
        ran("Llama", [Add(SITE, BIAS, scale=torch.ones(5))])


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("edit", [FreezePattern(SITE), FreezeScale("0.z"), FreezePattern("0.ln1.scale")])
def test_freezing_what_is_no_pattern_or_scale_is_refused(edit: Intervention) -> None:
    with pytest.raises(SiteError, match=r"acts on (pattern|scale) sites, not on 0\."):
        ran("Llama", [edit])


@pytest.mark.parametrize("how", ["mean", "resample"])
def test_edits_that_mix_rows_take_the_batch_whole_and_stay_out_of_generation(how: str) -> None:
    write: list[Intervention] = [Ablate(SITE, how)]
    assert torch.equal(ran("Llama", write, batch_size=ROWS)[SITE], ran("Llama", write)[SITE])
    with pytest.raises(DataError, match=r"Ablate.*0\.resid_post.*cannot be split"):
        ran("Llama", write, batch_size=2)
    with pytest.raises(InterpError, match=r"Ablate\('" + how + r"'\).*give Replace"):
        manager("Llama").generate(tokens(ROWS, 4), max_new_tokens=2, write=write)
    split = ran("Llama", [Ablate(SITE, where=Where(pos=2))], batch_size=2)
    assert largest(split.logits, ran("Llama", [Ablate(SITE, where=Where(pos=2))]).logits) <= TOLERANCE
