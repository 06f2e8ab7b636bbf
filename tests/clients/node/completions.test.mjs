import assert from 'node:assert/strict';
import { test } from 'node:test';
import OpenAI from 'openai';
import { openai } from './talk.mjs';

const { completions } = openai();
const ask = {
  model: 'default', prompt: 'The miller walked to the river. The miller walked to the', temperature: 0, max_tokens: 8,
};

test('text goes on, whole and streamed', async () => {
  const whole = await completions.create(ask);
  assert.match(whole.choices[0].text, /^ river/);
  let heard = '';
  for await (const chunk of await completions.create({ ...ask, stream: true })) heard += chunk.choices[0].text;
  assert.equal(heard, whole.choices[0].text);
});

test('what cannot be is refused', async () => {
  await assert.rejects(completions.create({ ...ask, max_tokens: -1 }), OpenAI.BadRequestError);
});
