"""Edits of known factors get their names, pairs without one hardly ever do, and names go where they belong."""

from dataclasses import replace
from itertools import product
from types import SimpleNamespace
from zlib import crc32

import pytest
import torch
import torch.nn.functional as F
from tiny import PROMPT, random_space

from sliderspace.features.encoders import Encoder
from sliderspace.evaluation.labels import (
    EditPairs,
    Label,
    Labels,
    edit_pairs_from_report,
    label_with_clip,
    null_pairs,
)
from sliderspace.evaluation.report import Report
from sliderspace.portraits.renders import FACTORS, dataset, counterfactual_pairs

EVIL = '<script>alert("x")</script> & <b>'
PALETTE = {
    "colour": ["red", "green", "blue"],
    "size": ["large", "small"],
    "mood": ["calm", "gloomy", "cheerful"],
}


# --- edits of known factors ------------------------------------------------------------------------------------------

EDITS = [
    ("hair", "blond hair"),
    ("hair", "black hair"),
    ("background", "white background"),
    ("background", "blue background"),
    ("skin", "dark skin"),
    ("skin", "light skin"),
    ("length", "long hair"),
    ("beard", "beard"),
    ("glasses", "glasses"),
    ("mouth", "frowning"),
]
PLAIN = [value for factor, value in EDITS if factor in ("hair", "background", "skin", "length")]


def encoded(model, images):
    return model.encode(torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255)


@pytest.fixture(scope="module")
def edits(model):
    """Renders before and after an edit, as the model's latents; each named after the value that the factor gets."""
    ends = [
        [encoded(model, images) for images in counterfactual_pairs(8, factor, value)[:2]]
        for factor, value in EDITS
    ]
    return EditPairs(
        [value for _, value in EDITS], torch.stack([torch.stack(pair) for pair in ends]), PROMPT
    )


@pytest.fixture(scope="module")
def labelled(model, edits):
    return {row.slider: row for row in label_with_clip(model, edits, FACTORS).rows}


@pytest.mark.parametrize("factor, value", EDITS[:8])
def test_an_edit_is_named_after_its_factor_and_value(labelled, factor, value):
    row = labelled[value]
    assert (
        row.high == value and row.low in FACTORS[factor] and row.low != value and row.error is None
    )


@pytest.mark.parametrize("value", PLAIN)
def test_plain_edits_are_named_with_confidence(labelled, value):
    assert labelled[value].confident and 0.2 < labelled[value].confidence <= 1


@pytest.mark.parametrize("factor, value", EDITS)
def test_what_is_confident_is_right(labelled, factor, value):
    """Glasses look much like a beard to this encoder, and the mouth like little."""
    row = labelled[value]
    assert not row.confident or row.high == value and row.low in FACTORS[factor]


def test_ends_swapped_swap_the_names(model, edits, labelled):
    swapped = replace(edits, latents=edits.latents.flip(1))
    for row in label_with_clip(model, swapped, FACTORS).rows:
        was = labelled[row.slider]
        assert (row.high, row.low, row.confident) == (was.low, was.high, was.confident)
        assert row.confidence == pytest.approx(was.confidence, abs=1e-4)


def test_the_batch_does_not_matter(model, edits, labelled):
    some = EditPairs(edits.names[:3], edits.latents[:3], PROMPT)
    for row in label_with_clip(model, some, FACTORS, batch=7).rows:
        assert replace(row, confidence=0.0) == replace(labelled[row.slider], confidence=0.0)
        assert row.confidence == pytest.approx(labelled[row.slider].confidence, abs=1e-4)


def test_a_list_is_a_vocabulary_of_one_kind(model, edits):
    some = EditPairs(edits.names[:2], edits.latents[:2], PROMPT)
    found = label_with_clip(model, some, FACTORS["hair"])
    assert [row.high for row in found.rows] == ["blond hair", "black hair"] and all(
        row.confident for row in found.rows
    )
    assert found.by == "words (portraits-clip)"
    assert repr(found) == "Labels of 2 by words (portraits-clip): 2 confident, 0 errors"


def test_pairs_without_an_edit_are_rarely_named_with_confidence(model):
    images = encoded(model, dataset(60, seed=5)[0])
    found = label_with_clip(model, null_pairs(images, PROMPT, count=60, pairs=6), FACTORS)
    assert len(found.rows) == 60 and sum(row.confident for row in found.rows) <= 6


# --- how sure --------------------------------------------------------------------------------------------------------
# A model whose latents are its images and an encoder of raw pixels: what is in the features is what a test puts there.

