"""The training loop: a killed run goes on to the same bits, its log holds what happened once, watching changes nothing."""

import csv
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from sliderspace.portraits.fitting import Log, Run, train_network, half_precision, write_whole

DATA = torch.randn(64, 3, 8, 8, generator=torch.Generator().manual_seed(0))
OPTIONS = {
    "adamw": dict(lr=1e-2),
    "muon and average": dict(lr=1e-2, muon=1e-2, ema=0.9),
    "bfloat16": dict(lr=1e-2, ema=0.5, bf16=True),
    "captured": dict(lr=1e-2, muon=1e-2, ema=0.9, captured=True),
}
each_way = pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)


def network():
    """A small network with what makes resuming hard: convolutions in channels_last, running statistics, group norms."""
    torch.manual_seed(3)
    layers = (
        nn.Conv2d(3, 8, 3),
        nn.BatchNorm2d(8),
        nn.GroupNorm(2, 8),
        nn.Flatten(),
        nn.Linear(8 * 36, 1),
    )
    return nn.Sequential(*layers).to(memory_format=torch.channels_last)


def loss_on(module, stop_at=None):
    """A loss whose call number `stop_at` is the last."""
    calls = []

    def loss(gen):
        calls.append(1)
        if len(calls) == stop_at:
            raise KeyboardInterrupt
        x = DATA[torch.randint(64, (4,), generator=gen)]
        noise = torch.randn(x.shape, generator=gen)
        return (module(x + 0.1 * noise).float() - x.mean((1, 2, 3))[:, None]).pow(2).mean()

    return loss


def trained(folder, steps=12, **options):
    module = network()
    train_network("part", module, loss_on(module), steps, folder, every=5, log_every=2, **options)
    return load_file(folder / "part.safetensors")


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@each_way
@pytest.mark.parametrize("stop_at", [1, 3, 6, 9, 12])
def test_a_run_that_was_stopped_ends_in_the_same_bits(tmp_path, options, stop_at):
    whole = trained(tmp_path / "whole", **options)
    module = network()
    with pytest.raises(KeyboardInterrupt):
        train_network(
            "part",
            module,
            loss_on(module, stop_at),
            12,
            tmp_path / "cut",
            every=5,
            log_every=2,
            **options,
        )
    assert same(trained(tmp_path / "cut", **options), whole)
    tables = [(tmp_path / name / "part.csv").open(newline="") for name in ("whole", "cut")]
    rows = [[(row["step"], row["loss"]) for row in csv.DictReader(table)] for table in tables]
    assert rows[0] == rows[1] and [step for step, _ in rows[0]] == ["2", "4", "6", "8", "10", "12"]


def test_learning_takes_place(tmp_path):
    trained(tmp_path, steps=200, lr=1e-2)
    rows = list(csv.DictReader((tmp_path / "part.csv").open(newline="")))
    assert float(rows[-1]["loss"]) < 0.5 * float(rows[0]["loss"])


CHILD = """
import sys, time
sys.path.insert(0, {tests!r})
from pathlib import Path
from test_fitting import loss_on, network, train_network
module = network()
plain = loss_on(module)
def slow(gen):
    time.sleep(0.02)
    return plain(gen)
train_network("part", module, slow, 60, Path({folder!r}), every=4, log_every=2, lr=1e-2, muon=1e-2, ema=0.9)
"""


