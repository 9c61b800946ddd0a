// A whole life of fine-tuning jobs, driven by OpenAI's official Node SDK against a gateway.
//
//   node sdk_openai.mjs URL KEY TRAIN.jsonl VALIDATION.jsonl     (OPENAI_SDK: path of its module)
//
// With the variable DELIVERIES, a file in which each line is a delivery to the gateway's webhook.
import assert from "node:assert/strict";
import { createReadStream } from "node:fs";
import { readFile } from "node:fs/promises";
import { basename } from "node:path";

const [url, apiKey, train, validation] = process.argv.slice(2);
Object.assign(process.env, { OPENAI_BASE_URL: `${url}/openai/v1`, OPENAI_API_KEY: apiKey });
const { default: OpenAI, toFile } = await import(process.env.OPENAI_SDK ?? "openai");
const client = new OpenAI();
const jobs = client.fineTuning.jobs;
const content = await readFile(train);
const messages = [{ role: "user", content: "What is the local backend?" }];
const unknown = "00000000000040008000000000000000";

let passed = 0;
const same = (what, found, wanted) => (assert.deepEqual(found, wanted, what), passed++);
const yes = (what, found) => (assert.ok(found, what), passed++);

async function refused(what, kind, ask, facts = {}) {
  let error;
  try {
    await ask();
  } catch (caught) {
    error = caught;
  }
  yes(`${what}: ${error?.constructor.name} ${error?.message}`, error instanceof kind);
  same(`${what}: keys`, Object.keys(error.error).sort(), ["code", "message", "param", "type"]);
  yes(`${what}: request id`, error.requestID);
  for (const [name, wanted] of Object.entries(facts)) same(`${what}: ${name}`, error[name], wanted);
}

async function all(pages) {
  const found = [];
  for await (const each of pages) found.push(each);
  return found;
}

async function reached(jobId, ...statuses) {
  const deadline = Date.now() + 300_000;
  for (;;) {
    const job = await jobs.retrieve(jobId);
    if (statuses.includes(job.status)) return job;
    const ended = ["succeeded", "failed", "cancelled"].includes(job.status);
    assert.ok(!ended, `${job.status}: ${JSON.stringify(job.error)}`);
    assert.ok(Date.now() < deadline, `still ${job.status}`);
    await new Promise((resolve) => setTimeout(resolve, 200));
  }
}

// The end of a job has reached the webhook, signed.
async function reported(status, id) {
  if (!process.env.DELIVERIES) return;
  const deadline = Date.now() + 60_000;
  for (;;) {
    const lines = (await readFile(process.env.DELIVERIES, "utf8")).split("\n").filter(Boolean);
    const delivery = lines.map((line) => JSON.parse(line)).find(({ body }) => body.includes(id));
    if (delivery) {
      const event = await client.webhooks.unwrap(delivery.body, delivery.headers);
      same("event", [event.type, event.data.id], [`fine_tuning.job.${status}`, id]);
      return;
    }
    assert.ok(Date.now() < deadline, `${id} is not reported as ${status}`);
    await new Promise((resolve) => setTimeout(resolve, 100));
  }
}

// -- files: the file first, as usual in code of this SDK; chunked for a stream ---------------

