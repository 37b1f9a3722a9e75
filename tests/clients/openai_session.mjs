// The work of openai_session.py, with OpenAI's package from npm: the same steps, told in the same words.

import { createHash } from "node:crypto";
import OpenAI, { toFile } from "openai";

const MODEL = "gpt-image-2";
const PROMPT = "a red fox in the snow";
const PLAIN = { model: MODEL, size: "1024x1024", quality: "low" };
const RELEASE_AFTER_MS = 300;
const HEADERS = ["cache-status", "age", "etag", "x-cacheserver-cost-usd", "x-cacheserver-saved-usd"];
const { API_KEY, BASE_URL, BROKE_KEY, CONTROL_URL } = process.env;

const control = async (action) => (await fetch(`${CONTROL_URL}/${action}`, { method: "POST" })).json();

// The requests that have gone out, retries among them, by the time of each.
class Sent {
  atMs = [];
  onSecond = () => {};

  fetch = (url, init) => {
    this.atMs.push(performance.now());
    if (this.atMs.length === 2) this.onSecond();
    return fetch(url, init);
  };
}

const client = (sent, options = {}) => new OpenAI({ baseURL: BASE_URL, apiKey: API_KEY, fetch: sent.fetch, ...options });

const digest = (data) => createHash("sha256").update(data).digest("hex");
const picture = (base64) => Buffer.from(base64, "base64");
const digests = (answer) => answer.data.map((item) => digest(picture(item.b64_json)));

function formatOf(data) {
  const signatures = { png: "89504e47", jpeg: "ffd8ff", webp: "52494646" };
  const start = data.subarray(0, 4).toString("hex");
  return Object.keys(signatures).find((name) => start.startsWith(signatures[name])) ?? null;
}

const addsUp = (usage) => usage.total_tokens === usage.input_tokens + usage.output_tokens && usage.total_tokens > 0;

// What every answer with pictures has.
function facts(answer) {
  return {
    created: answer.created > 1_600_000_000,
    formats: answer.data.map((item) => formatOf(picture(item.b64_json))),
    urls: answer.data.map((item) => item.url ?? null),
    different: new Set(digests(answer)).size === answer.data.length,
    told: [answer.size, answer.quality, answer.output_format, answer.background],
    usage_adds_up: addsUp(answer.usage),
    text_tokens: answer.usage.input_tokens_details.text_tokens > 0,
  };
}

// How a call fails, and how often it was sent.
async function failure(sent, call) {
  const before = sent.atMs.length;
  try {
    await call();
  } catch (error) {
    if (!(error instanceof OpenAI.APIError)) throw error;
    return {
      class: error.constructor.name,
      status: error.status ?? null,
      type: error.type ?? null,
      code: error.code ?? null,
      param: error.param ?? null,
      all_four_keys: ["message", "type", "param", "code"].every((key) => key in error.error),
      request_id: Boolean(error.requestID),
      requests: sent.atMs.length - before,
    };
  }
  return { class: null };
}

const picked = (headers) =>
  Object.fromEntries(HEADERS.filter((name) => headers.has(name)).map((name) => [name, headers.get(name)]));

// Pictures in all forms.
async function pictures(api, contract, cache) {
  const first = await api.images.generate({ prompt: PROMPT, ...PLAIN }).withResponse();
  contract.generate = facts(first.data);
  contract.request_id = Boolean(first.request_id) && first.data._request_id === first.request_id;
  const headers = picked(first.response.headers);
  cache.generate = { digests: digests(first.data), ...(await control("counts")), headers };

  const again = await api.images.generate({ prompt: PROMPT, ...PLAIN }).withResponse();
  contract.repeat = facts(again.data);
  cache.repeat = { digests: digests(again.data), ...(await control("counts")), headers: picked(again.response.headers) };

  for (const [name, more] of [
    ["two", { n: 2 }],
    ["two_again", { n: 2 }],
    ["jpeg", { output_format: "jpeg" }],
    ["compressed", { output_format: "jpeg", output_compression: 40 }],
    ["webp", { output_format: "webp" }],
    ["b64_json", { response_format: "b64_json" }],
  ]) {
    const answer = await api.images.generate({ prompt: PROMPT, ...PLAIN, ...more });
    contract[name] = facts(answer);
    cache[name] = { digests: digests(answer), ...(await control("counts")) };
  }

  const answer = await api.images.generate({ prompt: PROMPT, response_format: "url", ...PLAIN });
  const fetched = await fetch(answer.data[0].url);
  const data = Buffer.from(await fetched.arrayBuffer());
  contract.url = {
    b64_json: answer.data[0].b64_json ?? null,
    content_type: fetched.headers.get("content-type"),
    format: formatOf(data),
  };
  cache.url = { digests: [digest(data)], ...(await control("counts")) };
}

