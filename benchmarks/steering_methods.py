"""Which methods of steering beat a random direction: every method on every concept of the small world, SAE included.

    python benchmarks/steering_methods.py [--quick] [--json] [--sae FOLDER] [--sites SITE …] [--concepts NAME …]

The loop of AxBench (2501.17148) by `interp.compare_methods`: each method is fitted on texts with and without a concept,
detects held-out ones (AUROC of the largest score over a text's tokens), and steers new prompts (harmonic mean of the
concept's and of fluency's score, 0 to 2; the factor is chosen on half of the prompts and scored on the others). All
factors are in RMS norms of the activation. The SAE is the one that `interp train` makes of the packaged model, trained
here unless `--sae` names a folder.

    SITE/METHOD_detection, …_steering    means over concepts
    SITE/METHOD_over_control             mean lead in steering over the better of a random and a shuffled direction

That score is coarse: a text says a word or does not. The second table asks for more: with every method's dose such that
it disturbs the model alike (95 % of the tokens of neutral text keep to a KL of .1 nats), how far do the log-odds of the
answers that have the concept move on held-out prompts, and on how many the wrong way? Beside it 16 random directions.

    SITE/METHOD_log_odds                 mean over concepts of that change
    SITE/random_log_odds_largest         the largest mean of a random direction, mean over concepts

`--quick` is two concepts, few prompts and no SAE but one that is given.
"""

import argparse
import contextlib
import json
import math
import sys
import warnings
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import engine  # noqa: F401  sets the number of threads, so before torch
import torch
from figures import machine_and_versions

import interp
from interp.core.stats import bootstrap
from interp.data.prompt import Prompt
from interp.steering import TrainedOptions, random_like
from interp.steering.concepts.compare import CompareOptions, compare_methods
from interp.steering.concepts.contenders import METHODS, sae_contender, trained_contender
from interp.steering.concepts.methods_table import MethodsTable
from interp.testbed.concept_texts import WORLD_CONCEPTS, world_concepts, world_openings
from interp.testbed.tasks import task_pairs
from interp.testbed.text import Text

CLOSED = ("mean_difference", "pca", "lat", "logistic", "mass_mean", "lda", "shuffled")
ANSWERS = {
    "liking": ("sentiment", (" glad", " loved", " positive", " success", " recommend")),
    "female": ("pronoun", (" she", " her")),
    "plural": ("agreement", (" were", " are", " have")),
}
READ, KL, RANDOM = interp.Where(name="read"), 0.1, 16


def trained_sae(hm: interp.HookManager, site: str, tokens: int) -> interp.SAE:
    """Train what `interp train` trains when it is given nothing else, at a site."""
    from interp.train.config import TrainConfig
    from interp.train.job import train_job

    with TemporaryDirectory() as folder, contextlib.redirect_stdout(sys.stderr):
        out = Path(folder) / "sae"
        config: dict[str, Any] = {"model": "testbed", "site": site, "data": "testbed", "out": str(out)}
        config |= {"dictionary": {"d_sae": 1024, "k": 32}, "text": {"ctx": 128, "rows": 8}}
        config |= {"train": {"tokens": tokens}, "evaluation": {"tokens": 50_000}}
        train_job(TrainConfig(**config))
        return interp.SAE.load(out)


def compared(hm: interp.HookManager, site: str, options: argparse.Namespace, sae: interp.SAE | None) -> MethodsTable:
    """The table at one site."""
    methods = dict(METHODS)
    methods["reft_r1 from mean_difference"] = trained_contender("reft_r1", start="mean_difference")
    if sae is not None:
        methods["sae"] = sae_contender(sae)
    few = options.quick
    concepts = world_concepts(options.concepts, n=40 if few else 80, n_held_out=24 if few else 60)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # the table says itself who does no better than chance
        return compare_methods(
            hm,
            concepts,
            site,
            prompts=world_openings(8 if few else 40),
            methods=methods,
            options=CompareOptions(factors=(0.2, 0.4, 0.7, 1.0), max_new_tokens=8 if few else 12),
        )


def pairs_of(concept: str, n: int) -> tuple[interp.ConceptTokens, interp.PromptPairs]:
    """Texts to fit on, each a prompt with its answer, read before the answer; and held-out prompts to try on."""
    task, wanted = ANSWERS[concept]
    fit, tried = (task_pairs(task, n, held_out=out) for out in (False, True))
    sides: tuple[list[Prompt], list[Prompt]] = ([], [])
    for e in fit:
        has = e.answers[0] in wanted
        for side, prompt, answer in ((not has, e.clean, e.answers[0]), (has, e.corrupted, e.foils[0])):
            end = len(prompt.text)
            spans = {"read": (prompt.text.rfind(" ") + 1, end), "answer": (end, end + len(answer))}
            sides[side].append(Prompt(prompt.text + answer, spans))
    forms = [e.meta["template"] for e in fit]
    contrast = interp.Contrast.make(*sides, groups=forms, name=concept)
    return contrast.tokens(interp.HookManager.load("testbed"), where=READ), tried.leaning(wanted)


