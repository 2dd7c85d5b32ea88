"""Where images may be fetched from: the URLs that may be asked for, and the addresses that may be connected to.

An address is allowed only if it is public unicast or in a network that the caller opened; one that cannot be read is
not. What a message shows of a URL is ASCII without user, password, query and fragment. Nothing here uses the network.
Not covered: which addresses a name has (`pipeline.remote` asks for each, where it connects), and ports, all open.
"""

import contextlib
import ipaddress
import re
import socket
from collections.abc import Sequence

from yarl import URL  # the type of aiohttp's own URLs

from pipeline.errors import SampleError

Network = ipaddress.IPv4Network | ipaddress.IPv6Network

MAX_SHOWN = 200
"""Characters of a text from outside that a message shows."""

# Python's versions differ in what they call global. These are closed for all of them.
_CLOSED: tuple[Network, ...] = (
    ipaddress.IPv4Network("168.63.129.16/32"),  # public by number, yet Azure serves its machines' metadata there
    ipaddress.IPv4Network("192.0.0.0/24"),  # protocol assignments, Oracle Cloud's metadata among them
    ipaddress.IPv4Network("192.88.99.0/24"),  # relays of 6to4
    ipaddress.IPv6Network("2001::/23"),  # protocol assignments; Teredo, which wraps IPv4 addresses, is one
    ipaddress.IPv6Network("2002::/16"),  # 6to4, which wraps IPv4 addresses and is long given up
    ipaddress.IPv6Network("3fff::/20"),  # documentation
)
_UNICAST_V6 = ipaddress.IPv6Network("2000::/3")
_NAT64 = ipaddress.IPv6Network("64:ff9b::/96")


def is_allowed(address: str, opened: Sequence[Network] = ()) -> bool:
    """Whether a connection to this address may be made. False for all that is not the usual spelling of one."""
    try:
        ip = ipaddress.ip_address(address)
    except ValueError:
        return False
    if isinstance(ip, ipaddress.IPv6Address):
        if ip.scope_id is not None:
            return False
        # NAT64 is the IPv4 internet as machines without IPv4 see it.
        ip = ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF) if ip in _NAT64 else ip.ipv4_mapped or ip
    if any(ip in network for network in opened):
        return True
    if ip.version == 6 and ip not in _UNICAST_V6:
        return False
    return ip.is_global and not ip.is_multicast and not any(ip in network for network in _CLOSED)


def parse_url(text: str, source: URL | None = None) -> URL:
    """A URL that may be asked for, if its addresses may; `source` redirected to it. Raises SampleError.

    Its host has the one spelling that all URLs of this host get: lower case, and an address at its shortest.
    """
    where = f"{show_url(source)} redirected to " if source else ""
    text = text.strip()
    try:
        # As it is where it can be sent so: a signature may be of these very characters.
        url = URL(text, encoded=re.fullmatch(r"[!-~]+", text) is not None)
        url = source.join(url) if source else url
        host = url.raw_host
    except ValueError:
        raise SampleError("url_invalid", f"{where}{_show_text(text)}: not a URL.") from None
    name = where + show_url(url)
    if url.scheme and url.scheme not in ("http", "https"):
        raise SampleError("url_refused", f"{name}: only http and https are fetched, not {printable(url.scheme)}.")
    if not url.scheme or not host:
        raise SampleError("url_invalid", f"{where}{_show_text(text)}: not a URL with a host.")
    if url.raw_user is not None or url.raw_password is not None:
        raise SampleError("url_refused", f"{name}: a URL with a user or password is not fetched.")
    if _is_odd_ipv4(host):
        raise SampleError("url_refused", f"{name}: an IPv4 address is taken only as four decimal numbers.")
    with contextlib.suppress(ValueError):  # a host with characters that no name has stays as it is
        url = url.with_host(host)  # aiohttp takes each spelling for a host of its own
    return url


def _is_odd_ipv4(host: str) -> bool:
    """127.1, 0x7f000001, 0177.0.0.1, 2130706433 and the like, which the system would take."""
    try:
        socket.inet_aton(host.rstrip("."))
    except (OSError, ValueError):
        return False
    return not re.fullmatch(r"(0|[1-9]\d{0,2})(\.(0|[1-9]\d{0,2})){3}", host, re.ASCII)


def show_url(url: URL) -> str:
    """For messages: no user, password, query or fragment, ASCII, at most 200 characters."""
    text = f"{url.scheme}://{url.host_port_subcomponent}{url.raw_path}" if url.raw_host else f"{url.scheme}:..."
    return printable(text)


def _show_text(text: str) -> str:
    """What `show_url` is for a text that is no URL: one with an @ may hold a password anywhere."""
    return "..." if "@" in text else printable(re.split(r"[?#]", text, maxsplit=1)[0])


def printable(text: str) -> str:
    """Any text for a message: ASCII on one line, at most `MAX_SHOWN` characters."""
    return ascii(text)[1:-1][:MAX_SHOWN]
