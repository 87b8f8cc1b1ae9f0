"""Sweeps hold the unchanged image, figures are those of planted effects, and the page needs and trusts nothing."""

import csv
import re
from dataclasses import asdict, replace
from html.parser import HTMLParser
from io import BytesIO, StringIO

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from tiny import PROMPT, never, quiet, random_directions, random_space
from torch.testing import assert_close
from torchvision.transforms.functional import pil_to_tensor

from sliderspace.evaluation import report as measures
from sliderspace.features.encoders import normalized_features, latent_encoder
from sliderspace.evaluation.report import (
    STRENGTHS,
    freesliders_metrics,
    measure,
    cross_encoder_agreement,
    sweep,
    usable_range,
)
from sliderspace.viz.gallery import COLUMNS, write_report
from sliderspace.figures import image_grid, to_png
from sliderspace.viz.plots import (
    plot_extremes,
    plot_leakage,
    plot_report,
    plot_sliders,
    plot_spectrum,
    sweep_strip,
)
from sliderspace.sampling.generate import sample, initial_noise
from sliderspace.sliders.space import SliderSpace

EVIL = '<script>alert("$x_1")</script> & "hat"'


# --- usable range ----------------------------------------------------------------------------------------------------

RANGES = {  # scores and unusual shares at -2, -1, 0, 1, 2 -> range
    "all of it": ([-2, -1, 0, 1, 2], [0, 0, 0, 0, 0], (-2, 2)),
    "unusual at one end": ([-2, -1, 0, 1, 2], [0, 0, 0, 0, 0.5], (-2, 1)),
    "exactly a fifth is unusual": ([-2, -1, 0, 1, 2], [0.2, 0, 0, 0, 0.21], (-2, 1)),
    "unusual from the start": ([-2, -1, 0, 1, 2], [0.3, 0.3, 0.3, 0.5, 0.51], (-2, 1)),
    "usual again further out": ([-2, -1, 0, 1, 2], [0, 0, 0, 1, 0], (-2, 0)),
    "falls back": ([-0.5, -1, 0, 1, 0.9], [0, 0, 0, 0, 0], (-1, 1)),
    "stands still": ([-1, -1, 0, 1, 1], [0, 0, 0, 0, 0], (-1, 1)),
    "goes the wrong way": ([2, 1, 0, -1, -2], [0, 0, 0, 0, 0], (0, 0)),
    "one-sided": ([1, 1, 0, 1, 2], [0, 0, 0, 0, 0], (0, 2)),
    "nan": ([-2, float("nan"), 0, 1, float("nan")], [0, 0, 0, 0, 0], (0, 1)),
}


@pytest.mark.parametrize("case", RANGES)
def test_usable_range(case):
    scores, unusual, expected = RANGES[case]
    assert (
        usable_range((-2, -1, 0, 1, 2), torch.tensor(scores) * 1.0, torch.tensor(unusual) * 1.0)
        == expected
    )


# --- sweeps ----------------------------------------------------------------------------------------------------------


def test_a_sweep_is_each_slider_alone(tiny):
    space, strengths = random_space(tiny), (-1, 0, 0.5)
    got = sweep(
        tiny,
        space,
        PROMPT,
        [4, 9],
        seed=2,
        strengths=strengths,
        steps=2,
        guidance=2.0,
        progress=quiet,
    )
    assert got.shape == (3, 3, 2, *tiny.latent_shape)
    noise = initial_noise(tiny, 2, [4, 9])
    base = sample(tiny, PROMPT, noise, 2, 2.0)
    for k in range(3):
        assert torch.equal(got[k, 1], base)
        for j in (0, 2):
            with space.on(tiny, {k: strengths[j]}):
                alone = sample(tiny, PROMPT, noise, 2, 2.0)
            assert (alone - base).abs().max() > 1e-2
            assert_close(got[k, j], alone, rtol=1e-4, atol=1e-4)


