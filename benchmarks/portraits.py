"""Measure the bundled model on held-out renders and captions, and write its model card.

    python benchmarks/portraits.py                  print the tables
    python benchmarks/portraits.py --card           write them into the model's README.md, and samples.png beside it
    python benchmarks/portraits.py --model folder   another model of portraits, which names its world

Needs `pip install "sliderspace[portraits]"` for the renders and the Frechet distances. Five minutes on two cores.
"""

import argparse
import json
import random
import time
from collections import Counter
from pathlib import Path

import open_clip
import torch

from sliderspace.features.encoders import get_encoder, open_clip_encoder
from sliderspace.portraits.model_metrics import FrechetTo, accuracies, psnr, image_sheet
from sliderspace.models.loading import load
from sliderspace.models.pipeline import asset_path
from sliderspace.portraits.classifier import score_factors, score_numbers
from sliderspace.portraits.renders import (
    NUMBERS,
    PROMPT,
    caption,
    dataset,
    dataset_numbers,
    sample_factors,
)
from sliderspace.sampling.generate import generate_images, sample, initial_noise
from sliderspace.portraits.world import PORTRAITS_64, world_of

GUIDANCE, STEPS = 3.0, 10


def table(head, rows):
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(str(c) for c in row) + " |" for row in lines)


def write_figures(card, figures, name="figures"):
    "Put figures between the marks of a model card, or of another text."
    begin, end = f"<!-- {name} -->\n", f"<!-- end of {name} -->"
    text = card.read_text()
    card.write_text(
        text[: text.index(begin) + len(begin)] + "\n" + figures + "\n" + text[text.index(end) :]
    )


def measured(path, make, kept=False):
    "What was measured before and is kept at `path`, else what `make()` measures; None if `kept` and there is nothing."
    if not path.exists():
        if kept:
            return None
        path.write_text(json.dumps(make()))
    return json.loads(path.read_text())


def drawn(count, seed, world=PORTRAITS_64):
    "Renders in [0, 1], `(n, 3, size, size)`, and their factors; no training part has these benchmarks' seeds."
    arrays, people = dataset(count, seed, world=world)
    return torch.from_numpy(arrays).permute(0, 3, 1, 2) / 255, people


def held_out(count, world=PORTRAITS_64):
    "People drawn anew, to ask for by their captions."
    return [sample_factors(random.Random(f"held out {i}"), world) for i in range(count)]


