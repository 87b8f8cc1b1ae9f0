"""Sampling is the pipeline's own, and noise comes from its address alone."""

import copy

import pytest
import torch
import torch.nn.functional as F
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    PNDMScheduler,
)
from tiny import PREDICTION_TYPES, PROMPT, quiet
from torch.testing import assert_close

from sliderspace.features.encoders import normalized_features, latent_encoder, pixel_encoder
from sliderspace.models.pipeline import Model
from sliderspace.features.encoders import encode_latents
from sliderspace.sampling.generate import generate_images, sample, initial_noise
from sliderspace.features.collect import collect_features

SCHEDULERS = [DDIMScheduler, EulerDiscreteScheduler, DPMSolverMultistepScheduler, PNDMScheduler]
STEPS = 4


@pytest.fixture(
    params=[
        (s, k) for s in SCHEDULERS for k in PREDICTION_TYPES if (s, k) != (PNDMScheduler, "sample")
    ],
    ids=lambda pair: f"{pair[0].__name__}-{pair[1]}",
)
def scheduled(request, tiny_of, monkeypatch):
    """A tiny model with one of the schedulers and prediction types (PNDM does not know "sample")."""
    scheduler, kind = request.param
    pipe = tiny_of(kind).pipe
    options = {"skip_prk_steps": True} if scheduler is PNDMScheduler else {}
    monkeypatch.setattr(pipe, "scheduler", scheduler.from_config(pipe.scheduler.config, **options))
    return tiny_of(kind)


def from_pipe(model, noise, guidance, output_type="latent"):
    return model.pipe(
        PROMPT,
        num_images_per_prompt=len(noise),
        latents=noise,
        num_inference_steps=STEPS,
        guidance_scale=guidance,
        output_type=output_type,
    ).images


