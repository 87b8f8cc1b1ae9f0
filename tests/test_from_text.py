"""Sliders that are asked for: what is wanted of the denoiser, from words and from pairs; bad input; kills; real images."""

import json
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler
from PIL import Image
from tiny import PROMPT, never, quiet, random_space
from torch.testing import assert_close

from sliderspace.training import prediction_matching as regression
from sliderspace.sliders.adapter import target_layers
from sliderspace.training.from_text import Concept, TextTargets, load_concepts, train_concepts
from sliderspace.sampling.inversion import invert, prompt_to_prompt, replay
from sliderspace.training.from_images import (
    ImageTargets,
    load_image_pairs,
    train_customization,
    train_image_pairs,
)
from sliderspace.training.prediction_matching import ConceptConfig
from sliderspace.sampling.generate import sample, initial_noise
from sliderspace.models.schedulers import prediction_from_x0, x0_estimate
from sliderspace.training.initialization import temporary_adapter

BEARD = Concept(PROMPT, f"{PROMPT}, beard", f"{PROMPT}, no beard", ("smiling", "frowning"), 2.0)
GLASSES = Concept(PROMPT, f"{PROMPT}, glasses", f"{PROMPT}, no glasses", label="glasses")
QUICK = dict(steps=2, rank=2, training_steps=4, targets="keys-values", progress=quiet)


# --- attributes in words ---------------------------------------------------------------------------------------------


def test_attributes_are_read_from_yaml_and_json(tmp_path):
    asked = [
        dict(target="a", positive="b", negative="c"),
        dict(target="ü", positive="b", negative="c", preserve=["x", "y"], eta=2, label="l"),
    ]
    (tmp_path / "a.json").write_text(json.dumps(asked))
    text = "- {target: a, positive: b, negative: c}\n- target: ü\n  positive: b\n  negative: c\n  preserve: [x, y]\n"
    (tmp_path / "a.yaml").write_text(text + "  eta: 2\n  label: l\n", encoding="utf-8")
    read = load_concepts(tmp_path / "a.json")
    assert read == load_concepts(str(tmp_path / "a.yaml"))
    assert [c.label for c in read] == ["b", "l"] and read[1].preserve == ("x", "y")
    (tmp_path / "one.yaml").write_text("target: a\npositive: b\nnegative: c")
    assert load_concepts(tmp_path / "one.yaml") == read[:1]


GOOD = {"target": "a", "positive": "b", "negative": "c"}


@pytest.mark.parametrize(
    "entries, message",
    [
        (
            [GOOD, GOOD | {"preserved": ["x"]}],
            r"attribute 2 in .* unknown key 'preserved' \(did you mean 'preserve'\?\)",
        ),
        (
            [GOOD | {"guidance_scale": 4}],
            "unknown key 'guidance_scale': known are target, positive, negative, preserve, eta",
        ),
        ([{"target": "a", "positive": "b"}], "lacks 'negative'"),
        ([GOOD | {"preserve": "x"}], "preserve must be a list of texts, not 'x'"),
        ([GOOD | {"preserve": ["x", " "]}], "preserve must be a text, not ' '"),
        ([GOOD | {"preserve": 3}], "attribute 1"),
        ([GOOD | {"positive": ""}], "positive must be a text, not ''"),
        ([GOOD | {"target": 3}], "target must be a text, not 3"),
        ([GOOD | {"eta": 0}], "eta must be a number above 0, not 0"),
        ([GOOD | {"eta": "4"}], "eta must be a number above 0, not '4'"),
        ([GOOD | {"eta": True}], "eta must be a number above 0"),
        ([GOOD | {"positive": "c"}], "positive and negative are the same: 'c'"),
        ([GOOD | {"label": ["x"]}], "label must be a text"),
        ([], "holds no attributes"),
        (["a"], "attribute 1 in .* must have the keys"),
        (None, "must have the keys"),
    ],
)
def test_bad_attributes_are_named(tmp_path, entries, message):
    (tmp_path / "a.yaml").write_text(json.dumps(entries))
    with pytest.raises(ValueError, match=message):
        load_concepts(tmp_path / "a.yaml")


