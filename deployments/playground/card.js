/**
 * One question and its answer on the page, from the first wait to the last count.
 *
 * Everything that comes from outside is text, never markup. The thought is open while it grows and folds itself when
 * the answer begins, unless the reader has touched it.
 * Not covered: asking (playground.js), and counting (exchange.js).
 */

import { toCount, toDuration } from "./format.js";
import { toThumbnail } from "./images.js";
import { toCurl, toPython } from "./snippets.js";

const TOUCHES = ["click", "pointerdown", "keydown", "focusin"];
const MODES = { auto: "Auto", long: "Long", short: "Short" };
const TICK_MS = 200;
let numCards = 0;

export class Card {
  #exchange;
  #parts;
  #thumbnails;
  #touched = false;
  #folded = false;
  #frame = 0;
  #timer = 0;

  constructor(template, question, exchange, { onRetry, onStop }) {
    this.#exchange = exchange;
    this.element = template.content.firstElementChild.cloneNode(true);
    this.#parts = Object.fromEntries(
      [...this.element.querySelectorAll("[data-part]")].map((element) => [element.dataset.part, element]),
    );
    const parts = this.#parts;
    parts.prompt.textContent = question.prompt;
    parts.prompt.id = `prompt-${++numCards}`;
    this.element.setAttribute("aria-labelledby", parts.prompt.id);
    parts.asked.textContent = toSettings(question);
    this.#thumbnails = question.files.map(toThumbnail);
    parts.pictures.append(...this.#thumbnails.map((thumbnail) => thumbnail.item));
    parts.pictures.hidden = question.files.length === 0;
    for (const touch of TOUCHES) {
      parts.thought.addEventListener(touch, () => (this.#touched = true));
    }
    parts.retry.addEventListener("click", onRetry);
    parts.stop.addEventListener("click", onStop);
    this.#offerCopies(question);
    this.#timer = setInterval(() => this.#tick(), TICK_MS);
    this.#tick();
  }

  /** The button that ends it; who asks says when it is there. */
  get stop() {
    return this.#parts.stop;
  }

  /** Show what the exchange holds, with the next frame: a thought may come in hundreds of pieces a second. */
  update() {
    this.#frame ||= requestAnimationFrame(() => this.#draw());
  }

  /** Nothing more will come. `error` is an ApiError, `isStopped` says that the reader stopped it. */
  finish({ error = null, isStopped = false } = {}) {
    clearInterval(this.#timer);
    cancelAnimationFrame(this.#frame);
    this.#draw();
    const { waiting, answer, tools, copyAnswer } = this.#parts;
    waiting.hidden = true;
    answer.setAttribute("aria-busy", "false");
    this.element.classList.add("done");
    this.#parts.thoughtTitle.textContent = this.#thoughtTitle(isStopped || error !== null);
    this.#notify(error, isStopped);
    this.#showFacts();
    tools.hidden = false;
    copyAnswer.hidden = this.#exchange.content === "";
  }

  /** Take it off the page. */
  remove() {
    for (const thumbnail of this.#thumbnails) thumbnail.release();
    this.element.remove();
  }

  #tick() {
    const now = performance.now();
    const exchange = this.#exchange;
    this.#parts.waitingTime.textContent = toDuration(exchange.totalMs(now)).replace(/\.\d+/, "");
    if (exchange.answerAt === null && exchange.hasThought) {
      this.#parts.thoughtTitle.textContent = `Thinking… ${toDuration(exchange.thinkingMs(now)).replace(/\.\d+/, "")}`;
    }
  }

  #draw() {
    this.#frame = 0;
    const exchange = this.#exchange;
    const { thought, thoughtText, thoughtTitle, answer, waiting } = this.#parts;
    waiting.hidden = exchange.firstAt !== null;
    if (exchange.hasThought) {
      thought.hidden = false;
      grow(thoughtText, exchange.reasoning);
    }
    if (exchange.content) {
      grow(answer, exchange.content);
      this.element.classList.add("answering");
      if (exchange.hasThought) thoughtTitle.textContent = this.#thoughtTitle(false);
      if (!this.#folded && !this.#touched && isAtEnd(thoughtText)) thought.open = false;
      this.#folded = true;
    } else {
      this.#tick();
    }
  }

  #thoughtTitle(isBroken) {
    const exchange = this.#exchange;
    const duration = toDuration(exchange.thinkingMs(performance.now()) ?? 0);
    const isWhole = exchange.answerAt !== null || !(isBroken || exchange.isThoughtCut);
    return isWhole ? `Thought for ${duration}` : `Unfinished thought, ${duration}`;
  }

  #notify(error, isStopped) {
    const { notice, noticeTitle, noticeText, noticeDetail, retry } = this.#parts;
    const { kind, title, text, detail } = error
      ? { kind: "error", title: error.title, text: toAdvice(error), detail: error.detail }
      : this.#toRemark(isStopped);
    if (!title) return;
    notice.hidden = false;
    notice.classList.add(kind);
    noticeTitle.textContent = title;
    noticeText.textContent = text;
    noticeDetail.textContent = detail ?? "";
    noticeDetail.hidden = !detail;
    retry.hidden = !error?.isPassing;
  }

  /** What a reader should know about an answer that came without an error. */
  #toRemark(isStopped) {
    const { isThoughtCut, finishReason, completionTokens, content } = this.#exchange;
    const kind = "remark";
    const limit = completionTokens === null ? "" : ` (${toCount(completionTokens)} tokens)`;
    if (isStopped) return { kind, title: "Stopped.", text: "What had come by then is shown." };
    if (isThoughtCut) {
      const text = "Allow more tokens, or choose the mode Short. A thought that was cut is no answer.";
      return { kind, title: `max_tokens ended the thought before an answer${limit}.`, text };
    }
    if (finishReason === "length") {
      return { kind, title: `max_tokens ended the answer${limit}.`, text: "Allow more tokens to read on." };
    }
    if (finishReason !== "stop") return { kind, title: `The server ended the answer: ${finishReason}.`, text: "" };
    return content.trim() ? {} : { kind, title: "The model gave an empty answer.", text: "" };
  }

  #showFacts() {
    const exchange = this.#exchange;
    const now = performance.now();
    const facts = [
      ["Mode", exchange.modeChosen],
      ["Prompt", toTokens(exchange.promptTokens)],
      ["Thought", toTokens(exchange.reasoningTokens)],
      ["Answer", toTokens(exchange.answerTokens)],
      ["First token", toTime(exchange.firstTokenMs)],
      ["Thinking", toTime(exchange.thinkingMs(now))],
      ["Total", toTime(exchange.totalMs(now))],
      ["Speed", exchange.tokensPerSecond === null ? null : `${Math.round(exchange.tokensPerSecond)} tokens/s`],
    ];
    this.#parts.facts.append(...facts.map(([name, value]) => toFact(name, value ?? "–")));
    this.#parts.facts.hidden = exchange.firstAt === null && exchange.usage === null;
  }

