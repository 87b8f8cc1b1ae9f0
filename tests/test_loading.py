"""Presets, parts of one's own, checkpoints, memory settings and compiled denoisers; what does not fit is refused."""

import shutil
import threading

import diffusers
import pytest
import torch
from diffusers import (
    AutoencoderTiny,
    DDIMScheduler,
    EDMEulerScheduler,
    EulerDiscreteScheduler,
    LCMScheduler,
    UNet2DConditionModel,
)
from families import FAMILIES, make
from safetensors.torch import save_file
from tiny import PROMPT, quiet, random_directions, random_space, random_weights
from torch._dynamo.testing import CompileCounter
from torch.testing import assert_close

from sliderspace import discover, load, train
from sliderspace.sliders.adapter import GatedAdapter, target_layers
from sliderspace.training.alignment import AlignmentTrainer, AlignmentConfig
from sliderspace.features.encoders import pixel_encoder
from sliderspace.models.registry import PRESETS, Preset
from sliderspace.models.batching import run_in_batches
from sliderspace.sampling.generate import generate_images, sample, initial_noise
from sliderspace.training.initialization import make_noised_latents


@pytest.fixture(scope="module")
def xl(tmp_path_factory):
    """A folder with a tiny SDXL."""
    folder = tmp_path_factory.mktemp("loading") / "xl"
    make("sdxl", folder)
    return folder


# --- presets ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def lora(xl, tmp_path):
    """A folder with a LoRA, as a distilled model's."""
    (file,) = random_space(load(xl, device="cpu"), rank=2).export(
        tmp_path / "lora", {0: 1.0, 1: -1.0}
    )
    return file.parent, file.name


def test_a_preset_lays_a_lora_and_a_scheduler_over_its_model(xl, lora, monkeypatch):
    preset = Preset(
        str(xl),
        3,
        0.0,
        lora=lora,
        scheduler=("LCMScheduler", {}),
        options={"timesteps": [999, 399, 99]},
    )
    monkeypatch.setitem(PRESETS, "tiny-dmd2", preset)
    model = load("tiny-dmd2", device="cpu")
    assert (model.name, model.steps, model.guidance) == ("tiny-dmd2", 3, 0.0)
    assert isinstance(model.pipe.scheduler, LCMScheduler) and model.timesteps(3)[0].tolist() == [
        999,
        399,
        99,
    ]
    assert model.timesteps(2)[0].tolist() != [
        999,
        399,
    ]  # the preset's timesteps are for its own number of steps
    plain = load(xl, device="cpu")
    plain.pipe.load_lora_weights(lora[0], weight_name=lora[1])
    noise = initial_noise(plain, 0, [0])
    assert_close(
        model.predict(noise, 500, PROMPT, 0.0)[0],
        plain.predict(noise, 500, PROMPT, 0.0)[0],
        rtol=1e-3,
        atol=1e-4,
    )
    assert not hasattr(model.denoiser, "peft_config")  # fused: sliders find ordinary layers


def test_what_the_user_gives_wins_over_a_preset(xl, lora, monkeypatch):
    preset = Preset(str(xl), 3, 0.0, lora=lora, scheduler=("LCMScheduler", {}))
    monkeypatch.setitem(PRESETS, "tiny-dmd2", preset)
    own = UNet2DConditionModel.from_pretrained(xl / "unet")
    scheduler = DDIMScheduler.from_pretrained(xl / "scheduler")
    before = {n: p.clone() for n, p in own.named_parameters()}
    model = load(
        "tiny-dmd2",
        device="cpu",
        unet=own,
        scheduler=scheduler,
        steps=7,
        guidance=2.0,
        size=(32, 16),
    )
    assert (
        model.denoiser is own
        and model.pipe.scheduler is scheduler
        and (model.steps, model.guidance) == (7, 2.0)
    )
    assert all(torch.equal(p, before[n]) for n, p in own.named_parameters())
    assert generate_images(model, PROMPT, 1, steps=1).shape == (1, 3, 32, 16)
    with_steps = Preset(
        str(xl), 3, 0.0, scheduler=("LCMScheduler", {}), options={"timesteps": [999, 399, 99]}
    )
    monkeypatch.setitem(PRESETS, "tiny-dmd2", with_steps)
    assert len(load("tiny-dmd2", device="cpu", steps=5).timesteps(5)[0]) == 5
    other = load("tiny-dmd2", device="cpu", scheduler=scheduler)
    assert len(other.timesteps(3)[0]) == 3 and other.timesteps(3)[0].tolist() != [999, 399, 99]


