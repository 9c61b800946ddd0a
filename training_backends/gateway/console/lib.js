// What all views share: elements, formatting, the API and messages.

const BASE = new URL(".", document.baseURI);

// -- elements --------------------------------------------------------------------------

/** Make an element. Text is always text: nothing here parses HTML. */
export function h(tag, attributes, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes ?? {})) {
    if (value === undefined || value === null || value === false) continue;
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (name === "value" || name === "checked" || name === "disabled") element[name] = value;
    else element.setAttribute(name, value === true ? "" : value);
  }
  element.append(...children.flat(Infinity).filter((it) => it !== null && it !== undefined && it !== false));
  return element;
}

const ICONS = {
  runs: "M3 5h2M3 10h2M3 15h2M8 5h9M8 10h9M8 15h9",
  data: "M4 5.500C4 4 7 3 10 3s6 1 6 2.500S13 8 10 8 4 7 4 5.500zm0 0v9C4 16 7 17 10 17s6-1 6-2.500v-9M4 10c0 1.500 3 2.500 6 2.500s6-1 6-2.500",
  launch: "M7 4.500v11l9-5.500z",
  chat: "M4 4h12a1 1 0 0 1 1 1v8a1 1 0 0 1-1 1H9l-4 3v-3H4a1 1 0 0 1-1-1V5a1 1 0 0 1 1-1z",
  keys: "M11.500 8.500 17 3M15 5l2 2M12.500 7.500l2 2M12 12a4 4 0 1 1-8 0 4 4 0 0 1 8 0z",
  upload: "M10 13V4M6 8l4-4 4 4M4 13v3h12v-3",
  back: "M12 4 6 10l6 6",
  out: "M12 4h4v12h-4M3 10h9M8 6l4 4-4 4",
  copy: "M7 7h9v9H7zM4 13V4h9",
  check: "M4 10.500l4 4 8-9",
  stop: "M5 5h10v10H5z",
  pause: "M7 4v12M13 4v12",
  alert: "M10 3 2.500 16.500h15zM10 8.500v3.500M10 14.500v.2",
};

export function icon(name) {
  const svg = document.createElementNS("http://www.w3.org/2000/svg", "svg");
  svg.setAttribute("viewBox", "0 0 20 20");
  svg.setAttribute("class", "icon");
  svg.setAttribute("aria-hidden", "true");
  const path = document.createElementNS("http://www.w3.org/2000/svg", "path");
  path.setAttribute("d", ICONS[name]);
  svg.append(path);
  return svg;
}

let lastId = 0;
export const newId = () => `e${++lastId}`;

/** A labelled control with its help; the label and the help are tied to it. */
export function field(label, control, help) {
  control.id ||= newId();
  const parts = [h("label", { for: control.id }, label), control];
  if (help) {
    const id = newId();
    control.setAttribute("aria-describedby", id);
    parts.push(h("p", { id, class: "help" }, help));
  }
  return h("div", { class: "field" }, parts);
}

export function button(label, onclick, { kind = "", symbol, ...more } = {}) {
  return h("button", { type: "button", class: `button ${kind}`, onclick, ...more },
    symbol ? icon(symbol) : null, h("span", {}, label));
}

export function link(label, href, { kind = "", symbol } = {}) {
  return h("a", { class: `button ${kind}`, href }, symbol ? icon(symbol) : null, h("span", {}, label));
}

/** A table whose columns are [title, cell(row), class]. */
export function table(caption, columns, rows, { scroll = true } = {}) {
  const element = h("table", {},
    h("caption", { class: "hidden-text" }, caption),
    h("thead", {}, h("tr", {}, columns.map(([title, , kind]) =>
      h("th", { scope: "col", class: kind ?? "" }, title || h("span", { class: "hidden-text" }, "Actions"))))),
    h("tbody", {}, rows.map((row) => h("tr", {}, columns.map(([, cell, kind], column) =>
      h(column ? "td" : "th", { class: kind ?? "", scope: column ? null : "row" }, cell(row)))))));
  // Reachable by keyboard, because it may have to be scrolled.
  return scroll ? h("div", { class: "scroll", tabindex: 0, role: "region", "aria-label": caption }, element) : element;
}

export function empty(title, text, ...actions) {
  return h("div", { class: "empty" }, h("h2", {}, title), h("p", {}, text), h("div", { class: "actions" }, actions));
}

