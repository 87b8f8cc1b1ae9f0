"""Put the demo's pictures and table into the README: run `make demo` first, or `make readme`, which does both."""

import csv
import shutil
from pathlib import Path

root = Path(__file__).parents[1]
begin, end = "<!-- demo table -->\n", "<!-- end of demo table -->"

(root / "pictures").mkdir(exist_ok=True)
for name in ("sliders.png", "spectrum.png", "ends.png"):
    shutil.copyfile(root / "demo" / name, root / "pictures" / name)
head, *rows = csv.reader((root / "demo" / "table.csv").read_text().splitlines())
table = "\n".join("| " + " | ".join(row) + " |" for row in [head, ["---"] * len(head), *rows])
readme = root / "README.md"
text = readme.read_text()
readme.write_text(text[: text.index(begin) + len(begin)] + "\nThe demo's own table, as `make demo` wrote it:\n\n" + table + "\n\n"
                  + text[text.index(end) :])
