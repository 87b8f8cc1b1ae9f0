"""What all tests share: which of them run here, no downloads, one thread."""

import os
from functools import lru_cache

os.environ.setdefault(
    "OMP_NUM_THREADS", "1"
)  # before torch is imported; sums come out the same on every machine

import pytest
import torch

FLAGS = ("slow", "gpu", "net")


def pytest_addoption(parser):
    for flag in FLAGS:
        parser.addoption(
            f"--{flag}",
            action="store_true",
            help=f"run what is marked {flag}, in tests and in notebooks",
        )


def pytest_configure(config):
    if not config.getoption("--net"):
        os.environ["HF_HUB_OFFLINE"] = "1"
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))


def skipped(config):
    """Flags whose tests and notebook cells don't run: those not asked for, but for `gpu` where there is one."""
    here = {"gpu": torch.cuda.is_available()}
    return {flag for flag in FLAGS if not (config.getoption(f"--{flag}") or here.get(flag))}


@pytest.fixture
def skipped_flags(request):
    return skipped(request.config)


def pytest_collection_modifyitems(config, items):
    for item in items:
        for flag in skipped(config):
            if flag in item.keywords:
                item.add_marker(pytest.mark.skip(reason=f"needs --{flag}"))


# Fixtures import late: what imports huggingface_hub must find HF_HUB_OFFLINE set. On the CPU bits are comparable.


@pytest.fixture(scope="session")
def model():
    """The bundled model."""
    from sliderspace import load

    return load("portraits", device="cpu")


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory):
    """Prediction type (and seed, words) -> a diffusers folder with a tiny random pipeline."""
    from tiny import tiny_pipeline

    @lru_cache
    def folder(*args, **options):
        path = tmp_path_factory.mktemp("pipelines") / "tiny"
        tiny_pipeline(*args, **options).save_pretrained(path)
        return path

    return folder


@pytest.fixture(scope="session")
def tiny_of(tiny_folder):
    """Prediction type -> a tiny model loaded from its folder, shared by all tests."""
    from sliderspace import load

    return lru_cache(lambda *args, **options: load(tiny_folder(*args, **options), device="cpu"))


@pytest.fixture
def tiny(tiny_of):
    """The tiny model with epsilon prediction; sliders left on it are taken off."""
    from sliderspace.sliders.space import detach

    yield tiny_of("epsilon")
    detach(tiny_of("epsilon"))


@pytest.fixture
def fresh(tiny_folder):
    """A tiny model of the test's own."""
    from sliderspace import load

    return load(tiny_folder("epsilon"), device="cpu")
