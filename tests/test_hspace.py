"""Directions of the bottleneck are principal components of what the middle block puts out, and are added there."""

from contextlib import contextmanager

import pytest
import torch
from diffusers import PNDMScheduler
from families import make
from sklearn.decomposition import PCA
from tiny import PROMPT, never, quiet
from torch.testing import assert_close

from sliderspace.directions import hspace
from sliderspace import load
from sliderspace.directions.hspace import HSpace, discover_hspace, sweep_hspace
from sliderspace.sampling.generate import sample_latents, cycle_prompts, sample, initial_noise

STEPS, SAMPLES = 3, 12
OPTIONS = dict(samples=SAMPLES, n_directions=4, seed=2, steps=STEPS, guidance=2.0, progress=quiet)


@contextmanager
def watched(model):
    """Everything that the middle block puts out."""
    seen = []
    hook = model.denoiser.mid_block.register_forward_hook(lambda block, args, h: seen.append(h))
    try:
        yield seen
    finally:
        hook.remove()


def hooks(model):
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.denoiser.modules())


def images(model, samples, prompt=PROMPT, guidance=2.0):
    return sample(model, prompt, initial_noise(model, 2, samples), STEPS, guidance)


@pytest.fixture(scope="module")
def found(tiny_of):
    return discover_hspace(tiny_of("epsilon"), PROMPT, **OPTIONS)


# --- directions ------------------------------------------------------------------------------------------------------


def activations(model, prompts, guidance):
    """What the prompt's half of every step is, one image at a time, `(samples, steps, c, h, w)`."""
    rows = []
    for i in range(SAMPLES):
        with watched(model) as seen:
            images(model, [i], cycle_prompts(prompts, [i]), guidance)
        rows.append(torch.stack([h[-1] for h in seen]))
    return torch.stack(rows)


@pytest.mark.parametrize("guidance", [1.0, 2.0])
@pytest.mark.parametrize("prompts", [PROMPT, ["hat", PROMPT]])
def test_directions_are_principal_components(tiny, guidance, prompts):
    found = discover_hspace(tiny, prompts, **OPTIONS | {"guidance": guidance, "batch": 5})
    h = activations(tiny, prompts, guidance)
    pca = PCA(4, svd_solver="full").fit(h.flatten(1).double().numpy())
    assert_close(
        found.explained_variance_ratio.double(),
        torch.tensor(pca.explained_variance_ratio_),
        rtol=1e-3,
        atol=0,
    )
    assert_close(
        found.singular_values[:4].double(), torch.tensor(pca.singular_values_), rtol=1e-3, atol=0
    )
    theirs = torch.tensor(pca.components_).float()
    assert found.vectors.shape == (4, *h.shape[1:])
    assert_close((found.vectors.flatten(1) * theirs).sum(1).abs(), torch.ones(4), rtol=0, atol=1e-3)
    scores = (h - h.mean(0)).flatten(1) @ found.vectors.flatten(1).T
    assert_close(found.score_std, scores.std(0), rtol=1e-3, atol=0)


def test_directions_are_orthonormal_and_all_variance_is_accounted_for(found):
    flat = found.vectors.flatten(1)
    assert_close(flat @ flat.T, torch.eye(4), rtol=0, atol=1e-5)
    assert found.singular_values.shape == (
        SAMPLES - 1,
    ) and found.explained_variance_ratio.shape == (4,)
    assert (
        found.explained_variance_ratio.diff() <= 0
    ).all() and 0 < found.explained_variance_ratio.sum() < 1
    assert repr(found) == "HSpace(4 directions, 3 steps)"


def test_directions_come_from_the_seed_alone(tiny, found):
    torch.manual_seed(1)
    again, other = (
        discover_hspace(tiny, PROMPT, **OPTIONS),
        discover_hspace(tiny, PROMPT, **OPTIONS | {"seed": 3}),
    )
    assert torch.equal(again.vectors, found.vectors) and torch.equal(
        again.timesteps, found.timesteps
    )
    assert (other.singular_values - found.singular_values).abs().max() > 1e-3


def test_a_batch_that_does_not_fit_is_halved(tiny, found, monkeypatch):
    def small(model, prompt, noise, *args):
        made = sample(model, prompt, noise, *args)
        if len(noise) > 3:  # after its activations were seen
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return made

    monkeypatch.setattr(hspace, "sample", small)
    tiny.batch_sizes.clear()
    halved = discover_hspace(tiny, PROMPT, **OPTIONS)
    tiny.batch_sizes.clear()
    assert_close(halved.singular_values[:4], found.singular_values[:4], rtol=1e-3, atol=0)
    assert_close(halved.timesteps, found.timesteps)


