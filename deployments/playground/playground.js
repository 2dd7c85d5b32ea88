/**
 * The page: what is typed becomes a request, and its answer a card. One request at a time.
 *
 * The API key lives in this tab's sessionStorage and nowhere else; questions and answers live in the page alone.
 * Not covered: conversations. Each question stands for itself, as each row of a batch job does.
 */

import { Card } from "./card.js";
import { ApiError, brokenOff, listModels, streamChat, toBody } from "./chat.js";
import { Exchange } from "./exchange.js";
import { ImageList, toDataUrl } from "./images.js";

const KEY_NAME = "r4b.api_key";
const MAX_CARDS = 20;

const page = Object.fromEntries([...document.querySelectorAll("[id]")].map((element) => [element.id, element]));
const images = new ImageList({
  list: page.thumbs,
  input: page.files,
  zone: page.drop,
  title: page.dropTitle,
  say: (message) => showProblem(page.imagesProblem, message),
});
const cards = [];
let model = null;
let running = null;
let numConnects = 0;

start();

function start() {
  page.key.value = storedKey();
  page.form.addEventListener("submit", (event) => {
    event.preventDefault();
    send();
  });
  page.prompt.addEventListener("keydown", sendOnEnter);
  page.prompt.addEventListener("input", () => showProblem(page.promptProblem, ""));
  page.system.addEventListener("keydown", (event) => event.ctrlKey && sendOnEnter(event));
  page.stop.addEventListener("click", () => running?.abort());
  page.key.addEventListener("change", () => {
    storeKey(page.key.value.trim());
    connect();
  });
  page.key.addEventListener("keydown", (event) => {
    if (event.key !== "Enter") return;
    event.preventDefault(); // a key is entered to be used later
    page.prompt.focus();
  });
  page.reconnect.addEventListener("click", connect);
  connect();
}

/** Find out which model is served, and whether a key is needed. */
async function connect() {
  const number = ++numConnects;
  showServer("waiting", "Connecting…");
  try {
    const [name] = await listModels(key());
    if (!name) throw new ApiError("The server serves no model.");
    if (number !== numConnects) return null; // another key was entered meanwhile
    model = name;
    page.keyRow.hidden = key() === "";
    showProblem(page.keyProblem, "");
    showServer("ready", model);
    return null;
  } catch (error) {
    if (number !== numConnects) return error;
    model = null;
    showServer(error.status === 401 ? "locked" : "away", error.status === 401 ? "Key needed" : "No connection");
    if (error.status === 401) askForKey(key() ? `${error.title} ${error.advice}` : "", key() !== "");
    return error;
  }
}

async function send() {
  const problem = checkForm();
  if (problem) {
    problem.focus();
    return;
  }
  await ask({
    prompt: page.prompt.value,
    system: page.system.value.trim(),
    mode: page.form.elements.mode.value,
    temperature: numberOf(page.temperature),
    maxTokens: numberOf(page.maxTokens),
    files: images.files,
  });
}

/** Ask and show, whatever comes of it; never fails. */
async function ask(question) {
  if (running) return;
  running = new AbortController();
  const exchange = new Exchange(question.mode, performance.now());
  const card = new Card(page.cardTemplate, question, exchange, {
    onRetry: () => ask(question),
    onStop: () => running?.abort(),
  });
  showCard(card);
  showRunning(true, card.stop);
  const ending = await listen(question, exchange, card, running.signal);
  exchange.end(performance.now());
  running = null;
  showRunning(false, card.stop);
  card.finish(ending);
  say(toWord(exchange, ending));
  if (ending.error?.status === 401) {
    showServer("locked", "Key needed");
    askForKey(ending.error.title, true);
  }
}