const streamed = await client.files.create({ file: createReadStream(train), purpose: "fine-tune" });
same("object", streamed.object, "file");
yes("id", streamed.id.startsWith("file-"));
same("name", streamed.filename, basename(train));
same("bytes", streamed.bytes, content.length);
same("status", streamed.status, "processed");
yes("request id", streamed._request_id);
const { data: retrieved, response } = await client.files.retrieve(streamed.id).withResponse();
same("retrieved", { ...retrieved }, { ...streamed });
same("type", response.headers.get("content-type"), "application/json");
same("waited for", (await client.files.waitForProcessing(streamed.id)).id, streamed.id);
const downloaded = await client.files.content(streamed.id);
same("content", Buffer.from(await downloaded.arrayBuffer()), content);
const named = await client.files.create({
  purpose: "user_data",
  file: await toFile(Buffer.from("notes"), "été.txt"),
  expires_after: { anchor: "created_at", seconds: 3600 },
});
same("any script", named.filename, "été.txt");
same("expiry", named.expires_at, named.created_at + 3600);
same("text", await (await client.files.content(named.id)).text(), "notes");
const blob = await client.files.create({ file: new Blob([content]), purpose: "fine-tune" });
yes("a name of the SDK", blob.filename);
const newest = await all(client.files.list({ limit: 2 }));
const expected = [blob.id, named.id, streamed.id];
same("newest first", newest.slice(0, 3).map((file) => file.id), expected);
const oldest = await all(client.files.list({ order: "asc", purpose: "fine-tune", limit: 1 }));
same("oldest first", oldest.map((file) => file.id), [streamed.id, blob.id]);
same("has more", (await client.files.list({ limit: 1 })).has_more, true);
same("after", (await client.files.list({ after: blob.id, limit: 1 })).data[0].id, named.id);
const retry = { headers: { "x-stainless-retry-count": "1" } };
const again = await client.files.create({ file: new Blob([content]), purpose: "fine-tune" }, retry);
same("a retry", again.id, blob.id);
for (const { id } of [blob, named]) {
  const gone = await client.files.delete(id);
  same("deleted", { ...gone }, { id, object: "file", deleted: true });
}
const { NotFoundError, BadRequestError, AuthenticationError, PermissionDeniedError } = OpenAI;
const missing = { status: 404, param: "id", code: null, type: "invalid_request_error" };
await refused("deleted file", NotFoundError, () => client.files.retrieve(blob.id), missing);
console.log("ok: files");

// -- uploads in parts, sent at the same time ------------------------------------------------

const upload = await client.uploads.create({
  bytes: content.length,
  filename: "parts.jsonl",
  mime_type: "text/jsonl",
  purpose: "fine-tune",
});
same("pending", [upload.object, upload.status, upload.file], ["upload", "pending", null]);
same("an hour", upload.expires_at - upload.created_at, 3600);
const cut = [0, 4000, 9000, content.length];
const pieces = [0, 1, 2].map((n) => content.subarray(cut[n], cut[n + 1]));
const sent = await Promise.all(
  pieces.map((data) => client.uploads.parts.create(upload.id, { data: new Blob([data]) })),
);
for (const part of sent) {
  same("part", [part.object, part.upload_id], ["upload.part", upload.id]);
  yes("part id", part.id.startsWith("part_"));
}
const ids = sent.map((part) => part.id);
const complete = (part_ids, more) => client.uploads.complete(upload.id, { part_ids, ...more });
await refused("short", BadRequestError, () => complete(ids.slice(1)), { param: "part_ids" });
await refused("md5", BadRequestError, () => complete(ids, { md5: "0" }), { param: "md5" });
const completed = await complete(ids);
same("completed", completed.status, "completed");
const joined = await client.files.content(completed.file.id);
same("joined", Buffer.from(await joined.arrayBuffer()), content);
same("completed again", (await complete(ids)).file.id, completed.file.id);
const over = { code: "invalid_state", status: 400 };
await refused("over", BadRequestError, () => client.uploads.cancel(upload.id), over);
const text = { filename: "a.txt", mime_type: "text/plain", purpose: "user_data" };
const given_up = await client.uploads.create({ bytes: 3, ...text });
same("cancelled", (await client.uploads.cancel(given_up.id)).status, "cancelled");
console.log("ok: uploads");

// -- a job, from its creation to its model --------------------------------------------------

const checking = await client.files.create({
  file: createReadStream(validation),
  purpose: "fine-tune",
});
const hyperparameters = { n_epochs: 3, batch_size: "auto", learning_rate_multiplier: "auto" };
const made = await jobs.create({
  model: "tiny-mistral",
  training_file: completed.file.id,
  validation_file: checking.id,
  method: { type: "supervised", supervised: { hyperparameters } },
  suffix: "life",
  seed: 7,
  metadata: { team: "a b&c", n: "1" },
  integrations: null,
});
same("object", made.object, "fine_tuning.job");
yes("id", made.id.startsWith("ftjob-"));
yes("first status", ["validating_files", "queued", "running"].includes(made.status));
same("files", [made.training_file, made.validation_file], [completed.file.id, checking.id]);
same("seed", made.seed, 7);
same("metadata", made.metadata, { team: "a b&c", n: "1" });
same("results", made.result_files, []);
for (const name of ["fine_tuned_model", "finished_at", "trained_tokens", "error"])
  same(`${name} is null`, made[name], null);
