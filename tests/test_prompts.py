"""One prompt becomes many, and a folder of pictures becomes samples: all that is wrong with it is said at once."""

import json
import re

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import PROMPT
from tokenizers import Tokenizer, models, pre_tokenizers
from torch.testing import assert_close
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from sliderspace.sampling.prompts import (
    PROMPT_MODIFIERS,
    expand_prompt,
    local_llm,
    load_image,
    load_image_folder,
)

# --- prompts ---------------------------------------------------------------------------------------------------------


def test_phrases_make_different_prompts_the_same_every_time():
    found = expand_prompt("a cat", 200)
    assert (
        found[0] == "a cat" and len(set(found)) == 200 and all(p.startswith("a cat") for p in found)
    )
    assert found == expand_prompt("a cat", 200) != expand_prompt("a cat", 200, seed=1)
    assert all(
        any(phrase in " ".join(found) for phrase in kind) for kind in PROMPT_MODIFIERS.values()
    )
    assert sorted(expand_prompt("a", 4, phrases={"x": ["b", "c", "d"]})) == [
        "a",
        "a, b",
        "a, c",
        "a, d",
    ]


def test_a_language_models_prompts_are_parsed_wherever_they_stand():
    asked = []

    def ask(text):
        asked.append(text)
        return f"Sure [1]:\n```json\n{json.dumps([f'cat {len(asked)}.{i}' for i in range(3)] + ['a cat', 7, ''])}\n```"

    assert expand_prompt("a cat", 6, ask) == [
        "a cat",
        "cat 1.0",
        "cat 1.1",
        "cat 1.2",
        "cat 2.0",
        "cat 2.1",
    ]
    assert len(asked) == 2 and '"a cat"' in asked[0]


EVIL = "__import__('os').system('touch evil')"


@pytest.mark.parametrize(
    "answer", ["", "no", "[", "[" * 100_000, "{}", '["one"', EVIL, f"[{EVIL}]", "[1, 2]", None]
)
def test_answers_without_prompts_are_an_error(answer, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(
        ValueError, match="ask gave 0 prompts as a JSON array of strings in 3 answers, wanted 4"
    ):
        expand_prompt("a cat", 5, lambda text: answer)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(prompt=" "), "prompt must be a non-empty text"),
        (dict(count=0), "count must be 1 to"),
        (dict(count=5, phrases={"x": ["b", "c", "d"]}), "count must be 1 to 4, not 5"),
    ],
)
def test_bad_input_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        expand_prompt(**dict(prompt="a cat", count=5) | options)


def test_a_language_model_of_transformers_answers(tmp_path):
    words = {w: i for i, w in enumerate(["<eos>", "a", "cat", "[", "]"])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="a"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<eos>"
    ).save_pretrained(tmp_path)
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=5, n_positions=64, n_embd=16, n_layer=1, n_head=2, bos_token_id=0, eos_token_id=0
    )
    GPT2LMHeadModel(config).save_pretrained(tmp_path)
    ask = local_llm(tmp_path, tokens=5)
    assert (
        isinstance(ask("a cat"), str)
        and ask("a cat") == ask("a cat")
        and "a cat a cat" not in ask("a cat a cat")
    )
    with pytest.raises(ValueError, match="language model .*none' could not be loaded"):
        local_llm(tmp_path / "none")


# --- pictures --------------------------------------------------------------------------------------------------------


def drawn(size=(24, 16), seed=0, mode="RGB"):
    rng = np.random.default_rng(seed)
    return Image.fromarray(rng.integers(0, 255, (*size[::-1], 3), dtype=np.uint8)).convert(mode)


def test_captions_come_from_the_nearest_text(tmp_path):
    (tmp_path / "cats").mkdir()
    for i, name in enumerate(("a.png", "b.jpg", "cats/c.webp", "cats/d.png")):
        drawn(seed=i).save(tmp_path / name)
    (tmp_path / "b.txt").write_text("\ufeff  a bee\nin a tree ", encoding="utf-8")
    (tmp_path / "cats" / "caption.txt").write_text("größte Katze", encoding="utf-8")
    (tmp_path / "cats" / "d.txt").write_text(" ")  # as good as none
    (tmp_path / ".hidden.png").write_bytes(b"")
    (tmp_path / "notes.md").write_text("no picture")
    found = load_image_folder(tmp_path, PROMPT)
    assert [p.name for p in found.paths] == ["a.png", "b.jpg", "c.webp", "d.png"]
    assert found.captions == (PROMPT, "a bee in a tree", "größte Katze", "größte Katze")
    assert (
        load_image_folder(tmp_path, "hat").identity
        != found.identity
        == load_image_folder(tmp_path, PROMPT).identity
    )


