// The launch form. The estimate comes before the button.

import { alert, announce, api, bytes, duration, empty, field, h, icon, link, number, session, time } from "./lib.js";
import { uploader } from "./data.js";

const WAIT = 500;
const NUMBERS = [
  ["learning_rate", "Learning rate", "any", "Empty: the backend's default."],
  ["seq_len", "Sequence length", "1", "Longer examples are truncated. Empty: the default."],
  ["weight_decay", "Weight decay", "any", ""],
  ["warmup_fraction", "Warmup fraction", "any", "Part of the steps, 0 to 1."],
];

export async function launch(page, _, context) {
  context.title("Launch a run");
  page.append(h("div", { class: "head" }, h("div", { class: "title" }, h("a", { class: "crumb", href: "#/runs" }, "Runs"), h("h1", { tabindex: -1 }, "Launch a run"))));
  if (session.value.key.scope === "read") {
    page.append(empty("This key is read-only", "Sign in with a key of scope write to launch runs.", link("Show runs", "#/runs")));
    return;
  }
  const from = context.query.get("from");
  const [models, found, before] = await Promise.all([
    api("console/models"), api("v1/files?page_size=100&purpose=fine-tune&include_total=false"),
    from ? api(`v1/fine_tuning/jobs/${encodeURIComponent(from)}`) : null,
  ]);
  if (!context.isShown()) return;
  const offers = models.filter((model) => model.methods.includes("sft"));
  const able = session.value.capabilities;
  const takes = (name) => able.hyperparameters === null || able.hyperparameters.includes(name);
  const given = before?.hyperparameters ?? {};
  const training = new Set(before?.training_files ?? [context.query.get("file")].filter(Boolean));
  const validation = new Set(before?.validation_files ?? []);
  let files = found.data;

  const model = h("select", { name: "model" }, offers.map((offer) =>
    h("option", { value: offer.id, selected: offer.id === before?.model }, offer.id)));
  const name = h("input", { name: "suffix", maxlength: 64, autocomplete: "off", spellcheck: "false", value: before?.suffix ?? "", placeholder: "support-bot" });
  const trainList = h("div", { class: "choices" });
  const validList = h("div", { class: "choices" });
  const unit = h("select", { "aria-label": "Unit of the length" }, h("option", { value: "epochs" }, "epochs"), h("option", { value: "training_steps" }, "steps"));
  const byEpochs = takes("epochs");
  if (!byEpochs) unit.firstChild.remove();
  const epochs = before && byEpochs && given.epochs ? given.epochs : null;
  unit.value = epochs || (byEpochs && !given.training_steps) ? "epochs" : "training_steps";
  const length = h("input", { name: "length", type: "number", min: 0, step: "any", inputmode: "decimal", value: epochs ?? given.training_steps ?? (byEpochs ? session.value.default_epochs : 100) });
  const inputs = new Map(NUMBERS.filter(([key]) => takes(key)).map(([key, label, step, help]) => {
    const known = before && given[key] !== null ? given[key] : undefined;
    return [key, { label, help, input: h("input", { name: key, type: "number", min: 0, step, inputmode: "decimal", value: known ?? "", autocomplete: "off" }) }];
  }));

  const estimate = h("div", { "aria-live": "polite" });
  const place = h("div", {});
  const submit = h("button", { class: "button primary", type: "submit", disabled: true }, icon("launch"), h("span", {}, "Launch"));

  function choices(list, type, chosen, groupName, legend) {
    const focused = list.contains(document.activeElement) ? document.activeElement.value : null;
    list.replaceChildren(...files.map((file) => h("label", {},
      h("input", {
        type, name: groupName, value: file.id, checked: chosen.has(file.id),
        onchange: (event) => { if (event.currentTarget.checked) chosen.add(file.id); else chosen.delete(file.id); plan(); },
      }),
      h("span", {}, file.filename),
      h("span", { class: "sub" }, file.num_lines ? `${number(file.num_lines)} rows` : bytes(file.bytes)))));
    if (!files.length) list.replaceChildren(h("p", { class: "muted" }, legend));
    if (focused) list.querySelector(`input[value="${CSS.escape(focused)}"]`)?.focus();
  }
  const drawFiles = () => {
    choices(trainList, "checkbox", training, "train", "No data files yet. Upload one below.");
    choices(validList, "checkbox", validation, "validation", "No data files yet.");
  };

  function request() {
    const hyperparameters = { [unit.value]: Number(length.value) };
    for (const [key, { input }] of inputs) if (input.value !== "") hyperparameters[key] = Number(input.value);
    const body = {
      model: model.value, hyperparameters, auto_start: true,
      training_files: [...training].map((id) => ({ file_id: id, weight: 1 })),
    };
    if (validation.size) body.validation_files = [...validation];
    if (name.value.trim()) body.suffix = name.value.trim();
    return body;
  }

  let timer = 0;
  let abort = null;
  let estimated = null;

  /** Estimate what the form says now; until then it cannot be launched. */
  function plan() {
    clearTimeout(timer);
    abort?.abort();
    estimated = null;
    submit.disabled = true;
    place.replaceChildren();
    const missing = !model.value ? "Choose a model." : !training.size ? "Choose a data file to see the estimate." : !(Number(length.value) > 0) ? "Enter how long to train." : null;
    if (missing) {
      estimate.removeAttribute("aria-busy");
      estimate.replaceChildren(h("p", { class: "muted" }, missing));
      return;
    }
    estimate.setAttribute("aria-busy", "true");
    if (!estimate.querySelector("dl")) estimate.replaceChildren(h("p", { class: "muted" }, "Estimating…"));
    timer = setTimeout(ask, WAIT);
  }

  async function ask() {
    abort = new AbortController();
    const body = request();
    try {
      const quote = await api("v1/fine_tuning/jobs?dry_run=true", { method: "POST", body, signal: abort.signal });
      estimated = JSON.stringify(body);
      draw(quote);
      submit.disabled = false;
    } catch (error) {
      if (error.name === "AbortError") return;
      estimate.replaceChildren(alert("This run cannot be launched", error));
    }
    estimate.removeAttribute("aria-busy");
  }

  function draw(quote) {
    const cost = quote.cost === null || quote.cost === undefined ? "unknown"
      : quote.cost === 0 ? "free" : `${number(quote.cost)} ${quote.cost_currency ?? ""}`;
    const rows = [
      ["Cost", cost, "big"],
      ["Duration", quote.expected_duration_seconds ? `about ${duration(quote.expected_duration_seconds)}` : "unknown"],
      ["Trained tokens", number(quote.train_tokens)],
      ["Tokens in the data", number(quote.data_tokens)],
      ["Steps", number(quote.training_steps)],
      ["Epochs", number(quote.epochs)],
    ].filter(([, value]) => value !== "–");
    estimate.replaceChildren(
      h("dl", { class: "figures" }, rows.map(([label, value, kind]) => h("div", { class: kind ?? "" }, h("dt", {}, label), h("dd", {}, value)))),
      quote.details && !quote.details.startsWith("Dry run") ? h("p", { class: "help" }, quote.details) : "");
  }

  const first = () => files.find((file) => training.has(file.id));
  const advanced = [...inputs].filter(([key]) => !["learning_rate", "seq_len"].includes(key));
  const shown = ([, { label, input, help }]) => field(label, input, help);
  const form = h("form", {
    novalidate: true,
    onsubmit: async (event) => {
      event.preventDefault();
      const body = request();
      if (submit.disabled || JSON.stringify(body) !== estimated) { plan(); return; }
      submit.disabled = true;
      submit.setAttribute("aria-busy", "true");
      place.replaceChildren();
      try {
        const job = await api("v1/fine_tuning/jobs", { method: "POST", body });
        announce("Run launched");
        location.hash = `#/run/${job.id}`;
      } catch (error) {
        const same = error.status === 409 && error.body?.job_id;
        place.replaceChildren(alert("Not launched", error, same ? h("p", {}, h("a", { href: `#/run/${same}` }, "Show that run")) : null));
        submit.disabled = false;
      } finally {
        submit.removeAttribute("aria-busy");
      }
    },
  },
  h("div", { class: "stack" },
    h("section", { class: "panel" }, h("h2", {}, "Model"),
      h("div", { class: "pair" }, field("Base model", model), field("Name", name, "Letters, digits, dots, dashes and underscores; part of the model's name."))),
    h("section", { class: "panel" }, h("h2", {}, "Data"),
      h("fieldset", {}, h("legend", {}, "Training data"), trainList),
      able.validation_files ? h("fieldset", {}, h("legend", {}, "Validation data (optional)"), validList) : null,
      uploader(async (stored) => {
        files = [stored, ...files.filter((file) => file.id !== stored.id)];
        training.add(stored.id);
        drawFiles();
        plan();
      }, context),
      h("a", { href: "#/data", onclick: (event) => { const file = first(); if (file) event.currentTarget.href = `#/file/${file.id}?model=${encodeURIComponent(model.value)}`; } }, "Preview what is trained on")),
    h("section", { class: "panel" }, h("h2", {}, "Training"),
      h("div", { class: "pair" }, field("Length", length), field("Measured in", unit)),
      h("div", { class: "pair" }, [...inputs].filter(([key]) => ["learning_rate", "seq_len"].includes(key)).map(shown)),
      advanced.length ? h("details", {}, h("summary", {}, "More hyperparameters"), h("div", { class: "pair" }, advanced.map(shown))) : null)),
  h("aside", { "aria-label": "Estimate" },
    h("section", { class: "panel" }, h("h2", {}, "Estimate"), estimate, submit, place,
      from ? h("p", { class: "help" }, "Filled in from an earlier run, ", time(before.created_at), ".") : null)));
  form.addEventListener("input", (event) => { if (event.target.type !== "file" && event.target.type !== "checkbox") plan(); });
  page.append(form);
  drawFiles();
  plan();
  context.onLeave(() => { clearTimeout(timer); abort?.abort(); });
}