/** Fill the exchange from the stream; returns how it ended, as Card.finish takes it. */
async function listen(question, exchange, card, signal) {
  try {
    const failure = model === null ? await connect() : null;
    if (failure) throw failure;
    question.model = model;
    say("Sending…");
    const body = toBody(question, await Promise.all(question.files.map(readImage)));
    for await (const chunk of streamChat(body, key(), signal)) {
      exchange.take(chunk, performance.now());
      say(exchange.content ? "Answering…" : exchange.hasThought ? "Thinking…" : "Waiting…");
      card.update();
    }
    return exchange.finishReason ? {} : { error: brokenOff() };
  } catch (error) {
    if (error.name === "AbortError") return { isStopped: true };
    if (error instanceof ApiError) return { error };
    console.error(error);
    return { error: new ApiError("This page failed.", { advice: "Reload it.", detail: String(error) }) };
  }
}

async function readImage(file) {
  try {
    return await toDataUrl(file);
  } catch {
    throw new ApiError(`${file.name} cannot be read any more.`, { advice: "Remove it and choose it again." });
  }
}

/** The first field that is wrong, with its message shown; null when all are right. */
function checkForm() {
  showProblem(page.promptProblem, page.prompt.value.trim() ? "" : "Type a prompt first.");
  let wrong = page.prompt.value.trim() ? null : page.prompt;
  for (const [field, message] of [
    [page.temperature, "A number from 0 to 2."],
    [page.maxTokens, "A whole number from 1, or nothing."],
  ]) {
    const isRight = field.validity.valid;
    showProblem(page[`${field.id}Problem`], isRight ? "" : message);
    if (!isRight) page.more.open = true;
    if (!isRight) wrong ??= field;
  }
  return wrong;
}

function sendOnEnter(event) {
  if (event.key !== "Enter" || event.isComposing || event.shiftKey) return;
  if (!event.ctrlKey && !event.metaKey && matchMedia("(pointer: coarse)").matches) return; // a phone's only line break
  event.preventDefault();
  send();
}

function showCard(card) {
  page.empty.hidden = true;
  page.answers.prepend(card.element);
  cards.unshift(card);
  while (cards.length > MAX_CARDS) cards.pop().remove();
  const isCalm = matchMedia("(prefers-reduced-motion: reduce)").matches;
  const isNarrow = card.stop.checkVisibility();
  card.element.scrollIntoView({ block: isNarrow ? "start" : "nearest", behavior: isCalm ? "auto" : "smooth" });
}

/** The stylesheet shows one of the two Stop buttons: beside Send, or on a phone where the reader looks. */
function showRunning(isRunning, cardStop) {
  const hadFocus = document.activeElement;
  page.send.setAttribute("aria-disabled", String(isRunning));
  page.stop.hidden = !isRunning;
  cardStop.hidden = !isRunning;
  if (isRunning && hadFocus === page.send) {
    page.stop.focus({ preventScroll: true });
    cardStop.focus({ preventScroll: true }); // the one that is not shown takes no focus
  }
  if (!isRunning && (hadFocus === page.stop || hadFocus === cardStop)) page.send.focus({ preventScroll: true });
}

function toWord(exchange, { error, isStopped }) {
  if (error) return "Failed.";
  if (isStopped) return "Stopped.";
  return exchange.isThoughtCut ? "No answer." : "Answered.";
}

function showServer(state, text) {
  page.server.dataset.state = state;
  page.serverText.textContent = text;
  page.reconnect.hidden = state !== "away";
}

/** A word on what goes on, said once. */
function say(text) {
  if (page.status.textContent !== text) page.status.textContent = text;
}

function askForKey(problem, focus) {
  page.keyRow.hidden = false;
  showProblem(page.keyProblem, problem);
  if (focus) page.key.focus();
}

/** A message under a field; an empty one takes it away. */
function showProblem(element, message) {
  element.textContent = message;
  element.hidden = message === "";
  const field = document.querySelector(`[aria-describedby~="${element.id}"]`);
  field?.setAttribute("aria-invalid", String(message !== ""));
}

function numberOf(field) {
  return field.value === "" ? null : field.valueAsNumber;
}

function key() {
  return page.key.value.trim();
}

function storedKey() {
  try {
    return sessionStorage.getItem(KEY_NAME) ?? "";
  } catch {
    return ""; // a browser that stores nothing: the key then lasts as long as the page
  }
}

function storeKey(value) {
  try {
    sessionStorage.setItem(KEY_NAME, value);
  } catch {
    // as above
  }
}
