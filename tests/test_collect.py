"""The store keeps samples by what they are, survives being killed, and takes them from models, prompts and pictures."""

import re
import signal
import subprocess
import sys

import pytest
import torch
from diffusers import EulerDiscreteScheduler
from PIL import Image
from tiny import PROMPT, never, quiet
from torch.testing import assert_close

from sliderspace.features import collect as store
from sliderspace.features.encoders import Encoder, latent_encoder, pixel_encoder, encode_normalized
from sliderspace.models.loading import load
from sliderspace.sampling.generate import generate_images
from sliderspace.sampling.prompts import load_image_folder
from sliderspace.features.collect import collect_features


@pytest.fixture(autouse=True)
def small_files(monkeypatch):
    monkeypatch.setattr(store, "SHARD_SIZE", 2)


OPTIONS = dict(steps=2, guidance=2.0, batch=2, progress=quiet)


def assert_same(a, b):
    assert a.run == b.run
    assert torch.equal(a.features, b.features) and torch.equal(a.latents[:], b.latents[:])


def shards(folder):
    return sorted(folder.rglob("features-*.safetensors"))


def test_a_folder_changes_nothing(tiny, tmp_path):
    assert_same(
        collect_features(tiny, pixel_encoder(4), PROMPT, 5, folder=tmp_path, **OPTIONS),
        collect_features(tiny, pixel_encoder(4), PROMPT, 5, **OPTIONS),
    )


def test_goes_on_from_the_batches_that_are_there(tiny, tmp_path):
    whole = collect_features(tiny, pixel_encoder(4), PROMPT, 5, folder=tmp_path, **OPTIONS)
    shards(tmp_path)[1].unlink()
    kept = {path: path.stat().st_mtime_ns for path in shards(tmp_path)}
    assert_same(
        collect_features(tiny, pixel_encoder(4), PROMPT, 5, folder=tmp_path, **OPTIONS), whole
    )
    assert len(shards(tmp_path)) == 3
    assert all(path.stat().st_mtime_ns == time for path, time in kept.items())


def test_a_longer_run_goes_on_from_a_shorter_one(tiny, tmp_path):
    collect_features(tiny, pixel_encoder(4), PROMPT, 4, folder=tmp_path, **OPTIONS)
    times = [path.stat().st_mtime_ns for path in shards(tmp_path)]
    longer = collect_features(tiny, pixel_encoder(4), PROMPT, 6, folder=tmp_path, **OPTIONS)
    assert [path.stat().st_mtime_ns for path in shards(tmp_path)[:2]] == times
    assert_same(longer, collect_features(tiny, pixel_encoder(4), PROMPT, 6, **OPTIONS))


CHILD = """
import os, signal, sys
from sliderspace.features.encoders import pixel_encoder
from sliderspace.models.loading import load
from sliderspace.features import collect as store
from sliderspace.features.collect import collect_features

store.SHARD_SIZE = 2
synced, sync = [], os.fsync
def killed_at_the_sixth_file(file):
    sync(file)
    synced.append(file)
    if len(synced) == 6: os.kill(os.getpid(), signal.SIGKILL) # written under its temporary name, not yet renamed

os.fsync = killed_at_the_sixth_file
model = load(sys.argv[1], device="cpu")
collect_features(model, pixel_encoder(4), sys.argv[3], 7, steps=2, guidance=2., batch=2, folder=sys.argv[2])
"""


def test_a_killed_run_goes_on_to_the_same_result(tiny_folder, tiny, tmp_path):
    child = subprocess.run(
        [sys.executable, "-c", CHILD, tiny_folder("epsilon"), tmp_path, PROMPT],
        stderr=subprocess.PIPE,
    )
    assert child.returncode == -signal.SIGKILL, child.stderr.decode()
    assert len(shards(tmp_path)) == 2
    assert_same(
        collect_features(tiny, pixel_encoder(4), PROMPT, 7, folder=tmp_path, **OPTIONS),
        collect_features(tiny, pixel_encoder(4), PROMPT, 7, **OPTIONS),
    )
    assert len(shards(tmp_path)) == 4


@pytest.mark.parametrize(
    "damage", [lambda data: data[:-8], lambda data: data[:3], lambda data: b"{}" + data]
)
def test_a_damaged_batch_is_a_clear_error(tiny, tmp_path, damage):
    collect_features(tiny, pixel_encoder(4), PROMPT, 4, folder=tmp_path, **OPTIONS)
    path = shards(tmp_path)[1]
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ValueError, match=f"{path.name}.* is damaged"):
        collect_features(tiny, pixel_encoder(4), PROMPT, 4, folder=tmp_path, **OPTIONS)


