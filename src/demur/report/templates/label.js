"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
const items = data.items;
const labels = new Map();
const values = new Set(data.choices.map((c) => c.value));
let at = 0;
let unsaved = false;
const byId = (id) => document.getElementById(id);

function show() {
  byId("prompt").textContent = items[at].prompt;
  byId("answer").textContent = items[at].answer;
  byId("answer").scrollTop = 0;
  byId("progress").value = labels.size;
  byId("count").textContent = "answer " + (at + 1) + " of " + items.length + ", " + labels.size + " labelled" + (unsaved ? ", not saved" : "");
  const mine = labels.get(items[at].row);
  for (const button of document.querySelectorAll(".choice")) {
    button.setAttribute("aria-pressed", String(button.dataset.value === mine));
  }
}

function move(step) {
  at = Math.min(items.length - 1, Math.max(0, at + step));
  show();
}

function toOpen() {
  for (let step = 1; step <= items.length; step += 1) {
    const i = (at + step) % items.length;
    if (!labels.has(items[i].row)) {
      at = i;
      break;
    }
  }
  show();
}

function set(value) {
  labels.set(items[at].row, value);
  unsaved = true;
  move(1);
}

function clear() {
  if (labels.delete(items[at].row)) {
    unsaved = true;
  }
  show();
}

function save(name, type, lines) {
  const link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob([lines.join("\n") + "\n"], { type: type }));
  link.download = "labels-" + data.sheet + name;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 10000);
  unsaved = false;
  show();
}

function done() {
  return items.filter((item) => labels.has(item.row)).map((item) => ({ row: item.row, label: labels.get(item.row) }));
}

// Fields of a CSV text, quoted ones too: the sheet itself can be loaded as well as a saved file.
function csv(text) {
  const rows = [[""]];
  let quoted = false;
  for (let i = 0; i < text.length; i += 1) {
    const c = text[i];
    const row = rows[rows.length - 1];
    if (quoted) {
      if (c === '"' && text[i + 1] === '"') {
        row[row.length - 1] += '"';
        i += 1;
      } else if (c === '"') {
        quoted = false;
      } else {
        row[row.length - 1] += c;
      }
    } else if (c === '"') {
      quoted = true;
    } else if (c === ",") {
      row.push("");
    } else if (c === "\n") {
      rows.push([""]);
    } else if (c !== "\r") {
      row[row.length - 1] += c;
    }
  }
  const head = rows.shift().map((name) => name.replace("\ufeff", ""));
  return rows.map((row) => ({ row: row[head.indexOf("row")], label: row[head.indexOf("label")] }));
}

function read(name, text) {
  const known = new Set(items.map((item) => item.row));
  let found = 0;
  let strange = 0;
  const rows = name.endsWith(".csv") ? csv(text) : text.split("\n").filter((line) => line.trim()).map((line) => JSON.parse(line));
  for (const one of rows) {
    if (known.has(one.row) && values.has(one.label)) {
      labels.set(one.row, one.label);
      found += 1;
    } else if (one.label) {
      strange += 1;
    }
  }
  at = items.length - 1;
  toOpen();
  byId("count").textContent += "; " + found + " labels read" + (strange ? ", " + strange + " rows do not belong to this sheet" : "");
}

document.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey) {
    return;
  }
  const choice = data.choices.find((c) => c.key === event.key);
  if (choice) {
    set(choice.value);
  } else if (event.key === "ArrowRight") {
    move(1);
  } else if (event.key === "ArrowLeft") {
    move(-1);
  } else if (event.key === "n") {
    toOpen();
  } else if (event.key === "Delete" || event.key === "Backspace") {
    clear();
  } else {
    return;
  }
  event.preventDefault();
});
for (const button of document.querySelectorAll(".choice")) {
  button.addEventListener("click", () => set(button.dataset.value));
}
byId("back").addEventListener("click", () => move(-1));
byId("next").addEventListener("click", () => move(1));
byId("open").addEventListener("click", toOpen);
byId("save-csv").addEventListener("click", () => save(".csv", "text/csv", ["row,label", ...done().map((one) => one.row + "," + one.label)]));
byId("save-jsonl").addEventListener("click", () => save(".jsonl", "application/x-ndjson", done().map((one) => JSON.stringify(one))));
byId("load").addEventListener("change", (event) => {
  const file = event.target.files[0];
  if (file) {
    file.text().then((text) => read(file.name, text)).catch((e) => { byId("count").textContent = "cannot read this file: " + e.message; });
  }
});
window.addEventListener("beforeunload", (event) => {
  if (unsaved) {
    event.preventDefault();
  }
});
show();
