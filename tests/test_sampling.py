"""Sampling is the pipeline's own, noise comes from its address alone, and a store survives being killed."""

import copy
import signal
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, EulerDiscreteScheduler, PNDMScheduler
from tiny import PREDICTION_TYPES, PROMPT, never, quiet
from torch.testing import assert_close

from sliderspace.encoders import Encoder, latents, pixels
from sliderspace.loading import load
from sliderspace.sampling import collect, pictures, sample, start_noise

SCHEDULERS = [DDIMScheduler, EulerDiscreteScheduler, DPMSolverMultistepScheduler, PNDMScheduler]
STEPS = 4


@pytest.fixture(params=[(s, k) for s in SCHEDULERS for k in PREDICTION_TYPES if (s, k) != (PNDMScheduler, "sample")],
                ids=lambda pair: f"{pair[0].__name__}-{pair[1]}")
def scheduled(request, tiny_of, monkeypatch):
    """A tiny model with one of the schedulers and prediction types (PNDM does not know "sample")."""
    scheduler, kind = request.param
    pipe = tiny_of(kind).pipe
    options = {"skip_prk_steps": True} if scheduler is PNDMScheduler else {}
    monkeypatch.setattr(pipe, "scheduler", scheduler.from_config(pipe.scheduler.config, **options))
    return tiny_of(kind)


def from_pipe(model, noise, guidance, output_type="latent"):
    return model.pipe(PROMPT, num_images_per_prompt=len(noise), latents=noise, num_inference_steps=STEPS,
                      guidance_scale=guidance, output_type=output_type).images


# --- the loop --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("guidance", [1.0, 4.0])
def test_latents_are_the_pipelines(scheduled, guidance):
    noise = start_noise(scheduled, 0, [0, 1])
    ours = sample(scheduled, PROMPT, noise, STEPS, guidance)
    assert_close(ours, from_pipe(scheduled, noise, guidance), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("guidance", [0.0, 0.5])
def test_low_guidance_is_none_as_in_the_pipeline(tiny, guidance):
    # the usual call of distilled models is guidance_scale=0: diffusers guides above 1 only
    noise = start_noise(tiny, 0, [0, 1])
    ours = sample(tiny, PROMPT, noise, STEPS, guidance)
    assert_close(ours, from_pipe(tiny, noise, guidance), rtol=1e-4, atol=1e-4)


def test_images_are_the_pipelines(tiny):
    theirs = from_pipe(tiny, start_noise(tiny, 5, [0, 1]), 3.0, "pt")
    assert_close(pictures(tiny, PROMPT, 2, seed=5, steps=STEPS, guidance=3.0), theirs, rtol=0, atol=1e-4)


def test_estimates_are_the_schedulers(scheduled):
    model, noise = scheduled, start_noise(scheduled, 0, [0, 1])
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
    noise, inner = start_noise(tiny, 0, [0, 1]).split(1), []
    def another(step): inner.append(sample(tiny, PROMPT, noise[1], STEPS, 1.0))
    outer = sample(tiny, PROMPT, noise[0], STEPS, 1.0, on_step=another)
    assert torch.equal(outer, sample(tiny, PROMPT, noise[0], STEPS, 1.0))
    assert all(torch.equal(latents, sample(tiny, PROMPT, noise[1], STEPS, 1.0)) for latents in inner)


# --- noise -----------------------------------------------------------------------------------------------------------


def test_noise_comes_from_seed_prompt_and_sample_alone(tiny):
    noise = start_noise(tiny, 0, [0, 1, 2, 3])
    assert torch.equal(noise, torch.cat([start_noise(tiny, 0, part) for part in ([0], [1, 2], [3])]))
    assert torch.equal(noise.flip(0), start_noise(tiny, 0, [3, 2, 1, 0]))
    torch.manual_seed(123)
    assert torch.equal(noise, start_noise(tiny, 0, [0, 1, 2, 3]))
    others = torch.cat([start_noise(tiny, 1, [0]), start_noise(tiny, 0, [0], prompt=1), start_noise(tiny, 10, [0]), noise])
    assert len(torch.unique(others.flatten(1), dim=0)) == len(others)


def test_noise_is_gaussian(tiny):
    noise = start_noise(tiny, 0, list(range(200))).flatten(1)  # 200 x 256
    assert abs(noise.mean()) < 0.02 and abs(noise.std() - 1) < 0.02
    correlation = noise.corrcoef().fill_diagonal_(0)
    assert correlation.abs().max() < 0.4


# --- the store -------------------------------------------------------------------------------------------------------

OPTIONS = dict(steps=2, guidance=2.0, batch=2, progress=quiet)


def assert_same(a, b):
    assert a.run == b.run
    assert torch.equal(a.features, b.features) and torch.equal(a.latents, b.latents)


def shards(folder):
    return sorted(folder.glob("*.safetensors"))


def test_features_are_of_every_step_and_of_the_final_image(scheduled):
    # some schedulers take more steps than they are asked for (PNDM)
    found = collect(scheduled, latents(), PROMPT, 2, **OPTIONS)
    steps = []
    final = sample(scheduled, PROMPT, start_noise(scheduled, 0, [0, 1]), 2, 2.0, on_step=steps.append)
    expected = [*(step.x0 for step in steps[:-1]), final]
    assert_close(found.features, torch.stack([F.normalize(x.flatten(1)) for x in expected], 1))
    assert_close(found.latents, final)


def test_a_folder_changes_nothing(tiny, tmp_path):
    assert_same(collect(tiny, pixels(4), PROMPT, 5, folder=tmp_path, **OPTIONS),
                collect(tiny, pixels(4), PROMPT, 5, **OPTIONS))


def test_goes_on_from_the_batches_that_are_there(tiny, tmp_path):
    whole = collect(tiny, pixels(4), PROMPT, 5, folder=tmp_path, **OPTIONS)
    shards(tmp_path)[1].unlink()
    kept = {path: path.stat().st_mtime_ns for path in shards(tmp_path)}
    assert_same(collect(tiny, pixels(4), PROMPT, 5, folder=tmp_path, **OPTIONS), whole)
    assert len(shards(tmp_path)) == 3
    assert all(path.stat().st_mtime_ns == time for path, time in kept.items())


def test_a_longer_run_goes_on_from_a_shorter_one(tiny, tmp_path):
    collect(tiny, pixels(4), PROMPT, 4, folder=tmp_path, **OPTIONS)
    times = [path.stat().st_mtime_ns for path in shards(tmp_path)]
    longer = collect(tiny, pixels(4), PROMPT, 6, folder=tmp_path, **OPTIONS)
    assert [path.stat().st_mtime_ns for path in shards(tmp_path)[:2]] == times
    assert_same(longer, collect(tiny, pixels(4), PROMPT, 6, **OPTIONS))


CHILD = """
import os, signal, sys
from sliderspace.encoders import pixels
from sliderspace.loading import load
from sliderspace.sampling import collect

synced, sync = [], os.fsync
def killed_at_the_third_file(file):
    sync(file)
    synced.append(file)
    if len(synced) == 3: os.kill(os.getpid(), signal.SIGKILL) # written under its temporary name, not yet renamed

os.fsync = killed_at_the_third_file
model = load(sys.argv[1], device="cpu")
collect(model, pixels(4), sys.argv[3], 7, steps=2, guidance=2., batch=2, folder=sys.argv[2])
"""


def test_a_killed_run_goes_on_to_the_same_result(tiny_folder, tiny, tmp_path):
    child = subprocess.run([sys.executable, "-c", CHILD, tiny_folder("epsilon"), tmp_path, PROMPT], stderr=subprocess.PIPE)
    assert child.returncode == -signal.SIGKILL, child.stderr.decode()
    assert len(shards(tmp_path)) == 2
    assert_same(collect(tiny, pixels(4), PROMPT, 7, folder=tmp_path, **OPTIONS),
                collect(tiny, pixels(4), PROMPT, 7, **OPTIONS))
    assert len(shards(tmp_path)) == 4


@pytest.mark.parametrize("damage", [lambda data: data[:-8], lambda data: data[:3], lambda data: b"{}" + data])
def test_a_damaged_batch_is_a_clear_error(tiny, tmp_path, damage):
    collect(tiny, pixels(4), PROMPT, 4, folder=tmp_path, **OPTIONS)
    path = shards(tmp_path)[1]
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ValueError, match=f"{path.name}.* is damaged"):
        collect(tiny, pixels(4), PROMPT, 4, folder=tmp_path, **OPTIONS)


