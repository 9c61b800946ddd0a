// The list of runs. Only the rows on the screen are in the document, however many there are.

import { alert, announce, api, badge, button, duration, empty, FINISHED, h, link, measure, nameOf, number, position, progressOf, session, shortId, time } from "./lib.js";
import { live } from "./live.js";

const PAGE = 100;
/** Rows above and below the screen. */
const AROUND = 12;
const FILTERS = [
  ["", "All"], ["pending,validating,ready,initializing,running,paused,stopping,unknown", "Active"],
  ["completed", "Completed"], ["failed", "Failed"], ["cancelled", "Cancelled"],
];
const MOST_COMPARED = 8;

export async function runs(page, _, context) {
  context.title("Runs");
  const isAdmin = session.value.key.scope === "admin";
  const filters = { status: context.query.get("status") ?? "", text: context.query.get("text") ?? "" };
  const chosen = new Set();
  let rows = [];
  let byId = new Map();
  let drawn = new Map();
  let hasMore = false;
  let total = null;
  let loading = null;

  const search = h("input", { type: "search", placeholder: "Name, model or id", "aria-label": "Search runs", value: filters.text });
  const count = h("p", { class: "count", role: "status" });
  const notice = h("div", {});
  const compare = h("div", { class: "bar", hidden: true });
  const above = h("tr", { class: "space", "aria-hidden": "true" }, h("td", { colspan: 9 }));
  const below = h("tr", { class: "space", "aria-hidden": "true" }, h("td", { colspan: 9 }));
  const body = h("tbody", {}, above, below);
  const table = h("table", { class: "runs", "aria-label": "Runs" },
    h("thead", {}, h("tr", {},
      h("th", { scope: "col", class: "pick" }, h("span", { class: "hidden-text" }, "Compare")),
      h("th", { scope: "col" }, "Run"), h("th", { scope: "col" }, "Status"),
      h("th", { scope: "col", class: "wide-only" }, "Model"),
      isAdmin ? h("th", { scope: "col", class: "wider-only" }, "Project") : null,
      h("th", { scope: "col", class: "number wide-only" }, "Loss"),
      h("th", { scope: "col", class: "number wider-only" }, "Tokens"),
      h("th", { scope: "col", class: "number wider-only" }, "Duration"),
      h("th", { scope: "col", class: "number not-narrow" }, "Created"))),
    body);
  const nothing = h("div", { hidden: true });

  const segments = h("div", { class: "segments", role: "group", "aria-label": "Status" },
    FILTERS.map(([value, label]) => h("button", {
      type: "button", "aria-pressed": String(value === filters.status),
      onclick: (event) => {
        filters.status = value;
        for (const each of segments.children) each.setAttribute("aria-pressed", String(each === event.currentTarget));
        reload();
      },
    }, label)));

  page.append(
    h("div", { class: "head" }, h("h1", { tabindex: -1 }, "Runs"), count,
      session.value.key.scope === "read" ? null : link("Launch a run", "#/launch", { kind: "primary", symbol: "launch" })),
    h("div", { class: "filters" }, search, segments),
    notice, compare, table, nothing);

  function cells(run) {
    const part = progressOf(run);
    const steps = run.step ? `${number(run.step)}${run.total_steps ? ` / ${number(run.total_steps)}` : ""}` : "";
    const ended = run.finished_at ?? Date.now() / 1000;
    const pick = h("input", {
      type: "checkbox", checked: chosen.has(run.id), "aria-label": `Compare ${nameOf(run)} ${shortId(run.id)}`,
      onchange: (event) => choose(run.id, event.currentTarget.checked),
    });
    return [
      h("td", { class: "pick" }, pick),
      h("th", { scope: "row" },
        h("a", { href: `#/run/${run.id}`, class: "name" }, nameOf(run)),
        h("span", { class: "sub" }, h("span", { class: "id" }, shortId(run.id)), h("span", { class: "narrow-only" }, time(run.created_at)))),
      h("td", {}, badge(run),
        position(run) ? h("span", { class: "sub" }, position(run)) : null,
        FINISHED.has(run.status) || !steps ? null : h("span", { class: "sub" },
          part === null ? null : h("progress", { value: part, max: 1, "aria-label": "Progress" }), steps)),
      h("td", { class: "wide-only model" }, run.model),
      isAdmin ? h("td", { class: "wider-only" }, run.project) : null,
      h("td", { class: "number wide-only" }, measure(run.train_loss)),
      h("td", { class: "number wider-only" }, number(run.trained_tokens)),
      h("td", { class: "number wider-only" }, run.started_at ? duration(ended - run.started_at) : "–"),
      h("td", { class: "number not-narrow" }, time(run.created_at)),
    ].filter(Boolean);
  }

  function choose(id, on) {
    if (on) chosen.add(id);
    else chosen.delete(id);
    compare.hidden = chosen.size === 0;
    const enough = chosen.size >= 2 && chosen.size <= MOST_COMPARED;
    compare.replaceChildren(h("span", {}, `${chosen.size} selected`),
      enough ? link("Compare", `#/compare?runs=${[...chosen].join(",")}`, { kind: "primary small" })
        : h("span", { class: "muted" }, chosen.size < 2 ? "Select another run to compare." : `Select at most ${MOST_COMPARED} runs.`),
      button("Clear", () => { chosen.clear(); choose("", false); drawn.forEach((row) => row.remove()); drawn.clear(); draw(); }, { kind: "small quiet" }));
  }

  let height = 60;

  /** Put the rows on the screen into the document, and take the others out. */
  function draw() {
    const top = table.getBoundingClientRect().top;
    const from = Math.max(0, Math.floor(-top / height) - AROUND);
    const to = Math.min(rows.length, from + Math.ceil(innerHeight / height) + 2 * AROUND);
    const wanted = rows.slice(from, to);
    const ids = new Set(wanted.map((run) => run.id));
    for (const [id, row] of drawn) if (!ids.has(id)) { row.remove(); drawn.delete(id); }
    let next = above.nextSibling;
    wanted.forEach((run, index) => {
      let row = drawn.get(run.id);
      if (!row) {
        row = h("tr", { "data-id": run.id }, cells(run));
        drawn.set(run.id, row);
      }
      row.setAttribute("aria-rowindex", from + index + 2);
      if (row === next) next = row.nextSibling;
      else body.insertBefore(row, next);
    });
    above.firstChild.style.height = `${from * height}px`;
    below.firstChild.style.height = `${(rows.length - to) * height}px`;
    above.hidden = from === 0;
    below.hidden = to === rows.length;
    const first = drawn.values().next().value;
    if (first) {
      const real = first.getBoundingClientRect().height;
      if (real && Math.abs(real - height) > 0.5) { height = real; draw(); return; }
    }
    if (hasMore && to > rows.length - PAGE / 2) load();
  }

  let planned = 0;
  const plan = () => { cancelAnimationFrame(planned); planned = requestAnimationFrame(draw); };

  function redraw(id) {
    const row = drawn.get(id);
    // The focus stays where it is in a row that changes.
    const focused = row?.contains(document.activeElement) ? [...row.querySelectorAll("a, input")].indexOf(document.activeElement) : -1;
    row?.replaceChildren(...cells(byId.get(id)));
    if (focused >= 0) row.querySelectorAll("a, input")[focused]?.focus({ preventScroll: true });
  }

  function summary() {
    count.textContent = total === null ? "" : `${number(total)} ${total === 1 ? "run" : "runs"}`;
    table.setAttribute("aria-rowcount", hasMore ? total + 1 : rows.length + 1);
    table.hidden = rows.length === 0;
    nothing.hidden = rows.length > 0 || total === null;
    if (nothing.hidden) return;
    const filtered = filters.text || filters.status;
    nothing.replaceChildren(filtered
      ? empty("No runs match these filters", "Change the search or the status.", button("Show all runs", () => { search.value = filters.text = ""; segments.firstChild.click(); }))
      : empty("No runs yet", "Upload a data file, preview what is trained on, and launch a run.", link("Upload data", "#/data", { symbol: "upload" }), link("Launch a run", "#/launch", { kind: "primary", symbol: "launch" })));
  }

  async function load() {
    if (loading) return;
    const abort = new AbortController();
    loading = abort;
    const query = new URLSearchParams({ limit: PAGE });
    if (filters.status) query.set("status", filters.status);
    if (filters.text) query.set("text", filters.text);
    if (rows.length) query.set("after", rows.at(-1).id);
    try {
      const found = await api(`console/runs?${query}`, { signal: abort.signal });
      if (loading !== abort) return;
      live.seen(found.at);
      const fresh = found.data.filter((run) => !byId.has(run.id));
      for (const run of fresh) byId.set(run.id, run);
      rows = rows.concat(fresh);
      hasMore = found.has_more;
      if (found.total !== undefined) {
        total = found.total;
        if (filters.text || filters.status) announce(`${total} runs match`);
      }
      notice.replaceChildren();
      loading = null;
      summary();
      draw();
    } catch (error) {
      if (loading === abort) loading = null;
      if (error.name !== "AbortError") notice.replaceChildren(alert("", error, button("Try again", load, { kind: "small" })));
    }
  }

  async function reload() {
    loading?.abort();
    loading = null;
    rows = [];
    byId = new Map();
    for (const row of drawn.values()) row.remove();
    drawn = new Map();
    hasMore = false;
    const query = new URLSearchParams(Object.entries(filters).filter(([, value]) => value));
    history.replaceState(null, "", `#/runs${query.size ? `?${query}` : ""}`);
    await load();
  }

  function matches(run) {
    const text = filters.text.toLowerCase();
    const words = [run.id, run.model, run.name, run.fine_tuned_model];
    return (!filters.status || filters.status.split(",").includes(run.status))
      && (!text || words.some((word) => word?.toLowerCase().includes(text)));
  }

  function take(run) {
    if (byId.has(run.id)) {
      const at = rows.findIndex((each) => each.id === run.id);
      rows[at] = run;
      byId.set(run.id, run);
      redraw(run.id);
      return;
    }
    // A row further down is loaded when the user gets there.
    const isNew = !rows.length || run.created_at >= rows[0].created_at;
    if (!isNew || !matches(run)) return;
    rows.unshift(run);
    byId.set(run.id, run);
    total = (total ?? 0) + 1;
    summary();
    plan();
  }

  let timer = 0;
  search.addEventListener("input", () => {
    clearTimeout(timer);
    timer = setTimeout(() => { filters.text = search.value.trim(); reload(); }, 250);
  });
  addEventListener("scroll", plan, { passive: true });
  addEventListener("resize", plan, { passive: true });
  const stop = live.listen((name, data) => {
    if (name === "runs") data.forEach(take);
    if (name === "reload") reload();
  });
  context.onLeave(() => {
    stop();
    loading?.abort();
    clearTimeout(timer);
    removeEventListener("scroll", plan);
    removeEventListener("resize", plan);
  });
  await load();
}
