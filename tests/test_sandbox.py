"""`ImageSandbox` with decoders that hang, eat memory and crash, and with real images that would make them.

Most tests share one sandbox, so that each also shows that the one before it left nothing behind.
Not covered: 100-megapixel images, which take seconds each; the memory they need grows as it does for those here.
"""

import ctypes
import io
import json
import os
import re
import select
import signal
import struct
import subprocess
import sys
import threading
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import psutil
import pytest
from PIL import Image

from pipeline.errors import SampleError
from pipeline.images import ImageLimits, open_prepared, prepare_image
from pipeline.records import EncodedImage
from pipeline.sandbox import ImageSandbox, SandboxLimits
from pipeline.tiling import R4B_TILING, Tiling

ROOT = Path(__file__).resolve().parent.parent
LIMITS = SandboxLimits(timeout_s=1.0, memory_bytes=128 << 20, num_processes=2)
PATIENT = SandboxLimits(timeout_s=600.0, num_processes=1)


def png(width: int, height: int = 1, mode: str = "RGB") -> bytes:
    """Told by its size. (Children import this file: it stays clear of the heavier tests.builders.)"""
    return encode(Image.new(mode, (width, height)))


def encode(image: Image.Image, file_format: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, file_format, **options)
    return buffer.getvalue()


# What follows runs in the children.


def spin() -> None:
    while True:
        pass


def spin_in_c() -> None:
    """Keeps the interpreter's lock, as a decoder may: no other thread and no signal handler of Python runs."""
    re.match(r"(a+)+$", "a" * 60 + "b")


def wait() -> None:
    threading.Event().wait()


def eat_memory() -> None:
    hoard = []
    while True:
        hoard.append(bytearray(1 << 20))


def read_null() -> None:
    ctypes.string_at(0)


def kill_itself() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def stop_itself() -> None:
    os.kill(os.getpid(), signal.SIGSTOP)


def give_up() -> None:
    os._exit(3)


def interrupt_parent() -> None:
    os.kill(os.getppid(), signal.SIGUSR1)


def crash_if_used_before() -> None:
    if num_decoded > 0:
        os.abort()


def tell() -> None:
    facts = {"pid": os.getpid(), "group": os.getpgid(0), "modules": sorted(sys.modules), "environ": dict(os.environ)}
    raise SampleError("told", json.dumps(facts))


DEEDS: dict[bytes, Callable[[], None]] = {
    deed.__name__.encode(): deed
    for deed in (
        *(spin, spin_in_c, wait, eat_memory, os.abort, read_null, kill_itself, stop_itself, give_up),
        *(interrupt_parent, crash_if_used_before, tell),
    )
}
num_decoded = 0


def misbehave(data: bytes, limits: ImageLimits, tiling: Tiling | None) -> EncodedImage:
    """Do what the data asks for, `deed:then these bytes`; what is no deed is an image."""
    global num_decoded
    deed, _, rest = data.partition(b":")
    if deed == b"report":
        Path(rest.decode()).write_text(str(os.getpid()))
        spin_in_c()
    if deed in DEEDS:
        DEEDS[deed]()
    num_decoded += 1
    return prepare_image(rest if deed in DEEDS else data, limits, tiling)


# What follows runs in the parent.


@pytest.fixture(scope="module")
def sandbox() -> Iterator[ImageSandbox]:
    with closing(ImageSandbox(ImageLimits(), LIMITS, None, misbehave)) as opened:
        yield opened


def ask(sandbox: ImageSandbox) -> dict[str, Any]:
    """What a child says of itself."""
    with pytest.raises(SampleError) as caught:
        sandbox.prepare(b"tell")
    facts: dict[str, Any] = json.loads(caught.value.message)
    return facts


def error_type(sandbox: ImageSandbox, data: bytes | None) -> str:
    with pytest.raises(SampleError) as caught:
        sandbox.prepare(data)
    return caught.value.error_type


