/**
 * The API as the page uses it: which model is served, and one streamed chat completion.
 *
 * Whatever goes wrong becomes an ApiError that says what happened and what to do; only an abort stays an AbortError.
 * Addresses are relative to the page, so that it also works behind a proxy that adds a prefix.
 * Not covered: what the chunks mean (exchange.js).
 */

import { toSize } from "./format.js";
import { SseParser } from "./sse.js";

export const API = new URL("../v1/", document.baseURI);
const MAX_DETAIL = 600;
const LARGE_BODY = 1_000_000;

export class ApiError extends Error {
  /** `title` and `advice` are sentences for a person; `detail` is what the server said; `retryAfterS` may be null. */
  constructor(title, { advice = "", detail = "", status = 0, retryAfterS = null } = {}) {
    super(title);
    Object.assign(this, { title, advice, detail, status, retryAfterS });
  }

  /** Whether the same request may go well another time. */
  get isPassing() {
    return this.status < 400 || this.status >= 500 || this.status === 408 || this.status === 429;
  }
}

/** Names of the served models; fails with an ApiError. */
export async function listModels(key) {
  const response = await send("models", key, {});
  try {
    return (await response.json()).data.map((model) => String(model.id));
  } catch {
    throw new ApiError("The server's list of models cannot be read.", { advice: "Is this address R-4B's server?" });
  }
}

/** The body of a request: images first, then the text, as R-4B was trained. */
export function toBody({ model, prompt, system, mode, temperature, maxTokens }, imageUrls) {
  const images = imageUrls.map((url) => ({ type: "image_url", image_url: { url } }));
  const content = images.length ? [...images, { type: "text", text: prompt }] : prompt;
  const body = { model, messages: [{ role: "user", content }] };
  if (system) body.messages.unshift({ role: "system", content: system });
  if (temperature !== null) body.temperature = temperature;
  if (maxTokens !== null) body.max_tokens = maxTokens;
  body.chat_template_kwargs = { thinking_mode: mode };
  return body;
}

/** The chunks of one completion until its stream ends; fails with an ApiError, or an AbortError when `signal` says so. */
export async function* streamChat(body, key, signal) {
  const streamed = { ...body, stream: true, stream_options: { include_usage: true } };
  const response = await send("chat/completions", key, { method: "POST", body: JSON.stringify(streamed), signal });
  if (!(response.headers.get("content-type") ?? "").startsWith("text/event-stream")) {
    throw new ApiError("The server did not answer with a stream.", { advice: "Does a proxy in between collect it?" });
  }
  const reader = response.body.getReader();
  const parser = new SseParser();
  try {
    for (;;) {
      const { done, value } = await readOn(reader);
      if (done) return;
      for (const payload of parser.push(value)) {
        if (payload === "[DONE]") return;
        yield toChunk(payload);
      }
    }
  } finally {
    reader.cancel().catch(() => {}); // of a stream that has ended or failed there is nothing left to cancel
  }
}

/** A connection that broke has ended too: whether the model had finished before, the chunks have told. */
async function readOn(reader) {
  try {
    return await reader.read();
  } catch (error) {
    if (error.name === "AbortError") throw error;
    return { done: true };
  }
}

/** The failure of a stream that ended before the model did. */
export function brokenOff() {
  return new ApiError("The connection broke off before the end.", {
    advice: "What had come by then is shown. Check the network, then try again.",
  });
}

/** Whether a key can stand in a header at all; others would make the browser refuse the request. */
export function isPlausibleKey(key) {
  return /^[\x21-\x7e]*$/.test(key);
}

async function send(path, key, options) {
  if (!isPlausibleKey(key)) {
    throw new ApiError("The API key holds characters that no key has.", { advice: "Enter it again.", status: 401 });
  }
  const headers = { "Content-Type": "application/json", ...(key ? { Authorization: `Bearer ${key}` } : {}) };
  let response;
  try {
    response = await fetch(new URL(path, API), { ...options, headers, cache: "no-store", credentials: "omit" });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw unreachable(options.body?.length ?? 0);
  }
  if (!response.ok) throw await toError(response, Boolean(key));
  return response;
}

/** A server that refuses a large body hangs up while it is being sent, and the browser then keeps the answer to itself. */
function unreachable(numBytes) {
  if (numBytes < LARGE_BODY) {
    return new ApiError("The server cannot be reached.", { advice: "Check the network and that it runs, then try again." });
  }
  return new ApiError(`The connection broke while ${toSize(numBytes)} were being sent.`, {
    advice: "The server may not take as much. Use fewer or smaller images, or try again.",
  });
}

function toChunk(payload) {
  let chunk;
  try {
    chunk = JSON.parse(payload);
  } catch {
    throw new ApiError("The server sent something that is not JSON.", { detail: payload.slice(0, MAX_DETAIL) });
  }
  if (chunk?.error) {
    throw new ApiError("The server gave up in the middle of the answer.", {
      advice: "Try again.",
      detail: toDetail(chunk),
      status: Number(chunk.error.code) || 0,
    });
  }
  return chunk;
}

async function toError(response, hasKey) {
  const status = response.status;
  const text = await response.text().catch(() => "");
  const [title, advice] = explain(status, hasKey);
  const error = { advice, detail: toDetail(text), status, retryAfterS: toSeconds(response.headers) };
  return new ApiError(title, error);
}

function explain(status, hasKey) {
  if (status === 401 && hasKey) return ["The server does not know this API key.", "Check the key, then send again."];
  if (status === 401) return ["The server wants an API key.", "Enter the key, then send again."];
  if (status === 403) return ["The server does not allow this.", ""];
  if (status === 413) return ["The request is too large for the server.", "Use fewer or smaller images, or a shorter prompt."];
  if (status === 429) return ["Too many requests at once.", ""];
  if (status === 503) return ["The server is busy or still starting.", ""];
  if (status >= 500) return [`The server failed (HTTP ${status}).`, "Try again; if it stays so, its log says more."];
  if (status === 400 || status === 422) return ["The server did not take the request.", ""];
  return [`The server answered with HTTP ${status}.`, ""];
}

/** What the server said, out of OpenAI's form of an error or as plain text; of a proxy's HTML page nothing. */
function toDetail(answer) {
  let said = answer;
  try {
    said = typeof answer === "string" ? JSON.parse(answer) : answer;
    said = said.error?.message ?? said.error ?? said.message ?? said.detail ?? "";
  } catch {
    // not JSON: the text itself
  }
  const text = (typeof said === "string" ? said : JSON.stringify(said)).trim();
  if (text.startsWith("<")) return "";
  return text.length > MAX_DETAIL ? `${text.slice(0, MAX_DETAIL)}…` : text;
}

/** `Retry-After`, in its two forms, as seconds from now; null when there is none. */
function toSeconds(headers) {
  const value = headers.get("retry-after");
  if (value === null) return null;
  if (/^\d+$/.test(value)) return Number(value);
  const now = Date.parse(headers.get("date")) || Date.now(); // the server's clock, for the date is the server's
  const seconds = Math.ceil((Date.parse(value) - now) / 1000);
  return Number.isNaN(seconds) ? null : Math.max(0, seconds);
}
