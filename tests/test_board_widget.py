"""The slider board follows its controls, survives what goes wrong, and leaves the model as it was."""

import gc
import json
import threading
import time
import weakref
from io import BytesIO

import pytest
import torch
from diffusers import EulerAncestralDiscreteScheduler
from PIL import Image
from safetensors.torch import load_file
from tiny import quiet, random_space
from torchvision.transforms.functional import pil_to_tensor, to_pil_image

from sliderspace.viz import renderer as painting
from sliderspace import load
from sliderspace.viz.renderer import thumbnail
from sliderspace.sampling.generate import generate_images, initial_noise
from sliderspace.sliders.space import SliderSpace, detach
from sliderspace.viz.board_widget import board

STEPS = 3
PROMPT = "portrait of a person"


@pytest.fixture
def space(model):
    return random_space(model, ["glasses", "hair"])


@pytest.fixture
def shown(model, space):
    shown = board(model, space, steps=STEPS, thumbnails=False)
    yield shown
    shown.close()
    shown.wait(60)


@pytest.fixture
def runs(monkeypatch):
    """Prompt of every run of the sampler that the boards begin, and the number of steps it got to."""
    runs, sample = [], painting.sample

    def counted(model, prompt, *args, on_step):
        run = [prompt, 0]
        runs.append(run)

        def count(step):
            run[1] += 1
            on_step(step)

        return sample(model, prompt, *args, on_step=count)

    monkeypatch.setattr(painting, "sample", counted)
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
        picture = to_pil_image(generate_images(model, prompt, 1, seed, STEPS)[0])
    zoom = 256 // picture.width
    return pil_to_tensor(picture).repeat_interleave(zoom, 1).repeat_interleave(zoom, 2)


def test_shows_the_picture_of_its_controls(model, space, shown):
    assert torch.equal(pixels(shown.image.value), expected(model, space, {}))
    mix = {"glasses": 1.5, "hair": -0.5}
    assert torch.equal(pixels(moved(shown, mix)), expected(model, space, mix))
    assert shown.mix == mix
    assert torch.equal(pixels(shown.base.value), expected(model, space, {}))
    shown.window.value = 0.4, 1.0
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
    shown._painter.made.clear()
    shown.reset()
    assert moved(shown, {"glasses": 2.0}) == last != shown.base.value


@pytest.mark.parametrize("patience, steps", [(0, 1), (60, STEPS)])
def test_an_unwanted_picture_is_given_up_unless_it_is_nearly_there(
    shown, runs, monkeypatch, patience, steps
):
    monkeypatch.setattr(painting, "PATIENCE_SECONDS", patience)
    begun, go_on, sample = threading.Event(), threading.Event(), painting.sample

    def held(*args, on_step):
        def wait(step):
            begun.set()
            assert go_on.wait(60)
            on_step(step)

        return sample(*args, on_step=wait)

    monkeypatch.setattr(painting, "sample", held)
    shown.sliders[0].value = 1.0
    assert begun.wait(60)
    shown.sliders[0].value = 2.0
    go_on.set()
    shown.wait(60)
    assert [run[1] for run in runs] == [steps, STEPS]
    assert shown.status.value == "ready"


def test_moving_does_not_wait_for_the_model(shown, monkeypatch):
    go_on, sample = threading.Event(), painting.sample

    def held(*args, **options):
        assert go_on.wait(60)
        return sample(*args, **options)

    monkeypatch.setattr(painting, "sample", held)
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
    shown._painter.made.clear()  # so that it is made again
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

    monkeypatch.setattr(painting, "sample", broken)
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
    shown = board(model, space, steps=STEPS, thumbnails=False)
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
    boards = [
        board(model, spaces[i], steps=STEPS) for i in (0, 1, 0)
    ]  # two of one space, one of another
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
    noise = initial_noise(model, 0, [0])
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
    assert other.attach(model).is_attached
    detach(model, space=space)
    assert hasattr(model.denoiser, "peft_config")
    detach(model, space=other)
    assert not hasattr(model.denoiser, "peft_config")


# --- what is on the board --------------------------------------------------------------------------------------------


def test_several_pictures_side_by_side(model, space):
    shown = board(model, space, steps=STEPS, images=3, seed=4, thumbnails=False)
    shown.mix = {"hair": 1.0}
    shown.wait(60)
    with space.on(model, {"hair": 1.0}):
        each = [to_pil_image(x) for x in generate_images(model, PROMPT, 3, 4, STEPS)]
    row = torch.cat([pil_to_tensor(x) for x in each], 2)
    zoom = 256 // each[0].width
    assert torch.equal(
        pixels(shown.image.value), row.repeat_interleave(zoom, 1).repeat_interleave(zoom, 2)
    )
    shown.close()


