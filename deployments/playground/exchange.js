/**
 * One completion as it grows: its thought, its answer, its counts and its times.
 *
 * Counts come from the server's usage alone, times from this browser's clock. The server has split thought and answer;
 * nothing here looks for tags. `answerTokens` leaves out the token that ends the thought and the one that ends the
 * turn, as batch jobs count.
 * Not covered: showing it (card.js).
 */

export class Exchange {
  reasoning = "";
  content = "";
  hasThought = false;
  finishReason = null;
  usage = null;
  firstAt = null;
  answerAt = null;
  endedAt = null;

  /** `mode` is the one asked for; times are in milliseconds of one clock. */
  constructor(mode, startedAt) {
    this.mode = mode;
    this.startedAt = startedAt;
  }

  /** Take one chunk of the stream. */
  take(chunk, now) {
    const choice = chunk.choices?.[0];
    const { reasoning, content } = choice?.delta ?? {};
    if (reasoning || content) this.firstAt ??= now;
    if (reasoning) {
      this.reasoning += reasoning;
      this.hasThought ||= /\S/.test(reasoning);
    }
    if (content) {
      this.answerAt ??= now;
      this.content += content;
    }
    if (choice?.finish_reason) this.finishReason = choice.finish_reason;
    if (chunk.usage) this.usage = chunk.usage;
  }

  end(now) {
    this.endedAt = now;
  }

  /** No answer was reached: whatever was said is a thought without an end. */
  get isThoughtCut() {
    return this.finishReason === "length" && this.content === "" && this.mode !== "short";
  }

  /** What the model did: thinking or direct; null while that is open. */
  get modeChosen() {
    if (this.hasThought || this.isThoughtCut) return "thinking";
    return this.content || this.finishReason ? "direct" : null;
  }

  get promptTokens() {
    return this.usage?.prompt_tokens ?? null;
  }

  get completionTokens() {
    return this.usage?.completion_tokens ?? null;
  }

  get reasoningTokens() {
    return this.usage?.completion_tokens_details?.reasoning_tokens ?? null;
  }

  get answerTokens() {
    if (this.completionTokens === null || this.reasoningTokens === null) return null;
    if (this.isThoughtCut) return 0;
    const marks = (this.mode === "short" ? 0 : 1) + (this.finishReason === "stop" ? 1 : 0);
    return Math.max(0, this.completionTokens - this.reasoningTokens - marks);
  }

  get firstTokenMs() {
    return this.firstAt === null ? null : this.firstAt - this.startedAt;
  }

  /** From the first word of the thought to the first of the answer; so far, while it goes on. */
  thinkingMs(now) {
    return this.hasThought ? (this.answerAt ?? this.endedAt ?? now) - this.firstAt : null;
  }

  totalMs(now) {
    return (this.endedAt ?? now) - this.startedAt;
  }

  /** After the first token; null where there is too little to measure. */
  get tokensPerSecond() {
    const ms = this.firstAt === null || this.endedAt === null ? 0 : this.endedAt - this.firstAt;
    return this.completionTokens > 1 && ms >= 50 ? ((this.completionTokens - 1) * 1000) / ms : null;
  }
}
