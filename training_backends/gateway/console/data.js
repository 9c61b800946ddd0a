// Data files: upload, inspection, and what of them is trained on.

import { act, alert, announce, api, bytes, button, confirm, empty, h, icon, link, number, session, table, tiles, time, upload } from "./lib.js";

const PAGE = 100;
const TYPES = { instruct: "Chat", pretrain: "Text", preference: "Preference pairs", classifier: "Classifier" };

/** The method for the type of a file's rows; otherwise supervised. */
export const METHOD_OF = { preference: "dpo", classifier: "classifier" };

/** A place to drop a file on, or to choose one; calls `onDone` with the stored file. */
export function uploader(onDone, context) {
  const input = h("input", { type: "file", id: "upload", accept: ".jsonl,.json,.gz,.zst" });
  const place = h("div", {});
  const bar = h("progress", { value: 0, max: 1, "aria-label": "Upload", hidden: true });
  const status = h("p", { role: "status" }, "JSON Lines, one example per line, up to ", bytes(session.value.max_upload_bytes), ".");
  const start = async (file) => {
    if (!file) return;
    const abort = new AbortController();
    context.onLeave(() => abort.abort());
    place.replaceChildren();
    bar.hidden = false;
    bar.value = 0;
    status.textContent = `Uploading ${file.name}…`;
    try {
      const stored = await upload(file, (part) => {
        bar.value = part;
        status.textContent = part < 1 ? `Uploading ${file.name}: ${Math.round(part * 100)} %` : `Checking ${file.name}…`;
      }, abort.signal);
      announce(`${file.name} uploaded`);
      status.textContent = `${file.name} is uploaded.`;
      onDone(stored);
    } catch (error) {
      if (error.name === "AbortError") return;
      const errors = error.body?.errors ?? [];
      status.textContent = `${file.name} was not stored.`;
      place.replaceChildren(alert(error.message, error.body?.description ?? "Correct the file and choose it again.",
        errors.length ? h("ul", {}, errors.slice(0, 20).map((each) => h("li", {}, `Line ${each.line_number}: ${each.message}`))) : null,
        errors.length > 20 ? h("p", {}, `and ${errors.length - 20} more lines`) : null));
    } finally {
      bar.hidden = true;
      input.value = "";
    }
  };
  input.addEventListener("change", () => start(input.files[0]));
  const area = h("div", {
    class: "drop",
    ondragover: (event) => { event.preventDefault(); area.classList.add("over"); },
    ondragleave: () => area.classList.remove("over"),
    ondrop: (event) => { event.preventDefault(); area.classList.remove("over"); start(event.dataTransfer.files[0]); },
  }, h("strong", {}, "Drop a data file here"), status, bar, input, h("label", { for: "upload", class: "button" }, icon("upload"), "Choose a file"));
  return h("div", {}, area, place);
}

export async function data(page, _, context) {
  context.title("Data");
  const writes = session.value.key.scope !== "read";
  const list = h("div", {});
  const place = h("div", {});
  const count = h("p", { class: "count", role: "status" });
  page.append(h("div", { class: "head" }, h("h1", { tabindex: -1 }, "Data"), count),
    writes ? uploader((stored) => { location.hash = `#/file/${stored.id}`; }, context) : "", place, list);
  let files = [];

  async function load() {
    const found = await api(`v1/files?page_size=${PAGE}&page=${files.length / PAGE}&include_total=true`);
    files = files.concat(found.data);
    count.textContent = `${number(found.total)} ${found.total === 1 ? "file" : "files"}`;
    draw(found.total);
  }

  function draw(total) {
    if (!files.length) {
      list.replaceChildren(empty("No data yet", writes ? "Upload a file of conversations to train on. It is checked line by line." : "Files that are uploaded to this project appear here."));
      return;
    }
    const found = table("Data files", [
      ["File", (file) => h("a", { href: `#/file/${file.id}`, class: "row-name" }, file.filename)],
      ["Rows", (file) => number(file.num_lines), "number"],
      ["Type", (file) => TYPES[file.sample_type] ?? file.sample_type ?? "–", "not-narrow"],
      ["Size", (file) => bytes(file.bytes), "number not-narrow"],
      ["Uploaded", (file) => time(file.created_at), "number"],
      ["", (file) => (writes ? button("Delete", (event) => remove(file, event.currentTarget), { kind: "small quiet", "aria-label": `Delete ${file.filename}` }) : ""), "number not-narrow"],
    ], files);
    found.classList.add("boxed");
    list.replaceChildren(found);
    if (files.length < total) {
      const more = button("Show more files", () => act(more, place, load));
      list.append(h("p", {}, more));
    }
  }

  async function remove(file, element) {
    if (!await confirm(`Delete ${file.filename}?`, "Runs that use it keep running. The file cannot be restored.", "Delete")) return;
    await act(element, place, async () => {
      await api(`v1/files/${file.id}`, { method: "DELETE" });
      announce(`${file.filename} deleted`);
      files = [];
      await load();
      page.querySelector("h1").focus();
    });
  }

  await load();
}

