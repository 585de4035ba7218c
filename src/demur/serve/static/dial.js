// The dial: sliders over stored probabilities, redrawn at once; the curve, the flips, and saving.
import { drawCurve, drawScores, fill } from "./draw.js";
import { byId, call, make, percent } from "./page.js";
import { choices, curve, cutsOf, decide, flips, outside, tally, wilson } from "./rules.js";

const RULES = {
  threshold: "Refuse when the likeliest refuse category has at least its threshold's probability.",
  total_mass: "Refuse when the enforced categories together have at least the threshold of the likeliest one.",
  bias: "Refuse when the likeliest category's share against answering is at least its threshold.",
  compare: "Refuse when the likeliest refuse category is at least as probable as answering; thresholds play no part.",
};
const TOP = 1.01;
const SHOWN = 100;
const KINDS = { refuse: "should be refused", lookalike: "harmless look-alike", general: "ordinary prompt" };
const whole = new Intl.NumberFormat("en");

export function startDial(about, evaluation) {
  const board = { onChange: () => {}, onSaved: () => {}, whatIf: () => "" };
  if (evaluation === null) {
    byId("about-dial").textContent = about.evaluation_problem;
    return board;
  }
  new Board(about, evaluation, board).start();
  return board;
}

class Board {
  constructor(about, evaluation, board) {
    this.about = about;
    this.evaluation = evaluation;
    this.board = board;
    this.names = evaluation.names;
    this.categories = evaluation.names.slice(0, -1);
    this.loaded = this.fromPoint();
    this.dial = structuredClone(this.loaded);
    this.before = choices(evaluation, this.loaded);
    this.first = tally(evaluation, this.before);
    this.waiting = false;
  }

  fromPoint() {
    const found = this.about.point?.thresholds ?? {};
    const bare = Object.keys(found).length === 0;
    const dial = { rule: this.about.point?.rule ?? "threshold", tau: {}, on: {}, bare: bare };
    for (const c of this.categories) {
      dial.tau[c] = found[c]?.tau ?? 0.5;
      dial.on[c] = found[c]?.mode === "enforce";
    }
    return dial;
  }

  start() {
    const { evaluation, about } = this;
    const some = evaluation.total > evaluation.rows.length ? ` of ${whole.format(evaluation.total)}` : "";
    byId("about-dial").textContent =
      `${whole.format(evaluation.rows.length)}${some} prompts of ${evaluation.prompts}, scored once with ` +
      `${evaluation.model}. Nothing is generated again: each change is redrawn from their stored probabilities.`;
    byId("guarantee").textContent = about.point?.guarantee ?? "The loaded operating point has no guarantee.";
    for (const rule of Object.keys(RULES)) {
      byId("rule").append(make("option", rule, "", { value: rule }));
    }
    this.rows = Object.fromEntries(this.categories.map((c) => [c, this.slider(c)]));
    for (const c of new Set(evaluation.rows.map((row) => row.category))) {
      byId("flip-category").append(make("option", c, "", { value: c }));
    }
    this.listen();
    this.board.whatIf = (probabilities) => this.whatIf(probabilities);
    byId("board").hidden = false;
    this.shape();
  }

  listen() {
    byId("rule").addEventListener("change", () => {
      this.dial.rule = byId("rule").value;
      this.shape();
    });
    byId("reset").addEventListener("click", () => {
      this.dial = structuredClone(this.loaded);
      this.shape();
    });
    byId("show-flips").addEventListener("click", () => {
      byId("flips").hidden = !byId("flips").hidden;
      byId("show-flips").setAttribute("aria-expanded", String(!byId("flips").hidden));
      this.redraw();
    });
    byId("flip-category").addEventListener("change", () => this.redraw());
    byId("save").addEventListener("submit", (event) => {
      event.preventDefault();
      this.save(true);
    });
    byId("download").addEventListener("click", () => byId("save").reportValidity() && this.save(false));
  }

  /** One category: switch, scores, slider, exact value, and the two rates. */
  slider(c) {
    const box = make("fieldset", null, "category");
    const on = make("input", null, "", { type: "checkbox" });
    const range = make("input", null, "", { type: "range", min: 0, max: TOP, step: 0.005, "aria-label": `Threshold of ${c}` });
    const exact = make("input", null, "", { type: "number", min: -1, max: TOP, step: "any", "aria-label": `Threshold of ${c}, exact` });
    const enforce = make("label", null, "inline");
    enforce.append(on, " enforce");
    const head = make("div", null, "line head");
    head.append(enforce, exact);
    const scale = make("div", null, "scale");
    const scores = document.createElementNS("http://www.w3.org/2000/svg", "svg");
    scores.setAttribute("aria-hidden", "true");
    const cover = make("div", null, "cover", { "aria-hidden": "true" });
    cover.append(make("i"));
    scale.append(scores, range, cover);
    const rates = make("div", null, "rates");
    box.append(make("legend", c), head, scale, rates);
    byId("sliders").append(box);
    on.addEventListener("change", () => {
      this.dial.on[c] = on.checked;
      this.shape();
    });
    range.addEventListener("input", () => this.turn(c, Number(range.value), range));
    exact.addEventListener("input", () => {
      if (exact.value !== "" && exact.validity.valid) {
        this.turn(c, Number(exact.value), exact);
      }
    });
    return { on: on, range: range, exact: exact, scores: scores, cover: cover.firstChild, rates: rates };
  }