  #offerCopies(question) {
    const { copyAnswer, copyCurl, copyPython } = this.#parts;
    const offer = (button, toText) => button.addEventListener("click", () => this.#copy(button, toText()));
    offer(copyAnswer, () => this.#exchange.content);
    offer(copyCurl, () => toCurl(question));
    offer(copyPython, () => toPython(question));
  }

  async #copy(button, text) {
    const { copied, snippet } = this.#parts;
    try {
      await navigator.clipboard.writeText(text); // absent on plain http, but for this machine's own addresses
      snippet.hidden = true;
      copied.textContent = "Copied.";
    } catch {
      snippet.hidden = false;
      snippet.value = text;
      snippet.focus();
      snippet.select();
      copied.textContent = "This browser lets a page copy over https only. Copy it from here:";
    }
    for (const other of this.#parts.tools.querySelectorAll("button")) other.classList.toggle("used", other === button);
  }
}

/** Add what is new to an element that holds the text's beginning; follow its end unless the reader scrolled up. */
function grow(element, text) {
  const follows = isAtEnd(element);
  const node = element.firstChild ?? element.appendChild(document.createTextNode(""));
  node.appendData(text.slice(node.length));
  if (follows) element.scrollTop = element.scrollHeight;
}

/** Whether the reader has not scrolled up in it. */
function isAtEnd(element) {
  return element.scrollHeight - element.scrollTop - element.clientHeight < 24;
}

function toSettings({ mode, temperature, maxTokens, system }) {
  const settings = [MODES[mode]];
  if (temperature !== null) settings.push(`temperature ${temperature}`);
  if (maxTokens !== null) settings.push(`at most ${toCount(maxTokens)} tokens`);
  if (system) settings.push("with a system message");
  return settings.join(" · ");
}

function toAdvice({ advice, retryAfterS }) {
  if (retryAfterS === null) return advice;
  const at = new Date(Date.now() + retryAfterS * 1000).toLocaleTimeString("en-GB");
  const when = retryAfterS < 1 ? "You may try again now." : `Try again in ${toCount(retryAfterS)} s, at ${at}.`;
  return advice ? `${advice} ${when}` : when;
}

function toTokens(number) {
  return number === null ? null : `${toCount(number)} ${number === 1 ? "token" : "tokens"}`;
}

function toTime(ms) {
  return ms === null ? null : toDuration(ms);
}

function toFact(name, value) {
  const fact = document.createElement("div");
  const term = document.createElement("dt");
  const description = document.createElement("dd");
  term.textContent = name;
  description.textContent = value;
  fact.append(term, description);
  return fact;
}
