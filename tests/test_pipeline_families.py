"""The same lines work on every family of pipelines: each is a tiny random pipeline, saved and loaded as users' are."""

import re

import diffusers
import pytest
import torch
from families import FAMILIES, OTHERS, make
from peft import LoraConfig, inject_adapter_in_model, set_peft_model_state_dict
from safetensors.torch import load_file
from tiny import PROMPT, quiet, random_space
from torch.testing import assert_close

from sliderspace import SliderSpace, discover, load, measure, train
from sliderspace.sliders.adapter import GatedAdapter, target_layers
from sliderspace.training.alignment import AlignmentTrainer, AlignmentConfig, held_out_cosines
from sliderspace.training.from_text import Concept, train_concepts
from sliderspace.features.encoders import pixel_encoder
from sliderspace.models.registry import PRESETS, noise_level
from sliderspace.training.from_images import train_image_pairs
from sliderspace.training.prediction_matching import ConceptConfig, active_steps
from sliderspace.sampling.generate import sample, initial_noise
from sliderspace.training.initialization import make_noised_latents

STEPS = 3
SOLVERS = {"LCMScheduler", "SCMScheduler"}  # jump to x0 and add noise anew


@pytest.fixture(
    scope="module", params=[*FAMILIES, *(pytest.param(n, marks=pytest.mark.slow) for n in OTHERS)]
)
def name(request):
    return request.param


@pytest.fixture(scope="module")
def fresh(name, tmp_path_factory):
    """Loads the family's pipeline from its folder."""
    folder = tmp_path_factory.mktemp("families") / name
    make(name, folder)
    return lambda: load(
        folder, device="cpu", steps=STEPS, size=(32, 32) if "sana" in name else (16, 16)
    )


@pytest.fixture(scope="module")
def model(fresh):
    return fresh()


@pytest.fixture(scope="module")
def noise(model):
    return initial_noise(model, 0, [0, 1])


def from_pipe(model, guidance, monkeypatch, seed=0, **options):
    """Images of a plain call of the pipeline, the unit noise that it began with, and its generator as of then."""
    pipe, seen, generator = model.pipe, [], torch.Generator().manual_seed(seed)
    prepare = pipe.prepare_latents

    def kept(*args, **kwargs):
        made = prepare(*args, **kwargs)
        first = made[0] if isinstance(made, tuple) else made
        seen.extend(
            [first / getattr(pipe.scheduler, "init_noise_sigma", 1.0), generator.get_state()]
        )
        return made

    call = dict(
        num_images_per_prompt=2, num_inference_steps=STEPS, generator=generator, output_type="pt"
    )
    call |= {model.family.guidance: guidance} | model.family.options(STEPS, guidance) | options
    call |= dict(zip(("height", "width"), model.size))
    if type(pipe).__name__.startswith(("Sana", "PixArt")):
        call["use_resolution_binning"] = False
    with monkeypatch.context() as patch:
        patch.setattr(pipe, "prepare_latents", kept, raising=False)
        images = (
            pipe(PROMPT, **call).images
            if "Klein" not in type(pipe).__name__
            else pipe(prompt=PROMPT, **call).images
        )
    generator.set_state(seen[1])
    return images, seen[0], generator


# --- sampling --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("guidance", [0.0, 1.0, 3.5])
def test_images_are_the_pipelines(model, guidance, monkeypatch):
    theirs, noise, generator = from_pipe(model, guidance, monkeypatch)
    ours = model.decode(sample(model, PROMPT, noise, STEPS, guidance, generator=generator))
    assert theirs.shape == ours.shape and len(ours) == 2
    assert theirs.std() > 0.01  # there is something to compare
    assert_close(ours, theirs.float(), rtol=0, atol=1e-4)


@pytest.mark.parametrize("guidance", [0.0, 3.5])
def test_a_batch_of_several_prompts(model, noise, guidance):
    """Every image of a batch has its own prompt, and is what it is alone."""
    prompts = ["portrait of a person", "hat", "portrait of a person"]
    noise = initial_noise(model, 0, [0, 1, 2])
    together = sample(model, prompts, noise, STEPS, guidance)
    order = [1, 0, 2]
    again = sample(
        model, [prompts[i] for i in order], noise[order], STEPS, guidance
    )  # encoded before
    assert_close(again, together[order], rtol=0, atol=1e-4)
    for i, prompt in enumerate(prompts):
        alone = sample(model, prompt, noise[[i]], STEPS, guidance)
        assert_close(together[[i]], alone, rtol=0, atol=1e-3 * alone.abs().max().item())


