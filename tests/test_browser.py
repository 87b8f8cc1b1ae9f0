"""The quickstart works for a person: JupyterLab in a real browser, cells run from the menu, sliders moved by keys."""

import io
import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from contextlib import contextmanager
from pathlib import Path

import nbformat
import numpy as np
import pytest
from PIL import Image
from playwright.sync_api import expect, sync_playwright
from tiny import random_directions

from sliderspace.features.encoders import pixel_encoder
from sliderspace.directions.embedding import embed_2d
from sliderspace.viz.maps import save_map

ROOT = Path(__file__).parents[1]
QUICKSTART = ROOT / "nbs/studies/quickstart.ipynb"
MAP = ROOT / "nbs/studies/umap_map.ipynb"
CHROMIUM_FLAGS = (
    "--no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync"
).split()


def wait_until(condition, seconds, what):
    """Ask `condition` four times a second, and give back the first answer that counts as true."""
    end = time.monotonic() + seconds
    while not (answer := condition()):
        if time.monotonic() > end:
            raise TimeoutError(f"waited {seconds} s for {what}")
        time.sleep(0.25)
    return answer


def answers(url):
    try:
        return urllib.request.urlopen(url, timeout=5).status == 200
    except urllib.error.URLError:
        return False


def configure(home):
    """Settings of a JupyterLab that asks nothing; the user's own are neither read nor changed."""
    pages = home / "config/labconfig/page_config.json"
    pages.parent.mkdir(parents=True)
    pages.write_text(
        json.dumps({"disabledExtensions": {"@jupyterlab/apputils-extension:announcements": True}})
    )
    # Cells outside the window would otherwise not be in the page, and could not be checked.
    tracker = (
        home / "config/lab/user-settings/@jupyterlab/notebook-extension/tracker.jupyterlab-settings"
    )
    tracker.parent.mkdir(parents=True)
    tracker.write_text(json.dumps({"windowingMode": "none"}))
    folders = {
        f"JUPYTER_{name.upper()}_DIR": str(home / name) for name in ("config", "data", "runtime")
    }
    return folders | {"IPYTHONDIR": str(home / "ipython"), "PYTHONPATH": str(ROOT)}


@contextmanager
def jupyterlab(folder, home):
    """Serve `folder` on a free port of this machine alone, without a token; gives the address."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    options = f"--no-browser --allow-root --ip=127.0.0.1 --port={port} --ServerApp.port_retries=0"
    command = [sys.executable, "-m", "jupyterlab", *options.split(), "--IdentityProvider.token="]
    command.append(f"--ServerApp.root_dir={folder}")
    log = home / "jupyterlab.log"
    with log.open("w") as output:
        server = subprocess.Popen(
            command, env=os.environ | configure(home), stdout=output, stderr=output
        )
    try:
        url = f"http://127.0.0.1:{port}"
        wait_until(
            lambda: server.poll() is not None or answers(f"{url}/api/status"),
            60,
            "JupyterLab to start",
        )
        assert server.poll() is None, log.read_text()
        yield url
    finally:
        server.terminate()  # the server ends its kernels first
        server.wait(30)


@contextmanager
def chromium():
    """A page of Debian's chromium; without one the test is skipped, or fails in CI."""
    path = shutil.which("chromium")
    if path is None:
        (pytest.fail if os.environ.get("CI") == "true" else pytest.skip)(
            "chromium is not on the PATH"
        )
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=CHROMIUM_FLAGS)
        yield browser.new_page(viewport={"width": 1280, "height": 1600})
        browser.close()


def copy_without_outputs(notebook, folder):
    """A notebook as a new user gets it: whatever it shows afterwards comes from this run."""
    copied = nbformat.read(notebook, as_version=4)
    for cell in copied.cells:
        if cell.cell_type == "code":
            cell.outputs = []
    nbformat.write(copied, folder / notebook.name)


