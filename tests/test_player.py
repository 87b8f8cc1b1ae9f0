"""A player shows what the sampler makes at every position, without kernel or network; a gallery is many of them."""

import json
import sys
from base64 import b64decode
from dataclasses import replace
from datetime import datetime
from io import BytesIO

import nbformat
import numpy as np
import pytest
import torch
from PIL import Image
from playwright.sync_api import expect
from test_browser import chromium, jupyterlab, run_all_cells, screenshot
from test_report import EVIL, Page
from tiny import PROMPT, never, quiet, random_directions, random_space

from sliderspace.viz import gallery as pages
from sliderspace.viz import player as players
from sliderspace.evaluation.search import measure_concepts
from sliderspace.features.encoders import latent_encoder
from sliderspace.evaluation.report import Report, sweep
from sliderspace.viz.gallery import _mixes, write_gallery
from sliderspace.viz.player import Player, play, player_from_report
from sliderspace.figures import image_grid
from sliderspace.viz.plots import sweep_strip
from sliderspace.sampling.generate import generate_images

HOSTILE = ["<script>alert(1)</script>", "</script>\"&'<img src=x onerror=alert(2)>"]
OPTIONS = dict(steps=2, guidance=2.0, progress=quiet)


def player(labels=("hair",), strengths=((-1.0, 0.0, 2.0),), samples=2, size=(16, 16)):
    """Random pictures."""
    counts = [len(s) for s in reversed(strengths)]
    shape = (samples, *([1] if len(counts) == 1 else []), *counts, 3, *size)
    images = torch.randint(
        0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
    )
    return Player(images, labels, strengths)


PAIR = dict(labels=("hair", "hat"), strengths=((-1.0, 0.0, 2.0), (0.0, 1.0)))


# --- what is played ---------------------------------------------------------------------------------------------------


def alone(model, space, mix, samples):
    with space.on(model, mix):
        return (
            generate_images(model, PROMPT, samples, seed=3, steps=2, guidance=2.0)
            .mul(255)
            .byte()
            .float()
        )


def agree(got, expected):
    assert (got.float() - expected).abs().max() <= 1  # of 255


def test_pictures_are_those_of_the_sampler(tiny):
    space = random_space(tiny)
    got = play(tiny, space, "hat", samples=[4, 9], seed=3, strengths=(-1, 0, 0.5), **OPTIONS)
    assert got.images.shape == (2, 1, 3, 3, 16, 16) and got.images.dtype == torch.uint8
    assert got.labels == ("hat",) and got.strengths == ((-1.0, 0.0, 0.5),)
    base = generate_images(tiny, PROMPT, [4, 9], 3, 2, 2.0)
    assert torch.equal(got.images[:, 0, 1], base.mul(255).byte())
    for j, strength in ((0, -1), (2, 0.5)):
        agree(got.images[:, 0, j], alone(tiny, space, {"hat": strength}, [4, 9]))
        assert (got.images[:, 0, j].float() - got.images[:, 0, 1]).abs().max() > 3


def test_a_pair_has_the_first_slider_across_and_the_second_down(tiny):
    space = random_space(tiny)
    got = play(
        tiny,
        space,
        ("age", 0),
        samples=(1,),
        seed=3,
        strengths=[(-2, 0, 1), (0, 2)],
        batch=4,
        **OPTIONS,
    )
    assert got.images.shape == (1, 2, 3, 3, 16, 16) and got.labels == ("age", "hair")
    assert torch.equal(
        got.images[:, 0, 1], generate_images(tiny, PROMPT, [1], 3, 2, 2.0).mul(255).byte()
    )
    for i, j, mix in ((0, 0, {"age": -2}), (1, 1, {"hair": 2}), (1, 2, {"age": 1, "hair": 2})):
        agree(got.images[:, i, j], alone(tiny, space, mix, [1]))


def test_the_start_is_handed_on(tiny):
    space = random_space(tiny)
    whole, late = (
        play(tiny, space, 0, strengths=(0, 2), start=s, **OPTIONS).images[0, 0].float()
        for s in (0, 0.9)
    )
    agree(late[0], late[1])  # of two steps neither is that late
    assert (whole[0] - whole[1]).abs().max() > 3


