"""The slider board follows its controls, survives what goes wrong, and leaves the model as it was."""

import threading
from io import BytesIO

import pytest
import torch
from PIL import Image
from torchvision.transforms.functional import pil_to_tensor, to_pil_image

from sliderspace import widgets
from sliderspace.sampling import pictures, start_noise
from sliderspace.sliders import SliderSpace, detach
from sliderspace.widgets import board
from tiny import random_space

STEPS = 3
PROMPT = "portrait of a person"


@pytest.fixture
def space(model):
    return random_space(model, ["glasses", "hair"])


@pytest.fixture
def shown(model, space):
    shown = board(model, space, steps=STEPS)
    yield shown
    shown.close()
    shown.wait(60)


@pytest.fixture
def runs(monkeypatch):
    """Prompt of every run of the sampler that the boards begin, and the number of steps it got to."""
    runs, sample = [], widgets.sample

    def counted(model, prompt, *args, on_step):
        run = [prompt, 0]
        runs.append(run)

        def count(step):
            run[1] += 1
            on_step(step)

        return sample(model, prompt, *args, on_step=count)

    monkeypatch.setattr(widgets, "sample", counted)
    return runs


def moved(shown, mix):
    """The picture at a mix."""
    shown.mix = mix
    shown.wait(60)
    assert shown.status.value == "ready"
    return shown.image.value


def pixels(png):
    return pil_to_tensor(Image.open(BytesIO(png)))


def expected(model, space, mix, start=0.0, prompt=PROMPT, seed=0):
    """What the board should show, made without it: the pixels, each one enlarged."""
    with space.on(model, mix, start=start):
        picture = to_pil_image(pictures(model, prompt, 1, seed, STEPS)[0])
    zoom = 256 // picture.width
    return pil_to_tensor(picture).repeat_interleave(zoom, 1).repeat_interleave(zoom, 2)


def test_shows_the_picture_of_its_controls(model, space, shown):
    assert torch.equal(pixels(shown.image.value), expected(model, space, {}))
    mix = {"glasses": 1.5, "hair": -0.5}
    assert torch.equal(pixels(moved(shown, mix)), expected(model, space, mix))
    assert shown.mix == mix
    assert torch.equal(pixels(shown.base.value), expected(model, space, {}))
    shown.start.value = 0.4
    shown.wait(60)
    assert torch.equal(pixels(shown.image.value), expected(model, space, mix, start=0.4))
    shown.prompt.value = "portrait of a person, hat"
    shown.seed.value = 5
    shown.wait(60)
    others = {"prompt": "portrait of a person, hat", "seed": 5}
    assert torch.equal(pixels(shown.image.value), expected(model, space, mix, start=0.4, **others))
    assert torch.equal(pixels(shown.base.value), expected(model, space, {}, **others))


def test_the_latest_of_many_moves_wins(shown, runs):
    positions = [round(-2 + 0.1 * i, 1) for i in range(41) if i != 20]
    for position in positions:
        shown.sliders[0].value = position
    shown.wait(60)
    assert shown.status.value == "ready"
    assert shown.mix == {"glasses": 2.0}
    assert 1 <= len(runs) < len(positions) / 2
    last = shown.image.value
    shown._made.clear()
    shown.reset()
    assert moved(shown, {"glasses": 2.0}) == last != shown.base.value


@pytest.mark.parametrize("patience, steps", [(0, 1), (60, STEPS)])
def test_an_unwanted_picture_is_given_up_unless_it_is_nearly_there(shown, runs, monkeypatch, patience, steps):
    monkeypatch.setattr(widgets, "PATIENCE", patience)
    begun, go_on, sample = threading.Event(), threading.Event(), widgets.sample

    def held(*args, on_step):
        def wait(step):
            begun.set()
            assert go_on.wait(60)
            on_step(step)

        return sample(*args, on_step=wait)

    monkeypatch.setattr(widgets, "sample", held)
    shown.sliders[0].value = 1.0
    assert begun.wait(60)
    shown.sliders[0].value = 2.0
    go_on.set()
    shown.wait(60)
    assert [run[1] for run in runs] == [steps, STEPS]
    assert shown.status.value == "ready"


def test_moving_does_not_wait_for_the_model(shown, monkeypatch):
    go_on, sample = threading.Event(), widgets.sample

    def held(*args, **options):
        assert go_on.wait(60)
        return sample(*args, **options)

    monkeypatch.setattr(widgets, "sample", held)
    shown.sliders[0].value = 1.0
    with pytest.raises(TimeoutError, match="timeout=0.2"):
        shown.wait(0.2)
    assert shown.status.value == "busy"
    go_on.set()
    shown.wait(60)
    assert shown.status.value == "ready"


def test_reset_brings_the_base_picture_back(shown):
    base = shown.image.value
    assert base == shown.base.value
    assert moved(shown, {"glasses": 2.0, "hair": -2.0}) != base
    shown._made.clear()  # so that it is made again
    shown.reset()
    shown.wait(60)
    assert shown.image.value == shown.base.value == base
    assert shown.mix == {}


def test_pictures_seen_before_are_kept(shown, runs):
    first = moved(shown, {"glasses": 1.0})
    moved(shown, {})
    assert moved(shown, {"glasses": 1.0}) == first
    assert len(runs) == 1


