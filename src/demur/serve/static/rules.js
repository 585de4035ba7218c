// The decision rules of demur/calibrate/decide.py on stored probabilities, and what is counted from them.

const Z = 1.959963984540054; // 97.5 % point of the normal distribution

/**
 * What an operating point says about one row of probabilities.
 * row: columns as `names`, "respond" last. cuts: threshold per refuse column, null where it is not steered.
 * Returns the column chosen, the likeliest refuse column, its score, and whether the rule spoke at all.
 */
export function decide(row, cuts, rule) {
  const respond = row.length - 1;
  let best = 0;
  for (let c = 1; c < respond; c += 1) {
    if (row[c] > row[best]) {
      best = c;
    }
  }
  const score = steeringScore(row, best, cuts, rule);
  const cut = cuts[best];
  if (cut === null) {
    return { index: row[respond] > row[best] ? respond : best, best: best, score: score, steered: false };
  }
  const refuse = rule === "compare" || cut < 0 ? row[best] >= row[respond] : score >= cut;
  return { index: refuse ? best : respond, best: best, score: score, steered: true };
}

function steeringScore(row, best, cuts, rule) {
  const respond = row.length - 1;
  if (rule === "total_mass") {
    let sum = 0;
    for (let c = 0; c < respond; c += 1) {
      sum += cuts[c] === null ? 0 : row[c];
    }
    return sum;
  }
  if (rule === "bias") {
    const both = row[best] + row[respond];
    return both > 0 ? row[best] / both : 0.5;
  }
  return row[best];
}

/** Thresholds as `decide` takes them: under "compare" every category is steered where the point has none (`bare`). */
export function cutsOf(dial, names) {
  const cuts = names.slice(0, -1).map((c) => (dial.on[c] ? dial.tau[c] : null));
  return dial.rule === "compare" && dial.bare && cuts.every((cut) => cut === null) ? cuts.map(() => -1) : cuts;
}

/** The column served for each stored row: the rule's, or the model's own (-1: no control token). */
export function choices(evaluation, dial) {
  const cuts = cutsOf(dial, evaluation.names);
  return evaluation.rows.map((row) => {
    const made = decide(row.probabilities, cuts, dial.rule);
    return made.steered ? made.index : row.own;
  });
}

/** Wilson interval of k of n, as [low, high]; null for n = 0. */
export function wilson(k, n) {
  if (n === 0) {
    return null;
  }
  const p = k / n;
  const z2 = Z * Z;
  const centre = (p + z2 / (2 * n)) / (1 + z2 / n);
  const half = Math.sqrt((z2 * p * (1 - p)) / n + (z2 * z2) / (4 * n * n)) / (1 + z2 / n);
  return [k === 0 ? 0 : centre - half, k === n ? 1 : centre + half];
}

/** Counts {refused, as, n} by category and kind; "all" adds the categories up. Rows without a choice are left out. */
export function tally(evaluation, chosen) {
  const respond = evaluation.names.length - 1;
  const counts = {};
  evaluation.rows.forEach((row, i) => {
    for (const name of [row.category, "all"]) {
      counts[name] ??= {};
      const cell = (counts[name][row.kind] ??= { refused: 0, as: 0, n: 0 });
      if (chosen[i] >= 0) {
        cell.n += 1;
        cell.refused += chosen[i] !== respond;
        cell.as += evaluation.names[chosen[i]] === row.category;
      }
    }
  });
  return counts;
}

/** Rows whose answer turns into a refusal or back between two lists of choices. */
export function flips(evaluation, before, after) {
  const respond = evaluation.names.length - 1;
  const found = [];
  evaluation.rows.forEach((row, i) => {
    const was = before[i] >= 0 && before[i] !== respond;
    const is = after[i] >= 0 && after[i] !== respond;
    if (was !== is) {
      const probabilities = row.probabilities.slice(0, -1);
      const best = probabilities.indexOf(Math.max(...probabilities));
      found.push({ row: row, refuses: is, worse: is !== (row.kind === "refuse"), best: best, p: probabilities[best] });
    }
  });
  return found.sort((a, b) => b.worse - a.worse || a.refuses - b.refuses || b.p - a.p);
}

/** The least thresholds of the guarantee against the dial: what lies outside, in words; null without a guarantee. */
export function outside(dial, point, region) {
  if (region === null) {
    return null;
  }
  const why = [];
  if (dial.rule !== point.rule) {
    why.push(`the rule is ${dial.rule}, calibrated was ${point.rule}`);
  }
  for (const c of Object.keys(dial.on)) {
    if (c in region && !dial.on[c]) {
      why.push(`${c} is not enforced`);
    } else if (c in region && dial.tau[c] < region[c]) {
      why.push(`${c} is below ${region[c].toFixed(3)}`);
    } else if (!(c in region) && dial.on[c]) {
      why.push(`${c} was not calibrated`);
    }
  }
  return why;
}

const logit = (p) => Math.log(p / (1 - p));

/**
 * The trade-off when all thresholds move together by the same amount of log-odds, from refusing all to nothing.
 * Each step holds the shift and the share refused of each kind; `from` is the least shift the guarantee covers.
 */
export function curve(evaluation, dial, region) {
  const respond = evaluation.names.length - 1;
  const cuts = cutsOf(dial, evaluation.names);
  const total = { refuse: 0, lookalike: 0, general: 0 };
  const refused = { refuse: 0, lookalike: 0, general: 0 };
  const moving = [];
  for (const row of evaluation.rows) {
    const made = decide(row.probabilities, cuts, dial.rule);
    const choice = made.steered ? made.index : row.own;
    if (choice < 0) {
      continue;
    }
    total[row.kind] += 1;
    const cut = cuts[made.best];
    if (!made.steered || dial.rule === "compare" || cut <= 0 || cut >= 1) {
      refused[row.kind] += choice !== respond; // no shift moves it
    } else {
      const margin = logit(made.score) - logit(cut);
      moving.push([made.index === respond ? Math.min(margin, -1e-12) : Math.max(margin, 0), row.kind]);
    }
  }
  moving.sort((a, b) => b[0] - a[0]);
  const share = (kind) => (total[kind] ? refused[kind] / total[kind] : null);
  const step = (shift) => ({ shift: shift, refuse: share("refuse"), lookalike: share("lookalike"), general: share("general") });
  const steps = [step(Infinity)];
  moving.forEach(([margin, kind], i) => {
    refused[kind] += 1;
    if (i + 1 === moving.length || moving[i + 1][0] < margin) {
      steps.push(step(margin));
    }
  });
  return { steps: steps, from: leastShift(dial, region) };
}

function leastShift(dial, region) {
  let least = -Infinity;
  for (const c of Object.keys(region ?? {})) {
    if (dial.tau[c] > 0 && dial.tau[c] < 1 && region[c] > 0 && region[c] < 1) {
      least = Math.max(least, logit(region[c]) - logit(dial.tau[c]));
    } else if (dial.tau[c] < region[c]) {
      return Infinity; // no shift brings this one up
    }
  }
  return least;
}
