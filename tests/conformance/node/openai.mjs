// The official Node client: stream, whole, responses, errors, tries, disconnect.
import assert from "node:assert/strict";
import OpenAI from "openai";
import { zodResponseFormat } from "openai/helpers/zod";
import { z } from "zod";

const [url, key] = process.argv.slice(2);
const text = "Hello wörld";
const client = new OpenAI({ baseURL: `${url}/v1`, apiKey: key });
const messages = [{ role: "user", content: "hi" }];

const receipts = async (model) => {
  const answer = await fetch(`${url}/v1/receipts?model=${model}&limit=100`, {
    headers: { authorization: `Bearer ${key}` },
  });
  return (await answer.json()).data;
};

const whole = await client.chat.completions.create({ model: "fake-1b", messages });
assert.equal(whole.choices[0].message.content, text);
let seen = "";
for await (const chunk of await client.chat.completions.create({ model: "fake-1b", messages, stream: true }))
  seen += chunk.choices[0]?.delta?.content ?? "";
assert.equal(seen, text);

const schema = {
  type: "object",
  properties: {
    colour: { enum: ["red", "grün"] },
    size: { type: "integer", minimum: 0, maximum: 9 },
    sure: { type: "boolean" },
  },
  required: ["colour", "size", "sure"],
  additionalProperties: false,
};
const isThing = (found) => {
  assert.deepEqual(Object.keys(found).sort(), ["colour", "size", "sure"]);
  assert.ok(["red", "grün"].includes(found.colour) && typeof found.sure === "boolean");
  assert.ok(Number.isInteger(found.size) && found.size >= 0 && found.size <= 9);
};
const Thing = z.object({ colour: z.enum(["red", "grün"]), size: z.number().int().min(0).max(9), sure: z.boolean() });
const parsed = await client.chat.completions.parse({
  model: "tiny",
  messages,
  response_format: zodResponseFormat(Thing, "thing"),
});
isThing(parsed.choices[0].message.parsed);
const streamed = client.chat.completions.stream({
  model: "tiny",
  messages,
  response_format: zodResponseFormat(Thing, "thing"),
});
isThing(JSON.parse((await streamed.finalChatCompletion()).choices[0].message.content));
const tools = [{ type: "function", function: { name: "f", strict: true, parameters: schema } }];
const forced = await client.chat.completions.create({ model: "tiny", messages, tools, tool_choice: "required" });
isThing(JSON.parse(forced.choices[0].message.tool_calls[0].function.arguments));
const toolish = await client.chat.completions.stream({ model: "toolish", messages, tools }).finalChatCompletion();
assert.equal(toolish.choices[0].message.tool_calls[0].function.arguments, '{"x":1}');
assert.equal(toolish.choices[0].finish_reason, "tool_calls");

const response = await client.responses.create({ model: "fake-1b", input: "hi" });
assert.equal(response.output_text, text);
const final = await client.responses.stream({ model: "toolish", input: "hi" }).finalResponse();
assert.deepEqual(final.output.map((item) => item.type), ["reasoning", "message", "function_call"]);
assert.equal(final.output[2].arguments, '{"x":1}');

await assert.rejects(client.responses.create({ model: "fake-1b", input: "hi", temperature: 9 }), OpenAI.BadRequestError);
await assert.rejects(client.responses.create({ model: "nope", input: "hi" }), OpenAI.NotFoundError);
const stranger = new OpenAI({ baseURL: `${url}/v1`, apiKey: "sk-wrong" });
await assert.rejects(stranger.responses.create({ model: "fake-1b", input: "hi" }), OpenAI.AuthenticationError);
const before = (await receipts("broken")).length;
await assert.rejects(client.responses.create({ model: "broken", input: "hi" }), OpenAI.InternalServerError);
assert.equal((await receipts("broken")).length, before + 1, "a permanent refusal was tried again");

const stream = await client.chat.completions.create({ model: "slow", messages, stream: true });
for await (const chunk of stream) {
  assert.ok(chunk.id);
  break; // leaving the loop closes the connection
}
for (let i = 0; ; i++) {
  const newest = (await receipts("slow"))[0];
  if (newest?.status === "disconnected") break;
  assert.ok(i < 200, `no disconnected receipt: ${newest?.status}`);
  await new Promise((done) => setTimeout(done, 20));
}