@pytest.mark.parametrize(
    ("deed", "expected", "words"),
    [
        (b"spin", "image_decoder_timeout", "not decoded in 1 s of processor time"),
        (b"spin_in_c", "image_decoder_timeout", "not decoded in 1 s of processor time"),
        (b"eat_memory", "image_decoder_memory", "in 128 MiB of memory"),
        (b"abort", "image_decoder_crashed", "Aborted"),
        (b"read_null", "image_decoder_crashed", "Segmentation fault"),
        (b"kill_itself", "image_decoder_crashed", "Killed"),
        (b"give_up", "image_decoder_crashed", "exit code 3"),
    ],
)
def test_prepare_of_a_misbehaving_decoder_is_a_sample_error_and_the_next_image_works(
    sandbox: ImageSandbox, deed: bytes, expected: str, words: str
) -> None:
    with pytest.raises(SampleError, match=words) as caught:
        sandbox.prepare(deed)
    assert caught.value.error_type == expected
    assert caught.value.message.endswith(".")
    assert sandbox.prepare(png(7)).width == 7


def test_prepare_of_a_decoder_that_waits_ends_too() -> None:
    limits = SandboxLimits(timeout_s=0.2)
    with closing(ImageSandbox(ImageLimits(), limits, None, misbehave)) as sandbox:
        with pytest.raises(SampleError, match="not decoded in 1 s") as caught:
            sandbox.prepare(b"wait")
        assert caught.value.error_type == "image_decoder_timeout"
        assert sandbox.prepare(png(7)).width == 7


def test_prepare_in_many_threads_gives_each_its_own_answer(sandbox: ImageSandbox) -> None:
    files = [png(width) for width in range(1, 21)]
    files[3:3] = [b"abort", b"spin", b"eat_memory"]

    def answer(data: bytes) -> int | str:
        try:
            return sandbox.prepare(data).width
        except SampleError as error:
            return error.error_type

    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(answer, files))
    wrong = ["image_decoder_crashed", "image_decoder_timeout", "image_decoder_memory"]
    assert answers == [1, 2, 3, *wrong, *range(4, 21)]


def test_prepare_blames_no_image_for_what_earlier_ones_left(sandbox: ImageSandbox) -> None:
    sandbox.prepare(png(2))  # now a child has been used, and will be again
    assert sandbox.prepare(b"crash_if_used_before:" + png(5)).width == 5


def test_prepare_after_an_idle_child_was_killed_works(sandbox: ImageSandbox) -> None:
    os.kill(ask(sandbox)["pid"], signal.SIGKILL)
    assert sandbox.prepare(png(6)).width == 6


@pytest.mark.timeout(60)
def test_prepare_does_not_wait_for_a_child_that_is_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.sandbox.OVERDUE_S", 0.5)
    with closing(ImageSandbox(ImageLimits(), SandboxLimits(timeout_s=0.5), None, misbehave)) as sandbox:
        os.kill(ask(sandbox)["pid"], signal.SIGSTOP)
        assert sandbox.prepare(png(6)).width == 6
        assert error_type(sandbox, b"stop_itself") == "image_decoder_crashed"
        assert sandbox.prepare(png(7)).width == 7


@pytest.mark.timeout(60)
def test_prepare_starts_a_child_again_that_is_stopped_as_it_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    real = subprocess.Popen
    starts: list[int] = []

    def start(command: list[str], **options: Any) -> "subprocess.Popen[bytes]":
        process = real(command, **options)
        if not starts:
            process.send_signal(signal.SIGSTOP)
        starts.append(process.pid)
        return process

    monkeypatch.setattr("pipeline.sandbox.START_S", 5.0)
    monkeypatch.setattr("pipeline.sandbox.subprocess.Popen", start)
    with closing(ImageSandbox(ImageLimits(), LIMITS, None, misbehave)) as sandbox:
        assert sandbox.prepare(png(6)).width == 6
    assert len(starts) == 2


def test_prepare_interrupted_in_the_parent_leaves_no_answer_for_the_next_image(sandbox: ImageSandbox) -> None:
    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGUSR1, interrupt)
    try:
        with pytest.raises(KeyboardInterrupt):
            sandbox.prepare(b"interrupt_parent:" + png(3))
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert [sandbox.prepare(png(width)).width for width in (4, 5, 6)] == [4, 5, 6]


def test_prepare_uses_a_running_child_again_and_no_more_than_allowed(sandbox: ImageSandbox) -> None:
    assert ask(sandbox)["pid"] == ask(sandbox)["pid"] != os.getpid()
    with ThreadPoolExecutor(6) as pool:
        assert len({facts["pid"] for facts in pool.map(ask, [sandbox] * 12)}) <= 2


