// The page of one run, and the comparison of several.

import { act, alert, announce, api, ApiError, badge, button, confirm, copyButton, duration, empty, FINISHED, h, link, measure, nameOf, number, pairs, plain, progressOf, session, shortId, table, tiles, time } from "./lib.js";
import { Chart, Series } from "./chart.js";
import { live } from "./live.js";

const LOG_PAGE = 200;
/** Lines kept in the document. */
const MOST_LINES = 2000;
const LOSSES = { train_loss: "Training loss", valid_loss: "Validation loss" };
const NAMES = { ...LOSSES, learning_rate: "Learning rate", grad_norm: "Gradient norm", valid_mean_token_accuracy: "Validation token accuracy", mean_train_loss: "Mean training loss", tokens: "Trained tokens", tokens_per_second: "Tokens per second", memory_bytes: "Memory" };
const METHODS = { sft: "Supervised", dpo: "Preference (DPO)", classifier: "Classifier" };

const readable = (name) => NAMES[name] ?? name[0].toUpperCase() + name.slice(1).replaceAll("_", " ");

export async function run(page, id, context) {
  const path = `v1/fine_tuning/jobs/${encodeURIComponent(id)}`;
  let [state, job, measured, tail, files] = await Promise.all([
    api(`console/runs/${encodeURIComponent(id)}`), api(path),
    api(`console/runs/${encodeURIComponent(id)}/metrics`),
    api(`console/runs/${encodeURIComponent(id)}/log?limit=${LOG_PAGE}`),
    fileNames(),
  ]);
  if (!context.isShown()) return;
  context.title(nameOf(state));
  live.seen(state.at);

  const top = h("div", { class: "head" });
  const place = h("div", {});
  const failure = h("div", {});
  const facts = h("div", {});
  const checkpoints = h("div", {});
  const configuration = h("div", {});
  const card = h("section", { class: "panel", hidden: true });
  const heading = h("h1", { tabindex: -1 });
  const status = h("span", { role: "status" });
  const actions = h("div", { class: "actions" });
  top.append(h("div", { class: "title" }, h("a", { class: "crumb", href: "#/runs" }, "Runs"), heading,
    h("p", { class: "sub" }, status, h("code", {}, state.id), copyButton(state.id, "Copy id"))), actions);

  // -- chart --
  const select = h("select", { "aria-label": "Metric" });
  const losses = [new Series("Training", { color: 0 }), new Series("Validation", { color: 1, dashed: true })];
  const chart = new Chart("Loss by step", losses);
  context.onLeave(() => chart.destroy());
  const others = new Map();
  function offer(name) {
    if (name in LOSSES || others.has(name)) return;
    others.set(name, new Series(readable(name), { color: 2 }));
    select.append(h("option", { value: name }, readable(name)));
  }
  select.append(h("option", { value: "" }, "Loss"));
  select.addEventListener("change", () => {
    chart.series = select.value ? [others.get(select.value)] : losses;
    chart.title = `${select.value ? readable(select.value) : "Loss"} by step`;
    chart.update();
  });
  function add(name, steps, values) {
    if (name === "train_loss") losses[0].set(steps, values);
    else if (name === "valid_loss") losses[1].set(steps, values);
    else { offer(name); others.get(name).set(steps, values); }
  }
  for (const [name, [steps, values]] of Object.entries(measured.series)) add(name, steps, values);

  // -- log --
  const lines = h("ol", { class: "lines" });
  const box = h("div", { class: "log", tabindex: 0, role: "log", "aria-live": "off", "aria-label": "Log" }, lines);
  const following = h("input", { type: "checkbox", checked: true });
  const withMetrics = h("input", { type: "checkbox", checked: true });
  const older = button("Load earlier lines", loadOlder, { kind: "small quiet" });
  const noLines = h("p", { class: "muted quiet-space" }, "No log yet. Lines appear here as soon as the run writes some.");
  withMetrics.addEventListener("change", () => lines.classList.toggle("no-metrics", !withMetrics.checked));
  box.addEventListener("scroll", () => {
    const isAtEnd = box.scrollHeight - box.scrollTop - box.clientHeight < 30;
    if (following.checked !== isAtEnd) following.checked = isAtEnd;
  }, { passive: true });
  following.addEventListener("change", toEnd);
  let lastLine = 0;
  let firstLine = Infinity;
  const line = (record) => h("li", { class: `${record.level} ${record.source}` },
    h("time", { datetime: new Date(record.at * 1000).toISOString(), title: new Date(record.at * 1000).toLocaleString("en") },
      new Date(record.at * 1000).toLocaleTimeString("en", { hourCycle: "h23" })),
    h("span", {}, record.message));
  function append(records) {
    const fresh = records.filter((record) => record.seq > lastLine);
    if (!fresh.length) return;
    lines.append(...fresh.map(line));
    lastLine = fresh.at(-1).seq;
    firstLine = Math.min(firstLine, fresh[0].seq);
    while (lines.childElementCount > MOST_LINES) { lines.firstChild.remove(); firstLine += 1; }
    older.hidden = firstLine <= 1;
    noLines.hidden = true;
    toEnd();
  }
  function toEnd() { if (following.checked) box.scrollTop = box.scrollHeight; }
  async function loadOlder() {
    const found = await act(older, place, () => api(`console/runs/${state.id}/log?limit=${LOG_PAGE}&before=${firstLine}`));
    if (!found?.length) { older.hidden = true; return; }
    const before = box.scrollHeight;
    lines.prepend(...found.map(line));
    firstLine = found[0].seq;
    older.hidden = firstLine <= 1;
    box.scrollTop += box.scrollHeight - before;
  }

  page.append(top, place, failure, facts,
    h("div", { class: "columns" },
      h("div", {},
        h("section", { class: "panel" }, h("div", { class: "panel-head" }, h("h2", {}, "Metrics"), chart.tools, select), chart.element),
        h("section", { class: "panel" }, h("div", { class: "panel-head" }, h("h2", {}, "Log"),
          h("label", { class: "check" }, withMetrics, "Metrics"), h("label", { class: "check" }, following, "Follow")),
        older, noLines, box)),
      h("div", {},
        card,
        h("section", { class: "panel" }, h("h2", {}, "Configuration"), configuration),
        h("section", { class: "panel" }, h("h2", {}, "Checkpoints"), checkpoints))));
  older.hidden = true;
  append(tail);
  chart.update();

  // -- what changes --
  function drawState() {
    heading.textContent = nameOf(state);
    status.replaceChildren(badge(state), state.queue_position ? ` position ${state.queue_position} in the queue` : "");
    const part = progressOf(state);
    const ended = state.finished_at ?? Date.now() / 1000;
    const elapsed = state.started_at ? ended - state.started_at : null;
    const left = part > 0.02 && !FINISHED.has(state.status) && elapsed ? elapsed / part - elapsed : null;
    const quote = job.metadata ?? {};
    const tokens = state.trained_tokens ?? state.metrics?.tokens;
    const entries = [
      ["Progress", part === null ? (state.step ? `${number(state.step)} steps` : "–")
        : h("span", {}, h("progress", { value: part, max: 1, "aria-label": "Progress" }), `${number(state.step ?? 0)} / ${number(state.total_steps)} steps`)],
      ["Training loss", measure(state.train_loss ?? losses[0].last)],
      ["Validation loss", measure(state.valid_loss ?? losses[1].last)],
      [FINISHED.has(state.status) ? "Duration" : "Elapsed", duration(elapsed)],
      left !== null ? ["Remaining", `about ${duration(left > 120 ? Math.round(left / 60) * 60 : left)}`] : null,
      ["Trained tokens", tokens === undefined ? null : number(tokens)],
      quote.cost ? ["Estimated cost", `${number(quote.cost)} ${quote.cost_currency ?? ""}`] : null,
    ];
    facts.replaceChildren(tiles(entries));
    drawActions();
    failure.replaceChildren();
    if (state.failure) {
      const { message, hint, errors, retryable } = state.failure;
      failure.append(alert("The run failed", message, hint ? h("p", { class: "hint" }, hint) : null,
        retryable ? h("p", { class: "hint" }, "It may succeed if it is launched again unchanged.") : null,
        errors.length > 1 ? h("ul", {}, errors.map((each) => h("li", {}, [each.file, each.line_number ? `line ${each.line_number}` : "", each.field].filter(Boolean).join(", "), each.file || each.field ? ": " : "", each.message))) : null));
    } else if (state.stale && !FINISHED.has(state.status)) {
      failure.append(h("p", { class: "note" }, state.stale));
    }
  }

  function drawActions() {
    const able = session.value.capabilities;
    const writes = session.value.key.scope !== "read";
    const act_ = (label, target, options) => {
      const element = button(label, () => act(element, place, async () => {
        await api(target, { method: "POST", body: {} });
        announce(`${label} requested`);
        await refresh();
      }), options);
      return element;
    };
    const openai = `openai/v1/fine_tuning/jobs/${state.id}`;
    const stop = button("Stop", async () => {
      if (!await confirm("Stop this run?", "Training ends. A stopped run cannot be continued here.", "Stop the run")) return;
      await act(stop, place, async () => { await api(`${path}/cancel`, { method: "POST", body: {} }); await refresh(); });
    }, { kind: "danger", symbol: "stop" });
    const busy = ["pending", "validating", "ready", "initializing", "running", "paused"].includes(state.status);
    const started = ["initializing", "running", "paused"].includes(state.status);
    const focused = actions.contains(document.activeElement) ? document.activeElement.textContent : null;
    actions.replaceChildren(...[
      writes && state.status === "ready" ? act_("Start", `${path}/start`, { kind: "primary", symbol: "launch" }) : null,
      writes && able.pauses && state.status === "running" ? act_("Pause", `${openai}/pause`, { symbol: "pause" }) : null,
      writes && able.pauses && state.status === "paused" ? act_("Resume", `${openai}/resume`, { kind: "primary", symbol: "launch" }) : null,
      writes && busy && (able.stops || !started) ? stop : null,
      state.status === "completed" && state.method !== "classifier" && state.fine_tuned_model
        ? link("Chat", `#/chat?model=${encodeURIComponent(state.fine_tuned_model)}`, { kind: "primary", symbol: "chat" }) : null,
      writes && FINISHED.has(state.status) && state.method === "sft" ? link("Launch again", `#/launch?from=${state.id}`, {}) : null,
    ].filter(Boolean));
    if (focused) ([...actions.children].find((each) => each.textContent === focused) ?? heading).focus({ preventScroll: true });
  }

  function drawJob() {
    const name = (fileId) => h("a", { href: `#/file/${fileId}?model=${encodeURIComponent(job.model)}` }, files.get(fileId) ?? shortId(fileId));
    const list = (ids) => (ids?.length ? ids.map((fileId, at) => [at ? ", " : "", name(fileId)]) : null);
    configuration.replaceChildren(pairs([
      ["Model", job.model], ["Method", METHODS[state.method] ?? state.method],
      ["Training data", list(job.training_files)], ["Validation data", list(job.validation_files)],
      ...Object.entries(job.hyperparameters ?? {}).filter(([, value]) => value !== null)
        .map(([key, value]) => [readable(key), plain(value)]),
      ["Project", state.project], ["Backend", state.backend],
      ["Created", time(state.created_at)],
      ["Started", state.started_at ? time(state.started_at) : null],
      ["Finished", state.finished_at ? time(state.finished_at) : null],
    ]));
    const rows = job.checkpoints ?? [];
    checkpoints.replaceChildren(rows.length ? table("Checkpoints", [
      ["Step", (point) => number(point.step_number)],
      ["Training", (point) => measure(point.metrics.train_loss), "number"],
      ["Validation", (point) => measure(point.metrics.valid_loss), "number"],
      ["Saved", (point) => time(point.created_at), "number"],
    ], rows) : h("p", { class: "muted" }, "Checkpoints appear here while the run trains."));
  }

  let described = null;
  async function drawCard() {
    const model = state.fine_tuned_model;
    if (!model || model === described) return;
    described = model;
    let found = {};
    try { found = await api(`v1/models/${encodeURIComponent(model)}`); } catch (error) {
      if (!(error instanceof ApiError && error.status === 404)) throw error;
    }
    if (!context.isShown()) return;
    card.hidden = false;
    card.replaceChildren(h("h2", {}, "Model"),
      found.id ? pairs([
        ["Name", h("span", { class: "with-copy" }, h("code", {}, model), copyButton(model))],
        ["Base model", found.root], ["Context", found.max_context_length ? `${number(found.max_context_length)} tokens` : null],
        ["Answers chats", found.capabilities?.completion_chat ? "yes" : "no"],
        ["Description", found.description],
        ["Created", time(found.created)],
      ]) : h("p", { class: "muted" }, "The model has been deleted."));
  }

  let refreshing = false;
  async function refresh() {
    if (refreshing) return;
    refreshing = true;
    try {
      [state, job] = await Promise.all([api(`console/runs/${state.id}`), api(path)]);
      if (!context.isShown()) return;
      drawState();
      drawJob();
      await drawCard();
    } catch (error) {
      if (error.name !== "AbortError" && context.isShown()) place.replaceChildren(alert("", error));
    } finally {
      refreshing = false;
    }
  }

  drawState();
  drawJob();
  live.follow({ [state.id]: Math.min(measured.cursor, lastLine) });
  const end = live.listen((name, data) => {
    if (name === "log" && data.run === state.id) {
      append(data.records);
      for (const record of data.records) {
        for (const [key, value] of Object.entries(record.metrics)) add(key, [record.step], [value]);
      }
      chart.update();
      if (data.records.some((record) => record.source === "checkpoint")) refresh();
    }
    if (name === "reload") refresh();
    const mine = name === "runs" && data.find((each) => each.id === state.id);
    if (mine) {
      const isNews = mine.status !== state.status || mine.fine_tuned_model !== state.fine_tuned_model;
      state = { ...state, ...mine };
      if (isNews) { announce(`${nameOf(state)} is ${state.status}`); refresh(); } else drawState();
    }
  });
  const tick = setInterval(() => { if (!document.hidden && state.started_at && !FINISHED.has(state.status)) drawTime(); }, 1000);
  function drawTime() {
    const cell = [...facts.firstChild.children].find((each) => each.firstChild.textContent === "Elapsed");
    if (cell) cell.lastChild.textContent = duration(Date.now() / 1000 - state.started_at);
  }
  context.onLeave(() => { end(); clearInterval(tick); live.follow({}); });
  await drawCard();
}

