"""Images decoded in processes of their own: what hostile bytes do to a decoder, they do to no one else.

A child decodes one image at a time, under a limit of time and one of address space; the kernel enforces both, so they
hold inside C code too. It is started afresh, never forked: it knows nothing of its parent's threads, modules, open
files and secrets in the environment, and it ends with its parent.
The invariant: whatever the bytes, `prepare` gives a picture or raises SampleError, and the next image is answered as
if nothing had been. A crash or a lack of memory is an image's fault only in a child that saw no other.
Not covered: a decoder that an attacker takes over: the child has its parent's rights to files and network.
"""

import ctypes
import errno
import fcntl
import json
import os
import pickle
import queue
import resource
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path

from pipeline.errors import JobError, SampleError
from pipeline.images import ImageLimits, check_bytes, prepare_image
from pipeline.records import EncodedImage
from pipeline.tiling import Tiling

Decode = Callable[[bytes, ImageLimits, Tiling | None], EncodedImage]
PATIENCE = 5
START_S = 120.0
OVERDUE_S = 10.0
"""After a child should have ended itself: one that is stopped, or starts no more, cannot, and is killed."""


@dataclass(frozen=True)
class SandboxLimits:
    """What one image may cost, and how many are decoded at once."""

    timeout_s: float = 20.0
    """Of processor time, so that a busy machine fails no image; a decoder that waits gets PATIENCE times as long."""
    memory_bytes: int = 1 << 30
    """Address space above what a child has when it is ready; the file's bytes and the result are in it."""
    num_processes: int = 2


@dataclass(frozen=True)
class _Order:
    """What a child needs to know, sent once."""

    decode: Decode
    images: ImageLimits
    tiling: Tiling | None
    limits: SandboxLimits


class ImageSandbox:
    """`prepare_image` behind a wall; for many threads. Children start when they are first needed."""

    def __init__(
        self, images: ImageLimits, sandbox: SandboxLimits, tiling: Tiling | None, decode: Decode = prepare_image
    ) -> None:
        self._order = _Order(decode, images, tiling, sandbox)
        self._closed = False
        # last in, first out: a running child is taken before a new one is started
        self._idle: queue.LifoQueue[_Child | None] = queue.LifoQueue()
        for _ in range(sandbox.num_processes):
            self._idle.put(None)

    def prepare(self, data: bytes | None) -> EncodedImage:
        """As `prepare_image`, with three more errors: image_decoder_timeout, _memory and _crashed. Blocks."""
        checked = check_bytes(data, self._order.images)
        child = self._idle.get()
        try:
            if self._closed:
                raise RuntimeError("The sandbox is closed.")
            answer = None if child is None else child.ask(checked)
            if answer is None or _may_be_due_to_earlier_images(answer):
                if child is not None:
                    child.stop()
                child = _start_child(self._order)
                answer = child.ask(checked)
        finally:
            if child is not None and not child.is_ready:
                child.stop()
                child = None
            self._idle.put(child)
        if isinstance(answer, SampleError):
            raise answer
        return answer

    def close(self) -> None:
        """End the children, once they have answered what they were asked."""
        self._closed = True
        children = [self._idle.get() for _ in range(self._order.limits.num_processes)]
        for child in children:
            if child is not None:
                child.stop()
            self._idle.put(None)


def _may_be_due_to_earlier_images(answer: EncodedImage | SampleError) -> bool:
    """Earlier images may have left a child short of memory or damaged, and the kernel may have killed it while idle."""
    return isinstance(answer, SampleError) and answer.error_type in ("image_decoder_memory", "image_decoder_crashed")


def _start_child(order: _Order) -> "_Child":
    """Twice, if need be: it may be killed as it starts, and no image is to blame. Raises JobError."""
    try:
        return _Child(order)
    except JobError:
        return _Child(order)


class _Child:
    """One process that decodes; for one thread at a time."""

    def __init__(self, order: _Order) -> None:
        self._limits = order.limits
        self.is_ready = False
        self._link, theirs = Pipe()
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-c", "from pipeline.sandbox import serve; serve()", str(theirs.fileno())],
                stdin=subprocess.PIPE,  # never written to: it tells the child that its parent is gone
                stdout=subprocess.DEVNULL,
                pass_fds=[theirs.fileno()],
                env=_child_environment(),
                process_group=0,  # Ctrl-C in a terminal is for the parent
            )
        try:
            with self._killed_after(START_S):
                self._link.send_bytes(pickle.dumps(order))
                self.is_ready = self._link.recv_bytes() == READY
        except (EOFError, OSError) as error:
            raise JobError(f"The process that decodes images did not start: {_in_words(self._end())}.") from error
        finally:
            if not self.is_ready:
                self.stop()

    def ask(self, data: bytes) -> EncodedImage | SampleError:
        """Decode one image. Where it is left by an exception, an answer is outstanding: the child is not ready."""
        self.is_ready = False
        try:
            with self._killed_after(self._limits.timeout_s * PATIENCE + OVERDUE_S):
                self._link.send_bytes(data)
                head = json.loads(self._link.recv_bytes())
                body = b"" if "error_type" in head else self._link.recv_bytes()
        except (EOFError, OSError):
            return self._why_it_ended()
        self.is_ready = True
        if "error_type" in head:
            return SampleError(head["error_type"], head["message"])
        return EncodedImage(head["width"], head["height"], body or data)

    @contextmanager
    def _killed_after(self, seconds: float) -> Iterator[None]:
        """The link breaks then, which ends the wait for an answer."""
        timer = threading.Timer(seconds, self._process.kill)
        timer.daemon = True
        timer.start()
        try:
            yield
        finally:
            timer.cancel()

    def stop(self) -> None:
        """End the process, whatever it does."""
        self.is_ready = False
        self._link.close()
        self._process.kill()
        self._process.communicate()

    def _why_it_ended(self) -> SampleError:
        code, seconds = self._end(), self._limits.timeout_s
        if code == -signal.SIGPROF:
            return SampleError(
                "image_decoder_timeout", f"The image was not decoded in {seconds:g} s of processor time."
            )
        if code == -signal.SIGALRM:
            return SampleError("image_decoder_timeout", f"The image was not decoded in {seconds * PATIENCE:g} s.")
        return SampleError("image_decoder_crashed", f"The image made its decoder crash: {_in_words(code)}.")

    def _end(self) -> int:
        """The exit code of a process whose link is broken; were it still there, it would end now."""
        self._link.close()
        self._process.communicate()
        return self._process.returncode


