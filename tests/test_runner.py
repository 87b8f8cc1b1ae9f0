"""Experiments: checked before work, kept as they grow, the same however they are run."""

import json
import os
import runpy
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from statistics import mean, stdev

import numpy as np
import pytest
from families import sdxl
from matplotlib.figure import Figure
from scipy.stats import spearmanr
from tiny import never, quiet

from sliderspace.experiments import runner as experiments
from sliderspace.experiments import trial as trials
from sliderspace.features.encoders import get_encoder
from sliderspace.experiments.runner import Experiment, vary_one, run_experiment, smoke_test
from sliderspace.experiments.metrics import MEASURES
from sliderspace.experiments.results import Results, plot_results, rank_correlation
from sliderspace.experiments.trial import TrialConfig

SMALL = dict(
    samples=16,
    encoder="pixels-4",
    judge="pixels-4",
    sliders=3,
    training_steps=2,
    init_latents=4,
    noised=4,
    held_out=2,
    mixed=4,
    loading={"steps": 2, "guidance": 1.5},
)


@pytest.fixture(scope="module")
def experiment(tiny_folder):
    setup = TrialConfig(str(tiny_folder())).vary(SMALL)
    return Experiment("rank", vary_one("rank", [1, 2]), setup, (0, 1), ("trained", "edits"))


@pytest.fixture(scope="module")
def results(experiment, tmp_path_factory):
    return run_experiment(experiment, tmp_path_factory.mktemp("experiment"), progress=quiet)


STUDIES = Path(__file__).parent.parent / "nbs" / "ablations"


def timeless(results):
    return [
        row | {"figures": {n: v for n, v in row["figures"].items() if n != "seconds"}}
        for row in results.rows
    ]


# --- bad input -------------------------------------------------------------------------------------------------------

BAD = {
    "ways must name one or more": dict(ways={}),
    "way 'a': train has no option 'rnak'": dict(ways={"a": {"rnak": 1}}),
    "way 'b': samples must be 16": dict(ways={"a": {}, "b": {"samples": 2}}),
    "seeds must be one or more": dict(seeds=()),
    "seeds must be one or more whole numbers from 0, no two alike": dict(seeds=(1, 1)),
    "seeds must be one or more whole numbers from 0, .* not \\(0.5,\\)": dict(seeds=(0.5,)),
    "seeds must be one or more whole numbers from 0, .* not \\(-1,\\)": dict(seeds=(-1,)),
    "ways must name one or more.*, not {1: ": dict(ways={1: {"rank": 1}}),
    "ways must name one or more.*, not {'a': None}": dict(ways={"a": None}),
    "measures must be one or more of": dict(measures=()),
    "measures must be of .*, not 'speed'": dict(measures=("speed",)),
    "name must be letters": dict(name="../table"),
    "way 'a': factors are known of the bundled models alone": dict(
        setup=TrialConfig("sdxl"), measures=("factors",)
    ),
}


@pytest.mark.parametrize("message", BAD)
def test_bad_experiments_are_refused_before_any_work(message, monkeypatch, tmp_path):
    monkeypatch.setattr(experiments, "load", never)
    with pytest.raises(ValueError, match=message):
        run_experiment(
            Experiment(**dict(name="x", ways={"a": {}}) | BAD[message]), tmp_path / "none"
        )
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"encoder": "no-such-thing"}, "way 'b': .*no-such-thing"),
        ({"targets": "atention"}, "way 'b': targets='atention' matches no layer"),
        ({"rank": 4096}, "way 'b': rank must be 1 to"),
        ({"used_from": 0.9999}, "way 'b': active_from=0.9999 leaves none"),
    ],
)
def test_what_does_not_suit_the_model_is_refused_before_the_first_way(
    experiment, monkeypatch, tmp_path, changes, message
):
    monkeypatch.setattr(experiments, "run_trial", never)
    with pytest.raises(ValueError, match=message):
        run_experiment(replace(experiment, ways={"a": {}, "b": changes}), tmp_path)


def test_a_measure_of_ones_own_needs_one_process(experiment, monkeypatch, tmp_path):
    monkeypatch.setitem(MEASURES, "mine", lambda judged: {"x": 1.0})
    own = replace(experiment, ways={"a": {}}, seeds=(0,), measures=("mine",))
    with pytest.raises(
        ValueError,
        match="measure 'mine' is not known to other processes: processes must be 1, not 2",
    ):
        run_experiment(own, tmp_path, 2)
    assert run_experiment(own, tmp_path, progress=quiet).values("a", "x") == [1.0]