def test_child_knows_neither_the_secrets_nor_the_modules_of_its_parent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "very secret")
    with closing(ImageSandbox(ImageLimits(), PATIENT, None, misbehave)) as sandbox:
        facts = ask(sandbox)
    assert "very secret" not in facts["environ"].values()
    assert not {"ray", "torch", "vllm", "boto3"} & set(facts["modules"])
    assert facts["group"] == facts["pid"]  # so that Ctrl-C in a terminal does not reach it


@pytest.mark.parametrize(
    ("data", "expected"),
    [(None, "image_null"), (b"", "image_empty"), (b"abort" + bytes(100), "image_too_many_bytes")],
)
def test_prepare_of_what_needs_no_look_starts_no_child(data: bytes | None, expected: str) -> None:
    with closing(ImageSandbox(ImageLimits(max_bytes=100), LIMITS, None, misbehave)) as sandbox:
        before = set(psutil.Process().children())
        assert error_type(sandbox, data) == expected
        assert set(psutil.Process().children()) == before


def test_close_ends_the_children_and_refuses_more() -> None:
    sandbox = ImageSandbox(ImageLimits(), LIMITS, None, misbehave)
    child = psutil.Process(ask(sandbox)["pid"])
    sandbox.close()
    assert not child.is_running()
    with pytest.raises(RuntimeError, match="closed"):
        sandbox.prepare(png(1))
    sandbox.close()


# One after the other on the sandbox's real decoder.


@pytest.fixture(scope="module")
def real_sandbox() -> Iterator[ImageSandbox]:
    with closing(ImageSandbox(ImageLimits(), SandboxLimits(20.0, 96 << 20, 1), R4B_TILING)) as opened:
        yield opened


def test_prepare_of_a_plain_file_keeps_its_bytes_and_sends_none_back(real_sandbox: ImageSandbox) -> None:
    data = encode(Image.new("RGB", (640, 480), (9, 99, 199)), "JPEG")
    assert real_sandbox.prepare(data).data is data


def test_prepare_of_any_other_file_gives_what_prepare_image_gives(real_sandbox: ImageSandbox) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (1300, 1700, 4), dtype=np.uint8)
    data = encode(Image.fromarray(pixels), "PNG", compress_level=1)
    image = real_sandbox.prepare(data)
    assert image == prepare_image(data, ImageLimits(), R4B_TILING)
    assert open_prepared(image).size == R4B_TILING.shrink(1700, 1300)


def chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def png_bomb() -> bytes:
    header = struct.pack(">IIBBBBB", 30_000, 30_000, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(100)))


def webp_bomb() -> bytes:
    """Whoever opens it allocates 2 GB."""
    inner = b"VP8X" + struct.pack("<II", 10, 0) + b"\xfe\x3f\0" * 2 + encode(Image.new("RGB", (9, 9)), "WEBP")[12:]
    return b"RIFF" + struct.pack("<I", 4 + len(inner)) + b"WEBP" + inner


