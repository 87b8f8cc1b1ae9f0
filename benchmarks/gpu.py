"""What calls, discovery and training of a full-size SDXL cost on a GPU. Its weights are random: nothing is downloaded.

    python benchmarks/gpu.py --output figures.json          on a GPU, in some minutes
    python benchmarks/gpu.py --tiny --output figures.json   the same code on a tiny model and the CPU, to see that it runs

Sliders are compared with the base model's own calls in the same run, and with a mix that is added to the weights.
"""

import argparse
import gc
import json
import time
from contextlib import contextmanager
from pathlib import Path

import diffusers
import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderTiny,
    LCMScheduler,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from torch.nn.functional import interpolate
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
)

from sliderspace import discover, load, train
from sliderspace.features.encoders import Encoder
from sliderspace.models.pipeline import asset_path
from sliderspace.sampling.generate import initial_noise
from sliderspace.sliders.adapter import target_layers
from sliderspace.sliders.space import SliderSpace, detach
from sliderspace.training.alignment import SLIDERSPACE_RELEASE
from sliderspace.training.initialization import standard_init

PROMPT = "portrait of a person"
MIX = {3: 1.0, 20: -0.5, 50: 0.7}  # of 64 sliders
STEPS, GUIDANCE = 4, 1.0  # of a model with distilled guidance

FULL = dict(
    unet=dict(
        sample_size=128,
        layers_per_block=2,
        cross_attention_dim=2048,
        block_out_channels=(320, 640, 1280),
        attention_head_dim=(5, 10, 20),
        transformer_layers_per_block=(1, 2, 10),
        addition_time_embed_dim=256,
        projection_class_embeddings_input_dim=2816,
        norm_num_groups=32,
    ),
    vae=dict(
        block_out_channels=(128, 256, 512, 512),
        layers_per_block=2,
        sample_size=1024,
        norm_num_groups=32,
    ),
    texts=[
        dict(hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12),
        dict(hidden_size=1280, intermediate_size=5120, num_hidden_layers=8, num_attention_heads=20),
    ],
    clip="ViT-L-14",
)
TINY = dict(
    unet=dict(
        sample_size=8,
        layers_per_block=1,
        cross_attention_dim=64,
        block_out_channels=(32, 64, 64),
        attention_head_dim=(2, 2, 4),
        transformer_layers_per_block=(1, 1, 1),
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=6 * 8 + 32,
        norm_num_groups=8,
    ),
    vae=dict(
        block_out_channels=(8, 8, 16, 16), layers_per_block=1, sample_size=64, norm_num_groups=4
    ),
    texts=[dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4)]
    * 2,
    clip="ViT-S-32-alt",
)


def new_pipeline(sizes, device, dtype):
    """Make an SDXL pipeline of these sizes with random weights."""
    tokenizer = CLIPTokenizer.from_pretrained(asset_path() / "tokenizer")
    words = dict(vocab_size=len(tokenizer), max_position_embeddings=tokenizer.model_max_length)
    words |= {
        f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")
    }
    configs = [
        CLIPTextConfig(**text, **words, projection_dim=text["hidden_size"])
        for text in sizes["texts"]
    ]
    torch.manual_seed(0)
    default = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            unet = UNet2DConditionModel(
                **sizes["unet"],
                use_linear_projection=True,
                addition_embed_type="text_time",
                down_block_types=("DownBlock2D", *["CrossAttnDownBlock2D"] * 2),
                up_block_types=(*["CrossAttnUpBlock2D"] * 2, "UpBlock2D"),
            )
            vae = AutoencoderKL(
                **sizes["vae"],
                down_block_types=("DownEncoderBlock2D",) * 4,
                up_block_types=("UpDecoderBlock2D",) * 4,
            )
            texts = CLIPTextModel(configs[0]), CLIPTextModelWithProjection(configs[1])
    finally:
        torch.set_default_dtype(default)
    scheduler = LCMScheduler(
        beta_schedule="scaled_linear",
        beta_start=0.00085,
        beta_end=0.012,
        steps_offset=1,
        clip_sample=False,
    )
    return StableDiffusionXLPipeline(
        vae=vae,
        text_encoder=texts[0],
        text_encoder_2=texts[1],
        tokenizer=tokenizer,
        tokenizer_2=tokenizer,
        unet=unet,
        scheduler=scheduler,
        add_watermarker=False,
    )