def test_steps_and_guidance_and_the_end_of_the_window_count(model, space, shown):
    moved(shown, {"glasses": 2.0})
    seen = {shown.image.value}
    for name, value in (("steps", 5), ("guidance", 3.0), ("window", (0.0, 0.5))):
        getattr(shown, name).value = value
        shown.wait(60)
        assert shown.status.value == "ready"
        seen.add(shown.image.value)
    assert len(seen) == 4
    with space.on(model, {"glasses": 2.0}, 0.0, 0.5):
        last = to_pil_image(generate_images(model, PROMPT, 1, 0, 5, 3.0)[0])
    assert torch.equal(
        pixels(shown.image.value)[:, :: 256 // last.width, :: 256 // last.width],
        pil_to_tensor(last),
    )


def test_undo_goes_back_through_pictures_that_were_seen(shown):
    trail = [shown.position]
    for mix in ({"glasses": 1.0}, {"glasses": 1.0, "hair": -1.0}, {}):
        moved(shown, mix)
        trail.append(shown.position)
    for expected_position in reversed(trail[:-1]):
        shown.undo()
        shown.wait(60)
        assert shown.position == expected_position
    shown.undo()  # there is nothing before the first
    shown.wait(60)
    assert shown.position == trail[0]


def test_a_surprise_is_a_sparse_mix_within_the_ranges(model):
    space = random_space(model, list("abcdef"))
    space.ranges[:] = torch.tensor([-0.5, 1.5])
    shown = board(model, space, steps=1, thumbnails=False)
    seen = set()
    for _ in range(5):
        shown.randomize()
        assert len(shown.mix) <= 3 and all(-0.5 <= s <= 1.5 for s in shown.mix.values())
        seen.add(tuple(shown.mix.items()))
    assert len(seen) == 5
    shown.close()


def test_a_preset_brings_everything_back(model, space, tmp_path):
    shown = board(model, space, steps=STEPS, thumbnails=False, folder=tmp_path / "kept")
    shown.seed.value, shown.window.value, shown.name.value = 3, (0.25, 1.0), "mine"
    picture, here = moved(shown, {"glasses": -1.2}), shown.position
    path = shown.save()
    assert json.loads(path.read_text())["mix"] == {"glasses": -1.2} and shown.presets.options == (
        "",
        "mine",
    )
    shown.close()
    again = board(model, space, steps=1, thumbnails=False, folder=tmp_path / "kept")
    again.presets.value = "mine"
    again.wait(60)
    assert again.position == here and again.image.value == picture
    again.close()


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"mix": 3}', '{"mix": {"glasses": "x"}}'])
def test_a_file_that_is_no_preset_is_said_and_changes_nothing(model, space, tmp_path, text):
    (tmp_path / "bad.json").write_text(text)
    shown = board(model, space, steps=1, thumbnails=False, folder=tmp_path)
    here = shown.position
    shown.presets.value = "bad"
    shown.wait(60)
    assert "bad.json" in shown.status.value and shown.position == here
    shown.close()


@pytest.mark.parametrize("name", ["", "../x", "a/b", "x" * 81, "<b>"])
def test_a_name_that_is_no_file_name_is_refused(model, space, tmp_path, name):
    shown = board(model, space, steps=1, thumbnails=False, folder=tmp_path / "kept")
    shown.name.value = name
    with pytest.raises(ValueError, match="save as must be letters"):
        shown.save()
    assert not (tmp_path / "kept").exists()
    shown.close()


def test_the_mix_as_a_lora_and_as_code(model, space, tmp_path):
    shown = board(model, space, steps=STEPS, thumbnails=False, folder=tmp_path)
    moved(shown, {"hair": 1.5})
    path = shown.save_lora()
    assert (
        load_file(path).keys()
        == load_file(space.export(tmp_path / "other", {"hair": 1.5})[0]).keys()
    )
    made = {}
    code = shown.code.value.replace("images = ", "made['images'] = ")
    assert compile(code, "board", "exec") and code.startswith("with space.on(model, {'hair': 1.5}")
    with space.on(model, {"hair": 1.5}, start=0, stop=1):
        made["images"] = generate_images(model, PROMPT, 1, seed=0, steps=STEPS, guidance=1)
    assert torch.equal(
        pixels(shown.image.value)[:, ::4, ::4], pil_to_tensor(to_pil_image(made["images"][0]))
    )
    shown.close()


