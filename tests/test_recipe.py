"""The recipe at its smallest size: every stage, stopped and resumed, from nothing and from given weights."""

import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, DiffusionPipeline, UNet2DConditionModel
from torch import nn

from sliderspace.portraits import fitting, recipe
from sliderspace.portraits.distill import make_student
from sliderspace.portraits.losses import (
    SharpDecoder,
    balanced,
    classifier_loss,
    to_float,
    random_batch,
    augment,
    vae_loss,
)
from sliderspace.portraits.networks import (
    LATENT_CHANNELS,
    PatchDiscriminator,
    cosine_place,
    new_scheduler,
    new_vae,
    stretched_place,
)
from sliderspace.portraits.classifier import FactorClassifier
from sliderspace.portraits.renders import NUMBERS, PROMPT, Placement, caption, portrait, render
from sliderspace.portraits.recipe import STAGES, Build, encode_all, make_portraits, make_renders
from sliderspace.portraits.text_encoder import Captions, adopt_words, make_tokenizer, token_ids
from sliderspace.portraits.world import PORTRAITS_128, world_of

ROOT = Path(__file__).parents[1]
SMALLEST = dict(images=6, length=2, batch=2, every=1)


def content(folder):
    """Every file of a folder but its logs, which hold times."""
    files = sorted(p for p in folder.rglob("*") if p.is_file())
    return {str(p.relative_to(folder)): p.read_bytes() for p in files}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A model made from nothing in two steps of each stage."""
    folder = tmp_path_factory.mktemp("recipe") / "made"
    make_portraits(folder, **SMALLEST)
    return folder


def test_every_stage_leaves_weights_a_log_and_figures(made):
    assert all((made / f"{stage}.safetensors").exists() for stage in STAGES)
    assert not list(made.glob("*.state"))
    for stage in ("classifier", "autoencoder", "decoder", "denoiser"):
        assert (made / f"{stage}-figures.csv").read_text().startswith("step,seconds,")
        assert (made / f"{stage}-figures.png").stat().st_size > 1000
    assert {p.stem.split("-")[0] for p in (made / "sheets").iterdir()} == {
        "autoencoder",
        "decoder",
        "denoiser",
    }


def test_the_finished_folder_is_a_pipeline_that_names_its_world(made):
    pipe = DiffusionPipeline.from_pretrained(made / "model")
    pipe.set_progress_bar_config(disable=True)
    image = pipe(PROMPT, num_inference_steps=2, generator=torch.Generator().manual_seed(0)).images[
        0
    ]
    assert image.size == (128, 128)
    assert world_of(made / "model") is PORTRAITS_128
    from sliderspace.features.encoders import open_clip_encoder
    from sliderspace.portraits.classifier import score_factors, score_numbers

    x = torch.rand(2, 3, 128, 128)
    assert open_clip_encoder(str(made / "model" / "clip"))(x).shape == (2, 128)
    assert score_factors(x, made / "model")["style"].shape == (2, 6)
    assert score_numbers(x, made / "model").shape == (2, len(NUMBERS))


def test_sampling_here_is_the_pipelines(made):
    build = Build(made, **SMALLEST)
    vae = build.vae()
    encode_all(build, vae)
    own = recipe.new_pipeline(recipe.newest_denoiser(build).eval(), vae, build.tokenizer)
    mine = recipe.draw(own, [PROMPT] * 2, seed=1, steps=3, guidance=3.0)
    pipe = DiffusionPipeline.from_pretrained(made / "model", dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    noise = torch.randn(2, LATENT_CHANNELS, 8, 8, generator=torch.Generator().manual_seed(1))
    theirs = pipe(
        [PROMPT] * 2, latents=noise, num_inference_steps=3, guidance_scale=3.0, output_type="pt"
    ).images
    assert (mine - theirs).abs().max() < 0.02  # its weights have 16 bits


def test_a_run_stopped_in_every_stage_makes_the_same_model(made, tmp_path, monkeypatch):
    update, stopped = fitting.Run.update, set()

    def stopping(run, loss):
        if run.name not in stopped and run.step == 1:
            stopped.add(run.name)
            raise KeyboardInterrupt
        update(run, loss)

    monkeypatch.setattr(fitting.Run, "update", stopping)
    monkeypatch.setattr(
        recipe, "_watch_vae", lambda *args: {}
    )  # what is watched is the test above's
    monkeypatch.setattr(recipe, "_watch_denoiser", lambda *args: {})
    for _ in STAGES:
        with pytest.raises(KeyboardInterrupt):
            make_portraits(tmp_path, **SMALLEST)
    make_portraits(tmp_path, **SMALLEST)
    assert stopped == set(STAGES)
    assert content(tmp_path / "model") == content(made / "model")


def test_training_goes_on_from_given_weights(made, tmp_path, monkeypatch):
    monkeypatch.setattr(recipe, "_watch_vae", lambda *args: {})
    monkeypatch.setattr(recipe, "_watch_denoiser", lambda *args: {})
    first = {}
    update = fitting.Run.update

    def noting(run, loss):
        if run.step == 0:
            first[run.name] = fitting.half_precision(run.module)
        update(run, loss)

    monkeypatch.setattr(fitting.Run, "update", noting)
    make_portraits(tmp_path, **SMALLEST, init=made / "model")
    given = Build(made, **SMALLEST)
    for stage, prefix in (
        ("classifier", ""),
        ("clip", ""),
        ("autoencoder", ""),
        ("denoiser", "unet."),
    ):
        weights = {
            n: v
            for n, v in given.weights(stage).items()
            if n.startswith(prefix) and v.is_floating_point()
        }
        if stage == "autoencoder":  # the given decoder went on alone
            weights = {n: v for n, v in weights.items() if n.startswith("encoder.")}
        running = [
            n for n in weights if "running" in n
        ]  # the first batch has already changed these
        assert all(
            torch.equal(first[stage][n], weights[n].half()) for n in weights if n not in running
        ), stage
    assert content(tmp_path / "model") != content(made / "model")


def test_training_onward_has_no_end_and_writes_its_average_when_it_is_stopped(made, tmp_path):
    command = [
        sys.executable,
        "-m",
        "sliderspace.portraits.recipe",
        "--output",
        str(tmp_path),
        "--init",
        str(made / "model"),
    ]
    command += ["--images", "6", "--batch", "2", "--onward", "--every", "2"]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL) as onward:
        while not all((tmp_path / f"{stage}.state").exists() for stage in ("decoder", "denoiser")):
            assert onward.poll() is None, "it ended by itself"
            time.sleep(0.1)
        onward.terminate()
    assert onward.returncode == 0
    new, old = content(tmp_path / "model"), content(made / "model")
    assert new.keys() == old.keys()
    changed = {name for name in new if new[name] != old[name]}
    assert {name.split("/")[0] for name in changed} == {
        "unet",
        "text_encoder",
        "vae",
    }  # the rest is as it was given
    ours, given = (
        AutoencoderKL.from_pretrained(folder / "model" / "vae") for folder in (tmp_path, made)
    )
    assert all(
        torch.equal(a, b) for a, b in zip(ours.encoder.parameters(), given.encoder.parameters())
    )
    assert any(
        not torch.equal(a, b) for a, b in zip(ours.decoder.parameters(), given.decoder.parameters())
    )
    assert ours.config.scaling_factor == given.config.scaling_factor


def test_bad_settings_are_refused_before_anything_is_made(made, tmp_path):
    with pytest.raises(ValueError, match="stages must be of .*, not 'encoder'"):
        make_portraits(tmp_path, ["encoder"])
    with pytest.raises(ValueError, match="onward=True goes on from a finished model"):
        Build(tmp_path, onward=True)
    with pytest.raises(ValueError, match="is no folder of a model: it has none of"):
        Build(tmp_path, init=tmp_path)
    with pytest.raises(ValueError, match="was begun with {'images': 6, .*name another one"):
        Build(made, images=7)
    assert not list(tmp_path.iterdir())


# --- data ------------------------------------------------------------------------------------------------------------


def test_renders_are_those_of_their_numbers_whatever_the_parts(tmp_path):
    whole = make_renders(tmp_path / "a", 5, 3)
    parts = make_renders(tmp_path / "b", 5, 3, part=2)
    assert (
        whole.dtype == torch.uint8 and whole.shape == (5, 3, 128, 128) and torch.equal(whole, parts)
    )
    one = np.asarray(portrait(3, 4, PORTRAITS_128).image(world=PORTRAITS_128))
    assert np.array_equal(whole[4].permute(1, 2, 0).numpy(), one)


def test_captions_are_drawn_from_their_persons():
    people = [portrait(0, i, PORTRAITS_128).factors for i in range(20)]
    import tempfile
    from pathlib import Path

    tokenizer = make_tokenizer(Path(tempfile.mkdtemp()))
    captions = Captions(people, tokenizer, copies=3)
    index = torch.arange(20).repeat(30)
    rows = captions.numbers(index, torch.Generator().manual_seed(0))
    for person, row in zip(index.tolist(), rows.tolist()):
        words = captions.texts[row].split(", ")
        assert words[0] == PROMPT and set(words[1:]) <= set(people[person].values())
        named = {
            f: values[n]
            for n, (f, values) in zip(captions.named[row], captions.factors.items())
            if n < len(values)
        }
        assert caption(named) == captions.texts[row]
    ids = captions.draw(index, torch.Generator().manual_seed(1), empty=0.25)
    bare = (ids == token_ids(tokenizer, [""])).all(1).float().mean()
    assert abs(bare - 0.25) < 0.08


def test_words_keep_what_is_known_of_them(tmp_path):
    old, new = (
        make_tokenizer(tmp_path / "a", world=PORTRAITS_128),
        make_tokenizer(tmp_path / "b", world=PORTRAITS_128),
    )
    known, embedding = torch.randn(len(old), 4), nn.Embedding(len(new), 4)
    assert adopt_words(embedding, new, known, old) == []
    assert torch.equal(embedding.weight, known)
    from sliderspace.portraits.world import PORTRAITS_64

    other = make_tokenizer(tmp_path / "c", world=PORTRAITS_64)
    known, embedding = torch.randn(len(other), 4), nn.Embedding(len(new), 4)
    missing = adopt_words(embedding, new, known, other)
    assert {"micah</w>", "personas</w>"} <= set(missing) and "hair</w>" not in missing
    number = new.get_vocab()["hair</w>"]
    assert torch.equal(embedding.weight[number], known[other.get_vocab()["hair</w>"]])


# --- losses ----------------------------------------------------------------------------------------------------------


def test_shifts_of_spoiled_pictures_are_told_in_the_numbers_units():
    person = portrait(0, 2, PORTRAITS_128)
    drawing = render(person.factors, person.seed, world=PORTRAITS_128)
    x = torch.from_numpy(np.asarray(drawing).copy()).permute(2, 0, 1)[None] / 127.5 - 1
    gen = torch.Generator().manual_seed(5)
    spoiled, (right, down) = augment(x.repeat(64, 1, 1, 1), gen)
    assert (right, down) != (0, 0)
    placed = Placement(False, 1.0, -right / 128, -down / 128, 0.0).apply(drawing, True)
    truth = torch.from_numpy(np.asarray(placed).copy()).permute(2, 0, 1) / 127.5 - 1
    clean = (
        (spoiled - truth).abs().amax((1, 2, 3)).min()
    )  # some of the 64 have neither noise nor blur
    assert clean < 0.02


def test_the_classifier_learns_numbers_of_shifted_pictures(monkeypatch):
    model = FactorClassifier(4, PORTRAITS_128)
    images = torch.zeros(4, 3, 128, 128, dtype=torch.uint8)
    numbers = torch.zeros(4, len(NUMBERS))
    ids = {factor: torch.zeros(4, dtype=torch.long) for factor in PORTRAITS_128.factors}
    seen = []
    from sliderspace.portraits import losses

    monkeypatch.setattr(losses, "augment", lambda x, gen: (x, (4, -8)))
    monkeypatch.setattr(losses.F, "mse_loss", lambda a, b: (seen.append(b), (a - a).sum())[1])
    classifier_loss(model, images, ids, numbers, torch.Generator().manual_seed(0), batch=2)
    truth = seen[0].view(2, -1)
    assert truth[:, NUMBERS.index("shift x")].tolist() == [-4 / 128] * 2
    assert truth[:, NUMBERS.index("shift y")].tolist() == [8 / 128] * 2


def sharp():
    torch.manual_seed(0)
    vae = new_vae().requires_grad_(False)
    vae.decoder.requires_grad_(True)
    images = torch.randint(
        0, 256, (4, 3, 128, 128), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
    )
    latents = torch.randn(4, LATENT_CHANNELS, 8, 8, generator=torch.Generator().manual_seed(1))
    return SharpDecoder(vae, PatchDiscriminator(), images, latents, batch=2)


def test_decoder_and_discriminator_learn_each_from_its_own():
    loss = sharp()
    total, values = loss(torch.Generator().manual_seed(3))
    total.backward()
    assert (
        set(values) == {"pixels", "features", "adversarial", "discriminator"} and total.isfinite()
    )
    assert all(p.grad is not None for p in loss.vae.decoder.parameters())
    assert all(p.grad is None for p in loss.vae.encoder.parameters())
    mine = [p.grad.clone() for p in loss.discriminator.parameters()]
    # the discriminator's gradient is that of the hinge loss alone
    gen, again = torch.Generator().manual_seed(3), sharp()
    x, index = random_batch(again.images, 2, gen)
    with torch.no_grad():
        y = again.vae.decode(again.latents[index] / again.vae.config.scaling_factor).sample
        again.discriminator(to_float(x))  # each look moves the power iteration of the spectral norm
        again.discriminator(to_float(x))
    real, fake = again.discriminator(to_float(x))[0], again.discriminator(y)[0]
    ((1 - real).relu().mean() + (1 + fake).relu().mean()).backward()
    for a, b in zip(mine, (p.grad for p in again.discriminator.parameters())):
        torch.testing.assert_close(a, b, rtol=0.05, atol=0.05 * b.abs().max().item())


def test_balanced_gradients_have_their_shares():
    y = torch.randn(2, 3, 4, 4).requires_grad_(True)
    losses = {"a": y.pow(2).sum(), "b": 1000 * y.sin().sum(), "none": 0 * y.sum()}
    shares = {"a": 1.0, "b": 0.25, "none": 1.0}
    found = balanced(losses, shares, y)
    a, b = 2 * y.detach(), y.detach().cos()
    torch.testing.assert_close(found, a + 0.25 * a.norm() * b / b.norm())


def test_the_autoencoders_loss_reaches_all_of_it():
    vae = new_vae()
    images = torch.randint(0, 256, (3, 3, 128, 128), dtype=torch.uint8)
    vae_loss(vae, images, torch.Generator().manual_seed(0), batch=2).backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in vae.parameters())
    with torch.no_grad():
        assert vae.encode(to_float(images)).latent_dist.mean.shape == (3, LATENT_CHANNELS, 8, 8)


# --- schedule --------------------------------------------------------------------------------------------------------


def test_equal_steps_pass_the_noise_levels_of_the_stretched_cosine():
    scheduler = new_scheduler()
    t = torch.arange(1000)
    expected = torch.cos(torch.pi / 2 * cosine_place((t + 1) / 1000).double())
    assert (scheduler.alphas_cumprod.sqrt() - expected).abs().max() < 2e-3
    scheduler.set_timesteps(8)
    assert scheduler.timesteps.tolist() == [999, 874, 749, 624, 499, 374, 249, 124]
    u = torch.linspace(0, 0.999, 50, dtype=torch.float64)
    torch.testing.assert_close(stretched_place(cosine_place(u)), u)


def test_the_schedule_survives_its_file(tmp_path):
    new_scheduler().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "scheduler_config.json").read_text())
    assert len(config["trained_betas"]) == 1000
    again = type(new_scheduler()).from_pretrained(tmp_path)
    assert torch.equal(again.alphas_cumprod, new_scheduler().alphas_cumprod)


# --- what a command says of some stages --------------------------------------------------------------------------------


def test_steps_and_batches_can_be_those_of_some_stages(made, tmp_path):
    build = Build(tmp_path, images=6, length={"classifier": 1}, batch={"words": 3}, figures=False)
    assert build.batch_of("words", 128) == 3 and build.batch_of("clip", 5) == 5
    STAGES["classifier"](build)
    assert (tmp_path / "classifier.safetensors").exists()
    assert not (tmp_path / "classifier-figures.csv").exists()


@pytest.mark.parametrize("words", [["decodr=2"], ["decoder=0"], ["many"], ["2", "3"]])
def test_a_command_with_other_numbers_is_refused(tmp_path, monkeypatch, capsys, words):
    command = ["recipe", "--output", str(tmp_path / "new"), "--batch", *words]
    monkeypatch.setattr(sys, "argv", command)
    with pytest.raises(SystemExit):
        recipe.main()
    assert "give one number for all stages, or stage=number" in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


def test_the_sibling_is_distilled_from_what_the_recipe_made(made, tmp_path):
    shutil.copytree(made, tmp_path / "made")
    make_student(Build(tmp_path / "made", **SMALLEST), pairs=2)
    student = UNet2DConditionModel.from_pretrained(tmp_path / "made/student/unet")
    teacher = UNet2DConditionModel.from_pretrained(made / "model/unet")
    assert not torch.equal(student.conv_in.weight, teacher.conv_in.weight)
