"""Put the demo's pictures into the README and its tables into docs/report.md; `make readme` makes both first."""

import csv
import shutil
from pathlib import Path

root = Path(__file__).parents[1]
demo = root / "demo"


def put(name, text):
    """Fill the part of the report between two comments."""
    report, begin, end = root / "docs/report.md", f"<!-- {name} -->\n", f"<!-- end of {name} -->"
    old = report.read_text()
    report.write_text(
        old[: old.index(begin) + len(begin)] + f"\n{text}\n\n" + old[old.index(end) :]
    )


(root / "pictures").mkdir(exist_ok=True)
for name in ("sliders.png", "spectrum.png", "ends.png"):
    shutil.copyfile(demo / name, root / "pictures" / name)
head, *rows = csv.reader((demo / "table.csv").read_text().splitlines())
table = "\n".join("| " + " | ".join(row) + " |" for row in [head, ["---"] * len(head), *rows])
put("demo table", "The demo's own table, as `make demo` wrote it:\n\n" + table)
put("truth table", (demo / "truth" / "table.md").read_text().strip())