def test_the_same_picture_counts_once(tmp_path):
    image = drawn()
    for name in ("a.png", "b.bmp", "z.tiff"):
        image.save(tmp_path / name)
    turned = image.transpose(Image.Transpose.ROTATE_90)
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 270 degrees
    turned.save(tmp_path / "turned.png", exif=exif)
    drawn(seed=1).save(tmp_path / "other.png")
    assert [p.name for p in load_image_folder(tmp_path, PROMPT).paths] == ["a.png", "other.png"]


@pytest.mark.parametrize("size", [(40, 10), (10, 40), (16, 16), (200, 150), (1, 1)])
def test_pictures_are_padded_and_never_stretched(tmp_path, size):
    Image.new("RGB", size, (255, 0, 0)).save(tmp_path / "red.png")
    image = load_image_folder(tmp_path, PROMPT).read([0], (32, 48))[0]
    assert image.shape == (3, 32, 48)
    red = (image[1] < 0.5).nonzero()
    height, width = (red.amax(0) - red.amin(0) + 1).tolist()
    scale = min(32 / size[1], 48 / size[0])
    assert abs(height - size[1] * scale) <= 1 and abs(width - size[0] * scale) <= 1
    assert_close(image[:, image[1] > 0.5], torch.ones_like(image[:, image[1] > 0.5]))


def test_modes_are_read_as_seen(tmp_path):
    ramp = np.linspace(0, 65535, 64).reshape(8, 8)
    Image.fromarray(ramp.astype(np.uint16)).save(tmp_path / "sixteen.png")
    assert_close(
        torch.from_numpy(np.array(load_image(tmp_path / "sixteen.png"))[..., 0] / 255),
        torch.from_numpy(ramp) / 65535,
        rtol=0,
        atol=1 / 255,
    )
    clear = Image.new("RGBA", (4, 4), (200, 0, 0, 0))
    clear.save(tmp_path / "clear.png")
    assert load_image(tmp_path / "clear.png").getpixel((0, 0)) == (255, 255, 255)
    Image.new("RGBA", (4, 4), (200, 0, 0, 255)).convert("P").save(tmp_path / "palette.png")
    for mode, name in (
        ("L", "grey.png"),
        ("1", "bits.png"),
        ("CMYK", "print.jpg"),
        ("LA", "alpha.png"),
    ):
        drawn(mode="L" if mode == "LA" else mode if mode != "CMYK" else "RGB").convert(mode).save(
            tmp_path / name
        )
    for path in tmp_path.iterdir():
        assert load_image(path).mode == "RGB"


def test_all_that_is_wrong_is_in_one_error(tmp_path):
    drawn().save(tmp_path / "fine.png")
    (tmp_path / "fine.txt").write_text("fine")
    drawn(seed=1).save(tmp_path / "bare.png")
    drawn(seed=2).save(tmp_path / "latin.png")
    (tmp_path / "latin.txt").write_bytes("größer".encode("latin-1"))
    (tmp_path / "text.jpg").write_text("not a picture")
    drawn((64, 64)).save(tmp_path / "cut.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "cut.png").read_bytes()[:2000])
    (tmp_path / "empty.gif").write_bytes(b"")
    with pytest.raises(ValueError) as caught:
        load_image_folder(tmp_path)
    text = str(caught.value)
    assert "5 of 6 pictures in" in text and "fine.png" not in text
    for name, why in (
        ("bare.png", "has no caption: write bare.txt"),
        ("latin.png", "has a caption that is not UTF-8"),
        ("text.jpg", "cannot be read"),
        ("cut.png", "cannot be read"),
        ("empty.gif", "cannot be read"),
    ):
        assert re.search(f"{name} {why}", text), text


def test_folders_without_pictures_are_refused(tmp_path):
    (tmp_path / "a.txt").write_text("a")
    for folder in (tmp_path, tmp_path / "none"):
        with pytest.raises(ValueError, match="holds no pictures"):
            load_image_folder(folder, PROMPT)