def new_encoder(name, device):
    """Make an image encoder of this architecture with random weights."""
    import open_clip

    net = open_clip.create_model(name, pretrained=None, device=device).eval().requires_grad_(False)

    def encode(x):
        x = interpolate(x, (224, 224), mode="bicubic", antialias=True)
        return net.encode_image((x - 0.45) / 0.27)

    return Encoder(name, encode)


class Bench:
    """A model of full or tiny size, and what was measured of it."""

    def __init__(self, tiny, output):
        self.tiny, self.output, self.figures = tiny, output, {}
        self.device, self.dtype = ("cpu", torch.float32) if tiny else ("cuda", torch.bfloat16)
        sizes = TINY if tiny else FULL
        self.pipe = new_pipeline(sizes, self.device, self.dtype)
        self.encoder = new_encoder(sizes["clip"], self.device)
        self.model = load(self.pipe, device=self.device, steps=STEPS, guidance=GUIDANCE)
        machine = "cpu" if tiny else torch.cuda.get_device_name()
        self.note(
            "machine", device=machine, torch=torch.__version__, diffusers=diffusers.__version__
        )

    def note(self, name, **values):
        """Keep figures, and show them."""
        self.figures[name] = values
        print(name, json.dumps(values), flush=True)
        if self.output:
            self.output.write_text(json.dumps(self.figures, indent=1))

    def wait(self):
        """Wait until the GPU has done what it was given."""
        if not self.tiny:
            torch.cuda.synchronize()

    def clear(self):
        """Free memory, and forget its peak and the batch sizes that were found."""
        self.model.batch_sizes.clear()
        gc.collect()
        if not self.tiny:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()

    def peak(self):
        """Give the peak of memory since `clear`, in GiB."""
        return 0.0 if self.tiny else torch.cuda.max_memory_allocated() / 2**30

    def seconds(self, work, times=5, warm=2):
        """Time some work, after warming up."""
        for _ in range(warm):
            work()
        self.wait()
        start = time.perf_counter()
        for _ in range(times):
            work()
        self.wait()
        return (time.perf_counter() - start) / times


def random_space(model, count):
    """Make a space of small random sliders on all attention layers."""
    layers = target_layers(model, "attention")
    down, up = standard_init(model, "random", layers, count)
    up = {name: 1e-3 * torch.randn_like(b) for name, b in up.items()}
    metadata = dict(model=model.name, fingerprint=model.fingerprint(layers), denoiser="unet")
    ranges = torch.tensor([[-1.0, 1.0]] * count)
    return SliderSpace(down, up, [f"slider {k}" for k in range(count)], ranges, 1, metadata)


@contextmanager
def inputs_of(denoiser):
    """Catch what a denoiser is called with."""
    seen = {}
    hook = denoiser.register_forward_pre_hook(
        lambda module, args, kwargs: seen.update(args=args, kwargs=kwargs), with_kwargs=True
    )
    yield seen
    hook.remove()


@torch.no_grad()
def calls(bench):
    """Measure a call of the denoiser: alone, with sliders that are off, on, all on, and with a mix in the weights."""
    model, denoiser = bench.model, bench.model.denoiser
    timestep = model.timesteps(STEPS)[0][1]
    for batch in (1,) if bench.tiny else (1, 4, 8):
        noise = initial_noise(model, 0, list(range(batch)))
        with inputs_of(denoiser) as seen:
            model.predict(noise, timestep, PROMPT, GUIDANCE)

        def call(seen=seen):
            return denoiser(*seen["args"], **seen["kwargs"])

        base = bench.seconds(call)
        space = random_space(model, 64)
        adapter = space.attach(model)
        ratios = {}
        for name, strengths in (
            ("off", None),
            ("three on", space.strengths(MIX)),
            ("all on", torch.ones(64)),
        ):
            adapter.set_strengths(strengths)
            ratios[name] = bench.seconds(call) / base
        adapter.set_strengths(space.strengths(MIX))
        gated = call()[0].float()
        detach(model)
        unchanged = call()[0].float()
        mix = space.strengths(MIX).to(bench.device)
        layers = {name: denoiser.get_submodule(name).weight for name in space.down}
        originals = {name: weight.detach().clone() for name, weight in layers.items()}
        for name, weight in layers.items():
            change = (space.up[name].to(bench.device) * mix) @ space.down[name].to(bench.device)
            weight.copy_((originals[name].float() + change.view_as(weight)).to(weight.dtype))
        ratios["in the weights"] = bench.seconds(call) / base
        error = (call()[0].float() - gated).norm() / (gated - unchanged).norm()
        for name, weight in layers.items():
            weight.copy_(originals[name])
        bench.note(
            f"call, batch {batch}",
            milliseconds=1000 * base,
            over_base=ratios,
            error_of_effect_in_the_weights=error.item(),
        )