def test_strengths_are_those_of_the_usable_range(tiny):
    space = replace(random_space(tiny), ranges=torch.tensor([[-1.5, 2.0], [0.0, 0.0], [0.0, 2.0]]))
    options = dict(steps=1, guidance=1.0, progress=quiet)
    assert play(tiny, space, 0, **options).strengths == (
        (-1.5, -1.062, -0.625, 0.0, 0.25, 0.688, 1.125, 1.562, 2.0),
    )
    both = play(tiny, space, (1, 2), **options).strengths
    assert [(len(s), s[0], s[-1]) for s in both] == [(7, -0.5, 0.5), (7, 0.0, 2.0)] and 0 in both[0]


@pytest.fixture
def report(tiny):
    space = random_space(tiny, HOSTILE + [EVIL], card={"sliders": [{"effect": 1.0}] * 3})
    swept = sweep(tiny, space, PROMPT, [0, 1], strengths=(-1, 0, 1), **OPTIONS)
    return Report(space, (-1, 0, 1), swept, *[torch.zeros(3, 3, 2)] * 3)


def test_a_report_is_played_without_sampling(tiny, report, monkeypatch):
    monkeypatch.setattr("sliderspace.sliders.mixing.sample", never)
    got = player_from_report(tiny, report, 1)
    assert got.images.shape == (2, 1, 3, 3, 16, 16) and got.strengths == ((-1.0, 0.0, 1.0),)
    assert np.array_equal(image_grid((got.images[:, 0] + 0.5) / 255), sweep_strip(tiny, report, 1))
    with pytest.raises(KeyError, match="no slider .*ears"):
        player_from_report(tiny, report, "ears")


# --- what is refused --------------------------------------------------------------------------------------------------

BAD = {
    r"sliders must be 1 or 2 different ones, not \[0, 'hair'\]": dict(sliders=[0, "hair"]),
    r"sliders must be 1 or 2 different ones, not \[0, 1, 2\]": dict(sliders=[0, 1, 2]),
    r"sliders must be 1 or 2 different ones, not \[\]": dict(sliders=[]),
    r"strengths must be 2 or more finite numbers, ascending, .* not \[1\]": dict(strengths=1),
    r"strengths must be .* ascending, .* not \[1, 0\]": dict(strengths=(1, 0)),
    r"strengths must be .* finite .* not \[0, inf\]": dict(strengths=(0, float("inf"))),
    r"strengths must be .* not \['a', 'b'\]": dict(strengths=("a", "b")),
    r"strengths must be .* not \[0, \[1\]\]": dict(strengths=(0, [1])),
    r"strengths must be those of 1 sliders, not 2": dict(strengths=[(0, 1), (0, 1)]),
    r"samples must be numbers of samples, such as \[0, 1\], not 3": dict(samples=3),
    r"samples must be .* not \[\]": dict(samples=[]),
    r"samples must be .* not \[-1\]": dict(samples=[-1]),
    r"prompt must be a non-empty text, not ' '": dict(prompt=" "),
    r"steps must be 1 or more, not 0": dict(steps=0),
    r"start must be 0 or more, below 1, not 1": dict(start=1),
    r"batch must be 1 or more, not 0": dict(batch=0),
}


@pytest.mark.parametrize("message", BAD)
def test_bad_input_is_refused_before_any_work(tiny, monkeypatch, message):
    monkeypatch.setattr("sliderspace.sliders.mixing.sample", never)
    with pytest.raises(ValueError, match=message):
        play(tiny, random_space(tiny), **{"sliders": 0} | BAD[message])


def test_sliders_of_nobody_or_of_another_model_are_refused(tiny, tiny_of, monkeypatch):
    monkeypatch.setattr("sliderspace.sliders.mixing.sample", never)
    with pytest.raises(KeyError, match="no slider 'ears'"):
        play(tiny, random_space(tiny), "ears")
    with pytest.raises(ValueError, match="these sliders were made for the weights of"):
        play(tiny_of("epsilon", 1), random_space(tiny), 0)


