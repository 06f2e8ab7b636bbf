import assert from 'node:assert/strict';
import { test } from 'node:test';
import OpenAI from 'openai';
import { zodFunction, zodResponseFormat } from 'openai/helpers/zod';
import { z } from 'zod';
import { QUESTION, openai } from './talk.mjs';

const { completions } = openai().chat;
const messages = [{ role: 'user', content: 'Can you get the weather, using Paris as the city.' }];
const RESULT = 'The weather in Paris is sunny.';
const weather = {
  type: 'function',
  function: {
    name: 'get_weather',
    description: 'Get the weather for the user',
    parameters: { type: 'object', properties: { city: { type: 'string' } }, required: ['city'] },
  },
};
const ask = { model: 'default', messages, tools: [weather], temperature: 0, max_tokens: 120 };
const Locker = z.object({
  owner: z.string().max(12),
  code: z.string().regex(/^[0-9]{4}$/),
  size: z.enum(['small', 'large']),
  parts: z.array(z.object({ name: z.string().max(12), count: z.int().min(0).max(9) })).max(1),
  remark: z.string().max(12).nullable(),
});

test('a function is called and its result answered', async () => {
  const first = await completions.create(ask);
  const { message, finish_reason } = first.choices[0];
  const [call] = message.tool_calls;
  assert.equal(finish_reason, 'tool_calls');
  assert.equal(call.function.name, 'get_weather');
  assert.deepEqual(JSON.parse(call.function.arguments), { city: 'Paris' });
  const talk = [...messages, message, { role: 'tool', tool_call_id: call.id, content: RESULT }];
  const second = await completions.create({ ...ask, messages: talk });
  assert.match(second.choices[0].message.content, /sunny/);
  // More where another client has held this conversation before.
  assert.ok(second.usage.prompt_tokens_details.cached_tokens >= first.usage.total_tokens);
});

for (const stream of [false, true])
  test(`runTools does the whole round trip, stream: ${stream}`, async () => {
    const asked = [];
    const runner = completions.runTools({
      ...ask,
      stream,
      tools: [
        {
          type: 'function',
          function: { ...weather.function, parse: JSON.parse, function: ({ city }) => (asked.push(city), RESULT) },
        },
      ],
    });
    assert.match(await runner.finalContent(), /sunny/);
    assert.deepEqual(asked, ['Paris']);
  });

test('a streamed call accumulates', async () => {
  const final = await completions.stream(ask).finalChatCompletion();
  const [call] = final.choices[0].message.tool_calls;
  assert.deepEqual(JSON.parse(call.function.arguments), { city: 'Paris' });
});

test('zod arguments are parsed', async () => {
  const tool = zodFunction({
    name: 'get_weather',
    description: 'Get the weather for the user',
    parameters: z.object({ city: z.string() }),
  });
  const answer = await completions.parse({ ...ask, tools: [tool] });
  assert.deepEqual(answer.choices[0].message.tool_calls[0].function.parsed_arguments, { city: 'Paris' });
});

test('a zod response format is parsed, whole and streamed', async () => {
  const wanted = { ...ask, tools: undefined, messages: QUESTION, response_format: zodResponseFormat(Locker, 'locker') };
  const whole = await completions.parse(wanted);
  assert.ok(Locker.safeParse(whole.choices[0].message.parsed).success);
  const streamed = await completions.stream(wanted).finalChatCompletion();
  assert.deepEqual(streamed.choices[0].message.parsed, whole.choices[0].message.parsed);
});

test('an answer that was cut, and a schema that cannot be held', async () => {
  const wanted = { ...ask, tools: undefined, response_format: zodResponseFormat(Locker, 'locker') };
  await assert.rejects(completions.parse({ ...wanted, max_tokens: 3 }), OpenAI.LengthFinishReasonError);
  const schema = { type: 'object', if: { required: ['a'] }, then: { required: ['b'] } };
  const refused = { type: 'json_schema', json_schema: { name: 'x', schema } };
  await assert.rejects(completions.create({ ...wanted, response_format: refused }), OpenAI.BadRequestError);
});
