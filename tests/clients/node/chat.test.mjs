import assert from 'node:assert/strict';
import { test } from 'node:test';
import OpenAI from 'openai';
import { ASK, CODE, COPY, ENDLESS, REPEAT, digits, openai, waitFor } from './talk.mjs';

const client = openai();
const { completions } = client.chat;

test('a question about the conversation is answered', async () => {
  const answer = await completions.create(ASK);
  assert.equal(digits(answer.choices[0].message.content), CODE);
  assert.equal(answer.choices[0].finish_reason, 'stop');
  assert.equal(answer.usage.total_tokens, answer.usage.prompt_tokens + answer.usage.completion_tokens);
  assert.equal(answer._request_id, answer.id);
});

test('a stream says the same and ends with a reason and the usage', async () => {
  const chunks = [];
  for await (const chunk of await completions.create({
    ...REPEAT, stream: true, stream_options: { include_usage: true },
  })) chunks.push(chunk);
  const last = chunks.pop();
  assert.equal(chunks.map((chunk) => chunk.choices[0].delta.content ?? '').join(''), COPY);
  assert.equal(chunks[0].choices[0].delta.role, 'assistant');
  assert.equal(chunks.at(-1).choices[0].finish_reason, 'stop');
  assert.deepEqual(last.choices, []);
  assert.ok(last.usage.completion_tokens > 0);
});

test('the stream helper emits the content and accumulates it', async () => {
  let heard = '';
  const stream = completions.stream(REPEAT).on('content', (delta) => (heard += delta));
  const final = await stream.finalChatCompletion();
  assert.equal(heard, COPY);
  assert.equal(final.choices[0].message.content, COPY);
});

test('stop, seed and logprobs', async () => {
  const cut = await completions.create({ ...REPEAT, stop: ['ûlée'] });
  assert.equal(cut.choices[0].message.content, COPY.split('ûlée')[0]);
  const hot = { ...REPEAT, temperature: 1.8, max_tokens: 10 };
  const [first, again, other] = await Promise.all(
    [7, 7, 8].map(async (seed) => (await completions.create({ ...hot, seed })).choices[0].message.content),
  );
  assert.equal(first, again);
  assert.notEqual(first, other);
  const told = await completions.create({ ...REPEAT, logprobs: true, top_logprobs: 2 });
  const bytes = told.choices[0].logprobs.content.flatMap((token) => token.bytes);
  assert.equal(Buffer.from(bytes).toString(), COPY);
});

test('errors have their classes, fields and codes', async () => {
  await assert.rejects(completions.create({ ...ASK, temperature: 3 }), (error) => {
    assert.ok(error instanceof OpenAI.BadRequestError);
    assert.deepEqual([error.param, error.code], ['temperature', 'decimal_above_max_value']);
    return true;
  });
  await assert.rejects(completions.create({ ...ASK, model: 'gpt-4o' }), OpenAI.NotFoundError);
  await assert.rejects(completions.create({ ...ASK, max_tokens: 9000 }), { code: 'context_length_exceeded' });
});

test('a timeout, an abort and a stream left halfway end the work', async () => {
  await assert.rejects(openai({ timeout: 500 }).chat.completions.create(ENDLESS), OpenAI.APIConnectionTimeoutError);
  await waitFor('requests_running', 0);

  const leaving = new AbortController();
  const asking = completions.create(ENDLESS, { signal: leaving.signal });
  await waitFor('requests_running', 1);
  leaving.abort();
  await assert.rejects(asking, OpenAI.APIUserAbortError);
  await waitFor('requests_running', 0);

  let heard = 0;
  for await (const _ of await completions.create({ ...ENDLESS, stream: true })) if (++heard === 5) break;
  await waitFor('requests_running', 0);
});

test('models are listed', async () => {
  const ids = [];
  for await (const model of client.models.list()) ids.push(model.id);
  assert.deepEqual(ids, ['tiny-recall-4bit']);
});
