"""Every notebook runs from top to bottom, under the same flags as the tests."""

import io
from concurrent.futures import ProcessPoolExecutor
from contextlib import redirect_stderr
from multiprocessing import get_context
from pathlib import Path

import pytest
from nbdev.doclinks import nbglob
from nbdev.test import test_nb as run_notebook

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted(nbglob(ROOT / "nbs", as_path=True))

# One process a notebook: none can lean on what another has left in memory, and a crash is one failure. The processes
# fork from a server that has already imported what takes ten seconds.
PROCESSES = get_context("forkserver")
PROCESSES.set_forkserver_preload(["torch", "diffusers", "transformers", "peft", "nbdev.test"])


def run(path, flags):
    """Whether the notebook passed, how long it took, and the traceback of the cell that failed."""
    with redirect_stderr(io.StringIO()) as report:
        passed, seconds = run_notebook(path, skip_flags=flags, basepath=ROOT)
    return passed, seconds, report.getvalue()


@pytest.mark.parametrize(
    "path", NOTEBOOKS, ids=lambda path: path.relative_to(ROOT / "nbs").as_posix()
)
def test_notebook(path, skipped_flags):
    with ProcessPoolExecutor(1, mp_context=PROCESSES) as pool:
        passed, seconds, report = pool.submit(run, path, skipped_flags).result()
    assert passed, report
    assert seconds, (
        "nbdev skipped the whole notebook: skip_exec in its front matter, or a kernel that is not Python"
    )