OTHERS = [
    dict(prompt="hat"),
    dict(prompt=[PROMPT, "hat"]),
    dict(seed=1),
    dict(steps=3),
    dict(guidance=1.0),
    dict(encoder=pixel_encoder(5)),
]


@pytest.mark.parametrize("other", OTHERS, ids=lambda other: next(iter(other)))
def test_one_folder_holds_many_runs(tiny, tmp_path, other):
    """Whatever differs, samples are made anew; what does not is found again."""
    run = dict(encoder=pixel_encoder(4), prompt=PROMPT, samples=2, folder=tmp_path) | OPTIONS
    first = collect_features(tiny, **run)
    second = collect_features(tiny, **run | other)
    assert len(shards(tmp_path)) == 2
    assert first.features.shape != second.features.shape or not torch.equal(
        first.features, second.features
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(store, "sample", never)
        assert_same(collect_features(tiny, **run), first)
        assert_same(collect_features(tiny, **run | other), second)


def test_another_models_samples_are_made_anew(tiny, tiny_folder, tmp_path):
    # same name, other weights: a checkpoint that was trained on, or two folders that are both called "model"
    other = load(tiny_folder("epsilon", seed=1), device="cpu")
    assert other.name == tiny.name
    first = collect_features(tiny, pixel_encoder(4), PROMPT, 2, folder=tmp_path, **OPTIONS)
    second = collect_features(other, pixel_encoder(4), PROMPT, 2, folder=tmp_path, **OPTIONS)
    assert not torch.equal(first.features, second.features) and len(shards(tmp_path)) == 2


def test_another_schedulers_samples_are_made_anew(tiny, tmp_path, monkeypatch):
    collect_features(tiny, pixel_encoder(4), PROMPT, 2, folder=tmp_path, **OPTIONS)
    monkeypatch.setattr(
        tiny.pipe, "scheduler", EulerDiscreteScheduler.from_config(tiny.pipe.scheduler.config)
    )
    collect_features(tiny, pixel_encoder(4), PROMPT, 2, folder=tmp_path, **OPTIONS)
    assert len(shards(tmp_path)) == 2


def test_encoders_of_one_name_are_told_apart(tiny, tmp_path):
    a, b = (Encoder("eye", lambda x, k=k: pixel_encoder(4)(x) ** k) for k in (1, 2))
    collect_features(tiny, a, PROMPT, 2, folder=tmp_path, **OPTIONS)
    with pytest.raises(ValueError, match="features of another encoder of the name 'eye'"):
        collect_features(tiny, b, PROMPT, 2, folder=tmp_path, **OPTIONS)


def test_several_encoders_see_images_that_are_made_once(tiny, tmp_path, monkeypatch):
    eyes, runs, sampled = [pixel_encoder(4), latent_encoder(), pixel_encoder(5)], [], store.sample
    alone = [collect_features(tiny, eye, PROMPT, 3, **OPTIONS) for eye in eyes]
    monkeypatch.setattr(store, "sample", lambda *a, **k: runs.append(a) or sampled(*a, **k))
    together = collect_features(tiny, eyes, PROMPT, 3, folder=tmp_path, **OPTIONS)
    assert len(runs) == 2
    for a, b in zip(together, alone):
        assert_same(a, b)
    assert_same(collect_features(tiny, eyes[1], PROMPT, 3, folder=tmp_path, **OPTIONS), alone[1])
    assert len(runs) == 2


def test_latents_stay_on_disk(tiny, tmp_path):
    found = collect_features(tiny, pixel_encoder(4), PROMPT, 5, folder=tmp_path, **OPTIONS)
    assert_same(
        found, collect_features(tiny, pixel_encoder(4), PROMPT, 5, folder=tmp_path, **OPTIONS)
    )
    whole = found.latents[:]
    assert len(found.latents.parts) == 3 and whole.shape == found.latents.shape
    assert torch.equal(found.latents[[4, 0, 3]], whole[[4, 0, 3]]) and torch.equal(
        found.latents[-1], whole[-1]
    )
    assert torch.equal(torch.cat(list(found.latents.split(2))), whole)
    assert torch.equal(
        found.latents[torch.tensor([[1, 2], [4, 4]])], whole[torch.tensor([[1, 2], [4, 4]])]
    )
    with pytest.raises(IndexError):
        found.latents[5]


# --- other sources ---------------------------------------------------------------------------------------------------


def test_prompts_take_turns(tiny):
    both = collect_features(tiny, pixel_encoder(4), [PROMPT, "hat"], 4, **OPTIONS)
    for prompt, mine in ((PROMPT, [0, 2]), ("hat", [1, 3])):
        alone = collect_features(tiny, pixel_encoder(4), prompt, 4, **OPTIONS)
        assert_close(both.features[mine], alone.features[mine], rtol=0, atol=1e-5)
    assert (
        both.run.prompts == [PROMPT, "hat"]
        and both.run.of([3]) == ["hat"]
        and "1 more" in both.run.prompt
    )


def test_another_models_images(tiny, tiny_folder):
    """Features are of its images at its own steps; latents are what this model makes of them."""
    teacher = load(tiny_folder("v_prediction", seed=3), device="cpu", steps=3, guidance=4.0)
    found = collect_features(tiny, pixel_encoder(16), PROMPT, 3, source=teacher, **OPTIONS)
    theirs = generate_images(teacher, PROMPT, 3)
    assert found.features.shape == (3, 3, 3 * 16**2)
    assert_close(
        found.features[:, -1], encode_normalized(pixel_encoder(16), theirs), rtol=0, atol=1e-5
    )
    assert_close(found.latents[:], tiny.encode(theirs), rtol=0, atol=1e-4)
    assert (found.run.steps, found.run.guidance) == (2, 2.0)
    assert teacher.identity() in found.run.source and "3 steps, guidance 4" in found.run.source


def test_pictures_of_ones_own(tiny, tmp_path):
    for i in range(3):
        Image.effect_mandelbrot((40 + 8 * i, 40), (-2, -1.5, 1, 1.5 + i), 20).convert("RGB").save(
            tmp_path / f"{i}.png"
        )
    (tmp_path / "1.txt").write_text("a fractal")
    mine = load_image_folder(tmp_path, PROMPT)
    found = collect_features(tiny, pixel_encoder(8), None, source=mine, **OPTIONS)
    assert found.run.prompts == [PROMPT, "a fractal", PROMPT] and found.run.samples == 3
    images = mine.read([0, 1, 2], (16, 16))
    assert_close(found.features, encode_normalized(pixel_encoder(8), images)[:, None])
    assert_close(found.latents[:], tiny.encode(images), rtol=0, atol=1e-5)
    with pytest.raises(ValueError, match="samples must be 3 or fewer for 3 pictures"):
        collect_features(tiny, pixel_encoder(8), None, 4, source=mine, **OPTIONS)


def test_a_sample_size_does_not_depend_on_the_batch(tiny):
    runs = [
        collect_features(tiny, pixel_encoder(4), PROMPT, 5, **OPTIONS | {"batch": b})
        for b in (1, 2, 5)
    ]
    for other in runs[1:]:
        assert_close(other.features, runs[0].features, rtol=0, atol=1e-5)


# --- bad input -------------------------------------------------------------------------------------------------------

BAD = {
    "prompt must be a non-empty text, not ' '": dict(prompt=" "),
    "prompt must be a non-empty text, not None": dict(prompt=None),
    "prompt must be a non-empty text, not ''": dict(prompt=[PROMPT, ""]),
    "prompt must be a non-empty text, not []": dict(prompt=[]),
    "batch must be 1 or more, not 0": dict(batch=0),
    "samples must be 1 or more, not None": dict(samples=None),
    "samples must be 1 or more, not 0": dict(samples=0),
    "steps must be 1 or more, not 0": dict(steps=0),
    "steps must be 1 or more, not -1": dict(steps=-1),
}


@pytest.mark.parametrize("message", BAD)
def test_bad_input_is_refused_before_any_work(tiny, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        collect_features(
            tiny, Encoder("never", never), **dict(prompt=PROMPT, samples=2) | OPTIONS | BAD[message]
        )


def test_an_unwritable_folder_is_refused_before_any_work(tiny, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(
        ValueError, match="cannot write into folder .*file/samples.*name another folder"
    ):
        collect_features(
            tiny,
            Encoder("never", never),
            PROMPT,
            2,
            folder=tmp_path / "file" / "samples",
            **OPTIONS,
        )
