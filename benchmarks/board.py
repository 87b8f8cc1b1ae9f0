"""How quick the board is under a hand, on the bundled model's four-step student: python benchmarks/board.py [--readme].

Measured in the kernel, from the moment a value arrives to the picture being sent; the browser's part is not in it.
"""

import statistics
import sys
import time
from dataclasses import replace
from pathlib import Path

from inference import random_space
from portraits import table, write_figures

from sliderspace.viz import renderer as painting
from sliderspace import load
from sliderspace.portraits.renders import PROMPT
from sliderspace.sampling.generate import generate_images
from sliderspace.viz.board_widget import board


def seconds(do):
    began = time.perf_counter()
    do()
    return time.perf_counter() - began


def median(values, times=9):
    return statistics.median(values() for _ in range(times))


def main():
    model, runs = load("portraits-fast"), []
    generate_images(model, PROMPT, 1)
    call = median(lambda: seconds(lambda: generate_images(model, PROMPT, 1)))
    space = random_space(model, 40)
    space = replace(space, ranges=2 * space.ranges)
    opened, positions = [], iter(range(1, 1000))
    for _ in range(3):
        began = time.perf_counter()
        shown = board(model, space, PROMPT, thumbnails=False)
        opened.append(time.perf_counter() - began)
        shown.close()
    shown = board(model, space, PROMPT, thumbnails=False)

    def moved(value):
        shown.sliders[0].value = value
        shown.wait()

    def rested():
        time.sleep(0.6)
        return seconds(lambda: moved(next(positions) / 10 + 0.1))

    fresh = median(rested)
    last = median(lambda: seconds(lambda: moved(-next(positions) / 20 % 2 - 0.05)))

    def cached():
        before = shown.image.value
        began = time.perf_counter()
        shown.sliders[0].value = 0.1 if shown.sliders[0].value != 0.1 else 0.2
        assert shown.image.value != before  # at once, on the thread that brought the value
        taken = time.perf_counter() - began
        shown.wait()
        return taken

    moved(0.1), moved(0.2)
    kept = median(cached)
    sample = painting.sample
    painting.sample = lambda *args, **options: (runs.append(1), sample(*args, **options))[1]
    for pause in (0.005, 0.02, 0.05):
        shown.sliders[1].value = 0
        shown.wait()
        runs.append(0)
        for i in range(1, 21):
            shown.sliders[1].value = i / 10 + (0.0 if pause == 0.02 else -0.05)
            shown.sliders[2].value = (
                pause * 10
            )  # another mix each time: nothing comes from the cache
            time.sleep(pause)
        shown.wait()
    drags, painting.sample = [len(part) for part in "".join(map(str, runs)).split("0")[1:]], sample
    shown.close()
    text = table(
        ["", "milliseconds", "over a plain call"],
        [
            ["a plain call of the pipeline, one image", f"{1e3 * call:.0f}", "1.0"],
            ["a slider moved after a rest", f"{1e3 * fresh:.0f}", f"{fresh / call:.1f}"],
            [
                f"the last of a drag (of which {1e3 * shown._newest.settle:.0f} is waiting for the hand to rest)",
                f"{1e3 * last:.0f}",
                f"{last / call:.1f}",
            ],
            ["a position that was seen before", f"{1e3 * kept:.1f}", f"{kept / call:.2f}"],
            [
                "a board of 40 sliders",
                f"{1e3 * statistics.median(opened):.0f}",
                f"{statistics.median(opened) / call:.1f}",
            ],
        ],
    )
    text += f"\n\nPictures made in drags of 20 values, 5, 20 and 50 ms apart: {', '.join(map(str, drags))}.\n"
    print(text)
    if "--readme" in sys.argv:
        write_figures(Path(__file__).parents[1] / "docs/report.md", text, "board")


if __name__ == "__main__":
    main()