def test_images_are_encoded_to_what_the_autoencoder_makes_of_them(model):
    """Encoded and decoded by the pipeline is encoded and decoded by its autoencoder, which alone loses something."""
    gen = torch.Generator().manual_seed(0)
    images, vae = torch.rand(2, 3, *model.image_size, generator=gen), model.pipe.vae
    x = (images * 2 - 1)[:, :, None] if "Qwen" in type(vae).__name__ else images * 2 - 1
    with torch.no_grad():
        code = vae.encode(x)
        z = code.latent_dist.mode() if hasattr(code, "latent_dist") else code.latent
        theirs = vae.decode(z).sample
        ours = model.decode(model.encode(images))
    theirs = (theirs[:, :, 0] if theirs.ndim == 5 else theirs) / 2 + 0.5
    assert model.encode(images).shape == (2, *model.latent_shape)
    assert_close(ours, theirs.clamp(0, 1), rtol=0, atol=1e-4)
    with pytest.raises(ValueError, match="images must be of .* pixels, not"):
        model.encode(torch.rand(1, 3, 8, 24))


def test_guidance_changes_images(name, model, noise):
    if "schnell" not in name:  # it takes none
        a, b = (sample(model, PROMPT, noise, STEPS, g) for g in (1.5, 6.0))
        assert (a - b).abs().max() > 1e-4


def test_estimates_at_every_step(model, noise):
    run = []
    final = sample(model, PROMPT, noise, STEPS, 2.0, on_step=run.append)
    assert_close(run[-1].next, final, rtol=0, atol=0)
    assert len(run) == len(model.timesteps(STEPS)[0]) >= STEPS
    assert_close(torch.stack([s.timestep for s in run]), model.timesteps(STEPS)[0])
    lcm = (
        type(model.pipe.scheduler).__name__ == "LCMScheduler"
    )  # its estimate holds on to a little of x_t
    for step in run:
        x0 = model.predict(step.latents, step.timestep, PROMPT, 2.0, (step.alpha, step.sigma))[1]
        assert_close(step.x0, x0, rtol=0, atol=(2e-2 if lcm else 1e-4) * x0.abs().max().item())
    if type(model.pipe.scheduler).__name__.startswith("FlowMatch"):
        assert_close(
            run[-1].x0, final, rtol=1e-4, atol=1e-4
        )  # the last step of a flow goes to its estimate


def test_signal_and_noise_are_the_schedulers(model, noise):
    """Noised latents are those that the scheduler itself would make."""
    torch.manual_seed(0)
    clean, scheduler = (
        torch.randn_like(noise),
        type(model.pipe.scheduler).from_config(model.pipe.scheduler.config),
    )
    run = []
    sample(model, PROMPT, noise, STEPS, 0.0, on_step=run.append)
    for step in run:
        ours = step.alpha * clean + step.sigma * noise
        if hasattr(scheduler, "scale_noise"):  # flows; the share of noise is sigma
            scheduler.timesteps, scheduler.sigmas = (
                step.timestep[None].float(),
                step.sigma[None].float(),
            )
            theirs = scheduler.scale_noise(clean, scheduler.timesteps, noise)
        elif model.prediction_type in (
            "trigflow",
            "flow_prediction",
        ):  # no method of theirs: by the formula
            angle = step.timestep if model.prediction_type == "trigflow" else None
            theirs = angle.cos() * clean + angle.sin() * noise if angle is not None else ours
            assert angle is not None or abs(step.alpha + step.sigma - 1) < 1e-6
            assert (
                angle is not None or abs(step.sigma - step.timestep / 1000) < 2e-3
            )  # timesteps are whole numbers
        else:
            variance_preserving = diffusers.DDIMScheduler.from_config(scheduler.config)
            theirs = variance_preserving.add_noise(clean, noise, step.timestep.long()[None])
        assert_close(ours, theirs, rtol=0, atol=5e-3)


def test_decoding_is_differentiable(model, noise):
    x = noise.clone().requires_grad_()
    model.decode(x).sum().backward()
    assert x.grad.isfinite().all() and (x.grad != 0).any()


