"""API keys: who may ask, told by digests alone.

Keys come from a file, one a line, and from the environment variable R4B_API_KEYS, separated by commas. Either form is
`key` or `name key`. The file is read again when it changes, so keys come and go without a restart; to replace a key
without a gap, list both under one name for a while. A file that cannot be used any more changes nothing.
The invariant: no key is kept (beside the environment variable itself), shown in a message or logged, only its SHA-256
digest; and how long `find` takes says nothing about how much of a key was right.
Not covered: what a key may do (the gate's limits), storing keys (write the file anew and rename it into place), and
keys from the environment, which stay as long as the process.
"""

import hmac
import logging
import os
import re
import stat
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from hashlib import sha256

from pipeline.errors import SpecError

ENVIRONMENT = "R4B_API_KEYS"
MIN_KEY_CHARS = 16
NAME = re.compile(r"[A-Za-z0-9._-]{1,15}")
"""Shorter than any key, so that a key in the wrong place is never taken for a name, which logs show."""
KEY = re.compile(r"[!-+\--~]+")
"""Visible ASCII without commas: what an Authorization header and the environment variable can both hold."""
MAX_FILE_BYTES = 1 << 20
CHECK_EVERY_S = 1.0
SETTLED_S = 2.0
"""A file changed so recently may change again without a new time of change."""

logger = logging.getLogger("r4b.keys")


@dataclass(frozen=True)
class Key:
    """One key: its digest, and what logs and limits call it."""

    digest: bytes
    key_id: str


class KeyRing:
    """The keys that hold now. Use it from one thread."""

    def __init__(self, path: str | None = None, clock: Callable[[], float] = time.monotonic) -> None:
        """Load all keys; raises SpecError, which names the line but no key."""
        self._path, self._clock = path, clock
        self._from_environment = parse_keys(os.environ.get(ENVIRONMENT, "").split(","), f"{ENVIRONMENT}: key")
        self._from_file: tuple[Key, ...] = ()
        self._signature: object = None
        self._complaint = ""
        self._checked_at = clock()
        if path is not None:
            self._load(path)
        elif not self._from_environment:
            raise SpecError(f"There are no API keys: name a file of keys, or set {ENVIRONMENT}.")

    def find(self, token: bytes | None) -> str | None:
        """The id of the key that was presented, or None. Every key is compared, the right one or not."""
        self._refresh()
        digest = sha256(token or b"").digest()
        found = None
        for key in (*self._from_environment, *self._from_file):
            if hmac.compare_digest(key.digest, digest):
                found = key.key_id
        return found

    def _refresh(self) -> None:
        if self._path is None or self._clock() - self._checked_at < CHECK_EVERY_S:
            return
        self._checked_at = self._clock()
        signature = _sign(self._path)
        if signature is not None and signature == self._signature:
            return
        try:
            self._load(self._path)
        except SpecError as error:
            if self._complaint != str(error):
                logger.warning("The API keys stay as they were: %s", error)
            self._complaint = str(error)

    def _load(self, path: str) -> None:
        keys, facts = _read_file(path)
        self._signature, self._complaint = _to_signature(facts), ""
        if keys == self._from_file:
            return
        self._from_file = keys
        logger.info("%s: %d API keys.", path, len(keys))
        if facts.st_mode & (stat.S_IROTH | stat.S_IWOTH):
            logger.warning("%s: every user of this machine can read or change the API keys; chmod o-rw it.", path)


def parse_bearer(headers: Iterable[tuple[bytes, bytes]]) -> bytes | None:
    """The token of a request's only Authorization header, if its scheme is Bearer, in any case."""
    values = [value for name, value in headers if name.lower() == b"authorization"]
    if len(values) != 1:
        return None
    scheme, _, token = values[0].strip().partition(b" ")
    return token.strip() or None if scheme.lower() == b"bearer" else None


def parse_keys(lines: Iterable[str], where: str) -> tuple[Key, ...]:
    """Keys as they are listed, `key` or `name key`; raises SpecError."""
    keys = []
    for number, line in enumerate(lines, 1):
        words = line.split()
        if not words or words[0].startswith("#"):
            continue
        keys.append(_parse_key(words, f"{where} {number}"))
    return tuple(keys)


def _parse_key(words: list[str], where: str) -> Key:
    if len(words) > 2:
        raise SpecError(f"{where}: more than `name key`, or there are spaces in the key.")
    key = words[-1]
    if len(key) < MIN_KEY_CHARS:
        raise SpecError(f"{where}: a key has at least {MIN_KEY_CHARS} characters, this one has {len(key)}.")
    if not KEY.fullmatch(key):
        raise SpecError(f"{where}: a key is of letters, digits and signs of ASCII, without commas.")
    if len(words) == 2 and not NAME.fullmatch(words[0]):
        raise SpecError(f"{where}: the name before a key is of at most 15 letters, digits and ._- characters.")
    digest = sha256(key.encode()).digest()
    return Key(digest, words[0] if len(words) == 2 else digest.hex()[:8])


def _read_file(path: str) -> tuple[tuple[Key, ...], os.stat_result]:
    """All keys, at least one, and the facts of the very file that was read; raises SpecError."""
    try:
        with open(path, "rb") as file:
            facts = os.fstat(file.fileno())
            if not stat.S_ISREG(facts.st_mode):
                raise SpecError(f"{path}: not a file.")
            data = file.read(MAX_FILE_BYTES + 1)
    except OSError as error:
        raise SpecError(f"{path}: the API keys cannot be read: {error.strerror}.") from None
    if len(data) > MAX_FILE_BYTES:
        raise SpecError(f"{path}: larger than {MAX_FILE_BYTES} bytes, which no file of keys is.")
    try:
        lines = data.decode().removeprefix("\ufeff").splitlines()
    except UnicodeDecodeError:
        raise SpecError(f"{path}: not UTF-8.") from None
    keys = parse_keys(lines, f"{path}: line")
    if not keys:
        raise SpecError(f"{path}: holds no API key.")
    return keys, facts


def _sign(path: str) -> object:
    try:
        return _to_signature(os.stat(path))
    except OSError as error:
        return type(error).__name__


def _to_signature(facts: os.stat_result) -> object:
    """Tells one content of a file from the next; None, which is like no other, while it may still change unseen."""
    if abs(time.time() - facts.st_mtime) < SETTLED_S:
        return None
    return facts.st_mtime_ns, facts.st_ctime_ns, facts.st_size, facts.st_ino, facts.st_dev
