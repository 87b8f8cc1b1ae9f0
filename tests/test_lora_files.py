"""Sliders from elsewhere are read whole or refused; ours have the names that other programs read."""

import json
import os
import re

import pytest
import torch
from families import make
from safetensors.torch import load_file, save_file
from tiny import PROMPT, random_space
from torch.testing import assert_close

from sliderspace import SliderSpace, load, load_lora
from sliderspace.sampling.generate import sample, initial_noise


@pytest.fixture(scope="module", params=["sdxl", "flux-dev", "qwen-image", "pixart-sigma"])
def model(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("loras") / request.param
    make(request.param, folder)
    return load(folder, device="cpu", size=(16, 16), steps=2)


def changes(space):
    """Change of each layer's weights at strength 1."""
    return {
        n: torch.einsum(
            "or...,r...->o...", up.flatten(2).squeeze(2) if up.ndim > 2 else up, space.down[n]
        )
        if up.ndim == 2
        else torch.einsum("or,rihw->oihw", up.flatten(1), space.down[n])
        for n, up in space.up.items()
    }


@pytest.mark.parametrize("targets", ["attention", "full"])
@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_our_exports_come_back(model, tmp_path, targets, suffix):
    space = random_space(model, ["one"], rank=2, targets=targets)
    (path,) = space.export(tmp_path, {0: 1.0})
    if suffix == ".pt":
        torch.save(load_file(path), path := path.with_suffix(".pt"))
    again = load_lora(path, model)
    assert again.labels == ["mix"] and again.rank == 2 and again.down.keys() == space.down.keys()
    for n, change in changes(again).items():
        assert_close(change, changes(space)[n], rtol=1e-5, atol=1e-6)
    noise = initial_noise(model, 0, [0])
    with space.on(model, {0: 0.7}):
        ours = sample(model, PROMPT, noise, 2, 1.0)
    with again.on(model, {0: 0.7}):
        assert_close(sample(model, PROMPT, noise, 2, 1.0), ours, rtol=1e-4, atol=1e-4)


def test_alpha_counts(model, tmp_path):
    space = random_space(model, ["one"], rank=2)
    state = {}
    for n, down in space.down.items():
        stem = "lora_unet_" + n.replace(".", "_")
        state |= {
            f"{stem}.lora_down.weight": down,
            f"{stem}.lora_up.weight": space.up[n],
            f"{stem}.alpha": torch.tensor(1.0),
        }
    torch.save(state, tmp_path / "age.pt")  # as the released Concept Sliders
    age = load_lora(tmp_path / "age.pt", model, "age")
    assert age.labels == ["age"]
    for n, change in changes(age).items():
        assert_close(change, 0.5 * changes(space)[n])


def test_alpha_of_diffusers_metadata_counts(model, tmp_path):
    space = random_space(model, ["one"], rank=2)
    (path,) = space.export(tmp_path, {0: 1.0}, "diffusers")
    about = {
        "lora_adapter_metadata": json.dumps(
            {f"{model.denoiser_name}.lora_alpha": 1, f"{model.denoiser_name}.r": 2}
        )
    }
    save_file(load_file(path), path, about)
    for n, change in changes(load_lora(path, model)).items():
        assert_close(change, 0.5 * changes(space)[n], rtol=1e-5, atol=1e-6)


def test_names_are_those_that_other_programs_read(model, tmp_path):
    # ComfyUI's rules: kohya names of unets are the diffusers path with underscores; of transformers, the path itself
    space = random_space(model, ["one"])
    (path,) = space.export(tmp_path)
    layers = {n for n, _ in model.denoiser.named_modules()}
    keys = load_file(path).keys()
    if model.denoiser_name == "unet":
        pattern, known = (
            r"lora_unet_(\w+)\.(lora_down\.weight|lora_up\.weight|alpha)",
            {n.replace(".", "_") for n in layers},
        )
    else:
        pattern, known = r"transformer\.([\w.]+)\.lora_[AB]\.weight", layers
    assert keys and all((m := re.fullmatch(pattern, k)) and m[1] in known for k in keys)
    if model.denoiser_name == "transformer":
        with pytest.raises(ValueError, match="format='kohya' is for unets"):
            space.export(tmp_path, format="kohya")


# --- refused ---------------------------------------------------------------------------------------------------------


def broken(model, tmp_path, change):
    (path,) = random_space(model, ["one"]).export(tmp_path, format="diffusers")
    state = load_file(path)
    change(state)
    save_file(state, path)
    return path


def first(state, end):
    return next(k for k in state if k.endswith(end))


BROKEN = {
    "1 keys that name no layer": lambda s: s.update(
        {"unet.nowhere.lora_A.weight": torch.zeros(1, 4)}
    ),
    "lacks a projection of": lambda s: s.pop(first(s, "lora_B.weight")),
    "is for another model: at": lambda s: s.update(
        {first(s, "lora_A.weight"): torch.zeros(1, 999)}
    ),
    "has several ranks": lambda s: s.update(
        {
            (k := first(s, "lora_A.weight")): s[k].repeat(2, 1),
            (k := k.replace("_A", "_B")): s[k].repeat(1, 2),
        }
    ),
}


@pytest.mark.parametrize("message", BROKEN)
def test_files_that_do_not_fit_are_refused(model, tmp_path, message):
    with pytest.raises(ValueError, match=message):
        load_lora(broken(model, tmp_path, BROKEN[message]), model)


class Evil:
    def __reduce__(self):
        return (open, ("/tmp/sliderspace-was-here", "w"))


def test_code_in_a_file_is_not_run(model, tmp_path):
    path = tmp_path / "evil.pt"
    path.write_bytes(b"cos\nsystem\n(S'touch /tmp/sliderspace-was-here'\ntR.")  # a bare pickle
    with pytest.raises(ValueError, match="evil.pt"):
        load_lora(path, model)
    torch.save({"a": Evil()}, path)
    with pytest.raises(ValueError, match="evil.pt"):
        load_lora(path, model)
    assert not os.path.exists("/tmp/sliderspace-was-here")


@pytest.mark.parametrize("content", [b"", b"no", [torch.zeros(1)]])
def test_other_files_are_refused(model, tmp_path, content):
    path = tmp_path / "file.pt"
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        torch.save(content, path)
    with pytest.raises(ValueError, match="file.pt"):
        load_lora(path, model)
    with pytest.raises(FileNotFoundError, match="no such file"):
        load_lora(tmp_path / "nowhere.pt", model)


def test_an_imported_slider_is_kept_in_a_space_file(model, tmp_path):
    (path,) = random_space(model, ["one"]).export(tmp_path)
    load_lora(path, model).save(tmp_path / "space.safetensors")
    assert SliderSpace.load(tmp_path / "space.safetensors", model).card["imported"] == path.name
