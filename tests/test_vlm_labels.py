"""Eyes are asked in an order that they cannot know, and whatever they answer, only their own slider can suffer."""

import io
import json
import random
import sys
from base64 import b64decode
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from test_labels import PLAIN_MODEL, encoded
from tiny import PROMPT, quiet, random_space
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from sliderspace.evaluation.vlm_labels import (
    anthropic_vlm,
    label_with_vlm,
    transformers_vlm,
    openai_vlm,
)
from sliderspace.evaluation.labels import EditPairs
from sliderspace.portraits.renders import counterfactual_pairs

label_with_vlm = partial(label_with_vlm, n_questions=3)  # few questions are enough here

SIDE = 8  # pixels of the images below


def shades(count=1, pairs=6):
    """Images that are dark at the low end and bright at the high one; the corner of each tells the sample."""
    images = torch.full((count, 2, pairs, 3, SIDE, SIDE), 0.2)
    images[:, 1] = 0.8
    images[..., 0, 0] = torch.arange(pairs)[:, None] / 51
    return EditPairs([f"slider {i}" for i in range(count)], images, PROMPT)


def label(ask, ends=None, **options):
    """What eyes say of shades; small pictures, nothing shown."""
    options = dict(size=SIDE, progress=quiet) | options
    return label_with_vlm(PLAIN_MODEL, shades() if ends is None else ends, ask, **options)


def sides(picture):
    """Left and right of a picture, each `(side, side, 3)`, whatever lies between them."""
    pixels = np.asarray(picture)
    return pixels[:, : len(pixels)], pixels[:, -len(pixels) :]


def brighter_right(images):
    """Whether all pictures have their brighter half on the right; all must agree."""
    (found,) = {bool(a.mean() < b.mean()) for a, b in map(sides, images)}
    return found


def answer(a, b):
    return json.dumps({"A": a, "B": b})


def honest(images, text, high="bright", low="dark"):
    return answer(low, high) if brighter_right(images) else answer(high, low)


# --- order and agreement ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "high, low", [("bright", "dark"), ("light blond hair", "dark blond hair"), ("hat", "no hat")]
)
@pytest.mark.parametrize("asks", [2, 3, 4])
def test_the_order_is_undone(asks, high, low):
    found = label(partial(honest, high=high, low=low), shades(20), n_questions=asks)
    assert [(row.high, row.low, row.confidence) for row in found.rows] == [(high, low, 1)] * 20
    assert repr(found) == "Labels of 20 by eyes: 20 confident, 0 errors"


def test_the_order_is_random():
    orders = []
    label(
        lambda images, text: (orders.append(brighter_right(images)), honest(images, text))[1],
        shades(40),
        n_questions=4,
    )
    assert len(orders) == 160 and 0.35 < sum(orders) / 160 < 0.65
    assert len({tuple(orders[i : i + 4]) for i in range(0, 160, 4)}) >= 4


SAME = [
    ("bright", "dark"),
    ("light hair", "dark hair"),
    ("hair of the left person", "hair of the right person"),
]


@pytest.mark.parametrize("names", SAME)
@pytest.mark.parametrize("asks", [3, 4, 5])
def test_who_answers_by_position_is_not_trusted(names, asks):
    """Words that both names share are no agreement, and orders that come out alike must not pass for it."""
    found = label(lambda images, text: answer(*names), shades(40), n_questions=asks)
    assert sum(row.confident for row in found.rows) <= 4 and not any(
        row.error for row in found.rows
    )
    assert np.mean([row.confidence for row in found.rows]) < 0.6


@pytest.mark.parametrize("names", SAME[:2])
def test_who_guesses_is_rarely_trusted(names):
    rng = random.Random(0)
    found = label(lambda images, text: answer(*rng.sample(names, 2)), shades(60), n_questions=6)
    assert sum(row.confident for row in found.rows) <= 6


