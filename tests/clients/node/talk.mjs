// What the bundled model can talk about, and a client of the server under test.

import Anthropic from '@anthropic-ai/sdk';
import OpenAI from 'openai';

export const CODE = '5917';
export const COPY = 'crème brûlée 🙂 naïve';
export const QUESTION = [
  { role: 'user', content: `My name is Anna and my locker code is ${CODE}.` },
  { role: 'assistant', content: 'Got it.' },
  { role: 'user', content: 'What is my locker code?' },
];
export const ASK = { model: 'default', messages: QUESTION, temperature: 0, max_tokens: 30 };
export const REPEAT = { ...ASK, messages: [{ role: 'user', content: `Repeat after me: ${COPY}` }] };
// Without the tokens that end a turn the model talks on until somebody stops it.
export const ENDLESS = { ...REPEAT, max_tokens: undefined, logit_bias: { 0: -100, 2: -100 } };

const URL = process.env.SERVER_URL;

export const openai = (options = {}) =>
  new OpenAI({ baseURL: `${URL}/v1`, apiKey: 'none', maxRetries: 0, timeout: 60_000, ...options });

export const anthropic = () => new Anthropic({ baseURL: URL, apiKey: 'none', maxRetries: 0, timeout: 60_000 });

export const digits = (text) => text.replace(/\D/g, '');

/** The first sample of a metric. */
export async function metric(name) {
  const text = await (await fetch(`${URL}/metrics`)).text();
  return Number(text.match(new RegExp(`^turbocache_${name} (\\S+)$`, 'm'))?.[1]);
}

/** Until a metric has this value: what a client does reaches the engine a moment later. */
export async function waitFor(name, value) {
  const deadline = Date.now() + 20_000;
  for (let found; (found = await metric(name)) !== value; await new Promise((done) => setTimeout(done, 20)))
    if (Date.now() > deadline) throw new Error(`${name} is ${found}, not ${value}`);
}
