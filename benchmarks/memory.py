"""Memory that full-size models take: weights, sliders and what a training step keeps for its gradients.

    python benchmarks/memory.py             print the table
    python benchmarks/memory.py --readme    write it into docs/report.md too

Computed, not measured: the real networks with their real shapes run on torch's "meta" device, which has shapes and no
numbers, and what autograd keeps is counted. A GPU's allocator and workspaces come on top, a tenth or so. Two minutes.
"""

import argparse
from pathlib import Path
from types import SimpleNamespace

import torch
from diffusers import AutoencoderKL, AutoencoderTiny, FluxTransformer2DModel, UNet2DConditionModel
from portraits import table, write_figures

from sliderspace.sliders.adapter import GatedAdapter, target_layers
from sliderspace.models.pipeline import Model

GIB = 2**30
SLIDERS, RANK = 64, 1
LATENTS, WORDS = 128, 77  # a side, for images of 1024 pixels; tokens

UNET = dict(
    sample_size=LATENTS,
    layers_per_block=2,
    use_linear_projection=True,
    cross_attention_dim=2048,
    block_out_channels=(320, 640, 1280),
    attention_head_dim=(5, 10, 20),
    transformer_layers_per_block=(1, 2, 10),
    down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    addition_embed_type="text_time",
    addition_time_embed_dim=256,
    projection_class_embeddings_input_dim=2816,
)
VAE = dict(
    block_out_channels=(128, 256, 512, 512),
    layers_per_block=2,
    sample_size=1024,
    down_block_types=("DownEncoderBlock2D",) * 4,
    up_block_types=("UpDecoderBlock2D",) * 4,
)


class Attention(torch.autograd.Function):
    "What a GPU's fused attention keeps; on the meta device torch would take the kind that keeps every weight."

    @staticmethod
    def forward(ctx, q, k, v):
        out = q.new_empty(*q.shape[:-1], v.shape[-1])
        ctx.save_for_backward(q, k, v, out, q.new_empty(q.shape[:-1], dtype=torch.float32))
        return out


def sdxl():
    net = UNet2DConditionModel(**UNET)

    def call(n):
        extra = {"text_embeds": torch.zeros(n, 1280), "time_ids": torch.zeros(n, 6)}
        half = {k: v.bfloat16() for k, v in extra.items()}
        return net(
            torch.zeros(n, 4, LATENTS, LATENTS).bfloat16(),
            torch.full((n,), 500),
            torch.zeros(n, WORDS, 2048).bfloat16(),
            added_cond_kwargs=half,
        ).sample

    return "SDXL", "StableDiffusionXLPipeline", net, call, 4


def flux():
    net = FluxTransformer2DModel(guidance_embeds=False)
    patches = (LATENTS // 2) ** 2

    def call(n):
        return net(
            torch.zeros(n, patches, 64).bfloat16(),
            torch.zeros(n, 256, 4096).bfloat16(),
            torch.zeros(n, 768).bfloat16(),
            torch.full((n,), 0.5),
            torch.zeros(patches, 3),
            torch.zeros(256, 3),
        ).sample

    return "FLUX.1-schnell", "FluxPipeline", net, call, 16


def kept(run):
    "Bytes that autograd keeps of a call, each storage once, parameters left out."
    storages, parameters = {}, set()

    def pack(x):
        if isinstance(x, torch.nn.Parameter):
            parameters.add(x.untyped_storage()._cdata)
        storages[x.untyped_storage()._cdata] = (
            x.untyped_storage()
        )  # held, so that no address is used twice
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        out = run()
    return sum(s.nbytes() for k, s in storages.items() if k not in parameters), out


def kept_of(net, run):
    return kept(run)[0]


def recomputed(net, run):
    "Bytes kept where blocks are run again for their gradients: what goes into them, and the insides of the largest."
    net.enable_gradient_checkpointing()
    whole, largest = kept(run)[0], 0

    def probe(block, *args):
        nonlocal largest
        inside, out = kept(lambda: block(*args))
        largest = max(largest, inside)
        return out

    for module in net.modules():
        if hasattr(module, "_gradient_checkpointing_func"):
            module._gradient_checkpointing_func = probe
    run()
    net.disable_gradient_checkpointing()
    return whole + largest


def size(net):
    return sum(p.numel() * p.element_size() for p in net.parameters())


def sliders_on(kind, net):
    "64 sliders on a network; their bytes."
    scheduler = SimpleNamespace(config=SimpleNamespace(num_train_timesteps=1000))
    pipe = type(kind, (SimpleNamespace,), {})(
        unet=net, _execution_device=torch.device("meta"), scheduler=scheduler
    )
    model = Model(pipe, kind, 4, 0.0)
    adapter = GatedAdapter(model, target_layers(model), SLIDERS, RANK)
    parameters = [p.requires_grad_(True) for pair in adapter.parameters().values() for p in pair]
    return sum(p.numel() * 4 for p in parameters)


def main():
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--readme", action="store_true", help="write the table into docs/report.md")
    args, rows = p.parse_args(), []

    def fused(query, key, value, *args, **options):
        return Attention.apply(query, key, value)

    torch.nn.functional.scaled_dot_product_attention = fused
    with torch.device("meta"):
        full = AutoencoderKL(**VAE).bfloat16().requires_grad_(False)
        tiny = AutoencoderTiny().bfloat16().requires_grad_(False)
        for make in (sdxl, flux):
            name, kind, net, call, channels = make()
            net.bfloat16().requires_grad_(False).eval()
            x0 = torch.zeros(1, channels, LATENTS, LATENTS).bfloat16().requires_grad_()
            trained = sliders_on(kind, net)
            for label, count in (("kept", kept_of), ("recomputed", recomputed)):
                step = count(net, lambda call=call: call(1))
                for decoder, vae in (("autoencoder", full), ("tiny autoencoder", tiny)):
                    how = count if vae is full else kept_of
                    pictures = how(vae, lambda vae=vae, z=x0[:, :4]: vae.decode(z).sample) + size(
                        vae
                    )
                    parts = [
                        size(net) - trained,
                        4 * trained,
                        step,
                        pictures,
                    ]  # sliders, gradients, two of Adam
                    rows.append(
                        [name, label, decoder, *(f"{p / GIB:.1f}" for p in (*parts, sum(parts)))]
                    )
    head = ["model", "activations", "decoder", "weights", "sliders", "step", "decoding", "sum"]
    figures = (
        f"GiB of GPU memory to train {SLIDERS} sliders of rank {RANK} on all attention: 1024 pixels, bfloat16, "
        "one image at a time, text encoders parked on the CPU. *Computed* from the networks' real shapes by "
        '`benchmarks/memory.py`, not measured; "recomputed" is `low_memory=True`, the tiny autoencoder is '
        f"`preview=`.\n\n{table(head, rows)}\n"
    )
    print(figures)
    if args.readme:
        write_figures(Path(__file__).parents[1] / "docs/report.md", figures, "memory table")


if __name__ == "__main__":
    main()