def test_a_preset_brings_a_distilled_denoiser(xl, tmp_path, monkeypatch):
    make("sdxl", tmp_path / "other", seed=1)
    state = UNet2DConditionModel.from_pretrained(tmp_path / "other" / "unet").state_dict()
    save_file(state, tmp_path / "four.safetensors")
    euler = ("EulerDiscreteScheduler", {"timestep_spacing": "trailing"})
    preset = Preset(str(xl), 4, 0.0, unet=(str(tmp_path), "four.safetensors"), scheduler=euler)
    monkeypatch.setitem(PRESETS, "tiny-lightning", preset)
    model = load("tiny-lightning", device="cpu")
    assert all(torch.equal(p, state[n]) for n, p in model.denoiser.named_parameters())
    assert (
        isinstance(model.pipe.scheduler, EulerDiscreteScheduler) and model.timesteps(4)[0][0] == 999
    )


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_that_is_neither_cached_nor_reachable_says_what_to_do(name):
    with pytest.raises(
        ValueError, match="could not be loaded: .*(hf download|connect|offline|cache)"
    ):
        load(name, device="cpu")


def test_repositories_that_are_not_there_say_what_to_do():
    with pytest.raises(
        ValueError, match="'someone/something' could not be loaded.*`hf download someone/something`"
    ):
        load("someone/something", device="cpu")


# --- files and parts -------------------------------------------------------------------------------------------------


def test_checkpoints_of_other_kinds_are_refused(tmp_path):
    path = tmp_path / "model.safetensors"
    save_file({"text_encoders.clip": torch.zeros(2)}, path)
    with pytest.raises(ValueError, match="model.safetensors' could not be loaded: .*config="):
        load(path, device="cpu")


@pytest.mark.parametrize(
    "key, shape, kind",
    [
        (
            "model.diffusion_model.input_blocks.0.0.weight",
            (320, 4, 3, 3),
            "StableDiffusionPipeline",
        ),
        (
            "conditioner.embedders.1.model.transformer.resblocks.9.mlp.c_proj.bias",
            (4,),
            "StableDiffusionXLPipeline",
        ),
    ],
)
def test_a_checkpoint_is_opened_by_its_kind(xl, tmp_path, monkeypatch, key, shape, kind):
    path, asked = tmp_path / "model.safetensors", []
    save_file({key: torch.zeros(shape)}, path)
    pipe = load(xl, device="cpu").pipe
    monkeypatch.setattr(
        getattr(diffusers, kind),
        "from_single_file",
        classmethod(lambda cls, *a, **k: asked.append((cls.__name__, a, k)) or pipe),
    )
    model = load(path, device="cpu", config=str(xl))
    assert (
        asked == [(kind, (str(path),), {"dtype": torch.float32, "config": str(xl)})]
        and model.name == "model"
    )


def test_pickles_are_not_opened(tmp_path):
    path = tmp_path / "model.ckpt"
    torch.save({"a": torch.zeros(1)}, path)
    with pytest.raises(ValueError, match="unknown model .*model.ckpt.* a .safetensors checkpoint"):
        load(path, device="cpu")


def test_an_incomplete_folder_names_the_part(xl, tmp_path):
    folder = tmp_path / "broken"
    shutil.copytree(xl, folder)
    shutil.rmtree(folder / "vae")
    with pytest.raises(ValueError, match="broken' could not be loaded: .*vae"):
        load(folder, device="cpu")