OTHERS = [dict(prompt="hat"), dict(seed=1), dict(steps=3), dict(guidance=1.0), dict(encoder=pixels(5))]


@pytest.mark.parametrize("other", OTHERS, ids=lambda other: next(iter(other)))
def test_another_runs_folder_is_refused(tiny, tmp_path, other):
    run = dict(encoder=pixels(4), prompt=PROMPT, samples=2, folder=tmp_path) | OPTIONS
    collect(tiny, **run)
    with pytest.raises(ValueError, match="holds another run: .*name another folder"):
        collect(tiny, **run | other)


def test_another_models_folder_is_refused(tiny, tiny_folder, tmp_path):
    # same name, other weights: a checkpoint that was trained on, or two folders that are both called "model"
    other = load(tiny_folder("epsilon", seed=1), device="cpu")
    assert other.name == tiny.name
    collect(tiny, pixels(4), PROMPT, 2, folder=tmp_path, **OPTIONS)
    with pytest.raises(ValueError, match="holds another run"):
        collect(other, pixels(4), PROMPT, 2, folder=tmp_path, **OPTIONS)


def test_another_schedulers_folder_is_refused(tiny, tmp_path, monkeypatch):
    collect(tiny, pixels(4), PROMPT, 2, folder=tmp_path, **OPTIONS)
    monkeypatch.setattr(tiny.pipe, "scheduler", EulerDiscreteScheduler.from_config(tiny.pipe.scheduler.config))
    with pytest.raises(ValueError, match="holds another run"):
        collect(tiny, pixels(4), PROMPT, 2, folder=tmp_path, **OPTIONS)


BAD = {
    "prompt must be a non-empty text, not ' '": dict(prompt=" "),
    "prompt must be a non-empty text, not None": dict(prompt=None),
    "samples must be 1 or more, not 0": dict(samples=0),
    "steps must be 1 or more, not 0": dict(steps=0),
    "steps must be 1 or more, not -1": dict(steps=-1),
}


@pytest.mark.parametrize("message", BAD)
def test_bad_input_is_refused_before_any_work(tiny, message):
    with pytest.raises(ValueError, match=message):
        collect(tiny, Encoder("never", never), **dict(prompt=PROMPT, samples=2) | OPTIONS | BAD[message])


def test_bad_steps_are_refused(tiny):
    for steps in (0, -1):
        with pytest.raises(ValueError, match=f"steps must be 1 or more, not {steps}"):
            sample(tiny, PROMPT, start_noise(tiny, 0, [0]), steps)


def test_an_unwritable_folder_is_refused_before_any_work(tiny, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="cannot write into folder .*file/samples.*name another folder"):
        collect(tiny, Encoder("never", never), PROMPT, 2, folder=tmp_path / "file" / "samples", **OPTIONS)