@pytest.mark.parametrize(
    "shape, labels, strengths",
    [
        ((1, 1, 3, 3, 4, 4), ("a",), ((0, 1),)),
        ((1, 3, 2, 3, 4, 4), ("a", "b"), ((0, 1, 2), (0, 1))),
        ((1, 2, 3, 4, 4), ("a",), ((0, 1),)),
        ((0, 1, 2, 3, 4, 4), ("a",), ((0, 1),)),
    ],
)
def test_images_must_have_the_shape_of_the_strengths(shape, labels, strengths):
    with pytest.raises(ValueError, match="images must be uint8 of shape"):
        Player(torch.zeros(shape, dtype=torch.uint8), labels, strengths)
    with pytest.raises(ValueError, match="a player has 1 or 2 labels and as many strengths"):
        Player(torch.zeros(shape, dtype=torch.uint8), ("a", "b", "c"), strengths)


def test_files_that_cannot_be_are_refused(tmp_path):
    (tmp_path / "file").touch()
    for name, options, message in [
        ("x.webm", {}, "path must end in .html, .png, .gif or .mp4, not '.*x.webm'"),
        ("x", {}, "path must end in"),
        ("x.png", dict(zoom=0), "zoom must be 1, 2, 3, ..., not 0"),
        ("x.gif", dict(fps=0), "fps must be above 0, to 50, not 0"),
        ("file/x.png", {}, "cannot write into folder"),
    ]:
        with pytest.raises(ValueError, match=message):
            player().save(tmp_path / name, **options)
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_films_say_what_they_need(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "imageio_ffmpeg", None)
    with pytest.raises(ImportError, match=r'pip install "sliderspace\[video\]"'):
        player().save(tmp_path / "film.mp4")


# --- what is saved ----------------------------------------------------------------------------------------------------


def shares(images):
    return (images + 0.5) / 255


def test_strips_hold_the_pictures(tmp_path):
    one, two = player(), player(**PAIR)
    saved = Image.open(one.save(tmp_path / "new" / "one.PNG", zoom=2))
    assert np.array_equal(saved, image_grid(shares(one.images[:, 0]), 2))
    saved = Image.open(two.save(tmp_path / "two.png"))
    assert saved.size == (3 * 18 + 2, 4 * 18 + 2)
    assert np.array_equal(np.asarray(saved)[20:36, 38:54], two.images[0, 1, 2].permute(1, 2, 0))


def test_loops_go_there_and_back(tmp_path):
    for made, count in ((player(), 4), (player(**PAIR), 10)):
        loop = Image.open(made.save(tmp_path / "loop.gif", fps=20))
        assert (loop.n_frames, loop.size, loop.info["loop"], loop.info["duration"]) == (
            count,
            (38, 20),
            0,
            50,
        )
    images, way = player(**PAIR).images, player(**PAIR)._walk(1)
    there = [(0, 0), (0, 1), (0, 2), (1, 2), (1, 1), (1, 0)]
    for frame, (i, j) in zip(way, there + there[-2:0:-1], strict=True):
        assert np.array_equal(np.asarray(frame)[2:18, 2:18], images[0, i, j].permute(1, 2, 0))


def test_films_open_again(tmp_path):
    imageio = pytest.importorskip("imageio.v3")
    pytest.importorskip("imageio_ffmpeg")
    made = player(size=(15, 17))
    flat = replace(made, images=torch.full_like(made.images, 40))
    film = imageio.imread(flat.save(tmp_path / "film.mp4", zoom=3), plugin="FFMPEG")
    assert film.shape == (4, 58, 120, 3)  # 57 lines and a white one
    assert abs(int(film[2, 25, 25, 0]) - 40) < 12


def content(page):
    return [json.loads(value) for name, value in page.attributes if name == "data-scrub"]


@pytest.mark.parametrize(
    "of", [dict(labels=tuple(HOSTILE), strengths=PAIR["strengths"]), dict(labels=(EVIL,))]
)
def test_names_on_a_player_are_text(of, tmp_path):
    made = player(**of)
    text = made.save(tmp_path / "player.html").read_text("utf-8")
    page = Page(text)
    assert page.tags.count("script") == 1 == text.count("<script") == text.count("</script")
    assert page.tags.count("img") == 2 and {"iframe", "link", "b"}.isdisjoint(page.tags)
    assert {name for name, _ in page.attributes} == {
        "lang",
        "charset",
        "name",
        "content",
        "class",
        "alt",
        "src",
        "data-scrub",
    }
    assert content(page)[0]["labels"] == list(made.labels)
    rest = text
    for name, value in page.attributes:
        rest = rest.replace(value, "") if name == "src" else rest
    assert not any(word in rest.lower() for word in ("http", "//", "url(", "@import", "javascript"))
    cell = Page(made._repr_html_())
    assert cell.tags == ["iframe"] and dict(cell.attributes)["srcdoc"] == text


