// The chat: streams from the same route that every client uses, and shows what the gateway decided.
import { byId, call, make, percent, tell } from "./page.js";

let about;
let dial;
let messages = [];
let running = null;

export function startChat(state, board) {
  about = state;
  dial = board;
  fillPoints();
  byId("ask").addEventListener("submit", (event) => {
    event.preventDefault();
    ask();
  });
  byId("message").addEventListener("keydown", (event) => {
    if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
      event.preventDefault();
      byId("ask").requestSubmit();
    }
  });
  byId("stop").addEventListener("click", () => running?.abort());
  byId("new").addEventListener("click", () => {
    running?.abort();
    messages = [];
    byId("log").replaceChildren(byId("empty") ?? make("p", "Ask something.", "muted", { id: "empty" }));
    byId("message").focus();
  });
  board.onSaved = (id) => {
    if (![...byId("point").options].some((o) => o.value === id)) {
      byId("point").append(make("option", id, "", { value: id }));
    }
    byId("under").hidden = false;
    byId("point").value = id;
  };
  board.onChange = () => document.querySelectorAll(".whatif").forEach((line) => line.redraw());
}

function fillPoints() {
  const loaded = about.point ? about.point.id : "the model's own choice";
  byId("point").append(make("option", loaded, "", { value: "" }));
  for (const id of about.overrides) {
    if (id !== about.point?.id) {
      byId("point").append(make("option", id, "", { value: id }));
    }
  }
  byId("under").hidden = byId("point").options.length < 2;
}

function request() {
  const system = byId("system").value.trim();
  const body = {
    model: about.model,
    messages: [...(system ? [{ role: "system", content: system }] : []), ...messages],
    max_tokens: Number(byId("tokens").value) || 256,
    temperature: Number(byId("temperature").value) || 0,
    stream: true,
  };
  if (byId("point").value) {
    body.demur = { operating_point: byId("point").value };
  }
  return JSON.stringify(body);
}

async function ask() {
  const text = byId("message").value.trim();
  if (!text || running) {
    return;
  }
  byId("empty")?.remove();
  messages.push({ role: "user", content: text });
  byId("message").value = "";
  byId("log").append(bubble("user", "You", text));
  const answer = bubble("assistant", about.model, "");
  answer.setAttribute("aria-busy", "true");
  byId("log").append(answer);
  byId("log").scrollTop = byId("log").scrollHeight;
  running = new AbortController();
  const here = { text: "", demur: null, finish: null, answer: answer, chat: messages };
  busy(true);
  tell("");
  try {
    const response = await call("v1/chat/completions", { method: "POST", body: request(), signal: running.signal });
    for await (const data of events(response.body)) {
      take(here, data);
    }
  } catch (error) {
    const why = error.name === "AbortError" ? "Stopped here." : `No answer: ${error.message}`;
    answer.append(make("p", why, error.name === "AbortError" ? "muted" : "failed"));
  }
  running = null;
  busy(false);
  answer.removeAttribute("aria-busy");
  if (here.text) {
    here.chat.push({ role: "assistant", content: here.text });
  } else {
    here.chat.pop(); // a question without an answer is not part of the conversation
  }
}

function busy(on) {
  byId("send").disabled = on;
  byId("stop").hidden = !on;
}

/** The data of server-sent events, parsed, until "[DONE]". */
async function* events(stream) {
  const reader = stream.getReader();
  const decoder = new TextDecoder();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    rest += decoder.decode(value, { stream: !done });
    const blocks = rest.split(/\r\n\r\n|\n\n|\r\r/);
    rest = done ? "" : blocks.pop();
    for (const block of blocks) {
      const lines = block.split(/\r\n|\n|\r/).filter((line) => line.startsWith("data:"));
      const data = lines.map((line) => line.slice(5).trimStart()).join("\n");
      if (data === "[DONE]") {
        return;
      }
      if (data) {
        yield JSON.parse(data);
      }
    }
    if (done) {
      return;
    }
  }
}

