"""Sliders that are asked for, against truth: python benchmarks/concepts.py [--seeds 0 1 2] [--readme].

Four attributes in words on the bundled model, a slider each, trained at once, with one thing changed at a time, beside a
changed prompt and prompt-to-prompt. Sliders are taken at the first of the strengths .5, 1, 1.5 and 2 at which the attribute
is seen 50 points more often than at its negative, or at 2: what else has changed by then is the cost of the edit.
"""

import argparse
import sys
import time
from functools import partial
from pathlib import Path

import torch
from portraits import measured, table, write_figures
from training import spread

from sliderspace import load
from sliderspace.evaluation.search import measure_concepts
from sliderspace.training.from_text import Concept, train_concepts
from sliderspace.sampling.inversion import prompt_to_prompt
from sliderspace.portraits.renders import FACTORS, PROMPT
from sliderspace.sampling.generate import sample, initial_noise
from sliderspace.portraits.ground_truth import score_images, score_sliders

ASKED = {
    "glasses": ("glasses", "no glasses"),
    "beard": ("beard", "no beard"),
    "hair": ("blond hair", "black hair"),
    "skin": ("dark skin", "light skin"),
}
STRENGTHS = (-2.0, -1.5, -1.0, -0.5, 0.0, 0.5, 1.0, 1.5, 2.0)
WAYS = {  # what differs from the first
    "sliders": {},
    "nothing preserved": dict(preserve=()),
    "eta 2": dict(eta=2.0),
    "from the first step": dict(active_from=0.0),
    "trained on all steps, used late": dict(active_from=0.0, used_from=0.5),
    "rank 1": dict(rank=1),
    "rank 16": dict(rank=16),
    "full rank": dict(rank=160),  # as wide as the widest layer
}
PROMPTS = ("changed prompt", "prompt-to-prompt")


def figures_of(truth, at):
    """[rise, elsewhere, interference] of every attribute; `at`: the strengths to choose from."""
    found = {}
    for k, (factor, (value, _)) in enumerate(ASKED.items()):
        s = next((s for s in at if truth.value_gain(value, (-s, s))[k] >= 0.5), at[-1])
        ends = (-s, s)
        found[factor] = dict(
            strength=s,
            rise=truth.value_gain(value, ends)[k].item(),
            elsewhere=truth.off_target_change(factor, ends)[k].item(),
            interference=truth.off_target_shift(factor, ends)[k].item(),
        )
    return found


def trained(model, way, seed, updates, samples, folder):
    options = dict(preserve=tuple(FACTORS["style"]), eta=4.0, active_from=0.5, rank=4) | WAYS[way]
    used_from = options.pop("used_from", options["active_from"])
    preserve, eta = options.pop("preserve"), options.pop("eta")
    asked = [
        Concept(PROMPT, f"{PROMPT}, {a}", f"{PROMPT}, {b}", preserve, eta, f)
        for f, (a, b) in ASKED.items()
    ]
    passes = 0

    def count(net, args, output):
        nonlocal passes
        passes += len(output[0] if isinstance(output, tuple) else output.sample)

    hook, began = model.denoiser.register_forward_hook(count), time.perf_counter()
    space = train_concepts(
        model,
        asked,
        training_steps=updates,
        sample_preserved=True,
        seed=seed,
        folder=folder,
        progress=lambda x, **k: x,
        **options,
    )
    seconds = time.perf_counter() - began
    hook.remove()
    truth = score_sliders(model, space, samples, STRENGTHS, used_from, progress=lambda x, **k: x)
    rows = measure_concepts(model, space, start=used_from, progress=lambda x, **k: x).space.card[
        "sliders"
    ]
    more = {
        n: sum(row[n] for row in rows) / len(rows) for n in ("dclip", "consistency", "distance")
    }
    return (
        dict(seconds=seconds, passes=passes, attributes=figures_of(truth, (0.5, 1.0, 1.5, 2.0)))
        | more
    )


def prompted(model, way, seed, samples):
    noise = initial_noise(model, seed, list(range(1000, 1000 + samples)))
    base = sample(model, PROMPT, noise)

    def edited(words):
        prompt = f"{PROMPT}, {words}"
        return (
            sample(model, prompt, noise)
            if way == PROMPTS[0]
            else prompt_to_prompt(model, PROMPT, prompt, noise, cross_replace_steps=0.8)[1]
        )

    latents = torch.stack(
        [torch.stack([edited(less), base, edited(more)]) for more, less in ASKED.values()]
    )
    return dict(
        attributes=figures_of(score_images(model, list(ASKED), (-1.0, 0.0, 1.0), latents), (1.0,))
    )


def summary(runs):
    """A row a way: rise and change elsewhere of each attribute, means over them, cost."""
    rows = []
    for way, results in runs.items():
        cells = [
            f"{spread([r['attributes'][f]['rise'] for r in results])} / "
            f"{spread([r['attributes'][f]['elsewhere'] for r in results])}"
            for f in ASKED
        ]
        others = spread(
            [sum(a["interference"] for a in r["attributes"].values()) / len(ASKED) for r in results]
        )
        known, own = (
            "seconds" in results[0],
            "used_from" not in WAYS.get(way, {}),
        )  # its training is another way's
        rows.append(
            [
                way,
                *cells,
                others,
                spread([r["dclip"] for r in results], "{:.3f}") if known else "",
                spread([r["seconds"] for r in results], "{:.0f}") if known and own else "",
            ]
        )
    return table(
        [
            "rise / elsewhere",
            *ASKED,
            "interference",
            "rise of CLIP's cosine at 1",
            "seconds, all four",
        ],
        rows,
    )


def main():
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("--ways", nargs="+", default=[*WAYS, *PROMPTS], choices=[*WAYS, *PROMPTS])
    p.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    p.add_argument("--updates", type=int, default=200)
    p.add_argument("--samples", type=int, default=24, help="images of each attribute and strength")
    p.add_argument(
        "--folder",
        type=Path,
        default=Path("benchmarks/output"),
        help="what is measured is kept and not measured again",
    )
    p.add_argument(
        "--kept",
        action="store_true",
        help="only what was measured before: some ways may have fewer seeds",
    )
    p.add_argument("--readme", action="store_true", help="write the table into docs/report.md too")
    args = p.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    model, runs = load("portraits"), {}
    for seed in args.seeds:
        for way in args.ways:
            path = (
                args.folder
                / f"concepts-{way.replace(' ', '-')}-{seed}-{args.updates}-{args.samples}.json"
            )
            make = (
                partial(prompted, model, way, seed, args.samples)
                if way in PROMPTS
                else partial(
                    trained, model, way, seed, args.updates, args.samples, args.folder / "concepts"
                )
            )
            if (made := measured(path, make, args.kept)) is None:
                continue
            runs.setdefault(way, []).append(made)
            print(
                way,
                seed,
                {f: [round(v, 2) for v in a.values()] for f, a in made["attributes"].items()},
                file=sys.stderr,
                flush=True,
            )
    text = summary(runs)
    print(text)
    if args.readme:
        write_figures(Path(__file__).parents[1] / "docs/report.md", text, "concepts")


if __name__ == "__main__":
    main()
