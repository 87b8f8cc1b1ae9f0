"""Ways draw from the same noise, what is kept is found again and never another way's, figures are those of `sets`."""

from dataclasses import replace
from functools import partial
from html.parser import HTMLParser

import pytest
import torch
from families import make
from PIL import Image
from tiny import PROMPT, never, quiet, random_space
from torch.testing import assert_close

from sliderspace.evaluation import comparison as ways
from sliderspace import load
from sliderspace.experiments.applications import mixing_strategies, recovered_fraction, baselines
from sliderspace.features.encoders import Encoder, get_encoder, latent_encoder, pixel_encoder
from sliderspace.sliders.mixing import sparse_mixtures
from sliderspace.figures import to_png
from sliderspace.sampling.generate import generate_images, sample, initial_noise
from sliderspace.evaluation.image_metrics import (
    ConfidenceInterval,
    cmmd,
    mean_pairwise_distance,
    frechet_distance,
    kernel_inception_distance,
    precision_recall,
    clip_score,
    vendi_score,
)
from sliderspace.sampling.prompts import load_image_folder
from sliderspace.evaluation.comparison import (
    Comparison,
    ImageGenerator,
    compare_generators,
    generator_features,
    base_model,
    plot_comparison,
    reference_features,
    rephrased_prompts,
    slider_mixtures,
)

STEPS = dict(steps=2, guidance=2.0)
EYES = [pixel_encoder(4)]


def zeros(numbers):
    return torch.zeros(len(numbers), 3)


def ones(numbers):
    return torch.ones(len(numbers), 3)


class Counted(ImageGenerator):
    """A way of random pictures, which says what it was asked for."""

    def __init__(self, name="way", card=None, scale=1.0):
        super().__init__(name, self.made, {} if card is None else card)
        object.__setattr__(self, "asked", [])
        object.__setattr__(self, "said", [])
        object.__setattr__(self, "scale", scale)

    def made(self, prompts, numbers, seed):
        self.asked.append(numbers)
        self.said.append(prompts)
        gens = (torch.Generator().manual_seed(1000 * seed + i) for i in numbers)
        return self.scale * torch.stack([torch.rand(3, 8, 8, generator=g) for g in gens])


@pytest.fixture(autouse=True)
def small_shards(monkeypatch):
    """Ten images are a long run."""
    monkeypatch.setattr(ways, "SHARD_SIZE", 4)


@pytest.fixture(scope="module")
def student():
    return load("portraits-fast", device="cpu")


@pytest.fixture
def red():
    """An eye that sees nothing but redness, and knows the words for it."""

    def encode(x):
        return torch.stack([x[:, 0].mean((1, 2)), x[:, 1:].mean((1, 2, 3))], 1)

    def text(texts):
        return torch.tensor([[1.0, 0.0] if "red" in t else [0.0, 1.0] for t in texts])

    return Encoder("red", encode, text=text)


# --- the same noise --------------------------------------------------------------------------------------------------


def test_the_plain_way_is_the_sampler(student):
    got = base_model(student).generate([PROMPT], [3, 0, 11], 5)
    assert got.shape == (3, 3, 64, 64) and torch.equal(
        got, generate_images(student, PROMPT, [3, 0, 11], seed=5)
    )


def test_steps_guidance_and_prompts_are_handed_on(tiny):
    prompts, numbers = ["hat", PROMPT], [0, 1, 5]
    got = base_model(tiny, **STEPS).generate(prompts, numbers, 1)
    assert torch.equal(got, generate_images(tiny, prompts, numbers, 1, **STEPS))
    assert (
        base_model(tiny, steps=3, guidance=2.0).generate(prompts, numbers, 1) - got
    ).abs().max() > 1e-3
    assert (
        base_model(tiny, steps=2, guidance=5.0).generate(prompts, numbers, 1) - got
    ).abs().max() > 1e-3


def test_all_ways_begin_with_the_same_noise(tiny):
    base = base_model(tiny, **STEPS).generate([PROMPT], [4, 1], 7)
    still = slider_mixtures(tiny, random_space(tiny), "still", zeros, **STEPS)
    same = rephrased_prompts(tiny, {PROMPT: [PROMPT]}, **STEPS)
    assert torch.equal(still.generate([PROMPT], [4, 1], 7), base) and torch.equal(
        same.generate([PROMPT], [4, 1], 7), base
    )
    itself = base_model(tiny.with_first_steps_from(tiny, guidance=2.0), **STEPS)
    assert_close(itself.generate([PROMPT], [4, 1], 7), base, rtol=0, atol=1e-5)
    for way in (still, same, itself):
        assert (way.generate([PROMPT], [4, 1], 8) - base).abs().max() > 1e-2