# --- rows ------------------------------------------------------------------------------------------------------------


def listed(shown):
    return [row.slider.description for row in shown._list.children]


def test_rows_are_ordered_found_pinned_and_hidden(model):
    rows = [
        dict(direction=i, alignment=a, effect=e)
        for i, a, e in ((2, 0.1, 3), (0, 0.3, 1), (1, 0.2, 2))
    ]
    shown = board(
        model,
        random_space(model, ["b", "c", "a"], card={"sliders": rows}),
        steps=1,
        thumbnails=False,
    )
    orders = {
        "singular value": ["c", "a", "b"],
        "alignment": ["c", "a", "b"],
        "effect": ["b", "a", "c"],
        "name": ["a", "b", "c"],
    }
    for order, labels in orders.items():
        shown.order.value = order
        assert listed(shown) == labels
    shown.rows[1].pin.value = True
    assert listed(shown) == ["c", "a", "b"]
    shown.rows[2].hide.value = True
    assert listed(shown) == ["c", "b"]
    shown.find.value = "B"
    assert listed(shown) == ["b"]
    shown.find.value, shown.hidden.value = "", True
    assert listed(shown) == ["c", "a", "b"]
    shown.mix = {"a": 1.0}  # whatever is shown, all sliders are there
    assert shown.mix == {"a": 1.0}
    shown.close()


def test_names_and_notes_are_edited_and_kept_in_the_file(model, space, tmp_path):
    shown = board(model, space, steps=1, thumbnails=False, file=tmp_path / "a.safetensors")
    shown.edit.value = True
    name, note = shown.rows[0].fields.children
    name.value = "<script>alert(1)</script>"
    note.value = "spectacles"
    again = SliderSpace.load(tmp_path / "a.safetensors", model)
    assert (
        again.labels == ["<script>alert(1)</script>", "hair"]
        and again.card["sliders"][0]["note"] == "spectacles"
    )
    assert shown.rows[0].slider.description == "<script>alert(1)</script>"
    assert not shown.rows[0].slider.description_allow_html
    shown.mix = {"<script>alert(1)</script>": 1.0}
    shown.find.value = "spectacles"
    assert listed(shown) == ["<script>alert(1)</script>"]
    name.value = "hair"
    assert (
        "another slider has the label 'hair'" in shown.status.value
        and shown.space.labels == again.labels
    )
    shown.close()
    reopened = board(model, again, steps=1, thumbnails=False)
    assert reopened.rows[0].note_text == "spectacles"
    reopened.close()


def test_ends_are_pictures_of_each_slider_alone(model, space):
    shown = board(model, space, steps=STEPS)
    thread = shown._newest.thread
    if thread is not None:
        thread.join(60)
    with space.on(model, {"hair": 2.0}):
        whole = to_pil_image(generate_images(model, PROMPT, 1, 0, STEPS)[0])
    low, high = (pixels(picture.value).int() for picture in (shown.rows[1].low, shown.rows[1].high))
    expected_end = pixels(thumbnail(pil_to_tensor(whole) / 255, 72)).int()
    assert (
        (high - expected_end).abs().max() <= 2 < (low - expected_end).abs().max()
    )  # made in one batch with others
    shown.close()


def test_ends_come_from_a_report_without_sampling(model, space, runs):
    from sliderspace.evaluation.search import measure_concepts

    report = measure_concepts(
        model, space, samples=2, reference=8, progress=quiet, strengths=(-2.0, -1.0, 0.0, 1.0, 2.0)
    )
    shown = board(model, report.space, steps=STEPS, report=report)
    thread = shown._newest.thread
    if thread is not None:
        thread.join(60)
    assert all(row.low.value and row.high.value for row in shown.rows) and len(runs) == 1
    shown.close()
    with pytest.raises(ValueError, match="the report is of other sliders"):
        board(
            model, random_space(model, ["glasses", "hair"], seed=9), report=report
        )  # the same names


def test_new_names_leave_presets_thumbnails_and_code_with_their_sliders(model, space, tmp_path):
    shown = board(model, space, steps=1, thumbnails=False, folder=tmp_path)
    picture = moved(shown, {"glasses": 1.0})
    shown.name.value = "kept"
    shown.save()
    shown.edit.value = True
    first, second = (row.fields.children[0] for row in shown.rows)
    first.value, second.value = "x", "glasses"  # the second slider has the first one's name now
    first.value = "hair"
    assert shown.space.labels == ["hair", "glasses"] and space.labels == ["glasses", "hair"]
    moved(shown, {})
    shown.load("kept")
    shown.wait(60)
    assert shown.image.value == picture and shown.mix == {"hair": 1.0}
    assert (
        "space.on(model, {0: 1.0}" in shown.code.value
    )  # in the user's own space it has another name
    shown.close()
    other = board(
        model,
        random_space(model, ["glasses", "hair"], seed=9),
        steps=1,
        thumbnails=False,
        folder=tmp_path,
    )
    with pytest.raises(ValueError, match="of other sliders"):
        other.load("kept")
    other.close()