function take(here, data) {
  if (data.error) {
    throw new Error(data.error.message);
  }
  const choice = data.choices?.[0];
  const delta = choice?.delta ?? {};
  const words = here.answer.querySelector(".words");
  const log = byId("log");
  const atEnd = log.scrollHeight - log.scrollTop - log.clientHeight < 60;
  if (delta.reasoning_content) {
    thinking(here.answer).append(delta.reasoning_content);
  }
  if (delta.content) {
    here.text += delta.content;
    words.append(delta.content);
  }
  here.finish = choice?.finish_reason ?? here.finish;
  if (data.demur) {
    here.demur = { ...here.demur, ...data.demur };
    reloaded(here.demur);
    here.answer.querySelector(".decided")?.remove();
    here.answer.append(decided(here.demur, here.finish));
  }
  if (atEnd) {
    log.scrollTop = log.scrollHeight;
  }
}

/** The server took up another operating point since this page was loaded. */
function reloaded(demur) {
  if (!byId("point").value && !demur.canary && demur.operating_point !== (about.point?.id ?? null)) {
    tell(`The operating point in force is now ${demur.operating_point}. Reload this page to see its thresholds.`);
  }
}

function bubble(role, who, text) {
  const box = make("article", null, `bubble ${role}`);
  box.append(make("h3", who), make("p", text, "words"));
  return box;
}

function thinking(answer) {
  let box = answer.querySelector(".thinking");
  if (!box) {
    const folded = make("details");
    box = make("p", "", "thinking");
    folded.append(make("summary", "Thinking"), box);
    answer.querySelector(".words").before(folded);
  }
  return box;
}

/** Probabilities as bars, the decision, and what the sliders would have done. */
function decided(demur, finish) {
  const box = make("div", null, "decided");
  const line = make("p", null, "chips");
  line.append(make("span", verdict(demur), demur.enforced && demur.decision !== "respond" ? "chip refuse" : "chip"));
  line.append(make("span", demur.operating_point ? `point ${demur.operating_point}` : "no operating point", "chip quiet"));
  if (demur.source === "operator") {
    line.append(make("span", "operator's words", "chip quiet"));
  }
  if (demur.canary) {
    line.append(make("span", "on trial", "chip quiet"));
  }
  if (demur.shadow) {
    line.append(make("span", `in shadow: ${demur.shadow}`, "chip quiet"));
  }
  box.append(line);
  for (const [text, kind] of remarks(demur, finish)) {
    box.append(make("p", text, kind));
  }
  if (demur.probabilities && Object.keys(demur.probabilities).length) {
    box.append(bars(demur.probabilities));
    const whatif = make("p", "", "whatif muted");
    whatif.redraw = () => {
      whatif.textContent = dial.whatIf(demur.probabilities, demur.control_token);
    };
    whatif.redraw();
    box.append(whatif);
  }
  return box;
}

function verdict(demur) {
  if (demur.source === "operator" && !demur.enforced) {
    return "not answered";
  }
  if (demur.enforced) {
    return demur.decision === "respond" ? "decided: answer" : `decided: refuse (${demur.decision})`;
  }
  if (demur.control_token) {
    return demur.control_token === "respond" ? "model's own choice: answer" : `model's own choice: refuse (${demur.control_token})`;
  }
  return "model's own choice";
}

function remarks(demur, finish) {
  const found = [];
  if (demur.stopped) {
    const { by, at, p, threshold } = demur.stopped;
    found.push([`Stopped after ${at} tokens by ${by}: ${p.toFixed(3)} against ${threshold.toFixed(3)}.`, "failed"]);
  }
  if (demur.guard) {
    const { name, p, threshold, stopped } = demur.guard;
    found.push([`Guard ${name}: ${Number(p).toFixed(3)} against ${Number(threshold).toFixed(3)}${stopped ? ", stopped" : ""}.`, "muted"]);
  }
  if (finish === "length") {
    found.push(["Ended at the token limit.", "muted"]);
  }
  if (demur.problem) {
    found.push([`Not decided: ${demur.problem}`, "failed"]);
  }
  return found;
}

function bars(probabilities) {
  const list = make("dl", null, "bars", { "aria-label": "First-token probabilities" });
  for (const [category, p] of Object.entries(probabilities)) {
    const bar = make("dd", null, category === "respond" ? "answer" : "refusal");
    const fill = make("i");
    fill.style.width = `${100 * p}%`;
    const track = make("span", null, "bar", { "aria-hidden": "true" });
    track.append(fill);
    bar.append(track, make("span", percent(p), "value"));
    list.append(make("dt", category), bar);
  }
  return list;
}