PLAIN_MODEL = SimpleNamespace(
    decode=lambda x, preview=False: x, device=torch.device("cpu"), batch_sizes={}
)


def vectors(texts):
    """Unit rows of texts, each from the text alone."""
    rows = [
        torch.randn(12, generator=torch.Generator().manual_seed(crc32(text.encode())))
        for text in texts
    ]
    return F.normalize(torch.stack(rows), dim=1)


RAW = Encoder("raw", lambda x: x.flatten(1), text=vectors, scale=5.0)


def random_ends(count, pairs, seed=0):
    gen = torch.Generator().manual_seed(seed)
    return EditPairs(
        [f"s{i}" for i in range(count)],
        torch.randn(count, 2, pairs, 3, 2, 2, generator=gen),
        PROMPT,
    )


def probabilities(latents, phrases):
    text = vectors([f"{PROMPT}, {phrase}" for phrase in phrases])
    return (5.0 * F.normalize(latents.flatten(-3), dim=-1) @ text.T).softmax(-1)


def p_by_brute_force(latents):
    """Share of all ways to exchange ends of pairs, none among them, in which a kind changes as much."""
    changes = [
        p[1] - p[0] for p in (probabilities(latents, phrases) for phrases in PALETTE.values())
    ]

    def largest(signs):
        return max((torch.tensor(signs)[:, None] * c).mean(0).abs().sum() / 2 for c in changes)

    ways = list(product((1.0, -1.0), repeat=latents.shape[1]))
    return sum((largest(signs) >= largest(ways[0]) - 1e-6).item() for signs in ways) / len(ways)


@pytest.mark.parametrize("pairs", [1, 3, 5, 6, 9])
def test_chance_is_exact_for_few_pairs(pairs):
    for seed in range(4):
        ends = random_ends(1, pairs, seed)
        p = p_by_brute_force(ends.latents[0])
        (at,) = label_with_clip(PLAIN_MODEL, ends, PALETTE, RAW, min_margin=0.0, alpha=p).rows
        (below,) = label_with_clip(
            PLAIN_MODEL, ends, PALETTE, RAW, min_margin=0.0, alpha=p - 1e-6
        ).rows
        assert at.confident and not below.confident


@pytest.mark.parametrize("pairs", [6, 12])
def test_pairs_in_random_order_are_confident_as_often_as_chance_allows(pairs):
    ends, coarse = (
        random_ends(2000, pairs),
        2 / 2**pairs,
    )  # an order and its opposite change as much
    for chance in (0.05, 0.1, 0.25, 0.5, 0.75):
        found = label_with_clip(
            PLAIN_MODEL, ends, PALETTE, RAW, min_margin=0.0, alpha=chance, batch=100_000
        )
        share, noise = (
            sum(row.confident for row in found.rows) / 2000,
            3 * (chance * (1 - chance) / 2000) ** 0.5,
        )
        assert chance - coarse - noise < share < chance + noise


def shift(pairs, phrases):
    """Pairs whose high end is moved towards some phrases, each as much, and away from their rivals."""
    latents = 0.1 * torch.randn(2, pairs, 12, generator=torch.Generator().manual_seed(0))
    text = vectors([f"{PROMPT}, {phrase}" for phrase in phrases])
    latents[1] += text.sum(0)
    latents[0] -= text.sum(0)
    return latents.view(2, pairs, 3, 2, 2)


def test_no_change_is_beyond_chance():
    """The order as it is is one of all orders, so the share of orders that do as well is never 0."""
    for pairs in (6, 12):
        ends = EditPairs(["s"], shift(pairs, ["red"])[None], PROMPT)
        (row,) = label_with_clip(PLAIN_MODEL, ends, ["red", "green"], RAW, alpha=0.0).rows
        assert row.high == "red" and not row.confident
        assert label_with_clip(PLAIN_MODEL, ends, ["red", "green"], RAW).rows[0].confident


def test_a_small_change_is_not_named_with_confidence():
    ends = EditPairs(["s"], shift(8, ["red"])[None], PROMPT)
    (row,) = label_with_clip(PLAIN_MODEL, ends, ["red", "green"], RAW).rows
    assert row.high == "red" and row.confident
    low, high = probabilities(ends.latents[0], ["red", "green"]).mean(1)
    assert row.confidence == pytest.approx((high - low)[0].item(), abs=1e-5)
    assert (
        not label_with_clip(
            PLAIN_MODEL, ends, ["red", "green"], RAW, min_margin=row.confidence + 1e-3
        )
        .rows[0]
        .confident
    )