def sheets(page):
    data = [b64decode(value.split(",")[1]) for name, value in page.attributes if name == "src"]
    return [torch.tensor(np.asarray(Image.open(BytesIO(d)))) for d in data]


def test_sheets_hold_the_pictures(monkeypatch):
    made = player(**PAIR)
    for widest, across in ((16_000, 3), (32, 2)):
        monkeypatch.setattr(players, "WIDEST", widest)
        page = Page(made.html())
        data = content(page)[0]
        assert (data["across"], data["count"], data["size"], data["at"]) == (
            across,
            6,
            [16, 16],
            [1, 0],
        )
        sheet = sheets(page)[1]
        for n, image in enumerate(made.images[1].flatten(0, 1)):
            y, x = 16 * (n // across), 16 * (n % across)
            assert torch.equal(sheet[y : y + 16, x : x + 16], image.permute(1, 2, 0))
    large = player(size=(160, 160))
    assert large.html().count("data:image/jpeg;base64") == 2


# --- the gallery ------------------------------------------------------------------------------------------------------


def test_mixes_are_sparse_and_usable(tiny):
    space = replace(
        random_space(tiny, list("abcde")),
        ranges=torch.tensor([[-2.0, 2.0], [0.0, 0.0], [0.0, 0.06], [-0.5, 1.5], [-1.0, 0.0]]),
    )
    mixes = _mixes(space)
    assert (
        len(mixes) == 7
        and mixes == _mixes(space)
        and all(len(mix) == 3 and "b" not in mix for mix in mixes)
    )
    for mix in mixes:
        for label, strength in mix.items():
            low, high = space.ranges[space.index(label)].tolist()
            assert strength and low - 1e-6 <= strength <= high + 1e-6
    assert _mixes(replace(space, ranges=torch.zeros(5, 2))) == []
    assert {len(mix) for mix in _mixes(space.subset([0, 1]))} == {1}


def test_a_gallery_without_directions(tiny, report, tmp_path):
    space = report.space
    path = write_gallery(
        tmp_path / "new" / "page.html", tiny, space, report, samples=[0, 5], **OPTIONS
    )
    text = path.read_text("utf-8")
    page = Page(text)
    assert (
        page.tags.count("script") == 1
        and page.tags.count("img") == 2 + 3 * 2
        and "Spectrum" not in page.text
    )
    assert all(label in page.text for label in space.labels) and "effect at 1 (sd)" in page.text
    days, *sliders = content(page)
    assert days["days"] == 7 and [s["labels"][0] for s in sliders] == space.labels
    mix = _mixes(space)[2]
    more = f"images = pictures(model, {PROMPT!r}, samples=[0, 5], seed=0, steps=2, guidance=2.0)"
    assert f"with space.on(model, {mix!r}):\n    {more}" in page.text
    with space.on(tiny, mix):
        images = generate_images(tiny, PROMPT, samples=[0, 5], seed=0, steps=2, guidance=2.0).mul(
            255
        )
    for shown, image in zip(sheets(page), images):
        agree(shown[:, 3 * 16 : 4 * 16], image.permute(1, 2, 0))


def test_a_gallery_without_a_report(tiny, tmp_path):
    found = random_directions(tiny, latent_encoder(), steps=2)
    more = dict(directions=found, samples=[1], title=EVIL) | OPTIONS
    path = write_gallery(tmp_path / "page.html", tiny, random_space(tiny), **more)
    page = Page(path.read_text("utf-8"))
    assert "Spectrum" in page.text and EVIL in page.text and page.tags.count("img") == 1 + 3 + 2
    assert [len(s["strengths"][0]) for s in content(page)[1:]] == [9, 9, 9]


def test_a_gallery_that_cannot_be_is_refused_before_any_work(tiny, report, tmp_path, monkeypatch):
    monkeypatch.setattr("sliderspace.sliders.mixing.sample", never)
    monkeypatch.setattr(pages, "player_from_report", never)
    space = random_space(tiny)
    with pytest.raises(ValueError, match="the report is of other sliders"):
        write_gallery(tmp_path / "page.html", tiny, space, report)
    far = replace(space, card=space.card | {"sliders": [{"direction": 99}] * 3})
    with pytest.raises(
        ValueError, match="these sliders are of other directions than .* of number 99"
    ):
        write_gallery(
            tmp_path / "page.html", tiny, far, directions=random_directions(tiny, latent_encoder())
        )
    with pytest.raises(ValueError, match="prompt must be a non-empty text"):
        write_gallery(tmp_path / "page.html", tiny, space, prompt="")
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="cannot write into folder"):
        write_gallery(tmp_path / "file" / "page.html", tiny, space)


