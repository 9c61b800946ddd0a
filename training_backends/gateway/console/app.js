// The shell: signing in, navigation, and one view at a time.

import { alert, announce, api, button, field, h, icon, session } from "./lib.js";
import { live } from "./live.js";
import { runs } from "./runs.js";

const VIEWS = {
  runs: { title: "Runs", symbol: "runs", load: async () => runs },
  data: { title: "Data", symbol: "data", load: async () => (await import("./data.js")).data },
  launch: { title: "Launch", symbol: "launch", load: async () => (await import("./launch.js")).launch },
  chat: { title: "Chat", symbol: "chat", load: async () => (await import("./chat.js")).chat },
  keys: { title: "Keys", symbol: "keys", admin: true, load: async () => (await import("./keys.js")).keys },
  run: { within: "runs", load: async () => (await import("./run.js")).run },
  compare: { within: "runs", load: async () => (await import("./run.js")).compare },
  file: { within: "data", load: async () => (await import("./data.js")).file },
};
const STATES = { live: "Live", connecting: "Reconnecting…", paused: "Paused", ended: "" };

const root = document.getElementById("app");
let main = null;
let leave = null;
let shown = 0;

/** `#/run/ID?x=1` is view `run` with the argument `ID`. */
function route() {
  const [path, query] = location.hash.replace(/^#\/?/, "").split("?");
  const [name, ...rest] = path.split("/").map(decodeURIComponent);
  return { name: name in VIEWS ? name : "runs", argument: rest.join("/"), query: new URLSearchParams(query) };
}

function shell() {
  const { key, backend, version } = session.value;
  const state = h("span", { class: "state", "aria-hidden": "true" });
  live.onState = (word) => {
    state.className = `state ${word}`;
    state.textContent = STATES[word];
  };
  const links = Object.entries(VIEWS).filter(([, view]) => view.title && (!view.admin || key.scope === "admin"))
    .map(([name, view]) => h("a", { href: `#/${name}`, "data-view": name }, icon(view.symbol), h("span", {}, view.title)));
  main = h("main", { id: "main", tabindex: -1 });
  root.replaceChildren(
    h("a", { class: "skip", href: "#main", onclick: (event) => { event.preventDefault(); main.focus(); } }, "Skip to content"),
    h("header", { class: "side" },
      h("a", { class: "brand", href: "#/runs" }, logo(), h("span", {}, "training-backends")),
      h("nav", { "aria-label": "Main" }, links),
      h("div", { class: "account" },
        state,
        h("p", { class: "who", title: `Key ${key.id}` }, h("strong", {}, key.name || key.id),
          h("span", {}, `${key.project} · ${key.scope}`)),
        h("p", { class: "who about" }, h("span", {}, `${backend} backend · ${version}`)),
        button("Sign out", signOut, { kind: "quiet small", symbol: "out" }))),
    main);
}

const logo = () => h("img", { src: new URL("./icon.svg", import.meta.url).href, alt: "", width: 28, height: 28 });

async function show() {
  const { name, argument, query } = route();
  const view = VIEWS[name];
  const mine = ++shown;
  leave?.();
  leave = null;
  for (const element of document.querySelectorAll("nav a")) {
    if (element.dataset.view === (view.within ?? name)) element.setAttribute("aria-current", "page");
    else element.removeAttribute("aria-current");
  }
  const page = h("div", { class: `view ${name}` });
  const cleanups = [];
  leave = () => cleanups.forEach((clean) => clean());
  const context = {
    query,
    /** Call `clean` when the user goes elsewhere. */
    onLeave: (clean) => (mine === shown ? cleanups.push(clean) : clean()),
    isShown: () => mine === shown,
    title: (text) => { if (mine === shown) document.title = `${text} · training-backends`; },
  };
  const first = main.childElementCount === 0;
  try {
    const render = await view.load();
    if (mine !== shown) return;
    main.replaceChildren(page);
    await render(page, argument, context);
  } catch (error) {
    if (mine !== shown || error.name === "AbortError") return;
    main.replaceChildren(page);
    const title = error.status === 404 ? "Not found" : "This page could not be loaded";
    page.replaceChildren(h("h1", { tabindex: -1 }, title), alert("", error.status === 404 ? "It does not exist, or belongs to another project." : error),
      h("p", {}, button("Try again", show)));
    context.title(title);
  }
  if (mine !== shown) return;
  // Screen readers and the keyboard continue in the new view.
  if (!first) page.querySelector("h1")?.focus({ preventScroll: true });
  if (!first) scrollTo(0, 0);
  announce(document.title);
}

// -- signing in ------------------------------------------------------------------------

function signInForm(onDone, notice) {
  const input = h("input", { type: "password", name: "key", autocomplete: "current-password", required: true, spellcheck: "false", autocapitalize: "off" });
  const place = h("div", { "aria-live": "assertive" }, notice ? alert("", notice) : null);
  const submit = h("button", { class: "button primary wide" }, "Sign in");
  return h("form", {
    class: "sign-in",
    onsubmit: async (event) => {
      event.preventDefault();
      submit.disabled = true;
      try {
        const found = await api("console/session", { method: "POST", body: { key: input.value } });
        input.value = "";
        onDone(found);
      } catch (error) {
        const unknown = error.status === 401 && error.message === "Unauthorized";
        place.replaceChildren(alert("", unknown ? "This is not a key of this gateway." : error));
        input.select();
        input.focus();
      } finally {
        submit.disabled = false;
      }
    },
  },
  logo(), h("h1", { id: "sign-in" }, "Sign in"),
  h("p", { class: "lead" }, "Use an API key of this gateway."),
  field("API key", input), place, submit,
  h("p", { class: "help" }, "No key yet? On the gateway's machine run ", h("code", {}, "training-backends keys create --name me"), "."));
}

function signIn() {
  document.title = "Sign in · training-backends";
  root.replaceChildren(h("main", { class: "center" }, signInForm((found) => {
    session.value = found;
    start();
  })));
  root.querySelector("input").focus();
}

let renewal = null;

/** Ask for the key again above the page, which keeps what was entered. */
session.onEnd = () => {
  renewal ??= new Promise((resolve) => {
    live.end();
    const before = session.value.key;
    session.value = null;
    const dialog = h("dialog", { class: "center", "aria-labelledby": "sign-in" }, signInForm((found) => {
      session.value = found;
      dialog.close();
      dialog.remove();
      renewal = null;
      if (found.key.id !== before.id) location.reload();
      else resolve();
    }, "Your session has ended. What you entered is kept."));
    dialog.addEventListener("cancel", (event) => event.preventDefault());
    document.body.append(dialog);
    dialog.showModal();
  });
  return renewal;
};

async function signOut() {
  try {
    await api("console/session", { method: "DELETE" });
  } finally {
    location.hash = "";
    location.reload();
  }
}

function start() {
  shell();
  show();
}

addEventListener("hashchange", () => { if (session.value) show(); });
live.listen((name) => { if (name === "signed-out") session.onEnd(); });

async function begin() {
  try {
    session.value = await api("console/session");
  } catch (error) {
    root.replaceChildren(h("main", { class: "center" }, alert("The console could not be loaded", error), button("Try again", begin)));
    return;
  }
  if (session.value) start();
  else signIn();
}

begin();
