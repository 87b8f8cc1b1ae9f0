"""The command does the whole job twice alike, says in a line what is wrong, and ships with its model."""

import os
import shutil
import subprocess
import sys
import zipfile
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import pytest
from PIL import Image
from tiny import never

import sliderspace
from sliderspace import cli
from sliderspace.cli import main
from sliderspace.directions.discovery import Directions
from sliderspace.models.loading import load
from sliderspace.sliders.space import SliderSpace

ROOT = Path(__file__).parents[1]


def python(*arguments, folder, **environment):
    """Run Python in another folder, with this package on its path."""
    environment = os.environ | {"PYTHONPATH": str(ROOT)} | environment
    return subprocess.run(
        [sys.executable, *map(str, arguments)],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
    )


# --- the whole job ---------------------------------------------------------------------------------------------------

SMALL = ["demo", "--samples", "24", "--sliders", "2", "--training-steps", "1", "--seed", "3"]
PICTURES = [
    "spectrum.png",
    "ends.png",
    "report.png",
    "sliders.png",
    "strips/00.png",
    "strips/01.png",
]
FILES = ["index.html", "space.safetensors", "directions.safetensors", "table.csv", *PICTURES]


def written(folder):
    return {
        p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()
    }


@contextmanager
def few():
    """Fewer rows, images and strengths than the command's: all steps of the job, in seconds."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cli, "train", partial(cli.train, init_latents=16, n_held_out=4))
        patch.setattr(cli, "measure", partial(cli.measure, samples=2, strengths=(-1, 0, 1)))
        yield


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """The folder of a small demo."""
    folder = tmp_path_factory.mktemp("demo") / "first"
    with few():
        assert main([*SMALL, "--output", str(folder)]) == 0
    return folder


def test_a_demo_writes_its_files(demo, model):
    files = written(demo)
    assert {name for name in files if not name.startswith(("samples/", "training/"))} == set(FILES)
    assert sorted(Path(name).name for name in files if name.startswith("training/")) == [
        "start.safetensors",
        "state.safetensors",
    ]
    assert sorted(Path(name).name for name in files if name.startswith("samples/")) == [
        "features-000000-24.safetensors",
        "latents-000000-24.safetensors",
    ]
    for name in PICTURES:
        Image.open(demo / name).verify()
    space = SliderSpace.load(demo / "space.safetensors", model)
    assert len(space) == 2 and {"effect", "alignment"} <= space.card["sliders"][0].keys()
    assert len(Directions.load(demo / "directions.safetensors").vectors) == 2 + 8
    assert files["table.csv"].decode().count("\n") == 3


def test_the_same_seed_gives_the_same_bytes(demo, tmp_path, capsys):
    with few():
        assert main([*SMALL, "--output", str(tmp_path / "second")]) == 0
    assert f"Look at   {tmp_path / 'second' / 'index.html'}" in capsys.readouterr().out
    first, second = written(demo), written(tmp_path / "second")
    assert [name for name in first if first[name] != second[name]] == []
    assert first.keys() == second.keys()


def test_another_model_by_its_folder_and_size(tiny_folder, tmp_path, capsys):
    """The lines that the command ends with load the sliders that it wrote, on the model as it was."""
    folder, out = tiny_folder("epsilon"), tmp_path / "own"
    more = [
        "--model",
        str(folder),
        "--encoder",
        "pixels-4",
        "--size",
        "32",
        "--steps",
        "2",
        "--guidance",
        "1",
    ]
    with few():
        assert main([*SMALL, *more, "--output", str(out)]) == 0
    lines = [line.strip() for line in capsys.readouterr().out.splitlines()[-3:]]
    check = "print(model.size, model.steps, model.guidance, len(space), len(board(model, space).sliders))"
    code = "\n".join([*lines[:-1], lines[-1].replace("board(model, ", "space = ")[:-1], check])
    ran = python("-c", code, folder=tmp_path)
    assert ran.stdout.split() == "(32, 32) 2 1.0 2 2".split(), ran.stderr
    assert Directions.load(out / "directions.safetensors").samples.run.steps == 2


# --- bad input -------------------------------------------------------------------------------------------------------


@pytest.fixture
def complaint(capsys, tmp_path):
    """Arguments -> the one line that the command leaves on stderr, after progress bars."""

    def run(*arguments, output=tmp_path / "out"):
        status = main(["demo", "--output", str(output), *arguments])
        out, err = capsys.readouterr()
        assert status == 1 and out == "" and "Traceback" not in err
        *bars, line = err.strip().splitlines()
        assert all("%|" in bar or not bar.strip() for bar in bars), err
        assert line.startswith("sliderspace: ")
        return line

    return run


QUICK = {
    "sliders must be 1 to 100, not 0": ["--sliders", "0"],
    "sliders must be 1 to 100, not -1": ["--sliders", "-1"],
    "sliders must be 1 to 100, not 1000": ["--sliders", "1000"],
    "samples must be 16 or more, not 15": ["--samples", "15"],
    "training_steps must be 0 or more, not -2": ["--training-steps", "-2"],
}


@pytest.mark.parametrize("message", QUICK)
def test_bad_numbers_are_refused_before_the_model_is_loaded(complaint, monkeypatch, message):
    monkeypatch.setattr(cli, "load", never)
    assert message in complaint(*QUICK[message])


BAD = {
    "prompt must be a non-empty text, not ''": ["--prompt", ""],
    "prompt must be a non-empty text, not ' '": ["--prompt", " "],
    "unknown model 'stable-confusion': give one of ['portraits'": ["--model", "stable-confusion"],
    "steps must be 1 or more, not 0": ["--steps", "0"],
    "guidance must be 0 or more, not nan": ["--guidance", "nan"],
    "size must be (height, width) in pixels, not (0, 0)": ["--size", "0"],
    "have to be divisible by 8 but are 65 and 65": ["--size", "65"],
    "open_clip knows no model 'eye'": ["--encoder", "eye"],
    "pretrained='nobody' is no weights file and no weights tag of ViT-B-32": [
        "--encoder",
        "ViT-B-32:nobody",
    ],
}


@pytest.mark.parametrize("message", BAD)
def test_bad_input_is_refused_before_sampling(complaint, monkeypatch, message):
    monkeypatch.setattr("sliderspace.directions.discovery.collect_features", never)
    assert message in complaint(*BAD[message])


def test_another_model_needs_an_encoder(complaint, tiny_folder):
    assert "encoder=None is only for the bundled model: name one" in complaint(
        "--model", str(tiny_folder("epsilon"))
    )


DAMAGES = {
    "weights cut": lambda folder: cut(folder / "unet" / "diffusion_pytorch_model.safetensors"),
    "weights gone": lambda folder: (
        folder / "unet" / "diffusion_pytorch_model.safetensors"
    ).unlink(),
    "part gone": lambda folder: shutil.rmtree(folder / "vae"),
    "no JSON": lambda folder: cut(folder / "model_index.json"),
}


def cut(path):
    path.write_bytes(path.read_bytes()[:100])


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_model_is_refused(complaint, tiny_folder, tmp_path, damage):
    folder = tmp_path / "broken-model"
    shutil.copytree(tiny_folder("epsilon"), folder)
    DAMAGES[damage](folder)
    assert "broken-model" in complaint("--model", str(folder), "--encoder", "latents")


def test_a_folder_that_cannot_be_written_is_refused_before_any_work(
    complaint, tmp_path, monkeypatch
):
    monkeypatch.setattr(cli, "load", never)
    (tmp_path / "file").touch()
    for output in (tmp_path / "file", tmp_path / "file" / "deeper"):
        assert f"cannot write into folder '{output}'" in complaint(output=output)


def test_a_damaged_sample_file_is_named(demo, complaint, tmp_path):
    shutil.copytree(demo / "samples", tmp_path / "out" / "samples")
    [file] = (tmp_path / "out").rglob("features-*")
    file.write_bytes(b"not tensors")
    assert "features-000000-24.safetensors' is damaged" in complaint(*SMALL[1:])


def test_ctrl_c_is_no_error(tmp_path, monkeypatch, capsys):
    def stopped(source, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "load", stopped)
    assert main(["demo", "--output", str(tmp_path)]) == 130
    assert f"stopped; what was made is kept in {tmp_path} and used again" in capsys.readouterr().err


def test_other_errors_are_not_hidden(tmp_path, monkeypatch):
    def broken(source, **options):
        raise RuntimeError("a bug")

    monkeypatch.setattr(cli, "load", broken)
    with pytest.raises(RuntimeError, match="a bug"):
        main(["demo", "--output", str(tmp_path)])


@pytest.mark.parametrize(
    "arguments", [[], ["demon"], ["demo", "--samples", "many"], ["demo", "--slider-count", "3"]]
)
def test_unknown_words_are_refused(arguments, capsys):
    with pytest.raises(SystemExit, match="2"):
        main(arguments)
    assert "usage: sliderspace" in capsys.readouterr().err


def test_help_and_status_of_the_command(tmp_path):
    run = "import sys; from sliderspace.cli import main; sys.exit(main())"
    told = python("-c", run, "demo", "--help", folder=tmp_path)
    assert told.returncode == 0 and told.stderr == ""
    for option in "--prompt --model --encoder --samples --sliders --method --training-steps --seed --output".split():
        assert option in told.stdout
    assert "(default: 400)" in told.stdout
    refused = python("-c", run, "demo", "--sliders", "0", folder=tmp_path)
    assert (refused.returncode, refused.stderr) == (
        1,
        "sliderspace: sliders must be 1 to 100, not 0\n",
    )


# --- what is shipped -------------------------------------------------------------------------------------------------

SDIST = "import sys; from setuptools.build_meta import build_sdist; print(build_sdist(sys.argv[1]))"


@pytest.fixture(scope="module")
def unpacked(tmp_path_factory):
    """A folder with what an installed wheel holds: made from the source distribution, so that both are whole."""
    folder = tmp_path_factory.mktemp("packages")
    source = folder / "source"
    source.mkdir()
    for name in (
        "pyproject.toml",
        "setup.py",
        "settings.ini",
        "MANIFEST.in",
        "README.md",
        "LICENSE",
        "NOTICE",
    ):
        shutil.copy(ROOT / name, source)
    shutil.copytree(
        ROOT / "sliderspace", source / "sliderspace", ignore=shutil.ignore_patterns("__pycache__")
    )
    made = python("-c", SDIST, folder, folder=source)
    assert made.returncode == 0, made.stderr
    (sdist,) = folder.glob("*.tar.gz")
    made = python(
        "-m",
        "pip",
        "wheel",
        "--no-deps",
        "--no-build-isolation",
        "--no-index",
        "-w",
        folder,
        sdist,
        folder=folder,
    )
    assert made.returncode == 0, made.stderr
    (wheel,) = folder.glob("*.whl")
    assert sdist.stat().st_size <= 60e6 and wheel.stat().st_size <= 60e6
    with zipfile.ZipFile(wheel) as packed:
        packed.extractall(folder / "installed")
    return folder / "installed"


def test_the_wheel_holds_the_modules_and_the_bundled_model(unpacked):
    mine, theirs = (written(folder / "sliderspace") for folder in (ROOT, unpacked))
    kept = {n for n in mine if "__pycache__" not in n and not n.endswith(".pyc")}
    assert {n for n in theirs if n.startswith("assets/")} and kept == set(theirs)
    assert [n for n in theirs if theirs[n] != mine[n]] == []
    entry = next(unpacked.glob("*.dist-info")) / "entry_points.txt"
    assert "sliderspace=sliderspace.cli:main" in entry.read_text().replace(" ", "")


def test_the_wheel_works_elsewhere(unpacked, tmp_path):
    code = "import sliderspace; print(sliderspace.__file__, sliderspace.load('portraits', device='cpu').latent_shape)"
    ran = python("-c", code, folder=tmp_path, PYTHONPATH=str(unpacked))
    assert ran.returncode == 0, ran.stderr
    shape = load("portraits", device="cpu").latent_shape
    assert ran.stdout.strip() == f"{unpacked / 'sliderspace' / '__init__.py'} {shape}"
    assert not ROOT.samefile(Path(ran.stdout.split()[0]).parents[1]) and sliderspace.__version__
