"""Put the demo's pictures and tables into the README: `make readme` runs the demo and scores it against truth first."""

import csv
import shutil
from pathlib import Path

root = Path(__file__).parents[1]
demo = root / "demo"


def put(name, text):
    """Fill the part of the README between two comments."""
    readme, begin, end = root / "README.md", f"<!-- {name} -->\n", f"<!-- end of {name} -->"
    old = readme.read_text()
    readme.write_text(old[: old.index(begin) + len(begin)] + f"\n{text}\n\n" + old[old.index(end) :])


(root / "pictures").mkdir(exist_ok=True)
for name in ("sliders.png", "spectrum.png", "ends.png"):
    shutil.copyfile(demo / name, root / "pictures" / name)
head, *rows = csv.reader((demo / "table.csv").read_text().splitlines())
table = "\n".join("| " + " | ".join(row) + " |" for row in [head, ["---"] * len(head), *rows])
put("demo table", "The demo's own table, as `make demo` wrote it:\n\n" + table)
put("truth table", (demo / "truth" / "table.md").read_text().strip())
