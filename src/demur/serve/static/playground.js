// Boot: what this server serves, its stored evaluation, the API key.
import { startChat } from "./chat.js";
import { startDial } from "./dial.js";
import { KEY, byId, call, percent, tell } from "./page.js";

async function start() {
  let about;
  try {
    about = await (await call("demur/point")).json();
  } catch (error) {
    tell(`Nothing could be loaded: ${error.message}`);
    return;
  }
  tell(about.problem ? `The operating-point file has a problem, so the last good one is in force: ${about.problem}` : "");
  byId("model").textContent = about.model;
  const canary = about.canary ? `; ${percent(about.canary)} of requests fall under another point on trial` : "";
  byId("serving").textContent = (about.point ? `Operating point ${about.point.id}` : "No operating point: the model chooses for itself") + canary;
  let evaluation = null;
  if (!about.evaluation_problem) {
    evaluation = await (await call("demur/evaluation")).json();
    const columns = ["id", "category", "kind", "own", "probabilities", "text"];
    evaluation.rows = evaluation.rows.map((row) => Object.fromEntries(columns.map((c, i) => [c, row[i]])));
  }
  const dial = startDial(about, evaluation);
  startChat(about, dial);
}

byId("key-form").addEventListener("submit", (event) => {
  event.preventDefault();
  const key = byId("key").value.trim();
  if (key) {
    sessionStorage.setItem(KEY, key);
  } else {
    sessionStorage.removeItem(KEY);
  }
  window.location.reload();
});
start().catch((error) => tell(`The page could not be drawn: ${error.message}`));