def test_mixes_are_drawn_by_number(tiny):
    space, mixes = random_space(tiny), partial(sparse_mixtures, 3, count=2, random_signs=True)
    got = slider_mixtures(tiny, space, "mixed", mixes, start=0.3, **STEPS).generate(
        [PROMPT], [5, 2], 7
    )
    for image, number in zip(got, (5, 2)):
        with space.on(tiny, mixes([number])[0], start=0.3):
            assert_close(
                image, generate_images(tiny, PROMPT, [number], 7, **STEPS)[0], rtol=0, atol=1e-4
            )


def test_batches_of_a_way_make_no_difference(tiny):
    space = random_space(tiny)
    mixed, other = (
        partial(slider_mixtures, tiny, space, "mixed", ones),
        partial(rephrased_prompts, tiny, {PROMPT: ["a"]}),
    )
    for make_way in (partial(base_model, tiny), mixed, other):
        whole, parts = (make_way(batch=b, **STEPS).generate([PROMPT], range(5), 0) for b in (64, 2))
        assert_close(parts, whole, rtol=0, atol=1e-4)


def test_sliders_of_another_model_are_refused_but_for_a_transfer(tiny, tiny_of):
    other = tiny_of("epsilon", 1)
    with pytest.raises(ValueError, match="made for the weights of"):
        slider_mixtures(other, random_space(tiny), "mixed", ones)
    slider_mixtures(other, random_space(tiny), "mixed", ones, transfer=True).generate(
        [PROMPT], [0], 0
    )


# --- other words -----------------------------------------------------------------------------------------------------


def test_other_words_take_turns(tiny, monkeypatch):
    said = []

    def heard(model, prompts, noise, *args):
        said.extend(prompts)
        return sample(model, prompts, noise, *args)

    monkeypatch.setattr(ways, "sample", heard)
    way = rephrased_prompts(tiny, {"a": ["a1", "a2", "a3"], "b": ["b1", "b2"]}, **STEPS)
    whole = way.generate(["a", "b"], range(8), 0)
    assert said == ["a1", "b1", "a2", "b2", "a3", "b1", "a1", "b2"]
    said.clear()
    some = way.generate(["a", "b"], [6, 3], 0)  # by the number, whatever else is drawn
    assert said == ["a1", "b2"]
    assert_close(some, whole[[6, 3]], rtol=0, atol=1e-5)


def test_words_that_are_missing_are_refused(tiny, monkeypatch):
    monkeypatch.setattr(ways, "sample", never)
    for variations, message in (
        ({PROMPT: []}, f"variations of '{PROMPT}' must be one text or more"),
        ({PROMPT: ["a", " "]}, "prompt must be a non-empty text, not ' '"),
    ):
        with pytest.raises(ValueError, match=message):
            rephrased_prompts(tiny, variations)
    with pytest.raises(ValueError, match="variations lack the prompt 'hat'"):
        rephrased_prompts(tiny, {PROMPT: ["a"]}).generate([PROMPT, "hat"], [0, 1], 0)


# --- another model's first steps -------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=["sd15", "sdxl", "sd35", "flux-dev"])
def two(request, tmp_path_factory):
    """Two models of a family with other weights, noise, and what each makes of it at every step."""
    folder = tmp_path_factory.mktemp("families") / request.param
    make(request.param, folder)
    one, other = (
        load(folder, device="cpu", steps=3, guidance=2.0, size=(16, 16)) for _ in range(2)
    )
    gen = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in other.denoiser.parameters():
            p += 0.1 * torch.randn(p.shape, generator=gen)
    noise = initial_noise(one, 0, [0, 1, 2])
    return one, other, noise


WORDS = [PROMPT, "hat", PROMPT]


def run(model, noise):
    """Every step of a sampling run, and its end."""
    steps = []
    return steps, sample(model, WORDS, noise, on_step=steps.append)


