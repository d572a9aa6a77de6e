// The official Node client: stream, whole, responses, errors, tries, disconnect.
import assert from "node:assert/strict";
import OpenAI from "openai";

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