def frames(file_format: str, count: int) -> bytes:
    pictures = [Image.new("RGB", (4, 4), (number % 256, number // 256, 7)) for number in range(count)]
    return encode(pictures[0], file_format, save_all=True, append_images=pictures[1:])


BAD: list[tuple[str, Callable[[], bytes], str]] = [
    ("a PNG that says 30,000 x 30,000", png_bomb, "image_too_many_pixels"),
    ("a WebP that says 16,383 x 16,383", webp_bomb, "image_too_many_pixels"),
    ("a GIF of 5,000 frames", lambda: frames("GIF", 5000), "image_too_many_frames"),
    ("a TIFF of 1,001 pages", lambda: frames("TIFF", 1001), "image_too_many_frames"),
    ("half a JPEG", lambda: encode(Image.effect_noise((300, 300), 90), "JPEG")[:20_000], "image_truncated"),
    ("half a WebP", lambda: encode(Image.effect_noise((300, 300), 90), "WEBP")[:20_000], "image_corrupt"),
    ("a text", lambda: b"no image", "image_unrecognized"),
    ("a WebP that needs more memory", lambda: encode(Image.new("RGB", (2600, 2600)), "WEBP"), "image_decoder_memory"),
    ("such a JPEG2000", lambda: encode(Image.new("RGB", (2600, 2600)), "JPEG2000"), "image_decoder_memory"),
    ("such a PNG", lambda: encode(Image.new("RGB", (6000, 6000)), compress_level=1), "image_decoder_memory"),
]


@pytest.mark.parametrize(("data", "expected"), [case[1:] for case in BAD], ids=[case[0] for case in BAD])
def test_prepare_of_real_bad_bytes_gives_their_error(
    real_sandbox: ImageSandbox, data: Callable[[], bytes], expected: str
) -> None:
    assert error_type(real_sandbox, data()) == expected


EXIF = Image.Exif()
EXIF[0x0112] = 6
# 12 megapixels: 46 MiB in the modes of four bytes, so that two of them do not fit
LARGE: list[tuple[str, Callable[[], bytes]]] = [
    ("RGB", lambda: encode(Image.new("RGB", (4000, 3000), "red"), compress_level=1)),
    ("RGB to turn", lambda: encode(Image.new("RGB", (4000, 3000), "red"), "JPEG", exif=EXIF)),
    ("RGBA", lambda: encode(Image.new("RGBA", (4000, 3000), "red"), compress_level=1)),
    ("LA", lambda: encode(Image.new("LA", (4000, 3000)), compress_level=1)),
    ("CMYK", lambda: encode(Image.new("CMYK", (4000, 3000)), "JPEG")),
    ("palette", lambda: encode(Image.new("P", (4000, 3000)), compress_level=1, transparency=3)),
    ("16-bit gray", lambda: encode(Image.new("I;16", (4000, 3000)), compress_level=1)),
    ("float", lambda: encode(Image.new("F", (4000, 3000)), "TIFF", compression="tiff_lzw")),
]


@pytest.mark.parametrize("data", [case[1] for case in LARGE], ids=[case[0] for case in LARGE])
def test_prepare_of_a_large_image_needs_its_pixels_once(real_sandbox: ImageSandbox, data: Callable[[], bytes]) -> None:
    image = real_sandbox.prepare(data())
    assert (image.width, image.height) in (R4B_TILING.shrink(4000, 3000), R4B_TILING.shrink(3000, 4000))


def test_prepare_without_a_tiling_needs_the_pixels_no_more_than_twice() -> None:
    limits = SandboxLimits(memory_bytes=120 << 20)
    with closing(ImageSandbox(ImageLimits(), limits, None)) as sandbox:
        image = sandbox.prepare(encode(Image.new("RGB", (4000, 3000), "red"), "JPEG", exif=EXIF))
    assert (image.width, image.height) == (3000, 4000)


# Processes that use a sandbox and then die, or are no module.


def hang(fifo: str) -> None:
    """A parent whose child hangs, having written its process id to `fifo`."""
    ImageSandbox(ImageLimits(), PATIENT, None, misbehave).prepare(b"report:" + fifo.encode())


def idle(fifo: str) -> None:
    """A parent whose child waits for the next image."""
    sandbox = ImageSandbox(ImageLimits(), PATIENT, None, misbehave)
    Path(fifo).write_text(str(ask(sandbox)["pid"]))
    threading.Event().wait()


@pytest.mark.parametrize("parent", [hang, idle])
def test_child_ends_with_a_parent_that_is_killed(parent: Callable[[str], None], tmp_path: Path) -> None:
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    code = f"from tests.test_sandbox import {parent.__name__}; {parent.__name__}({str(fifo)!r})"
    with subprocess.Popen([sys.executable, "-c", code], cwd=ROOT) as process:
        child = os.pidfd_open(int(fifo.read_text()))
        assert select.select([child], [], [], 0)[0] == []
        process.kill()
        assert select.select([child], [], [], 30)[0] == [child]
    os.close(child)


def test_children_do_not_run_the_main_module_again(tmp_path: Path) -> None:
    script = tmp_path / "main.py"
    script.write_text(
        f"import sys; sys.path.insert(0, {str(ROOT)!r})\n"
        "print('main runs')\n"
        "from tests.test_sandbox import ImageLimits, ImageSandbox, PATIENT, png\n"
        "sandbox = ImageSandbox(ImageLimits(), PATIENT, None)\n"
        "print(sandbox.prepare(png(8)).width)\n"
        "sandbox.close()\n"
    )
    done = subprocess.run([sys.executable, str(script)], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout == "main runs\n8\n"
    assert done.stderr == ""
