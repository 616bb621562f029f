"""Directions of a real model: she against he, happy against sad; on held-out words they steer, random ones do not."""

import functools
from pathlib import Path

import pytest
import torch
from torch import Tensor

from interp.core.direction import Direction
from interp.core.manager import HookManager
from interp.data.contrast import Contrast
from interp.steering.fitting.fit import fit_direction

GIRLS = ["Lily", "Mia", "Lucy", "Sue", "Anna", "Emma", "Jane", "Amy"]
BOYS = ["Tom", "Tim", "Ben", "Max", "Sam", "Jack", "Bob", "Leo"]
PLACES = ["park", "house", "garden", "shop", "beach", "school"]
GLAD = [
    "got a new toy",
    "won the game",
    "found a big cake",
    "saw her best friend",
    "played in the sun",
    "got a nice gift",
    "ate a yummy cake",
    "had a fun day",
]
SAD = [
    "lost her toy",
    "fell down and got hurt",
    "broke her cup",
    "lost her best friend",
    "could not play outside",
    "hurt her leg",
    "dropped her cake",
    "had a bad day",
]


@functools.cache
def stories(folder: str) -> HookManager:
    return HookManager.load(folder)


def walks(names: list[str], places: list[str]) -> list[str]:
    return [f"One day, {name} went to the {place}." for name in names for place in places]


def days(names: list[str], events: list[str]) -> list[str]:
    return [f"{name} {event}. She was very" for name in names for event in events]


def effect(hm: HookManager, texts: list[str], tokens: tuple[int, int], direction: Direction) -> Tensor:
    """How far the direction moves the log-odds of the two tokens: half of what lies between +2 and −2, per text."""
    up, down = (
        hm.run(texts, write=direction.as_interventions(dose), logits="last").logits[:, 0] for dose in (2.0, -2.0)
    )
    return (up[:, tokens[0]] - up[:, tokens[1]] - down[:, tokens[0]] + down[:, tokens[1]]) / 2


@pytest.mark.parametrize("concept", ["she", "happy"])
def test_a_direction_steers_prompts_that_it_was_not_fitted_on_and_random_ones_do_not(real: Path, concept: str) -> None:
    hm = stories(str(real / "models" / "stories260K"))
    if concept == "she":
        tokens = hm.to_single_token(" She"), hm.to_single_token(" He")
        data = Contrast.make(walks(GIRLS[:5], PLACES[:4]), walks(BOYS[:5], PLACES[:4]))
        site, held = "2.resid_post", [walks(GIRLS[5:], PLACES[4:]), walks(BOYS[5:], PLACES[4:])]
    else:
        # "sad" is two tokens here; its first is the word's own.
        pieces = [hm.to_tokens(w, bos=False).ids[0] for w in (" happy", " sad")]
        tokens = int(pieces[0][1]), int(pieces[1][1])
        data = Contrast.make(days(GIRLS[:3], GLAD[:5]), days(GIRLS[:3], SAD[:5]))
        site, held = "3.resid_post", [days(GIRLS[3:6], GLAD[5:]), days(GIRLS[3:6], SAD[5:])]
    found = fit_direction(hm, data, site)
    ours = torch.cat([effect(hm, texts, tokens, found) for texts in held])
    drawn = [fit_direction(hm, data, site, method="random", seed=seed) for seed in range(12)]
    others = torch.stack([torch.cat([effect(hm, texts, tokens, one) for texts in held]) for one in drawn])
    assert bool((ours > 0).all())
    assert float(ours.mean()) > 0.5
    # Of 64 dimensions, twelve random directions of the same length scatter about zero; none comes near the way meant.
    spread = others.mean(1)
    assert float(spread.max()) < 0.5 * float(ours.mean())
    assert float(spread.abs().median()) < 0.35 * float(ours.mean())
    moved = fit_direction(hm, data.swap(), site)  # the other way round is the opposite direction
    torch.testing.assert_close(moved[site], -found[site], atol=1e-5, rtol=1e-5)
