"""The playground in real Chromium.

Most tests run the page against an API of the tests' own (`playground_site`), which can fail, stall and cut a stream at
will; the last one asks the real server. Every visit fails if the page asks another host for anything, logs an error
or breaks its Content-Security-Policy.
Not covered: other browsers, and whether it is pleasant to look at.
"""

import base64
import datetime
import email.utils
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import (
    Browser,
    ConsoleMessage,
    FilePayload,
    Locator,
    Page,
    Request,
    expect,
    sync_playwright,
)
from tokenizers import Tokenizer

from jobs.demo import CHECKPOINT
from pipeline.scenes import ask as ask_about
from pipeline.scenes import make_scene
from pipeline.thinking import CLOSE_TAG
from tests.builders import png_bytes
from tests.engines import scene_image
from tests.playground_site import (
    DONE,
    FIRST,
    PATIENCE_S,
    Gate,
    Reply,
    Site,
    answer_reply,
    delta,
    error_reply,
    event,
    json_reply,
    running_site,
    usage,
)
from tests.serving import Served

pytestmark = pytest.mark.long

FLAGS = ("--no-sandbox", "--disable-dev-shm-usage", "--disable-gpu", "--disable-background-networking")
NAMES = ("chromium", "chromium-browser", "google-chrome")
DESKTOP, PHONE = {"width": 1280, "height": 800}, {"width": 390, "height": 844}
HOSTILE = '<img src=x onerror="document.title=1"><script>document.title=2</script> &amp; </div>'
KEY = "key-0123456789"

expect.set_options(timeout=30_000)


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """Of this module only: while Playwright runs, no other test could run an event loop in this thread."""
    path = next(filter(None, map(shutil.which, NAMES)), None)
    if path is None:
        pytest.fail(f"These tests need Chromium, and none of {', '.join(NAMES)} is there: apt-get install chromium")
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=path, args=list(FLAGS))
        yield chromium
        chromium.close()


@pytest.fixture
def site() -> Iterator[Site]:
    with running_site() as running:
        yield running


@contextmanager
def visiting(browser: Browser, base_url: str, excused: str = "Failed to load", **options: Any) -> Iterator[Page]:
    """A page in a fresh profile; in the end it must have behaved, but for messages that begin as `excused` does."""
    problems: list[str] = []

    def note(message: ConsoleMessage) -> None:
        if message.type in ("error", "warning") and not message.text.startswith(excused):
            problems.append(message.text)

    def note_foreign(request: Request) -> None:
        if not request.url.startswith((f"{base_url}/", f"blob:{base_url}/")):
            problems.append(f"asked for {request.url[:200]}")

    with browser.new_context(base_url=base_url, **{"viewport": DESKTOP, **options}) as context:
        page = context.new_page()
        page.on("console", note)
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.on("request", note_foreign)
        yield page
    assert problems == []


@pytest.fixture
def page(browser: Browser, site: Site) -> Iterator[Page]:
    """The page, opened on a desktop and connected."""
    with visiting(browser, site.base_url) as visited:
        open_page(visited)
        yield visited


def open_page(page: Page) -> None:
    page.goto("/playground/")
    expect(page.locator("#server")).not_to_have_attribute("data-state", "waiting")


def send(page: Page, prompt: str = "What is this?") -> Locator:
    """Ask; the card of the answer, which may still be on its way."""
    page.get_by_label("Prompt").fill(prompt)
    page.get_by_role("button", name="Send").click()
    return newest(page)


def newest(page: Page) -> Locator:
    return page.get_by_role("article").first


def part(card: Locator, name: str) -> Locator:
    return card.locator(f"[data-part={name}]")


def finished(card: Locator) -> Locator:
    """The card, when its answer is complete."""
    expect(part(card, "tools")).to_be_visible()
    return card


def facts(card: Locator) -> dict[str, str]:
    """The line below an answer."""
    rows = finished(card).locator("dl > div").all()
    return {row.locator("dt").inner_text(): row.locator("dd").inner_text() for row in rows}


def choose(page: Page, *files: FilePayload) -> None:
    page.locator("#files").set_input_files(list(files))


def picture(name: str, data: bytes = b"", media_type: str = "image/png") -> FilePayload:
    return {"name": name, "mimeType": media_type, "buffer": data or png_bytes()}


# --- server-sent events

EVENTS = (
    'data: {"a": "é🙂"}\r\n\r\n: ping\n\ndata:x\rdata:  y\r\rid: 7\nevent: e\ndata\n\n\n\ndata: [DONE]\n\ndata: cut'
)
PAYLOADS = ['{"a": "é🙂"}', "x\n y", "", "[DONE]"]


@pytest.mark.parametrize(
    ("text", "payloads"),
    [
        (EVENTS, PAYLOADS),
        (EVENTS.replace("\r\n", "\n").replace("\r", "\n"), PAYLOADS),
        (EVENTS.replace("\r\n", "\n").replace("\r", "\n").replace("\n", "\r\n"), PAYLOADS),
        (EVENTS.replace("\r\n", "\n").replace("\n", "\r"), PAYLOADS),
        ("\ufeffdata: after a mark\n\n", ["after a mark"]),
        (": only\n\n:comments\n\n\n", []),
        ("", []),
    ],
    ids=["mixed", "LF", "CRLF", "CR", "byte order mark", "comments", "nothing"],
)
def test_sse_parser_cut_anywhere_gives_the_same_payloads(page: Page, text: str, payloads: list[str]) -> None:
    """All ways to cut the bytes once or twice, and each byte on its own."""
    results = page.evaluate(
        """async (base64) => {
            const { SseParser } = await import("/playground/sse.js");
            const bytes = Uint8Array.from(atob(base64), (char) => char.charCodeAt(0));
            const seen = new Set();
            const parse = (...cuts) => {
                const parser = new SseParser();
                const edges = [0, ...cuts, bytes.length];
                const pieces = edges.slice(1).map((edge, index) => bytes.subarray(edges[index], edge));
                seen.add(JSON.stringify(pieces.flatMap((piece) => parser.push(piece))));
            };
            parse(...bytes.keys());
            for (let one = 0; one <= bytes.length; one++)
                for (let two = one; two <= bytes.length; two++) parse(one, two);
            return [...seen];
        }""",
        base64.b64encode(text.encode()).decode(),
    )
    assert [json.loads(result) for result in results] == [payloads]