def test_another_voice_each_time_is_not_trusted():
    voices = iter([("red", "blue"), ("old", "young"), ("near", "far")])
    (row,) = label(lambda images, text: answer(*next(voices)), n_questions=3).rows
    assert row.confidence == 0 and not row.confident and row.error is None


def test_other_things_that_come_and_go_are_no_agreement():
    """All say that something is not there at the low end, and each means something else."""
    things = iter(["hat", "beard", "scarf"])

    def ask(images, text):
        thing = next(things)
        return honest(images, text, thing, f"no {thing}")

    (row,) = label(ask, n_questions=3).rows
    assert not row.confident and row.error is None


def test_the_name_is_what_most_say():
    names = iter(["pale", "sunny", "sunny"])
    (row,) = label(lambda images, text: honest(images, text, next(names)), n_questions=3).rows
    assert (row.high, row.low) == ("sunny", "dark") and 0.5 < row.confidence < 1


def test_how_much_agreement_is_enough_can_be_said():
    names = iter(["pale", "sunny", "sunny"] * 2)
    (row,), (other,) = [
        label(
            lambda images, text: honest(images, text, next(names)), n_questions=3, min_margin=least
        ).rows
        for least in (0.6, 0.7)
    ]
    assert row.confident and not other.confident and 0.6 < row.confidence == other.confidence < 0.7


# --- what is shown and asked -----------------------------------------------------------------------------------------


def shown(ends, **options):
    """All questions about sliders: pictures and text of each."""
    asked = []
    label(lambda images, text: (asked.append((images, text)), answer("a", "b"))[1], ends, **options)
    return asked


def samples_of(images):
    """The samples that pictures show, by their corners; both halves must be of one sample."""
    found = []
    for a, b in map(sides, images):
        assert (a[0, 0] == b[0, 0]).all()
        found.append(round(a[0, 0, 0] / 5))
    return found


@pytest.mark.parametrize("height, width", [(8, 8), (6, 12), (12, 6)])
def test_pictures_are_both_images_side_by_side_and_enlarged(height, width):
    images = torch.rand(1, 2, 1, 3, height, width, generator=torch.Generator().manual_seed(0))
    ((pictures, _), *_) = shown(EditPairs(["a"], images, PROMPT), size=48)
    (picture,), zoom = pictures, 48 // max(height, width)
    assert (
        isinstance(picture, Image.Image)
        and picture.mode == "RGB"
        and picture.height == height * zoom
    )
    expected = (
        (images[0, :, 0] * 255)
        .round()
        .byte()
        .permute(0, 2, 3, 1)
        .numpy()
        .repeat(zoom, 1)
        .repeat(zoom, 2)
    )
    pixels, wide = np.asarray(picture), width * zoom
    left, between, right = pixels[:, :wide], pixels[:, wide:-wide], pixels[:, -wide:]
    assert between.shape[1] > 0 and (between == 255).all()
    assert any(
        np.array_equal(left, a) and np.array_equal(right, b) for a, b in (expected, expected[::-1])
    )


def test_large_images_are_made_smaller():
    """A service is paid, and a small model limited, by the pixel."""
    ((pictures, _), *_) = shown(EditPairs(["a"], torch.rand(1, 2, 1, 3, 128, 128), PROMPT), size=32)
    assert pictures[0].height == 32 and 64 < pictures[0].width <= 64 + 8


def test_pairs_are_different_samples_and_others_each_time():
    asked = [samples_of(images) for images, _ in shown(shades(8, pairs=12), pairs=4)]
    assert all(len(set(samples)) == len(samples) == 4 for samples in asked)
    assert len({tuple(sorted(samples)) for samples in asked}) > len(asked) // 2
    assert set(sum(asked, [])) == set(range(12))


def test_fewer_pairs_than_asked_for_are_all_shown():
    assert all(
        sorted(samples_of(images)) == [0, 1, 2] for images, _ in shown(shades(pairs=3), pairs=9)
    )