# --- in a browser, from disk ------------------------------------------------------------------------------------------


def asked_for(page):
    """What the page asks the network for from now on, and the errors and dialogs that it brings up."""
    asked, inside = [], ("data:", "file:")
    page.on(
        "request",
        lambda request: None if request.url.startswith(inside) else asked.append(request.url),
    )
    page.on("pageerror", lambda error: asked.append(str(error)))
    page.on("dialog", lambda dialog: (asked.append(dialog.message), dialog.dismiss()))
    page.context.set_offline(True)
    return asked


def seen(frame, size=16):
    """A window as pixels of the picture that is in it."""
    shown = np.asarray(Image.open(BytesIO(frame.screenshot())).convert("RGB")).astype(int)
    y, x = (((np.arange(size) + 0.5) * edge / size).astype(int) for edge in shown.shape[:2])
    return shown[y[:, None], x]


def shows(frame, image):
    return abs(seen(frame) - image.permute(1, 2, 0).numpy()).max() <= 2


def test_a_player_is_scrubbed_by_keys_without_a_network(tmp_path):
    made = player(**PAIR | dict(labels=("hair", HOSTILE[0])))
    path = made.save(tmp_path / "player.html")
    with chromium() as page:
        asked = asked_for(page)
        page.goto(path.as_uri())
        frames, first = page.locator(".frame"), page.get_by_label("hair", exact=True)
        second = page.get_by_role("slider", name=HOSTILE[0])
        assert frames.count() == 2 and shows(frames.nth(1), made.images[1, 0, 1])
        first.press("ArrowRight")
        second.press("End")
        assert shows(frames.nth(0), made.images[0, 1, 2]) and shows(
            frames.nth(1), made.images[1, 1, 2]
        )
        expect(page.locator("output").first).to_have_text("+2")
        expect(first).to_have_attribute("aria-valuetext", "+2")
        expect(frames.nth(0).locator("img")).to_have_attribute(
            "alt", f"hair and {HOSTILE[0]}, sample 0: +2, +1"
        )
        first.press("Home")
        assert shows(frames.nth(0), made.images[0, 1, 0])
        page.emulate_media(color_scheme="dark")
        assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(24, 24, 24)"
        screenshot(page, "player.png")
        assert not asked


def test_a_player_in_a_cell(tmp_path):
    made = player(labels=(HOSTILE[1],))
    (tmp_path / "cell.html").write_text(made._repr_html_(), "utf-8")
    with chromium() as page:
        asked = asked_for(page)
        page.goto((tmp_path / "cell.html").as_uri())
        inside = page.frame_locator("iframe")
        inside.get_by_role("slider", name=HOSTILE[1]).press("End")
        assert shows(inside.locator(".frame").nth(1), made.images[1, 0, 2])
        assert not inside.locator("body").evaluate(
            "body => body.parentNode.scrollHeight > innerHeight"
        )
        assert not asked