def test_a_bad_number_of_processes_is_refused(experiment):
    with pytest.raises(ValueError, match="processes must be 1 or more, not 0"):
        run_experiment(experiment, None, 0)


# --- the table -------------------------------------------------------------------------------------------------------


def test_a_row_for_each_way_and_seed(experiment, results):
    assert [(row["way"], row["seed"]) for row in results.rows] == [
        (f"rank {r}", s) for r in (1, 2) for s in (0, 1)
    ]
    assert [row["changes"] for row in results.rows] == [{"rank": 1}] * 2 + [{"rank": 2}] * 2
    assert results.values("rank 2", "weights")[0] == 2 * results.values("rank 1", "weights")[0]
    assert all(len(each) == 3 for each in results.per_slider("rank 1", "alignment"))
    assert results.values("rank 1", "alignment") == [
        mean(each) for each in results.per_slider("rank 1", "alignment")
    ]


FIGURES = [("a", 0, 1.0), ("a", 1, 3.0), ("b", 1, [5.0, None, 7.0]), ("b", 0, 2.0)]
TABLE = Results("t", {}, [dict(way=w, changes={}, seed=s, figures={"x": v}) for w, s, v in FIGURES])


def test_means_and_spreads_are_over_seeds():
    assert TABLE.values("b", "x") == [2, 6]  # by seed; the mean of the sliders that have one
    assert TABLE.table() == [
        ["", "x"],
        ["a", f"{2:.3g} ± {stdev([1, 3]):.2g}"],
        ["b", f"{4:.3g} ± {stdev([2, 6]):.2g}"],
    ]
    assert TABLE.paired_difference("b", "a", "x") == (2, stdev([1, 3]))


def test_some_figures_alone_are_a_table_too():
    both = Results(
        "t",
        {"model": "m"},
        [
            dict(way="a", changes={}, seed=0, figures={"x": 1.0, "y": [2.0, 4.0]}),
            dict(way="b", changes={}, seed=0, figures={"x": 5.0}),
        ],
    )
    assert (
        both[["y"]].table() == [["", "y"], ["a", "3"], ["b", ""]]
        and both[["y"]].setup == both.setup
    )
    assert both[["y", "x"]].table()[0] == ["", "y", "x"]
    with pytest.raises(KeyError, match="no figure 'z': there are"):
        both[["x", "z"]]


def test_ways_are_held_against_each_other_seed_by_seed():
    values = {"a": [1.0, 10.0, 20.0], "b": [None, 10.0, 20.0], "c": [None] * 3}
    table = Results(
        "t",
        {},
        [
            dict(way=w, changes={}, seed=s, figures={"x": v})
            for w, vs in values.items()
            for s, v in enumerate(vs)
        ],
    )
    assert table.paired_difference("a", "b", "x") == (0, 0)
    with pytest.raises(ValueError, match="for no seed both"):
        table.paired_difference("a", "c", "x")
    for way, name in (("typo", "x"), ("a", "typo")):
        with pytest.raises(KeyError, match="no .* 'typo': there are"):
            table.paired_difference(way, "b", name)


def test_unknown_ways_and_figures_are_named():
    with pytest.raises(KeyError, match="no way 'c'"):
        TABLE.values("c", "x")
    with pytest.raises(KeyError, match="no figure 'x': there are \\[\\]"):
        Results("empty", {}, [])["x"]
    with pytest.raises(KeyError, match="no figure 'y'"):
        TABLE.per_slider("a", "y")
    with pytest.raises(KeyError, match="no figure 'y'"):
        _ = TABLE["y"]


def test_tables_are_read_as_they_were_written(tmp_path):
    TABLE.save(tmp_path / "t.json")
    again = Results.load(tmp_path / "t.json")
    assert (again.name, again.setup, again.rows) == (TABLE.name, TABLE.setup, TABLE.rows)
    for text in (
        "{",
        "{}",
        '{"name": 1, "other": 2}',
        "[1]",
        '{"name": "x", "setup": {}, "rows": 3}',
        '{"name": "x", "setup": {}, "rows": [{"way": "a"}]}',
    ):
        (tmp_path / "bad.json").write_text(text)
        with pytest.raises(ValueError, match="no table of an experiment"):
            Results.load(tmp_path / "bad.json")


