"""The house rules: modules are what the notebooks export, import only backwards, and do nothing unsafe."""

import ast
import copy
import importlib
import inspect
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
from IPython.core.inputtransformer2 import TransformerManager
from nbdev.clean import clean_nb
from nbdev.doclinks import nbglob

import sliderspace

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted(nbglob(ROOT / "nbs", as_path=True))
MODULES = sorted(
    path
    for path in (ROOT / "sliderspace").rglob("*.py")
    if path.name not in ("__init__.py", "_modidx.py")
)


def name_in_package(path):
    """The dotted name of a module inside the package, such as `viz.plots`."""
    return ".".join(path.relative_to(ROOT / "sliderspace").with_suffix("").parts)


each_module = pytest.mark.parametrize("path", MODULES, ids=name_in_package)
each_notebook = pytest.mark.parametrize(
    "path", NOTEBOOKS, ids=lambda path: path.relative_to(ROOT / "nbs").as_posix()
)


def module_order():
    """Names of the modules, in the order of the numbered notebooks that export them."""
    numbered = [path for path in NOTEBOOKS if path.relative_to(ROOT / "nbs").parts[0][0].isdigit()]
    texts = [path.read_text("utf-8") for path in numbered]
    return [
        match[1] for text in texts if (match := re.search(r"#\|\s*default_exp\s+([\w.]+)", text))
    ]


def text_files():
    """Files that git keeps or would keep, but for binary ones."""
    command = [
        "git",
        "-c",
        "safe.directory=*",
        "ls-files",
        "-z",
        "--cached",
        "--others",
        "--exclude-standard",
    ]
    names = subprocess.run(
        command, cwd=ROOT, check=True, capture_output=True, text=True
    ).stdout.split("\0")
    for path in (ROOT / name for name in names if name):
        if path.is_file() and b"\0" not in (content := path.read_bytes()):
            yield path, content.decode("utf-8")


# --- modules and notebooks belong together ---------------------------------------------------------------------------


def python_files(folder):
    """Content of a folder's modules; what makes a folder a package is not made by a notebook."""
    paths = [path for path in folder.rglob("*.py") if path.name != "__init__.py"]
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}


def test_modules_are_what_the_notebooks_export(tmp_path):
    shutil.copytree(ROOT / "nbs", tmp_path / "nbs")
    shutil.copy(ROOT / "settings.ini", tmp_path)
    (tmp_path / "sliderspace").mkdir()
    shutil.copy(ROOT / "sliderspace/__init__.py", tmp_path / "sliderspace")
    export = "from nbdev.doclinks import nbdev_export; nbdev_export()"
    subprocess.run([sys.executable, "-c", export], cwd=tmp_path, check=True)
    made, kept = python_files(tmp_path / "sliderspace"), python_files(ROOT / "sliderspace")
    assert sorted(made) == sorted(kept), (
        "a module without a notebook, or a notebook without its module"
    )
    changed = [name for name in made if made[name] != kept[name]]
    assert not changed, f"run nbdev_export: {changed} differ from their notebooks"


def own_imports(path):
    """(line, module of this package) for every import in a module, those inside functions included."""
    packages = ["sliderspace", *name_in_package(path).split(".")[:-1]]
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            above = packages[: len(packages) + 1 - node.level] if node.level else []
            names = [".".join([*above, *([node.module] if node.module else [])])]
            if (ROOT / names[0].replace(".", "/")).is_dir():
                names = [f"{names[0]}.{alias.name}" for alias in node.names]
        for name in names:
            if name.split(".")[0] == "sliderspace":
                yield node.lineno, name.partition(".")[2]


@each_module
def test_modules_import_only_earlier_ones(path):
    order = module_order()
    allowed = {*order[: order.index(name_in_package(path))], "__version__"}
    wrong = [f"line {line}: {name!r}" for line, name in own_imports(path) if name not in allowed]
    assert not wrong, f"{path.name} may import {sorted(allowed)} of this package, not {wrong}"


# --- form ------------------------------------------------------------------------------------------------------------


@each_module
def test_lines_fit_a_screen(path):
    _, _, cells = path.read_text("utf-8").partition("# %% ../")  # what is above, nbdev writes
    assert not [line for line in cells.splitlines() if len(line) > 120]


# --- safety ----------------------------------------------------------------------------------------------------------


def unsafe(tree):
    """What could run code that came with data, or hides where a name comes from."""
    picklers = {"pickle", "cloudpickle", "dill", "joblib", "marshal", "shelve"}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = {alias.name for alias in node.names} | {getattr(node, "module", None) or ""}
            if picklers & {name.split(".")[0] for name in names}:
                yield f"line {node.lineno}: {ast.unparse(node)}"
        elif isinstance(node, ast.Call):
            call = ast.unparse(node.func)
            options = {option.arg: ast.unparse(option.value) for option in node.keywords}
            pickled = call == "torch.load" and options.get("weights_only") != "True"
            if call in ("eval", "exec") or pickled or options.get("allow_pickle") == "True":
                yield f"line {node.lineno}: {ast.unparse(node)}"