def _in_words(code: int) -> str:
    return f"exit code {code}" if code >= 0 else signal.strsignal(-code) or f"signal {-code}"


READY = b"ready"


def _child_environment() -> dict[str, str]:
    """The parent's way to find modules, and none of its secrets."""
    kept = {name: os.environ[name] for name in ("PATH", "LD_LIBRARY_PATH", "PYTHONHOME") if name in os.environ}
    paths = os.pathsep.join(os.path.abspath(path) for path in sys.path)
    return {
        **kept,
        "PYTHONPATH": paths,
        "OPENBLAS_NUM_THREADS": "1",  # each thread, and each arena of malloc, reserves address space
        "MALLOC_ARENA_MAX": "1",
        "PILLOW_BLOCK_SIZE": "64m",  # above malloc's highest threshold for mmap: freed pixels go back to the system
    }


def serve() -> None:
    """The child: answer until the parent closes the link."""
    link = Connection(int(sys.argv[1]))
    order: _Order = pickle.loads(link.recv_bytes())
    _end_on(signal.SIGPROF, signal.SIGALRM, signal.SIGIO)
    _end_with_parent()
    _limit_memory(order.limits.memory_bytes)
    link.send_bytes(READY)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # decoders write there what they think of an image
    try:
        while True:
            for frame in _answer(link.recv_bytes(), order):
                link.send_bytes(frame)
    except (EOFError, OSError):  # the parent is gone, or wants no more
        return


def _answer(data: bytes, order: _Order) -> list[bytes]:
    """A JSON head, and after a picture's its bytes; none where they are those that came.

    No pickle: the parent trusts what a child sends no more than what the child was sent.
    """
    c_errno = _errno_of_c()
    c_errno.value = 0
    _set_timers(order.limits.timeout_s)
    try:
        image = order.decode(data, order.images, order.tiling)
    except SampleError as error:
        # a C library that was refused memory says only that it could not decode
        if error.error_type in ("image_corrupt", "image_truncated") and c_errno.value == errno.ENOMEM:
            return [_out_of_memory(order)]
        return [_to_json(error_type=error.error_type, message=error.message)]
    except MemoryError:
        return [_out_of_memory(order)]
    finally:
        _set_timers(0.0)
    return [_to_json(width=image.width, height=image.height), b"" if image.data is data else image.data]


def _out_of_memory(order: _Order) -> bytes:
    message = f"The image cannot be decoded in {order.limits.memory_bytes >> 20} MiB of memory, the limit."
    return _to_json(error_type="image_decoder_memory", message=message)


def _errno_of_c() -> ctypes.c_int:
    """The thread's own errno, which a failed malloc sets and a call that succeeds leaves."""
    locate = ctypes.CDLL(None).__errno_location
    locate.restype = ctypes.POINTER(ctypes.c_int)
    found: ctypes.c_int = locate().contents
    return found


def _to_json(**fields: str | int) -> bytes:
    return json.dumps(fields).encode()


def _end_on(*signals: signal.Signals) -> None:
    """Let these end the process, without a word from Python; a parent's handling of signals is inherited."""
    for number in signals:
        signal.signal(number, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, signals)


def _set_timers(timeout_s: float) -> None:
    """Have the kernel end the process then; 0 calls it off."""
    signal.setitimer(signal.ITIMER_PROF, timeout_s)
    signal.setitimer(signal.ITIMER_REAL, timeout_s * PATIENCE)


def _end_with_parent() -> None:
    """Have the kernel send SIGIO when stdin's other end closes, which it does with the parent, however that ends.

    PR_SET_PDEATHSIG would not do: it fires when the thread ends that started the child.
    """
    fcntl.fcntl(0, fcntl.F_SETOWN, os.getpid())
    fcntl.fcntl(0, fcntl.F_SETFL, fcntl.fcntl(0, fcntl.F_GETFL) | os.O_ASYNC)


def _limit_memory(memory_bytes: int) -> None:
    """Bound the address space, for only then does an allocation fail; and let a crash write no core file."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + memory_bytes
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (limit if hard == resource.RLIM_INFINITY else min(limit, hard), hard))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
