import assert from 'node:assert/strict';
import { test } from 'node:test';
import OpenAI from 'openai';
import { zodTextFormat } from 'openai/helpers/zod';
import { z } from 'zod';
import { CODE, COPY, QUESTION, digits, openai } from './talk.mjs';

const { responses } = openai();
const ask = { model: 'default', temperature: 0, max_output_tokens: 60 };
const repeat = { ...ask, input: `Repeat after me: ${COPY}` };
const weather = {
  type: 'function',
  name: 'get_weather',
  description: 'Get the weather for the user',
  parameters: { type: 'object', properties: { city: { type: 'string' } }, required: ['city'] },
  strict: false,
};

test('one response goes on from another, is looked at and deleted', async () => {
  const told = await responses.create({ ...ask, input: QUESTION[0].content });
  const asked = await responses.create({ ...ask, input: QUESTION[2].content, previous_response_id: told.id });
  assert.equal(digits(asked.output_text), CODE);
  assert.equal(asked.usage.input_tokens_details.cached_tokens, told.usage.total_tokens);
  assert.equal((await responses.retrieve(asked.id)).output_text, asked.output_text);
  const items = [];
  for await (const item of responses.inputItems.list(told.id)) items.push(item.role);
  assert.deepEqual(items, ['user']);
  await responses.delete(asked.id);
  await assert.rejects(responses.retrieve(asked.id), OpenAI.NotFoundError);
});

test('events and what the helper makes of them', async () => {
  const kinds = [];
  for await (const event of await responses.create({ ...repeat, stream: true })) kinds.push(event.type);
  assert.equal(kinds[0], 'response.created');
  assert.equal(kinds.at(-1), 'response.completed');
  const final = await responses.stream(repeat).finalResponse();
  assert.equal(final.output_text, COPY);
});

test('a function is called and its result answered', async () => {
  const input = 'Can you get the weather, using Paris as the city.';
  const first = await responses.create({ ...ask, input, tools: [weather] });
  const [call] = first.output;
  assert.equal(call.type, 'function_call');
  assert.deepEqual(JSON.parse(call.arguments), { city: 'Paris' });
  const result = { type: 'function_call_output', call_id: call.call_id, output: 'The weather in Paris is sunny.' };
  const second = await responses.create({ ...ask, input: [result], tools: [weather], previous_response_id: first.id });
  assert.match(second.output_text, /sunny/);
});

test('a zod text format is parsed', async () => {
  const Locker = z.object({ owner: z.string().max(12), code: z.string().regex(/^[0-9]{4}$/) });
  const parsed = await responses.parse({ ...ask, input: QUESTION, text: { format: zodTextFormat(Locker, 'locker') } });
  assert.ok(Locker.safeParse(parsed.output_parsed).success);
});