const running = await reached(made.id, "running", "succeeded");
same("epochs", running.hyperparameters.n_epochs, 3);
same("auto is a number", typeof running.hyperparameters.batch_size, "number");
same("multiplier", running.hyperparameters.learning_rate_multiplier, 1);
const job = await reached(made.id, "succeeded");
await reported("succeeded", made.id);
const model = job.fine_tuned_model;
yes("name", model.startsWith("ft:tiny-mistral:") && model.includes(":life:"));
yes("finished", job.finished_at >= job.created_at);
yes("tokens", job.trained_tokens > 0);
same("error", job.error, null);

const events = await all(jobs.listEvents(made.id, { limit: 9 }));
same("unique", new Set(events.map((event) => event.id)).size, events.length);
yes("event ids", events.every((event) => event.id.startsWith("ftevent-")));
const texts = events.filter((event) => event.type === "message").map((event) => event.message);
same("messages", texts.reverse(), [
  `Created fine-tuning job: ${made.id}`,
  `Validating training file: ${completed.file.id} and validation file: ${checking.id}`,
  "Files validated, moving job to queued state",
  "Fine-tuning job started",
  `New fine-tuned model created: ${model}`,
  "The job has successfully completed",
]);
const metrics = events.filter((event) => event.type === "metrics").reverse();
same("steps", metrics.map((event) => event.data.step), metrics.map((_, index) => index + 1));
yes("loss falls", metrics.at(-1).data.train_loss < metrics[0].data.train_loss);
const second = await jobs.listEvents(made.id, { after: events[0].id, limit: 1 });
same("after", [second.data[0].id, second.has_more], [events[1].id, true]);

const points = await all(jobs.checkpoints.list(made.id, { limit: 1 }));
yes("several", points.length >= 2);
same("the last one", points[0].fine_tuned_model_checkpoint, model);
const earlier = points[1].fine_tuned_model_checkpoint;
same("earlier", earlier, `${model}:ckpt-step-${points[1].step_number}`);
for (const point of points) {
  yes("checkpoint id", point.id.startsWith("ftckpt_"));
  same("its job", point.fine_tuning_job_id, made.id);
  yes("its losses", point.metrics.train_loss > 0 && point.metrics.valid_loss > 0);
  const name = point.fine_tuned_model_checkpoint;
  same("its model", (await client.models.retrieve(name)).id, name);
}
const result = await client.files.retrieve(job.result_files[0]);
same("result", result.purpose, "fine-tune-results");
const coded = await (await client.files.content(result.id)).text();
const [header, ...rows] = Buffer.from(coded, "base64").toString().trim().split("\n");
const columns = "step,train_loss,train_accuracy,valid_loss,valid_mean_token_accuracy";
same("columns", header, columns);
same("rows", rows.length, metrics.length);
console.log("ok: job");

// -- models and chat ------------------------------------------------------------------------

const models = await all(client.models.list());
yes("tuned model", models.some((each) => each.id === model));
yes("base model", models.some((each) => each.id === "tiny-mistral"));
same("object", (await client.models.retrieve(model)).object, "model");
const gone = { param: "model", code: "model_not_found" };
await refused("slash", NotFoundError, () => client.models.retrieve("org/name"), gone);
for (const name of [model, earlier]) {
  const asked = { model: name, messages, max_tokens: 8, temperature: 0 };
  const answer = await client.chat.completions.create(asked);
  same("chat", [answer.object, answer.model], ["chat.completion", name]);
  same("role", answer.choices[0].message.role, "assistant");
  yes("usage", answer.usage.completion_tokens > 0);
  const stream = await client.chat.completions.create({ ...asked, stream: true });
  const parts = await all(stream);
  const whole = parts.map((part) => part.choices[0]?.delta.content ?? "").join("");
  same("the same streamed", whole, answer.choices[0].message.content);
}
const stopped = await client.chat.completions.create({ model, messages, stream: true });
for await (const part of stopped) {
  yes("left early", part.id);
  break;
}
console.log("ok: chat");

