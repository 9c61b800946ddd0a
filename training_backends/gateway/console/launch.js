// The launch form. The estimate comes before the button.

import { alert, announce, api, bytes, duration, empty, field, h, icon, link, number, session, time } from "./lib.js";
import { METHOD_OF, uploader } from "./data.js";

const WAIT = 500;
const NUMBERS = [
  ["learning_rate", "Learning rate", "any", "Empty: the backend's default."],
  ["seq_len", "Sequence length", "1", "Longer examples are truncated. Empty: the default."],
  ["weight_decay", "Weight decay", "any", ""],
  ["warmup_fraction", "Warmup fraction", "any", "Part of the steps, 0 to 1."],
];

const METHODS = {
  sft: ["Supervised", "Learns the answers of conversations, or plain text."],
  dpo: ["Preferences (DPO)", "Learns to prefer one of two answers."],
  classifier: ["Classifier", "Learns the labels of texts."],
};

/** The numbers of the OpenAI API, through which preferences are trained. */
const DPO_NUMBERS = [
  ["beta", "Beta", "How close the model stays to its base, 0 to 2. Empty: the default."],
  ["learning_rate_multiplier", "Learning rate multiplier", "1 is the backend's default."],
  ["batch_size", "Batch size", "Empty: the backend's default."],
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
  const methods = Object.keys(METHODS).filter((key) => models.some((offer) => offer.methods.includes(key)));
  const able = session.value.capabilities;
  const takes = (name) => able.hyperparameters === null || able.hyperparameters.includes(name);
  const given = before?.hyperparameters ?? {};
  const training = new Set(before?.training_files ?? [context.query.get("file")].filter(Boolean));
  const validation = new Set(before?.validation_files ?? []);
  let files = found.data;

  let byHand = Boolean(before?.classifier_targets?.length);
  const method = h("select", { name: "method", id: "method", "aria-describedby": "method-help", onchange: () => { byHand = true; drawMethod(); changed(); } },
    methods.map((key) => h("option", { value: key, selected: before?.classifier_targets?.length ? key === "classifier" : key === "sft" }, METHODS[key][0])));
  const help = h("p", { class: "help", id: "method-help" });
  const is = (key) => method.value === key;
  const model = h("select", { name: "model" });
  const drawModels = () => {
    const chosen = model.value || before?.model;
    model.replaceChildren(...models.filter((offer) => offer.methods.includes(method.value)).map((offer) =>
      h("option", { value: offer.id, selected: offer.id === chosen }, offer.id)));
  };
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

  const dpoInputs = new Map(DPO_NUMBERS.map(([key, label, text]) =>
    [key, { label, help: text, input: h("input", { name: key, type: "number", min: 0, step: "any", inputmode: "decimal", autocomplete: "off" }) }]));
  const targets = h("fieldset", { hidden: true }, h("legend", {}, "Labels"));
  let labels = {};

  const estimate = h("div", { "aria-live": "polite" });
  const place = h("div", {});
  const submit = h("button", { class: "button primary", type: "submit", disabled: true }, icon("launch"), h("span", {}, "Launch"));

  function choices(list, type, chosen, groupName, legend) {
    const focused = list.contains(document.activeElement) ? document.activeElement.value : null;
    list.replaceChildren(...files.map((file) => h("label", {},
      h("input", {
        type, name: groupName, value: file.id, checked: chosen.has(file.id),
        onchange: (event) => {
          if (type === "radio") chosen.clear();
          if (event.currentTarget.checked) chosen.add(file.id); else chosen.delete(file.id);
          changed();
        },
      }),
      h("span", {}, file.filename),
      h("span", { class: "sub" }, file.num_lines ? `${number(file.num_lines)} rows` : bytes(file.bytes)))));
    if (!files.length) list.replaceChildren(h("p", { class: "muted" }, legend));
    if (focused) list.querySelector(`input[value="${CSS.escape(focused)}"]`)?.focus();
  }
  const drawFiles = () => {
    // The OpenAI API, through which preferences are trained, takes one file of each kind.
    const type = is("dpo") ? "radio" : "checkbox";
    for (const chosen of is("dpo") ? [training, validation] : []) for (const id of [...chosen].slice(1)) chosen.delete(id);
    choices(trainList, type, training, "train", "No data files yet. Upload one below.");
    choices(validList, type, validation, "validation", "No data files yet.");
  };
  const drawMethod = () => {
    drawModels();
    drawFiles();
    help.textContent = METHODS[method.value]?.[1] ?? "";
    targets.hidden = !is("classifier");
    for (const part of page.querySelectorAll("[data-only]")) part.hidden = part.dataset.only !== (is("dpo") ? "dpo" : "other");
  };

  /** Look at the chosen files: the method follows them, and a classifier's labels are theirs. */
  async function changed() {
    labels = {};
    plan();
    const chosen = [...training];
    let seen;
    try {
      seen = await Promise.all(chosen.map((id) => api(`console/files/${encodeURIComponent(id)}/inspection`)));
    } catch (error) {
      if (error.name !== "AbortError" && context.isShown()) place.replaceChildren(alert("The data cannot be inspected", error));
      return;
    }
    if (!context.isShown() || chosen.join() !== [...training].join()) return;
    const found = METHOD_OF[seen[0]?.sample_type] ?? "sft";
    if (!byHand && seen.length && methods.includes(found) && !is(found)) {
      method.value = found;
      drawMethod();
    }
    for (const each of seen) for (const [target, counts] of Object.entries(each.summary?.labels ?? {})) labels[target] = { ...labels[target], ...counts };
    targets.replaceChildren(h("legend", {}, "Labels"), ...Object.entries(labels).map(([target, counts]) =>
      h("div", { class: "field" }, h("strong", {}, target), h("p", { class: "help" }, Object.keys(counts).sort().join(", ")),
        h("label", {}, h("input", { type: "checkbox", name: `several-${target}`, checked: before?.classifier_targets?.some((each) => each.name === target && each.loss_function === "multi_class") ?? false, onchange: plan }), " A text can have several of these labels"))));
    if (!Object.keys(labels).length) targets.append(h("p", { class: "muted" }, "The labels are read from the training data."));
    plan();
  }

  const numbers = (found) => Object.fromEntries([...found].filter(([, { input }]) => input.value !== "").map(([key, { input }]) => [key, Number(input.value)]));

  /** The path and body of the request that the form stands for. */
  function request() {
    const suffix = name.value.trim() ? { suffix: name.value.trim() } : {};
    if (is("dpo")) {
      const hyperparameters = { n_epochs: Number(length.value), ...numbers(dpoInputs) };
      const [training_file] = training;
      const [validation_file] = validation;
      return ["openai/v1/fine_tuning/jobs", { model: model.value, training_file, validation_file, method: { type: "dpo", dpo: { hyperparameters } }, ...suffix }];
    }
    const body = {
      model: model.value, auto_start: true, ...suffix,
      hyperparameters: { [unit.value]: Number(length.value), ...numbers(inputs) },
      training_files: [...training].map((id) => ({ file_id: id, weight: 1 })),
    };
    if (validation.size) body.validation_files = [...validation];
    if (is("classifier")) {
      body.job_type = "classifier";
      body.classifier_targets = Object.entries(labels).map(([target, counts]) => ({
        name: target, labels: Object.keys(counts).sort(), weight: 1,
        loss_function: targets.querySelector(`input[name="${CSS.escape(`several-${target}`)}"]`)?.checked ? "multi_class" : "single_class",
      }));
    }
    return ["v1/fine_tuning/jobs", body];
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
    const missing = !model.value ? "Choose a model." : !training.size ? "Choose a data file to see the estimate."
      : is("classifier") && !Object.keys(labels).length ? "Choose data with labels." : !(Number(length.value) > 0) ? "Enter how long to train." : null;
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
    const [path, body] = request();
    try {
      const quote = await api(`${path}?dry_run=true`, { method: "POST", body, signal: abort.signal });
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
      const [path, body] = request();
      if (submit.disabled || JSON.stringify(body) !== estimated) { plan(); return; }
      submit.disabled = true;
      submit.setAttribute("aria-busy", "true");
      place.replaceChildren();
      try {
        const job = await api(path, { method: "POST", body });
        announce("Run launched");
        location.hash = `#/run/${ownId(job.id)}`;
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
      methods.length > 1 ? h("div", { class: "field" }, h("label", { for: "method" }, "Method"), method, help) : null,
      h("div", { class: "pair" }, field("Base model", model), field("Name", name, "Letters, digits, dots, dashes and underscores; part of the model's name."))),
    h("section", { class: "panel" }, h("h2", {}, "Data"),
      h("fieldset", {}, h("legend", {}, "Training data"), trainList),
      targets,
      able.validation_files ? h("fieldset", {}, h("legend", {}, "Validation data (optional)"), validList) : null,
      uploader(async (stored) => {
        files = [stored, ...files.filter((file) => file.id !== stored.id)];
        if (is("dpo")) training.clear();
        training.add(stored.id);
        drawFiles();
        changed();
      }, context),
      h("a", { href: "#/data", onclick: (event) => { const file = first(); if (file) event.currentTarget.href = `#/file/${file.id}?model=${encodeURIComponent(model.value)}`; } }, "Preview what is trained on")),
    h("section", { class: "panel" }, h("h2", {}, "Training"),
      h("div", { class: "pair" }, field("Length", length), field("Measured in", unit)),
      h("div", { class: "pair", "data-only": "dpo", hidden: true }, [...dpoInputs].map(shown)),
      h("div", { "data-only": "other" },
        h("div", { class: "pair" }, [...inputs].filter(([key]) => ["learning_rate", "seq_len"].includes(key)).map(shown)),
        advanced.length ? h("details", {}, h("summary", {}, "More hyperparameters"), h("div", { class: "pair" }, advanced.map(shown))) : null))),
  h("aside", { "aria-label": "Estimate" },
    h("section", { class: "panel" }, h("h2", {}, "Estimate"), estimate, submit, place,
      from ? h("p", { class: "help" }, "Filled in from an earlier run, ", time(before.created_at), ".") : null)));
  form.addEventListener("input", (event) => { if (event.target.type !== "file" && event.target.type !== "checkbox") plan(); });
  page.append(form);
  drawMethod();
  changed();
  context.onLeave(() => { clearTimeout(timer); abort?.abort(); });
}

/** The id of a job that the OpenAI API has created, as everything else shows it. */
function ownId(id) {
  if (!id.startsWith("ftjob-")) return id;
  return id.slice(6).replace(/^(.{8})(.{4})(.{4})(.{4})(.{12})$/, "$1-$2-$3-$4-$5");
}
