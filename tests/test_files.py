"""Files are written whole or not at all, the same content as the same bytes, and what cannot be read is named."""

import os
import signal
import subprocess
import sys

import pytest
import torch
from safetensors.torch import save_file

from sliderspace.files import read_tensors, ensure_writable_dir, write_bytes, write_tensors

TENSORS = {"a": torch.arange(6.0).view(2, 3), "b": torch.tensor([1, -2]), "none": torch.zeros(0, 4)}
CARD = {"prompt": "“größer” <b>", "seed": 3, "rows": [1.5, None], "nested": {"b": 1, "a": 2}}


@pytest.fixture
def path(tmp_path):
    write_tensors(tmp_path / "some.safetensors", TENSORS, CARD, "space")
    return tmp_path / "some.safetensors"


# --- round trip ------------------------------------------------------------------------------------------------------


def test_reads_what_was_written(path):
    tensors, card = read_tensors(str(path), "space")
    assert card == CARD and tensors.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        assert torch.equal(tensors[name], tensor) and tensors[name].dtype == tensor.dtype


def test_views_and_weights_with_gradients_are_written(tmp_path):
    whole = torch.arange(12.0).view(3, 4).requires_grad_()
    write_tensors(tmp_path / "x", {"column": whole[:, 1], "turned": whole.T}, {}, "space")
    tensors, _ = read_tensors(tmp_path / "x", "space")
    assert torch.equal(tensors["column"], whole[:, 1]) and torch.equal(tensors["turned"], whole.T)


def test_the_same_content_gives_the_same_bytes(path):
    first = path.read_bytes()
    for _ in range(20):  # a hash map's order would show
        write_tensors(path, dict(reversed(TENSORS.items())), dict(reversed(CARD.items())), "space")
        assert path.read_bytes() == first


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_a_card_with_nan_is_refused_and_the_old_file_stays(path, number):
    old = path.read_bytes()
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_tensors(path, TENSORS, {"alignment": number}, "space")
    assert path.read_bytes() == old


# --- whole or not at all ---------------------------------------------------------------------------------------------

CHILD = """
import os, signal, sys
from sliderspace.files import write_bytes

os.replace = lambda *paths: os.kill(os.getpid(), signal.SIGKILL)  # all is written, nothing is renamed yet
write_bytes(sys.argv[1], b"new" * 1000)
"""


def test_a_killed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "file"
    write_bytes(path, b"old")
    child = subprocess.run([sys.executable, "-c", CHILD, path], stderr=subprocess.PIPE)
    assert child.returncode == -signal.SIGKILL, child.stderr.decode()
    assert path.read_bytes() == b"old"
    write_bytes(path, b"newer")
    assert path.read_bytes() == b"newer"


def test_data_is_on_the_disk_before_it_gets_its_name(tmp_path, monkeypatch):
    order, sync, replace = [], os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda file: (order.append("sync"), sync(file)))
    monkeypatch.setattr(os, "replace", lambda *paths: (order.append("rename"), replace(*paths)))
    write_bytes(tmp_path / "new" / "deep" / "file", b"data")
    assert order == ["sync", "rename"]
    assert [p.name for p in (tmp_path / "new" / "deep").iterdir()] == ["file"]


# --- what cannot be read or written ----------------------------------------------------------------------------------

DAMAGES = {
    "cut at the end": lambda data: data[:-8],
    "cut in the header": lambda data: data[:40],
    "cut in the length": lambda data: data[:3],
    "empty": lambda data: b"",
    "something before it": lambda data: b"{}" + data,
    "a header without end": lambda data: b"\xff" * 8 + data[8:],
    "no JSON in the header": lambda data: data[:8] + b"x" + data[9:],
    "text": lambda data: b"<html>not found</html>",
    "no JSON in the card": lambda data: data.replace(rb'"card":"{\"', rb'"card":"[\"'),
    "no card": lambda data: data.replace(b'"card":', b'"cord":'),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_named_with_its_file(path, damage):
    data = path.read_bytes()
    path.write_bytes(DAMAGES[damage](data))
    assert path.read_bytes() != data
    with pytest.raises(
        ValueError, match=r"some\.safetensors' is damaged or not a safetensors file .*another copy"
    ):
        read_tensors(path, "space")


def test_other_files_are_refused(path, tmp_path):
    with pytest.raises(
        ValueError, match=r"some\.safetensors' is a sliderspace space file, wanted: samples"
    ):
        read_tensors(path, "samples")
    save_file(TENSORS, tmp_path / "lora.safetensors")
    with pytest.raises(
        ValueError, match=r"lora\.safetensors' is not a sliderspace file, wanted: space"
    ):
        read_tensors(tmp_path / "lora.safetensors", "space")


def test_missing_files_are_refused(tmp_path):
    for path in (tmp_path / "nothing", tmp_path):
        with pytest.raises(FileNotFoundError, match=f"no such file: '{path}'"):
            read_tensors(path, "space")


def test_a_folder_is_made_and_left_empty(tmp_path):
    assert ensure_writable_dir(str(tmp_path / "a" / "b")) == tmp_path / "a" / "b"
    assert list((tmp_path / "a" / "b").iterdir()) == []


def test_unwritable_folders_are_refused(tmp_path):
    (tmp_path / "file").touch()
    for folder in (tmp_path / "file", tmp_path / "file" / "deeper"):
        message = f"cannot write into folder '{folder}': .*; name another folder"
        with pytest.raises(ValueError, match=message):
            ensure_writable_dir(folder)
        with pytest.raises(ValueError, match=message):
            write_bytes(folder / "x", b"")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_without_permission_is_refused(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(
        ValueError, match="cannot write into folder .*: Permission denied; name another folder"
    ):
        ensure_writable_dir(tmp_path)