@pytest.mark.parametrize("text", ["target: [", "\tx", "!!python/object/apply:os.system ['true']"])
def test_what_is_not_yaml_is_refused(tmp_path, text):
    (tmp_path / "a.yaml").write_text(text)
    with pytest.raises(ValueError, match="is not YAML or JSON"):
        load_concepts(tmp_path / "a.yaml")
    with pytest.raises(FileNotFoundError):
        load_concepts(tmp_path / "b.yaml")


@pytest.fixture
def adapter_of():
    """Model, sliders -> an adapter of random sliders on it, as in training."""
    left = []

    def make(model, sliders, std=0.3):
        layers = target_layers(model, "keys-values")
        context = temporary_adapter(model, layers, sliders, 2)
        left.append(context)
        adapter = context.__enter__()
        space = random_space(model, [str(i) for i in range(sliders)], rank=2, targets="keys-values")
        adapter.load_weights(space.down, space.up)
        return adapter

    yield make
    for context in reversed(left):
        context.__exit__(None, None, None)


@pytest.mark.parametrize("one, rescaled", [(False, False), (True, False), (False, True)])
def test_what_words_want_is_the_papers_equation(tiny, adapter_of, one, rescaled):
    adapter = adapter_of(tiny, 2)
    settings = ConceptConfig(
        rank=2, sample_preserved=one, rescale_target=rescaled, latents_per_step=1
    )
    source = TextTargets(tiny, [BEARD, GLASSES], settings, 3, 5)
    listed = source.more(adapter, torch.Generator().manual_seed(0))
    assert len(listed) == 3 and len({r.timestep.item() for r in listed}) == 3

    def e(rows, i, prompt):
        with torch.no_grad():
            return tiny.predict(rows.latents[[i]], rows.timestep, [prompt], 1.0)[0][0]

    for rows in listed:
        assert rows.slider.tolist() == [0, 0, 1, 1] and rows.strength.tolist() == [1, -1, 1, -1]
        for i, (k, s) in enumerate(zip(rows.slider.tolist(), rows.strength.tolist())):
            c = (BEARD, GLASSES)[k]
            options = []
            for words in [[w] for w in c.preserve] if one and c.preserve else [c.preserve or ("",)]:

                def joined(prompt, w):
                    return f"{prompt}, {w}" if w else prompt

                ups = torch.stack([e(rows, i, joined(c.positive, w)) for w in words])
                downs = torch.stack([e(rows, i, joined(c.negative, w)) for w in words])
                wanted = e(rows, i, c.target) + s * c.eta * (ups - downs).mean(0)
                if rescaled:
                    wanted = wanted * ((ups if s > 0 else downs).mean(0).norm() / wanted.norm())
                options.append(wanted)
            assert any(torch.allclose(rows.target[i], o, rtol=1e-4, atol=1e-4) for o in options)
            assert_close(
                rows.base_error[i],
                (e(rows, i, c.target) - rows.target[i]).pow(2).mean(),
                rtol=1e-3,
                atol=1e-6,
            )


def test_states_are_those_of_sampling_with_the_slider_on(tiny, adapter_of):
    adapter, gen = adapter_of(tiny, 2), torch.Generator().manual_seed(0)
    rows = sorted(
        TextTargets(tiny, [BEARD, GLASSES], ConceptConfig(), 3, 64).more(adapter, gen),
        key=lambda r: -r.timestep,
    )
    noise = torch.randn(4, *tiny.latent_shape, generator=torch.Generator().manual_seed(0))
    for i in range(4):
        adapter.set_strengths(F.one_hot(rows[0].slider[i], 2) * rows[0].strength[i])
        seen = []
        sample(tiny, PROMPT, noise[[i]], 3, on_step=seen.append)
        for step, r in zip(seen, rows, strict=True):
            assert_close(r.latents[[i]], step.latents, rtol=1e-4, atol=1e-4)