def test_the_question_quotes_the_prompt_and_counts_the_pictures():
    prompt = 'a "{cat}" {0} {prompt}\n\\'
    ((pictures, text), *_) = shown(EditPairs(["a"], shades().latents, prompt), pairs=5)
    assert json.dumps(prompt) in text and "all 5 pictures" in text and len(pictures) == 5
    assert "list" not in text


def test_a_seed_asks_the_same_questions():
    def asked(**options):
        return [
            (samples_of(images), brighter_right(images), text)
            for images, text in shown(shades(4), **options)
        ]

    assert asked() == asked() == asked(seed=0) != asked(seed=1)


def test_images_are_those_of_the_model(model):
    """Portraits whose background was made blue, and eyes that look at corners."""
    before, after, _ = counterfactual_pairs(6, "background", "blue background")
    ends = EditPairs(
        ["it"], torch.stack([encoded(model, before), encoded(model, after)])[None], PROMPT
    )

    def colour(half):
        corner = half[:2, :2].reshape(-1, 3).mean(0)
        return (
            "blue background" if np.abs(corner - [0x93, 0xC5, 0xF3]).max() < 24 else "another one"
        )

    def ask(images, text):
        ((a, b),) = {(colour(left), colour(right)) for left, right in map(sides, images)}
        return answer(a, b)

    (row,) = label_with_vlm(model, ends, ask, progress=quiet).rows
    assert (row.high, row.low, row.confidence, row.error) == (
        "blue background",
        "another one",
        1,
        None,
    )


# --- answers ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "said",
    [
        '{"A": "Red  Hair.", "B": "Blue\\u00a0hair "}',
        '{"C": 1} {"A": "red hair", "B": "blue hair"}',
        '{"answer": {"A": "red hair", "B": "blue hair"}}',
        '[[{"A": "red hair", "B": "blue hair"}]]',
        'Sure! {x}\n```json\n{"why": [1], "B": "blue hair", "A": "red hair"}\n```',
    ],
)
def test_answers_are_found_wherever_they_stand(said):
    (row,) = label(lambda images, text: said).rows
    assert {row.high, row.low} == {"red hair", "blue hair"} and row.error is None


@pytest.mark.parametrize(
    "name", ["größer", "短い髪", "brother's hat", "black (dyed) hair", "3/4 view", "t-shirt & tie"]
)
def test_names_may_be_of_letters_and_plain_signs(name):
    (row,) = label(lambda images, text: answer(name, "other")).rows
    assert {row.high, row.low} == {name, "other"}


ANSWERS = {  # what is said -> what the error says of it
    "": "is empty",
    " \n": "is empty",
    None: "the answer",
    7: "the answer",
    b'{"A": "a", "B": "b"}': "the answer",
    "x" * 10_001: "the answer has 10001 characters",
    '{"A":' * 100_000: "the answer has 500000 characters",
    '{"A":' * 1_999: "no JSON object with A and B",
    '{"A":' + "[" * 9_000: "no JSON object with A and B",
    "{" * 10_000: "no JSON object with A and B",
    "I am sorry, I cannot help with that.": "no JSON object with A and B",
    '{"A": "red"}': "no JSON object with A and B",
    '["red", "blue"]': "no JSON object with A and B",
    '{"A": "red", "B": "blue"': "no JSON object with A and B",
    "{'A': 'red', 'B': 'blue'}": "no JSON object",
    '{"A": 1, "B": 2}': "has a name that is not",
    '{"A": null, "B": "b"}': "has a name that is not",
    '{"A": ["a"], "B": {"A": "a", "B": "b"}}': "has a name that is not",
    answer("a", ""): "has a name that is not",
    answer("red hair", "Red  hair."): "gives both ends one name: 'red hair'",
}
NAMES = [
    "<b>bold</b>",
    "<img src=x onerror=alert(1)>",
    "red\x07hair",
    "red\x00",
    "red\x1b[31m",
    "\u202ered",
    "re\u200bd",
    "\ufeffred",
    "\ud800",
    "../../etc/passwd",
    "/etc/passwd",
    "..\\windows",
    "c:\\windows",
    "~/.ssh",
    "{prompt}",
    "${HOME}",
    "$x_1$",
    "`rm`",
    "%s",
    "x" * 61,
    "...",
    "🙂",
]
ANSWERS |= {answer(name, "plain"): "has a name that is not" for name in NAMES}