def test_stream_byte_by_byte_with_comments_shows_the_whole_text(page: Page, site: Site) -> None:
    answer = "Grün ist 🟢,\n  日本語, and\ttabs."
    events = [FIRST, delta(reasoning="Hm 🤔"), delta(content=answer), delta("stop"), usage(143, 60, 40), DONE]
    wire = b": ping\r\n\r\n".join(one.replace(b"\n\n", b"\r\n\r\n") for one in events)
    site.replies = [Reply([wire[index : index + 1] for index in range(len(wire))])]
    card = finished(send(page))
    assert part(card, "answer").text_content() == answer
    assert part(card, "thoughtText").text_content() == "Hm 🤔"


# --- thought and answer


def test_page_opens_with_the_served_model_and_no_key_field(page: Page) -> None:
    expect(page.locator("#server")).to_have_text("Model: r4b")
    expect(page.get_by_label("API key")).to_be_hidden()
    expect(page.get_by_text("Ask about an image")).to_be_visible()
    assert page.title() == "R-4B playground"


def test_thought_streams_open_and_folds_when_the_answer_begins(page: Page, site: Site) -> None:
    thinks, answers, ends = Gate(), Gate(), Gate()
    thought: list[bytes | Gate] = [FIRST, delta(reasoning="Row 1:"), thinks, delta(reasoning=" two."), answers]
    site.replies = [
        Reply([*thought, delta(content="Two"), ends, delta(content="."), delta("stop"), usage(143, 60, 40), DONE])
    ]
    card = send(page)
    details, text, answer = part(card, "thought"), part(card, "thoughtText"), part(card, "answer")
    expect(text).to_have_text("Row 1:")
    expect(details).to_have_attribute("open", "")
    expect(details.locator("summary")).to_contain_text("Thinking…")
    expect(page.get_by_role("status").first).to_have_text("Thinking…")
    expect(answer).to_be_empty()
    thinks.set()
    expect(text).to_have_text("Row 1: two.")
    answers.set()
    expect(answer).to_have_text("Two")
    expect(details).not_to_have_attribute("open")
    expect(details.locator("summary")).to_contain_text("Thought for")
    expect(answer).to_have_attribute("aria-busy", "true")
    ends.set()
    expect(answer).to_have_text("Two.")
    expect(answer).to_have_attribute("aria-busy", "false")
    expect(page.get_by_role("status").first).to_have_text("Answered.")


@pytest.mark.parametrize("clicks", [1, 2], ids=["closed", "closed and opened"])
def test_thought_that_the_reader_touched_stays_as_it_is(page: Page, site: Site, clicks: int) -> None:
    answers, ends = Gate(), Gate()
    thought: list[bytes | Gate] = [FIRST, delta(reasoning="One."), answers]
    site.replies = [Reply([*thought, delta(content="Two"), ends, delta("stop"), usage(143, 60, 40), DONE])]
    card = send(page)
    for _ in range(clicks):
        card.locator("summary").click()
    answers.set()
    expect(part(card, "answer")).to_have_text("Two")
    is_open = part(card, "thought").get_attribute("open") is not None
    assert is_open == (clicks == 2)
    ends.set()
    finished(card)


def test_thought_that_the_reader_scrolled_back_in_stays_open(page: Page, site: Site) -> None:
    answers = Gate()
    lines = "\n".join(f"line {number}" for number in range(200))
    site.replies = [Reply([FIRST, delta(reasoning=lines), answers, delta(content="Two"), delta("stop"), DONE])]
    card = send(page)
    text = part(card, "thoughtText")
    expect(text).to_contain_text("line 199")
    assert text.evaluate("one => one.scrollTop + one.clientHeight >= one.scrollHeight - 1")  # it follows the end
    text.hover()
    page.mouse.wheel(0, -10_000)
    expect(text).to_have_js_property("scrollTop", 0)
    answers.set()
    finished(card)
    assert part(card, "thought").get_attribute("open") is not None


def test_answer_with_a_thought_has_its_counts_and_times(page: Page, site: Site) -> None:
    site.replies = [answer_reply("Two.", thought="One and one.")]
    found = facts(send(page))
    assert {name: found[name] for name in ("Mode", "Prompt", "Thought", "Answer")} == {
        "Mode": "thinking",
        "Prompt": "143 tokens",
        "Thought": "40 tokens",
        "Answer": "18 tokens",  # of 60, without the thought, its end and the end of the turn
    }
    assert all(found[name].endswith(" s") for name in ("First token", "Thinking", "Total"))
    assert "Speed" in found


@pytest.mark.parametrize(
    ("mode", "reasoning", "answer"),
    [
        ("Auto", 1, "57 tokens"),
        ("Long", 1, "57 tokens"),
        ("Short", 0, "59 tokens"),
    ],  # in Short the prompt ends the thought
)
def test_answer_without_a_thought_is_direct(page: Page, site: Site, mode: str, reasoning: int, answer: str) -> None:
    site.replies = [Reply([FIRST, delta(content="Two."), delta("stop"), usage(143, 60, reasoning), DONE])]
    page.get_by_label(mode).check()
    card = send(page)
    found = facts(card)
    assert (found["Mode"], found["Thinking"], found["Answer"]) == ("direct", "–", answer)
    expect(part(card, "thought")).to_be_hidden()


def test_blank_thought_is_none(page: Page, site: Site) -> None:
    site.replies = [Reply([FIRST, delta(reasoning="\n\n"), delta(content="Two."), delta("stop"), DONE])]
    card = send(page)
    assert facts(card)["Mode"] == "direct"
    expect(part(card, "thought")).to_be_hidden()


@pytest.mark.parametrize(
    ("mode", "pieces", "title", "chosen"),
    [
        (
            "Auto",
            [delta(reasoning="One and"), delta("length")],
            "max_tokens ended the thought before an answer",
            "thinking",
        ),
        ("Long", [delta("length")], "max_tokens ended the thought before an answer", "thinking"),
        ("Auto", [delta(content="Two and"), delta("length")], "max_tokens ended the answer (8 tokens).", "direct"),
        ("Short", [delta("length")], "max_tokens ended the answer (8 tokens).", "direct"),
        ("Auto", [delta("stop")], "The model gave an empty answer.", "direct"),
        ("Auto", [delta(content="Two"), delta("abort")], "The server ended the answer: abort.", "direct"),
    ],
)
def test_answer_that_is_not_whole_says_why(
    page: Page, site: Site, mode: str, pieces: list[bytes], title: str, chosen: str
) -> None:
    site.replies = [Reply([FIRST, *pieces, usage(143, 8, 8), DONE])]
    page.get_by_label(mode).check()
    card = finished(send(page))
    expect(part(card, "notice")).to_contain_text(title)
    expect(part(card, "retry")).to_be_hidden()
    assert facts(card)["Mode"] == chosen