def test_kinds_that_change_alike_leave_it_unsure():
    """Two kinds of the same words: nobody can say which of them it is."""
    ends, words = EditPairs(["s"], shift(8, ["red"])[None], PROMPT), ["red", "green"]
    (row,) = label_with_clip(PLAIN_MODEL, ends, {"one": words, "other": words}, RAW).rows
    assert row.confidence == pytest.approx(0, abs=1e-6) and not row.confident


def test_what_does_not_change_has_no_name():
    same = random_ends(1, 6).latents[:, :1].expand(-1, 2, -1, -1, -1, -1)
    (row,) = label_with_clip(PLAIN_MODEL, EditPairs(["s"], same, PROMPT), PALETTE, RAW).rows
    assert not row.confident and row.confidence == pytest.approx(0, abs=1e-6)
    assert row.error or row.high != row.low


def test_phrases_are_read_behind_the_prompt():
    seen = []
    eyes = replace(RAW, text=lambda texts: (seen.extend(texts), vectors(texts))[1])
    label_with_clip(PLAIN_MODEL, random_ends(1, 2), {"colour": ["red", "blue", "red"]}, eyes)
    assert seen == [f"{PROMPT}, red", f"{PROMPT}, blue"]  # what is there twice counts once


# --- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "words, message",
    [
        (
            {"hair": ["black hair"]},
            r"vocabulary\['hair'\] must be two or more different phrases, not \['black hair'\]",
        ),
        ({"hair": ["red", "red"]}, "two or more different phrases"),
        ({"hair": ["red", " "]}, "two or more different"),
        ({"hair": ["red", 1]}, "two or more different phrases"),
        ({"a": ["b", "c"], "hair": []}, r"vocabulary\['hair'\]"),
        ({}, "vocabulary must have a kind"),
        ([], "two or more different phrases"),
        (["red"], "two or more different"),
        ("red", "vocabulary"),
        ({"hair": "red"}, r"vocabulary\['hair'\]"),
        ({"hair": ["red", " red"]}, "two or more diff"),
    ],
)
def test_a_vocabulary_without_a_choice_is_refused(words, message):
    with pytest.raises(ValueError, match=message):
        label_with_clip(PLAIN_MODEL, random_ends(1, 2), words, RAW)


def test_an_encoder_without_words_is_refused(model):
    with pytest.raises(
        ValueError, match="encoder 'pixels-16' has no text tower: name one of open_clip"
    ):
        label_with_clip(model, random_ends(1, 2), PALETTE, "pixels")


@pytest.mark.parametrize(
    "names, shape, prompt, message",
    [
        (
            ["a", "b"],
            (1, 2, 4, 3, 8, 8),
            PROMPT,
            r"latents must be \(2, 2, n, ...\), not \(1, 2, 4, 3, 8, 8\)",
        ),
        (["a"], (1, 3, 4, 3, 8, 8), PROMPT, r"latents must be \(1, 2, n, ...\)"),
        (["a"], (1, 2, 0, 3, 8, 8), PROMPT, r"latents must be \(1, 2, n, ...\)"),
        (["a"], (1, 2, 4), PROMPT, r"latents must be \(1, 2, n, ...\)"),
        (["a"], (1, 2, 4, 3, 8, 8), " ", "prompt must be a non-empty text"),
        (["a"], (1, 2, 4, 3, 8, 8), ["a cat", "a dog"], "prompt must be"),
        (["a", "a"], (2, 2, 4, 3, 8, 8), PROMPT, "names"),
    ],
)
def test_ends_that_do_not_fit_are_refused(names, shape, prompt, message):
    with pytest.raises(ValueError, match=message):
        EditPairs(names, torch.zeros(shape), prompt)


# --- what is labelled ------------------------------------------------------------------------------------------------


def swept(space, strengths):
    latents = torch.randn(
        len(space), len(strengths), 3, 4, 2, 2, generator=torch.Generator().manual_seed(0)
    )
    return Report(space, strengths, latents, *[torch.zeros(latents.shape[:3])] * 3)


def test_ends_are_the_sweeps_at_both_signs(tiny):
    report = swept(random_space(tiny), (-2.0, -1.0, 0.0, 1.0, 2.0))
    ends = edit_pairs_from_report(report)
    assert ends.names == ["hair", "hat", "age"] and ends.prompt == PROMPT
    assert torch.equal(ends.latents, report.latents[:, [1, 3]])
    assert torch.equal(edit_pairs_from_report(report, 2).latents, report.latents[:, [0, 4]])
    assert repr(ends) == f"Ends(3 of '{PROMPT}', pairs each: 3)"