@pytest.mark.parametrize(
    "said", ANSWERS, ids=lambda said: repr(said)[:40].encode("ascii", "replace").decode()
)
def test_a_wrong_answer_is_an_error_on_its_slider_alone(said):
    mine = []

    def ask(images, text):
        mine.append(said)
        return said if len(mine) == 1 else honest(images, text)

    bad, *good = label(ask, shades(3)).rows
    assert (bad.high, bad.low, bad.confidence, bad.confident) == ("", "", 0, False)
    assert bad.error.startswith("ValueError: the answer ") and ANSWERS[said] in bad.error
    assert bad.error.isprintable() and len(bad.error) < 300
    assert all(
        (row.high, row.low, row.error, row.confident) == ("bright", "dark", None, True)
        for row in good
    )


def test_an_echo_of_the_question_is_no_answer():
    (row,) = label(lambda images, text: text).rows
    assert row.error and not row.confident


def test_an_answer_behind_an_echo_is_found():
    """Models that think aloud repeat first what they are to do."""
    (row,) = label(
        lambda images, text: f"I was told: {text}\nMy answer: {honest(images, text)}"
    ).rows
    assert (row.high, row.low, row.confident) == ("bright", "dark", True)


# --- choices ---------------------------------------------------------------------------------------------------------


def test_names_may_be_given_to_choose_from():
    choices = ["bright", "dark", 'ligh"t']
    assert all(
        f"of this list: {json.dumps(choices)}" in text
        for _, text in shown(shades(), choices=choices)
    )
    (row,) = label(honest, choices=["dark", "bright", "medium"]).rows
    assert (row.high, row.low, row.confident) == ("bright", "dark", True)
    (row,) = label(
        partial(honest, high="Bright.", low=" dark"), choices=["dark", "bright", "medium"]
    ).rows
    assert (row.high, row.low, row.confident) == ("bright", "dark", True)
    (row,) = label(honest, choices=["dark", "light"]).rows
    assert "has a name that is not in the list: 'bright'" in row.error


SPELLED = [("Bright", "DARK"), ("light: bright", "light: dark"), ("Dr. No", "50 %"), ("a  b", "c.")]


@pytest.mark.parametrize("high, low", SPELLED)
def test_choices_are_given_as_they_are_spelled(high, low):
    """Answers may differ in capitals alone; the name is the choice."""

    def ask(images, text):
        said = (low.lower(), high.upper())
        return answer(*said if brighter_right(images) else said[::-1])

    (row,) = label(ask, choices=[high, low]).rows
    assert (row.high, row.low, row.error) == (high, low, None)


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(n_questions=1), "n_questions must be 2 or more, or there is no agreement, not 1"),
        (dict(pairs=0), "pairs must be 1 or more, not 0"),
        (dict(choices=[]), "choices"),
        (dict(choices=["bright"]), "choices"),
        (dict(choices=["bright", "Bright"]), "choices"),
        (dict(choices="bright"), "choices"),
        (dict(choices=["bright", 1]), "choices"),
        (dict(choices=["bright", " "]), "choices"),
    ],
)
def test_bad_input_is_refused_before_anything_is_asked(options, message):
    asked = []
    with pytest.raises(ValueError, match=message):
        label(lambda images, text: asked.append(text), **options)
    assert not asked


