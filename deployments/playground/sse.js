/**
 * Server-sent events out of bytes.
 *
 * The payloads are the same wherever the network cuts: in a UTF-8 character, between \r and \n, in a field's name.
 * Comments and fields other than `data` are passed over; an event that its blank line never ended is none.
 * Not covered: event names and ids, and reconnecting, which the API does not use.
 */

export class SseParser {
  #decoder = new TextDecoder();
  #rest = "";
  #data = [];
  #endedInCr = false;

  /** The payloads of the events that these bytes complete, in order. */
  push(bytes) {
    const payloads = [];
    for (const line of this.#toLines(this.#decoder.decode(bytes, { stream: true }))) {
      if (line === "") {
        if (this.#data.length) payloads.push(this.#data.join("\n"));
        this.#data = [];
      } else {
        this.#takeField(line);
      }
    }
    return payloads;
  }

  #toLines(text) {
    if (!text) return [];
    if (this.#endedInCr && text.startsWith("\n")) text = text.slice(1); // the second half of a \r\n that was cut
    this.#endedInCr = text.endsWith("\r");
    const lines = (this.#rest + text).split(/\r\n|\r|\n/);
    this.#rest = lines.pop();
    return lines;
  }

  #takeField(line) {
    const colon = line.indexOf(":");
    const name = colon < 0 ? line : line.slice(0, colon);
    const value = colon < 0 ? "" : line.slice(colon + 1);
    if (name === "data") this.#data.push(value.startsWith(" ") ? value.slice(1) : value);
  }
}