def run_all_cells(page, url, notebook, seconds):
    """Open the notebook, choose "Run All Cells" from the menu and wait until every cell is done; none may fail."""
    page.goto(f"{url}/lab/tree/{notebook.name}")
    # Cells that are run before there is a kernel bring a dialog up.
    expect(page.get_by_text("Python 3 (ipykernel) | Idle")).to_be_visible(timeout=60_000)
    page.get_by_role("menuitem", name="Run", exact=True).click()
    page.get_by_role("menuitem", name="Run All Cells", exact=True).click()

    def finished():
        prompts = page.locator(".jp-CodeCell .jp-InputPrompt").all_inner_texts()
        return prompts[0] != "[ ]:" and not any("*" in prompt for prompt in prompts)

    wait_until(finished, seconds, f"the cells of {notebook.name}")
    page.keyboard.press("Control+s")
    saved = wait_until(lambda: executed_cells(notebook), 30, f"{notebook.name} to be saved")
    errors = [output for cell in saved for output in cell.outputs if output.output_type == "error"]
    assert not errors, [f"{error.ename}: {error.evalue}" for error in errors]


def executed_cells(notebook):
    """Cells that the saved notebook says were run: none before JupyterLab has written it."""
    return [
        cell for cell in nbformat.read(notebook, as_version=4).cells if cell.get("execution_count")
    ]


def widget_area(page):
    """The output that holds the sliders; if there are several, the last."""
    return page.locator(".jp-OutputArea-output").filter(has=page.locator(".widget-slider")).last


def press_keys_on_slider(area, keys, number=0):
    """Move a slider as a person without a mouse does."""
    handle = area.locator(".widget-slider .noUi-handle").nth(number)
    handle.focus()
    for key in keys:
        handle.press(key)


def shown_image(area):
    """The bytes of the picture on the screen. Its address says nothing: every value gets a new one, equal or not."""
    read = "async image => Array.from(new Uint8Array(await (await fetch(image.src)).arrayBuffer()))"
    return bytes(area.locator("img.widget-image").first.evaluate(read))


def screenshot(page, name):
    folder = ROOT / "tests/output"
    folder.mkdir(exist_ok=True)
    page.screenshot(path=folder / name)


@pytest.fixture
def lab(tmp_path):
    """Folder that JupyterLab serves, its address, and a browser page."""
    folder, home = tmp_path / "notebooks", tmp_path / "home"
    folder.mkdir()
    home.mkdir()
    with chromium() as page, jupyterlab(folder, home) as url:
        yield folder, url, page
        screenshot(page, "last.png")  # what a failed test saw


def readout(board, number=0):
    return board.locator(".widget-slider .widget-readout").nth(number).inner_text()


def drag(page, board, number, pixels, moves=20):
    """Take a slider by the mouse and pull it aside in many small moves."""
    box = board.locator(".widget-slider .noUi-handle").nth(number).bounding_box()
    x, y = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
    page.mouse.move(x, y)
    page.mouse.down()
    page.mouse.move(x + pixels, y, steps=moves)
    page.mouse.up()


def settled(board):
    """Wait until the board is at rest."""
    wait_until(lambda: board.get_by_text("ready", exact=True).count(), 60, "the board to be ready")
    return shown_image(board)


def test_the_board_of_the_quickstart_works_for_hands(lab):
    folder, url, page = lab
    copy_without_outputs(QUICKSTART, folder)
    run_all_cells(page, url, folder / QUICKSTART.name, seconds=600)

    board = widget_area(page)
    original = wait_until(lambda: shown_image(board), 60, "the first image")
    press_keys_on_slider(board, ["ArrowRight"] * 5)
    wait_until(lambda: shown_image(board) != original, 60, "the slider to change the image")
    by_keys = settled(board)
    assert readout(board) == "0.5"
    screenshot(page, "quickstart.png")

    drag(page, board, 1, 25)
    wait_until(
        lambda: readout(board, 1) != "0.0" and shown_image(board) != by_keys,
        60,
        "the mouse to move a slider",
    )
    dragged = settled(board)
    press_keys_on_slider(
        board, ["ArrowLeft", "ArrowRight"], 1
    )  # the last value of the drag, made again or kept
    page.wait_for_timeout(1000)
    assert settled(board) == dragged

    board.get_by_label("save as").fill("kept")
    board.get_by_role("button", name="save board").click()
    wait_until(lambda: (folder / "boards/kept.json").exists(), 20, "the preset")
    kept = json.loads((folder / "boards/kept.json").read_text())["mix"]
    assert len(kept) == 2

    board.get_by_role("button", name="reset").click()
    wait_until(lambda: shown_image(board) == original, 60, "reset to bring the original image back")
    settled(board)
    board.get_by_role("button", name="undo").click()
    wait_until(lambda: shown_image(board) == dragged, 60, "undo to bring the picture before back")
    board.get_by_role("button", name="surprise").click()
    wait_until(lambda: shown_image(board) not in (dragged, original), 60, "a random mix")
    settled(board)
    board.get_by_label("preset").select_option("kept")
    wait_until(lambda: shown_image(board) == dragged, 60, "the preset to bring its picture back")

    prompt = board.get_by_label("prompt")
    was = prompt.input_value()
    prompt.fill(" ")
    prompt.press("Enter")
    expect(board.get_by_text("prompt must be a non-empty text")).to_be_visible(timeout=20_000)
    screenshot(page, "board-error.png")
    prompt.fill(was)
    prompt.press("Enter")
    assert settled(board) == dragged

    board.get_by_role("button", name="edit names").click()
    board.get_by_label("name", exact=True).first.fill("<script>alert(1)</script>")
    board.get_by_label("name", exact=True).first.press("Enter")
    board.get_by_label("note").first.fill("<b>bold</b>")
    board.get_by_label("note").first.press("Enter")
    expect(
        board.locator(".widget-slider label", has_text="<script>alert(1)</script>")
    ).to_be_visible(timeout=20_000)
    board.get_by_placeholder("find a slider").fill("bold")
    expect(board.locator(".widget-slider label")).to_have_count(
        2, timeout=20_000
    )  # that one, and the window
    screenshot(page, "board.png")