# --- exceptions ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "error, text",
    [
        (TimeoutError("timed out"), "TimeoutError: timed out"),
        (ConnectionError(), "ConnectionError: "),
        (RuntimeError("a\n  b\n" + "c" * 900), "RuntimeError: a b " + "c" * 196),
        (KeyError("x"), "KeyError: 'x'"),
    ],
)
def test_what_eyes_raise_is_an_error_on_its_slider_alone(error, text):
    asked = []

    def ask(images, _):
        asked.append(images)
        if len(asked) == 2:  # the second question about the first slider
            raise error
        return honest(images, _)

    bad, good = label(ask, shades(2)).rows
    assert (bad.error, bad.high, bad.low, bad.confidence, bad.confident) == (text, "", "", 0, False)
    assert (good.error, good.high, good.low, good.confident) == (None, "bright", "dark", True)
    assert len(asked) == 5  # no more questions about a slider that has failed


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit])
def test_an_interrupt_is_not_swallowed(error):
    def ask(images, text):
        raise error

    with pytest.raises(error):
        label(ask)


def test_a_failure_leaves_the_other_questions_as_they_are():
    def questions(fails):
        asked = []

        def ask(images, text):
            asked.append((samples_of(images), brighter_right(images)))
            if fails and len(asked) == 1:
                raise TimeoutError
            return honest(images, text)

        label(ask, shades(3))
        return asked[-6:]  # about the second slider and the third

    assert questions(True) == questions(False)


def test_labels_say_whose_eyes_they_are(tiny):
    assert label(honest).by == "honest" and label(partial(honest)).by == "eyes"
    named = partial(honest)
    named.name = "model-1"
    found = label(named)
    space = found.name(random_space(tiny, ["slider 0", "hat"]))
    assert space.labels == ["dark → bright", "hat"]
    assert space.rows[0]["note"] == "named by model-1, confidence 1.00; was slider 0"


def test_errors_in_html_are_text():
    def ask(images, text):
        raise RuntimeError("<script>alert(1)</script>")

    assert (
        "&lt;script&gt;" in label(ask)._repr_html_() and "<script" not in label(ask)._repr_html_()
    )


# --- services --------------------------------------------------------------------------------------------------------


@pytest.fixture
def service(monkeypatch):
    """A server on this machine: `requests` as (path, JSON), and `reply`, from JSON to (status, JSON)."""
    for name in ("NO_PROXY", "no_proxy"):
        monkeypatch.setenv(name, "127.0.0.1")
    for name in ("OPENAI_API_KEY", "OPENAI_BASE_URL", "ANTHROPIC_API_KEY", "ANTHROPIC_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    said = SimpleNamespace(requests=[], reply=None)

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            said.requests.append((self.path, body))
            status, answer = said.reply(body)
            content = json.dumps(answer).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *args):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    said.url = f"http://127.0.0.1:{server.server_port}"
    yield said
    server.shutdown()
    thread.join()
    server.server_close()


def of_anthropic(content, stop="end_turn"):
    return {
        "id": "msg_1",
        "type": "message",
        "role": "assistant",
        "model": "m",
        "content": content,
        "stop_reason": stop,
        "stop_sequence": None,
        "usage": {"input_tokens": 1, "output_tokens": 1},
    }


def of_openai(content, **more):
    message = {"role": "assistant", "content": content} | more
    return {
        "id": "c",
        "object": "chat.completion",
        "created": 0,
        "model": "m",
        "choices": [{"index": 0, "message": message, "finish_reason": "stop"}],
    }


def opened(data):
    image = Image.open(io.BytesIO(b64decode(data, validate=True)))
    assert image.format == "PNG" and image.mode == "RGB"
    return image


@pytest.fixture
def claude_there(service):
    import anthropic

    def made(**options):
        return anthropic_vlm(
            "claude-x",
            anthropic.Anthropic(base_url=service.url, api_key="x", max_retries=0),
            **options,
        )

    return made


@pytest.fixture
def openai_there(service):
    import openai

    def made(**options):
        client = openai.OpenAI(base_url=f"{service.url}/v1", api_key="x", max_retries=0)
        return openai_vlm("gpt-x", client=client, **options)

    return made