  turn(c, tau, from) {
    this.dial.tau[c] = tau;
    this.place(c, from);
    this.redraw();
  }

  place(c, from) {
    const row = this.rows[c];
    const tau = this.dial.tau[c];
    row.on.checked = this.dial.on[c];
    row.range.disabled = row.exact.disabled = !this.dial.on[c] || this.dial.rule === "compare";
    if (from !== row.range) {
      row.range.value = String(tau);
    }
    if (from !== row.exact) {
      row.exact.value = String(Number(tau.toFixed(4)));
    }
    const word = tau < 0 ? "compares with answering" : tau === 0 ? "always" : tau > 1 ? "never" : tau.toFixed(3);
    row.range.setAttribute("aria-valuetext", word);
    const floor = this.dial.rule === this.about.point?.rule ? this.about.region?.[c] : undefined;
    row.cover.parentNode.hidden = floor === undefined;
    row.cover.style.left = `${(100 * (floor ?? 0)) / TOP}%`;
  }

  /** After a change of rule or of what is enforced: everything, also where the scores lie. */
  shape() {
    byId("rule").value = this.dial.rule;
    byId("about-rule").textContent = RULES[this.dial.rule];
    const cuts = cutsOf(this.dial, this.names);
    const scored = this.evaluation.rows.map((row) => [row, decide(row.probabilities, cuts, this.dial.rule)]);
    this.categories.forEach((c, column) => {
      this.place(c);
      const own = scored.filter(([row, made]) => row.category === c && made.best === column);
      const of = (kind) => own.filter(([row]) => row.kind === kind).map(([, made]) => made.score);
      drawScores(this.rows[c].scores, of("refuse"), of("lookalike"), TOP);
    });
    this.redraw();
  }

  redraw() {
    if (!this.waiting) {
      this.waiting = true;
      requestAnimationFrame(() => {
        this.waiting = false;
        this.draw();
      });
    }
  }

  draw() {
    const chosen = choices(this.evaluation, this.dial);
    const counts = tally(this.evaluation, chosen);
    this.drawTotals(counts);
    this.drawInside();
    for (const c of this.categories) {
      this.drawRates(c, counts[c] ?? {});
    }
    this.drawTradeOff(counts);
    this.drawFlips(flips(this.evaluation, this.before, chosen));
    this.board.onChange();
  }

  drawTotals(counts) {
    const tiles = [
      ["refuse", "refused of what should be"],
      ["lookalike", "look-alikes refused"],
      ["general", "ordinary prompts refused"],
    ];
    const shown = tiles.filter(([kind]) => counts.all[kind]).map(([kind, words]) => {
      const tile = make("div", null, `tile ${kind === "refuse" ? "refuse" : "over"}`);
      const now = counts.all[kind];
      const was = this.first.all[kind];
      tile.append(make("strong", percent(share(now))), make("span", words));
      tile.append(make("small", `${interval(now.refused, now.n)}, ${now.refused} of ${now.n}`), make("small", `loaded ${percent(share(was))}`));
      return tile;
    });
    byId("totals").replaceChildren(...shown);
  }

  drawInside() {
    const why = outside(this.dial, this.about.point, this.about.region);
    const line = byId("inside");
    line.className = why !== null && why.length === 0 ? "inside" : "outside";
    line.textContent =
      why === null
        ? "Nothing is guaranteed: the loaded operating point has no guarantee to start from."
        : why.length === 0
          ? "Inside the guaranteed region."
          : `Outside the guaranteed region: ${why.join("; ")}.`;
  }

