"""The illusion in closed form: a direction that steers although one half leads nowhere and the other never moves."""

import math

import pytest
import torch

from interp.core.errors import ConfigError
from interp.core.manager import HookManager
from interp.core.stats import Estimate
from interp.patching.subspaces.illusion import IllusionOptions, IllusionReport, illusion
from interp.patching.subspaces.subspace import SubspaceResult, subspace_patch
from interp.patching.subspaces.verdict import (
    CARRIED,
    CONSISTENT,
    NO_SPLIT,
    NOTHING,
    UNDECIDED,
    Evidence,
    share_of,
    weighed,
)
from interp.testbed.illusion_toy import illusion_toy

SITE = "0.mlp_post"
ALONG = torch.tensor([1.0, 1.0, 0.0])
LEADS_NOWHERE, NEVER_MOVES, USED = torch.eye(3)


def numbers(n: int = 16) -> tuple[torch.Tensor, torch.Tensor]:
    """x of each pair's clean and corrupted prompt, from the text of the toy and not from its weights."""
    token = torch.arange(n)
    value = torch.where(token % 2 == 0, 1.0, -1.0) * (1 + (token // 2) / 4)
    _, pairs = illusion_toy(n=n)
    return value[pairs.clean.ids[:, 0]], value[pairs.corrupted.ids[:, 0]]


def patched(direction: torch.Tensor, **toy: float) -> SubspaceResult:
    model, pairs = illusion_toy(**toy)  # type: ignore[arg-type]
    return subspace_patch(HookManager.load(model), pairs, SITE, direction)


def report(direction: torch.Tensor, **toy: float) -> IllusionReport:
    model, pairs = illusion_toy(**toy)  # type: ignore[arg-type]
    return illusion(HookManager.load(model), pairs, SITE, direction)


def test_the_pairs_differ_in_sign_and_in_size() -> None:
    x, source = numbers()
    assert bool((x.sign() == -source.sign()).all()) and bool((x.abs() != source.abs()).all())
    assert len(set(source.tolist())) == len(source)


@pytest.mark.parametrize("toy", [{}, {"dormant": 3.0}, {"skip": 0.5, "dormant": 1.0, "used": 0.5}, {"used": -2.0}])
def test_every_patch_is_its_closed_form(toy: dict[str, float]) -> None:
    skip, dormant, used = ({"skip": 1.0, "dormant": 2.0, "used": 0.0} | toy).values()
    x, source = numbers()
    sign = x.sign()  # logit differences are answer − foil, and the answer is the sign of x
    plain = 2 * sign * (skip + used) * x
    expected = {
        "along": plain + 2 * sign * dormant * (source - x) / 2,
        "nowhere": plain,
        "never": plain,
        "used": plain + 2 * sign * used * (source - x),
    }
    directions = {"along": ALONG, "nowhere": LEADS_NOWHERE, "never": NEVER_MOVES, "used": USED}
    for name, direction in directions.items():
        found = patched(direction, **toy)
        torch.testing.assert_close(found.clean, plain)
        torch.testing.assert_close(found.patched, expected[name])
        torch.testing.assert_close(found.whole, 2 * sign * (skip * x + used * source))
        torch.testing.assert_close(found.corrupted, 2 * sign * (skip + used) * source)


def test_the_direction_works_as_if_all_had_been_replaced_and_the_whole_component_does_nothing() -> None:
    found = patched(ALONG)
    torch.testing.assert_close(found.patched, found.corrupted)
    assert found.fldd.mean == pytest.approx(2.0) and found.accuracy.mean == 1.0 == found.flipped.mean
    assert torch.equal(found.whole, found.clean) and not found.hit_whole.any()
    # Scale and sign of a direction say nothing of its line.
    torch.testing.assert_close(patched(-3 * ALONG).patched, found.patched)


def test_the_report_says_that_all_signs_are_there() -> None:
    found = report(ALONG)
    assert found.verdict == CONSISTENT and found.flagged
    assert found.read_rank == 1 and found.read_share == pytest.approx(0.5)
    shares = {name: e.mean for name, e in found.fldd.items()}
    assert shares["direction"] == pytest.approx(2.0)
    assert shares["read part"] == shares["unread part"] == shares["whole component"] == 0
    # |x′ − x|² lies in neurons 0 and 2, one half each: a random direction moves by a third of it, squared.
    assert found.moved["read part"] == 0 and found.moved["unread part"] == pytest.approx(math.sqrt(3 / 2))
    assert found.spread["unread part"] == pytest.approx(math.sqrt(3 / 2))
    assert math.isnan(found.explained["read part"]) and found.explained["unread part"] > 0.9
    assert len(found.placebos) == 8 and "does not vary" in found.summary() and "dormant" in found.summary()


def test_a_direction_that_the_model_uses_is_not_flagged() -> None:
    found = report(USED, skip=0.0, used=1.0)
    assert found.verdict == CARRIED and not found.flagged
    shares = {name: e.mean for name, e in found.fldd.items()}
    assert shares["direction"] == pytest.approx(2.0) == shares["whole component"]
    # W_out's column is (0, 2, 1): the read part of neuron 2 has length 1/√5, and its patch the whole effect.
    assert found.read_share == pytest.approx(1 / 5) and shares["read part"] == pytest.approx(2.0)
    assert shares["unread part"] == pytest.approx(0, abs=1e-5)


def test_a_whole_component_that_does_half_is_not_flagged_either() -> None:
    found = report(ALONG, skip=0.5, used=0.5)
    assert found.fldd["direction"].mean == pytest.approx(2.0)
    assert found.fldd["whole component"].mean == pytest.approx(1.0) == found.fldd["read part"].mean
    assert found.verdict == CARRIED


@pytest.mark.parametrize("direction", [LEADS_NOWHERE, NEVER_MOVES])
def test_half_a_direction_is_nothing_to_explain(direction: torch.Tensor) -> None:
    found = report(direction)
    assert found.verdict == NOTHING and found.fldd["direction"].mean == 0
    assert ("read part" in found.patched) == bool(direction @ NEVER_MOVES)


def test_what_is_read_can_be_given() -> None:
    model, pairs = illusion_toy()
    hm = HookManager.load(model)
    assert illusion(hm, pairs, SITE, ALONG, reads=torch.eye(3)).verdict == NO_SPLIT
    # Of weights that see neurons 0 and 1 alike, the read part is all of the direction.
    alike = illusion(hm, pairs, SITE, ALONG, reads=torch.tensor([[1.0], [1.0], [0.0]]))
    assert alike.read_share == pytest.approx(1.0) and "unread part" not in alike.patched
    other = illusion(hm, pairs, SITE, ALONG, labels=torch.tensor([[0, 1], [1, 0]] * 8))
    assert other.explained == pytest.approx(illusion(hm, pairs, SITE, ALONG).explained, nan_ok=True)
    shuffled = illusion(hm, pairs, SITE, ALONG, labels=torch.arange(32).reshape(16, 2) // 2 % 2)
    assert abs(shuffled.explained["unread part"]) < 0.15


@pytest.mark.parametrize("scale", [1.0, 100.0])
def test_thresholds_decide_and_are_recorded(scale: float) -> None:
    model, pairs = illusion_toy(dormant=2.0)
    options = IllusionOptions(min_effect=0.019 * scale)
    found = illusion(HookManager.load(model), pairs, SITE, ALONG, options=options)
    assert found.verdict == (CONSISTENT if scale == 1.0 else NOTHING)
    assert found.provenance.settings["min_effect"] == options.min_effect


def evidence(read: float, unread: float, whole: float, moved: float = 0.0, noise: float = 0.0) -> Evidence:
    """Effects as shares of a direction whose FLDD is 1."""
    clean = torch.full((40,), 2.0)
    wobble = noise * torch.linspace(-1, 1, 40)
    values = {"direction": 1.0, "read part": read, "unread part": unread, "whole component": whole, "placebo": 0.0}
    patched = {name: clean * (1 - share) + (wobble if name == "read part" else 0) for name, share in values.items()}
    names = ("direction", "read part", "unread part")
    return Evidence(clean, patched, [0.0], dict.fromkeys(names, moved), dict.fromkeys(names, 0.5))


@pytest.mark.parametrize(
    ("given", "verdict"),
    [
        (evidence(0.1, 0.0, 0.1), CONSISTENT),
        (evidence(0.9, 0.0, 0.9), CARRIED),
        (evidence(0.9, 0.0, 0.1), UNDECIDED),  # the component does nothing, yet its read part does
        (evidence(0.1, 0.0, 0.9), UNDECIDED),  # the component is in use
        (evidence(0.1, 0.9, 0.1), UNDECIDED),  # what is called unread leads somewhere
        (evidence(0.1, 0.0, 0.1, moved=3.0), UNDECIDED),  # not dormant
        (evidence(0.3, 0.0, 0.1, noise=4.0), UNDECIDED),  # below the bound, but not for sure
    ],
)
def test_the_verdict_needs_every_sign_and_says_no_more(given: Evidence, verdict: str) -> None:
    assert weighed(given, min_effect=0.1, silent=1 / 3, dormant=0.5)[0] == verdict


def test_an_effect_below_that_of_random_directions_is_none() -> None:
    given = evidence(0.1, 0.0, 0.1)
    placebo = {**given.patched, "placebo": given.patched["direction"] - 1}
    assert (
        weighed(
            Evidence(given.clean, placebo, [1.5], given.moved, given.explained),
            min_effect=0.1,
            silent=1 / 3,
            dormant=0.5,
        )[0]
        == NOTHING
    )


def test_a_share_is_of_means_with_pairs_resampled_together() -> None:
    clean, direction = torch.tensor([4.0, 2.0]), torch.tensor([0.0, 0.0])
    share = share_of(torch.tensor([2.0, 1.0]), direction, clean)
    assert tuple(share) == pytest.approx((0.5, 0.5, 0.5))  # the same half in both pairs: no width at all
    wide = share_of(torch.tensor([4.0, 0.0]), direction, clean)
    assert wide.value == pytest.approx(1 / 3) and (wide.low, wide.high) == pytest.approx((0, 1))


def test_reports_are_results(tmp_path) -> None:  # type: ignore[no-untyped-def]
    found = report(ALONG)
    again = IllusionReport.load(found.save(tmp_path / "report"))
    assert again.verdict == found.verdict and torch.equal(again.patched["direction"], found.patched["direction"])
    page = found.to_html(tmp_path / "page.html").read_text()
    assert CONSISTENT in page and "unread part" in page and "largest" in page
    assert list(found.to_frame()["patch"]) == list(found.fldd) and isinstance(found.fldd["direction"], Estimate)


@pytest.mark.usefixtures("unchecked")
def test_bad_arguments_are_refused() -> None:
    model, pairs = illusion_toy()
    hm = HookManager.load(model)
    with pytest.raises(ConfigError, match="even number"):
        illusion_toy(n=5)
    with pytest.raises(ValueError, match=r"reads=\[d m\]"):
        illusion(hm, pairs, "0.resid_post", ALONG)
    with pytest.raises(ValueError, match="needs one, 3 wide"):
        illusion(hm, pairs, SITE, torch.eye(3)[:2])
    with pytest.raises(ValueError, match="d = 3"):
        illusion(hm, pairs, SITE, ALONG, reads=torch.eye(4))
    with pytest.raises(ValueError, match="categories"):
        illusion(hm, pairs, SITE, ALONG, labels=torch.zeros(3, 2, dtype=torch.long))
    for setting in ({"min_effect": 0.0}, {"n_placebo": 0}, {"dormant": float("nan")}):
        with pytest.raises(ConfigError):
            IllusionOptions(**setting)
