// A whole life of fine-tuning jobs, driven by the official TypeScript SDK against a gateway.
//
//   node sdk_life.mjs URL KEY TRAIN.jsonl VALIDATION.jsonl     (MISTRAL_SDK: path of its module)
import assert from "node:assert/strict";
import { readFile } from "node:fs/promises";
import { basename } from "node:path";

const { Mistral } = await import(process.env.MISTRAL_SDK ?? "@mistralai/mistralai");
const [url, apiKey, train, validation] = process.argv.slice(2);
const client = new Mistral({ apiKey, serverURL: url });
const jobs = client.fineTuning.jobs;
const hyperparameters = { trainingSteps: 30, learningRate: 0.002, seqLen: 256 };
const ended = new Set(["SUCCESS", "FAILED", "FAILED_VALIDATION", "CANCELLED"]);

async function waitFor(jobId, ...statuses) {
  const deadline = Date.now() + 240_000;
  for (;;) {
    const job = await jobs.get({ jobId });
    assert.ok(job.id, "the SDK could read the job");
    if (statuses.includes(job.status)) return job;
    assert.ok(!ended.has(job.status), `${job.status}: ${JSON.stringify(job.events)}`);
    assert.ok(Date.now() < deadline, `still ${job.status}`);
    await new Promise((resolve) => setTimeout(resolve, 200));
  }
}

async function refused(name, ask, ...statuses) {
  let status;
  try {
    await ask();
  } catch (error) {
    status = error.statusCode ?? error.rawResponse?.status;
  }
  assert.ok(statuses.includes(status), `${name}: ${status}`);
}

async function upload(path) {
  const content = new Blob([await readFile(path)]);
  const file = { fileName: basename(path), content };
  const made = await client.files.upload({ file, purpose: "fine-tune" });
  const again = await client.files.upload({ file });
  assert.equal(again.id, made.id, "the same file twice is one file");
  return made.id;
}

const files = [await upload(train), await upload(validation)];
const listed = await client.files.list({ purpose: "fine-tune", sampleType: ["instruct"] });
assert.ok(files.every((id) => listed.data.some((file) => file.id === id)));
assert.match((await client.files.getSignedUrl({ fileId: files[0] })).url, /^http/);
const stream = await client.files.download({ fileId: files[1] });
assert.equal(await new Response(stream).text(), await readFile(validation, "utf8"));
console.log("ok: files");

const created = await jobs.create({
  model: "tiny-mistral",
  trainingFiles: [{ fileId: files[0], weight: 1 }],
  validationFiles: [files[1]],
  hyperparameters,
  suffix: "life",
  autoStart: false,
});
assert.ok(created.id, "the SDK could read the created job");
const validated = await waitFor(created.id, "VALIDATED");
assert.equal(validated.metadata.cost, 0);
assert.ok(validated.metadata.dataTokens > 0);
assert.ok((await jobs.start({ jobId: created.id })).id);
const job = await waitFor(created.id, "SUCCESS");
const points = [...job.checkpoints].sort((a, b) => a.stepNumber - b.stepNumber);
const losses = points.map((point) => point.metrics.trainLoss).filter((loss) => loss != null);
assert.ok(points.length >= 2 && losses.at(-1) < losses[0], `${losses}`);
console.log(`ok: job, train loss ${losses[0].toFixed(3)} to ${losses.at(-1).toFixed(3)}`);

const hour = 3_600_000;
const at = (shift) => new Date(job.createdAt * 1000 + shift);
const has = async (filters) =>
  (await jobs.list(filters)).data.some((each) => each.id === job.id);
const fitting = [
  undefined, { page: 0, pageSize: 10 }, { model: "tiny-mistral" }, { createdAfter: at(-hour) },
  { createdBefore: at(hour) }, { createdByMe: true }, { status: "SUCCESS" }, { suffix: "life" },
];
for (const filters of fitting) assert.ok(await has(filters), JSON.stringify(filters));
const excluding = [
  { page: 50 }, { model: "open-mistral-7b" }, { createdAfter: at(hour) },
  { createdBefore: at(-hour) }, { status: "FAILED" }, { wandbProject: "none" },
  { wandbName: "none" }, { suffix: "other" },
];
for (const filters of excluding) assert.ok(!(await has(filters)), JSON.stringify(filters));
console.log("ok: lists");

const modelId = job.fineTunedModel;
assert.equal((await client.models.retrieve({ modelId })).root, "tiny-mistral");
const question = {
  model: modelId,
  messages: [{ role: "user", content: "What is 2 plus 2?" }],
  maxTokens: 12,
};
const said = await client.chat.complete(question);
assert.equal(said.model, modelId);
let heard = "";
for await (const event of await client.chat.stream(question)) {
  heard += event.data.choices[0]?.delta.content ?? "";
}
assert.ok(heard.length > 0);
// A stream ends before a character that is incomplete.
assert.ok(said.choices[0].message.content.startsWith(heard.replace(/\uFFFD+$/, "")));
console.log("ok: answers");
const update = { name: "renamed", description: "a test" };
const updated = await client.models.update({ modelId, updateModelRequest: update });
assert.equal(updated.name, "renamed");
assert.equal((await client.models.archive({ modelId })).archived, true);
assert.equal((await client.models.unarchive({ modelId })).archived, false);
assert.ok((await client.models.list()).data.some((model) => model.id === modelId));
assert.equal((await client.models.delete({ modelId })).deleted, true);
await refused("deleted model", () => client.models.retrieve({ modelId }), 404);
console.log("ok: model");

const long = {
  model: "tiny-mistral",
  trainingFiles: [{ fileId: files[0] }],
  hyperparameters: { ...hyperparameters, trainingSteps: 20_000 },
  autoStart: true,
};
const second = await jobs.create(long);
await refused("similar job", () => jobs.create(long), 409);
await waitFor(second.id, "RUNNING");
const asked = await jobs.cancel({ jobId: second.id });
assert.ok(["CANCELLATION_REQUESTED", "CANCELLED"].includes(asked.status), asked.status);
await waitFor(second.id, "CANCELLED");
console.log("ok: cancel");

const unknown = "00000000-0000-4000-8000-000000000000";
const stranger = new Mistral({ apiKey: "tb-not-a-key", serverURL: url });
const wanted = { model: "tiny-mistral", trainingFiles: [{ fileId: files[0] }], hyperparameters };
const bad = { fileName: "bad.jsonl", content: new Blob(["not json\n"]) };
await refused("wrong key", () => stranger.files.list(), 401);
await refused("unknown job", () => jobs.get({ jobId: unknown }), 404);
await refused("unknown file", () => client.files.retrieve({ fileId: unknown }), 404);
await refused("unknown model", () => client.models.retrieve({ modelId: "ft:none" }), 404);
await refused("model not offered", () => jobs.create({ ...wanted, model: "gpt-9" }), 422);
await refused("long suffix", () => jobs.create({ ...wanted, suffix: "x".repeat(19) }), 422);
await refused("start of a finished job", () => jobs.start({ jobId: job.id }), 400, 409, 422);
await refused("no JSONL", () => client.files.upload({ file: bad, purpose: "fine-tune" }), 422);
console.log("ok: refusals");

for (const fileId of files) {
  assert.equal((await client.files.delete({ fileId })).deleted, true);
  await refused("deleted file", () => client.files.retrieve({ fileId }), 404);
}
console.log("ok: whole life");