def test_a_killed_process_goes_on_to_the_same_bits(tmp_path):
    module = network()
    options = dict(every=4, log_every=2, lr=1e-2, muon=1e-2, ema=0.9)
    train_network("part", module, loss_on(module), 60, tmp_path / "whole", **options)
    folder = tmp_path / "killed"
    script = CHILD.format(tests=os.path.dirname(__file__), folder=str(folder))
    for checkpoints in (1, 3):  # killed twice, the second time after it had gone on
        child = subprocess.Popen([sys.executable, "-c", script])
        seen = set()
        while len(seen) < checkpoints:
            assert child.poll() is None, "it ended before it was killed"
            if (folder / "part.state").exists():
                seen.add((folder / "part.state").stat().st_mtime_ns)
            time.sleep(0.005)
        child.send_signal(signal.SIGKILL)
        child.wait()
    assert not (folder / "part.safetensors").exists()
    module = network()
    train_network("part", module, loss_on(module), 60, folder, **options)
    assert same(
        load_file(folder / "part.safetensors"), load_file(tmp_path / "whole" / "part.safetensors")
    )


@each_way
def test_watching_sees_averaged_weights_and_changes_nothing(tmp_path, options):
    seen = []

    def watch(module, step):
        assert not module.training
        seen.append((step, half_precision(module)))
        return {"step twice": 2 * step}

    plain = trained(tmp_path / "plain", **options)
    watched = trained(tmp_path / "watched", watch=watch, watch_every=0.0, **options)
    assert same(plain, watched)
    assert [step for step, _ in seen] == list(range(13))  # before the first step, and after each
    rows = list(csv.DictReader((tmp_path / "watched" / "part-figures.csv").open(newline="")))
    assert [int(row["step twice"]) for row in rows] == list(range(0, 26, 2))
    assert not same(seen[3][1], seen[4][1])


def test_the_average_is_that_of_the_weights(tmp_path):
    module = network()
    run = Run("part", module, tmp_path, 8, lr=1e-2, ema=0.9)
    loss = loss_on(module)
    expected = None
    for step in range(8):
        run.update(loss(torch.Generator().manual_seed(step)))
        decay = min(0.9, (step + 1) / (step + 10))
        weight = module[0].weight.detach()
        expected = weight.clone() if expected is None else expected * decay + weight * (1 - decay)
    torch.testing.assert_close(run.average.module[0].weight.detach(), expected)
    with run.averaged() as lent:
        assert torch.equal(lent[0].weight, run.average.module[0].weight)
    assert torch.equal(module[0].weight.detach(), weight)


def test_a_finished_part_returns_at_once(tmp_path):
    weights = trained(tmp_path, lr=1e-2)

    def never(gen):
        raise AssertionError("trained again")

    module = network()
    train_network("part", module, never, 12, tmp_path)
    assert same(
        half_precision(module),
        {n: v.half() if v.is_floating_point() else v for n, v in weights.items()},
    )


def test_another_length_is_refused(tmp_path):
    module = network()
    with pytest.raises(KeyboardInterrupt):
        train_network("part", module, loss_on(module, 8), 12, tmp_path, every=5, lr=1e-2)
    with pytest.raises(ValueError, match="steps=20: .*part.state was begun for 12"):
        train_network("part", module, loss_on(module), 20, tmp_path, every=5, lr=1e-2)


def test_a_loss_that_is_no_number_ends_the_run_and_keeps_the_checkpoint(tmp_path):
    module = network()
    plain, calls = loss_on(module), []

    def loss(gen):
        calls.append(1)
        return plain(gen) * (torch.nan if len(calls) > 7 else 1)

    with pytest.raises(
        RuntimeError, match="part: .*nan.* at step 8; the checkpoint holds the last good state"
    ):
        train_network("part", module, loss, 12, tmp_path, every=5, log_every=1, lr=1e-2)
    state = torch.load(tmp_path / "part.state", weights_only=True)
    assert state["step"] == 5 and all(v.isfinite().all() for v in state["module"].values())


def test_a_run_without_an_end_keeps_its_rate_and_resumes(tmp_path):
    module = network()
    with pytest.raises(KeyboardInterrupt):
        train_network(
            "part", module, loss_on(module, 31), None, tmp_path, every=10, lr=1e-2, warmup=10
        )
    state = torch.load(tmp_path / "part.state", weights_only=True)
    assert state["step"] == 30 and state["steps"] is None
    assert state["optimizer0"]["param_groups"][0]["lr"] == 1e-2
    with pytest.raises(KeyboardInterrupt):
        train_network(
            "part", module, loss_on(module, 11), None, tmp_path, every=10, lr=1e-2, warmup=10
        )
    assert torch.load(tmp_path / "part.state", weights_only=True)["step"] == 40