# --- sliders ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def space(model):
    return random_space(model, rank=2)


def test_gradients_reach_every_slider(model, noise):
    adapter = GatedAdapter(model, target_layers(model), sliders=2)
    try:
        for a, b in adapter.parameters().values():
            torch.nn.init.normal_(b, std=0.1)
            a.requires_grad_(True), b.requires_grad_(True)
        adapter.set_strengths(torch.eye(2))
        model.predict(noise, model.timesteps(STEPS)[0][1], PROMPT, 2.0)[1].square().sum().backward()
        deaf = re.compile(
            r"\.add_q_proj|\.to_add_out"
        )  # of the last block of some: nobody reads the prompt after it
        for layer, (a, b) in adapter.parameters().items():
            assert (
                deaf.search(layer) or (a.grad != 0).any(1).all() and (b.grad != 0).any(0).all()
            ), layer
    finally:
        adapter.remove()


def with_weights(model, space, mix):
    """Add a mix to the layers' own weights; gives what takes it off again."""
    before = {n: model.denoiser.get_submodule(n).weight for n in space.down}
    strengths = space.strengths(mix).repeat_interleave(space.rank)
    for n, w in before.items():
        changed = w + (space.up[n] * strengths) @ space.down[n]
        model.denoiser.get_submodule(n).weight = torch.nn.Parameter(changed, requires_grad=False)

    def undo():
        for n, w in before.items():
            model.denoiser.get_submodule(n).weight = w

    return undo


@torch.no_grad()
def test_a_mix_is_the_sum_of_its_sliders_weights(model, noise, space):
    mixes = [{0: 0.7, 2: -1.2}, {1: 1.0}]
    with space.on(model, mixes):  # an image each, guided
        ours = sample(model, PROMPT, noise, STEPS, 3.0)
    for i, mix in enumerate(mixes):
        undo = with_weights(model, space, mix)
        try:
            theirs = sample(model, PROMPT, noise[i : i + 1], STEPS, 3.0)
        finally:
            undo()
        assert_close(ours[i : i + 1], theirs, rtol=1e-3, atol=1e-3)
        assert (theirs - sample(model, PROMPT, noise[i : i + 1], STEPS, 3.0)).abs().max() > 1e-2


def test_a_mix_acts_in_any_call_of_the_pipeline(model, space, monkeypatch):
    base, noise, generator = from_pipe(model, 3.0, monkeypatch)
    images = {}
    for window in ((0.0, 1.0), (0.0, 0.0), (0.9, 1.0)):
        with space.on(model, {0: 1.5}, *window):
            images[window] = from_pipe(model, 3.0, monkeypatch)[0]
    assert torch.equal(images[0.0, 0.0], base)
    assert (images[0.0, 1.0] - base).abs().max() > 1e-3
    assert torch.equal(from_pipe(model, 3.0, monkeypatch)[0], base)  # and leaves nothing behind
    late = [noise_share(model, t) for t in model.timesteps(STEPS)[0]]
    assert torch.equal(images[0.9, 1.0], base) == all(n > 0.1 for n in late)


def noise_share(model, timestep):
    """How much of the way is still to go, by the sampler's own clock; SCM's is an angle."""
    if model.prediction_type == "trigflow":
        return (timestep.sin() / (timestep.sin() + timestep.cos())).item()
    return timestep.item() / 1000


def test_the_denoisers_clock_is_read_right(model, noise):
    seen = []

    def look(net, args, kwargs):
        t = torch.as_tensor(args[1] if len(args) > 1 else kwargs["timestep"])
        seen.append(noise_level(model.family, t, 1000).reshape(-1)[0].item())

    hook = model.denoiser.register_forward_pre_hook(look, with_kwargs=True)
    try:
        sample(model, PROMPT, noise, STEPS, 0.0)
    finally:
        hook.remove()
    assert_close(
        torch.tensor(seen),
        torch.tensor([noise_share(model, t) for t in model.timesteps(STEPS)[0]]),
        rtol=0,
        atol=2e-3,
    )