def discovery(bench):
    """Measure discovery, a sample, and where its time goes."""
    model, spent = bench.model, {}

    def watched(module, name):
        def begin(*args):
            bench.wait()
            spent[name] = spent.get(name, 0.0) - time.perf_counter()

        def end(*args):
            bench.wait()
            spent[name] += time.perf_counter()

        return module.register_forward_pre_hook(begin), module.register_forward_hook(end)

    options = dict(encoder=bench.encoder, progress=lambda items, **kw: items)
    bench.clear()
    discover(model, PROMPT, samples=8, n_directions=7, seed=9, **options)  # finds batch sizes
    hooks = [
        *watched(model.denoiser, "denoiser"),
        *watched(model.pipe.vae.decoder, "decoder"),
    ]
    samples = 16
    bench.wait()
    start = time.perf_counter()
    directions = discover(model, PROMPT, samples=samples, n_directions=12, **options)
    bench.wait()
    seconds = (time.perf_counter() - start) / samples
    for hook in hooks:
        hook.remove()
    shares = {name: value / samples / seconds for name, value in spent.items()}
    bench.note(
        "discovery",
        seconds_a_sample=seconds,
        hours_for_5000=seconds * 5000 / 3600,
        shares=shares,
        peak_GiB=bench.peak(),
    )
    return directions


def training(bench, directions, name, model, sliders, **options):
    """Measure the training steps of some sliders; what is before and after them is left out."""
    stamps = []

    def progress(items, desc=None, **kw):
        if desc != "training":
            return items

        def stamped():
            for item in items:
                bench.wait()
                stamps.append(time.perf_counter())
                yield item

        return stamped()

    bench.clear()
    start = time.perf_counter()
    space = train(
        model,
        directions,
        sliders=sliders,
        encoder=bench.encoder,
        n_held_out=1,
        progress=progress,
        calibrated=False,
        **options,
    )
    step = (stamps[-1] - stamps[0]) / max(1, len(stamps) - 1)
    bench.note(
        name,
        seconds_before_training=stamps[0] - start,
        seconds_a_step=step,
        seconds_a_slider_and_step=step / (options.get("sliders_per_step") or sliders),
        peak_GiB=bench.peak(),
        finite=all(b.isfinite().all().item() for b in space.up.values()),
    )


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tiny", action="store_true", help="a tiny model on the CPU")
    parser.add_argument("--output", type=Path, help="a JSON file for the figures")
    args = parser.parse_args()
    bench = Bench(args.tiny, args.output)
    calls(bench)
    directions = discovery(bench)
    sliders = 4 if args.tiny else 8
    training(
        bench,
        directions,
        "training, activations kept",
        bench.model,
        sliders,
        training_steps=4,
        init="random",
    )
    release = dict(method=SLIDERSPACE_RELEASE, sliders_per_step=3)
    training(
        bench,
        directions,
        "training, the released recipe",
        bench.model,
        sliders,
        training_steps=6,
        **release,
    )
    preview = None if args.tiny else AutoencoderTiny().to(bench.device, bench.dtype)
    low = load(
        bench.pipe,
        device=bench.device,
        steps=STEPS,
        guidance=GUIDANCE,
        low_memory=True,
        preview=preview,
    )
    training(
        bench,
        directions,
        "training, activations recomputed",
        low,
        sliders,
        training_steps=3,
        init="random",
    )
    training(
        bench,
        directions,
        "training from the first-order start",
        low,
        4,
        training_steps=2,
        init_latents=4,
    )


if __name__ == "__main__":
    main()