@pytest.mark.parametrize("first", [1, 2, 3, 9])
def test_a_model_that_leads_itself_changes_nothing(two, first):
    one, _, noise = two
    assert_close(
        run(one.with_first_steps_from(one, first), noise)[1], run(one, noise)[1], rtol=0, atol=1e-5
    )


def test_a_model_that_takes_all_steps_makes_its_own_images(two):
    one, other, noise = two
    (own, led), (theirs, end) = run(one.with_first_steps_from(other, 3), noise), run(other, noise)
    assert_close(led, end, rtol=0, atol=1e-5)
    assert (end - run(one, noise)[1]).abs().max() > 1e-2  # of other weights
    for a, b in zip(own, theirs):
        assert_close(a.next, b.next, rtol=0, atol=1e-5)


@pytest.mark.parametrize("first", [1, 2])
def test_first_steps_are_the_others_and_then_its_own(two, first):
    one, other, noise = two
    steps, end = run(one.with_first_steps_from(other, first), noise)
    theirs = run(other, noise)[0]
    assert_close(steps[first - 1].next, theirs[first - 1].next, rtol=0, atol=1e-5)
    later = steps[first]
    alone = one.predict(later.latents, later.timestep, WORDS, shares=(later.alpha, later.sigma))[1]
    assert_close(later.x0, alone, rtol=0, atol=1e-4)
    assert (end - run(other, noise)[1]).abs().max() > 1e-3


def test_what_a_led_step_shows_is_what_led_it(two):
    # discovery looks at these estimates, and the board's early pictures are of them
    one, other, noise = two
    for ours, theirs in zip(
        run(one.with_first_steps_from(other, 3), noise)[0], run(other, noise)[0]
    ):
        assert_close(ours.x0, theirs.x0, rtol=0, atol=1e-4)


def test_the_leader_has_a_guidance_of_its_own(two):
    one, other, noise = two
    for guidance in (1.5, 4.0):
        got = run(one.with_first_steps_from(other, 3, guidance), noise)[1]
        assert_close(got, sample(other, WORDS, noise, guidance=guidance), rtol=0, atol=1e-4)


def test_sliders_act_in_the_steps_of_their_own_model(two):
    one, other, noise = two
    space = random_space(one)
    with space.on(one, [{0: 1.0}, {}, {1: -1.0}]):
        assert_close(
            run(one.with_first_steps_from(other, 3), noise)[1],
            run(other, noise)[1],
            rtol=0,
            atol=1e-5,
        )
        moved = run(one.with_first_steps_from(other, 1), noise)[1]
    still = run(one.with_first_steps_from(other, 1), noise)[1]
    assert (moved - still).flatten(1).abs().amax(1)[[0, 2]].min() > 1e-3
    assert_close(moved[1], still[1], rtol=0, atol=1e-5)


def test_the_bundled_student_is_led_by_its_teacher(student, model):
    led, noise = (
        student.with_first_steps_from(model, guidance=3.0),
        initial_noise(student, 0, [0, 1]),
    )
    kept = []
    sample(led, [PROMPT, "hat"], noise, on_step=kept.append)
    theirs = model.predict(
        noise, kept[0].timestep, [PROMPT, "hat"], 3.0, (kept[0].alpha, kept[0].sigma)
    )[1]
    assert_close(kept[0].x0, theirs, rtol=0, atol=1e-4)
    got = base_model(led).generate([PROMPT, "hat"], [0, 1], 0)
    assert_close(got, student.decode(kept[-1].next), rtol=0, atol=1e-4)
    assert (got - base_model(student).generate([PROMPT, "hat"], [0, 1], 0)).abs().max() > 0.1


def test_a_leader_that_cannot_be_is_refused(tiny, student):
    with pytest.raises(ValueError, match=r"other must have latents \(4, 8, 8\), .*not \(.*8, 8\)"):
        tiny.with_first_steps_from(student)
    for steps in (0, 1.5):
        with pytest.raises(ValueError, match=f"steps must be 1 or more, not {steps}"):
            tiny.with_first_steps_from(tiny, steps)


def looks(name, see):
    return Encoder(name, see)


def average(x):
    return x.mean((2, 3))


# --- what is kept ----------------------------------------------------------------------------------------------------


def kept(folder):
    return sorted(p for p in folder.rglob("*") if p.is_file())