@pytest.mark.parametrize(
    "value, text",
    [
        (99.7, "99.7"),
        (999.6, "1,000"),
        (123456.0, "123,456"),
        (0.01234, "0.0123"),
        (-1523.0, "-1,523"),
    ],
)
def test_large_numbers_are_written_out(value, text):
    row = dict(way="a", changes={}, seed=0, figures={"art": value})
    assert Results("t", {}, [row]).table()[1] == ["a", text]
    other = row | dict(
        seed=1, figures={"art": value + 2**0.5 * 99.7}
    )  # a standard deviation that rounds to 100
    assert Results("t", {}, [row, other]).table()[1][1].endswith(" ± 100")


def test_names_of_ways_are_escaped():
    hostile = Results("t", {}, [dict(way="<b>$x$", changes={}, seed=0, figures={"<i>": 1.0})])
    assert "<b>" not in hostile._repr_html_() and "<i>" not in hostile._repr_html_()
    plot_results(hostile, ["<i>"]).savefig(os.devnull, format="png")


def test_a_panel_for_each_figure(results):
    picture = plot_results(results, ["alignment", "overlap"])
    assert isinstance(picture, Figure) and [ax.get_title() for ax in picture.axes] == [
        "alignment",
        "overlap",
    ]
    with pytest.raises(KeyError, match="no figure 'speed'"):
        plot_results(results, ["speed"])


@pytest.mark.parametrize("judge", ["", " (other)"])
def test_a_line_for_what_is_so_without_sliders(judge):
    def panels(base):
        figures = {f"art{judge}": 3.0, f"art without sliders{judge}": base, "overlap": 0.5}
        return plot_results(
            Results("t", {}, [dict(way="a", changes={}, seed=0, figures=figures)]),
            [f"art{judge}", "overlap"],
        )

    lines = [
        [line.get_xdata() for line in ax.lines if line.get_linestyle() == ":"]
        for ax in panels(7.0).axes
    ]
    assert lines == [[[7.0, 7.0]], []]
    assert not any(
        line.get_linestyle() == ":" for ax in panels(None).axes for line in ax.lines
    )  # another model


# --- kept, and found again -------------------------------------------------------------------------------------------


def test_what_is_kept_is_not_made_again(experiment, tmp_path, monkeypatch):
    first = run_experiment(experiment, tmp_path, progress=quiet)
    assert Results.load(tmp_path / "rank.json").rows == first.rows
    monkeypatch.setattr(experiments, "run_trial", never)
    assert run_experiment(experiment, tmp_path, progress=quiet).rows == first.rows
    more = Experiment("rank", experiment.ways, experiment.setup, (0, 2), experiment.measures)
    with pytest.raises(AssertionError, match="work began"):
        run_experiment(more, tmp_path, progress=quiet)
    assert Results.load(tmp_path / "rank.json").rows == first.rows
    fewer = Experiment("rank", experiment.ways, experiment.setup, (0,), experiment.measures)
    assert (
        len(run_experiment(fewer, tmp_path, progress=quiet).rows)
        == len(Results.load(tmp_path / "rank.json").rows)
        == 2
    )


def test_an_error_loses_nothing_that_was_measured(experiment, tmp_path, monkeypatch):
    real, calls = MEASURES["edits"], []

    def sometimes(judged):
        calls.append(judged.trial.seed)
        if len(calls) == 3:
            raise RuntimeError("no memory")
        return real(judged)

    monkeypatch.setitem(MEASURES, "edits", sometimes)
    with pytest.raises(RuntimeError, match="no memory"):
        run_experiment(experiment, tmp_path, progress=quiet)
    assert len(Results.load(tmp_path / "rank.json").rows) == 2
    assert len(run_experiment(experiment, tmp_path, progress=quiet).rows) == 4
    assert len(calls) == 5  # the one that failed once more, and the last


def test_other_code_measures_again(experiment, tmp_path, monkeypatch):
    one = Experiment("one", {"a": {}}, experiment.setup, (0,), ("edits",))
    run_experiment(one, tmp_path, progress=quiet)
    monkeypatch.setitem(MEASURES, "edits", lambda judged: {"similarity": 7.0})
    assert "overlap" in run_experiment(one, tmp_path, progress=quiet).names
    monkeypatch.setattr("sliderspace.experiments.trial._code", lambda: "other")
    assert run_experiment(one, tmp_path, progress=quiet).rows[0]["figures"] == {"similarity": 7.0}


