// Drawing with SVG elements and styles set from script; no markup is ever parsed.
const SVG = "http://www.w3.org/2000/svg";
const FRAME = { left: 44, right: 410, top: 10, bottom: 218 };

function add(parent, tag, attributes, text) {
  const element = document.createElementNS(SVG, tag);
  for (const [name, value] of Object.entries(attributes)) {
    element.setAttribute(name, value);
  }
  if (text !== undefined) {
    element.textContent = text;
  }
  parent.append(element);
  return element;
}

/** A bar from 0 to `value` with its interval. */
export function fill(bar, value, ends) {
  const solid = document.createElement("i");
  solid.className = "fill";
  solid.style.width = `${100 * (value ?? 0)}%`;
  bar.append(solid);
  if (ends !== null) {
    const span = document.createElement("i");
    span.className = "span";
    span.style.left = `${100 * ends[0]}%`;
    span.style.width = `${100 * (ends[1] - ends[0])}%`;
    bar.append(span);
  }
}

/** Where the scores of one category lie: requests to refuse above the line, look-alikes below. */
export function drawScores(svg, refuse, benign, top) {
  const bins = 50;
  svg.setAttribute("viewBox", `0 0 ${bins} 40`);
  svg.setAttribute("preserveAspectRatio", "none");
  svg.replaceChildren();
  for (const [scores, kind] of [[refuse, "refuse"], [benign, "over"]]) {
    const counts = new Array(bins).fill(0);
    for (const s of scores) {
      counts[Math.min(bins - 1, Math.floor((s / top) * bins))] += 1;
    }
    const most = Math.sqrt(Math.max(1, ...counts));
    counts.forEach((n, i) => {
      const height = (19 * Math.sqrt(n)) / most;
      if (n) {
        add(svg, "rect", { x: i + 0.1, width: 0.8, y: kind === "refuse" ? 20 - height : 20, height: height, class: kind });
      }
    });
  }
}

/** The trade-off: share refused of what should be, against share refused of what is harmless. */
export function drawCurve(svg, steps, from, now, loaded) {
  const widest = Math.max(now.x ?? 0, now.ordinary ?? 0, loaded.x ?? 0, loaded.ordinary ?? 0);
  const most = widest <= 0.22 ? 0.25 : widest <= 0.45 ? 0.5 : 1;
  const x = (share) => FRAME.left + ((FRAME.right - FRAME.left) * share) / most;
  const y = (share) => FRAME.bottom - (FRAME.bottom - FRAME.top) * share;
  svg.replaceChildren();
  axes(svg, x, y, most);
  const line = (some, kind) => {
    const points = some.filter((s) => s[kind] !== null && s.refuse !== null);
    return clipped(points.map((s) => [s[kind], s.refuse]), most).map((p) => `${x(p[0]).toFixed(1)},${y(p[1]).toFixed(1)}`).join(" ");
  };
  add(svg, "polyline", { points: line(steps, "general"), class: "curve ordinary" });
  add(svg, "polyline", { points: line(steps, "lookalike"), class: "curve" });
  add(svg, "polyline", { points: line(steps.filter((s) => s.shift >= from), "lookalike"), class: "curve covered" });
  if (loaded.x !== null && loaded.y !== null) {
    add(svg, "circle", { cx: x(loaded.x), cy: y(loaded.y), r: 7, class: "loaded" });
  }
  if (now.x !== null && now.y !== null) {
    add(svg, "circle", { cx: x(now.x), cy: y(now.y), r: 4.5, class: "now", "data-x": now.x, "data-y": now.y });
  }
}

function axes(svg, x, y, most) {
  for (const share of [0, 0.25, 0.5, 0.75, 1]) {
    add(svg, "line", { x1: FRAME.left, x2: FRAME.right, y1: y(share), y2: y(share), class: "grid" });
    add(svg, "text", { x: FRAME.left - 6, y: y(share) + 4, class: "tick end" }, `${100 * share}`);
  }
  for (const share of [0, 0.2, 0.4, 0.6, 0.8, 1]) {
    add(svg, "text", { x: x(share * most), y: FRAME.bottom + 16, class: "tick middle" }, `${Math.round(100 * share * most)}`);
  }
  add(svg, "text", { x: (FRAME.left + FRAME.right) / 2, y: FRAME.bottom + 35, class: "axis middle" }, "harmless requests refused, %");
  const side = { x: 0, y: 0, class: "axis middle", transform: `translate(12 ${(FRAME.top + FRAME.bottom) / 2}) rotate(-90)` };
  add(svg, "text", side, "refused of what should be, %");
}

/** The part of a rising line up to `most`, cut where it leaves the frame. */
function clipped(points, most) {
  const out = [];
  for (const [i, p] of points.entries()) {
    if (p[0] > most) {
      const q = points[i - 1];
      if (q && q[0] < most) {
        const part = (most - q[0]) / (p[0] - q[0]);
        out.push([most, q[1] + part * (p[1] - q[1])]);
      }
      break;
    }
    out.push(p);
  }
  return out;
}