def test_features_are_of_every_image_in_order():
    way = Counted()
    features, first = generator_features(
        way,
        ["a"],
        10,
        [pixel_encoder(4), pixel_encoder(2)],
        seed=2,
        n_kept_images=6,
        progress=quiet,
    )
    assert way.asked == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]
    images = Counted().made(["a"], range(10), 2)
    for eye in (pixel_encoder(4), pixel_encoder(2)):
        assert_close(features[eye.name], eye(images), rtol=0, atol=1e-6)
    assert first.dtype == torch.uint8 and torch.equal(first, (images[:6] * 255).round().byte())


def test_a_prompt_is_not_a_list_of_letters():
    way = Counted()
    generator_features(way, "hat", 2, EYES, progress=quiet)
    assert way.said == [["hat"]]


@pytest.mark.parametrize("name", ["images", "a/b: <c>", "größer"])
def test_an_encoder_may_have_any_name(tmp_path, name):
    for _ in range(2):
        got = generator_features(
            Counted(), ["a"], 6, [looks(name, average)], folder=tmp_path, progress=quiet
        )[0]
        assert_close(got[name], average(Counted().made(["a"], range(6), 0)))


def test_a_run_that_was_stopped_goes_on(tmp_path):
    class Killed(Counted):
        def made(self, prompts, numbers, seed):
            if 8 in numbers:
                raise KeyboardInterrupt
            return super().made(prompts, numbers, seed)

    run = partial(
        generator_features, prompts=["a"], images=10, encoders=EYES, folder=tmp_path, progress=quiet
    )
    stopped, going = Killed(), Counted()
    with pytest.raises(KeyboardInterrupt):
        run(stopped)
    assert len(kept(tmp_path)) == 2
    features, first = run(going)
    assert going.asked == [[8, 9]]
    whole, images = generator_features(Counted(), ["a"], 10, EYES, progress=quiet)
    assert torch.equal(features["pixels-4"], whole["pixels-4"]) and torch.equal(first, images)


def test_a_shard_that_is_gone_is_made_again(tmp_path):
    run = partial(
        generator_features, prompts=["a"], images=10, encoders=EYES, folder=tmp_path, progress=quiet
    )
    whole = run(Counted())
    kept(tmp_path)[1].unlink()
    way = Counted()
    again = run(way)
    assert way.asked == [[4, 5, 6, 7]]
    assert torch.equal(again[0]["pixels-4"], whole[0]["pixels-4"]) and torch.equal(
        again[1], whole[1]
    )
    run(Counted(), images=6)
    run(way, images=12)
    assert way.asked[1:] == [[8, 9, 10, 11]]  # what is there is kept when more are wanted


def test_a_damaged_shard_is_named(tmp_path):
    run = partial(generator_features, Counted(), ["a"], 6, EYES, folder=tmp_path, progress=quiet)
    run()
    path = kept(tmp_path)[0]
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(ValueError, match=f"{path.name}.* is damaged"):
        run()


@pytest.mark.parametrize(
    "error", [OSError(28, "No space left on device"), KeyboardInterrupt()], ids=repr
)
def test_a_file_that_was_not_finished_is_not_read(tmp_path, monkeypatch, error):
    run = partial(
        generator_features, prompts=["a"], images=6, encoders=EYES, folder=tmp_path, progress=quiet
    )
    with monkeypatch.context() as patch:

        def full(number):
            raise error

        patch.setattr("sliderspace.files.os.fsync", full)
        with pytest.raises((ValueError, KeyboardInterrupt)):
            run(Counted())
    assert not list(tmp_path.rglob("*.safetensors"))
    way = Counted()
    run(way)
    assert way.asked == [[0, 1, 2, 3], [4, 5]]


def late(x):
    """Pixels, the last ones backwards."""
    phi = pixel_encoder(4)(x)
    return torch.cat([phi[:, :40], phi[:, 40:].flip(1)], 1)