def test_some_sliders_in_any_batches(tiny):
    space = random_space(tiny)
    options = dict(samples=[0, 1], strengths=(-1, 0, 1), steps=1, guidance=1.0, progress=quiet)
    whole = sweep(tiny, space, PROMPT, **options)
    some = sweep(tiny, space, PROMPT, sliders=["age", 0], batch=3, **options)
    assert_close(some, whole[[2, 0]], rtol=1e-4, atol=1e-4)


def test_a_sweep_without_zero_is_refused(tiny):
    with pytest.raises(ValueError, match=r"strengths must hold 0, the unchanged image: \(-1, 1\)"):
        sweep(tiny, random_space(tiny), PROMPT, [0], strengths=(-1, 1))
    with pytest.raises(KeyError, match="no slider 'ears'"):
        sweep(tiny, random_space(tiny), PROMPT, [0], sliders=["ears"])


# --- planted figures -------------------------------------------------------------------------------------------------

KINDS = ["steady", "falls back", "nothing", "backwards", "leaves the world"]
STEP = 1 / 255 + 1e-4  # of a picture's colours
SIZE = 0.02  # of a change at strength 1, relative to the image


def card(found, directions):
    run = found.samples.run
    sliders = [
        {
            "direction": d,
            "explained": 0.1,
            "alignment": 0.5,
            "leakage": 0.1,
            "alignment_spread": 0.2,
            "alignment_by_timestep": [0.6, 0.4],
        }
        for d in directions
    ]
    cosines = torch.eye(len(directions)).tolist()
    return asdict(run) | {
        "sliders": sliders,
        "cosines": cosines,
        "timesteps_measured": [900.0, 300.0],
    }


@pytest.fixture(scope="module")
def planted(tiny_of):
    """Sliders whose sweeps are made by hand: the model's images lie close together, all scores in the last channel."""
    model, gen = tiny_of("epsilon"), torch.Generator().manual_seed(0)
    found = random_directions(model, latent_encoder())
    own = torch.randn(1, *model.latent_shape, generator=gen) + 0.2 * found.samples.latents
    own[:, -1] = 0
    vectors = torch.zeros(len(KINDS), *model.latent_shape)
    vectors[:, -1] = torch.linalg.qr(torch.randn(64, len(KINDS), generator=gen))[0].T.view(-1, 8, 8)
    found = replace(found, vectors=vectors.flatten(1), samples=replace(found.samples, latents=own))
    space = random_space(model, KINDS, targets="keys-values", card=card(found, range(len(KINDS))))
    amounts = {  # by kind, of each strength
        "steady": lambda s: s,
        "falls back": lambda s: s if s <= 1 else 0.5 / s,
        "nothing": lambda s: 0.0,
        "backwards": lambda s: -s,
        "leaves the world": lambda s: s if abs(s) <= 1 else 500 * s,
    }
    size = SIZE * own[:3].flatten(1).norm(dim=1).view(-1, 1, 1, 1)
    swept = torch.stack(
        [
            torch.stack([own[:3] + size * amounts[kind](s) * vectors[k] for s in STRENGTHS])
            for k, kind in enumerate(KINDS)
        ]
    )
    return model, space, found, swept


@pytest.fixture
def report(planted, monkeypatch):
    model, space, found, swept = planted
    monkeypatch.setattr(measures, "sweep", lambda *args, **options: swept)
    return measure(model, space, found, samples=3, progress=quiet)


def test_effects_are_the_planted_ones(planted, report):
    _, _, found, _ = planted
    assert report.score_change.shape == report.novelty.shape == (5, 9, 3)
    expected = SIZE / (1 + SIZE**2) ** 0.5 / found.score_std[:5] * torch.tensor([1, 1, 0, -1, 1])
    figures = report.space.card["sliders"]
    assert_close(torch.tensor([f["effect"] for f in figures]), expected, rtol=1e-3, atol=1e-5)
    assert all(f["spread"] < 1e-4 for f in figures)
    assert_close(report.score_change[:, 4], torch.zeros(5, 3), rtol=0, atol=1e-6)


