// The ai SDK over its OpenAI-compatible provider.
import assert from "node:assert/strict";
import { createOpenAICompatible } from "@ai-sdk/openai-compatible";
import { APICallError, generateText, Output, stepCountIs, streamText, tool } from "ai";
import { z } from "zod";

const [url, key] = process.argv.slice(2);
const text = "Hello wörld";
const galley = createOpenAICompatible({
  name: "galley",
  baseURL: `${url}/v1`,
  apiKey: key,
  supportsStructuredOutputs: true,
});
const stranger = createOpenAICompatible({ name: "galley", baseURL: `${url}/v1`, apiKey: "sk-wrong" });

assert.equal((await generateText({ model: galley("fake-1b"), prompt: "hi" })).text, text);
let seen = "";
for await (const piece of streamText({ model: galley("fake-1b"), prompt: "hi" }).textStream) seen += piece;
assert.equal(seen, text);

const Thing = z.object({ colour: z.enum(["red", "grün"]), size: z.number().int().min(0).max(9), sure: z.boolean() });
const isThing = (found) => {
  assert.ok(["red", "grün"].includes(found.colour) && typeof found.sure === "boolean");
  assert.ok(Number.isInteger(found.size) && found.size >= 0 && found.size <= 9);
};
const output = Output.object({ schema: Thing });
isThing((await generateText({ model: galley("tiny"), prompt: "hi", output })).output);
isThing(await streamText({ model: galley("tiny"), prompt: "hi", output }).output);

const used = [];
const f = tool({
  description: "Doubles x.",
  inputSchema: z.object({ x: z.number().int() }),
  execute: async ({ x }) => (used.push(x), 2 * x),
});
const called = await generateText({ model: galley("toolish-once"), prompt: "hi", tools: { f }, stopWhen: stepCountIs(3) });
assert.equal(called.text, "The tool said so");
assert.deepEqual(used, [1]);

const fails = async (model, status, more = {}) => {
  try {
    await generateText({ model, prompt: "hi", maxRetries: 0, ...more });
  } catch (error) {
    assert.ok(APICallError.isInstance(error), String(error));
    assert.equal(error.statusCode, status);
    return;
  }
  assert.fail(`no ${status}`);
};
await fails(galley("nope"), 404);
await fails(galley("fake-1b"), 400, { temperature: 9 });
await fails(stranger("fake-1b"), 401);

const leave = new AbortController();
const { textStream } = streamText({ model: galley("slow"), prompt: "hi", abortSignal: leave.signal });
for await (const _ of textStream) leave.abort();
for (let i = 0; ; i++) {
  const answer = await fetch(`${url}/v1/receipts?model=slow`, { headers: { authorization: `Bearer ${key}` } });
  const newest = (await answer.json()).data[0];
  if (newest?.status === "disconnected") break;
  assert.ok(i < 200, `no disconnected receipt: ${newest?.status}`);
  await new Promise((done) => setTimeout(done, 20));
}