def test_python_code_is_safe():
    wrong = []
    for path, text in text_files():
        if path.suffix == ".py":
            wrong += [f"{path.relative_to(ROOT)} {found}" for found in unsafe(ast.parse(text))]
        elif path.suffix == ".ipynb":
            cells = [
                cell
                for cell in nbformat.reads(text, as_version=4).cells
                if cell.cell_type == "code"
            ]
            for cell in cells:
                tree = ast.parse(TransformerManager().transform_cell(cell.source))
                wrong += [
                    f"{path.relative_to(ROOT)} cell {cell.id} {found}" for found in unsafe(tree)
                ]
    assert not wrong, "\n".join(wrong)


@each_module
def test_modules_have_no_star_imports(path):
    imports = [
        node
        for node in ast.walk(ast.parse(path.read_text("utf-8")))
        if isinstance(node, ast.ImportFrom)
    ]
    assert not [
        ast.unparse(node) for node in imports if any(alias.name == "*" for alias in node.names)
    ]


def test_no_path_of_one_machine_is_kept():
    private = re.compile("/(?=w)work/|[.][.]/shared")  # written so that it doesn't find itself
    wrong = [
        f"{path.relative_to(ROOT)}: {match[0]}"
        for path, text in text_files()
        for match in private.finditer(text)
    ]
    assert not wrong, "\n".join(wrong)


# --- imports are quick -----------------------------------------------------------------------------------------------

HEAVY = [
    "umap",
    "open_clip",
    "matplotlib.pyplot",
    "ipywidgets",
    "transformers.models.dinov2.modeling_dinov2",
]


@pytest.mark.parametrize(
    "statement", ["import sliderspace", "from sliderspace import load, discover, train"]
)
def test_heavy_packages_are_imported_only_when_used(statement):
    loaded = f"{statement}; import sys, json; print(json.dumps([name for name in {HEAVY} if name in sys.modules]))"
    result = subprocess.run(
        [sys.executable, "-c", loaded], cwd=ROOT, check=True, capture_output=True, text=True
    )
    assert json.loads(result.stdout) == []


# --- notebooks are kept clean ----------------------------------------------------------------------------------------


@each_notebook
def test_notebooks_are_clean(path):
    notebook = nbformat.read(path, as_version=4)
    cleaned = copy.deepcopy(notebook)
    clean_nb(cleaned)
    if cleaned != notebook:  # an assert would print both
        pytest.fail("execution counts, volatile metadata or addresses: run `make notebooks`")
    assert set(notebook.metadata) <= {"kernelspec"}
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    assert not [output for output in outputs if output.output_type == "error"], "a cell failed"
    assert not [output for output in outputs if output.get("name") == "stderr"], (
        "warnings or progress were kept"
    )
    assert not [output for output in outputs if "widget" in " ".join(output.get("data", {}))], (
        "live widgets were kept"
    )


# --- public names ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sliderspace.__all__)
def test_public_names_resolve(name):
    assert getattr(sliderspace, name) is not None
    named = [path for path in (ROOT / "sliderspace").rglob(f"{name}*") if path.stem == name]
    assert not named, "importing that room or module would hide the name"


@each_module
def test_public_functions_have_docstrings(path):
    module = importlib.import_module(f"sliderspace.{name_in_package(path)}")
    public = {name: getattr(module, name) for name in module.__all__}
    functions = {
        name: value
        for name, value in public.items()
        if inspect.isfunction(value) or inspect.isclass(value)
    }
    assert not [name for name, value in functions.items() if not value.__doc__]


# --- everything can be found -----------------------------------------------------------------------------------------


def test_the_index_names_every_notebook():
    [cell] = nbformat.read(ROOT / "nbs/index.ipynb", as_version=4).cells
    named = set(re.findall(r"\]\((\S+\.ipynb)\)", cell.source))
    assert named == {path.relative_to(ROOT / "nbs").as_posix() for path in NOTEBOOKS} - {
        "index.ipynb"
    }


@pytest.mark.parametrize("page", ["README.md", "docs/report.md", "portraits-next/README.md"])
def test_links_of_pages_lead_somewhere(page):
    links = re.findall(r"\]\(([^)#\s]+)", (ROOT / page).read_text("utf-8"))
    assert not [
        link for link in links if "://" not in link and not ((ROOT / page).parent / link).exists()
    ]
