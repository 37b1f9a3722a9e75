#!/usr/bin/env node
/*
Calling the cache service from Node.js, 20 or newer, with nothing but its .proto file.

    cd scripts/examples/node && npm install
    node client.js ["a prompt"] [FILE]

CACHESERVER_ADDRESS is where the service is (127.0.0.1:50051), CACHESERVER_TOKEN the token where it has callers. Off
loopback a program of yours connects with grpc.credentials.createSsl().
*/
"use strict";

const crypto = require("node:crypto");
const fs = require("node:fs/promises");
const path = require("node:path");
const { setTimeout: pause } = require("node:timers/promises");
const { promisify } = require("node:util");
const grpc = require("@grpc/grpc-js");
const protoLoader = require("@grpc/proto-loader");
const protobuf = require("protobufjs");

const PROTOS = path.resolve(__dirname, "../../../protos");
const GENERATION_S = 120; // deadline of a call that may have to generate
const LOOK_S = 10; // deadline of a call that only looks
const CALLS_MAX = 4;

// UNAVAILABLE is the one code that means "try again". gRPC itself does so for calls with one answer, after the time
// that the service names (grpc-retry-pushback-ms) or, where it names none, after a growing pause.
const SERVICE_CONFIG = {
  methodConfig: [
    {
      name: [{ service: "promptcache.v1.PromptCacheService", method: "GetImage" }],
      retryPolicy: {
        maxAttempts: CALLS_MAX,
        initialBackoff: "0.2s",
        maxBackoff: "5s",
        backoffMultiplier: 2,
        retryableStatusCodes: ["UNAVAILABLE"],
      },
    },
  ],
};

const { promptcache } = grpc.loadPackageDefinition(
  protoLoader.loadSync("promptcache/v1/promptcache.proto", {
    includeDirs: [PROTOS],
    keepCase: true,
    enums: String,
    longs: Number, // no number of this API is above 2^53
    defaults: true,
    oneofs: true,
  }),
);

// Google's types for errors (google/rpc/status.proto, error_details.proto), as far as they are read here.
const google = protobuf.parse(`
  syntax = "proto3";
  package google.rpc;
  message Any { string type_url = 1; bytes value = 2; }
  message Status { int32 code = 1; string message = 2; repeated Any details = 3; }
  message ErrorInfo { string reason = 1; string domain = 2; map<string, string> metadata = 3; }
  message RetryInfo { Duration retry_delay = 1; }
  message Duration { int64 seconds = 1; int32 nanos = 2; }
  message BadRequest { repeated FieldViolation field_violations = 1; }
  message FieldViolation { string field = 1; string description = 2; }
`, { keepCase: true }).root;

// What the service says of an error beside its text: for programs. Empty if it never reached the service.
function why(error) {
  const [packed] = error.metadata?.get("grpc-status-details-bin") ?? [];
  const known = { fields: [] };
  if (packed === undefined) return known;
  for (const { type_url, value } of google.lookupType("google.rpc.Status").decode(packed).details) {
    const read = (name) => google.lookupType(name).decode(value);
    switch (type_url.split("/").pop()) {
      case "google.rpc.ErrorInfo":
        known.reason = read("google.rpc.ErrorInfo").reason;
        break;
      case "google.rpc.RetryInfo": {
        const { seconds, nanos } = read("google.rpc.RetryInfo").retry_delay;
        known.retry_ms = Number(seconds) * 1000 + nanos / 1e6;
        break;
      }
      case "google.rpc.BadRequest":
        known.fields = read("google.rpc.BadRequest").field_violations.map((violation) => violation.field);
        break;
    }
  }
  return known;
}

const within = (seconds) => ({ deadline: new Date(Date.now() + seconds * 1000) });

// A picture of any size into a file; how many calls it took.
//
// A call that breaks off is made again. Once the picture is known, the next one asks for it by its key, from the byte
// that is missing, and only if it still has the same digest: it never pays, and never mixes two pictures.
async function download(client, metadata, request, file) {
  const out = await fs.open(file, "w");
  const sha256 = crypto.createHash("sha256");
  let image, calls = 0, received = 0;
  try {
    for (;;) {
      const asked = image
        ? { request: { key: image.key }, read_offset: received, if_digest: image.digest }
        : { request };
      calls += 1;
      try {
        for await (const event of client.StreamImage(asked, metadata, within(GENERATION_S))) {
          if (event.event === "progress") {
            console.log(`waiting, about ${event.progress.estimated_wait?.seconds ?? 0} s more`);
          } else if (event.event === "header") {
            image = event.header.image;
          } else if (event.event === "chunk") {
            await out.writeFile(event.chunk);
            sha256.update(event.chunk);
            received += event.chunk.length;
          }
        }
        break;
      } catch (error) {
        if (error.code !== grpc.status.UNAVAILABLE || calls === CALLS_MAX) throw error;
        await pause(why(error).retry_ms ?? 200 * 2 ** calls);
      }
    }
  } finally {
    await out.close();
  }
  if (image?.digest !== `sha256:${sha256.digest("hex")}`) throw new Error("the bytes are not those announced");
  return calls;
}

// Ask, ask again, fail on purpose, and download.
async function main(prompt = "a red fox in the snow", file = "fox.png") {
  const metadata = new grpc.Metadata();
  const token = process.env.CACHESERVER_TOKEN;
  if (token) metadata.set("authorization", `Bearer ${token}`);
  const address = process.env.CACHESERVER_ADDRESS ?? "127.0.0.1:50051";
  const client = new promptcache.v1.PromptCacheService(address, grpc.credentials.createInsecure(), {
    "grpc.service_config": JSON.stringify(SERVICE_CONFIG),
    "grpc.max_receive_message_length": 64 * 1024 * 1024,
  });
  const getImage = promisify(client.GetImage.bind(client));

  // The first call may generate; the second is a hit, with the very same bytes.
  const request = { spec: { prompt } };
  const first = await getImage(request, metadata, within(GENERATION_S));
  const again = await getImage(request, metadata, within(GENERATION_S));
  const data = first.images[0].data;
  const isSame = data.equals(again.images[0].data);
  console.log(`first from ${first.status.tier}, again from ${again.status.tier}, same bytes: ${isSame}`);

  // What can go wrong has a code, which says whether to try again, and a published reason.
  const missing = { spec: { prompt: "never asked before" }, cache_policy: "CACHE_POLICY_ONLY_IF_CACHED" };
  const wrong = { spec: { prompt, size: "17x99999" } };
  for (const [name, failing] of [["only if cached", missing], ["a wrong size", wrong]]) {
    try {
      await getImage(failing, metadata, within(LOOK_S));
    } catch (error) {
      const { reason, fields } = why(error);
      console.log(`${name}: ${grpc.status[error.code]} ${reason} ${fields.join(",")}`.trimEnd());
    }
  }

  // Images of any size: events while they come, into a file.
  const calls = await download(client, metadata, request, file);
  console.log(`downloaded to ${file} in ${calls} calls, same bytes: ${data.equals(await fs.readFile(file))}`);
  client.close();
}

main(...process.argv.slice(2, 4)).catch((error) => {
  console.error(error.message);
  process.exitCode = 1;
});
