/**
 * A request as a command or program that asks the same again.
 *
 * The key is never in it: it is read from the environment variable R4B_API_KEY. Images are read from files of their
 * names in the current folder, for their bytes are too long to paste.
 * Not covered: shells other than POSIX ones.
 */

import { API, toBody } from "./chat.js";

const KEY = "R4B_API_KEY";

/** For a POSIX shell with curl. */
export function toCurl(question) {
  const mark = toMark(JSON.stringify(toBody(question, [])));
  const urls = question.files.map((file) => `data:${file.type};base64,${mark}`);
  const pieces = inShell(JSON.stringify(toBody(question, urls))).split(mark);
  const lines = [`printf %s ${pieces[0]}${pieces.length > 1 ? "'" : ""}`];
  question.files.forEach((file, index) => {
    lines.push(`base64 < ${quote(`./${file.name}`)} | tr -d '\\n'`);
    lines.push(`printf %s '${pieces[index + 1]}${index + 2 < pieces.length ? "'" : ""}`);
  });
  const url = quote(String(new URL("chat/completions", API)));
  const options = `-H "Authorization: Bearer $${KEY}" -H 'Content-Type: application/json'`;
  return `{\n  ${lines.join("\n  ")}\n} | curl ${url} ${options} --data-binary @-\n`;
}

/** For Python with the official client. */
export function toPython(question) {
  const base = JSON.stringify(String(API).replace(/\/$/, ""));
  const lines = [
    ...(question.files.length ? ["import base64"] : []),
    "import os",
    "",
    "from openai import OpenAI",
    ...(question.files.length ? ["", "", ...READ_IMAGE, ""] : []),
    "",
    `client = OpenAI(base_url=${base}, api_key=os.environ.get("${KEY}", "none"))`,
    "completion = client.chat.completions.create(",
    `    model=${JSON.stringify(question.model)},`,
    "    messages=[",
    ...(question.system ? [`        {"role": "system", "content": ${JSON.stringify(question.system)}},`] : []),
    ...toUserMessage(question),
    "    ],",
    ...(question.temperature === null ? [] : [`    temperature=${question.temperature},`]),
    ...(question.maxTokens === null ? [] : [`    max_tokens=${question.maxTokens},`]),
    `    extra_body={"chat_template_kwargs": {"thinking_mode": "${question.mode}"}},`,
    ")",
    "message = completion.choices[0].message",
    'print("Thought:", message.reasoning)',
    'print("Answer:", message.content)',
  ];
  return `${lines.join("\n")}\n`;
}

const READ_IMAGE = [
  "def image(path, media_type):",
  '    with open(path, "rb") as file:',
  "        data = base64.b64encode(file.read()).decode()",
  '    return {"type": "image_url", "image_url": {"url": f"data:{media_type};base64,{data}"}}',
];

function toUserMessage({ prompt, files }) {
  const text = JSON.stringify(prompt);
  if (!files.length) return [`        {"role": "user", "content": ${text}},`];
  const images = files.map((file) => `                image(${JSON.stringify(file.name)}, ${JSON.stringify(file.type)}),`);
  return [
    "        {",
    '            "role": "user",',
    '            "content": [',
    ...images,
    `                {"type": "text", "text": ${text}},`,
    "            ],",
    "        },",
  ];
}

/** Something that stands nowhere in this text. */
function toMark(text) {
  let mark = "@";
  while (text.includes(mark)) mark += "@";
  return mark;
}

/** JSON in single quotes; its own are written as JSON's escape, so that it stays JSON however it is cut. */
function inShell(json) {
  return `'${json.replaceAll("'", "\\u0027")}'`;
}

function quote(text) {
  return `'${text.replaceAll("'", "'\\''")}'`;
}