# --- in use ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("strengths", [torch.zeros(4), torch.zeros(2, 4)])
def test_strength_0_is_the_unchanged_model(tiny, found, strengths):
    base = images(tiny, [0, 5])
    with found.on(tiny, strengths):
        assert torch.equal(images(tiny, [0, 5]), base)
    assert torch.equal(images(tiny, [0, 5]), base)


def test_strength_1_is_a_standard_deviation_along_the_direction(tiny, found):
    with watched(tiny) as before:
        images(tiny, [0])
    with found.on(tiny, [0.0, 1.0, 0.0, -2.0]), watched(tiny) as after:
        images(tiny, [0])
    wanted = found.score_std[1] * found.vectors[1, 0] - 2 * found.score_std[3] * found.vectors[3, 0]
    for half in (0, 1):  # with the prompt, and without
        assert_close(after[0][half] - before[0][half], wanted, rtol=0, atol=1e-4)


def test_each_step_gets_its_own_part(tiny, found):
    added = []
    with found.on(tiny, [1.0, 0.0, 0.0, 0.0]):
        hook = list(tiny.denoiser.mid_block._forward_hooks.values())[0]
        for t in found.timesteps:
            with torch.no_grad():  # the block's own output is what the hook gets
                zero = torch.zeros(2, *found.vectors.shape[2:])
                list(tiny.denoiser._forward_pre_hooks.values())[0](
                    tiny.denoiser, (), {"timestep": t}
                )
                added.append(hook(tiny.denoiser.mid_block, (), zero))
    assert_close(
        torch.stack(added)[:, 0], found.score_std[0] * found.vectors[0], rtol=1e-5, atol=1e-6
    )


@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_each_image_has_its_own_strengths(tiny, found, guidance):
    mixes = torch.tensor([[0.0, 0.0, 0.0, 0.0], [2.0, 0.0, 0.0, 0.0], [0.0, -1.0, 0.0, 3.0]])
    base = images(tiny, [0, 5, 1], guidance=guidance)
    with found.on(tiny, mixes):
        got = images(tiny, [0, 5, 1], guidance=guidance)
    assert_close(got[0], base[0], rtol=0, atol=0)
    for i, number in ((1, 5), (2, 1)):
        with found.on(tiny, mixes[i]):
            alone = images(tiny, [number], guidance=guidance)[0]
        assert_close(got[i], alone, rtol=0, atol=1e-4)
        assert (got[i] - base[i]).abs().max() > 1e-2


def test_the_bundled_model_with_guidance(model):
    found = discover_hspace(model, PROMPT, 8, 2, guidance=3.0, progress=quiet)
    with watched(model) as seen:
        base = sample(model, PROMPT, initial_noise(model, 0, [0, 1]), guidance=3.0)
    assert len(seen[0]) == 4  # twice as many as images
    with found.on(model, [[0.0, 0.0], [1.0, -1.0]]):
        got = sample(model, PROMPT, initial_noise(model, 0, [0, 1]), guidance=3.0)
    with found.on(model, [1.0, -1.0]):
        alone = sample(model, PROMPT, initial_noise(model, 0, [1]), guidance=3.0)
    assert torch.equal(got[0], base[0])
    assert_close(got[1:], alone, rtol=0, atol=1e-4)
    assert (got[1] - base[1]).abs().max() > 1e-2


def test_a_sweep_is_each_direction_alone(tiny, found):
    got = sweep_hspace(tiny, found, [0, 5], seed=2, strengths=(-1, 0, 2), batch=5, progress=quiet)
    assert got.shape == (4, 3, 2, *tiny.latent_shape)
    base = images(tiny, [0, 5])
    for k in range(4):
        assert_close(got[k, 1], base, rtol=0, atol=1e-4)
        for j, strength in ((0, -1.0), (2, 2.0)):
            with found.on(tiny, strength * torch.eye(4)[k]):
                assert_close(got[k, j], images(tiny, [0, 5]), rtol=0, atol=1e-4)
            assert (got[k, j] - base).abs().max() > 1e-2