def timed(call, repeats=5):
    "Median seconds of a call."
    call()
    laps = []
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        laps.append(time.perf_counter() - start)
    return sorted(laps)[repeats // 2]


@torch.no_grad()
def through_autoencoder(model, images):
    "Images, encoded and decoded, in [0, 1]."
    x = images * 2 - 1
    z = (
        torch.cat([model.pipe.vae.encode(b).latent_dist.mean for b in x.split(50)])
        * model.pipe.vae.config.scaling_factor
    )
    return torch.cat([model.decode(b) for b in z.split(50)])


def followed(images, people, folder=None):
    "Share of images in which the classifier finds each factor's value, over those that have the factor."
    return accuracies(score_factors(images, folder), people, world_of(folder or asset_path()))


def explained(images, seed, folder):
    "R2 of each number that the classifier reads from the renders of a seed."
    truth = torch.from_numpy(dataset_numbers(len(images), seed, world_of(folder)))
    errors = (score_numbers(images, folder) - truth).pow(2).mean(0)
    return dict(zip(NUMBERS, (1 - errors / truth.var(0, correction=0)).tolist()))


def networks(folder=None):
    "What Frechet distances are measured in: the model's own encoder, and one that had no part in training."
    return {
        "portraits-clip": get_encoder(str((folder or asset_path()) / "clip")),
        "EfficientNet-Lite0": get_encoder("efficientnet-lite0"),
    }


@torch.no_grad()
def captioned(model, people, steps=STEPS, guidance=GUIDANCE, seed=11):
    "An image for each person's full caption."
    noise = initial_noise(model, seed, range(len(people)))
    finals = [
        sample(model, caption(p), noise[i : i + 1], steps, guidance) for i, p in enumerate(people)
    ]
    return torch.cat([model.decode(z) for z in finals])


@torch.no_grad()
def retrieval(images, people, folder):
    "Share of held-out renders whose own caption is the nearest of all, or among the five nearest."
    folder = str(folder / "clip")
    clip = open_clip.create_model(f"local-dir:{folder}").eval()
    words = open_clip.get_tokenizer(f"local-dir:{folder}")([caption(p) for p in people])
    image = torch.nn.functional.normalize(open_clip_encoder(folder)(images), dim=-1)
    text = torch.nn.functional.normalize(clip.encode_text(words), dim=-1)
    rank = ((image @ text.T) > (image * text).sum(1, keepdim=True)).sum(1)
    first, five = ((rank < n).float().mean() for n in (1, 5))
    return f"first {first:.0%}, among five {five:.0%} (chance {1 / len(people):.1%}, {5 / len(people):.1%})"


def main():
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--images", type=int, default=400, help="renders, and captions to sample from")
    p.add_argument("--card", action="store_true", help="write the figures into the model card")
    p.add_argument(
        "--model", type=Path, default=asset_path(), help="folder of a model of portraits"
    )
    args = p.parse_args()
    folder, world = args.model, world_of(args.model)
    model = (
        load("portraits") if folder == asset_path() else load(str(folder), steps=8, guidance=1.0)
    )
    renders, people = drawn(args.images, 987_654, world)
    asked = held_out(args.images, world)
    made = captioned(model, asked)
    own, asked_for = followed(renders, people, folder), followed(made, asked, folder)
    bare = generate_images(model, PROMPT, args.images, seed=12)
    seen = score_factors(bare, folder)["style"].argmax(1).tolist()
    styles = Counter(world.factors["style"][i] for i in seen)
    others = drawn(args.images, 123_456, world)[0]
    rebuilt = through_autoencoder(model, renders)
    compared = {
        "captions": made,
        "bare prompt": bare,
        "bare prompt, 30 steps": generate_images(model, PROMPT, args.images, seed=12, steps=30),
        "autoencoder alone": rebuilt,
        "renders": others,
    }
    distances = {}
    for name, network in networks(folder).items():
        distance = FrechetTo(renders, network)
        distances[name] = [f"{distance(images):,.3g}" for images in compared.values()]
    mixture = ", ".join(
        f"{s.removesuffix(' style')} {styles[s] / args.images:.0%}" for s in world.styles
    )

    noise = initial_noise(model, 0, range(32))
    with torch.no_grad():
        one = timed(lambda: model.predict(noise[:1], 500, PROMPT, 1.0))
        many = timed(lambda: model.predict(noise, 500, PROMPT, 1.0)) / 32
        guided = timed(lambda: model.predict(noise, 500, PROMPT, GUIDANCE)) / 32
        decode = timed(lambda: model.decode(noise)) / 32

    through = followed(rebuilt, people, folder)
    decibels = psnr(rebuilt, renders)
    factors = table(
        [
            "factor",
            "values",
            "classifier on held-out renders",
            "after the autoencoder",
            "images sampled from such captions",
        ],
        [
            [f, len(v), f"{own[f]:.1%}", f"{through[f]:.1%}", f"{asked_for[f]:.1%}"]
            for f, v in world.factors.items()
        ],
    )
    measures = table(
        ["measure", "figure"],
        [
            [
                "autoencoder, held-out renders",
                f"{decibels.mean():.1f} dB (standard deviation {decibels.std():.1f} "
                f"over {len(decibels)} images)",
            ],
            ["image-to-text retrieval of portraits-clip", retrieval(renders, people, folder)],
            ["denoiser call, one image", f"{one * 1e3:.0f} ms"],
            [
                "denoiser call, an image in a batch of 32",
                f"{many * 1e3:.1f} ms ({guided * 1e3:.1f} ms with guidance)",
            ],
            ["decode, an image in a batch of 32", f"{decode * 1e3:.1f} ms"],
            ["styles of the bare prompt", mixture],
        ],
    )
    frechet = table(
        ["Frechet distance to renders", *compared], [[n, *row] for n, row in distances.items()]
    )
    figures = (
        f"{args.images} renders and {args.images} captions drawn anew (most of their combinations of factors "
        f"occur in training, these renders do not); captions are sampled with {STEPS} steps "
        f"and guidance {GUIDANCE:g}, the bare prompt with {model.steps} and none; times on "
        f"{torch.get_num_threads()} threads of a CPU.\n\n{factors}\n\n{measures}\n\n{frechet}\n"
    )
    if world.continuous:
        read = explained(renders, 987_654, folder)
        rows = [[name, f"{value:.3f}"] for name, value in read.items()]
        figures += "\n" + table(["number", "R2 on held-out renders"], rows) + "\n"
    print(figures)
    if args.card:
        write_figures(folder / "README.md", figures)
        image_sheet(torch.cat([renders[:24], bare[:24], made[:24]])).save(folder / "samples.png")


if __name__ == "__main__":
    main()
