// Small helpers: elements, words, and requests with the key. Model text only ever becomes text, never markup.
export const KEY = "demur-key";
export const byId = (id) => document.getElementById(id);

/** An element with text, class and attributes; never from markup. */
export function make(tag, text, kind, attributes) {
  const element = document.createElement(tag);
  if (text !== undefined && text !== null) {
    element.textContent = text;
  }
  if (kind) {
    element.className = kind;
  }
  for (const [name, value] of Object.entries(attributes ?? {})) {
    element.setAttribute(name, value);
  }
  return element;
}

export const percent = (share) => (share === null ? "–" : `${(100 * share).toFixed(1)} %`);

export function tell(text) {
  byId("notice").textContent = text;
  byId("notice").hidden = !text;
}

/** fetch with the key; on an error status throws an Error with the server's words. */
export async function call(path, options) {
  const headers = { ...(options?.body ? { "Content-Type": "application/json" } : {}) };
  const key = sessionStorage.getItem(KEY);
  if (key) {
    headers.Authorization = `Bearer ${key}`;
  }
  // with a key of our own the browser's is left out: it would ask for another one where ours is wrong
  const credentials = key ? "omit" : "same-origin";
  const response = await fetch(path, { ...options, headers: headers, credentials: credentials });
  if (response.status === 401) {
    byId("access").open = true;
    byId("key").focus();
  }
  if (!response.ok) {
    throw new Error(await reason(response));
  }
  return response;
}

async function reason(response) {
  try {
    const body = await response.json();
    return body.error?.message ?? `the server answered ${response.status}`;
  } catch {
    return `the server answered ${response.status}`;
  }
}
