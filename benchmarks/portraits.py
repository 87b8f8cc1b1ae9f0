"""Measure the bundled model on held-out renders and captions, and write its model card.

    python benchmarks/portraits.py            print the tables
    python benchmarks/portraits.py --card     write them into the model's README.md too

Needs `pip install "sliderspace[portraits]"` for the renders and the Frechet distances. Five minutes on two cores.
"""

import argparse
import json
import random
import time
from collections import Counter

import open_clip
import torch

from sliderspace.encoders import encoder, open_clip_encoder
from sliderspace.loading import load
from sliderspace.models import bundled
from sliderspace.portraits import FACTORS, PROMPT, caption, dataset, draw_factors, factor_ids, score_factors
from sliderspace.sampling import pictures, sample, start_noise

GUIDANCE, STEPS = 3.0, 10


def table(head, rows):
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(str(c) for c in row) + " |" for row in lines)


def write_figures(card, figures, name="figures"):
    "Put figures between the marks of a model card, or of another text."
    begin, end = f"<!-- {name} -->\n", f"<!-- end of {name} -->"
    text = card.read_text()
    card.write_text(text[: text.index(begin) + len(begin)] + "\n" + figures + "\n" + text[text.index(end) :])


def measured(path, make, kept=False):
    "What was measured before and is kept at `path`, else what `make()` measures; None if `kept` and there is nothing."
    if not path.exists():
        if kept:
            return None
        path.write_text(json.dumps(make()))
    return json.loads(path.read_text())


def drawn(count, seed):
    "Renders in [0, 1], `(n, 3, 64, 64)`, and their factors; no training part has these benchmarks' seeds."
    arrays, people = dataset(count, seed)
    return torch.from_numpy(arrays).permute(0, 3, 1, 2) / 255, people


def held_out(count):
    "People drawn anew, to ask for by their captions."
    return [draw_factors(random.Random(f"held out {i}")) for i in range(count)]


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
def autoencoder(model, images):
    "PSNR in dB of renders through the autoencoder: mean over images, and its spread."
    x = images * 2 - 1
    z = torch.cat([model.pipe.vae.encode(b).latent_dist.mean for b in x.split(50)]) * model.pipe.vae.config.scaling_factor
    y = torch.cat([model.decode(b) for b in z.split(50)])
    psnr = -10 * (y - images).pow(2).mean((1, 2, 3)).log10()
    return f"{psnr.mean():.1f} dB (standard deviation {psnr.std():.1f} over {len(psnr)} images)"


def accuracies(images, people):
    "Share of images in which the classifier finds each factor's value, over those that have the factor."
    found = score_factors(images)
    return {f: (found[f].argmax(1) == ids)[ids >= 0].float().mean().item() for f, ids in factor_ids(people).items()}


class Seen(torch.nn.Module):
    "Features of images in [0, 1], `(n, d)`, as torchmetrics wants them."

    def __init__(self, name, width):
        super().__init__()
        self.encoder, self.num_features = encoder(name), width

    @torch.no_grad()
    def forward(self, x):
        return self.encoder(x)


def networks():
    "What Frechet distances are measured in: the model's own encoder, and one that had no part in training."
    return {"portraits-clip": Seen("portraits-clip", 128), "EfficientNet-Lite0": Seen("efficientnet-lite0", 448)}


def frechet_to(network, renders):
    "The Frechet distance to a set of images in a network's features (Heusel et al. 2017), as a function of others."
    from torchmetrics.image.fid import FrechetInceptionDistance

    distance = FrechetInceptionDistance(feature=network, normalize=True, input_img_size=(3, 64, 64),
                                        reset_real_features=False)

    def add(images, real):
        for batch in images.split(50):
            distance.update(batch, real=real)

    def of(images):
        distance.reset()
        add(images, False)
        return distance.compute().item()

    add(renders, True)
    return of


@torch.no_grad()
def captioned(model, people, steps=STEPS, guidance=GUIDANCE, seed=11):
    "An image for each person's full caption."
    noise = start_noise(model, seed, range(len(people)))
    finals = [sample(model, caption(p), noise[i : i + 1], steps, guidance) for i, p in enumerate(people)]
    return torch.cat([model.decode(z) for z in finals])


@torch.no_grad()
def retrieval(images, people):
    "Share of held-out renders whose own caption is the nearest of all, or among the five nearest."
    folder = str(bundled() / "clip")
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
    args = p.parse_args()
    model = load("portraits")
    (renders, people), asked = drawn(args.images, 987_654), held_out(args.images)
    made = captioned(model, asked)
    own, followed = accuracies(renders, people), accuracies(made, asked)
    bare = pictures(model, PROMPT, args.images, seed=12)
    styles = Counter(FACTORS["style"][i] for i in score_factors(bare)["style"].argmax(1).tolist())
    others = drawn(args.images, 123_456)[0]
    distances = {name: list(map(frechet_to(network, renders), (made, others))) for name, network in networks().items()}

    mixture = ", ".join(f"{s.removesuffix(' style')} {styles[s] / args.images:.0%}" for s in FACTORS["style"])

    noise = start_noise(model, 0, range(32))
    with torch.no_grad():
        one = timed(lambda: model.predict(noise[:1], 500, PROMPT, 1.0))
        many = timed(lambda: model.predict(noise, 500, PROMPT, 1.0)) / 32
        guided = timed(lambda: model.predict(noise, 500, PROMPT, GUIDANCE)) / 32
        decode = timed(lambda: model.decode(noise)) / 32

    factors = table(["factor", "values", "classifier on held-out renders", "images sampled from such captions"],
                    [[f, len(FACTORS[f]), f"{own[f]:.1%}", f"{followed[f]:.1%}"] for f in FACTORS])
    measures = table(["measure", "figure"], [
        ["autoencoder, held-out renders", autoencoder(model, renders)],
        ["image-to-text retrieval of portraits-clip", retrieval(renders, people)],
        ["denoiser call, one image", f"{one * 1e3:.0f} ms"],
        ["denoiser call, an image in a batch of 32", f"{many * 1e3:.1f} ms ({guided * 1e3:.1f} ms with guidance)"],
        ["decode, an image in a batch of 32", f"{decode * 1e3:.1f} ms"],
        *([f"Frechet distance in {name} features, {args.images} images", f"{d:.3g} (two sets of renders: {floor:.3g})"]
          for name, (d, floor) in distances.items()),
        ["styles of the bare prompt", mixture]])
    figures = (f"{args.images} renders and {args.images} captions drawn anew (most of their combinations of factors "
               f"occur in training, these renders do not); sampling with {STEPS} steps "
               f"and guidance {GUIDANCE:g}; times on {torch.get_num_threads()} threads of a CPU.\n\n"
               f"{factors}\n\n{measures}\n")
    print(figures)
    if args.card:
        write_figures(bundled() / "README.md", figures)


if __name__ == "__main__":
    main()