def test_monotonicity_and_ranges_are_the_planted_ones(report):
    figures = dict(zip(KINDS, report.space.card["sliders"]))
    ranges = dict(zip(KINDS, map(tuple, report.space.ranges.tolist())))
    assert figures["steady"]["monotonicity"] == figures["falls back"]["monotonicity"] == 1
    assert figures["nothing"]["monotonicity"] == figures["backwards"]["monotonicity"] == 0
    assert ranges == {
        "steady": (-2, 2),
        "falls back": (-2, 1),
        "nothing": (0, 0),
        "backwards": (0, 0),
        "leaves the world": (-1, 1),
    }


def test_what_leaves_the_world_is_novel(report):
    novelty = dict(zip(KINDS, report.novelty))
    assert (novelty["steady"] < 1).all()
    assert (novelty["leaves the world"][[0, 1, -2, -1]] > 1).all() and (
        novelty["leaves the world"][2:-2] < 1
    ).all()


def test_measuring_keeps_the_rest_of_the_card(planted, report):
    _, space, _, _ = planted
    assert "effect" not in space.card["sliders"][0]  # a new space: the measured one is left alone
    assert report.space.labels == space.labels and report.space.down is space.down
    assert {k: v for k, v in report.space.card.items() if k != "sliders"} == {
        "agreement_with": "latents"
    } | {k: v for k, v in space.card.items() if k != "sliders"}
    for new, old in zip(report.space.card["sliders"], space.card["sliders"]):
        assert new.items() > old.items()


def test_the_report_says_why_there_is_no_effect(report):
    says = dict(zip(KINDS, report.diagnostics))
    assert (
        says["nothing"].startswith("it moves final images by less than a tenth")
        and "effect 0.00 sd" in says["nothing"]
    )
    assert says["backwards"].startswith("final images go the other way")
    assert says["steady"].startswith(
        "an encoder without part in training sees none of it"
    )  # of random features
    figures = replace(
        report.space,
        card=report.space.card
        | {"sliders": [f | {"agreement": 0.5} for f in report.space.card["sliders"]]},
    )
    assert (
        replace(report, space=figures)
        .diagnostics[0]
        .startswith("strengths -2 to 2; 1 moves its score by ")
    )


def test_another_encoder_sees_what_moves_with_the_scores():
    gen = torch.Generator().manual_seed(0)
    scores = torch.randn(500, 2, generator=gen)
    mixed = torch.linalg.qr(torch.randn(12, 12, generator=gen))[0]
    own = scores @ mixed[:2] + 0.1 * torch.randn(500, 12, generator=gen) + 5
    change = 0.7 * torch.stack([mixed[[0, 0]], -mixed[[1, 1]], mixed[[3, 4]]])
    assert_close(
        cross_encoder_agreement(own, scores, change[:2]),
        torch.tensor([1.0, -1.0]),
        rtol=0,
        atol=0.05,
    )
    assert cross_encoder_agreement(own, scores[:, [0]], change[2:]).abs() < 0.1
    assert torch.equal(cross_encoder_agreement(own, scores, torch.zeros(2, 3, 12)), torch.zeros(2))


def test_free_sliders_figures():
    steps = torch.tensor([[0.0, 0.1, 0.2, 0.3, 0.4], [0.0, 0.0, 0.4, 0.4, 0.4]])
    away = torch.tensor([0.4, 0.2, 0.0, 0.2, 0.4])
    f = freesliders_metrics(steps, away)
    assert_close(f["CR"], torch.tensor([0.4, 0.4]))  # up by 0.4, and its opposite down by 0.4
    assert_close(f["CSM"], torch.tensor([0.0, 3**0.5 / 4]), rtol=0, atol=1e-6)
    assert_close(f["SP"], torch.tensor(0.3))
    assert_close(f["OS"], 0.4 / 1.3 + 1 - f["CSM"])
    both = freesliders_metrics(steps, away, opposite=-2 * steps)
    assert_close(both["CR"], torch.tensor([0.6, 0.6]))


