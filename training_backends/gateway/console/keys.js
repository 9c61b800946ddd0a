// API keys, for the admin scope.

import { act, announce, api, badge, button, confirm, copyButton, empty, field, h, session, table, time } from "./lib.js";

export async function keys(page, _, context) {
  context.title("Keys");
  page.append(h("div", { class: "head" }, h("h1", { tabindex: -1 }, "Keys")));
  if (session.value.key.scope !== "admin") {
    page.append(empty("Keys need the admin scope", "Sign in with an admin key, or use `training-backends keys` on the gateway's machine."));
    return;
  }
  const list = h("div", {});
  const place = h("div", {});
  const made = h("div", {});
  const name = h("input", { name: "name", maxlength: 80, autocomplete: "off", required: true, placeholder: "ci" });
  const scope = h("select", { name: "scope" },
    h("option", { value: "write" }, "write: everything in the project"), h("option", { value: "read" }, "read: GET requests only"), h("option", { value: "admin" }, "admin: every project"));
  const project = h("input", { name: "project", value: session.value.key.project, autocomplete: "off", spellcheck: "false" });
  const expires = h("input", { name: "expires", autocomplete: "off", placeholder: "never" });
  const submit = h("button", { class: "button primary", type: "submit" }, "Create key");
  const form = h("form", {
    onsubmit: async (event) => {
      event.preventDefault();
      const created = await act(submit, place, () => api("console/keys", {
        method: "POST", body: { name: name.value.trim(), scope: scope.value, project: project.value.trim(), expires: expires.value.trim() },
      }));
      if (!created) return;
      name.value = expires.value = "";
      const heading = h("h2", { tabindex: -1 }, `Key ${created.name || created.id}`);
      made.replaceChildren(h("section", { class: "panel new-key" }, heading,
        h("p", {}, "Copy it now: it is not shown again."), h("code", {}, created.key),
        h("div", { class: "actions" }, copyButton(created.key, "Copy key"), button("Done", () => { made.replaceChildren(); name.focus(); }, { kind: "small" }))));
      heading.focus();
      await load();
    },
  },
  h("div", { class: "pair" }, field("Name", name), field("Scope", scope), field("Project", project, "Lowercase letters, digits, dots, dashes, underscores."), field("Expires", expires, "30d, 12h or 2027-01-31. Empty: never.")),
  place, submit);
  page.append(made, h("section", { class: "panel" }, h("h2", {}, "New key"), form), list);

  async function load() {
    const found = await api("console/keys");
    const shown = table("API keys", [
      ["Name", (key) => [h("span", { class: "row-name" }, key.name || "–"), h("span", { class: "sub" }, " ", h("code", {}, key.id))]],
      ["State", (key) => badge({ status: key.state })],
      ["Scope", (key) => key.scope],
      ["Project", (key) => key.project],
      ["Created", (key) => time(key.created_at), "number"],
      ["Expires", (key) => time(key.expires_at, "never"), "number"],
      ["Last used", (key) => time(key.last_used_at, "never"), "number"],
      ["", (key) => (key.state === "active" ? button("Revoke", (event) => revoke(key, event.currentTarget), { kind: "small danger", "aria-label": `Revoke ${key.name || key.id}` }) : ""), "number"],
    ], found);
    shown.classList.add("boxed");
    list.replaceChildren(found.length ? shown : empty("No keys yet", "Create one for each person and program, so that each can be revoked alone."));
  }

  async function revoke(key, element) {
    const own = key.id === session.value.key.id;
    if (!await confirm(`Revoke ${key.name || key.id}?`, `${own ? "You are signed in with this key and will be signed out. " : ""}Requests with it fail from now on.`, "Revoke")) return;
    await act(element, place, async () => {
      await api(`console/keys/${key.id}`, { method: "DELETE" });
      announce("Key revoked");
      await load();
      page.querySelector("h1").focus();
    });
  }

  await load();
}
