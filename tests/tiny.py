"""Small random pipelines, directions and sliders, made in code: the mechanics need no trained weights."""

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from sliderspace.sliders.adapter import target_layers
from sliderspace.directions.discovery import fit_directions
from sliderspace.features.encoders import normalized_features
from sliderspace.models.pipeline import asset_path
from sliderspace.sliders.space import SliderSpace
from sliderspace.features.collect import SamplingConfig, SampleFeatures

PROMPT = "portrait of a person"
PREDICTION_TYPES = ("epsilon", "v_prediction", "sample")


def quiet(items, **options):
    """A `progress` that shows nothing."""
    return items


def never(*args, **options):
    """In the place of whatever must not be reached when input is refused before any work."""
    raise AssertionError("work began")


def tiny_parts(prediction_type="epsilon", seed=0, words=32):
    """Parts of a Stable Diffusion pipeline for images of 16x16 pixels."""
    torch.manual_seed(seed)
    tokenizer = CLIPTokenizer.from_pretrained(asset_path() / "tokenizer")
    special = {f"{k}_token_id": getattr(tokenizer, f"{k}_token_id") for k in ("bos", "eos", "pad")}
    text = CLIPTextConfig(
        vocab_size=len(tokenizer),
        max_position_embeddings=tokenizer.model_max_length,
        hidden_size=words,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        projection_dim=32,
        **special,
    )
    return {
        "unet": UNet2DConditionModel(
            sample_size=8,
            block_out_channels=(32, 64),
            layers_per_block=1,
            norm_num_groups=8,
            attention_head_dim=8,
            cross_attention_dim=words,
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        ),
        "vae": AutoencoderKL(
            sample_size=16,
            block_out_channels=(8, 16),
            norm_num_groups=4,
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
        ),
        "text_encoder": CLIPTextModel(text),
        "tokenizer": tokenizer,
        "scheduler": DDIMScheduler(
            beta_schedule="scaled_linear",
            beta_start=0.00085,
            beta_end=0.012,
            steps_offset=1,
            clip_sample=False,
            prediction_type=prediction_type,
        ),
    }


def pipeline_of(parts):
    return StableDiffusionPipeline(
        **parts, safety_checker=None, feature_extractor=None, requires_safety_checker=False
    )


def tiny_pipeline(*args, **options):
    return pipeline_of(tiny_parts(*args, **options))


def random_directions(model, encoder, samples=24, count=6, steps=3, guidance=2.0, seed=0):
    """Directions of random features and latents, their run card filled in: as from `discover`, without sampling."""
    gen = torch.Generator().manual_seed(seed)
    latents = torch.randn(samples, *model.latent_shape, generator=gen)
    width = normalized_features(model, encoder, latents[:1]).shape[-1]
    rows = F.normalize(torch.randn(samples, steps, width, generator=gen), dim=-1)
    run = SamplingConfig(
        model.name, model.identity(), encoder.name, [PROMPT], samples, seed, steps, guidance
    )
    return fit_directions(SampleFeatures(run, rows, latents), count)


def random_weights(model, layers, sliders, rank=1, seed=0, std=0.3):
    """Down- and up-projections that nobody trained and that change pictures all the same."""
    gen = torch.Generator().manual_seed(seed)
    weights = {n: model.denoiser.get_submodule(n) for n in layers}
    shapes = {n: getattr(w, "base_layer", w).weight.shape for n, w in weights.items()}
    down = {n: std * torch.randn(sliders * rank, *s[1:], generator=gen) for n, s in shapes.items()}
    up = {
        n: std * torch.randn(s[0], sliders * rank, *[1] * len(s[2:]), generator=gen)
        for n, s in shapes.items()
    }
    return down, up


def random_space(
    model, labels=("hair", "hat", "age"), rank=1, seed=0, targets="attention", card=None
):
    """A space of random sliders, at home on `model`."""
    layers = target_layers(model, targets)
    down, up = random_weights(model, layers, len(labels), rank, seed)
    ranges = torch.tensor([[-2.0, 2.0]] * len(labels))
    card = {
        "model": model.name,
        "fingerprint": model.fingerprint(layers),
        "prompts": [PROMPT],
        "denoiser": model.denoiser_name,
    } | (card or {})
    return SliderSpace(down, up, list(labels), ranges, rank, card)