def test_what_is_not_finite_is_no_number(experiment, tmp_path, monkeypatch):
    def broken(judged):
        return {"x": [1.0, float("nan"), float("inf")], "y": float("nan")}

    monkeypatch.setitem(MEASURES, "edits", broken)
    one = run_experiment(
        Experiment("one", {"a": {}}, experiment.setup, (0,), ("edits",)), tmp_path, progress=quiet
    )
    assert one.rows[0]["figures"] == {"x": [1.0, None, None], "y": None}
    assert one.values("a", "x") == [1.0] and one.values("a", "y") == []
    assert one.table()[1] == ["a", "1", ""]
    assert json.loads((tmp_path / "one.json").read_text()) == json.loads(json.dumps(vars(one)))


CHILD = """
import os, signal, sys
from sliderspace.experiments import runner as experiments
from sliderspace.experiments.runner import Experiment, run_experiment, vary_one
from sliderspace.experiments.trial import TrialConfig
save, saved = experiments.Results.save, []
def kill_after(results, path):
    save(results, path)
    saved.append(path)
    if len(saved) == 3: os.kill(os.getpid(), signal.SIGKILL)
experiments.Results.save = kill_after
setup = TrialConfig(sys.argv[1]).vary({small})
run_experiment(Experiment("rank", vary_one("rank", [1, 2]), setup, (0, 1), ("trained", "edits")), sys.argv[2], progress=lambda x, **_: x)
"""


def test_a_run_that_was_killed_goes_on(experiment, results, tmp_path):
    child = subprocess.run(
        [
            sys.executable,
            "-c",
            CHILD.replace("{small}", repr(SMALL)),
            experiment.setup.model,
            tmp_path,
        ],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[1],
    )
    assert child.returncode == -signal.SIGKILL, child.stderr
    assert timeless(Results.load(tmp_path / "rank.json")) == timeless(results)[:3]
    assert timeless(run_experiment(experiment, tmp_path, progress=quiet)) == timeless(results)


def test_several_processes_find_the_same(experiment, results, tmp_path):
    assert timeless(run_experiment(experiment, tmp_path, 2, quiet)) == timeless(results)


PARENT = """
import os, sys, threading, time
from pathlib import Path
from sliderspace.experiments.runner import Experiment, run_experiment, vary_one
from sliderspace.experiments.trial import TrialConfig
if __name__ == "__main__":
    def die():
        while not list(Path(sys.argv[2]).glob("*.lock")): time.sleep(.05) # a process has begun
        os.kill(os.getpid(), 9)
    threading.Thread(target=die).start()
    setup = TrialConfig(sys.argv[1]).vary({small})
    run_experiment(Experiment("rank", vary_one("rank", [1, 2]), setup, (0, 1), ("trained",)), sys.argv[2], 2, lambda x, **_: x)
"""


def test_processes_end_with_the_one_that_began_them(experiment, results, tmp_path):
    script, folder = tmp_path / "parent.py", tmp_path / "made"
    script.write_text(PARENT.replace("{small}", repr(SMALL)))
    env = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])}
    child = subprocess.Popen(
        [sys.executable, script, experiment.setup.model, folder], env=env, start_new_session=True
    )
    assert child.wait() == -signal.SIGKILL
    for _ in range(100):  # its session's processes
        left = subprocess.run(
            ["ps", "-s", str(child.pid), "-o", "pid="], capture_output=True, text=True
        ).stdout.split()
        if not left:
            break
        time.sleep(0.1)
    assert not left
    assert timeless(run_experiment(experiment, folder, progress=quiet)) == timeless(results)


def test_a_process_that_fails_says_why(experiment, tmp_path, monkeypatch):
    monkeypatch.setattr(Experiment, "check", lambda self: None)
    bad = Experiment(
        "bad", {"a": {"encoder": "no-such-thing"}}, experiment.setup, (0,), ("trained",)
    )
    with pytest.raises(ValueError, match="no-such-thing"):
        run_experiment(bad, tmp_path, 2, quiet)


# --- at a size for tests, and ranks ----------------------------------------------------------------------------------


def test_a_shrunk_experiment_has_no_large_number_and_the_same_ways():
    large = Experiment(
        "x",
        {
            "many": {"samples": 900, "sliders": 64},
            "rank 16": {"rank": 16},
            "no PCA": {"parts": "random"},
            "prompts": {"prompt": list("abcdefgh")},
        },
        TrialConfig().vary({"training_steps": 80, "sliders": 40, "used": 30}),
        (3, 4),
    )
    small = smoke_test(large)
    small.check()
    assert (
        list(small.ways) == list(large.ways) and small.seeds == (3,) and large.setup.samples == 300
    )
    for changes in small.ways.values():
        made = small.setup.vary(changes)
        assert (
            made.samples,
            made.sliders,
            made.used,
            made.options["training_steps"],
            made.mixed,
        ) == (
            16,
            2,
            2,
            1,
            8,
        )
    assert small.ways["rank 16"]["rank"] == 2 and small.ways["prompts"]["prompt"] == list("abcd")


