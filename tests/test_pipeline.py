"""The clean-image estimate is the schedulers' own; ordinary folders load, and what does not fit is refused by name."""

import diffusers
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DiffusionPipeline,
    EulerDiscreteScheduler,
    LCMScheduler,
    UNet2DConditionModel,
)
from PIL import Image
from tiny import PREDICTION_TYPES, PROMPT
from torch.testing import assert_close

from sliderspace import load
from sliderspace.models.pipeline import BUNDLED, asset_path
from sliderspace.sampling.generate import generate_images, sample, initial_noise
from sliderspace.models.schedulers import alpha_sigma, x0_estimate

# --- one-step estimate -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", PREDICTION_TYPES)
@pytest.mark.parametrize("scheduler_class", [DDIMScheduler, DDPMScheduler, EulerDiscreteScheduler])
def test_x0_estimate_is_the_schedulers(scheduler_class, kind):
    off = {} if scheduler_class is EulerDiscreteScheduler else {"clip_sample": False}
    scheduler = scheduler_class(prediction_type=kind, **off)
    scheduler.set_timesteps(8)
    torch.manual_seed(0)
    x, output = torch.randn(2, 2, 4, 8, 8)
    for i, t in enumerate(scheduler.timesteps):
        seen = scheduler.scale_model_input(x, t)
        theirs = scheduler.step(output, t, x).pred_original_sample
        scaled = scheduler_class is EulerDiscreteScheduler  # its latents have variance 1 + sigma^2
        a = 1 / (1 + scheduler.sigmas[i] ** 2) if scaled else scheduler.alphas_cumprod[t]
        assert_close(
            x0_estimate(output, seen, a.sqrt(), (1 - a).sqrt(), kind), theirs, rtol=1e-5, atol=1e-5
        )


@pytest.mark.parametrize("kind", PREDICTION_TYPES)
def test_x0_estimate_takes_a_timestep_for_each_sample(kind):
    torch.manual_seed(0)
    (x, output), a = torch.randn(2, 3, 4, 8, 8), torch.tensor([0.01, 0.5, 1.0])
    signal, noise = a.sqrt(), (1 - a).sqrt()
    one_by_one = [x0_estimate(output[[i]], x[[i]], signal[i], noise[i], kind) for i in range(3)]
    assert_close(x0_estimate(output, x, signal, noise, kind), torch.cat(one_by_one), rtol=0, atol=0)


def test_a_clean_image_is_found_again(tiny_of):
    torch.manual_seed(0)
    clean, noise = torch.randn(2, 3, 4, 8, 8)
    scheduler, t = tiny_of("epsilon").pipe.scheduler, torch.tensor([1, 500, 900])
    noisy = scheduler.add_noise(clean, noise, t)
    answers = {
        "epsilon": noise,
        "v_prediction": scheduler.get_velocity(clean, noise, t),
        "sample": clean,
    }
    for kind, output in answers.items():
        assert_close(
            x0_estimate(output, noisy, *alpha_sigma(scheduler, t), kind),
            clean,
            rtol=0,
            atol=1e-5,
        )


def test_other_prediction_types_are_refused():
    with pytest.raises(ValueError, match="'flow_prediction' or 'trigflow', not 'flow'"):
        x0_estimate(torch.zeros(1, 4, 8, 8), torch.zeros(1, 4, 8, 8), 0.5, 0.5, "flow")


# --- loading ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", PREDICTION_TYPES)
def test_a_folder_loads_as_it_was_saved(tiny_folder, tiny_of, kind):
    model = tiny_of(kind)
    assert (model.name, model.prediction_type, model.latent_shape) == (
        tiny_folder(kind).name,
        kind,
        (4, 8, 8),
    )
    assert model.decode(initial_noise(model, 0, [0])).shape == (1, 3, 16, 16)
    parts = (model.pipe.unet, model.pipe.vae, model.pipe.text_encoder)
    assert not any(p.requires_grad for part in parts for p in part.parameters())


def test_a_loaded_pipeline_is_taken(fresh):
    model = load(fresh.pipe, device="cpu")
    assert model.pipe is fresh.pipe and model.denoiser is fresh.pipe.unet


def test_unknown_names_and_folders_are_refused(tmp_path):
    with pytest.raises(ValueError, match="unknown model 'stable-confusion'"):
        load("stable-confusion")
    with pytest.raises(ValueError, match=f"unknown model '{tmp_path}'.*model_index.json"):
        load(tmp_path)