def test_compiling_that_fails_leaves_the_network_as_it_is(tmp_path, monkeypatch, capsys):
    module = network()

    def broken(*args, **options):
        raise RuntimeError("no compiler here")

    monkeypatch.setattr(
        nn.Module, "compile", lambda self, **options: setattr(self, "_compiled_call_impl", broken)
    )
    train_network(
        "part",
        module,
        loss_on(module),
        12,
        tmp_path / "compiled",
        every=5,
        log_every=2,
        lr=1e-2,
        compiled=(module,),
    )
    assert "compiling failed (RuntimeError): going on without" in capsys.readouterr().out
    assert same(
        load_file(tmp_path / "compiled" / "part.safetensors"), trained(tmp_path / "plain", lr=1e-2)
    )


def test_files_are_whole_or_not_there(tmp_path):
    path = tmp_path / "file"
    write_whole(path, lambda file: file.write(b"first"))

    def fails(file):
        file.write(b"sec")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_whole(path, fails)
    assert path.read_text() == "first"


def test_a_log_drops_rows_that_a_killed_run_had_ahead(tmp_path):
    log = Log(tmp_path / "log.csv", 0)
    for step in (2, 4, 6):
        log.add(step=step, loss=step / 3)
    again = Log(tmp_path / "log.csv", 4)
    again.add(step=6, loss=1.0, more=2.0)
    rows = list(csv.DictReader((tmp_path / "log.csv").open(newline="")))
    assert [row["step"] for row in rows] == ["2", "4", "6"] and rows[-1] == {
        "step": "6",
        "loss": "1",
        "more": "2",
    }


def test_two_processes_do_not_train_one_part(tmp_path):
    folder = tmp_path / "part"
    script = CHILD.format(tests=os.path.dirname(__file__), folder=str(folder))
    child = subprocess.Popen([sys.executable, "-c", script])
    try:
        while not (folder / "part.state").exists():
            assert child.poll() is None
            time.sleep(0.01)
        module = network()
        with pytest.raises(RuntimeError, match="another process trains 'part' in"):
            train_network("part", module, loss_on(module), 60, folder, lr=1e-2, muon=1e-2, ema=0.9)
    finally:
        child.kill()
        child.wait()


# --- steps that a GPU captures, whose arithmetic runs on a CPU too -----------------------------------------------------


def trained_plain(folder, **options):
    """Weights of a network without norms: a bias before one has no gradient but rounding, which Adam makes large."""
    torch.manual_seed(3)
    module = nn.Sequential(nn.Conv2d(3, 8, 3), nn.SiLU(), nn.Flatten(), nn.Linear(8 * 36, 1))
    train_network("part", module, loss_on(module), 12, folder, **options)
    return load_file(folder / "part.safetensors")


@pytest.mark.parametrize("muon", [0.0, 1e-2])
def test_a_captured_step_keeps_the_share_of_a_full_one_that_the_schedule_asks_for(tmp_path, muon):
    options = dict(lr=1e-2, muon=muon)
    plain = trained_plain(tmp_path / "plain", **options)
    captured = trained_plain(tmp_path / "captured", captured=True, **options)
    for name, value in plain.items():
        torch.testing.assert_close(captured[name], value, rtol=1e-3, atol=1e-4)


def test_networks_are_compiled_or_captured_not_both(tmp_path):
    module = network()
    with pytest.raises(ValueError, match="captured=True and compiled networks exclude each other"):
        train_network(
            "part", module, loss_on(module), 1, tmp_path, compiled=(module,), captured=True
        )