async function fileNames() {
  try {
    const found = await api("v1/files?page_size=1000&include_total=false");
    return new Map(found.data.map((file) => [file.id, file.filename]));
  } catch {
    return new Map();  // the ids are shown instead
  }
}

export async function compare(page, _, context) {
  const ids = (context.query.get("runs") ?? "").split(",").filter(Boolean).slice(0, 8);
  context.title("Compare runs");
  page.append(h("div", { class: "head" }, h("div", { class: "title" }, h("a", { class: "crumb", href: "#/runs" }, "Runs"), h("h1", { tabindex: -1 }, "Compare runs"))));
  if (ids.length < 2) {
    page.append(empty("Nothing to compare", "Select two or more runs in the list.", link("Show runs", "#/runs", { kind: "primary" })));
    return;
  }
  const found = await Promise.all(ids.map(async (id) => {
    const [state, job, measured] = await Promise.all([
      api(`console/runs/${encodeURIComponent(id)}`), api(`v1/fine_tuning/jobs/${encodeURIComponent(id)}`), api(`console/runs/${encodeURIComponent(id)}/metrics`)]);
    return { state, job, measured };
  }));
  if (!context.isShown()) return;
  const label = ({ state }) => `${nameOf(state)} ${shortId(state.id)}`;
  const names = [...new Set(found.flatMap(({ measured }) => Object.keys(measured.series)))].filter((name) => !(name in LOSSES));
  const select = h("select", { "aria-label": "Metric" }, h("option", { value: "" }, "Loss"), names.map((name) => h("option", { value: name }, readable(name))));
  const all = new Map();
  found.forEach((each, index) => {
    for (const [name, [steps, values]] of Object.entries(each.measured.series)) {
      const series = new Series(`${label(each)}${name === "valid_loss" ? " (validation)" : ""}`, { color: index, dashed: name === "valid_loss" });
      series.set(steps, values);
      all.set(`${each.state.id} ${name}`, series);
    }
  });
  const pick = () => {
    const wanted = select.value ? [select.value] : Object.keys(LOSSES);
    return found.flatMap(({ state }) => wanted.map((name) => {
      const key = `${state.id} ${name}`;
      if (!all.has(key) && name === "train_loss") all.set(key, new Series(label({ state }), { color: ids.indexOf(state.id) }));
      return all.get(key);
    })).filter(Boolean);
  };
  const chart = new Chart("Loss by step", pick());
  context.onLeave(() => chart.destroy());
  select.addEventListener("change", () => { chart.series = pick(); chart.title = `${select.value ? readable(select.value) : "Loss"} by step`; chart.update(); });

  const settings = new Map();
  const put = (name, index, value) => {
    if (!settings.has(name)) settings.set(name, Array(found.length).fill(""));
    settings.get(name)[index] = value;
  };
  found.forEach(({ state, job }, index) => {
    put("Model", index, job.model);
    put("Method", index, METHODS[state.method] ?? state.method);
    for (const [name, value] of Object.entries(job.hyperparameters ?? {})) if (value !== null) put(readable(name), index, plain(value));
    put("Steps", index, number(state.step));
    put("Training loss", index, measure(state.train_loss));
    put("Validation loss", index, measure(state.valid_loss));
    put("Trained tokens", index, number(state.trained_tokens));
    put("Duration", index, state.started_at ? duration((state.finished_at ?? Date.now() / 1000) - state.started_at) : "–");
  });
  const status = found.map(({ state }) => h("td", {}, badge(state)));
  page.append(
    h("section", { class: "panel" }, h("div", { class: "panel-head" }, h("h2", {}, "Metrics"), chart.tools, select), chart.element),
    h("section", { class: "panel" }, h("h2", {}, "Differences"),
      h("div", { class: "scroll", tabindex: 0, role: "region", "aria-label": "Differences" },
        h("table", { class: "compare" },
          h("thead", {}, h("tr", {}, h("td", {}), found.map(({ state }, index) => h("th", { scope: "col" },
            h("span", { class: `swatch s${index + 1}` }), h("a", { href: `#/run/${state.id}` }, nameOf(state)), h("span", { class: "sub" }, shortId(state.id)))))),
          h("tbody", {}, h("tr", {}, h("th", { scope: "row" }, "Status"), status),
            [...settings].map(([name, values]) => h("tr", { class: new Set(values).size > 1 ? "differs" : "" },
              h("th", { scope: "row" }, name), values.map((value) => h("td", {}, value)))))))));
  chart.update();
  live.seen(found[0].state.at);
  live.follow(Object.fromEntries(found.map(({ state, measured }) => [state.id, measured.cursor])));
  const end = live.listen((name, data) => {
    if (name === "log") {
      for (const record of data.records) {
        for (const [key, value] of Object.entries(record.metrics)) all.get(`${data.run} ${key}`)?.set([record.step], [value]);
      }
      chart.update();
    }
    if (name === "runs") {
      found.forEach((each, index) => {
        const mine = data.find((one) => one.id === each.state.id);
        if (mine) status[index].replaceChildren(badge(mine));
      });
    }
  });
  context.onLeave(() => { end(); live.follow({}); });
}
