"""Run notebooks from top to bottom, each in a fresh kernel, and keep their outputs in a form that a second run repeats.

    python tools/run_notebooks.py                                    # all of nbs/
    python tools/run_notebooks.py nbs/08_directions.ipynb --flags slow gpu

Cells with `#| eval: false`, and those with a test flag of settings.ini that is not in `--flags`, keep their outputs.
"""

import argparse
import os
import time
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbdev.clean import clean_nb
from nbdev.doclinks import nbglob
from nbdev.process import extract_directives

ROOT = Path(__file__).resolve().parents[1]
TEST_FLAGS = {"slow", "gpu", "net"}
WIDGET = "application/vnd.jupyter.widget-view+json"


def is_left_out(
    cell,  # code cell
    skipped,  # names of test flags whose cells stay as they are
):
    """Whether the directives above the code keep `cell` from being run, by the rules of nbdev_test."""
    directives = extract_directives(cell, remove=False)
    return directives.get("eval:", [""])[0].lower() == "false" or bool(skipped & directives.keys())


def lasting(outputs):
    """The outputs that mean something after the kernel is gone: no warnings, no progress, no live widgets."""
    kept = []
    for output in outputs:
        data = output.get("data", {})
        if data.pop(WIDGET, None) and set(data) <= {"text/plain"}:
            continue
        if output.get("name") != "stderr":
            kept.append(output)
    return kept


def run(
    path,  # notebook, written in place once all its cells have run
    flags,  # test flags whose cells run too
):
    """Execute a notebook in its own folder. If a cell fails, `CellExecutionError` shows it and nothing is written."""
    notebook = nbformat.read(path, as_version=4)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    for cell in code:
        if is_left_out(cell, TEST_FLAGS - set(flags)):
            cell.metadata.tags = ["skip-execution"]
    NotebookClient(
        notebook,
        kernel_name="python3",
        timeout=None,
        record_timing=False,
        store_widget_state=False,
        coalesce_streams=True,
        resources={"metadata": {"path": str(path.parent)}},
        extra_arguments=[
            "--log-level=ERROR"
        ],  # every kernel warns that it listens on a port of this machine
    ).execute()
    for cell in code:
        cell.outputs = lasting(cell.outputs)
    notebook.metadata = {
        "kernelspec": {"display_name": "python3", "language": "python", "name": "python3"}
    }
    clean_nb(notebook)
    nbformat.write(notebook, path)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("notebooks", nargs="*", type=Path, help="default: all of nbs/")
    parser.add_argument(
        "--flags", nargs="*", default=["slow"], choices=sorted(TEST_FLAGS), help="default: slow"
    )
    args = parser.parse_args()

    # The kernels inherit this. The package is the one in this folder, whatever else is installed.
    os.environ["PYTHONPATH"] = str(ROOT)
    os.environ["PYTHONHASHSEED"] = "0"
    os.environ["TQDM_DISABLE"] = "1"
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    if "net" not in args.flags:
        os.environ["HF_HUB_OFFLINE"] = "1"

    for path in args.notebooks or sorted(nbglob(ROOT / "nbs", as_path=True)):
        print(path, end=": ", flush=True)
        start = time.perf_counter()
        run(path.resolve(), args.flags)
        print(f"{time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    main()
