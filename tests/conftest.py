"""What all tests share: which of them run here, no downloads, one thread."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported; sums come out the same on every machine

import pytest
import torch

FLAGS = ("slow", "gpu", "net")


def pytest_addoption(parser):
    for flag in FLAGS:
        parser.addoption(f"--{flag}", action="store_true", help=f"run what is marked {flag}, in tests and in notebooks")


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