const described = (kind, entries) => h("dl", { class: kind },
  entries.filter((entry) => entry && entry[1] !== null && entry[1] !== undefined && entry[1] !== "")
    .map(([name, value]) => h("div", {}, h("dt", {}, name), h("dd", {}, value))));

/** Names and values below one another, without those that have none. */
export const pairs = (entries) => described("pairs", entries);

/** Names and values side by side. */
export const tiles = (entries) => described("tiles", entries);

// -- formatting ------------------------------------------------------------------------

const NUMBER = new Intl.NumberFormat("en", { maximumFractionDigits: 2 });
const ABSOLUTE = new Intl.DateTimeFormat("en", { dateStyle: "medium", timeStyle: "long" });
const RELATIVE = new Intl.RelativeTimeFormat("en", { numeric: "auto", style: "short" });
const STEPS = [["second", 60], ["minute", 60], ["hour", 24], ["day", 30], ["month", 12], ["year", Infinity]];

export const number = (value) => (value === null || value === undefined ? "–" : NUMBER.format(value));

/** A measured value with four significant digits, whatever its size. */
export function measure(value) {
  if (value === null || value === undefined) return "–";
  const size = Math.abs(value);
  if (size >= 1e6) return value.toExponential(2);
  if (size !== 0 && size < 1e-3) return String(Number(value.toPrecision(3)));
  return Number.isInteger(value) ? NUMBER.format(value) : value.toPrecision(4);
}

/** A setting as somebody would write it. */
export const plain = (value) => (typeof value !== "number" ? String(value)
  : Number.isInteger(value) ? NUMBER.format(value) : String(Number(value.toPrecision(6))));

export function bytes(value) {
  const units = ["B", "kB", "MB", "GB"];
  let unit = 0;
  while (value >= 1000 && unit < units.length - 1) { value /= 1000; unit += 1; }
  return `${NUMBER.format(unit ? Number(value.toPrecision(3)) : value)} ${units[unit]}`;
}

export function duration(seconds) {
  if (seconds === null || seconds === undefined || seconds < 0) return "–";
  const whole = Math.round(seconds);
  const [d, hours, m, s] = [Math.floor(whole / 86400), Math.floor(whole / 3600) % 24, Math.floor(whole / 60) % 60, whole % 60];
  if (d) return `${d} d ${hours} h`;
  if (hours) return `${hours} h ${m} min`;
  if (m) return s ? `${m} min ${s} s` : `${m} min`;
  return `${s} s`;
}

function relative(seconds) {
  let value = seconds - Date.now() / 1000;
  if (Math.abs(value) < 5) return "just now";
  for (const [unit, size] of STEPS) {
    if (Math.abs(Math.round(value)) < size) return RELATIVE.format(Math.round(value), unit);
    value /= size;
  }
  return "";
}

/** A relative time that stays current, with the absolute one as its title. */
export function time(seconds, missing = "–") {
  if (!seconds) return missing;
  const date = new Date(seconds * 1000);
  return h("time", { datetime: date.toISOString(), title: ABSOLUTE.format(date), "data-at": seconds }, relative(seconds));
}

setInterval(() => {
  if (document.hidden) return;
  for (const element of document.querySelectorAll("time[data-at]")) {
    const text = relative(Number(element.dataset.at));
    if (element.textContent !== text) element.textContent = text;
  }
}, 10_000);

export const FINISHED = new Set(["completed", "failed", "cancelled"]);

export function badge(run) {
  const word = run.status === "pending" && run.queue_position ? "queued" : run.status;
  return h("span", { class: `badge ${run.status}` }, h("span", { class: "dot" }), word);
}

/** The place in the queue, if it waits in one. */
export const position = (run) => (run.queue_position ? `position ${run.queue_position}` : null);

export const nameOf = (run) => run.name || `${run.model}`;
export const shortId = (id) => id.slice(0, 8);

export function progressOf(run) {
  return run.total_steps ? Math.min(1, (run.step ?? 0) / run.total_steps) : null;
}

// -- API -------------------------------------------------------------------------------

export const session = { value: null, onEnd: async () => {} };

export class ApiError extends Error {
  constructor(status, body, fallback) {
    super(sentence(body) ?? fallback);
    this.status = status;
    this.body = body;
  }
}