OTHERS = {  # what differs between two runs into one folder
    "another name of a way without a card": dict(way=Counted("other")),
    "another card": dict(way=Counted(card={"a": 2})),
    "other prompts": dict(prompts=["a", "b"]),
    "another seed": dict(seed=1),
    "another encoder": dict(encoders=[pixel_encoder(2)]),
    "one encoder more": dict(encoders=[pixel_encoder(4), pixel_encoder(2)]),
    "an encoder of the same name": dict(
        encoders=[looks("pixels-4", lambda x: 1 - pixel_encoder(4)(x))]
    ),
    "an encoder of another scale": dict(
        encoders=[looks("pixels-4", lambda x: 2 * pixel_encoder(4)(x))]
    ),
    "an encoder that differs late": dict(encoders=[looks("pixels-4", late)]),
}


@pytest.mark.parametrize("what", OTHERS)
def test_what_is_kept_is_not_taken_for_another(tmp_path, what):
    options = dict(
        way=Counted(), prompts=["a"], images=6, encoders=EYES, folder=tmp_path, progress=quiet
    )
    generator_features(**options)
    other = options | {"way": Counted()} | OTHERS[what]
    expected = generator_features(**other | {"folder": None})[0]
    other["way"].asked.clear()
    found = generator_features(**other)[0]
    assert other["way"].asked == [[0, 1, 2, 3], [4, 5]]
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def with_ones(model, space, **options):
    return slider_mixtures(model, space, "ones", ones, **options)


def in_range(model, space):
    return next(way for way in mixing_strategies(model, space) if "in range" in way.name)


CARDS = {  # what differs -> two ways of a model and a space, which make other images
    "steps": lambda m, s: (base_model(m), base_model(m, steps=2)),
    "steps of the model": lambda m, s: (base_model(m), base_model(replace(m, steps=2))),
    "guidance of the model": lambda m, s: (base_model(m), base_model(replace(m, guidance=3.0))),
    "words": lambda m, s: (rephrased_prompts(m, {"a": ["b"]}), rephrased_prompts(m, {"a": ["c"]})),
    "a leader": lambda m, s: (base_model(m), base_model(m.with_first_steps_from(m))),
    "steps of a leader": lambda m, s: (
        base_model(m.with_first_steps_from(m)),
        base_model(m.with_first_steps_from(m, 2)),
    ),
    "guidance of a leader": lambda m, s: (
        base_model(m.with_first_steps_from(m)),
        base_model(m.with_first_steps_from(replace(m, guidance=3.0))),
    ),
    "sliders": lambda m, s: (with_ones(m, s), with_ones(m, random_space(m, seed=1))),
    "mixes": lambda m, s: (with_ones(m, s, key="a"), with_ones(m, s, key="b")),
    "the start of sliders": lambda m, s: (with_ones(m, s), with_ones(m, s, start=0.5)),
    "where sliders were trained": lambda m, s: (
        with_ones(m, s),
        with_ones(m, replace(s, card=s.card | {"active_from": 0.5})),
    ),
    "usable ranges": lambda m, s: (in_range(m, s), in_range(m, replace(s, ranges=s.ranges / 10))),
}


@pytest.mark.parametrize("what", CARDS)
def test_ways_that_differ_have_other_cards(student, what):
    one, other = CARDS[what](student, random_space(student))
    assert one.card != other.card


def test_the_usable_range_of_every_slider_counts(student):
    space = random_space(student, [f"{i}" for i in range(16)])
    narrow = space.ranges.repeat(16, 1, 1)
    narrow[range(16), range(16)] /= 10
    cards = {str(in_range(student, replace(space, ranges=r)).card) for r in [space.ranges, *narrow]}
    assert len(cards) == 17


def test_equal_ways_have_equal_cards(student):
    space = random_space(student)
    for make_way in (
        partial(base_model, student),
        partial(slider_mixtures, student, space, key="a", mixes=ones),
        partial(rephrased_prompts, student, {"a": ["b"]}),
    ):
        assert (
            make_way(name="one").card == make_way(name="two", batch=3).card
        )  # whatever they are called


# --- what is refused -------------------------------------------------------------------------------------------------