@pytest.mark.parametrize("part", ["vae", "text_encoder", "tokenizer"])
def test_pipelines_with_a_part_missing_are_refused(fresh, part):
    setattr(fresh.pipe, part, None)
    with pytest.raises(ValueError, match=f"StableDiffusionPipeline is not .* has no {part}$"):
        load(fresh.pipe, device="cpu")


@pytest.mark.parametrize(
    "kind", ["StableDiffusionImg2ImgPipeline", "StableDiffusionInpaintPipeline"]
)
def test_pipelines_that_start_from_an_image_are_refused(fresh, kind):
    pipe = getattr(diffusers, kind)(**fresh.pipe.components, requires_safety_checker=False)
    with pytest.raises(
        ValueError, match=f"{kind} is not a text-to-image pipeline .* starts from an image"
    ):
        load(pipe, device="cpu")


def test_a_folder_of_ones_own_is_not_taken_for_the_bundled_model(
    tmp_path, tiny_folder, monkeypatch
):
    (tmp_path / "portraits").symlink_to(tiny_folder("epsilon"))
    monkeypatch.chdir(tmp_path)
    assert load(tmp_path / "portraits", device="cpu").latent_shape == (4, 8, 8)
    assert load("portraits", device="cpu").latent_shape != (4, 8, 8)
    assert load("./portraits", device="cpu").latent_shape == (4, 8, 8)


# --- the bundled model -----------------------------------------------------------------------------------------------


def test_plain_diffusers_makes_the_same_images(model):
    pipe = DiffusionPipeline.from_pretrained(asset_path(), local_files_only=True)
    noise = initial_noise(model, 3, [0, 1])
    theirs = pipe(
        PROMPT,
        num_images_per_prompt=2,
        latents=noise,
        num_inference_steps=3,
        guidance_scale=model.guidance,
        output_type="pt",
    ).images
    assert_close(generate_images(model, PROMPT, 2, seed=3, steps=3), theirs, rtol=0, atol=1e-4)


def test_open_clip_loads_the_bundled_clip():
    import open_clip

    source = f"local-dir:{asset_path('portraits') / 'clip'}"
    net, preprocess = open_clip.create_model_from_pretrained(source)
    tokens = open_clip.get_tokenizer(source)([PROMPT, "hat"])
    assert open_clip.create_model(source).visual.image_size == net.visual.image_size
    image = net.encode_image(preprocess(Image.new("RGB", (64, 64), "teal"))[None])
    text = net.encode_text(tokens)
    assert tokens.shape == (2, net.context_length)
    assert image.shape[1] == text.shape[1] and image.isfinite().all() and text.isfinite().all()
    assert not torch.equal(text[0], text[1])


@pytest.fixture(scope="module")
def fast():
    return load("portraits-fast", device="cpu")


def test_the_fast_model_draws_in_four_steps_without_guidance(fast):
    assert (fast.name, fast.steps, fast.guidance) == ("portraits-fast", 4, 1.0)
    assert (
        isinstance(fast.pipe.scheduler, LCMScheduler)
        and fast.identity() != load(device="cpu").identity()
    )


def test_plain_diffusers_makes_the_fast_models_images(fast):
    own = asset_path("portraits-fast")
    pipe = DiffusionPipeline.from_pretrained(
        asset_path(),
        local_files_only=True,
        scheduler=LCMScheduler.from_pretrained(own / "scheduler"),
        unet=UNet2DConditionModel.from_pretrained(own / "unet"),
    )
    noise = initial_noise(fast, 3, [0])
    ours = sample(fast, PROMPT, noise, generator=torch.Generator().manual_seed(5))
    theirs = pipe(
        PROMPT,
        latents=noise,
        num_inference_steps=4,
        guidance_scale=1.0,
        output_type="latent",
        generator=torch.Generator().manual_seed(5),
    ).images
    assert_close(ours, theirs, rtol=0, atol=1e-4)


def test_the_bundled_files_are_small():
    sizes = {
        name: sum(p.stat().st_size for p in asset_path(name).rglob("*") if p.is_file())
        for name in BUNDLED
    }
    assert sizes["portraits"] <= 40e6 and sum(sizes.values()) <= 60e6