def test_cut_thought_is_shown_as_a_thought_and_never_as_an_answer(page: Page, site: Site) -> None:
    site.replies = [Reply([FIRST, delta(reasoning="One and"), delta("length"), usage(143, 8, 8), DONE])]
    card = finished(send(page))
    expect(part(card, "answer")).to_be_empty()
    expect(part(card, "thought")).to_have_attribute("open", "")
    expect(card.locator("summary")).to_contain_text("Unfinished thought")
    expect(page.get_by_role("status").first).to_have_text("No answer.")
    expect(card.get_by_role("button", name="Copy answer")).to_be_hidden()
    assert (facts(card)["Thought"], facts(card)["Answer"]) == ("8 tokens", "0 tokens")


# --- what is sent


def test_request_is_what_the_form_says(page: Page, site: Site) -> None:
    page.get_by_label("Long").check()
    page.get_by_text("More settings").click()
    page.get_by_label("System message").fill("Be brief.")
    page.get_by_label("Temperature").fill("0.8")
    page.get_by_label("Max tokens").fill("300")
    finished(send(page, "  What\nis it? "))
    (asked,) = site.asked
    assert asked.body == {
        "model": "r4b",
        "messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "  What\nis it? "}],
        "temperature": 0.8,
        "max_tokens": 300,
        "chat_template_kwargs": {"thinking_mode": "long"},
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    assert "authorization" not in asked.headers
    assert "cookie" not in asked.headers
    expect(part(newest(page), "asked")).to_have_text(
        "Long · temperature 0.8 · at most 300 tokens · with a system message"
    )


def test_request_leaves_out_what_is_empty(page: Page, site: Site) -> None:
    page.get_by_text("More settings").click()
    page.get_by_label("Temperature").fill("")
    finished(send(page))
    assert set(site.asked[0].body) == {"model", "messages", "chat_template_kwargs", "stream", "stream_options"}
    assert site.asked[0].body["chat_template_kwargs"] == {"thinking_mode": "auto"}


@pytest.mark.parametrize(
    ("label", "value", "message"),
    [
        ("Prompt", " \n", "Type a prompt first."),
        ("Temperature", "3", "A number from 0 to 2."),
        ("Max tokens", "0", "A whole number from 1, or nothing."),
        ("Max tokens", "1.5", "A whole number from 1, or nothing."),
    ],
)
def test_wrong_field_is_named_and_nothing_is_sent(page: Page, site: Site, label: str, value: str, message: str) -> None:
    page.get_by_label("Prompt").fill("What is this?")
    page.get_by_text("More settings").click()
    page.get_by_label(label).fill(value)
    page.get_by_text("More settings").click()
    page.get_by_role("button", name="Send").click()
    expect(page.get_by_text(message)).to_be_visible()
    expect(page.get_by_label(label)).to_be_focused()
    expect(page.get_by_label(label)).to_have_attribute("aria-invalid", "true")
    assert site.asked == []


@pytest.mark.parametrize("keys", ["Enter", "Control+Enter", "Meta+Enter"])
def test_enter_sends(page: Page, site: Site, keys: str) -> None:
    page.get_by_label("Prompt").fill("What is this?")
    page.get_by_label("Prompt").press(keys)
    finished(newest(page))
    assert site.asked[0].body["messages"][0]["content"] == "What is this?"


def test_shift_enter_starts_a_new_line(page: Page, site: Site) -> None:
    prompt = page.get_by_label("Prompt")
    prompt.fill("One")
    prompt.press("Shift+Enter")
    prompt.press_sequentially("two")
    expect(prompt).to_have_value("One\ntwo")
    assert site.asked == []


def test_enter_that_ends_a_composition_sends_nothing(page: Page, site: Site) -> None:
    page.get_by_label("Prompt").fill("日本")
    options = {"key": "Enter", "isComposing": True, "bubbles": True, "cancelable": True}
    page.get_by_label("Prompt").dispatch_event("keydown", options)
    page.get_by_label("Prompt").press("Shift+Enter")  # whatever the first had set off would show by now
    expect(page.get_by_role("article")).to_have_count(0)
    assert site.asked == []


def test_enter_on_a_phone_starts_a_new_line(browser: Browser, site: Site) -> None:
    with visiting(browser, site.base_url, viewport=PHONE, has_touch=True, is_mobile=True) as page:
        open_page(page)
        page.get_by_label("Prompt").fill("One")
        page.get_by_label("Prompt").press("Enter")
        expect(page.get_by_label("Prompt")).to_have_value("One\n")
        assert site.asked == []
        page.get_by_role("button", name="Send").tap()
        finished(newest(page))


def test_second_question_waits_for_the_first(page: Page, site: Site) -> None:
    gate = Gate()
    site.replies = [Reply([gate, FIRST, delta(content="One"), delta("stop"), DONE])]
    card = send(page)
    expect(page.get_by_role("button", name="Send")).to_have_attribute("aria-disabled", "true")
    page.get_by_label("Prompt").press("Enter")
    gate.set()
    finished(card)
    assert len(site.asked) == 1


# --- images


def test_images_are_sent_byte_for_byte_before_the_prompt(page: Page, site: Site) -> None:
    first, second = png_bytes((1, 2, 3)), png_bytes((4, 5, 6))
    choose(page, picture("a.png", first), picture("b.jpg", second, "image/jpeg"))
    expect(page.locator("#thumbs li")).to_have_count(2)
    card = finished(send(page, "Compare."))
    (message,) = site.asked[0].body["messages"]
    urls = [
        f"data:image/{kind};base64,{base64.b64encode(data).decode()}"
        for kind, data in (("png", first), ("jpeg", second))
    ]
    images = [{"type": "image_url", "image_url": {"url": url}} for url in urls]
    assert message["content"] == [*images, {"type": "text", "text": "Compare."}]
    expect(part(card, "pictures").get_by_role("img")).to_have_count(2)


def test_thumbnails_show_the_picture_and_its_size(page: Page) -> None:
    data = png_bytes((9, 9, 9), (640, 480)) + bytes(1_234_000)
    choose(page, picture("photo.png", data))
    image = page.get_by_role("img", name="photo.png")
    expect(image).to_be_visible()
    expect(image).to_have_js_property("naturalWidth", 640)
    expect(page.locator("#thumbs li")).to_contain_text("1.2 MB")


def test_image_that_the_browser_cannot_show_is_sent_by_name(page: Page, site: Site) -> None:
    choose(page, picture("scan.tif", b"II*\0", "image/tiff"))
    expect(page.locator("#thumbs").get_by_text("scan.tif")).to_be_visible()
    finished(send(page))
    url = site.asked[0].body["messages"][0]["content"][0]["image_url"]["url"]
    assert url == "data:image/tiff;base64," + base64.b64encode(b"II*\0").decode()


@pytest.mark.parametrize(
    ("file", "message"),
    [
        (picture("notes.pdf", b"%PDF", "application/pdf"), "notes.pdf is not a photo or picture file."),
        (picture("drawing.svg", b"<svg/>", "image/svg+xml"), "drawing.svg is not a photo or picture file."),
        ({"name": "empty.png", "mimeType": "image/png", "buffer": b""}, "empty.png is empty."),
        (picture(f"{HOSTILE}.txt", b"x", "text/plain"), f"{HOSTILE}.txt is not a photo or picture file."),
    ],
    ids=["pdf", "svg", "empty", "hostile name"],
)
def test_file_that_is_no_image_is_refused_by_name(page: Page, file: FilePayload, message: str) -> None:
    choose(page, file)
    expect(page.locator("#imagesProblem")).to_have_text(message)
    expect(page.locator("#thumbs")).to_be_hidden()


def test_images_beyond_five_are_left_out_by_name(page: Page, site: Site) -> None:
    choose(page, *(picture(f"{number}.png") for number in range(6)))
    expect(page.locator("#imagesProblem")).to_have_text("5.png was left out: 5 images are the most.")
    expect(page.locator("#files")).to_be_disabled()
    finished(send(page))
    assert len(site.asked[0].body["messages"][0]["content"]) == 6


def test_images_are_removed_by_keyboard_and_the_focus_stays_near(page: Page, site: Site) -> None:
    choose(page, *(picture(f"{number}.png") for number in range(5)))
    page.get_by_role("button", name="Remove 4.png").press("Enter")
    expect(page.get_by_role("button", name="Remove 3.png")).to_be_focused()
    page.get_by_role("button", name="Remove 0.png").press("Space")
    expect(page.get_by_role("button", name="Remove 1.png")).to_be_focused()
    for number in (1, 2, 3):
        page.get_by_role("button", name=f"Remove {number}.png").press("Enter")
    expect(page.locator("#files")).to_be_focused()
    finished(send(page))
    assert site.asked[0].body["messages"][0]["content"] == "What is this?"


@pytest.mark.parametrize("target", ["#drop", "#answersTitle", "body"])
def test_image_may_be_dropped_anywhere(page: Page, target: str) -> None:
    transfer = page.evaluate_handle(
        """() => {
            const transfer = new DataTransfer();
            transfer.items.add(new File(["x"], "dropped.png", { type: "image/png" }));
            return transfer;
        }"""
    )
    page.dispatch_event(target, "dragenter", {"dataTransfer": transfer})
    expect(page.locator("#drop")).to_have_class("drop over")
    page.dispatch_event(target, "drop", {"dataTransfer": transfer})
    expect(page.locator("#drop")).to_have_class("drop compact")
    expect(page.get_by_role("button", name="Remove dropped.png")).to_be_visible()


def test_drag_of_text_is_left_to_the_browser(page: Page) -> None:
    transfer = page.evaluate_handle(
        "() => { const transfer = new DataTransfer(); transfer.setData('text/plain', 'words'); return transfer; }"
    )
    page.dispatch_event("#prompt", "dragenter", {"dataTransfer": transfer})
    expect(page.locator("#drop")).to_have_class("drop")


def test_image_in_the_clipboard_is_pasted(page: Page, site: Site) -> None:
    page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    page.evaluate(
        """async (base64) => {
            const bytes = Uint8Array.from(atob(base64), (char) => char.charCodeAt(0));
            const blob = new Blob([bytes], { type: "image/png" });
            await navigator.clipboard.write([new ClipboardItem({ "image/png": blob })]);
        }""",
        base64.b64encode(png_bytes()).decode(),
    )
    page.get_by_label("Prompt").press("Control+V")
    expect(page.locator("#thumbs li")).to_have_count(1)
    finished(send(page))
    assert site.asked[0].body["messages"][0]["content"][0]["image_url"]["url"].startswith("data:image/png;base64,iVBOR")


@pytest.mark.parametrize(
    ("types", "num_images"),
    [(["text/plain", "text/html"], 0), (["text/html"], 1), (["text/plain"], 1), ([], 1)],
    ids=["a table of an office program", "an image of a page", "a file with its name", "a screenshot"],
)
def test_paste_takes_an_image_unless_it_is_a_picture_of_text(page: Page, types: list[str], num_images: int) -> None:
    page.evaluate(
        """(types) => {
            const clipboardData = new DataTransfer();
            for (const type of types) clipboardData.setData(type, "words");
            clipboardData.items.add(new File(["x"], "pasted.png", { type: "image/png" }));
            const event = new ClipboardEvent("paste", { clipboardData, bubbles: true, cancelable: true });
            document.querySelector("#prompt").dispatchEvent(event);
        }""",
        types,
    )
    expect(page.locator("#thumbs li")).to_have_count(num_images)


def test_images_can_be_chosen_by_keyboard(page: Page) -> None:
    page.locator("#files").focus()
    with page.expect_file_chooser() as chosen:
        page.evaluate("0")  # The browser was asked to hand choosers over; an answer to this says that it heard.
        page.keyboard.press("Enter")
    chosen.value.set_files([picture("a.png")])
    expect(page.locator("#thumbs li")).to_have_count(1)


# --- what goes wrong


def test_stop_ends_the_request_and_keeps_what_came(page: Page, site: Site) -> None:
    site.replies = [Reply([FIRST, delta(reasoning="One and"), Gate()]), answer_reply("Two.")]
    card = send(page)
    expect(part(card, "thoughtText")).to_have_text("One and")
    stop = page.get_by_role("button", name="Stop")
    expect(stop).to_be_focused()
    stop.press("Enter")
    finished(card)
    assert site.is_left.wait(PATIENCE_S)
    expect(part(card, "notice")).to_contain_text("Stopped.")
    expect(part(card, "thoughtText")).to_have_text("One and")
    expect(stop).to_be_hidden()
    expect(page.get_by_role("button", name="Send")).to_be_focused()
    expect(part(finished(send(page)), "answer")).to_have_text("Two.")


def test_stop_before_the_first_token_ends_the_request(page: Page, site: Site) -> None:
    site.replies = [Reply([Gate()])]
    card = send(page)
    expect(part(card, "waiting")).to_be_visible()
    page.get_by_role("button", name="Stop").click()
    finished(card)
    assert site.is_left.wait(PATIENCE_S)
    expect(part(card, "waiting")).to_be_hidden()
    expect(part(card, "facts")).to_be_hidden()


def in_7_s() -> str:
    return email.utils.format_datetime(datetime.datetime.now(datetime.UTC) + datetime.timedelta(seconds=7), usegmt=True)


PASSING: list[tuple[Callable[[], Reply], list[str]]] = [
    (lambda: error_reply(429, "One at a time.", retry_after="7"), ["Too many requests", "Try again in 7 s, at "]),
    (lambda: error_reply(503, "Full.", retry_after="0"), ["busy or still starting", "You may try again now."]),
    (lambda: error_reply(503, "Full.", retry_after=in_7_s()), ["busy or still starting", " s, at "]),
    (lambda: error_reply(503, "Full.", retry_after="soon"), ["busy or still starting", "Full."]),
    (lambda: error_reply(503, "Full."), ["busy or still starting", "Full."]),
    (lambda: Reply([b"<html>Bad gateway"], 502, {"content-type": "text/html"}), ["The server failed (HTTP 502)."]),
    (lambda: Reply([b"a" * 2000], 500, {"content-type": "text/plain"}), ["The server failed (HTTP 500).", "aaa…"]),
    (lambda: Reply([b"\xff\xfe"], 500, {"content-type": "application/json"}), ["The server failed (HTTP 500)."]),
    (lambda: json_reply(200, {"choices": []}), ["did not answer with a stream"]),
    (lambda: Reply([FIRST, b"data: {not json\n\n"]), ["not JSON", "{not json"]),
    (lambda: Reply([FIRST, event({"error": {"message": "It died.", "code": 500}}), DONE]), ["gave up", "It died."]),
    (lambda: Reply([FIRST, delta(content="Two"), DONE]), ["The connection broke off before the end."]),
    (lambda: Reply([FIRST, delta(content="Two")]), ["The connection broke off before the end."]),
    (lambda: Reply([FIRST, delta(content="Two")], is_broken=True), ["The connection broke off before the end."]),
    (lambda: Reply([], is_broken=True), ["The connection broke off before the end."]),
]


@pytest.mark.parametrize(("make_reply", "words"), PASSING)
def test_passing_error_says_what_happened_and_can_be_tried_again(
    page: Page, site: Site, make_reply: Callable[[], Reply], words: list[str]
) -> None:
    site.replies = [make_reply(), answer_reply("Two.")]
    choose(page, picture("a.png"))
    card = finished(send(page))
    check_notice(page, card, words)
    page.get_by_label("Prompt").fill("Something else")
    page.get_by_role("button", name="Remove a.png").click()
    card.get_by_role("button", name="Try again").click()
    expect(page.get_by_role("article")).to_have_count(2)
    expect(part(newest(page), "answer")).to_have_text("Two.")
    assert site.asked[0].body == site.asked[1].body


@pytest.mark.parametrize(
    ("reply", "words"),
    [
        (error_reply(400, "max_tokens: 9 is too many."), ["did not take the request", "max_tokens: 9 is too many."]),
        (json_reply(422, {"detail": [{"loc": ["n"]}]}), ["did not take the request", '[{"loc":["n"]}]']),
        (error_reply(403, "Not you."), ["does not allow this", "Not you."]),
        (error_reply(404, "No such model."), ["HTTP 404", "No such model."]),
        (error_reply(413, "The body has more than 9 bytes."), ["too large", "fewer or smaller images", "9 bytes"]),
        (error_reply(415, "The body must be JSON."), ["HTTP 415", "The body must be JSON."]),
    ],
)
def test_refusal_says_why_and_is_not_to_be_tried_again(page: Page, site: Site, reply: Reply, words: list[str]) -> None:
    site.replies = [reply]
    card = finished(send(page))
    check_notice(page, card, words)
    expect(card.get_by_role("button", name="Try again")).to_be_hidden()


def check_notice(page: Page, card: Locator, words: list[str]) -> None:
    notice = part(card, "notice")
    for one in words:
        expect(notice).to_contain_text(one)
    assert "<html>" not in notice.inner_text()
    expect(page.get_by_role("status").first).to_have_text("Failed.")


def test_broken_stream_keeps_what_came(page: Page, site: Site) -> None:
    gate = Gate()
    site.replies = [Reply([FIRST, delta(reasoning="One and"), delta(content="Two"), gate], is_broken=True)]
    card = send(page)
    expect(part(card, "answer")).to_have_text("Two")
    gate.set()
    finished(card)
    expect(part(card, "notice")).to_contain_text("The connection broke off before the end.")
    expect(part(card, "answer")).to_have_text("Two")
    expect(part(card, "thoughtText")).to_have_text("One and")
    assert facts(card)["Answer"] == "–"


def test_stream_that_breaks_after_the_last_word_is_a_whole_answer_without_counts(page: Page, site: Site) -> None:
    gate = Gate()
    site.replies = [Reply([FIRST, delta(content="Two."), delta("stop"), gate], is_broken=True)]
    card = send(page)
    expect(part(card, "answer")).to_have_text("Two.")
    gate.set()
    assert facts(card)["Answer"] == "–"
    expect(part(card, "notice")).to_be_hidden()


def test_server_that_is_gone_is_named_and_found_again(page: Page, site: Site) -> None:
    page.route("**/v1/**", lambda route: route.abort("connectionrefused"))
    expect(part(finished(send(page)), "notice")).to_contain_text("The server cannot be reached.")
    page.reload()
    expect(page.locator("#server")).to_contain_text("No connection")
    expect(part(finished(send(page)), "notice")).to_contain_text("The server cannot be reached.")
    page.unroute_all()
    page.get_by_role("button", name="Connect").click()
    expect(page.locator("#server")).to_have_text("Model: r4b")


def test_connection_that_breaks_under_a_large_body_names_its_size(page: Page, site: Site) -> None:
    page.route("**/chat/completions", lambda route: route.abort("connectionreset"))
    choose(page, picture("large.png", bytes(1_200_000)))
    expect(part(finished(send(page)), "notice")).to_contain_text("The connection broke while 1.6 MB were being sent.")


def test_file_that_is_gone_is_named(page: Page, site: Site, tmp_path: Path) -> None:
    path = tmp_path / "gone.png"
    path.write_bytes(png_bytes())
    page.locator("#files").set_input_files(path)
    path.unlink()
    expect(part(finished(send(page)), "notice")).to_contain_text("gone.png cannot be read any more.")
    assert site.asked == []


def test_text_from_outside_is_never_markup(page: Page, site: Site) -> None:
    site.model = HOSTILE
    page.reload()
    expect(page.locator("#server")).to_have_text(f"Model: {HOSTILE}")
    site.replies = [answer_reply(HOSTILE, thought=HOSTILE), error_reply(400, f"x {HOSTILE}")]
    choose(page, picture(f"{HOSTILE}.png"))
    card = finished(send(page, HOSTILE))
    for name in ("prompt", "thoughtText", "answer"):
        assert part(card, name).text_content() == HOSTILE
    expect(part(finished(send(page, HOSTILE)), "noticeDetail")).to_have_text(f"x {HOSTILE}")
    assert page.title() == "R-4B playground"
    assert page.locator("article script, article img[src=x]").count() == 0


def test_policy_keeps_the_page_from_markup_and_other_sites_from_the_page(browser: Browser) -> None:
    excused = "This document requires 'TrustedHTML'"
    with running_site() as site, visiting(browser, site.base_url, excused) as page:
        policy = page.request.get(f"{site.base_url}/playground/").headers["content-security-policy"]
        assert "default-src 'none'" in policy
        assert "frame-ancestors 'none'" in policy
        open_page(page)
        error = page.evaluate("try { document.body.innerHTML = '<b>x</b>'; null } catch (error) { error.name }")
        assert error == "TypeError"


# --- the key


@pytest.fixture
def locked(browser: Browser, site: Site) -> Iterator[Page]:
    """The page of a server that asks for a key."""
    site.key = KEY
    with visiting(browser, site.base_url) as page:
        open_page(page)
        yield page


def test_key_is_asked_for_sent_and_kept_in_this_tab_only(locked: Page, site: Site) -> None:
    field = locked.get_by_label("API key")
    expect(locked.locator("#server")).to_contain_text("Key needed")
    expect(field).to_have_attribute("type", "password")
    field.fill(f" {KEY} ")
    field.press("Enter")
    expect(locked.locator("#server")).to_have_text("Model: r4b")
    expect(locked.get_by_label("Prompt")).to_be_focused()
    finished(send(locked))
    assert site.asked[0].headers["authorization"] == f"Bearer {KEY}"
    locked.reload()
    expect(locked.locator("#server")).to_have_text("Model: r4b")
    kept = locked.evaluate("[{...sessionStorage}, {...localStorage}, document.cookie, location.href]")
    assert kept == [{"r4b.api_key": KEY}, {}, "", site.url]
    with locked.context.expect_page() as opened:
        locked.evaluate("void open(location.href, '_blank', 'noopener')")
    expect(opened.value.locator("#server")).to_contain_text("Key needed")


@pytest.mark.parametrize(
    ("key", "message"),
    [
        ("wrong", "The server does not know this API key."),
        ("ключ", "The API key holds characters that no key has."),
        ("two words", "The API key holds characters that no key has."),
    ],
)
def test_wrong_key_is_named_at_its_field(locked: Page, site: Site, key: str, message: str) -> None:
    locked.get_by_label("API key").fill(key)
    locked.get_by_label("API key").press("Enter")
    expect(locked.locator("#keyProblem")).to_contain_text(message)
    expect(part(finished(send(locked)), "notice")).to_contain_text(message)
    expect(locked.get_by_label("API key")).to_be_focused()
    assert site.asked == []


def test_key_that_is_revoked_is_asked_for_again(locked: Page, site: Site) -> None:
    locked.get_by_label("API key").fill(KEY)
    finished(send(locked))
    site.key = "another"
    expect(part(finished(send(locked)), "notice")).to_contain_text("The server does not know this API key.")
    expect(locked.locator("#server")).to_contain_text("Key needed")
    locked.get_by_label("API key").fill("another")
    expect(part(finished(send(locked)), "answer")).to_have_text("An answer.")


# --- copying

NASTY = "It's \"$HOME\" `id` $(id) \\n 100% @ @@ é 🙂\n'quoted'"


@pytest.fixture
def asked_in_full(locked: Page, site: Site, tmp_path: Path) -> Page:
    """A question with all that a snippet must carry, whose files lie in the test's folder."""
    locked.context.grant_permissions(["clipboard-read", "clipboard-write"])
    locked.get_by_label("API key").fill(KEY)
    for name in ("-it's a $(photo) é.png", "b.jpg"):
        (tmp_path / name).write_bytes(png_bytes())
        locked.locator("#files").set_input_files(tmp_path / name)
    locked.get_by_text("More settings").click()
    locked.get_by_label("System message").fill(f"System: {NASTY}")
    locked.get_by_label("Max tokens").fill("99")
    locked.get_by_label("Short").check()
    site.replies = [answer_reply("Two.")]
    finished(send(locked, NASTY))
    reply = {"role": "assistant", "content": "Two.", "reasoning": "One and one."}
    choice = {"index": 0, "finish_reason": "stop", "message": reply}
    site.replies = [
        json_reply(200, {"id": "1", "object": "chat.completion", "created": 1, "model": "r4b", "choices": [choice]})
    ]
    return locked


def copy(page: Page, name: str) -> str:
    newest(page).get_by_role("button", name=name).click()
    expect(part(newest(page), "copied")).to_have_text("Copied.")
    return str(page.evaluate("navigator.clipboard.readText()"))


def run_copied(command: list[str], folder: Path) -> str:
    environment = {**os.environ, "R4B_API_KEY": KEY, "no_proxy": "127.0.0.1", "NO_PROXY": "127.0.0.1"}
    run = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr
    return run.stdout


def check_asked_again(site: Site) -> None:
    by_page, again = site.asked
    assert again.body == {name: value for name, value in by_page.body.items() if not name.startswith("stream")}
    assert again.headers["authorization"] == f"Bearer {KEY}"


def test_copied_curl_asks_the_same(asked_in_full: Page, site: Site, tmp_path: Path) -> None:
    snippet = copy(asked_in_full, "Copy as curl")
    assert KEY not in snippet
    assert "$R4B_API_KEY" in snippet
    assert "One and one." in run_copied(["sh", "-c", snippet], tmp_path)
    check_asked_again(site)


def test_copied_python_asks_the_same(asked_in_full: Page, site: Site, tmp_path: Path) -> None:
    snippet = copy(asked_in_full, "Copy as Python")
    assert KEY not in snippet
    assert run_copied([sys.executable, "-c", snippet], tmp_path) == "Thought: One and one.\nAnswer: Two.\n"
    check_asked_again(site)


@pytest.mark.parametrize("name", ["Copy as curl", "Copy as Python"])
def test_copied_snippet_of_a_plain_question_runs_too(page: Page, site: Site, tmp_path: Path, name: str) -> None:
    page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    finished(send(page, NASTY))
    choice = {
        "index": 0,
        "finish_reason": "stop",
        "message": {"role": "assistant", "content": "Two.", "reasoning": None},
    }
    site.replies = [
        json_reply(200, {"id": "1", "object": "chat.completion", "created": 1, "model": "r4b", "choices": [choice]})
    ]
    snippet = copy(page, name)
    run_copied([sys.executable, "-c", snippet] if "Python" in name else ["sh", "-c", snippet], tmp_path)
    check_asked_again(site)


def test_answer_is_copied_as_it_is(asked_in_full: Page) -> None:
    assert copy(asked_in_full, "Copy answer") == "Two."


def test_copy_without_a_clipboard_shows_the_text(browser: Browser, site: Site) -> None:
    """Browsers give pages no clipboard over plain http, but for the machine's own addresses."""
    with visiting(browser, site.base_url) as page:
        page.add_init_script("Object.defineProperty(navigator, 'clipboard', { value: undefined });")
        open_page(page)
        card = finished(send(page))
        card.get_by_role("button", name="Copy answer").click()
        expect(part(card, "snippet")).to_be_focused()
        expect(part(card, "snippet")).to_have_value("An answer.")
        assert page.evaluate("getSelection().toString()") == "An answer."


# --- looks

COVERED = """() => {
    const one = document.activeElement;
    const box = one.getBoundingClientRect();
    const top = document.elementFromPoint(box.left + box.width / 2, box.bottom - 3);
    return !(one.matches(".unseen") || one.contains(top) || top?.contains(one));
}"""
LONG_WORD = "Donaudampfschifffahrt" * 30
SIZES = """() => [...document.querySelectorAll("button, summary, input, textarea, .drop, .modes label")]
    .filter((one) => one.checkVisibility() && !one.matches(".unseen"))
    .map((one) => [one.outerHTML.slice(0, 80), one.getBoundingClientRect()])
    .filter(([, box]) => box.height < 44 || box.width < 44)
    .map(([text, box]) => `${text} ${box.width} x ${box.height}`)"""
OVERFLOWS = """() => [...document.querySelectorAll("body *")]
    .filter((one) => one.checkVisibility() && !one.closest(".unseen, template, .snippet"))
    .filter((one) => one.getBoundingClientRect().right > innerWidth || one.getBoundingClientRect().left < 0)
    .map((one) => one.outerHTML.slice(0, 80))
    .concat(document.documentElement.scrollWidth > innerWidth ? ["the page"] : [])"""
FAINT = """() => {
    const canvas = new OffscreenCanvas(1, 1).getContext("2d", { willReadFrequently: true });
    const toRgb = (color) => {
        canvas.clearRect(0, 0, 1, 1);
        canvas.fillStyle = color;
        canvas.fillRect(0, 0, 1, 1);
        return [...canvas.getImageData(0, 0, 1, 1).data];
    };
    const light = (rgb) => rgb.slice(0, 3).map((value) => value / 255)
        .map((value) => (value <= 0.04045 ? value / 12.92 : ((value + 0.055) / 1.055) ** 2.4))
        .reduce((sum, value, index) => sum + value * [0.2126, 0.7152, 0.0722][index], 0);
    const contrast = (one, two) => {
        const [high, low] = [light(one), light(two)].sort((a, b) => b - a);
        return (high + 0.05) / (low + 0.05);
    };
    const behind = (one) => {
        for (; one; one = one.parentElement) {
            const rgb = toRgb(getComputedStyle(one).backgroundColor);
            if (rgb[3] === 255) return rgb;
        }
        return toRgb("white");
    };
    const faint = [];
    const check = (what, color, back, least) => {
        const ratio = contrast(toRgb(color), back);
        if (ratio < least) faint.push(`${what} ${ratio.toFixed(2)}`);
    };
    for (const one of document.querySelectorAll("body *")) {
        if (!one.checkVisibility() || one.closest("template, .unseen, script, style")) continue;
        const style = getComputedStyle(one);
        const words = [...one.childNodes].some((node) => node.nodeType === 3 && node.data.trim());
        if (words || one.value) check(one.outerHTML.slice(0, 80), style.color, behind(one), 4.5);
        if (one.placeholder) check("placeholder", getComputedStyle(one, "::placeholder").color, behind(one), 4.5);
        if (one.matches("input:not([type=radio]), textarea, .modes, .drop, .quiet")) {
            check(`border of ${one.outerHTML.slice(0, 80)}`, style.borderColor, behind(one.parentElement), 3);
        }
    }
    return faint;
}"""


def show_everything(page: Page, site: Site) -> None:
    """All that the page can show, at once, with words that are too long."""
    site.replies = [
        answer_reply(f"Two {LONG_WORD}", thought=f"One {LONG_WORD}"),
        Reply([FIRST, delta(reasoning="One and"), delta("length"), usage(32_000, 16_384, 16_384), DONE]),
        error_reply(503, f"No room {LONG_WORD}", retry_after="7"),
        Reply([FIRST, delta(reasoning="One and"), Gate()]),
    ]
    choose(page, *(picture(f"{LONG_WORD}{number}.png") for number in range(3)), picture("x.tif", b"II", "image/tiff"))
    choose(page, picture(f"{LONG_WORD}.txt", b"x", "text/plain"))
    finished(send(page, f"Why {LONG_WORD}?"))
    card = newest(page)
    card.locator("summary").click()
    page.evaluate("Object.defineProperty(navigator, 'clipboard', { value: undefined })")
    card.get_by_role("button", name="Copy as curl").click()
    finished(send(page))
    expect(part(newest(page), "notice")).to_contain_text("16,384 tokens")
    finished(send(page))
    page.get_by_text("More settings").click()
    page.get_by_label("System message").fill(LONG_WORD)
    page.get_by_label("Max tokens").fill("100")
    page.evaluate("document.querySelector('#keyRow').hidden = document.querySelector('#reconnect').hidden = false")
    expect(part(send(page), "thoughtText")).to_be_visible()


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize(
    "device",
    [
        {"viewport": DESKTOP},
        {"viewport": PHONE, "has_touch": True, "is_mobile": True},
        {"viewport": {"width": 320, "height": 568}},
    ],
    ids=["desktop", "phone", "narrowest"],
)
def test_nothing_overflows_is_too_small_to_touch_or_too_faint(
    browser: Browser, site: Site, device: dict[str, Any], scheme: str
) -> None:
    site.model = "a-model-with-a-name-that-is-rather-long-for-a-phone"
    with visiting(browser, site.base_url, color_scheme=scheme, **device) as page:
        open_page(page)
        for is_full in (False, True):
            if is_full:
                show_everything(page, site)
            assert page.evaluate(OVERFLOWS) == []
            assert page.evaluate(SIZES) == []
            assert page.evaluate(FAINT) == []


def test_dark_scheme_is_dark(browser: Browser, site: Site) -> None:
    backgrounds = []
    for scheme in ("light", "dark"):
        with visiting(browser, site.base_url, color_scheme=scheme) as page:
            open_page(page)
            backgrounds.append(page.evaluate("getComputedStyle(document.body).backgroundColor"))
    assert backgrounds == ["rgb(244, 246, 249)", "rgb(17, 20, 26)"]


@pytest.mark.parametrize(("motion", "num_moving"), [("reduce", 0), ("no-preference", 1)])
def test_motion_is_left_out_where_it_is_not_wanted(browser: Browser, site: Site, motion: Any, num_moving: int) -> None:
    with visiting(browser, site.base_url, reduced_motion=motion) as page:
        open_page(page)
        site.replies = [Reply([FIRST, delta(reasoning="One and"), Gate()])]
        expect(part(send(page), "thoughtText")).to_have_text("One and")
        assert page.evaluate("document.getAnimations().length") == num_moving


def test_phone_scrolls_to_the_answer_and_has_its_stop_button_there(browser: Browser, site: Site) -> None:
    with visiting(browser, site.base_url, viewport=PHONE, has_touch=True, is_mobile=True) as page:
        open_page(page)
        site.replies = [Reply([FIRST, delta(reasoning="One and"), Gate()])]
        card = send(page)
        expect(part(card, "thoughtText")).to_be_in_viewport(ratio=1)
        expect(part(card, "prompt")).to_be_in_viewport(ratio=1)
        stop = page.get_by_role("button", name="Stop")
        expect(stop).to_have_count(1)
        expect(stop).to_be_in_viewport(ratio=1)
        stop.tap()
        expect(part(finished(card), "notice")).to_contain_text("Stopped.")


def test_answers_stand_newest_first_and_the_oldest_go(page: Page, site: Site) -> None:
    for number in range(22):
        finished(send(page, f"Question {number}"))
        expect(part(newest(page), "prompt")).to_have_text(f"Question {number}")
    expect(page.get_by_role("article")).to_have_count(20)
    expect(part(page.get_by_role("article").last, "prompt")).to_have_text("Question 2")


def test_everything_is_reached_by_the_tab_key_in_the_order_of_the_page(page: Page, site: Site) -> None:
    choose(page, picture("a.png"))
    page.get_by_text("More settings").click()
    site.replies = [answer_reply("Two.", thought="One and one.")]
    finished(send(page))
    page.locator("#files").focus()
    order = []
    for _ in range(13):
        order.append(
            page.evaluate(
                "document.activeElement.ariaLabel || document.activeElement.id || document.activeElement.tagName"
            )
        )
        page.keyboard.press("Tab")
    form = ["files", "Remove a.png", "prompt", "INPUT", "SUMMARY", "system", "temperature", "maxTokens", "send"]
    assert order == [*form, "SUMMARY", "Copy answer", "Copy as curl", "Copy as Python"]


def test_sticky_bar_never_covers_what_has_the_focus(browser: Browser, site: Site) -> None:
    with visiting(browser, site.base_url, viewport={"width": 1280, "height": 480}) as page:
        open_page(page)
        choose(page, *(picture(f"{number}.png") for number in range(4)))
        page.get_by_text("More settings").click()
        page.locator("#files").focus()
        seen = []
        for key in 11 * ["Tab"] + 10 * ["Shift+Tab"]:
            page.keyboard.press(key)
            seen.append(page.evaluate("document.activeElement.id || document.activeElement.outerHTML.slice(0, 60)"))
            assert page.evaluate(COVERED) is False, seen
        assert {"prompt", "system", "maxTokens", "send"} <= set(seen)


# --- the real server


def test_real_server_is_asked_in_each_mode(browser: Browser, served: Served) -> None:
    """The same question over the API, without streaming, gives the same thought, answer and counts."""
    with visiting(browser, served.base_url) as page:
        page.goto("/")
        expect(page).to_have_url(f"{served.base_url}/playground/")
        page.get_by_label("API key").fill("not-a-key-of-this-server")
        page.get_by_label("API key").press("Enter")
        expect(page.locator("#keyProblem")).to_contain_text("The server does not know this API key.")
        page.get_by_label("API key").fill(served.key)
        page.get_by_label("API key").press("Enter")
        expect(page.locator("#server")).to_have_text("Model: r4b")
        choose(page, picture("scene.png", SCENE))
        for kind, mode, chosen in (
            ("caption", "auto", "direct"),
            ("count", "auto", "thinking"),
            ("color", "long", "thinking"),
            ("count", "short", "direct"),
        ):
            prompt = ask_about(make_scene(SEED), kind).text
            page.get_by_label(mode.capitalize()).check()
            card = send(page, prompt)
            found = facts(card)
            choice, counts = ask_directly(served, prompt, mode)
            reasoning = counts["completion_tokens_details"]["reasoning_tokens"]
            assert part(card, "answer").text_content() == choice["message"]["content"]
            assert (part(card, "thoughtText").text_content() or None) == choice["message"]["reasoning"]
            assert {name: found[name].split(" ")[0] for name in ("Mode", "Prompt", "Thought", "Answer")} == {
                "Mode": chosen,
                "Prompt": str(counts["prompt_tokens"]),
                "Thought": str(reasoning),
                "Answer": str(count_answer_tokens(choice["token_ids"])),
            }


SEED = 7
SCENE = scene_image(SEED).data


def ask_directly(served: Served, prompt: str, mode: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """The choice and usage that answer the same question."""
    url = f"data:image/png;base64,{base64.b64encode(SCENE).decode()}"
    content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": prompt}]
    body = {
        "model": "r4b",
        "messages": [{"role": "user", "content": content}],
        "temperature": 0,
        "chat_template_kwargs": {"thinking_mode": mode},
        "return_token_ids": True,
    }
    status, _, answer = served.request("/v1/chat/completions", body)
    assert status == 200, answer
    completion = json.loads(answer)
    return completion["choices"][0], completion["usage"]


def count_answer_tokens(token_ids: list[int]) -> int:
    """Those after the thought, without the end of the turn, as a batch job counts them."""
    tokenizer = Tokenizer.from_file(str(CHECKPOINT / "tokenizer.json"))
    words = [tokenizer.id_to_token(one) for one in token_ids]
    after = words[words.index(CLOSE_TAG) + 1 :] if CLOSE_TAG in words else words
    return len(after) - ("<|im_end|>" in after)