# --- the loop --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("guidance", [1.0, 4.0])
def test_latents_are_the_pipelines(scheduled, guidance):
    noise = initial_noise(scheduled, 0, [0, 1])
    ours = sample(scheduled, PROMPT, noise, STEPS, guidance)
    assert_close(ours, from_pipe(scheduled, noise, guidance), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("guidance", [0.0, 0.5])
def test_low_guidance_is_none_as_in_the_pipeline(tiny, guidance):
    # the usual call of distilled models is guidance_scale=0: diffusers guides above 1 only
    noise = initial_noise(tiny, 0, [0, 1])
    ours = sample(tiny, PROMPT, noise, STEPS, guidance)
    assert_close(ours, from_pipe(tiny, noise, guidance), rtol=1e-4, atol=1e-4)


def test_images_are_the_pipelines(tiny):
    theirs = from_pipe(tiny, initial_noise(tiny, 5, [0, 1]), 3.0, "pt")
    assert_close(
        generate_images(tiny, PROMPT, 2, seed=5, steps=STEPS, guidance=3.0),
        theirs,
        rtol=0,
        atol=1e-4,
    )


def test_estimates_are_the_schedulers(scheduled):
    model, noise = scheduled, initial_noise(scheduled, 0, [0, 1])
    scheduler = copy.deepcopy(model.pipe.scheduler)
    scheduler.set_timesteps(STEPS)
    x, run = noise * scheduler.init_noise_sigma, []
    sample(model, PROMPT, noise, STEPS, guidance=1.0, on_step=run.append)
    for step in run:
        seen = scheduler.scale_model_input(x, step.timestep)
        assert_close(step.latents, seen, rtol=1e-5, atol=1e-5)
        output = model.predict(seen, step.timestep, PROMPT, 1.0)[0]
        result = scheduler.step(output, step.timestep, x)
        theirs = result.get("pred_original_sample")
        if isinstance(scheduler, DPMSolverMultistepScheduler):
            theirs = scheduler.model_outputs[-1]  # DPM-Solver++ keeps its estimates of x0
        if theirs is not None:
            assert_close(step.x0, theirs, rtol=1e-4, atol=1e-4)
        x = result.prev_sample
        assert_close(step.next, x, rtol=1e-5, atol=1e-5)


def test_nobody_shares_a_scheduler(tiny):
    # a run within a run: multistep schedulers would mix their histories
    noise, inner = initial_noise(tiny, 0, [0, 1]).split(1), []

    def another(step):
        inner.append(sample(tiny, PROMPT, noise[1], STEPS, 1.0))

    outer = sample(tiny, PROMPT, noise[0], STEPS, 1.0, on_step=another)
    assert torch.equal(outer, sample(tiny, PROMPT, noise[0], STEPS, 1.0))
    assert all(
        torch.equal(latents, sample(tiny, PROMPT, noise[1], STEPS, 1.0)) for latents in inner
    )


# --- noise -----------------------------------------------------------------------------------------------------------


def test_noise_comes_from_seed_and_sample_alone(tiny):
    noise = initial_noise(tiny, 0, [0, 1, 2, 3])
    assert torch.equal(
        noise, torch.cat([initial_noise(tiny, 0, part) for part in ([0], [1, 2], [3])])
    )
    assert torch.equal(noise.flip(0), initial_noise(tiny, 0, [3, 2, 1, 0]))
    torch.manual_seed(123)
    assert torch.equal(noise, initial_noise(tiny, 0, [0, 1, 2, 3]))
    others = torch.cat([initial_noise(tiny, 1, [0]), initial_noise(tiny, 10, [0]), noise])
    assert len(torch.unique(others.flatten(1), dim=0)) == len(others)


def test_noise_is_gaussian(tiny):
    noise = initial_noise(tiny, 0, list(range(200))).flatten(1)  # 200 x 256
    assert abs(noise.mean()) < 0.02 and abs(noise.std() - 1) < 0.02
    correlation = noise.corrcoef().fill_diagonal_(0)
    assert correlation.abs().max() < 0.4


def test_bad_steps_are_refused(tiny):
    for steps in (0, -1):
        with pytest.raises(ValueError, match=f"steps must be 1 or more, not {steps}"):
            sample(tiny, PROMPT, initial_noise(tiny, 0, [0]), steps)


# --- samples ---------------------------------------------------------------------------------------------------------


def test_features_are_of_every_step_and_of_the_final_image(scheduled):
    # some schedulers take more steps than they are asked for (PNDM)
    found = collect_features(
        scheduled, latent_encoder(), PROMPT, 2, steps=2, guidance=2.0, progress=quiet
    )
    steps = []
    final = sample(
        scheduled, PROMPT, initial_noise(scheduled, 0, [0, 1]), 2, 2.0, on_step=steps.append
    )
    expected = [*(step.x0 for step in steps[:-1]), final]
    assert_close(found.features, torch.stack([F.normalize(x.flatten(1)) for x in expected], 1))
    assert_close(found.latents[:], final)


def test_several_prompts_in_a_batch_are_the_same_as_one_by_one(tiny):
    noise, prompts = initial_noise(tiny, 0, [0, 1, 2]), [PROMPT, "hat", PROMPT]
    together = sample(tiny, prompts, noise, 3, 2.0)
    for i, prompt in enumerate(prompts):
        assert_close(together[[i]], sample(tiny, prompt, noise[[i]], 3, 2.0), rtol=0, atol=1e-5)
    assert (sample(tiny, "hat", noise[:1], 3, 2.0) - together[:1]).abs().max() > 1e-3
    assert_close(
        generate_images(tiny, ["hat", PROMPT], 4)[[1, 3]],
        generate_images(tiny, PROMPT, [1, 3]),
        rtol=0,
        atol=1e-5,
    )


@pytest.mark.parametrize("encoder", [latent_encoder(), pixel_encoder(4)], ids=lambda e: e.space)
def test_features_of_latents_that_do_not_fit_at_once_are_the_same(tiny, monkeypatch, encoder):
    x = torch.randn(5, *tiny.latent_shape, generator=torch.Generator().manual_seed(0))
    whole, decode, parts = normalized_features(tiny, encoder, x), Model.decode, []

    def small(model, z, preview=False):
        if len(z) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        parts.append(len(z))
        return decode(model, z, preview)

    monkeypatch.setattr(Model, "decode", small)
    tiny.batch_sizes.clear()
    got = encode_latents(tiny, encoder, x)
    tiny.batch_sizes.clear()
    assert_close(got, whole, rtol=0, atol=1e-5)
    assert sum(parts) == (5 if encoder.space == "images" else 0)