def fitted(hm: interp.HookManager, site: str, data: interp.ConceptTokens, sae: interp.SAE | None) -> dict[str, Any]:
    """Every method on one concept."""
    made: dict[str, Any] = {name: interp.fit_direction(hm, data, site, method=name) for name in CLOSED}
    answers = TrainedOptions(loss=interp.Where(name="answer"), progress=False)
    made["ssv"] = interp.fit_ssv(hm, data, site, options=answers)
    start = replace(answers, start=made["mean_difference"])
    made["reft_r1 from mean_difference"] = interp.fit_reft_r1(hm, data, site, options=start)
    made["linear_act"] = interp.fit_transport(hm, data, site, pool="each")
    made["probe"] = interp.fit_probe(hm, data, site).direction("positive")
    if sae is not None:
        best = interp.best_latent(hm, sae, data, site, n=1, pool="each")
        made["sae"] = interp.latent_direction(hm, sae, best.best, site=site, data=data)
    made |= {f"random {i}": random_like(made["mean_difference"], seed=i) for i in range(RANDOM)}
    return made


def at_equal_kl(hm: interp.HookManager, site: str, options: argparse.Namespace, sae: interp.SAE | None) -> Any:
    """One row per concept and method: the change of the log-odds at the dose that disturbs neutral text by KL."""
    import pandas as pd

    ids, _, _ = Text(seed=7).rows(16, 64)
    neutral = interp.Tokens(ids, torch.ones_like(ids, dtype=torch.bool))
    rows = []
    for concept in ANSWERS if not options.quick else list(ANSWERS)[:1]:
        data, tried = pairs_of(concept, 32 if options.quick else 96)
        for name, steers in fitted(hm, site, data, sae).items():
            row = {"concept": concept, "method": name, "dose": math.nan, "change": math.nan, "wrong_way": math.nan}
            with contextlib.suppress(interp.DataError):  # a map cannot be stretched to every KL
                dose = interp.calibrate(hm, steers, neutral, kl=KL)
                quiet = interp.SweepOptions(n_generated=0, controls=0, text=neutral, progress=False)
                effect = interp.steering_sweep(hm, steers, tried, doses=[dose], options=quiet).effect[0]
                found = bootstrap(effect)
                row |= {"dose": float(dose.value), "change": found.mean, "low": found.low, "high": found.high}
                row |= {"wrong_way": float((effect < 0).float().mean())}
            rows.append(row)
    frame = pd.DataFrame(rows)
    random = frame.method.str.startswith("random")
    largest = frame[random].groupby("concept").change.max()
    frame["beats_all_random"] = frame.change > frame.concept.map(largest)
    summed = (
        frame[random].groupby("concept").agg(change=("change", "mean"), high=("change", "max"), low=("change", "min"))
    )
    summed = summed.assign(method=f"random ({RANDOM})").reset_index()
    return pd.concat([frame[~random], summed], ignore_index=True).sort_values(["concept", "method"])


def main() -> None:
    """Parse, compare, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="two concepts, few prompts, no SAE is trained")
    parser.add_argument("--json", action="store_true", help="print figures, machine and versions as JSON, nothing else")
    parser.add_argument("--sae", help="folder of an SAE at the site, instead of training one")
    parser.add_argument("--sites", nargs="+", default=["2.resid_post"], help="where methods act")
    parser.add_argument("--concepts", nargs="+", default=list(WORLD_CONCEPTS), choices=WORLD_CONCEPTS)
    options = parser.parse_args()
    if options.quick:
        options.sites, options.concepts = options.sites[-1:], options.concepts[:2]
    machine, versions = machine_and_versions("torch", "transformers")
    if not options.json:
        print(machine, ", ".join(f"{k} {v}" for k, v in versions.items()), sep="\n", flush=True)
    hm = interp.HookManager.load("testbed")
    figures: dict[str, float] = {}
    for site in options.sites:
        sae = None if options.sae is None else interp.SAE.load(options.sae)
        if sae is None and not options.quick:
            sae = trained_sae(hm, site, 1_500_000)
        table = compared(hm, site, options, sae)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            moved = at_equal_kl(hm, site, options, sae)
        for name, change in moved.groupby("method").change.mean().items():
            figures[f"{site}/{name}_log_odds"] = float(change)
        random = moved[moved.method.str.startswith("random")]
        figures[f"{site}/random_log_odds_largest"] = float(random.high.mean())
        for name in table.methods:
            for task in ("detection", "steering"):
                figures[f"{site}/{name}_{task}"] = table[name, task].mean
            if name not in table.controls:
                figures[f"{site}/{name}_over_control"] = table.over_control(name).mean
        if not options.json:
            print(table.summary(), table.to_frame().round(2).to_string(), sep="\n\n", flush=True)
            steering = table.by_concept().pivot(index="method", columns="concept", values="steering")
            print(steering.loc[table.methods, table.concepts].round(2).to_string(), flush=True)
            print(
                f"\nChange of log-odds at {site}, q95 KL {KL} nats\n", moved.round(2).to_string(index=False), flush=True
            )
    if options.json:
        print(json.dumps({"figures": figures, "machine": machine, "versions": versions}, indent=1))


if __name__ == "__main__":
    main()
