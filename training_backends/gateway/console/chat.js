// Chat with a fine-tuned model beside its base.

import { alert, announce, api, button, empty, field, h, link, measure, newId, send, session } from "./lib.js";

const MOST_TOKENS = 512;
/** Milliseconds without an answer after which the model is probably being loaded. */
const LOADING_AFTER = 3000;

export async function chat(page, _, context) {
  context.title("Chat");
  page.append(h("div", { class: "head" }, h("h1", { tabindex: -1 }, "Chat")));
  const found = await api("v1/models");
  if (!context.isShown()) return;
  const tuned = found.data.filter((model) => model.root && model.capabilities.completion_chat);
  const bases = found.data.filter((model) => !model.root);
  if (session.value.key.scope === "read") {
    page.append(empty("This key is read-only", "A chat needs a key of scope write."));
    return;
  }
  if (!tuned.length && !bases.some((model) => model.capabilities.completion_chat)) {
    page.append(empty("No model can answer yet", "A fine-tuned model answers here as soon as its run has completed, if the gateway has an inference server.",
      link("Launch a run", "#/launch", { kind: "primary", symbol: "launch" })));
    return;
  }
  const wanted = context.query.get("model");
  const answering = [...tuned, ...bases.filter((model) => model.capabilities.completion_chat)];
  const select = h("select", {}, answering.map((model) => h("option", { value: model.id, selected: model.id === wanted }, model.id)));
  const system = h("textarea", { rows: 2, placeholder: "You are a helpful assistant." });
  const temperature = h("input", { type: "number", min: 0, max: 2, step: "0.1", placeholder: "the model's default", inputmode: "decimal" });
  const most = h("input", { type: "number", min: 1, step: 1, value: MOST_TOKENS, inputmode: "numeric" });
  const sides = h("div", { class: "sides" });
  const prompt = h("textarea", { rows: 2, placeholder: "Ask both models…", "aria-keyshortcuts": "Enter" });
  const ask = h("button", { class: "button primary", type: "submit" }, "Send");
  const stop = button("Stop", () => running?.abort(), { symbol: "stop", hidden: true });
  let talks = [];
  let running = null;

  function setUp() {
    running?.abort();
    const model = answering.find((each) => each.id === select.value);
    talks = model.root
      ? [talk("Tuned model", model.id, "tuned"), talk("Base model", model.root, "base")]
      : [talk("Base model", model.id, "base")];
    sides.replaceChildren(...talks.map((each) => each.element));
    prompt.placeholder = talks.length > 1 ? "Ask both models…" : "Ask the model…";
  }

  select.addEventListener("change", setUp);
  prompt.addEventListener("keydown", (event) => {
    if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
    event.preventDefault();
    form.requestSubmit();
  });
  const form = h("form", {
    class: "composer",
    onsubmit: async (event) => {
      event.preventDefault();
      const text = prompt.value.trim();
      if (!text || running) return;
      running = new AbortController();
      ask.disabled = true;
      stop.hidden = false;
      const options = { max_tokens: Number(most.value) || MOST_TOKENS };
      if (temperature.value !== "") options.temperature = Number(temperature.value);
      const before = system.value.trim() ? [{ role: "system", content: system.value.trim() }] : [];
      prompt.value = "";
      const answers = await Promise.all(talks.map((each) => each.ask(text, before, options, running.signal)));
      running = null;
      ask.disabled = false;
      stop.hidden = true;
      // A question that nobody answered is not lost.
      if (!answers.some(Boolean) && !prompt.value) prompt.value = text;
      announce(answers.some(Boolean) ? "The answers are complete." : "There was no answer.");
      prompt.focus();
    },
  }, field("Message", prompt), stop, ask);
  page.append(
    h("div", { class: "setup" }, field("Model", select), button("New chat", setUp)),
    h("details", {}, h("summary", {}, "Options"), h("div", { class: "pair" },
      field("System message", system), field("Temperature", temperature, "Some models always answer greedily."), field("Maximum tokens", most))),
    sides, form);
  setUp();
  context.onLeave(() => running?.abort());
}

/** One column: a conversation with one model. */
function talk(title, model, kind) {
  const messages = [];
  const list = h("ol", { "aria-label": `Conversation with ${model}` });
  const hint = h("p", { class: "muted" }, "Its answers appear here.");
  const id = newId();
  const element = h("section", { class: `talk ${kind}`, "aria-labelledby": id }, h("header", {}, h("h2", { id }, title), h("p", {}, model)), list, hint);
  const say = (role, text) => {
    const body = h("p", {}, text);
    const item = h("li", { class: role }, h("span", { class: "hidden-text" }, role === "user" ? "You: " : `${title}: `), body);
    list.append(item);
    return { item, body };
  };

  async function ask(text, before, options, signal) {
    hint.remove();
    say("user", text);
    const { item, body } = say("assistant", "");
    item.setAttribute("aria-busy", "true");
    const began = performance.now();
    const loading = h("span", { class: "sub", role: "status" });
    item.append(loading);
    const timer = setTimeout(() => { loading.textContent = "Loading the model… The first answer can take a minute."; }, LOADING_AFTER);
    let answer = "";
    let usage = null;
    try {
      const response = await send("v1/chat/completions", {
        method: "POST", signal,
        body: { model, messages: [...before, ...messages, { role: "user", content: text }], stream: true, ...options },
      });
      for await (const chunk of chunks(response)) {
        if (chunk.detail || chunk.message) throw new Error(chunk.detail ?? chunk.message);
        clearTimeout(timer);
        loading.remove();
        answer += chunk.choices?.[0]?.delta?.content ?? "";
        usage = chunk.usage ?? usage;
        body.textContent = answer;
        item.scrollIntoView({ block: "nearest" });
      }
    } catch (error) {
      clearTimeout(timer);
      loading.remove();
      if (error.name !== "AbortError") item.append(alert("", error));
      else item.append(h("p", { class: "sub" }, "Stopped"));
      if (!answer) { item.removeAttribute("aria-busy"); body.remove(); return false; }
    }
    item.removeAttribute("aria-busy");
    if (!answer) body.textContent = "(empty answer)";
    const seconds = (performance.now() - began) / 1000;
    const tokens = usage?.completion_tokens;
    item.append(h("span", { class: "sub" }, [tokens ? `${tokens} tokens` : null, `${measure(Number(seconds.toFixed(2)))} s`].filter(Boolean).join(" · ")));
    messages.push({ role: "user", content: text }, { role: "assistant", content: answer });
    return true;
  }

  return { element, ask };
}

async function* chunks(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const parts = (rest + value).split("\n\n");
    rest = parts.pop();
    for (const part of parts) {
      const text = part.replace(/^data: /, "");
      if (text === "[DONE]") return;
      yield JSON.parse(text);
    }
  }
}
