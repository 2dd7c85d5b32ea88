"""Paths and URLs: joined, made absolute, split, and matched with wildcards alike on disks and in buckets."""

import os
import re

from pipeline.errors import SpecError

SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")


def join_url(base: str, *names: str) -> str:
    """`base/name/name`, for paths and URLs alike."""
    return "/".join([base.rstrip("/"), *names])


def absolute_url(url: str) -> str:
    """A local path made absolute, with a trailing slash kept; URLs stay as they are."""
    if url.startswith("s3://"):
        return url
    if (scheme := SCHEME.match(url)) and scheme[0] != "file://":
        raise SpecError(f"{url}: {scheme[0]} is not read here; use s3://, file:// or a path.")
    path = os.path.abspath(os.path.expanduser(url.removeprefix("file://")))
    return path + "/" if url.endswith("/") and path != "/" else path


def is_glob(url: str) -> bool:
    return any(char in url for char in "*?[")


def split_s3(url: str) -> tuple[str, str]:
    """`s3://bucket/key` as (bucket, key)."""
    bucket, _, key = url.removeprefix("s3://").partition("/")
    return bucket, key


def glob_root(url: str) -> str:
    """The folder above the first wildcard; a URL without one is its own root, without a slash at the end."""
    if not is_glob(url) or os.path.exists(url):
        return url.rstrip("/") or "/"
    first = min(url.index(char) for char in "*?[" if char in url)
    return url[:first].rpartition("/")[0] or "/"


def glob_to_regex(pattern: str) -> re.Pattern[str]:
    """As `glob` on a disk: `*`, `?`, `[...]` stay in one level and pass hidden names over; `**` spans levels."""
    *folders, last = pattern.split("/")
    pieces = [HIDDEN_FREE_LEVELS if name == "**" else _level_to_regex(name) + "/" for name in folders]
    pieces.append(HIDDEN_FREE_LEVELS + r"(?!\.)[^/]+" if last == "**" else _level_to_regex(last))
    return re.compile("".join(pieces), re.DOTALL)


HIDDEN_FREE_LEVELS = r"(?:(?!\.)[^/]+/)*"


def _level_to_regex(name: str) -> str:
    pieces = {"*": "[^/]*", "?": "[^/]"}
    tokens = re.findall(r"\*+|\?|\[!?\]?[^\]]*\]|.", name, re.DOTALL)
    body = "".join(pieces.get(token[:1] if token[0] == "*" else token) or _set_or_literal(token) for token in tokens)
    return (r"(?!\.)" if name[:1] in ("*", "?", "[") else "") + body


def _set_or_literal(token: str) -> str:
    if len(token) < 3 or token[0] != "[" or token[-1] != "]":
        return re.escape(token)
    inside = token[2:-1] if token[1] == "!" else token[1:-1]
    inside = re.sub(r"([\\\[\]^&~|])", r"\\\1", inside)
    try:
        re.compile(f"[{inside}]")
    except re.error:
        return "(?!)"  # such as [z-a]: matches nothing
    return f"(?!/)[{'^' if token[1] == '!' else ''}{inside}]"