export async function file(page, id, context) {
  const path = `v1/files/${encodeURIComponent(id)}`;
  const [found, models] = await Promise.all([api(path), api("console/models")]);
  if (!context.isShown()) return;
  context.title(found.filename);
  const writes = session.value.key.scope !== "read";
  const looking = api(`console/files/${encodeURIComponent(id)}/inspection`);
  const method = looking.then((seen) => METHOD_OF[seen.sample_type] ?? "sft", () => "sft");
  const facts = h("div", { "aria-busy": "true" }, h("p", { class: "muted" }, "Inspecting the file…"));
  page.append(
    h("div", { class: "head" },
      h("div", { class: "title" }, h("a", { class: "crumb", href: "#/data" }, "Data"), h("h1", { tabindex: -1 }, found.filename),
        h("p", { class: "sub" }, bytes(found.bytes), h("span", {}, "uploaded ", time(found.created_at)), h("code", {}, found.id))),
      h("div", { class: "actions" }, link("Download", `${path}/content`, {}),
        writes ? link("Launch a run with it", `#/launch?file=${found.id}`, { kind: "primary", symbol: "launch" }) : null)),
    h("section", { class: "panel" }, h("h2", {}, "Inspection"), facts),
    preview(id, models, context, method));
  try {
    const seen = await looking;
    if (context.isShown()) drawFacts(facts, seen);
  } catch (error) {
    if (error.name !== "AbortError") facts.replaceChildren(alert("", error));
  }
  facts.removeAttribute("aria-busy");
}

function drawFacts(place, seen) {
  const summary = seen.summary ?? {};
  const warnings = seen.issues.filter((issue) => issue.severity === "warning").length;
  place.replaceChildren(
    tiles([
      ["Result", seen.errors ? h("span", { class: "badge error" }, h("span", { class: "dot" }), `${seen.errors} ${seen.errors === 1 ? "error" : "errors"}`)
        : h("span", { class: "badge completed" }, h("span", { class: "dot" }), "valid")],
      ["Rows", seen.rows === undefined ? null : `${number(seen.rows)}${seen.bad_rows ? `, ${number(seen.bad_rows)} invalid` : ""}`],
      ["Type", TYPES[seen.sample_type] ?? seen.sample_type],
      ["Messages", seen.turns ? number(seen.turns) : null],
      ["Roles", Object.entries(summary.roles ?? {}).map(([role, count]) => `${role} ${number(count)}`).join(", ")],
      ["Longest row", summary.longest_row ? bytes(summary.longest_row) : null],
      ["Tool calls", summary.tool_calls ? number(summary.tool_calls) : null],
      ["Duplicate rows", summary.duplicate_rows ? number(summary.duplicate_rows) : null],
      ["Warnings", warnings ? number(warnings) : null],
    ]));
  if (!seen.issues.length) return;
  place.append(h("h3", {}, "Errors and warnings"), table("Errors and warnings", [
    ["Line", (issue) => (issue.line ? number(issue.line) : "–")],
    ["Severity", (issue) => h("span", { class: `badge ${issue.severity}` }, issue.severity)],
    ["Problem", (issue) => [issue.field ? h("code", {}, `${issue.field}: `) : "", issue.message]],
    ["Fix", (issue) => issue.fix ?? "–"],
  ], seen.issues));
  place.lastChild.classList.add("limited");
  if (seen.more_issues) place.append(h("p", { class: "muted" }, `and ${number(seen.more_issues)} more`));
}

function preview(id, models, context, method) {
  const wanted = context.query.get("model");
  const select = h("select", { "aria-label": "Model" }, models.map((model) => h("option", { value: model.id, selected: model.id === wanted }, model.id)));
  const rows = h("select", { "aria-label": "Rows" }, [3, 10, 20].map((count) => h("option", { value: count }, `${count} rows`)));
  const place = h("div", {});
  let abort = null;
  const load = async () => {
    abort?.abort();
    abort = new AbortController();
    place.setAttribute("aria-busy", "true");
    try {
      const query = new URLSearchParams({ model: select.value, rows: rows.value, method: await method });
      const found = await api(`console/files/${encodeURIComponent(id)}/preview?${query}`, { signal: abort.signal });
      place.replaceChildren(...(found.length ? found.map(example) : [h("p", { class: "muted" }, "The file has no rows.")]));
    } catch (error) {
      if (error.name === "AbortError") return;
      place.replaceChildren(alert("", error), h("p", { class: "muted" }, "Choose another model to preview the rows."));
    }
    place.removeAttribute("aria-busy");
  };
  select.addEventListener("change", load);
  rows.addEventListener("change", load);
  context.onLeave(() => abort?.abort());
  load();
  return h("section", { class: "panel" },
    h("div", { class: "panel-head" }, h("h2", {}, "What is trained on"), select, rows),
    h("p", { class: "legend" }, h("span", {}, h("mark", {}, "Marked text"), " is trained on: the model learns to write it."), h("span", {}, "The rest is context, with the model's control tokens.")),
    place);
}

function example(row) {
  const several = row.examples > 1 ? `, example ${row.example} of ${row.examples}` : "";
  const head = h("header", {}, h("strong", {}, `Line ${row.line}${several}`), row.part ? h("span", {}, row.part) : null);
  if (row.reason) return h("article", { class: "example" }, head, h("p", {}, `Rejected: ${row.reason}`));
  head.append(h("span", {}, `${number(row.trained_tokens)} of ${number(row.tokens)} tokens trained on`));
  if (row.truncated) head.append(h("span", {}, `first ${number(row.limit)} tokens shown`));
  return h("article", { class: "example" }, head,
    h("p", { tabindex: 0, role: "group", "aria-label": `Line ${row.line}` }, row.segments.map((part) => (part.trained ? h("mark", {}, part.text) : part.text))));
}