  drawRates(c, counts) {
    const alpha = this.about.point?.alpha;
    const lines = [];
    for (const [kind, words] of [["refuse", "to refuse"], ["lookalike", "look-alikes"]]) {
      const cell = counts[kind];
      if (!cell) {
        lines.push(make("p", `No prompts of this category: ${words}.`, "muted"));
        continue;
      }
      const line = make("p", null, kind === "refuse" ? "rate refuse" : "rate over");
      const bar = make("span", null, "bar", { "aria-hidden": "true" });
      fill(bar, share(cell), wilson(cell.refused, cell.n));
      line.append(make("span", words, "what"), bar, make("b", percent(share(cell))));
      const budget = alpha && this.about.region ? `, budget ${percent(alpha)}` : "";
      const named = kind === "lookalike" ? `; as ${c} ${percent(cell.n ? cell.as / cell.n : null)} ${interval(cell.as, cell.n)}${budget}` : "";
      line.append(make("small", `${interval(cell.refused, cell.n)}, ${cell.refused} of ${cell.n}${named}`));
      lines.push(line);
    }
    this.rows[c].rates.replaceChildren(...lines);
  }

  drawTradeOff(counts) {
    const region = outside({ ...this.dial, tau: this.about.region ?? {} }, this.about.point, this.about.region)?.length === 0 ? this.about.region : null;
    const made = curve(this.evaluation, this.dial, region);
    const at = (all) => ({ x: share(all.lookalike), y: share(all.refuse), ordinary: share(all.general) });
    const now = at(counts.all);
    drawCurve(byId("curve"), made.steps, region ? made.from : Infinity, now, at(this.first.all));
    byId("thick").hidden = region === null;
    byId("curve-text").textContent =
      `The dial now: ${percent(now.y)} refused of what should be at ${percent(now.x)} of harmless look-alikes.`;
  }

  drawFlips(found) {
    const only = byId("flip-category").value;
    const some = only ? found.filter((f) => f.row.category === only) : found;
    const refused = some.filter((f) => f.refuses).length;
    byId("flip-count").textContent =
      some.length === 0 ? "No prompt flips against the loaded point." : `${some.length} flip against the loaded point: ${refused} now refused, ${some.length - refused} now answered; ${some.filter((f) => f.worse).length} for the worse.`;
    if (byId("flips").hidden) {
      return;
    }
    const lines = some.slice(0, SHOWN).map((f) => {
      const line = make("li", null, f.worse ? "worse" : "better");
      line.append(make("span", f.refuses ? "now refused" : "now answered", "chip"));
      line.append(make("span", f.row.text ?? f.row.id, "prompt"));
      const about = f.row.category === "general" ? KINDS.general : `${f.row.category}, ${KINDS[f.row.kind]}`;
      line.append(make("small", `${about}; p(${this.names[f.best]}) ${f.p.toFixed(3)}`));
      return line;
    });
    if (some.length > SHOWN) {
      lines.push(make("li", `and ${some.length - SHOWN} more`, "muted"));
    }
    byId("flips").replaceChildren(...lines);
  }

  /** What the sliders say about a prompt of the chat. */
  whatIf(probabilities) {
    const row = this.names.map((c) => probabilities[c] ?? 0);
    const made = decide(row, cutsOf(this.dial, this.names), this.dial.rule);
    const words = made.index === row.length - 1 ? "answer" : `refuse (${this.names[made.index]})`;
    return `With the sliders as they stand: ${made.steered ? words : "the model's own choice"}.`;
  }

  async save(keep) {
    const thresholds = {};
    for (const c of this.categories) {
      if (this.dial.on[c] || c in (this.about.point?.thresholds ?? {})) {
        thresholds[c] = { tau: this.dial.tau[c], mode: this.dial.on[c] ? "enforce" : "shadow" };
      }
    }
    const body = { name: byId("name").value, rule: this.dial.rule, thresholds: thresholds, save: keep };
    try {
      const made = await (await call("demur/operating-points", { method: "POST", body: JSON.stringify(body) })).json();
      if (!keep) {
        download(made.file, made.yaml);
      } else if (made.usable) {
        this.board.onSaved(made.id);
      }
      const use = made.usable ? " The chat uses it from now on." : keep ? " Requests may not name it here (overrides), so the chat stays with the loaded point." : "";
      const promise = made.guarantee ? " The guarantee holds for it." : " It has no guarantee.";
      byId("saved").textContent = `${keep ? "Saved as" : "Downloaded"} ${made.file}.${promise}${use}${made.lowers ? ` Allowed by the operator: ${made.lowers}.` : ""}`;
      byId("saved").className = "";
    } catch (error) {
      byId("saved").textContent = `Not saved: ${error.message}`;
      byId("saved").className = "failed";
    }
  }
}

const share = (cell) => (cell && cell.n ? cell.refused / cell.n : null);

function interval(k, n) {
  const ends = wilson(k, n);
  return ends === null ? "no prompts" : `[${(100 * ends[0]).toFixed(1)}–${(100 * ends[1]).toFixed(1)}]`;
}

function download(name, text) {
  const link = make("a", null, "", { download: name });
  link.href = URL.createObjectURL(new Blob([text], { type: "application/yaml" }));
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 10000);
}
