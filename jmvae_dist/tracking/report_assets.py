"""Style and script of the HTML report; `report` puts them into the page, which loads nothing else."""

STYLE = """
:root {
  color-scheme: light dark;
  --page: #f6f7f9; --card: #ffffff; --ink: #1b1f27; --soft: #5d6675; --line: #dfe3ea; --grid: #eaedf2;
  --accent: #2359c4; --good: #1a7f4b; --waiting: #9a6400;
  --c0: #2359c4; --c1: #d1491b; --c2: #16866a; --c3: #8a3fb3;
  --c4: #a87400; --c5: #c02b70; --c6: #4b6b1e; --c7: #55606f;
}
@media (prefers-color-scheme: dark) {
  :root {
    --page: #12151b; --card: #1a1f28; --ink: #e5e9f0; --soft: #98a2b3; --line: #2d3543; --grid: #262d39;
    --accent: #84adff; --good: #5fd39a; --waiting: #f0b95a;
    --c0: #84adff; --c1: #ff9168; --c2: #55d0ad; --c3: #d19cf2;
    --c4: #e8c15a; --c5: #ff8fbd; --c6: #b2d777; --c7: #a9b4c4;
  }
}
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink);
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif; }
main { max-width: 1180px; margin: 0 auto; padding: 28px 22px 60px; }
h1 { font-size: 26px; line-height: 1.2; margin: 0; overflow-wrap: anywhere; }
h2 { font-size: 18px; margin: 36px 0 12px; }
h3 { font-size: 14px; font-weight: 600; margin: 0; }
.status { display: flex; flex-wrap: wrap; align-items: center; gap: 6px 12px; margin: 8px 0 0; color: var(--soft); }
.pill { border: 1px solid currentColor; border-radius: 99px; padding: 1px 11px; font-size: 13px; font-weight: 600; }
.pill.complete { color: var(--good); } .pill.partial { color: var(--waiting); }
.bar { height: 5px; border-radius: 3px; background: var(--line); margin-top: 14px; overflow: hidden; }
.bar i { display: block; height: 100%; background: var(--accent); }
.stack { display: flex; height: 18px; border-radius: 4px; background: var(--line); overflow: hidden;
  margin-bottom: 10px; }
.stack i { display: block; height: 100%; }
.mark { display: inline-block; width: 10px; height: 10px; border-radius: 2px; margin-right: 8px; }
.stack, .stack i, .mark { print-color-adjust: exact; -webkit-print-color-adjust: exact; }
.numbers { display: grid; grid-template-columns: repeat(auto-fill, minmax(172px, 1fr));
  gap: 12px; margin-top: 20px; }
.number, .card { background: var(--card); border: 1px solid var(--line); border-radius: 9px; padding: 13px 15px; }
.number b { display: block; font-size: 21px; line-height: 1.25; white-space: nowrap;
  font-variant-numeric: tabular-nums; }
.number b small { font-size: 13px; font-weight: 400; color: var(--soft); }
.number span { color: var(--soft); font-size: 13px; overflow-wrap: anywhere; }
.grid { display: grid; grid-template-columns: repeat(auto-fill, minmax(460px, 1fr)); gap: 14px; }
.chart { position: relative; min-width: 0; }
.chart header { display: flex; justify-content: space-between; gap: 10px; align-items: center; }
.chart svg { display: block; width: 100%; height: auto; margin-top: 6px; touch-action: pan-y; }
.chart text { fill: var(--soft); font-size: 11px; font-variant-numeric: tabular-nums; }
button { font: inherit; font-size: 12px; color: var(--ink); background: none; border: 1px solid var(--line);
  border-radius: 6px; padding: 1px 8px; cursor: pointer; }
button[aria-pressed=false] { opacity: .42; }
.scale[aria-pressed=false] { opacity: .7; }
.scale[aria-pressed=true] { border-color: var(--accent); color: var(--accent); }
.legend { display: flex; flex-wrap: wrap; gap: 5px; margin-top: 6px; }
.legend svg { display: inline-block; width: 20px; height: 9px; margin: 0 6px 0 0; vertical-align: middle; }
.tip { position: absolute; pointer-events: none; background: var(--card); border: 1px solid var(--line); z-index: 2;
  border-radius: 7px; padding: 6px 9px; font-size: 12px; white-space: nowrap;
  box-shadow: 0 3px 14px rgb(0 0 0 / .16); }
.tip b { font-variant-numeric: tabular-nums; }
.tip i { display: inline-block; width: 8px; height: 8px; border-radius: 2px; margin-right: 6px; }
figure { margin: 0; }
figure img { display: block; max-width: 100%; height: auto; margin: 8px auto 0;
  background: #fff; border-radius: 4px; }
figcaption { font-size: 14px; font-weight: 600; overflow-wrap: anywhere; }
table { border-collapse: collapse; min-width: 50%; font-size: 14px; }
th, td { text-align: left; padding: 5px 10px; border-bottom: 1px solid var(--line); overflow-wrap: anywhere; }
tr:last-child td { border-bottom: 0; }
th { color: var(--soft); font-weight: 600; font-size: 13px; }
td.value { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
pre { margin: 0; font: 12.5px/1.5 ui-monospace, "DejaVu Sans Mono", monospace;
  white-space: pre-wrap; overflow-wrap: anywhere; }
.note { color: var(--soft); margin: 6px 0; }
footer { margin-top: 40px; color: var(--soft); font-size: 13px; }
@media (max-width: 560px) { .grid { grid-template-columns: 1fr; } }
@media print {
  :root { --page: #fff; --card: #fff; }
  main { max-width: none; padding: 0; }
  .grid { grid-template-columns: 1fr 1fr; }
  .card, .number, tr { break-inside: avoid; }
  h2 { break-after: avoid; }
  .scale, .tip { display: none; }
}
"""

