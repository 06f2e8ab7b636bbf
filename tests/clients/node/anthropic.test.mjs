import assert from 'node:assert/strict';
import { test } from 'node:test';
import Anthropic from '@anthropic-ai/sdk';
import { CODE, COPY, QUESTION, anthropic, digits } from './talk.mjs';

const { messages } = anthropic();
const ask = { model: 'default', max_tokens: 60, messages: QUESTION, temperature: 0 };
const repeat = { ...ask, messages: [{ role: 'user', content: `Repeat after me: ${COPY}` }] };
const weather = {
  name: 'get_weather',
  description: 'Get the weather for the user',
  input_schema: { type: 'object', properties: { city: { type: 'string' } }, required: ['city'] },
};

test('a question is answered and counted', async () => {
  const answer = await messages.create(ask);
  assert.equal(digits(answer.content[0].text), CODE);
  assert.equal(answer.stop_reason, 'end_turn');
  const counted = await messages.countTokens({ model: 'default', messages: QUESTION });
  assert.equal(counted.input_tokens, answer.usage.input_tokens + (answer.usage.cache_read_input_tokens ?? 0));
});

test('a stream emits the text and accumulates it', async () => {
  let heard = '';
  const stream = messages.stream(repeat).on('text', (text) => (heard += text));
  const final = await stream.finalMessage();
  assert.equal(heard, COPY);
  assert.equal(final.content[0].text, COPY);
});

test('a tool is used and its result answered', async () => {
  const asked = { role: 'user', content: 'Can you get the weather, using Paris as the city.' };
  const first = await messages.stream({ ...ask, messages: [asked], tools: [weather] }).finalMessage();
  const [use] = first.content;
  assert.deepEqual([use.type, use.name, use.input], ['tool_use', 'get_weather', { city: 'Paris' }]);
  assert.equal(first.stop_reason, 'tool_use');
  const result = { type: 'tool_result', tool_use_id: use.id, content: 'The weather in Paris is sunny.' };
  const talk = [asked, { role: 'assistant', content: first.content }, { role: 'user', content: [result] }];
  const second = await messages.create({ ...ask, messages: talk, tools: [weather] });
  assert.match(second.content[0].text, /sunny/);
});

test('errors have their classes', async () => {
  await assert.rejects(messages.create({ ...ask, max_tokens: -1 }), Anthropic.BadRequestError);
  await assert.rejects(messages.create({ ...ask, model: 'another' }), Anthropic.NotFoundError);
});