@pytest.mark.parametrize("prompt", ["", "  "])
def test_an_error_is_shown_and_the_board_lives_on(shown, prompt):
    shown.prompt.value = prompt
    shown.wait(60)
    assert "prompt must be a non-empty text" in shown.status.value
    shown.prompt.value = PROMPT
    shown.wait(60)
    assert shown.status.value == "ready"
    assert moved(shown, {"glasses": 1.0}) != shown.base.value


def test_any_exception_is_shown_as_text(model, shown, monkeypatch):
    def broken(*args, **options):
        raise RuntimeError("<b>no</b>")

    monkeypatch.setattr(widgets, "sample", broken)
    shown.sliders[1].value = 1.0
    shown.wait(60)
    assert shown.status.value == "RuntimeError: <b>no</b>"
    assert shown.status._view_name == "LabelView" and not shown.status.description_allow_html
    monkeypatch.undo()
    assert moved(shown, {"hair": 1.5}) != shown.base.value


def test_labels_are_text(model):
    shown = board(model, random_space(model, ["<img src=x onerror=alert(1)>"]), steps=1)
    assert [slider.description for slider in shown.sliders] == ["<img src=x onerror=alert(1)>"]
    assert not any(slider.description_allow_html for slider in shown.sliders)
    shown.close()


def test_sliders_reach_both_sides_and_zero(model, space):
    ranges = torch.tensor([[-1.33, 0.0], [0.0, 1.7]])
    one_sided = SliderSpace(space.down, space.up, space.labels, ranges, card=space.card)
    shown = board(model, one_sided, steps=1)
    assert [(slider.min, slider.max) for slider in shown.sliders] == [(-1.3, 0.5), (-0.5, 1.7)]
    shown.close()


def test_close_stops_the_thread(model, space, runs):
    shown = board(model, space, steps=STEPS)
    shown.sliders[0].value = 1.0
    shown.close()
    shown.wait(60)
    begun = len(runs)
    shown.sliders[0].value = 2.0
    shown.wait(60)
    assert len(runs) == begun
    assert not [thread for thread in threading.enumerate() if thread.name == "slider board"]
    assert shown.comm is None and shown.image.comm is None


def test_boards_on_one_model_do_not_mix(model):
    spaces = [random_space(model, ["glasses", "hair"], seed=seed) for seed in (0, 1)]
    boards = [board(model, spaces[i], steps=STEPS) for i in (0, 1, 0)]  # two of one space, one of another
    mixes = [{"glasses": 1.5}, {"glasses": 1.5}, {"hair": -1.5}]
    for shown, mix in zip(boards, mixes, strict=True):
        shown.mix = mix
    for shown in boards:
        shown.wait(60)
    for shown, mix in zip(boards, mixes, strict=True):
        assert shown.status.value == "ready"
        assert torch.equal(pixels(shown.image.value), expected(model, shown.space, mix))
        assert torch.equal(pixels(shown.base.value), expected(model, shown.space, {}))
        shown.close()


def test_bad_input_is_refused_before_a_board_appears(model, space, runs):
    fingerprint = model.fingerprint(list(space.down)) | {"weights": {}}
    other = {"model": "another", "fingerprint": fingerprint, "prompts": [PROMPT]}
    with pytest.raises(ValueError, match="prompt must be a non-empty text, not ' '"):
        board(model, space, prompt=" ")
    with pytest.raises(ValueError, match="prompt must be a non-empty text, not None"):
        board(model, SliderSpace(space.down, space.up, space.labels, space.ranges, card={}))
    with pytest.raises(ValueError, match="steps must be 1 or more, not 0"):
        board(model, space, steps=0)
    with pytest.raises(ValueError, match="made for the weights of 'another'"):
        board(model, SliderSpace(space.down, space.up, space.labels, space.ranges, card=other))
    assert not runs


def test_setting_an_unknown_slider_changes_nothing(shown):
    with pytest.raises(KeyError, match="no slider 'ears'"):
        shown.mix = {"glasses": 1.0, "ears": 1.0}
    assert shown.mix == {}


def test_the_model_is_its_own_again_afterwards(model, space, shown):
    noise = start_noise(model, 0, [0])
    before = model.predict(noise, 500, PROMPT)[0]
    moved(shown, {"glasses": 2.0})
    assert torch.equal(model.predict(noise, 500, PROMPT)[0], before)
    shown.close()
    assert not hasattr(model.denoiser, "peft_config")


def test_close_leaves_sliders_that_are_on_and_those_of_others(model, space):
    other = random_space(model, ["age"], seed=1)
    shown = board(model, space, steps=1)
    with space.on(model, {"hair": 1.0}):
        with pytest.raises(ValueError, match="leave the `with space.on"):
            board(model, space, steps=1)
        shown.close()
        assert hasattr(model.denoiser, "peft_config")
    shown = board(model, space, steps=1)
    other.attach(model)
    shown.close()
    assert other.attach(model).here
    detach(model, only=space)
    assert hasattr(model.denoiser, "peft_config")
    detach(model, only=other)
    assert not hasattr(model.denoiser, "peft_config")