def test_distances_are_relative_to_two_images(planted, report):
    _, _, found, swept = planted
    own = F.normalize(found.samples.latents.flatten(1), dim=1)
    two = torch.pdist(own).mean()
    moved = (F.normalize(swept[0].flatten(0, 1).flatten(1), dim=1).view(9, 3, -1) - own[:3]).norm(
        dim=2
    ) / two
    assert_close(report.distance[0], moved, rtol=1e-3, atol=1e-4)


def test_measures_of_a_real_sweep(tiny):
    found = random_directions(tiny, latent_encoder(), steps=2)
    space = random_space(tiny, ["a", "b"], targets="keys-values", card=card(found, [3, 0]))
    report = measure(tiny, space, found, samples=2, strengths=(-1, 0, 1), progress=quiet)
    phi = normalized_features(tiny, latent_encoder(), report.latents.flatten(0, 2)).view(
        2, 3, 2, -1
    )
    for k, d in enumerate((3, 0)):
        scores = (phi[k] - phi[k, 1]) @ found.vectors[d] / found.score_std[d]
        assert_close(report.score_change[k], scores, rtol=1e-3, atol=1e-4)
        half = (scores[2] - scores[0]) / 2
        assert_close(
            report.space.card["sliders"][k]["effect"], half.mean().item(), rtol=1e-3, atol=1e-4
        )
        assert_close(
            report.space.card["sliders"][k]["spread"], half.std().item(), rtol=1e-3, atol=1e-4
        )
    noise = initial_noise(tiny, 0, list(range(24 + 100)))  # of discovery and calibration
    assert_close(report.latents[0, 1], report.latents[1, 1])
    seen = sample(tiny, PROMPT, noise, 1, 1.0)
    assert (
        len(torch.unique(torch.cat([seen, report.latents[0, 1]]).flatten(1), dim=0)) == 24 + 100 + 2
    )


BAD = {
    "samples must be 2 or more, not 1": dict(samples=1),
    "strengths must be ascending, with -1, 0 and 1 among them, not .0, 1.": dict(strengths=(0, 1)),
    "strengths must be ascending, with -1, 0 and 1 among them, not .1, 0, -1.": dict(
        strengths=(1, 0, -1)
    ),
}


@pytest.mark.parametrize("message", BAD)
def test_bad_input_is_refused_before_any_work(planted, monkeypatch, message):
    monkeypatch.setattr(measures, "sweep", never)
    with pytest.raises(ValueError, match=message):
        measure(*planted[:3], **BAD[message])


@pytest.mark.parametrize(
    "key, value", [("prompts", ["hat"]), ("encoder", "pixels-4"), ("seed", 7), ("sliders", [])]
)
def test_sliders_of_other_directions_are_refused(planted, monkeypatch, key, value):
    model, space, found, _ = planted
    monkeypatch.setattr(measures, "sweep", never)
    named = "more of them" if key == "sliders" else re.escape(str({key: value}))
    with pytest.raises(
        ValueError,
        match=f"these sliders are of other directions than .*'portrait of a person'.*: {named}",
    ):
        measure(model, replace(space, card=space.card | {key: value}), found)


# --- pictures --------------------------------------------------------------------------------------------------------


def pixels_of(picture):
    return pil_to_tensor(picture) / 255


def test_a_grid_holds_its_images():
    images = torch.rand(2, 3, 3, 4, 5, generator=torch.Generator().manual_seed(0))
    small = pixels_of(image_grid(images))
    assert small.shape == (3, 2 * (4 + 2) + 2, 3 * (5 + 2) + 2)
    assert (small[:, :2] == 1).all() and (small[:, :, :2] == 1).all()
    assert_close(small[:, 8:12, 9:14], images[1, 1], rtol=0, atol=STEP)  # second row, second column
    large = pixels_of(image_grid(images, zoom=3))
    assert torch.equal(large, small.repeat_interleave(3, 1).repeat_interleave(3, 2))


def test_ends_are_the_samples_with_the_lowest_and_highest_scores(planted):
    model, _, found, _ = planted
    got = pixels_of(plot_extremes(model, found, [2, 0], count=3))
    assert got.shape == (3, 2 * 18 + 2, 6 * 18 + 2)
    order = found.scores[:, -1, 2].argsort()
    ends = model.decode(found.samples.latents[order[[0, -1]]]).detach()
    assert_close(got[:, 2:18, 2:18], ends[0], rtol=0, atol=STEP)
    assert_close(got[:, 2:18, 92:108], ends[1], rtol=0, atol=STEP)