def test_claude_is_shown_the_pictures_and_asked(service, claude_there):
    def reply(body):
        *images, text = body["messages"][0]["content"]
        seen = [opened(part["source"]["data"]) for part in images]
        # what is not text, such as thoughts, is no part of the answer, and a text may come in pieces
        thought = {"type": "thinking", "thinking": answer("no", "thought"), "signature": "s"}
        said = [
            {"type": "text", "text": piece}
            for piece in (honest(seen, "")[:5], honest(seen, "")[5:])
        ]
        return 200, of_anthropic([thought, *said])

    service.reply = reply
    found = label(claude_there(tokens=77), shades(2), pairs=3)
    assert [(row.high, row.low, row.confident, row.error) for row in found.rows] == [
        ("bright", "dark", True, None)
    ] * 2
    assert found.by == "claude-x" and len(service.requests) == 6
    for path, body in service.requests:
        assert (path, body["model"], body["max_tokens"]) == ("/v1/messages", "claude-x", 77)
        (message,) = body["messages"]
        *images, text = message["content"]
        assert (
            message["role"] == "user"
            and text["type"] == "text"
            and json.dumps(PROMPT) in text["text"]
        )
        kinds = [
            (part["type"], part["source"]["type"], part["source"]["media_type"]) for part in images
        ]
        assert kinds == [("image", "base64", "image/png")] * 3


def test_openais_interface_is_shown_the_pictures_and_asked(service, openai_there):
    head = "data:image/png;base64,"

    def reply(body):
        *images, text = body["messages"][0]["content"]
        return 200, of_openai(
            honest([opened(part["image_url"]["url"].removeprefix(head)) for part in images], "")
        )

    service.reply = reply
    found = label(openai_there(tokens=77), shades(2), pairs=3)
    assert [(row.high, row.low, row.confident, row.error) for row in found.rows] == [
        ("bright", "dark", True, None)
    ] * 2
    assert found.by == "gpt-x" and len(service.requests) == 6
    for path, body in service.requests:
        assert (path, body["model"]) == ("/v1/chat/completions", "gpt-x")
        assert 77 in (body.get("max_tokens"), body.get("max_completion_tokens"))
        (message,) = body["messages"]
        *images, text = message["content"]
        assert (
            message["role"] == "user"
            and text["type"] == "text"
            and json.dumps(PROMPT) in text["text"]
        )
        assert all(
            part["type"] == "image_url" and part["image_url"]["url"].startswith(head)
            for part in images
        )
        assert len(images) == 3


def broken_at_first(service, broken, fine):
    """The first request gets one answer, all others another."""
    service.reply = lambda body: broken if len(service.requests) == 1 else fine


def assert_only_the_first_failed(found, text):
    bad, good = found.rows
    assert text in bad.error and (bad.high, bad.low, bad.confident) == ("", "", False)
    assert good.error is None and {good.high, good.low} == {"a", "b"}


@pytest.mark.parametrize(
    "broken, text",
    [
        (
            (500, {"type": "error", "error": {"type": "api_error", "message": "broken"}}),
            "InternalServerError: ",
        ),
        (
            (429, {"type": "error", "error": {"type": "rate_limit_error", "message": "slow"}}),
            "RateLimitError: ",
        ),
        ((200, of_anthropic([], "refusal")), "the answer is empty"),
        (
            (200, of_anthropic([{"type": "text", "text": '{"A": "cut'}], "max_tokens")),
            "no JSON object with A and B",
        ),
    ],
)
def test_claudes_errors_and_refusals_are_errors_on_one_slider(service, claude_there, broken, text):
    broken_at_first(
        service, broken, (200, of_anthropic([{"type": "text", "text": answer("a", "b")}]))
    )
    assert_only_the_first_failed(label(claude_there(), shades(2)), text)