@pytest.mark.parametrize(
    "change", [{"window": [0.9, 0.1]}, {"window": [0.5]}, {"strengths": [float("nan"), 0]}]
)
def test_a_half_good_preset_changes_nothing(shown, tmp_path, change):
    shown.folder = tmp_path
    path = shown.save()
    here = shown.position
    path.write_text(json.dumps(json.loads(path.read_text()) | {"seed": 5} | change))
    with pytest.raises(ValueError, match="is no preset"):
        shown.load("mix")
    assert shown.position == here


def test_a_file_of_other_sliders_is_not_overwritten(model, space, tmp_path):
    space.save(tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match="holds other sliders"):
        board(model, space.subset([0]), file=tmp_path / "a.safetensors")


def test_undo_at_the_first_picture_loses_nothing(shown):
    shown.undo()
    moved(shown, {"glasses": 1.0})
    shown.undo()
    shown.wait(60)
    assert shown.mix == {}


def test_work_that_fails_does_not_end_the_worker(capsys):
    done = []

    def work(n):
        time.sleep(0.1)
        if n == 1:
            raise RuntimeError("no")
        done.append(n)

    newest = painting.LatestOnlyWorker(work)
    for n in (1, 2):
        newest.ask(n)
        time.sleep(0.05)
    newest.wait(10)
    newest.ask(3)
    newest.wait(10)
    assert done == [2, 3] and "RuntimeError: no" in capsys.readouterr().err


def test_another_scheduler_is_another_picture(tiny):
    shown = board(tiny, random_space(tiny), PROMPT, steps=2, thumbnails=False)
    before, scheduler = shown.base.value, tiny.pipe.scheduler
    try:
        tiny.pipe.scheduler = EulerAncestralDiscreteScheduler.from_config(scheduler.config)
        moved(shown, {"hair": 1.0})
        shown.reset()
        shown.wait(60)
        assert shown.base.value == shown.image.value != before
    finally:
        tiny.pipe.scheduler = scheduler
        shown.close()


# --- speed and memory ------------------------------------------------------------------------------------------------


def test_a_drag_is_a_few_pictures(shown, runs):
    for i in range(1, 21):
        shown.sliders[0].value = round(0.1 * i, 1)
        time.sleep(0.02)
    shown.wait(60)
    assert shown.mix == {"glasses": 2.0} and len(runs) <= 3


def test_a_first_move_does_not_wait_and_a_long_drag_is_not_left_alone():
    done, began = [], time.monotonic()
    newest = painting.LatestOnlyWorker(
        lambda n: done.append((n, time.monotonic() - began)), settle=0.2, longest=0.5
    )
    newest.ask(0)
    newest.wait(10)
    assert done[0][0] == 0 and done[0][1] < 0.15
    for n in range(1, 21):
        newest.ask(n)
        time.sleep(0.05)
    newest.wait(10)
    assert done[-1][0] == 20 and 3 <= len(done) <= 5


def test_a_slow_picture_is_preceded_by_its_estimate(shown, monkeypatch):
    monkeypatch.setattr(painting, "PATIENCE_SECONDS", 0)
    seen = []
    shown.image.observe(lambda change: seen.append(change["new"]), "value")
    moved(shown, {"glasses": 2.0})
    assert len(seen) == 2 and seen[0] != seen[1] == shown.image.value


def test_a_closed_board_lets_go_of_the_model(tiny_folder):
    model = load(tiny_folder("epsilon"), device="cpu", steps=2)
    shown = board(model, random_space(model), PROMPT)
    shown.edit.value = True
    shown.edit.value = False
    gone = weakref.ref(model)
    shown.close()
    shown.wait(60)
    shown.close()  # again: nothing happens
    del model
    gc.collect()
    assert gone() is None


@pytest.mark.parametrize("images", [0, 17, 1.5])
def test_a_board_has_room_for_some_pictures(model, space, images):
    with pytest.raises(ValueError, match="images must be 1 to 16"):
        board(model, space, images=images)