def test_strips_fade_beyond_the_range(planted, report):
    model = planted[0]
    got = pixels_of(sweep_strip(model, report, "falls back", zoom=2))[:, ::2, ::2]
    assert got.shape == (3, 3 * 18 + 2, 9 * 18 + 2)
    images = model.decode(report.latents[1, :, 0]).detach()
    shown = [got[:, 2:18, 2 + 18 * j : 18 + 18 * j] for j in range(9)]
    for j, s in enumerate(report.strengths):
        assert_close(shown[j], images[j] if s <= 1 else 0.4 * images[j] + 0.6, rtol=0, atol=STEP)


def test_all_sliders_are_in_one_picture(planted, report):
    model = planted[0]
    got = pixels_of(plot_sliders(model, report, samples=2))
    assert got.shape == (3, 5 * 18 + 2, 2 * 9 * 18 + 2)
    third = pixels_of(sweep_strip(model, report, 2))
    assert_close(got[:, 38:54, :164], third[:, 2:18, :164])


def test_the_spectrum_is_drawn(planted):
    found = planted[2]
    bars, total = plot_spectrum(found).axes
    assert len(bars.patches) == 2 * len(KINDS)
    heights = torch.tensor([p.get_height() for p in bars.patches]).float().view(2, -1).sum(0)
    assert_close(heights, found.explained_variance_ratio, rtol=1e-4, atol=1e-6)
    assert_close(
        torch.as_tensor(total.lines[0].get_ydata()).float(),
        found.explained_variance_ratio.cumsum(0),
    )
    assert len(plot_spectrum(found, 2).axes[0].patches) == 4
    assert len(plot_spectrum(found, 99).axes[0].patches) == 2 * len(KINDS)


def test_leakage_is_drawn(planted):
    space = planted[1]
    shown = plot_leakage(space).axes[0].images[0].get_array()
    assert torch.equal(torch.tensor(shown.data).float(), torch.eye(len(KINDS)))
    with pytest.raises(ValueError, match="no leakage matrix on its card"):
        plot_leakage(replace(space, card={}))


def test_the_report_is_drawn(report):
    bars, times, matrix, effect, distance, novelty, _ = plot_report(report).axes
    rows, S = report.space.card["sliders"], len(report.strengths)
    assert [b.get_height() for b in bars.patches] == [r["alignment"] for r in rows]
    assert len(times.lines) == len(rows) + 1
    assert matrix.images[0].get_array().shape == (len(rows), len(rows))
    for panel, values in (
        (effect, report.score_change),
        (distance, report.distance),
        (novelty, report.novelty),
    ):
        drawn = [
            torch.as_tensor(line.get_ydata()).float()
            for line in panel.lines
            if len(line.get_xdata()) == S
        ]
        assert any(torch.allclose(d, values.mean((0, 2)), atol=1e-5) for d in drawn)
    with pytest.raises(ValueError, match="no leakage matrix"):
        plot_report(replace(report, space=replace(report.space, card={})))


@pytest.mark.parametrize("prompt", ["$", "$x^{", r"\frac{$1$}", EVIL])
def test_any_prompt_can_be_a_title(planted, prompt):
    found = planted[2]
    found = replace(
        found, samples=replace(found.samples, run=replace(found.samples.run, prompts=[prompt]))
    )
    assert to_png(plot_spectrum(found))[:4] == b"\x89PNG"


def test_equal_pictures_are_equal_bytes(planted, report):
    model, space, found, _ = planted
    for draw in (
        lambda: plot_spectrum(found),
        lambda: plot_leakage(space),
        lambda: sweep_strip(model, report, 0),
    ):
        first = to_png(draw())
        assert to_png(draw()) == first and Image.open(BytesIO(first)).size[0] > 100


# --- the folder and its page -----------------------------------------------------------------------------------------