def test_ten_steps_of_training_raise_the_alignment(model):
    found = discover(
        model,
        PROMPT,
        samples=16,
        encoder=pixel_encoder(4),
        n_directions=4,
        guidance=1.0,
        progress=quiet,
    )
    adapter = GatedAdapter(model, target_layers(model), sliders=2)
    try:
        for _, b in adapter.parameters().values():
            torch.nn.init.normal_(b, std=0.02)
        pool = make_noised_latents(model, found, list(range(8)), 1, seed=0)
        goal = model, pixel_encoder(4), adapter, pool, found.vectors[:2]
        before = held_out_cosines(*goal).mean(1).diag().mean()
        for _ in AlignmentTrainer(*goal, AlignmentConfig(training_steps=10, latents_per_step=3)):
            pass
        after = held_out_cosines(*goal).mean(1).diag().mean()
        assert after > before + 0.05, (before, after)
    finally:
        adapter.remove()


def test_the_whole_way(model, fresh, tmp_path, noise):
    found = discover(
        model,
        PROMPT,
        samples=16,
        encoder=pixel_encoder(4),
        n_directions=4,
        guidance=1.0,
        progress=quiet,
    )
    assert found.vectors.shape[0] == 4
    space = train(
        model,
        found,
        sliders=2,
        training_steps=2,
        init_latents=3,
        n_held_out=3,
        encoder=pixel_encoder(4),
        progress=quiet,
    )
    measured = measure(
        model,
        space,
        found,
        samples=2,
        strengths=(-1.0, 0.0, 1.0),
        encoder=pixel_encoder(4),
        progress=quiet,
    )
    path = tmp_path / "space.safetensors"
    measured.space.save(path)
    again = SliderSpace.load(path, model)
    assert again.labels == space.labels
    with again.on(model, {0: 2.0}):
        ours = sample(model, PROMPT, noise, STEPS, 3.0)
    (file,) = again.export(tmp_path / "lora", {0: 2.0})
    if hasattr(model.pipe, "load_lora_weights"):
        model.pipe.load_lora_weights(tmp_path / "lora", weight_name=file.name)
        theirs = sample(model, PROMPT, noise, STEPS, 3.0)
        model.pipe.unload_lora_weights()
    else:  # diffusers has no loader of LoRAs for these: peft has
        state = {k.removeprefix("transformer."): v for k, v in load_file(file).items()}
        layers = sorted({k.rsplit(".lora_", 1)[0] for k in state})
        model = fresh()
        inject_adapter_in_model(
            LoraConfig(r=1, lora_alpha=1, target_modules=layers), model.denoiser, "mine"
        )
        set_peft_model_state_dict(model.denoiser, state, "mine")
        theirs = sample(model, PROMPT, noise, STEPS, 3.0)
    assert_close(ours, theirs, rtol=1e-3, atol=1e-3)


# --- presets ---------------------------------------------------------------------------------------------------------


def acts_in(space, model, noise):
    """The steps in which a slider's gate is open."""
    open_in = []
    with space.on(model, {0: 1.0}):
        gate = space.attach(model).now
        sample(
            model,
            PROMPT,
            noise,
            STEPS,
            on_step=lambda step: gate.gate.any() and open_in.append(step.index),
        )
    return open_in


def test_sliders_that_are_asked_for_train_and_act_late(model, noise):
    """In words and from pairs; the steps that training takes to be late are those in which the denoiser is changed."""
    options = dict(training_steps=4, steps=STEPS, active_from=0.4, progress=quiet)
    concept = Concept(PROMPT, f"{PROMPT}, hat", f"{PROMPT}, no hat", eta=2.0)
    shown = {
        s: torch.rand(2, 3, *model.image_size, generator=torch.Generator().manual_seed(s))
        for s in (1, 2)
    }
    for space in (
        train_concepts(model, concept, **options),
        train_image_pairs(model, {"hat": shown}, PROMPT, **options),
    ):
        assert (
            space.card["training_steps"] == 4
            and space.active_from == 0.4
            and not any(space.card["lost"])
        )
        assert all(w.isfinite().all() for w in space.up.values()) and any(
            w.any() for w in space.up.values()
        )
        assert (
            acts_in(space, model, noise)
            == active_steps(model, STEPS, ConceptConfig(active_from=0.4))
            != []
        )
        assert len(acts_in(space, model, noise)) < STEPS


def test_every_preset_has_its_family_tested():
    same = {
        "sdxl-turbo": "sdxl",
        "sdxl-lightning": "sdxl-euler",
        "sd35-turbo": "sd35",
    }  # other weights
    assert {same.get(p, p) for p in PRESETS} <= set(FAMILIES)
