// A team's work with the AI SDK of Vercel, told as one JSON object; see openai_session.py.

import { createHash } from "node:crypto";
import { createOpenAI } from "@ai-sdk/openai";
import { APICallError, generateImage, RetryError } from "ai";

const PROMPT = "a red fox in the snow";
const { API_KEY, BASE_URL, CONTROL_URL } = process.env;

let requests = 0;

const control = async (action) => (await fetch(`${CONTROL_URL}/${action}`, { method: "POST" })).json();

const provider = (apiKey) =>
  createOpenAI({
    baseURL: BASE_URL,
    apiKey,
    fetch: (url, init) => {
      requests += 1;
      return fetch(url, init);
    },
  });

async function ask(prompt, options = {}, { model = "gpt-image-2", apiKey = API_KEY } = {}) {
  const { quality = "low", ...more } = options.openai ?? {};
  return generateImage({
    model: provider(apiKey).image(model),
    prompt,
    size: options.size ?? "1024x1024",
    n: options.n ?? 1,
    maxRetries: options.maxRetries ?? 2,
    providerOptions: { openai: { quality, ...more } },
  });
}

const digests = (answer) => answer.images.map((image) => createHash("sha256").update(image.uint8Array).digest("hex"));

function facts(answer) {
  return {
    types: answer.images.map((image) => image.mediaType),
    different: new Set(digests(answer)).size === answer.images.length,
    usage_adds_up: answer.usage.totalTokens === answer.usage.inputTokens + answer.usage.outputTokens,
    warnings: answer.warnings.length,
    model: answer.responses[0].modelId,
  };
}

async function failure(call) {
  const before = requests;
  try {
    await call();
  } catch (error) {
    const last = RetryError.isInstance(error) ? error.lastError : error;
    if (!APICallError.isInstance(last)) throw error;
    return {
      status: last.statusCode,
      code: last.data?.error?.code ?? null,
      param: last.data?.error?.param ?? null,
      retryable: last.isRetryable,
      requests: requests - before,
    };
  }
  return { status: null };
}

const contract = {};
const cache = {};

const editing = (first, mask) => ({ text: "the same with a hat", images: [first], mask });

async function note(name, answer) {
  contract[name] = facts(answer);
  cache[name] = { digests: digests(answer), ...(await control("counts")) };
  return answer;
}

await note("two", await ask(PROMPT, { n: 2 }));
const { images } = await note("two_again", await ask(PROMPT, { n: 2 }));
await note("one", await ask(PROMPT));
await note("jpeg", await ask(PROMPT, { openai: { outputFormat: "jpeg", outputCompression: 40 } }));
await note("edit", await ask(editing(images[0].uint8Array, images[1].uint8Array)));
await note("edit_again", await ask(editing(images[0].uint8Array, images[1].uint8Array)));
contract.wrong_key = await failure(() => ask(PROMPT, {}, { apiKey: "sk-nobody-knows-this-one" }));
contract.bad_size = await failure(() => ask(PROMPT, { size: "17x99999" }));
contract.unknown_model = await failure(() => ask(PROMPT, {}, { model: "gpt-image-0" }));
await control("block");
contract.blocked = await failure(() => ask("something violent"));
await control("crowd");
contract.limited = await failure(() => ask("one too many", { maxRetries: 1 }));
await control("disperse");
console.log(JSON.stringify({ contract, cache }));