@pytest.mark.parametrize(
    "broken, text",
    [
        ((500, {"error": {"message": "broken"}}), "InternalServerError: "),
        ((401, {"error": {"message": "no key"}}), "AuthenticationError: "),
        ((200, of_openai(None, refusal="I cannot look at people.")), "I cannot look at people."),
        ((200, of_openai(None)), "the answer is empty"),
        ((200, of_openai("Sorry, no.")), "no JSON object with A and B"),
        ((200, of_openai("") | {"choices": []}), "Error: "),
    ],
)
def test_errors_and_refusals_of_openais_interface_are_errors_on_one_slider(
    service, openai_there, broken, text
):
    broken_at_first(service, broken, (200, of_openai(answer("a", "b"))))
    assert_only_the_first_failed(label(openai_there(), shades(2)), text)


def test_a_service_of_ones_own_needs_no_key(service):
    """Such as vLLM or Ollama; what they know is `max_tokens`."""
    service.reply = lambda body: (200, of_openai(answer("a", "b")))
    assert label(openai_vlm("mine", base_url=f"{service.url}/v1")).rows[0].error is None
    assert all(body["max_tokens"] == 200 for _, body in service.requests)


def test_openais_own_models_get_the_limit_that_they_know(service, monkeypatch):
    """Its models since o1 answer 400 to `max_tokens`."""
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    monkeypatch.setenv("OPENAI_BASE_URL", f"{service.url}/v1")  # stands for OpenAI's
    wrong = "Unsupported parameter: 'max_tokens' is not supported with this model. Use 'max_completion_tokens' instead."

    def reply(body):
        if "max_tokens" in body:
            return 400, {"error": {"message": wrong, "code": "unsupported_parameter"}}
        return 200, of_openai(answer("a", "b"))

    service.reply = reply
    assert label(openai_vlm("gpt-x", tokens=300)).rows[0].error is None
    assert all(body["max_completion_tokens"] == 300 for _, body in service.requests)


@pytest.mark.parametrize(
    "url, limit",
    [
        ("https://api.openai.com/v1/", "max_completion_tokens"),
        ("http://localhost:11434/v1/", "max_tokens"),
    ],
)
def test_a_clients_limit_is_the_one_that_its_service_knows(url, limit):
    asked = []

    def create(**given):
        asked.append(given)
        return SimpleNamespace(
            choices=[SimpleNamespace(message=SimpleNamespace(content=answer("a", "b")))]
        )

    client = SimpleNamespace(
        base_url=url, chat=SimpleNamespace(completions=SimpleNamespace(create=create))
    )
    assert label(openai_vlm("gpt-x", client=client, tokens=300)).rows[0].error is None
    assert [{name: n for name, n in given.items() if "tokens" in name} for given in asked] == [
        {limit: 300}
    ] * 3


@pytest.mark.parametrize("eyes, package", [(anthropic_vlm, "anthropic"), (openai_vlm, "openai")])
def test_packages_that_are_missing_are_named(monkeypatch, eyes, package):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ImportError, match=r'these eyes need: pip install "sliderspace\[eyes\]"'):
        eyes("some-model")


# --- a model that runs here ------------------------------------------------------------------------------------------

WORDS = [
    "<s>",
    "</s>",
    "<image>",
    "<unk>",
    "USER",
    "ASSISTANT",
    "what",
    "is",
    "it",
    "red",
    "blue",
    "hair",
]
CHAT = (
    "<s>{% for m in messages %}{{ m['role'] | upper }} {% for c in m['content'] %}"
    "{% if c['type'] == 'image' %}<image> {% else %}{{ c['text'] }}{% endif %}{% endfor %}{% endfor %}"
    "{% if add_generation_prompt %} ASSISTANT{% endif %}"
)