@pytest.mark.parametrize("strength", [1.5, 2.0, 0.0, -1.0])
def test_a_strength_without_two_ends_is_refused(tiny, strength):
    """There is no -2 to go with the 2, no two ends at 0, and a high end at -1 would exchange the names."""
    with pytest.raises(ValueError, match=r"strength must be one of \[1.0\], not"):
        edit_pairs_from_report(swept(random_space(tiny), (-1.0, 0.0, 1.0, 2.0)), strength)


def test_nulls_are_pairs_of_different_samples():
    numbered = torch.arange(20.0)[:, None].expand(20, 4)
    ends = null_pairs(numbered, PROMPT, count=5, pairs=8)
    assert (
        len(set(ends.names)) == 5 and ends.latents.shape == (5, 2, 8, 4) and ends.prompt == PROMPT
    )
    numbers = ends.latents[..., 0].flatten(1)
    assert all(len(row.unique()) == 16 for row in numbers) and len(numbers.unique(dim=0)) == 5
    assert torch.equal(null_pairs(numbered, PROMPT, 5, 8).latents, ends.latents)
    assert not torch.equal(null_pairs(numbered, PROMPT, 5, 8, seed=1).latents, ends.latents)


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(pairs=8), "latents must be 16 images or more, not 15"),
        (dict(pairs=0), "pairs"),
        (dict(count=0), "count"),
    ],
)
def test_nulls_that_cannot_be_made_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        null_pairs(torch.zeros(15, 4), PROMPT, **dict(pairs=2) | options)


# --- the result ------------------------------------------------------------------------------------------------------


def row(slider, high="blond hair", low="black hair", confidence=0.9, confident=True, error=None):
    return Label(slider, high, low, confidence, confident, error)


FAILED = Label("age", "", "", 0.0, False, "TimeoutError: no answer")


def test_confident_names_are_given_and_say_who_gave_them(tiny):
    space = random_space(tiny)
    named = Labels([row("hair"), row("hat", confident=False), FAILED], "words (raw)").name(space)
    assert named.labels == ["black hair → blond hair", "hat", "age"] and space.labels == [
        "hair",
        "hat",
        "age",
    ]
    assert [r.get("note") for r in named.rows] == [
        "named by words (raw), confidence 0.90; was hair",
        None,
        None,
    ]


def test_every_name_is_given_but_where_there_is_none(tiny):
    labels = Labels([row("hat", "b", "a", 0.1, False), FAILED, row("hair")], "x")
    assert labels.name(random_space(tiny), every=True).labels == [
        "black hair → blond hair",
        "a → b",
        "age",
    ]


def test_the_same_name_is_numbered(tiny):
    named = Labels([row("hair"), row("hat"), row("age")], "x").name(random_space(tiny))
    assert named.labels == [f"black hair → blond hair{n}" for n in ("", " (2)", " (3)")]
    space = random_space(
        tiny, ["one", "black hair → blond hair"]
    )  # a slider that is not labelled has it
    assert Labels([row("one")], "x").name(space).labels[0] == "black hair → blond hair (2)"


def test_naming_again_changes_nothing(tiny):
    space = random_space(tiny, ["black hair → blond hair", "hat"])
    assert Labels([row(space.labels[0])], "x").name(space).labels == space.labels


def test_blanks_around_phrases_make_no_other_names(tiny):
    """A space strips its labels, and refuses one that another slider has."""
    change = shift(6, ["red"])
    ends = EditPairs(
        ["a", "b", "c", "d"], torch.stack([change, change, change.flip(0), change.flip(0)]), PROMPT
    )
    found = label_with_clip(PLAIN_MODEL, ends, [" red", "green "], RAW)
    assert len(set(found.name(random_space(tiny, ends.names), every=True).labels)) == 4


def test_another_space_is_refused(tiny):
    with pytest.raises(KeyError, match="no slider 'hair'"):
        Labels([row("hair")], "x").name(random_space(tiny, ["one", "two"]))


def test_labels_in_html_are_text():
    html = Labels([row(EVIL, EVIL, EVIL), replace(FAILED, error=EVIL)], EVIL)._repr_html_()
    assert "<script" not in html and "<b>" not in html and html.count("&lt;script&gt;") == 5
    assert html.count("<tr>") == 3 and "<td>0.90</td><td>yes</td>" in html