# --- attributes in pairs ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "kind", ["epsilon", "v_prediction", "sample", "flow_prediction", "trigflow"]
)
def test_the_wanted_prediction_leads_to_the_image(kind):
    x0, noise = torch.randn(2, 3, 4, 4, 4, generator=torch.Generator().manual_seed(0))
    s, n = (
        (torch.tensor([0.6, 0.1]), torch.tensor([0.8, 0.9]))
        if "flow_p" not in kind
        else (torch.tensor([0.7, 0.2]), torch.tensor([0.3, 0.8]))
    )
    x = s.view(-1, 1, 1, 1) * x0[:2] + n.view(-1, 1, 1, 1) * noise[:2]
    wanted = prediction_from_x0(x0[:2], x, s, n, kind)
    assert_close(x0_estimate(wanted, x, s, n, kind), x0[:2], rtol=1e-4, atol=1e-4)


def test_the_wanted_prediction_is_diffusers_own_target():
    x0, noise = torch.randn(2, 2, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    t = torch.tensor([100, 700])
    ddim = DDIMScheduler(prediction_type="v_prediction")
    a = ddim.alphas_cumprod[t]
    x = ddim.add_noise(x0, noise, t)
    assert_close(
        prediction_from_x0(x0, x, a.sqrt(), (1 - a).sqrt(), "v_prediction"),
        ddim.get_velocity(x0, noise, t),
        rtol=1e-4,
        atol=1e-4,
    )
    assert_close(
        prediction_from_x0(x0, x, a.sqrt(), (1 - a).sqrt(), "epsilon"), noise, rtol=1e-4, atol=1e-4
    )
    flow = FlowMatchEulerDiscreteScheduler()
    sigma = flow.sigmas[[100]]
    x = flow.scale_noise(x0, flow.timesteps[[100]], noise)
    assert_close(
        prediction_from_x0(x0, x, 1 - sigma, sigma, "flow_prediction"),
        noise - x0,
        rtol=1e-4,
        atol=1e-4,
    )
    with pytest.raises(ValueError, match="prediction_type must be"):
        prediction_from_x0(x0, x, 1.0, 1.0, "score")


def images_of(model, count=3, seed=0):
    return torch.rand(count, 3, *model.image_size, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
def test_a_pair_shares_noise_and_timestep(tiny_of, adapter_of, kind):
    model = tiny_of(kind)
    adapter = adapter_of(model, 2)
    shown = [
        {-1.0: torch.randn(3, *model.latent_shape), 1.0: torch.randn(3, *model.latent_shape)},
        {
            0.5: torch.randn(2, *model.latent_shape),
            1.0: torch.randn(2, *model.latent_shape),
            2.0: torch.randn(2, *model.latent_shape),
        },
    ]
    listed = ImageTargets(model, shown, PROMPT, ConceptConfig(latents_per_step=2), 3, 64).more(
        adapter, torch.Generator().manual_seed(0)
    )
    assert len({r.timestep.item() for r in listed}) == 3
    for rows in listed:
        assert rows.slider.tolist() == [0] * 4 + [1] * 6
        assert rows.strength.tolist() == [-1, -1, 1, 1, 0.5, 0.5, 1, 1, 2, 2]
        x0 = x0_estimate(rows.target, rows.latents, *rows.shares, kind)
        noise = (rows.latents - rows.shares[0] * x0) / rows.shares[1]
        assert_close(noise[:2], noise[2:4], rtol=1e-3, atol=1e-3)
        assert_close(noise[4:6], noise[8:], rtol=1e-3, atol=1e-3)
        for i, (k, s) in enumerate(zip(rows.slider.tolist(), rows.strength.tolist())):
            near = (shown[k][s] - x0[i]).flatten(1).abs().amax(1)
            assert near.min() < 1e-3
        with torch.no_grad():
            base = model.predict(rows.latents, rows.timestep, PROMPT, 1.0)[0]
        assert_close(
            rows.base_error, (base - rows.target).pow(2).flatten(1).mean(1), rtol=1e-3, atol=1e-5
        )


@pytest.fixture
def folders(tmp_path):
    """Names and sizes -> two folders of pictures."""
    for folder in ("before", "after"):
        (tmp_path / folder).mkdir()

    def make(before, after):
        for folder, names in (("before", before), ("after", after)):
            for i, (name, size) in enumerate(names.items()):
                if size is None:
                    (tmp_path / folder / name).write_bytes(b"no picture")
                else:
                    array = np.random.default_rng(i).integers(0, 255, (*size, 3), np.uint8)
                    Image.fromarray(array).save(tmp_path / folder / name)
        return {-1: tmp_path / "before", 1: str(tmp_path / "after")}

    return make


def test_pairs_are_matched_by_name(folders):
    read = load_image_pairs(
        folders({"b.png": (8, 8), "a.png": (8, 8)}, {"a.bmp": (8, 8), "b.webp": (8, 8)})
    )
    assert list(read) == [-1, 1]
    assert [[p.name for p in x.paths] for x in read.values()] == [
        ["a.png", "b.png"],
        ["a.bmp", "b.webp"],
    ]
    assert read[1].read([0, 1], (16, 16)).shape == (2, 3, 16, 16)


def test_all_faults_of_pairs_are_in_one_error(folders):
    asked = folders(
        {"a.png": (8, 8), "b.png": (8, 8), "c.png": None, "d.png": (8, 8), "d.jpg": (8, 8)},
        {"a.png": (8, 9), "c.png": (8, 8), "d.png": (8, 8), "e.png": (8, 8)},
    )
    with pytest.raises(ValueError) as error:
        load_image_pairs(asked)
    text = str(error.value)
    for part in (
        "5 faults",
        "'a' has sizes [(8, 8), (9, 8)]",
        "'b' is not in",
        "after",
        "c.png cannot be read",
        "have one name",
        "'e' is not in",
        "before",
    ):
        assert part in text


@pytest.mark.parametrize("strengths", [[1], [0, 1], ["a", 1], [float("nan"), 1], []])
def test_pairs_need_two_strengths(tmp_path, strengths):
    with pytest.raises(ValueError, match="two or more strengths"):
        load_image_pairs({s: tmp_path for s in strengths})
    with pytest.raises(ValueError, match="there are no pictures in"):
        load_image_pairs({-1: tmp_path, 1: tmp_path})


# --- training --------------------------------------------------------------------------------------------------------


def trained_on(model, **options):
    shown = {"one": {-1: images_of(model), 1: images_of(model, seed=1)}}
    return train_image_pairs(model, shown, PROMPT, **QUICK | options)


def same(a, b):
    return all(torch.equal(a.down[n], b.down[n]) and torch.equal(a.up[n], b.up[n]) for n in a.down)


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
def test_sliders_learn_what_words_want(tiny_of, kind):
    model = tiny_of(kind)
    space = train_concepts(
        model, [BEARD, GLASSES], **QUICK | dict(training_steps=60, lr=0.05, targets="attention")
    )
    assert space.labels == [f"{PROMPT}, beard", "glasses"] and space.rank == 2
    reached = [row["reached"] for row in space.card["sliders"]]
    assert min(reached) > 0.3, reached
    assert space.card["sliders"][0]["preserve"] == ("smiling", "frowning")
    assert train_concepts(model, BEARD, **QUICK | dict(training_steps=0)).card["sliders"][0][
        "reached"
    ] == pytest.approx(0, abs=1e-5)


def test_sliders_learn_what_pairs_show(tiny):
    space = trained_on(tiny, training_steps=60, lr=0.05, targets="attention")
    assert space.labels == ["one"] and space.card["sliders"][0]["reached"] > 0.01
    gone = initial_noise(tiny, 5, range(2))
    x = {s: None for s in (-1.0, 0.0, 1.0)}
    for s in x:
        with space.on(tiny, {0: s}):
            x[s] = tiny.predict(gone, 500, PROMPT, 1.0)[1]
    assert (x[1.0] - x[0.0]).abs().max() > 1e-3 and (x[-1.0] - x[0.0]).abs().max() > 1e-3


@pytest.mark.parametrize(
    "train_one",
    [lambda m, **o: train_concepts(m, [BEARD, GLASSES], **QUICK | o), trained_on],
    ids=["words", "pairs"],
)
def test_a_run_that_is_stopped_goes_on_to_the_same_weights(tiny, tmp_path, train_one):
    options = dict(training_steps=9, save_every=2)
    whole = train_one(tiny, **options)
    with pytest.raises(RuntimeError, match="power cut"):
        train_one(tiny, folder=tmp_path, **options, progress=stopped(7))
    [kept] = tmp_path.glob("*/*")
    assert kept.name == "state.safetensors"
    again = train_one(tiny, folder=tmp_path, **options)
    assert same(again, whole) and again.card == whole.card
    assert same(train_one(tiny, folder=tmp_path, **options, progress=stopped(0)), whole)


def stopped(after):
    def bar(items, desc=None, **options):
        def some():
            for i, item in enumerate(items):
                if i == after:
                    raise RuntimeError("power cut")
                yield item

        return some() if desc == "training" else items

    return bar


def test_a_process_that_is_killed_goes_on_to_the_same_weights(tiny_of, tiny_folder, tmp_path):
    script = f"""
import sys, os, signal
sys.path[:0] = [{str(Path(__file__).parent)!r}]
from sliderspace import load
from sliderspace.training.prediction_matching import ConceptTrainer
from test_from_text import BEARD, GLASSES, QUICK, train_concepts
parts, made = ConceptTrainer._parts, []
def dying(self, *args):
    made.append(1)
    if len(made) == 8: os.kill(os.getpid(), signal.SIGKILL)
    return parts(self, *args)
ConceptTrainer._parts = dying
train_concepts(load({str(tiny_folder("epsilon"))!r}, device="cpu"), [BEARD, GLASSES], folder={str(tmp_path)!r}, **QUICK | dict(training_steps=9, save_every=2))
"""
    died = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert died.returncode == -signal.SIGKILL, died.stderr
    options = QUICK | dict(training_steps=9, save_every=2)
    model = tiny_of("epsilon")
    assert same(
        train_concepts(model, [BEARD, GLASSES], folder=tmp_path, **options),
        train_concepts(model, [BEARD, GLASSES], **options),
    )


def test_rows_that_are_not_finite_are_left_out_and_counted(tiny, monkeypatch):
    more = TextTargets.more

    def spoilt(self, *args):
        listed = more(self, *args)
        for rows in listed:
            rows.target[1] = float("nan")
        return listed

    monkeypatch.setattr(TextTargets, "more", spoilt)
    space = train_concepts(tiny, [BEARD, GLASSES], **QUICK)
    assert space.card["lost"] == [4.0, 0.0]
    assert all(p.isfinite().all() for p in (*space.down.values(), *space.up.values()))


BAD = [
    (dict(concepts=[]), "concepts must be"),
    (dict(concepts=["glasses"]), "concepts must be"),
    (dict(concepts=[GLASSES, GLASSES]), "two sliders have the label 'glasses'"),
    (dict(training_steps=-1), "training_steps must be 0 or more"),
    (dict(rank=0), "rank must be 1 or more"),
    (dict(batch=0), "batch must be 1 or more"),
    (dict(save_every=0), "save_every must be 1 or more"),
    (dict(steps=0), "steps must be 1 or more"),
    (dict(lr=float("nan")), "lr must be 0 or more, and finite"),
    (dict(init="first-order"), "init must be 'random' or 'orthonormal'"),
    (dict(guidence=3), "no option 'guidence'"),
    (dict(targets="nothing here"), "matches no layer"),
]


@pytest.mark.parametrize("options, message", BAD)
def test_bad_input_is_refused_before_any_work(tiny, monkeypatch, options, message):
    monkeypatch.setattr(regression, "temporary_adapter", never)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        train_concepts(tiny, **dict(concepts=[GLASSES]) | QUICK | options)


@pytest.mark.parametrize(
    "shown, message",
    [
        ({}, "pairs must hold an attribute"),
        ({"a": {1: torch.zeros(1, 3, 16, 16)}}, "two or more strengths"),
        ({"a": {-1: torch.zeros(1, 3, 16, 16), 1: torch.zeros(2, 3, 16, 16)}}, r"\[1, 2\] images"),
        ({"a": {-1: torch.zeros(0, 3, 16, 16), 1: torch.zeros(0, 3, 16, 16)}}, "one or more"),
        ({"a": {-1: torch.zeros(1, 3, 8, 8), 1: torch.zeros(1, 3, 8, 8)}}, "images must be of"),
    ],
)
def test_bad_pairs_are_refused_before_any_work(tiny, monkeypatch, shown, message):
    monkeypatch.setattr(regression, "temporary_adapter", never)
    with pytest.raises(ValueError, match=message):
        train_image_pairs(tiny, shown, PROMPT, **QUICK)


@pytest.mark.parametrize(
    "images, message",
    [
        ({}, "images must hold a set"),
        ({"a": torch.zeros(0, 3, 16, 16)}, r"images\['a'\] must be one image or more"),
        ({"a": torch.zeros(1, 3, 8, 8)}, "images must be of"),
    ],
)
def test_bad_sets_of_images_are_refused_before_any_work(tiny, monkeypatch, images, message):
    monkeypatch.setattr(regression, "temporary_adapter", never)
    with pytest.raises(ValueError, match=message):
        train_customization(tiny, images, PROMPT, **QUICK)


def test_sliders_of_images_learn_their_noise_at_strength_1(tiny_of):
    model = tiny_of("sample")  # what is wanted is the image itself
    shown = {"one": images_of(model, 1), "two": images_of(model, 1, seed=1)}
    space = train_customization(
        model, shown, PROMPT, **QUICK | dict(training_steps=60, lr=0.05, targets="attention")
    )
    assert space.labels == ["one", "two"] and [row["strengths"] for row in space.rows] == [
        [1.0],
        [1.0],
    ]
    assert min(row["reached"] for row in space.rows) > 0.02
    alone = train_customization(
        model,
        {"two": shown["two"]},
        PROMPT,
        **QUICK | dict(training_steps=60, lr=0.05, targets="attention"),
    )
    assert alone.rows[0]["images"] == space.rows[1]["images"]


def test_training_leaves_the_model_as_it_was(tiny):
    x, layers = initial_noise(tiny, 0, range(2)), [n for n, _ in tiny.denoiser.named_modules()]
    with torch.no_grad():
        before = tiny.predict(x, 500, PROMPT, 1.0)[0]
    train_concepts(tiny, BEARD, **QUICK)
    with torch.no_grad():
        assert torch.equal(tiny.predict(x, 500, PROMPT, 1.0)[0], before)
    assert [n for n, _ in tiny.denoiser.named_modules()] == layers


# --- together --------------------------------------------------------------------------------------------------------


def test_spaces_of_several_ranks_add_up(tiny):
    found, asked = (
        random_space(tiny, ["one", "two"], rank=1),
        random_space(tiny, ["three"], rank=3, seed=1),
    )
    for both in (found + asked, asked + found):
        assert both.rank == 3 and len(both) == 3
        for space, mix in ((found, {"one": 0.7, "two": -1}), (asked, {"three": 0.5})):
            x = initial_noise(tiny, 0, range(2))
            with torch.no_grad():
                with space.on(tiny, mix):
                    alone = tiny.predict(x, 500, PROMPT, 1.0)[0]
                with both.on(tiny, mix):
                    assert_close(tiny.predict(x, 500, PROMPT, 1.0)[0], alone, rtol=1e-4, atol=1e-4)


# --- sliders that act late -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_late_sliders_see_states_of_the_unchanged_models_beginning(tiny_of, kind):
    model, settings = tiny_of(kind), ConceptConfig(rank=2, active_from=0.5, rescale_target=False)
    source, gen = TextTargets(model, [BEARD], settings, 4, 8), torch.Generator().manual_seed(0)
    with temporary_adapter(model, target_layers(model, "attention"), 1, 2) as adapter:
        for pair in adapter.parameters().values():
            for p in pair:
                torch.nn.init.normal_(p, std=0.5, generator=torch.Generator().manual_seed(1))
        rows = sorted(source.more(adapter, gen), key=lambda r: -float(r.timestep))
    assert len(rows) == len(source.acting) < 4
    noise, seen = (
        torch.randn(2, *model.latent_shape, generator=torch.Generator().manual_seed(0)),
        [],
    )
    sample(model, PROMPT, noise, 4, on_step=seen.append)
    first = seen[source.acting[0]]
    assert_close(rows[0].timestep, first.timestep)
    assert_close(rows[0].latents, first.latents, rtol=1e-4, atol=1e-4)
    assert (rows[1].latents - seen[source.acting[1]].latents).abs().max() > 1e-3


def test_late_sliders_act_late_wherever_they_are_used(tiny):
    space = train_concepts(tiny, BEARD, active_from=0.5, **QUICK | dict(steps=4))
    assert space.active_from == space.card["active_from"] == 0.5
    noise = initial_noise(tiny, 0, [0])

    def final(**window):
        with space.on(tiny, {0: 8.0}, **window):
            return sample(tiny, PROMPT, noise, 4)

    assert torch.equal(final(), final(start=0.5)) and not torch.equal(final(), final(start=0.0))
    shown = train_image_pairs(
        tiny,
        {"a": {-1: images_of(tiny, 2), 1: images_of(tiny, 2)}},
        PROMPT,
        active_from=0.5,
        **QUICK,
    )
    assert shown.active_from == 0.5 and (space + shown).active_from == 0.5
    assert (space + random_space(tiny, rank=2, targets="keys-values")).active_from == 0.0


@pytest.mark.parametrize("late", [0.1, 0.3, 0.45, 0.65, 0.7, 0.9])
@pytest.mark.parametrize("steps", [10, 20])
def test_training_and_use_agree_on_the_steps(tiny, steps, late):
    open_in, space = [], random_space(tiny, ["one"])
    with space.on(tiny, {0: 1.0}, start=late):
        now = space.attach(tiny).now
        sample(
            tiny,
            PROMPT,
            initial_noise(tiny, 0, [0]),
            steps,
            0.0,
            on_step=lambda step: now.gate.any() and open_in.append(step.index),
        )
    assert regression.active_steps(tiny, steps, ConceptConfig(active_from=late)) == open_in != []


@pytest.mark.parametrize("value", [1, -0.1, 0.9999, float("nan")])
def test_late_sliders_need_a_step_to_act_in(tiny, monkeypatch, value):
    monkeypatch.setattr(regression, "temporary_adapter", never)
    with pytest.raises(ValueError, match="active_from"):
        train_concepts(tiny, BEARD, active_from=value, **QUICK)
    with pytest.raises(ValueError, match="active_from"):
        train_image_pairs(
            tiny,
            {"a": {-1: images_of(tiny, 2), 1: images_of(tiny, 2)}},
            PROMPT,
            active_from=value,
            **QUICK,
        )


# --- real images -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("method", ["edit-friendly", "direct"])
def test_an_inverted_image_comes_back(tiny_of, kind, method):
    model = tiny_of(kind)
    images = images_of(model)
    found = invert(model, images, PROMPT, 4, method, guidance=2.0)
    assert_close(replay(model, found), model.encode(images), rtol=1e-3, atol=1e-3)
    assert_close(replay(model, found, batch=2), model.encode(images), rtol=1e-3, atol=1e-3)
    changed = replay(model, found, "another prompt")
    assert (changed - model.encode(images)).abs().max() > 1e-3


def test_ddim_inversion_is_diffusers_own_walk(tiny):
    images = images_of(tiny, 2)
    found = invert(tiny, images, PROMPT, 5, "ddim", guidance=1.0)
    assert_close(
        replay(tiny, found), sample(tiny, PROMPT, found.start, 5, 1.0), rtol=1e-3, atol=1e-3
    )
    closer = [
        invert(tiny, images, PROMPT, 5, "ddim", fixed_point_iterations=n, guidance=1.0)
        for n in (0, 2, 8)
    ]
    away = [(replay(tiny, f) - tiny.encode(images)).abs().mean() for f in closer]
    assert away[0] > away[1] > away[2]


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
def test_a_step_back_undoes_the_step(tiny_of, kind, monkeypatch):
    """With a denoiser whose answer does not depend on where it is asked, ddim inversion is exact."""
    model, images = tiny_of(kind), images_of(tiny_of(kind), 2)
    answer = torch.randn(2, *model.latent_shape, generator=torch.Generator().manual_seed(3))

    def predict(self, x, t, prompts, guidance=None, shares=None):
        return answer, x0_estimate(answer, x, *shares, kind)

    if kind == "sample":
        answer = answer * 0.1
    monkeypatch.setattr(type(model), "predict", predict)
    found = invert(
        model, images, PROMPT, 4, "ddim", fixed_point_iterations=0 if kind != "sample" else 30
    )
    if kind == "sample":  # the last step forgets where it started: the image cannot come back
        assert found.start.isfinite().all()
    else:
        assert_close(replay(model, found), model.encode(images), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(method="renoise"), "method must be one of"),
        (dict(fixed_point_iterations=-1), "fixed_point_iterations must be 0 or more"),
        (dict(prompt=""), "prompt must be a non-empty text"),
        (dict(prompt=["a"]), "prompt must be one text, or 2, not 1"),
        (dict(images=torch.zeros(2, 3, 5, 5)), "images must be of"),
        (dict(steps=0), "steps must be 1 or more"),
    ],
)
def test_bad_inversions_are_refused(tiny, options, message):
    with pytest.raises(ValueError, match=message):
        invert(tiny, **dict(images=images_of(tiny, 2), prompt=PROMPT, steps=2) | options)