// -- more jobs ------------------------------------------------------------------------------

const long = {
  model,
  training_file: completed.file.id,
  hyperparameters: { n_epochs: 50 },
  metadata: { team: "b" },
};
const started = await jobs.create(long);
same("a tuned model as the base", started.model, model);
same("a retry", (await jobs.create(long, retry)).id, started.id);
await reached(started.id, "running");
const impossible = { code: "unsupported_operation", status: 400 };
await refused("pause", BadRequestError, () => jobs.pause(started.id), impossible);
yes("cancelling", ["running", "cancelled"].includes((await jobs.cancel(started.id)).status));
same("cancelled", (await reached(started.id, "cancelled")).fine_tuned_model, null);
await reported("cancelled", started.id);
await refused("cancel again", BadRequestError, () => jobs.cancel(started.id), over);

const bad = Buffer.concat([content, Buffer.from('{"messages": [{"content": "no role"}]}\n')]);
const file = await client.files.create({ file: await toFile(bad, "bad.jsonl"), purpose: "fine-tune" });
const doomed = await jobs.create({ model: "tiny-mistral", training_file: file.id });
const failed = await reached(doomed.id, "failed");
await reported("failed", doomed.id);
same("failed", [failed.error.code, failed.error.param], ["invalid_training_file", "training_file"]);
same("list", (await all(jobs.list({ limit: 2 }))).map((each) => each.id), [
  doomed.id,
  started.id,
  made.id,
]);
const found = await all(jobs.list({ metadata: { team: "a b&c", n: "1" } }));
same("metadata", found.map((each) => each.id), [made.id]);
const keyed = { headers: { "Idempotency-Key": "life" } };
const one = await jobs.create({ ...long, seed: 1 }, keyed);
same("an idempotency key", (await jobs.create({ ...long, seed: 1 }, keyed)).id, one.id);
const other = () => jobs.create({ ...long, seed: 2 }, keyed);
await refused("another request", BadRequestError, other, { code: "idempotency_error" });
await jobs.cancel(one.id);
await reached(one.id, "cancelled");
console.log("ok: more jobs");

// -- refusals, none of which the SDK repeats --------------------------------------------------

const wanted = { model: "tiny-mistral", training_file: completed.file.id };
for (const [change, param] of [
  [{ model: "gpt-4o-mini" }, "model"],
  [{ training_file: "file-nope" }, "training_file"],
  [{ validation_file: "nope" }, "validation_file"],
  [{ suffix: "x".repeat(65) }, "suffix"],
  [{ seed: -1 }, "seed"],
  [{ method: { type: "reinforcement" } }, "method"],
]) {
  const create = () => jobs.create({ ...wanted, ...change });
  await refused(param, BadRequestError, create, { param, status: 400 });
}
const nowhere = { status: 404, code: "fine_tune_not_found", param: "fine_tune_id" };
for (const act of ["retrieve", "cancel", "listEvents"])
  await refused(act, NotFoundError, () => jobs[act](`ftjob-${unknown}`), nowhere);
const stranger = new OpenAI({ apiKey: "tb-not-a-key", maxRetries: 0 });
const wrong = { code: "invalid_api_key", status: 401 };
await refused("wrong key", AuthenticationError, () => stranger.models.list(), wrong);
await refused("limit", BadRequestError, () => client.files.list({ limit: 0 }), { param: "limit" });
const base = () => client.models.delete("tiny-mistral");
await refused("base model", PermissionDeniedError, base);
console.log("ok: refusals");

// -- the model is gone, the job stays ---------------------------------------------------------

const deleted = await client.models.delete(model);
same("deleted", { ...deleted }, { id: model, object: "model", deleted: true });
for (const name of [model, earlier])
  await refused("deleted model", NotFoundError, () => client.models.retrieve(name), gone);
same("job", { ...(await jobs.retrieve(made.id)) }, { ...job });
console.log(`ok: ${passed} checks`);