SCRIPT = """
"use strict";
const charts = JSON.parse(document.getElementById("chart-data").textContent);
const W = 560, H = 250, LEFT = 58, RIGHT = 12, TOP = 10, BOTTOM = 26;
const make = (name, attributes, parent) => {
  const node = document.createElementNS("http://www.w3.org/2000/svg", name);
  for (const key in attributes) node.setAttribute(key, attributes[key]);
  if (parent) parent.appendChild(node);
  return node;
};
const short = (value) => {
  const size = Math.abs(value);
  for (const [limit, unit] of [[1e12, "T"], [1e9, "G"], [1e6, "M"], [1e4, "k"]])
    if (size >= limit) return parseFloat((value / (limit === 1e4 ? 1e3 : limit)).toPrecision(4)) + unit;
  if (size !== 0 && size < 1e-3) return value.toExponential().replace(/(\\.\\d{2})\\d+/, "$1");
  return String(parseFloat(value.toPrecision(4)));
};
const grouped = (value) => value.toLocaleString("en-US", {maximumSignificantDigits: 7});
const exact = (value) =>
  value === 0 || (Math.abs(value) >= 1e-3 && Math.abs(value) < 1e15) ? grouped(value) : value.toExponential(4);
const ticks = (low, high, count) => {
  const raw = (high - low) / count, power = 10 ** Math.floor(Math.log10(raw));
  const step = power * [1, 2, 5, 10].find((factor) => power * factor >= raw);
  const list = [];
  for (let i = Math.ceil(low / step - 1e-9); i * step <= high + step * 1e-9; i++) list.push(i * step);
  return list;
};
const logTicks = (low, high) => {
  const list = [];
  for (let power = Math.floor(low); power <= Math.ceil(high); power++)
    for (const factor of high - low < 1.2 ? [1, 2, 3, 5, 7] : high - low < 3 ? [1, 3] : [1]) {
      const position = Math.log10(factor) + power;
      if (position >= low - 1e-9 && position <= high + 1e-9) list.push(position);
    }
  if (list.length < 2) return ticks(low, high, 4);
  const every = Math.ceil(list.length / 7);
  return list.filter((_, index) => index % every === 0);
};
function draw(chart, box) {
  const svg = box.querySelector(".plot"), tip = box.querySelector(".tip");
  const shown = chart.series.filter((series) => !series.hidden);
  const scale = chart.log ? (y) => (y > 0 ? Math.log10(y) : NaN) : (y) => y;
  svg.replaceChildren();
  let x0 = Infinity, x1 = -Infinity, y0 = Infinity, y1 = -Infinity;
  for (const series of shown) series.x.forEach((x, i) => {
    const y = series.y[i] === null ? NaN : scale(series.y[i]);
    if (!Number.isFinite(y)) return;
    x0 = Math.min(x0, x); x1 = Math.max(x1, x); y0 = Math.min(y0, y); y1 = Math.max(y1, y);
  });
  if (x0 > x1) {
    const text = make("text", {x: W / 2, y: H / 2, "text-anchor": "middle"}, svg);
    text.textContent = "nothing to show on this scale";
    return;
  }
  if (x0 === x1) { x0 -= 1; x1 += 1; }
  const flat = y1 - y0 < 1e-12 * Math.max(Math.abs(y0), Math.abs(y1), 1e-300);
  const pad = flat ? Math.abs(y0) * 0.1 || 1 : (y1 - y0) * 0.05;
  y0 = !chart.log && y0 >= 0 && y0 < pad * 4 ? 0 : y0 - pad;
  y1 += pad;
  const px = (x) => LEFT + (x - x0) / (x1 - x0) * (W - LEFT - RIGHT);
  const py = (y) => H - BOTTOM - (y - y0) / (y1 - y0) * (H - TOP - BOTTOM);
  for (const position of chart.log ? logTicks(y0, y1) : ticks(y0, y1, 5)) {
    make("line", {x1: LEFT, x2: W - RIGHT, y1: py(position), y2: py(position), stroke: "var(--grid)"}, svg);
    const text = make("text", {x: LEFT - 7, y: py(position) + 4, "text-anchor": "end"}, svg);
    text.textContent = short(chart.log ? 10 ** position : position);
  }
  for (const x of ticks(x0, x1, 6))
    make("text", {x: px(x), y: H - 9, "text-anchor": "middle"}, svg).textContent = short(x);
  make("line", {x1: LEFT, x2: W - RIGHT, y1: H - BOTTOM, y2: H - BOTTOM, stroke: "var(--line)"}, svg);
  for (const series of shown) {
    let path = "", open = false, dots = [];
    series.x.forEach((x, i) => {
      const y = series.y[i] === null ? NaN : scale(series.y[i]);
      if (!Number.isFinite(y)) { open = false; return; }
      const point = px(x).toFixed(1) + "," + py(y).toFixed(1);
      path += (open ? "L" : "M") + point;
      dots.push(point); open = true;
    });
    const colour = "var(--c" + series.colour + ")", style = {planned: "2 4", eval: "6 3"}[series.kind];
    make("path", {d: path, fill: "none", stroke: colour, "stroke-width": series.kind === "train" ? 1.4 : 1.8,
      "stroke-linejoin": "round", ...(style ? {"stroke-dasharray": style} : {})}, svg);
    if (dots.length === 1 || (series.kind === "eval" && dots.length <= 60)) for (const point of dots) {
      const [cx, cy] = point.split(",");
      make("circle", {cx, cy, r: 3, fill: colour, stroke: "var(--card)"}, svg);
    }
  }
  const cursor = make("line", {y1: TOP, y2: H - BOTTOM, stroke: "var(--soft)", visibility: "hidden"}, svg);
  svg.onpointerleave = () => { cursor.setAttribute("visibility", "hidden"); tip.hidden = true; };
  svg.onpointermove = (event) => {
    const area = svg.getBoundingClientRect(), pointer = (event.clientX - area.left) / area.width * W;
    const at = x0 + (pointer - LEFT) / (W - LEFT - RIGHT) * (x1 - x0);
    let best = null;
    const rows = shown.filter((series) => series.x.length).map((series) => {
      let low = 0, high = series.x.length - 1;
      while (high - low > 1) {
        const middle = (low + high) >> 1;
        if (series.x[middle] < at) low = middle; else high = middle;
      }
      const i = Math.abs(series.x[low] - at) <= Math.abs(series.x[high] - at) ? low : high;
      if (best === null || Math.abs(series.x[i] - at) < Math.abs(best - at)) best = series.x[i];
      return [series, i];
    });
    if (best === null) return;
    cursor.setAttribute("x1", px(best));
    cursor.setAttribute("x2", px(best));
    cursor.setAttribute("visibility", "visible");
    tip.replaceChildren();
    const line = (text, colour, value) => {
      const row = document.createElement("div");
      if (colour) {
        const mark = row.appendChild(document.createElement("i"));
        mark.style.background = colour;
      }
      row.append(text);
      if (value !== undefined) {
        const bold = document.createElement("b");
        bold.textContent = value;
        row.append(" ", bold);
      }
      tip.append(row);
    };
    line("step", null, grouped(best));
    for (const [series, i] of rows) {
      const y = series.y[i], value = y === null ? "not finite" : exact(y);
      const elsewhere = series.x[i] === best ? "" : " (at " + grouped(series.x[i]) + ")";
      line(series.name, "var(--c" + series.colour + ")", value + elsewhere);
    }
    tip.hidden = false;
    const frame = box.getBoundingClientRect(), x = px(best) / W * area.width + area.left - frame.left;
    const fits = x + 14 + tip.offsetWidth < frame.width;
    tip.style.top = area.top - frame.top + 12 + "px";
    tip.style.left = Math.max(4, fits ? x + 14 : x - 14 - tip.offsetWidth) + "px";
  };
}
charts.forEach((chart, index) => {
  const box = document.getElementById("chart-" + index), header = box.querySelector("header");
  const svg = make("svg", {class: "plot", viewBox: `0 0 ${W} ${H}`, role: "img", "aria-label": chart.title}, box);
  const legend = box.appendChild(document.createElement("div"));
  const tip = box.appendChild(document.createElement("div"));
  legend.className = "legend"; tip.className = "tip"; tip.hidden = true;
  const scale = header.appendChild(document.createElement("button"));
  scale.className = "scale"; scale.textContent = "log"; scale.title = "logarithmic y axis"; scale.type = "button";
  scale.setAttribute("aria-pressed", String(chart.log));
  scale.onclick = () => {
    chart.log = !chart.log;
    scale.setAttribute("aria-pressed", String(chart.log));
    draw(chart, box);
  };
  for (const series of chart.series) {
    const entry = legend.appendChild(document.createElement("button"));
    const mark = make("svg", {viewBox: "0 0 20 9"});
    make("line", {x1: 0, x2: 20, y1: 4.5, y2: 4.5, stroke: "var(--c" + series.colour + ")", "stroke-width": 2.4,
      ...(series.kind === "train" ? {} : {"stroke-dasharray": series.kind === "eval" ? "6 3" : "2 3"})}, mark);
    entry.type = "button";
    entry.append(mark, series.name + (series.not_finite ? " (" + series.not_finite + " not finite)" : ""));
    entry.setAttribute("aria-pressed", "true");
    entry.onclick = () => {
      series.hidden = !series.hidden;
      entry.setAttribute("aria-pressed", String(!series.hidden));
      draw(chart, box);
    };
  }
  draw(chart, box);
});
"""