# --- prompt-to-prompt ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_prompt_to_prompt_starts_from_prompt_change(tiny, guidance):
    noise, more = initial_noise(tiny, 0, range(2)), f"{PROMPT}, glasses"
    before = [type(p) for p in tiny.denoiser.attn_processors.values()]
    plain = [sample(tiny, p, noise, 4, guidance) for p in (PROMPT, more)]
    for ours, theirs in zip(
        prompt_to_prompt(tiny, PROMPT, more, noise, 4, guidance, cross_replace_steps=0), plain
    ):
        assert_close(ours, theirs, rtol=1e-3, atol=1e-3)
    source, edited = prompt_to_prompt(tiny, PROMPT, more, noise, 4, guidance, cross_replace_steps=1)
    assert_close(source, plain[0], rtol=1e-3, atol=1e-3)  # the source is as it was
    assert (edited - plain[1]).abs().max() > 1e-4  # the edited one is not
    same = prompt_to_prompt(tiny, PROMPT, PROMPT, noise, 4, guidance, cross_replace_steps=1)
    assert_close(same[0], same[1])
    assert [type(p) for p in tiny.denoiser.attn_processors.values()] == before
    assert not any("get_attention_scores" in vars(m) for m in tiny.denoiser.modules())


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(cross_replace_steps=2), "cross_replace_steps must be 0 to 1"),
        (dict(edited=" "), "non-empty text"),
    ],
)
def test_bad_prompt_to_prompt_is_refused(tiny, options, message):
    with pytest.raises(ValueError, match=message):
        prompt_to_prompt(
            tiny, **dict(prompt=PROMPT, edited="a", noise=initial_noise(tiny, 0, [0])) | options
        )


def test_a_replay_needs_a_prompt_an_image(tiny):
    found = invert(tiny, images_of(tiny, 2), PROMPT, 2)
    for prompt in ("", ["a"], ["a", "b", "c"]):
        with pytest.raises(ValueError, match="prompt must be"):
            replay(tiny, found, prompt)