def test_a_sweep_takes_the_steps_that_were_asked_for(tiny, monkeypatch):
    # PNDM looks twice at one of them, and Stable Diffusion's folders come with it
    scheduler = PNDMScheduler.from_config(tiny.pipe.scheduler.config, skip_prk_steps=True)
    monkeypatch.setattr(tiny.pipe, "scheduler", scheduler)
    found = discover_hspace(tiny, PROMPT, **OPTIONS)
    got = sweep_hspace(tiny, found, [0, 5], seed=2, strengths=(0,), progress=quiet)
    expected = sample_latents(tiny, PROMPT, [0, 5], 2, STEPS, 2.0)
    assert_close(got, expected.expand_as(got), rtol=0, atol=1e-4)


# --- nothing is left behind ------------------------------------------------------------------------------------------


def test_hooks_are_gone_after_an_error(tiny, found, monkeypatch):
    before = hooks(tiny)
    with pytest.raises(RuntimeError, match="stopped"):
        with found.on(tiny, torch.ones(4)):
            assert hooks(tiny) == before + 2
            raise RuntimeError("stopped")
    assert hooks(tiny) == before

    def stopped(*args, **options):
        raise RuntimeError("stopped")

    monkeypatch.setattr(tiny.denoiser.mid_block, "forward", stopped)
    with pytest.raises(RuntimeError, match="stopped"):
        discover_hspace(tiny, PROMPT, **OPTIONS)
    with pytest.raises(RuntimeError, match="stopped"):
        sweep_hspace(tiny, found, [0], progress=quiet)
    assert hooks(tiny) == before


@pytest.fixture(scope="module")
def transformer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("flux")
    make("flux-dev", folder)
    return load(folder, device="cpu", steps=2, size=(16, 16))


def test_a_transformer_has_no_bottleneck(transformer, found):
    before = hooks(transformer)
    with pytest.raises(
        ValueError, match="h-space is that of a unet's middle block, and .* has none"
    ):
        discover_hspace(transformer, PROMPT, **OPTIONS)
    with pytest.raises(ValueError, match="h-space is that of a unet's middle block"):
        with found.on(transformer, torch.zeros(4)):
            never()
    assert hooks(transformer) == before


# --- what is refused -------------------------------------------------------------------------------------------------

BAD = {
    "n_directions must be 1 to 11 for 12 samples, not 12": dict(n_directions=12),
    "n_directions must be 1 to 11 for 12 samples, not 0": dict(n_directions=0),
    "n_directions must be 1 to 0 for 1 samples, not 1": dict(n_directions=1, samples=1),
    "prompt must be a non-empty text, not ' '": dict(prompt=" "),
    "steps must be 1 or more, not 0": dict(steps=0),
}


@pytest.mark.parametrize("message", BAD)
def test_bad_input_is_refused_before_any_work(tiny, monkeypatch, message):
    monkeypatch.setattr(hspace, "sample", never)
    with pytest.raises(ValueError, match=message):
        discover_hspace(tiny, **{"prompt": PROMPT} | OPTIONS | BAD[message])


@pytest.mark.parametrize(
    "strengths",
    [
        torch.zeros(3),
        torch.zeros(2, 3),
        torch.zeros(1, 1, 4),
        torch.tensor(1.0),
        [],
        torch.tensor([0.0, torch.nan, 0.0, 0.0]),
    ],
    ids=lambda s: f"{s}",
)
def test_strengths_of_other_directions_are_refused(tiny, found, strengths):
    before = hooks(tiny)
    with pytest.raises(ValueError, match="strengths must be"):
        with found.on(tiny, strengths):
            never()
    assert hooks(tiny) == before


def test_strengths_of_other_images_are_refused(tiny, found):
    with pytest.raises(
        ValueError, match="strengths are for 3 images, .* a batch of 4"
    ):  # guidance doubles two
        with found.on(tiny, torch.ones(3, 4)):
            images(tiny, [0, 1])


def test_directions_of_another_model_are_refused(tiny, model, found):
    with pytest.raises(ValueError, match="directions|h-space"):
        with found.on(model, torch.ones(4)):
            sample(model, PROMPT, initial_noise(model, 0, [0]))


def test_a_space_of_directions_says_what_it_explains():
    values = torch.tensor([3.0, 2.0, 1.0])
    space = HSpace(torch.zeros(2, 1, 1, 1, 1), values, torch.ones(2), torch.ones(1), [PROMPT], None)
    assert_close(space.explained_variance_ratio, torch.tensor([9.0, 4.0]) / 14)