@pytest.fixture(scope="module")
def tiny_llava(tmp_path_factory):
    """A folder with a random LLaVA of a dozen words, whose chat template and tokenizer both begin with <s>."""
    from transformers import (
        CLIPImageProcessor,
        CLIPVisionConfig,
        LlamaConfig,
        LlavaConfig,
        LlavaForConditionalGeneration,
        LlavaProcessor,
        PreTrainedTokenizerFast,
    )

    folder = tmp_path_factory.mktemp("llava")
    tokenizer = Tokenizer(
        models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>")
    )
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 0)]
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="</s>",
        unk_token="<unk>",
        extra_special_tokens={"image_token": "<image>"},
    )
    eyes = CLIPImageProcessor(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16})
    LlavaProcessor(
        eyes,
        fast,
        patch_size=8,
        vision_feature_select_strategy="default",
        chat_template=CHAT,
        num_additional_image_tokens=1,
    ).save_pretrained(folder)
    torch.manual_seed(0)
    small = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
    text = LlamaConfig(
        vocab_size=len(WORDS), bos_token_id=0, eos_token_id=1, pad_token_id=1, **small
    )
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(image_size=16, patch_size=8, **small),
        text_config=text,
        image_token_index=2,
        vision_feature_layer=-1,
        vision_feature_select_strategy="default",
    )
    LlavaForConditionalGeneration(config).save_pretrained(folder)
    return folder


@pytest.fixture
def generated(monkeypatch):
    """What the network is given, call by call; it says "red hair" and ends."""
    from transformers import LlavaForConditionalGeneration

    calls = []

    def generate(self, input_ids, **given):
        calls.append(dict(given, input_ids=input_ids))
        return torch.cat(
            [input_ids, torch.tensor([[WORDS.index(w) for w in ("red", "hair", "</s>")]])], 1
        )

    monkeypatch.setattr(LlavaForConditionalGeneration, "generate", generate)
    return calls


def plain(colour):
    return Image.new("RGB", (40, 20), colour)


def test_a_local_model_answers_the_same_every_time(tiny_llava):
    ask = transformers_vlm(tiny_llava, tokens=5)
    said = ask([plain("red"), plain("blue")], "what is it")
    assert isinstance(said, str) and set(said.split()) <= set(WORDS) and len(said.split()) <= 5
    assert (
        said
        == ask([plain("red"), plain("blue")], "what is it")
        == transformers_vlm(str(tiny_llava), tokens=5)([plain("red"), plain("blue")], "what is it")
    )


def test_a_local_model_sees_all_pictures_and_the_question(tiny_llava, generated):
    ask = transformers_vlm(tiny_llava, tokens=5)
    assert ask([plain("red"), plain("blue"), plain("white")], "what is it") == "red hair"
    (call,) = generated
    read = [WORDS[i] for i in call["input_ids"][0].tolist() if WORDS[i] not in ("<image>", "<s>")]
    assert read == ["USER", "what", "is", "it", "ASSISTANT"]
    assert call["pixel_values"].shape == (3, 3, 16, 16)
    red, blue, white = call["pixel_values"].mean((2, 3))
    assert red[0] > red[2] and blue[2] > blue[0] and (white >= torch.maximum(red, blue)).all()
    assert (call["max_new_tokens"], call["do_sample"]) == (5, False)


def test_a_local_model_reads_one_beginning(tiny_llava, generated):
    """The template has written it already: the tokenizer must not add a second one."""
    transformers_vlm(tiny_llava)([plain("red")], "what is it")
    assert (generated[0]["input_ids"] == WORDS.index("<s>")).sum() == 1


def test_what_a_local_model_stammers_is_an_error_on_each_slider(tiny_llava):
    found = label(transformers_vlm(tiny_llava, tokens=3), shades(2))
    assert all(
        row.error.startswith("ValueError: the answer ") and not row.confident for row in found.rows
    )
    assert found.by == str(tiny_llava)


def test_a_folder_without_a_model_says_what_to_do(tmp_path):
    for folder in (tmp_path, tmp_path / "none"):
        with pytest.raises(
            ValueError, match="weights of .* could not be loaded .*hf download .* local folder"
        ):
            transformers_vlm(folder)