// Partial pictures, then the whole one; then the same again.
async function streams(api, contract, cache) {
  for (const name of ["stream", "stream_again"]) {
    const events = [];
    const asked = { prompt: "a blue whale", stream: true, partial_images: 2, ...PLAIN };
    for await (const event of await api.images.generate(asked)) events.push(event);
    const last = events.pop();
    contract[name] = {
      last: last.type,
      format: formatOf(picture(last.b64_json)),
      told: [last.size, last.quality, last.output_format, last.background],
      created_at: last.created_at > 1_600_000_000,
      usage_adds_up: addsUp(last.usage),
      text_tokens: last.usage.input_tokens_details.text_tokens > 0,
    };
    if (name === "stream") {
      // A server that has the picture already may leave the partial ones out.
      contract[name].partials = events.map((event) => [
        event.type,
        event.partial_image_index,
        formatOf(picture(event.b64_json)),
      ]);
    }
    cache[name] = { digests: [digest(picture(last.b64_json))], ...(await control("counts")) };
  }
}

// A picture made from another one and a mask; the same with another picture.
async function edits(api, contract, cache) {
  const { data } = await api.images.generate({ prompt: PROMPT, n: 2, ...PLAIN });
  const [first, other] = data.map((item) => picture(item.b64_json));
  const file = (bytes, name) => toFile(bytes, name, { type: "image/png" });
  for (const [name, image] of [
    ["edit", first],
    ["edit_again", first],
    ["edit_of_another", other],
  ]) {
    const answer = await api.images.edit({
      image: await file(image, "picture.png"),
      mask: await file(other, "mask.png"),
      prompt: "the same with a hat",
      ...PLAIN,
    });
    contract[name] = facts(answer);
    cache[name] = { digests: digests(answer), ...(await control("counts")) };
  }
  contract.edit_stream = [];
  const asked = {
    image: [await file(first, "a.png"), await file(other, "b.png")],
    prompt: "both in one frame",
    stream: true,
    partial_images: 1,
    ...PLAIN,
  };
  for await (const event of await api.images.edit(asked)) contract.edit_stream.push(event.type);
}

// What cannot be had.
async function refusals(api, sent, contract) {
  const stranger = client(sent, { apiKey: "sk-nobody-knows-this-one" });
  const broke = client(sent, { apiKey: BROKE_KEY });
  const ask = (by, more) => failure(sent, () => by.images.generate({ prompt: PROMPT, ...PLAIN, ...more }));
  contract.wrong_key = await ask(stranger, {});
  contract.wrong_key_stream = await ask(stranger, { stream: true });
  contract.bad_size = await ask(api, { size: "17x99999" });
  contract.bad_n = await ask(api, { n: 11 });
  contract.unknown_model = await ask(api, { model: "gpt-image-0" });
  await control("block");
  contract.blocked = await ask(api, { prompt: "something violent" });
  contract.broke = await ask(broke, { prompt: "a dear picture" });
}

// A server that has more to do than it takes.
async function limits(sent, contract) {
  const api = client(sent, { maxRetries: 1 });
  await control("crowd");
  const before = sent.atMs.length;
  contract.limited = await failure(sent, () => api.images.generate({ prompt: "one too many", ...PLAIN }));
  const [firstMs, ...moreMs] = sent.atMs.slice(before);
  // A Retry-After is a second at least; what the package waits by itself is half of one.
  contract.limited.waited = moreMs.map((atMs) => atMs - firstMs >= 950);
  await control("disperse");
  contract.after_the_crowd = facts(await api.images.generate({ prompt: "one too many", ...PLAIN })).formats;
}

// A client less patient than the generation is long, which sends its request again.
async function timeOut(contract, cache) {
  const sent = new Sent();
  sent.onSecond = () => setTimeout(() => control("release"), RELEASE_AFTER_MS);
  const before = await control("hold");
  const api = client(sent, { timeout: 1_000, maxRetries: 4 });
  const answer = await api.images.generate({ prompt: "a slow picture", ...PLAIN });
  contract.timeout = { sent_again: sent.atMs.length >= 2, formats: facts(answer).formats };
  cache.timeout = { calls: (await control("counts")).calls - before.calls };
}

async function models(api, sent, contract) {
  const listed = [];
  for await (const model of api.models.list()) listed.push(model.id);
  const model = await api.models.retrieve(MODEL);
  contract.models = {
    listed: listed.includes(MODEL),
    retrieved: [model.id, model.object],
    unknown: await failure(sent, () => api.models.retrieve("gpt-image-0")),
  };
}

const sent = new Sent();
const api = client(sent);
const contract = {};
const cache = {};
await pictures(api, contract, cache);
await streams(api, contract, cache);
await edits(api, contract, cache);
await refusals(api, sent, contract);
await limits(sent, contract);
await timeOut(contract, cache);
await models(api, sent, contract);
console.log(JSON.stringify({ contract, cache }));
