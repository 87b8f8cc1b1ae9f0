"""What several things at once do: threads, samplers that add noise, adapters of others, rows that are not finite."""

from threading import Thread

import pytest
import torch
from diffusers import DDPMScheduler, EulerAncestralDiscreteScheduler, LCMScheduler
from tiny import PROMPT, quiet, random_directions, random_space
from torch.testing import assert_close

from sliderspace.sliders.adapter import target_layers
from sliderspace.features.encoders import latent_encoder
from sliderspace.models.pipeline import Model
from sliderspace.viz.plots import plot_spectrum
from sliderspace.sampling.generate import sample, initial_noise
from sliderspace.training.initialization import make_noised_latents, score_gradients


@pytest.fixture(params=[DDPMScheduler, EulerAncestralDiscreteScheduler, LCMScheduler])
def noisy(request, tiny):
    """A model whose sampler adds noise of its own."""
    before = tiny.pipe.scheduler
    tiny.pipe.scheduler = request.param.from_config(before.config)
    yield tiny
    tiny.pipe.scheduler = before


def test_noise_of_the_sampler_is_seeded_and_does_not_mind_the_batch(noisy):
    noise = initial_noise(noisy, 0, [0, 1, 2])
    together = sample(noisy, PROMPT, noise, 4, 1.0)
    torch.manual_seed(1)
    alone = sample(noisy, PROMPT, noise[1:2], 4, 1.0)
    assert_close(together[1:2], alone, rtol=1e-4, atol=1e-4)


def test_a_sampler_that_adds_noise_is_the_pipelines(noisy):
    noise, seeds = initial_noise(noisy, 0, [0, 1]), (5, 6)

    def chance():
        return [torch.Generator().manual_seed(s) for s in seeds]

    theirs = noisy.pipe(
        PROMPT,
        num_images_per_prompt=2,
        latents=noise,
        num_inference_steps=4,
        guidance_scale=1.0,
        generator=chance(),
        output_type="latent",
    ).images
    assert_close(
        sample(noisy, PROMPT, noise, 4, 1.0, generator=chance()), theirs, rtol=1e-4, atol=1e-4
    )


def test_sliders_leave_the_model_after_a_with(tiny):
    names = [n for n, _ in tiny.denoiser.named_modules()]
    with random_space(tiny).on(tiny, {0: 1}):
        assert [n for n, _ in tiny.denoiser.named_modules()] != names
    assert [n for n, _ in tiny.denoiser.named_modules()] == names


def test_switching_sliders_on_draws_no_random_numbers(tiny):
    torch.manual_seed(3)
    before = torch.random.get_rng_state()
    with random_space(tiny).on(tiny, {0: 1}):
        assert torch.equal(torch.random.get_rng_state(), before)


def test_a_mix_is_of_the_thread_that_set_it(tiny):
    space, noise = random_space(tiny), initial_noise(tiny, 0, [0])
    base, seen = sample(tiny, PROMPT, noise, 2, 1.0), []
    with space.on(tiny, {0: 2}):
        mixed = sample(tiny, PROMPT, noise, 2, 1.0)
        other = Thread(target=lambda: seen.append(sample(tiny, PROMPT, noise, 2, 1.0)))
        other.start()
        other.join()
    assert torch.equal(seen[0], base) and not torch.equal(mixed, base)


def test_sliders_of_two_threads_take_turns(tiny):
    first, second = random_space(tiny, seed=1), random_space(tiny, seed=2)
    noise, found = initial_noise(tiny, 0, [0]), {}

    def work(name, space):
        for _ in range(5):
            with space.on(tiny, {0: 2}):
                found.setdefault(name, []).append(sample(tiny, PROMPT, noise, 2, 1.0))

    work("alone 1", first), work("alone 2", second)
    threads = [Thread(target=work, args=a) for a in (("1", first), ("2", second))]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    for name in ("1", "2"):
        assert len(found[name]) == 5 and all(
            torch.equal(x, found[f"alone {name}"][0]) for x in found[name]
        )


def test_samples_made_with_sliders_on_are_of_another_model(tiny):
    plain = tiny.identity()
    with random_space(tiny).on(tiny, {0: 1}):
        assert tiny.identity() != plain
    with random_space(tiny).on(tiny, {0: 0}):
        assert tiny.identity() == plain


def test_gradients_leave_out_rows_that_are_not_finite(tiny):
    found = random_directions(tiny, latent_encoder())
    pool = make_noised_latents(tiny, found, list(range(8)), rows=6, seed=0)
    vectors, unit = found.vectors[:2], found.score_std[:2]
    weights = [tiny.denoiser.get_submodule(n).weight for n in target_layers(tiny, "keys-values")]
    pool.latents[2] = torch.nan
    some = score_gradients(
        tiny, latent_encoder(), pool, vectors, unit, weights, batch=3, progress=quiet
    )
    assert all(g.isfinite().all() for g in some) and any(g.abs().sum() > 0 for g in some)


def test_pools_hold_every_timestep(tiny):
    found = random_directions(tiny, latent_encoder())
    pool = make_noised_latents(tiny, found, [0, 1], rows=1, seed=0)
    assert pool.timestep.tolist() == tiny.timesteps(found.samples.run.steps)[0].tolist()


def test_plots_are_pictures_without_a_backend(tiny):
    assert plot_spectrum(random_directions(tiny, latent_encoder()))._repr_png_()[:4] == b"\x89PNG"


def test_models_say_what_they_are(tiny):
    assert isinstance(tiny, Model) and len(repr(tiny)) < 300
    assert len(repr(random_space(tiny))) < 300
