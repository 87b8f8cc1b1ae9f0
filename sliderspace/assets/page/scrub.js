/* A box with data-scrub gets a window for every sample and a range input for every slider. `shown` is the number of a
   position, counted along the first slider first. In a box of mixes (`days`) the date chooses, not a hand. */
for (const box of document.querySelectorAll("[data-scrub]")) {
  const d = JSON.parse(box.dataset.scrub), [h, w] = d.size, wide = w + d.gap, high = h + d.gap;
  const sheets = [...box.querySelectorAll("img.sheet")], windows = document.createElement("div");
  const block = Math.ceil(d.count / d.across), inputs = [];
  const text = s => (s > 0 ? "+" : "") + s;
  function add(sheet, row) {
    const frame = document.createElement("div"), image = sheet.cloneNode();
    frame.className = "frame";
    frame.style.width = w * d.zoom + "px";
    frame.style.aspectRatio = w + " / " + h;
    image.style.width = 100 * (d.gap + d.across * wide) / w + "%";
    image.style.height = 100 * (d.gap + d.rows * block * high) / h + "%";
    frame.append(image);
    windows.append(frame);
    return (shown, said) => {
      image.style.left = -100 * (d.gap + shown % d.across * wide) / w + "%";
      image.style.top = -100 * (d.gap + (row * block + Math.floor(shown / d.across)) * high) / h + "%";
      image.alt = sheet.alt + ": " + said;
    };
  }
  const each = call => sheets.flatMap(sheet => [...Array(d.rows).keys()].map(row => call(sheet, row)));
  windows.className = "frames";
  box.prepend(windows);
  box.classList.add("live");
  if (d.days) {
    const now = new Date(), local = now.getTime() - 6e4 * now.getTimezoneOffset();
    const day = Math.floor(local / 864e5) % d.days, mixes = box.querySelectorAll("li");
    each((sheet, row) => { add(sheet, row)(0, "unchanged"); add(sheet, row)(1 + day, "mix of the day"); });
    mixes.forEach((mix, i) => { mix.hidden = i != day; });
    continue;
  }
  const shows = each(add);
  function show() {
    const at = inputs.map(([input]) => +input.value), said = at.map((i, k) => text(d.strengths[k][i]));
    inputs.forEach(([input, output], k) => { output.value = said[k]; input.setAttribute("aria-valuetext", said[k]); });
    for (const one of shows) one(at[0] + (at[1] || 0) * d.strengths[0].length, said.join(", "));
  }
  let last = windows;
  d.labels.forEach((label, k) => {
    const line = document.createElement("div"), name = document.createElement("span");
    const input = document.createElement("input"), output = document.createElement("output");
    line.className = "control";
    name.textContent = label;
    Object.assign(input, {type: "range", min: 0, max: d.strengths[k].length - 1, step: 1});
    input.value = d.at[k];
    input.setAttribute("aria-label", label);
    input.addEventListener("input", show);
    line.append(name, input, output);
    last.after(line);
    last = line;
    inputs.push([input, output]);
  });
  show();
}
try { /* a notebook's frame takes the page's height, where it may be touched */
  const around = window.frameElement;
  const fit = () => { around.style.height = document.documentElement.offsetHeight + 2 + "px"; };
  if (around && around.srcdoc) { fit(); addEventListener("resize", fit); }
} catch { }
