"""Measure what distillation costs: the four-step student beside its teacher, on the same prompts and noise.

    python benchmarks/student.py            print the tables
    python benchmarks/student.py --card     write them into the student's README.md too

Needs `pip install "sliderspace[portraits]"` for the renders and the Frechet distances. Ten minutes on two cores.
"""

import argparse

import torch
from portraits import captioned, drawn, followed, held_out, networks, table, timed, write_figures

from sliderspace.portraits.model_metrics import FrechetTo, entropy
from sliderspace.models.loading import load
from sliderspace.models.pipeline import asset_path
from sliderspace.portraits.classifier import score_factors
from sliderspace.portraits.renders import FACTORS, PROMPT
from sliderspace.sampling.generate import generate_images, sample, initial_noise


def diversity(clip, images):
    "Mean distance between pairs of images in portraits-clip features (of unit length), and its standard deviation."
    distances = torch.pdist(torch.nn.functional.normalize(clip(images), dim=1))
    return f"{distances.mean():.3f} ± {distances.std():.3f}"


def entropies(images):
    "Entropy in bits of what the classifier sees in a set of images, for each factor."
    return {f: entropy(seen) for f, seen in score_factors(images).items()}


def main():
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument(
        "--images", type=int, default=400, help="renders, captions and images of the bare prompt"
    )
    p.add_argument("--card", action="store_true", help="write the figures into the student's card")
    args = p.parse_args()
    teacher, student = load("portraits"), load("portraits-fast")
    renders, asked = drawn(args.images, 987_654)[0], held_out(args.images)
    seen = networks()
    distances = [FrechetTo(renders, network) for network in seen.values()]
    ways = {
        "renders": None,
        "teacher, 8 steps, no guidance": (teacher, 8, 1.0),
        "teacher, 10 steps, guidance 3": (teacher, 10, 3.0),
        "student, 4 steps": (student, 4, 1.0),
    }
    rows, follows = [], {}
    for name, way in ways.items():
        if way is None:
            bare = named = drawn(args.images, 123_456)[0]
        else:
            model, steps, guidance = way
            bare = generate_images(
                model, PROMPT, args.images, seed=12, steps=steps, guidance=guidance
            )
            named = captioned(model, asked, steps, guidance)
            follows[name] = followed(named, asked)
        bits = entropies(bare)
        rows.append(
            [
                name,
                diversity(seen["portraits-clip"], bare),
                *(f"{bits[f]:.2f}" for f in FACTORS),
                *(f"{distance(x):.3g}" for distance in distances for x in (bare, named)),
            ]
        )
    head = [
        "images",
        "distance of pairs",
        *(f"{f}, bits" for f in FACTORS),
        *(f"{n}, {x}" for n in seen for x in ("bare prompt", "captions")),
    ]
    spread = table(head, rows)
    found = table(
        ["images", *FACTORS],
        [[name, *(f"{a[f]:.1%}" for f in FACTORS)] for name, a in follows.items()],
    )
    noise = initial_noise(student, 0, range(32))
    with torch.no_grad():

        def draw(x):
            return student.decode(sample(student, PROMPT, x))

        one, many = timed(lambda: draw(noise[:1])), timed(lambda: draw(noise)) / 32
    figures = (
        f'{args.images} images a row. Diversity of the bare prompt "{PROMPT}": the mean distance between pairs '
        f"of images in portraits-clip features of unit length (± standard deviation), the entropy of what the "
        f"classifier sees for each factor, and the Frechet distance to held-out renders in two networks' "
        f"features, of the bare prompt and of captions that name every factor.\n\n{spread}\n\n"
        f"How often the classifier finds what a full caption names:\n\n{found}\n\n"
        f"An image, four steps and decoding: {one * 1e3:.0f} ms alone, {many * 1e3:.0f} ms in a batch of 32, "
        f"on {torch.get_num_threads()} threads of a CPU.\n"
    )
    print(figures)
    if args.card:
        write_figures(asset_path("portraits-fast") / "README.md", figures)


if __name__ == "__main__":
    main()