def test_a_player_in_jupyterlab(tmp_path):
    code = """import torch
from sliderspace.viz.player import Player
images = torch.arange(0, 250, 50, dtype=torch.uint8).view(1, 1, 5, 1, 1, 1).expand(2, 1, 5, 3, 16, 16)
Player(images, ("hair",), ((-2, -1, 0, 1, 2),))"""
    for name in ("notebooks", "home"):
        (tmp_path / name).mkdir()
    notebook = tmp_path / "notebooks" / "player.ipynb"
    kernel = {"kernelspec": {"name": "python3", "display_name": "python3", "language": "python"}}
    nbformat.write(
        nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(code)], metadata=kernel), notebook
    )
    with chromium() as page, jupyterlab(notebook.parent, tmp_path / "home") as url:
        run_all_cells(page, url, notebook, seconds=60)
        inside = page.frame_locator(".jp-OutputArea-output iframe")
        slider, frame = inside.get_by_role("slider", name="hair"), inside.locator(".frame").nth(1)
        assert (seen(frame) == 100).all()
        slider.press("ArrowRight")
        assert (seen(frame) == 150).all()
        screenshot(page, "player-lab.png")
        assert not inside.locator("body").evaluate(
            "body => body.parentNode.scrollHeight > innerHeight"
        )


def test_the_strips_of_a_folder_are_scrubbed(tiny, tmp_path):
    images = torch.rand(2, 3, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    made = Report(
        random_space(tiny), (-1, 0, 1), torch.zeros(3, 3, 2, 4, 8, 8), *[torch.zeros(3, 3, 2)] * 3
    )
    body = pages._scrubbed(made, EVIL, (-1, 1), image_grid(images))
    (tmp_path / "page.html").write_text(players.page("strip", body, pages._STYLE), "utf-8")
    with chromium() as page:
        asked = asked_for(page)
        page.goto((tmp_path / "page.html").as_uri())
        slider, frames = page.get_by_role("slider", name=EVIL), page.locator(".frame")
        for key, j in (("Home", 0), ("ArrowRight", 1), ("End", 2)):
            slider.press(key)
            assert all(shows(frames.nth(n), images[n, j].mul(255).byte()) for n in (0, 1))
        expect(
            page.get_by_alt_text(EVIL, exact=True)
        ).to_be_visible()  # the strip, under the scrubber
        assert not asked


def test_the_gallery_without_a_network(tiny, report, tmp_path):
    path = write_gallery(
        tmp_path / "index.html", tiny, report.space, report, samples=[0, 5], **OPTIONS
    )
    with chromium() as page:
        asked = asked_for(page)
        page.clock.set_fixed_time(datetime(2026, 3, 4, 12))
        page.goto(path.as_uri())
        day = page.locator("li:visible")
        expect(day).to_have_count(1)
        first, mixed = day.inner_text(), page.locator(".days .frame")
        assert mixed.count() == 4 and np.abs(seen(mixed.nth(0)) - seen(mixed.nth(1))).max() > 3
        slider, frames = (
            page.get_by_role("slider").nth(1),
            page.locator(".player").nth(1).locator(".frame"),
        )
        images = player_from_report(tiny, report, 1).images
        assert shows(frames.nth(0), images[0, 0, 1])
        slider.press("ArrowLeft")
        assert shows(frames.nth(0), images[0, 0, 0]) and shows(frames.nth(1), images[1, 0, 0])
        screenshot(page, "gallery.png")
        page.clock.set_fixed_time(datetime(2026, 3, 5, 12))
        page.reload()
        assert page.locator("li:visible").inner_text() != first
        assert not asked


def test_the_pictures_are_there_without_scripts(tiny, report, tmp_path):
    path = write_gallery(
        tmp_path / "index.html", tiny, report.space, report, samples=[0], **OPTIONS
    )
    with chromium() as page:
        plain = page.context.browser.new_context(java_script_enabled=False).new_page()
        plain.goto(path.as_uri())
        assert (
            plain.locator("img.sheet:visible").count() == 1 + 3 * 2
            and plain.locator("li:visible").count() == 7
        )


def test_a_gallery_goes_into_a_file_and_takes_its_own_report(tiny, tmp_path, monkeypatch):
    space = random_space(tiny, ["one"])
    sweep_of = dict(
        samples=2, reference=8, strengths=(-1.0, 0.0, 1.0), encoder=latent_encoder(), progress=quiet
    )
    report = measure_concepts(tiny, space, **sweep_of)
    monkeypatch.setattr("sliderspace.sliders.mixing.sample", never)
    with pytest.raises(ValueError, match="path must be a file"):
        write_gallery(tmp_path, tiny, space)
    with pytest.raises(ValueError, match="the report is of other sliders"):
        write_gallery(tmp_path / "a.html", tiny, random_space(tiny, ["one"], seed=5), report=report)