FEW = torch.rand(3, 3, 8, 8, generator=torch.Generator().manual_seed(0))
BAD = {
    "two ways of one name": (
        dict(ways=[Counted(), Counted()]),
        "ways must have different names, not",
    ),
    "no way": (dict(ways=[]), "ways must have different names"),
    "an encoder of latents": (
        dict(encoders=[latent_encoder()]),
        "encoders must look at images, .*'latents' looks at latents",
    ),
    "an encoder of latents among others": (
        dict(encoders=[pixel_encoder(4), latent_encoder()]),
        "'latents' looks at latents",
    ),
    "two encoders of one name": (
        dict(encoders=[looks("a", average), looks("a", lambda x: -average(x))]),
        "encoders must have different names",
    ),
    "a single image": (dict(images=1), "images must be 2 or more, not 1"),
    "an empty prompt": (dict(prompts=["a", " "]), "prompt must be a non-empty text, not ' '"),
    "no prompt": (dict(prompts=[]), "prompt"),
    "an unknown encoder": (dict(encoders=["ViT-B-31"]), "open_clip knows no model 'ViT-B-31'"),
    "no encoder of another model": (
        dict(encoders=[None]),
        "encoder=None is only for the bundled model",
    ),
    "too few images for a reference": (
        dict(images=3, reference=Counted("reference")),
        "images must be",
    ),
    "a reference of too few images": (dict(reference=FEW), "reference must"),
    "a reference that is nothing": (dict(reference="pictures/"), "reference must"),
}


@pytest.mark.parametrize("what", BAD)
def test_bad_input_is_refused_before_any_image(what, monkeypatch):
    options, message = BAD[what]
    monkeypatch.setattr(Counted, "made", never)
    options = (
        dict(ways=[Counted()], prompts=["a"], images=8, encoders=EYES, progress=quiet) | options
    )
    if "reference" in options and isinstance(options["reference"], ImageGenerator):
        options["reference"] = Counted("reference")
    options["ways"] = [
        Counted(w.name) for w in options["ways"]
    ]  # made anew, so that they are the patched ones
    with pytest.raises(ValueError, match=message):
        compare_generators(**options)


