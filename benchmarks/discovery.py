"""Where the time of discovery goes, and what it keeps in memory: python benchmarks/discovery.py [--samples 5000].

Runs the bundled model's 4-step sampling with features of every step, once with --samples and once with a tenth of
them, each in a process of its own, and prints the time by part and the peak of memory."""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager
from unittest.mock import patch

PROMPT = "portrait of a person"


@contextmanager
def timed(owner, name, spent, part):
    """Count the seconds that a method of an object takes."""
    method = getattr(owner, name)

    def wrapped(*args, **kwargs):
        start = time.perf_counter()
        try:
            return method(*args, **kwargs)
        finally:
            spent[part] = spent.get(part, 0) + time.perf_counter() - start

    with patch.object(owner, name, wrapped):
        yield


def run(samples):
    """Discover with so many samples; seconds by part and the peak of memory in MiB."""
    import torch

    from sliderspace import discover, load
    from sliderspace.features.encoders import Encoder, get_encoder

    torch.set_num_threads(2)
    model, spent = load("portraits", steps=4), {}
    clip = get_encoder(None, model)
    discover(
        model, PROMPT, samples=32, n_directions=8, encoder=clip, progress=lambda x, **k: x
    )  # warm

    def encode(images):
        start = time.perf_counter()
        try:
            return clip.encode(images)
        finally:
            spent["encoder"] = spent.get("encoder", 0) + time.perf_counter() - start

    start = time.perf_counter()
    with (
        tempfile.TemporaryDirectory() as folder,
        timed(model.denoiser, "forward", spent, "denoiser"),
        timed(model.pipe.vae, "decode", spent, "decoder"),
    ):
        discover(
            model,
            PROMPT,
            samples=samples,
            n_directions=40,
            encoder=Encoder(clip.name, encode),
            folder=folder,
            progress=lambda x, **k: x,
        )
    total = time.perf_counter() - start
    spent["rest"] = total - sum(spent.values())
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return {"total": total, "peak": peak, **spent}


def main():
    p = argparse.ArgumentParser(description=__doc__)
    p.add_argument("--samples", type=int, default=5000)
    p.add_argument("--child", type=int, help=argparse.SUPPRESS)
    args = p.parse_args()
    if args.child:
        return print(json.dumps(run(args.child)))
    print(
        "| samples | seconds | denoiser | decoder | encoder | rest | peak of memory |\n|"
        + " --- |" * 7
    )
    for samples in (args.samples // 10, args.samples):
        made = subprocess.run(
            [sys.executable, __file__, "--child", str(samples)], stdout=subprocess.PIPE, check=True
        )
        r = json.loads(made.stdout.splitlines()[-1])
        shares = " | ".join(
            f"{r[k] / r['total']:.0%}" for k in ("denoiser", "decoder", "encoder", "rest")
        )
        print(f"| {samples} | {r['total']:.0f} | {shares} | {r['peak']:.0f} MiB |", flush=True)


if __name__ == "__main__":
    main()