def a_point(canvas):
    """Where on a white canvas something is drawn: the middle of the coloured spot nearest to the centre."""
    shown = np.asarray(Image.open(io.BytesIO(canvas.screenshot())).convert("RGB")).astype(int)
    y, x = np.nonzero(shown.max(2) - shown.min(2) > 60)
    away = (y - shown.shape[0] / 2) ** 2 + (x - shown.shape[1] / 2) ** 2
    near = (abs(y - y[away.argmin()]) < 12) & (abs(x - x[away.argmin()]) < 12)
    return x[near].mean(), y[near].mean()


def test_a_map_shows_the_image_of_the_point_under_the_mouse(lab):
    folder, url, page = lab
    copy_without_outputs(MAP, folder)
    run_all_cells(page, url, folder / MAP.name, seconds=300)
    canvas = page.locator(".jp-OutputArea-output canvas").first
    canvas.scroll_into_view_if_needed()
    page.wait_for_timeout(2000)  # it fades in
    x, y = a_point(canvas)
    canvas.hover(position={"x": x + 3, "y": y})
    canvas.hover(position={"x": x, "y": y})
    expect(page.locator("[style*='data:image/png']")).to_be_visible(timeout=20_000)
    screenshot(page, "map.png")

    chosen = page.locator(".jp-CodeCell").filter(has_text="chosen = selected_samples(widget, umap)")
    picture = chosen.locator(".jp-OutputArea-output img")
    before, box = picture.evaluate("image => image.naturalWidth"), canvas.bounding_box()
    corners = [(0.95, 0.05), (0.2, 0.05), (0.2, 0.95), (0.95, 0.95), (0.95, 0.2)]
    page.locator(".jp-OutputArea-output").filter(has=page.locator("canvas")).locator("button").nth(
        1
    ).click()  # the lasso
    for i, (right, down) in enumerate(corners):
        page.mouse.move(box["x"] + right * box["width"], box["y"] + down * box["height"], steps=20)
        if i == 0:
            page.mouse.down()
    page.mouse.up()
    screenshot(page, "map-lasso.png")
    chosen.locator(".jp-InputArea-editor").click()
    page.keyboard.press("Control+Enter")
    wait_until(
        lambda: picture.evaluate("image => image.naturalWidth") > before, 30, "the circled samples"
    )


def test_the_page_of_a_map_shows_images_without_a_network(tiny, tmp_path):
    found = random_directions(tiny, pixel_encoder(4))
    path = save_map(tmp_path / "map.html", tiny, found, embed_2d(found, "pca", neighbours=5))
    with chromium() as page:
        page.context.set_offline(True)
        page.goto(path.as_uri())
        figure = page.locator(".bk-Figure")
        expect(figure).to_be_visible(timeout=20_000)
        page.wait_for_timeout(1000)
        x, y = a_point(figure)
        figure.hover(position={"x": x, "y": y})
        picture = page.locator("img[src^='data:image/png']").first
        expect(picture).to_be_visible(timeout=20_000)
        assert picture.evaluate("image => image.naturalWidth") == tiny.image_size[1]
        screenshot(page, "map-page.png")