def test_ranks_are_spearmans():
    rng = np.random.default_rng(0)
    x, y = rng.random((3, 12)), rng.random((3, 12))
    found = rank_correlation((x**3).tolist(), y.tolist())
    each = [spearmanr(a, b).statistic for a, b in zip(x, y)]
    assert found.value == pytest.approx(np.tanh(np.arctanh(each).mean()))
    assert -1 <= found.low < found.value < found.high <= 1
    assert rank_correlation(x.tolist(), (-x).tolist()).value == pytest.approx(-1, abs=1e-5)
    assert rank_correlation([[1, 2, 3, 4, None]], [[1, 2, 3, 4, 0]]).value == pytest.approx(
        1, abs=1e-5
    )
    assert rank_correlation([[1, 2, 3, 4]], [[5, 5, 5, 5]]).value == 0


@pytest.mark.parametrize(
    "weight, rho", [(0, 0.0), (1, 0.690), (2, 0.885)]
)  # rho of normal x and weight x + normal noise
def test_intervals_of_ranks_hold_what_is_true(weight, rho):
    rng, held = np.random.default_rng(1), 0
    for _ in range(300):
        x = rng.standard_normal((3, 32))
        found = rank_correlation(x.tolist(), (weight * x + rng.standard_normal((3, 32))).tolist())
        held += found.low <= rho <= found.high
    assert 0.92 <= held / 300 <= 0.985


@pytest.mark.parametrize(
    "x, y",
    [
        ([], []),
        ([[1, 2, 3]], [[1, 2, 3]]),
        ([[1, 2, 3, 4]], [[1, 2, 3]]),
        ([[1, 2, 3, 4]], []),
        ([[1, 2, 3, 4]], [[1, 2, 3, None]]),
    ],
)
def test_ranks_need_the_same_sliders(x, y):
    with pytest.raises(ValueError, match="the same sliders"):
        rank_correlation(x, y)


# --- a real model's family -------------------------------------------------------------------------------------------


def test_the_same_experiment_runs_on_sdxl(tmp_path):
    sdxl().save_pretrained(tmp_path / "sdxl")
    setup = TrialConfig(str(tmp_path / "sdxl")).vary(
        {n: v for n, v in SMALL.items() if n != "init_latents"}
    )
    ways = {
        "principal": {},
        "random": {"directions": "random"},
        "no directions": {"parts": "clusters"},
    }
    found = run_experiment(
        Experiment("sdxl", ways, setup, (0,), ("trained", "edits", "mixes")),
        tmp_path,
        progress=quiet,
    )
    assert found.ways == list(ways) and found.names[:2] == ["weights", "seconds"]
    assert all(
        len(found.values(way, "overlap")) == len(found.values(way, "diversity")) == 1
        for way in ways
    )


OTHERS = (
    "no_pca",
    "singular_values",
    "pixel_space",
    "rank",
    "window",
    "additions",
)  # which take a minute or two each


@pytest.mark.parametrize(
    "study", ["number_of_directions", *(pytest.param(s, marks=pytest.mark.slow) for s in OTHERS)]
)
def test_a_study_runs_on_sdxl_by_its_name_alone(study, tmp_path, monkeypatch):
    sdxl().save_pretrained(tmp_path / "sdxl")
    monkeypatch.setenv("SLIDERSPACE_SMALL", "1")
    clip = {"ViT-L-14:openai": "portraits-clip"}  # whose weights are a download
    monkeypatch.setattr(
        trials, "get_encoder", lambda spec, model: get_encoder(clip.get(spec, spec), model)
    )
    cells = json.loads((STUDIES / f"{study}.ipynb").read_text("utf-8"))["cells"]
    code = "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "code")
    assert code.count("TrialConfig(") == 1
    (tmp_path / "study.py").write_text(
        code.replace("TrialConfig(", f"TrialConfig({str(tmp_path / 'sdxl')!r}, "), "utf-8"
    )
    found = runpy.run_path(str(tmp_path / "study.py"))["results"]
    assert found.setup["model"] == str(tmp_path / "sdxl") and len(found.rows) == len(found.ways)
    assert all(
        found.values(way, "overlap") and not found.values(way, "selectivity") for way in found.ways
    )
    assert "overlap" in found._repr_html_()