@pytest.fixture
def evil(planted, report):
    """Everything that a reader could name, named to do harm."""
    model, _, found, _ = planted
    run = replace(found.samples.run, prompts=[EVIL], encoder="<i>eye</i>")
    labels = [EVIL, "a, b", "=1+1", "zwei\nZeilen", "“größer” <b>"]
    return (
        replace(model, name="<u>model</u>"),
        replace(found, samples=replace(found.samples, run=run)),
        replace(report, space=replace(report.space, labels=labels)),
    )


def written(folder):
    return {
        p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()
    }


def test_a_folder_holds_what_is_promised(planted, report, tmp_path):
    model, _, found, _ = planted
    page = write_report(tmp_path / "out", model, found, report, progress=quiet)
    files = written(tmp_path / "out")
    pictures = [
        "spectrum.png",
        "ends.png",
        "report.png",
        "sliders.png",
        *(f"strips/{i:02d}.png" for i in range(5)),
    ]
    assert page == tmp_path / "out" / "index.html"
    assert set(files) == {
        "space.safetensors",
        "directions.safetensors",
        "table.csv",
        "index.html",
        *pictures,
    }
    for name in pictures:
        Image.open(BytesIO(files[name])).verify()
    again = SliderSpace.load(tmp_path / "out" / "space.safetensors", model)
    assert again.labels == KINDS and again.card["sliders"] == report.space.card["sliders"]
    write_report(tmp_path / "again", model, found, report, progress=quiet)
    assert [n for n, data in written(tmp_path / "again").items() if data != files[n]] == []


def test_the_table_has_its_columns(evil, tmp_path):
    write_report(tmp_path, *evil, progress=quiet)
    head, *rows = csv.reader(StringIO((tmp_path / "table.csv").read_text("utf-8"), newline=""))
    assert head == ["slider", *COLUMNS, "usable range"]
    assert [row[0] for row in rows] == evil[2].space.labels
    effect = evil[2].space.card["sliders"][0]["effect"]
    assert rows[0][1:] == ["10.0%", "0.50", "0.10", f"{effect:.2f}", "100%", "-2 to 2"]


class Page(HTMLParser):
    """Tags, attributes and text of a page."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.attributes, self.text = [], [], ""
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes += attributes

    def handle_data(self, data):
        self.text += data


def test_the_page_needs_nothing_beside_it(planted, report, tmp_path):
    model, _, found, _ = planted
    text = write_report(tmp_path, model, found, report, progress=quiet).read_text("utf-8")
    page = Page(text)
    sources = [
        value
        for name, value in page.attributes
        if name in ("src", "href", "srcset", "data", "action")
    ]
    assert len(sources) == 5 + 3 + 1 and all(
        s.startswith("data:image/png;base64,") for s in sources
    )
    rest = text
    for source in sources:
        rest = rest.replace(source, "")
    assert not any(word in rest.lower() for word in ("http", "//", "url(", "@import", "javascript"))
    assert {"link", "iframe", "object", "form"}.isdisjoint(page.tags) and page.tags.count(
        "script"
    ) == 1
    assert page.tags.count("tr") == 1 + 5 and all(kind in page.text for kind in KINDS)


def test_names_on_the_page_are_text(evil, tmp_path):
    text = write_report(tmp_path, *evil, progress=quiet).read_text("utf-8")
    page = Page(text)
    assert set(page.tags).isdisjoint({"i", "u"}) and text.count("<script") == 1  # the page's own
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
    for words in (EVIL, "<i>eye</i>", "<u>model</u>", "“größer” <b>"):
        assert words in page.text
    assert ("alt", EVIL) in page.attributes


def test_an_unwritable_folder_is_refused_before_any_work(planted, report, tmp_path, monkeypatch):
    model, _, found, _ = planted
    (tmp_path / "file").touch()
    monkeypatch.setattr(SliderSpace, "save", never)
    with pytest.raises(
        ValueError, match="cannot write into folder .*file/out.*name another folder"
    ):
        write_report(tmp_path / "file" / "out", model, found, report)