def test_parts_are_for_models_that_are_loaded_here(xl):
    with pytest.raises(
        ValueError, match=r"parts \['scheduler'\] are for a model that is loaded here"
    ):
        load(load(xl, device="cpu").pipe, device="cpu", scheduler=DDIMScheduler())


@pytest.mark.parametrize(
    "options, message",
    [
        (
            dict(shceduler=DDIMScheduler()),
            r"StableDiffusionXLPipeline has no parts \['shceduler'\]",
        ),
        (dict(dtype="bfloat16"), "dtype must be a floating type .* not 'bfloat16'"),
        (dict(dtype=torch.int8), "dtype must be a floating type .* not torch.int8"),
        (dict(steps=0), "steps must be 1 or more, not 0"),
        (dict(guidance=-1.0), "guidance must be 0 or more, not -1"),
        (dict(size=(512,)), "size must be .height, width. in pixels, not .512"),
        (dict(scheduler=EDMEulerScheduler()), "EDMEulerScheduler counts noise another way"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(xl, options, message):
    with pytest.raises(ValueError, match=message):
        load(xl, device="cpu", **options)


def test_other_things_are_not_models(tiny):
    for thing in (42, tiny, None):
        with pytest.raises(
            ValueError, match="unknown model .*give a name, a path, or a text-to-image pipeline"
        ):
            load(thing)


def test_parts_of_several_precisions_are_refused(xl):
    unet = UNet2DConditionModel.from_pretrained(xl / "unet").bfloat16()
    with pytest.raises(ValueError, match="several precisions.*torch.bfloat16.*give dtype="):
        load(xl, device="cpu", unet=unet)
    assert load(xl, device="cpu", unet=unet, dtype=torch.float32).denoiser.dtype == torch.float32


def test_pipelines_that_want_more_than_a_prompt_are_refused(xl):
    pipe = load(xl, device="cpu").pipe

    class NeedsMore(type(pipe)):
        def __call__(
            self, prompt=None, num_inference_steps=3, output_type="pil", control=None, **options
        ):
            return super().__call__(prompt, control.size, **options)

    pipe.__class__ = NeedsMore
    with pytest.raises(ValueError, match="NeedsMore cannot be called with a prompt alone"):
        load(pipe, device="cpu")


@pytest.mark.parametrize(
    "kind, why",
    [
        ("StableVideoDiffusionPipeline", "videos|image|prompt"),
        ("TextToVideoSDPipeline", "videos"),
        ("StableDiffusionXLImg2ImgPipeline", "starts from an image"),
    ],
)
def test_pipelines_that_make_something_else_are_refused(xl, kind, why):
    pipe = load(xl, device="cpu").pipe
    pipe.__class__ = getattr(diffusers, kind)
    with pytest.raises(ValueError, match=f"{kind} is not a text-to-image pipeline .*({why})"):
        load(pipe, device="cpu")


# --- memory ----------------------------------------------------------------------------------------------------------


def gradients(model, thread=False):
    """Gradients of two sliders, of an image each."""
    adapter = GatedAdapter(model, target_layers(model), sliders=2)
    try:
        gen = torch.Generator(model.device).manual_seed(0)
        for a, b in adapter.parameters().values():
            with torch.no_grad():
                a.normal_(generator=gen), b.normal_(std=0.1, generator=gen)
            a.requires_grad_(True), b.requires_grad_(True)
        adapter.set_strengths(torch.eye(2))
        loss = model.predict(initial_noise(model, 0, [0, 1]), 500, PROMPT, 1.0)[1].square().sum()
        if thread:  # as those of autograd on a GPU
            back = threading.Thread(target=loss.backward)
            back.start()
            back.join()
        else:
            loss.backward()
        return torch.cat([p.grad.flatten() for pair in adapter.parameters().values() for p in pair])
    finally:
        adapter.remove()


@pytest.mark.parametrize("thread", [False, True], ids=["same thread", "thread of autograd"])
def test_low_memory_changes_no_gradient(xl, thread):
    lean = load(xl, device="cpu", low_memory=True)
    assert lean.denoiser.is_gradient_checkpointing and len(lean.offload_hooks) == 2
    whole = gradients(load(xl, device="cpu"))
    assert (whole != 0).any()
    assert_close(gradients(lean, thread), whole, rtol=1e-3, atol=1e-4)


def test_training_on_several_timesteps_with_checkpointing(xl):
    # each denoiser call's own strengths must hold when its layers are run again
    made = []
    for lean in (False, True):
        model = load(xl, device="cpu", low_memory=lean)
        model.pipe.vae.disable_slicing()  # which rounds otherwise; all the rest is the same to the bit
        found = random_directions(model, pixel_encoder(4), steps=3, guidance=1.0)
        pool = make_noised_latents(model, found, list(range(8)), 6, seed=0)
        adapter = GatedAdapter(model, target_layers(model), sliders=2)
        adapter.load_weights(*random_weights(model, target_layers(model), 2, std=0.05))
        for _ in AlignmentTrainer(
            model,
            pixel_encoder(4),
            adapter,
            pool,
            found.vectors[:2],
            AlignmentConfig(training_steps=2, latents_per_step=4),
        ):
            pass
        made.append(
            torch.cat(
                [p.detach().flatten() for pair in adapter.parameters().values() for p in pair]
            )
        )
        adapter.remove()
    assert torch.equal(*made)


def test_a_pipeline_that_leaves_the_gpu_between_calls_is_not_trained(xl, monkeypatch):
    model = load(xl, device="cpu")
    found = discover(
        model, PROMPT, samples=16, encoder=pixel_encoder(4), n_directions=2, steps=1, progress=quiet
    )
    vars(model.denoiser)["_hf_hook"] = None  # as after `enable_model_cpu_offload`
    with pytest.raises(ValueError, match="gradients with it: load the model with low_memory=True"):
        train(model, found, sliders=1, encoder=pixel_encoder(4), progress=quiet)


def test_float16_autoencoders_without_gradients_say_so(xl):
    model = load(xl, device="cpu", dtype=torch.float16)
    latents = torch.zeros(1, *model.latent_shape, requires_grad=True)
    with pytest.raises(ValueError, match="no gradients in float16.*bfloat16, or with preview="):
        model.decode(latents)


def test_low_memory_changes_no_picture(xl):
    plain, lean = load(xl, device="cpu"), load(xl, device="cpu", low_memory=True)
    assert_close(
        generate_images(lean, PROMPT, 2, steps=2),
        generate_images(plain, PROMPT, 2, steps=2),
        rtol=0,
        atol=1e-4,
    )


def test_prompts_are_encoded_once(xl, monkeypatch):
    model, calls = load(xl, device="cpu"), []
    encode = model.pipe.encode_prompt
    monkeypatch.setattr(
        model.pipe, "encode_prompt", lambda *a, **k: calls.append(k) or encode(*a, **k)
    )
    noise = initial_noise(model, 0, [0])
    calls.clear()
    first = sample(model, PROMPT, noise, 2, 3.0)
    assert torch.equal(sample(model, PROMPT, noise, 2, 3.0), first) and len(calls) == 1
    next(model.pipe.text_encoder.parameters()).mul_(2)
    sample(model, PROMPT, noise, 2, 3.0)
    assert len(calls) == 2  # other weights, another encoding


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sliders_are_float32_on_a_small_model(xl, dtype):
    model = load(xl, device="cpu", dtype=dtype)
    space = random_space(model)
    with space.on(model, {0: 1.0}):
        (a, b), *_ = space.attach(model).parameters().values()
        assert a.dtype == b.dtype == torch.float32 and model.denoiser.dtype == dtype
        if dtype is torch.bfloat16:
            assert generate_images(model, PROMPT, 1, steps=1).isfinite().all()
    assert gradients(model).isfinite().all() if dtype is torch.bfloat16 else True


def test_a_tiny_autoencoder_makes_the_pictures_in_training(xl):
    tiny = AutoencoderTiny(
        encoder_block_out_channels=(8, 8),
        decoder_block_out_channels=(8, 8),
        latent_channels=4,
        num_encoder_blocks=(1, 1),
        num_decoder_blocks=(1, 1),
    )
    model = load(xl, device="cpu", preview=tiny)
    latents = initial_noise(model, 0, [0, 1])
    ours, full = model.decode(latents, preview=True), model.decode(latents)
    assert_close(ours, (tiny.decode(latents).sample / 2 + 0.5).clamp(0, 1), rtol=0, atol=1e-5)
    assert full.shape == ours.shape and not torch.allclose(ours, full)
    with pytest.raises(
        ValueError, match="preview= has 3 channels of latents, and AutoencoderKL of this model 4"
    ):
        load(xl, device="cpu", preview=AutoencoderTiny(latent_channels=3))
    with pytest.raises(ValueError, match="preview='nowhere' is no AutoencoderTiny"):
        load(xl, device="cpu", preview="nowhere")


@pytest.mark.parametrize("most, sizes", [(8, [8, 2]), (4, [4, 4, 2]), (1, [1] * 10), (3, [2] * 5)])
def test_work_that_does_not_fit_is_halved_and_nothing_is_lost(tiny, most, sizes):
    tries, made = [], []

    def work(part):
        tries.append(len(part))
        if len(part) > most:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return part

    tiny.batch_sizes.clear()
    made = list(run_in_batches(tiny, "test", work, torch.arange(10), 8))
    assert torch.equal(torch.cat(made), torch.arange(10)) and [len(m) for m in made] == sizes
    tries.clear()
    list(run_in_batches(tiny, "test", work, torch.arange(10), 8))
    assert tries == sizes  # the size that fits is remembered
    tiny.batch_sizes.clear()


def test_errors_that_are_not_of_memory_are_raised(tiny):
    def work(part):
        raise RuntimeError("no")

    with pytest.raises(RuntimeError, match="^no$"):
        list(run_in_batches(tiny, "test", work, torch.arange(4), 2))
    with pytest.raises(torch.OutOfMemoryError):  # a single row
        list(
            run_in_batches(
                tiny,
                "test",
                lambda part: (_ for _ in ()).throw(torch.OutOfMemoryError("CUDA out of memory. x")),
                torch.arange(1),
                2,
            )
        )


# --- torch.compile ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["sdxl", "flux-dev", "z-image-turbo", "sana"])
def test_a_compiled_denoiser_does_not_recompile_when_strengths_change(name, tmp_path):
    assert name in FAMILIES
    make(name, tmp_path)
    model = load(tmp_path, device="cpu", size=(32, 32) if name == "sana" else (16, 16))
    space, noise = random_space(model), initial_noise(model, 0, [0, 1])
    mixes = [
        ({0: 1.0}, 0.0),
        ({}, 0.0),
        ({0: 0.5, 2: -1.0}, 0.0),
        ([{0: 1.0}, {1: -2.0}], 0.0),
        ({1: 3.0}, 0.4),
    ]

    def images():
        made = []
        for mix, start in mixes:
            with space.on(model, mix, start=start):
                made.append(sample(model, PROMPT, noise, 3, 1.0))
                counts.append(counter.frame_count)
        return made

    counter, counts = CompileCounter(), []
    with space.on(model, {}):
        plain = images()
        torch._dynamo.reset()
        counts.clear()
        if model.denoiser._repeated_blocks:
            model.denoiser.compile_repeated_blocks(backend=counter)
        else:
            model.denoiser.compile(backend=counter)
        compiled = images()
    torch._dynamo.reset()
    assert counts[0] > 0 and len(set(counts)) == 1, counts
    for ours, theirs in zip(compiled, plain):
        assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