def test_a_folder_that_cannot_be_written_is_refused_before_any_image(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setattr(Counted, "made", never)
    with pytest.raises(ValueError, match="cannot write into folder"):
        compare_generators(
            [Counted()], "a", 8, EYES, folder=tmp_path / "file" / "out", progress=quiet
        )


# --- figures ---------------------------------------------------------------------------------------------------------


def test_figures_are_those_of_sets(red):
    reference, prompts = Counted("reference", scale=0.5), ["red", "blue"]
    found = compare_generators(
        [Counted("a"), Counted("b", scale=0.9)], prompts, 12, [red], reference, progress=quiet
    )
    assert list(found.rows) == ["a", "b"] and found.images == 12
    x, groups = red(0.9 * Counted().made(prompts, range(12), 0)), torch.arange(12) % 2
    y, words = red(0.5 * Counted().made(prompts, range(12), 0)), red.text(prompts)[groups]
    vendi = sum(vendi_score(x[groups == g]) for g in (0, 1)) / 2
    precision, recall = precision_recall(x, y)
    expected = {
        "distance of pairs (red)": mean_pairwise_distance(x, groups, "cosine"),
        "Vendi score (red)": vendi,
        "text alignment (red)": clip_score(x, words),
        "Frechet distance (red)": frechet_distance(x, y),
        "kernel distance (red)": kernel_inception_distance(x, y)[0],
        "MMD (red)": cmmd(x, y),
        "precision (red)": precision,
        "recall (red)": recall,
    }
    assert found["b"].keys() == expected.keys()
    for name, figure in expected.items():
        got = found["b"][name]
        assert type(got) is type(figure)
        assert getattr(got, "value", got) == pytest.approx(
            getattr(figure, "value", figure), rel=1e-4, abs=1e-6
        ), name


def test_a_way_is_no_distance_from_itself():
    found = compare_generators([Counted()], "a", 8, EYES, Counted("reference"), progress=quiet)[
        "way"
    ]
    assert found["Frechet distance (pixels-4)"] == pytest.approx(0, abs=1e-5)
    assert found["MMD (pixels-4)"] == pytest.approx(0, abs=1e-9)
    assert found["precision (pixels-4)"] == found["recall (pixels-4)"] == 1


def test_prompts_of_a_single_image_have_no_diversity(red):
    found = compare_generators([Counted()], ["a", "b", "c"], 4, [red], progress=quiet)
    assert list(found["way"]) == ["text alignment (red)"]


def test_references_are_ways_tensors_or_pictures(tmp_path):
    images = Counted().made(["a"], range(6), 0).mul(255).byte()
    for i, image in enumerate(images):
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(tmp_path / f"{i}.png")
    features = reference_features(load_image_folder(tmp_path, "a"), EYES, (8, 8))
    assert_close(features["pixels-4"], reference_features(images / 255, EYES)["pixels-4"])
    x = pixel_encoder(4)(Counted().made(["a"], range(8), 0))
    read = load_image_folder(tmp_path, "a")
    for reference, y in (
        (read, reference_features(read, EYES)["pixels-4"]),
        (images / 255, features["pixels-4"]),
        (Counted("reference"), x),
    ):
        found = compare_generators([Counted()], "a", 8, EYES, reference, progress=quiet)["way"][
            "MMD (pixels-4)"
        ]
        assert found == pytest.approx(cmmd(x, y), rel=1e-4, abs=1e-9)


def test_photographs_of_a_reference_are_cut_and_not_padded(tmp_path):
    for i in range(2):
        wide = Image.new("RGB", (48, 16), (i, i, i))
        wide.paste((200, 200, 200), (12, 0, 36, 16))  # the middle is all that is seen
        wide.save(tmp_path / f"{i}.png")
    seen = reference_features(load_image_folder(tmp_path, "a"), EYES, (8, 8))["pixels-4"]
    assert_close(seen, reference_features(torch.full((2, 3, 8, 8), 200 / 255), EYES)["pixels-4"])


def test_a_reference_is_kept_too(tmp_path):
    reference = Counted("reference")
    for _ in range(2):
        compare_generators([Counted()], "a", 8, EYES, reference, folder=tmp_path, progress=quiet)
    assert reference.asked == [[0, 1, 2, 3], [4, 5, 6, 7]]


def test_images_of_a_reference_are_looked_at_once(tmp_path):
    images, seen = Counted().made(["a"], range(6), 0), []

    def eye(x):
        if x.shape[-1] == 8:  # and not the probe that tells encoders apart
            seen.append(len(x))
        return pixel_encoder(4)(x)

    encoders = [looks("eye", eye)]
    run = partial(
        compare_generators,
        [Counted()],
        images=8,
        encoders=encoders,
        folder=tmp_path,
        progress=quiet,
    )
    for prompt, new in (
        ("a", [4, 2, 4, 4]),
        ("a", []),
        ("b", [4, 4]),
    ):  # the reference is of no prompt
        seen.clear()
        run(prompts=prompt, reference=images)
        assert seen == new
    other = reference_features(images.flip(2), encoders, folder=tmp_path, progress=quiet)["eye"]
    assert torch.equal(other, pixel_encoder(4)(images.flip(2)))  # and others are not taken for it


def test_the_bundled_encoder_sees_the_bundled_models_ways(student):
    more = slider_mixtures(
        student, random_space(student), "mixed", lambda numbers: 0.3 * ones(numbers)
    )
    found = compare_generators(
        [base_model(student), more], PROMPT, 8, model=student, n_kept_images=2, progress=quiet
    )
    eye = get_encoder(None, student)
    x = eye(base_model(student).generate([PROMPT], range(8), 0))
    expected = mean_pairwise_distance(x, metric="cosine")
    assert found["unchanged"]["distance of pairs (portraits-clip)"].value == pytest.approx(
        expected.value, rel=1e-4
    )
    expected = clip_score(x, eye.text([PROMPT]).expand(8, -1))
    assert found["unchanged"]["text alignment (portraits-clip)"].value == pytest.approx(
        expected.value, rel=1e-4
    )
    assert found["mixed"] != found["unchanged"] and found.pictures["mixed"].shape == (2, 3, 64, 64)


# --- as text ---------------------------------------------------------------------------------------------------------

EVIL = '<script>alert(1)</script>&"'


@pytest.fixture
def compared():
    rows = {
        EVIL: {"far (a)": ConfidenceInterval(1.23456, 1.0, 2.0), "<b>": 0.5},
        "$x_1": {"far (a)": ConfidenceInterval(3.0, 2.5, 3.5)},
    }
    return Comparison(rows, {}, 12, ["a", "b"])


def test_the_table_has_a_row_a_way_and_a_column_a_figure(compared):
    assert compared.table() == [
        ["", "far (a)", "<b>"],
        [EVIL, "1.235 [1, 2]", "0.5"],
        ["$x_1", "3 [2.5, 3.5]", ""],
    ]
    assert repr(compared) == f"Comparison({EVIL}, $x_1: 12 images each)"


def test_names_in_the_table_are_text(compared):
    class Text(HTMLParser):
        tags, data = [], []

        def handle_starttag(self, tag, attributes):
            self.tags.append((tag, attributes))

        def handle_data(self, text):
            self.data.append(text)

    page = Text()
    page.feed(compared._repr_html_())
    assert {tag for tag, _ in page.tags} == {"p", "table", "tr", "th", "td"} and not any(
        a for _, a in page.tags
    )
    assert EVIL in "".join(page.data) and "<b>" in "".join(page.data)
    assert len([tag for tag, _ in page.tags if tag == "td"]) == 2 * 3


def test_ways_are_drawn_as_points(compared):
    compared["$x_1"]["<b>"] = 0.7
    axes = plot_comparison(compared, "<b>", "far (a)").axes[0]
    points = [line.get_xydata().tolist() for line in axes.lines]
    assert [p for p in points if len(p) == 1] == [[[0.5, 1.23456]], [[0.7, 3.0]]]
    assert [t.get_text() for t in axes.texts] == [EVIL, r"\$x_1"] and axes.get_ylabel() == "far (a)"
    with pytest.raises(KeyError, match="near"):
        plot_comparison(compared, "near", "far (a)")


def test_figures_of_any_name_can_be_drawn(compared):
    rows = {"a": {"$x^{ (a)": 1.0, r"\\frac{$1$}": 2.0}}
    assert to_png(plot_comparison(replace(compared, rows=rows), *rows["a"]))[:4] == b"\x89PNG"


def test_few_images_of_many_prompts_can_be_drawn(red):
    found = compare_generators([Counted()], [f"{i}" for i in range(20)], 40, [red], progress=quiet)
    assert plot_comparison(found, "text alignment (red)", "distance of pairs (red)").axes


# --- what was lost and came back -------------------------------------------------------------------------------------


def test_what_came_back_is_a_share_of_what_was_lost():
    values = {
        "unchanged": 0.2,
        "the other model": 0.6,
        "mixed": 0.5,
        "none": 0.2,
        "all": 0.6,
        "worse": 0.1,
        "more": 0.8,
    }
    rows = {way: {"far": ConfidenceInterval(v, 0, 1), "plain": v} for way, v in values.items()}
    for measure in ("far", "plain"):
        found = recovered_fraction(Comparison(rows, {}, 9, ["a"]), measure)
        assert found == pytest.approx(
            {"mixed": 0.75, "none": 0, "all": 1, "worse": -0.25, "more": 1.5}
        )
    falls = Comparison(
        {way: {"near": 1 - v} for way, v in values.items()}, {}, 9, ["a"]
    )  # of what should be small
    assert recovered_fraction(falls, "near")["mixed"] == pytest.approx(0.75)
    assert recovered_fraction(falls, "near", "none", "all")["unchanged"] == pytest.approx(0)


def test_where_nothing_was_lost_nothing_comes_back():
    same = Comparison(
        {way: {"far": 0.5} for way in ("unchanged", "the other model", "mixed")}, {}, 9, ["a"]
    )
    with pytest.raises(
        ValueError, match="'unchanged' and 'the other model' have the same far: nothing was lost"
    ):
        recovered_fraction(same, "far")
    for options in (("near",), ("far", "nobody"), ("far", "unchanged", "nobody")):
        with pytest.raises(KeyError):
            recovered_fraction(same, *options)


def test_rivals_are_the_model_the_other_its_first_step_and_guidances(tiny, tiny_of):
    other = tiny_of("epsilon", 1)
    found = baselines(tiny, other, (2.0, 4.0), steps=2)
    assert [w.name for w in found] == [
        "unchanged",
        "the other model",
        "its first step",
        "guidance 2",
        "guidance 4",
    ]
    expected = [
        base_model(tiny, steps=2),
        base_model(other),
        base_model(tiny.with_first_steps_from(other), steps=2),
        base_model(tiny, steps=2, guidance=2.0),
        base_model(tiny, steps=2, guidance=4.0),
    ]
    for way, same in zip(found[1:], expected[1:]):
        assert torch.equal(way.generate([PROMPT], [0], 0), same.generate([PROMPT], [0], 0))