function sentence(body) {
  const detail = body?.detail ?? body?.message ?? body?.error?.message;
  if (!Array.isArray(detail)) return detail;
  return detail.map((item) => {
    const place = item.loc.filter((part) => !["body", "query", "path"].includes(part)).join(".");
    return place ? `${place}: ${item.msg}` : item.msg;
  }).join("; ");
}

export const address = (path) => new URL(path, BASE);

/** Send a request and return the response; a session that has ended is renewed first. */
export async function send(path, { method = "GET", body, form, signal, headers = {} } = {}) {
  for (;;) {
    const request = { method, signal, credentials: "same-origin", cache: "no-store", headers: { ...headers } };
    if (session.value) request.headers["x-console-token"] = session.value.token;
    if (body !== undefined) {
      request.body = JSON.stringify(body);
      request.headers["content-type"] = "application/json";
    }
    if (form) request.body = form;
    let response;
    try {
      response = await fetch(address(path), request);
    } catch (error) {
      if (error.name === "AbortError") throw error;
      throw new ApiError(0, null, "The gateway cannot be reached. Check that it is running, then try again.");
    }
    if (response.status === 401 && session.value) {
      await session.onEnd();
      continue;
    }
    if (response.ok) return response;
    let answer = null;
    try { answer = await response.json(); } catch { /* not JSON */ }
    throw new ApiError(response.status, answer, `The gateway answered with status ${response.status}.`);
  }
}

export async function api(path, options) {
  const response = await send(path, options);
  return response.status === 204 ? null : response.json();
}

/** Upload a file and report its progress, 0 to 1. */
export function upload(file, onProgress, signal) {
  return new Promise((resolve, reject) => {
    const request = new XMLHttpRequest();
    request.open("POST", address("console/files"));
    request.setRequestHeader("x-console-token", session.value.token);
    request.upload.addEventListener("progress", (event) => event.lengthComputable && onProgress(event.loaded / event.total));
    request.addEventListener("error", () => reject(new ApiError(0, null, "The upload was interrupted. Try again.")));
    request.addEventListener("abort", () => reject(new DOMException("", "AbortError")));
    request.addEventListener("load", () => {
      let answer = null;
      try { answer = JSON.parse(request.responseText); } catch { /* not JSON */ }
      if (request.status === 200) resolve(answer);
      else reject(new ApiError(request.status, answer, `The gateway answered with status ${request.status}.`));
    });
    signal?.addEventListener("abort", () => request.abort());
    const form = new FormData();
    form.append("purpose", "fine-tune");
    form.append("file", file);
    request.send(form);
  });
}

// -- messages --------------------------------------------------------------------------

export function announce(text) {
  document.getElementById("announcer").textContent = text;
}

/** A message that stays where the user works. */
export function alert(title, error, ...more) {
  const text = error instanceof Error ? error.message : error;
  return h("div", { class: "alert", role: "alert" }, icon("alert"),
    h("div", {}, title ? h("strong", {}, title) : null, h("p", {}, text), more));
}

/** Run an action of a button: disabled meanwhile, its error shown in `place`. */
export async function act(element, place, work) {
  element.disabled = true;
  element.setAttribute("aria-busy", "true");
  place.replaceChildren();
  try {
    return await work();
  } catch (error) {
    if (error.name !== "AbortError") place.replaceChildren(alert("", error));
    return undefined;
  } finally {
    element.disabled = false;
    element.removeAttribute("aria-busy");
  }
}

/** Ask before something that cannot be undone. */
export function confirm(title, text, action) {
  return new Promise((resolve) => {
    const id = newId();
    const dialog = h("dialog", { "aria-labelledby": id },
      h("form", { method: "dialog" }, h("h2", { id }, title), h("p", {}, text),
        h("div", { class: "actions end" },
          h("button", { class: "button", value: "" }, "Cancel"),
          h("button", { class: "button danger", value: "yes" }, action))));
    dialog.addEventListener("close", () => { dialog.remove(); resolve(dialog.returnValue === "yes"); });
    document.body.append(dialog);
    dialog.showModal();
  });
}

export function copyButton(text, label = "Copy") {
  const element = button(label, async () => {
    await navigator.clipboard.writeText(text);
    element.lastChild.textContent = "Copied";
    announce("Copied");
    setTimeout(() => { element.lastChild.textContent = label; }, 2000);
  }, { kind: "small", symbol: "copy" });
  return element;
}
