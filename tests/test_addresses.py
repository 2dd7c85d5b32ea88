"""The rules of addresses and URLs as tables, and what is shown of a URL.

Not covered: that `RemoteFetcher` keeps to the rules, at each connection and redirect (`test_remote`).
"""

import ipaddress

import pytest

from pipeline.addresses import is_allowed, parse_url
from pipeline.errors import SampleError

SECRET = "hunter2"

PUBLIC = [
    "8.8.8.8",
    "93.184.216.34",
    "172.15.255.255",
    "172.32.0.1",
    "100.63.255.255",
    "100.128.0.1",
    "2001:4860:4860::8888",
    "2a00:1450:4001:80b::200e",
    "::ffff:8.8.8.8",
    "64:ff9b::8.8.8.8",
]
CLOSED = [
    *("0.0.0.0", "0.1.2.3", "10.0.0.1", "10.255.255.255", "172.16.0.1", "172.31.255.255", "192.168.1.1"),
    *("127.0.0.1", "127.255.255.254", "169.254.169.254", "169.254.170.2", "100.64.0.1", "100.100.100.200"),
    *("168.63.129.16", "192.0.0.1", "192.0.0.192", "192.0.2.1", "198.51.100.7", "203.0.113.9", "198.18.0.1"),
    *("192.88.99.1", "224.0.0.1", "239.255.255.250", "240.0.0.1", "255.255.255.255"),
    *("::", "::1", "fe80::1", "fe80::1%eth0", "2001:4860:4860::8888%1", "fc00::1", "fd00:ec2::254", "fec0::1"),
    *("ff02::1", "ff0e::1", "2001:db8::1", "3fff::1", "100::1", "4000::1", "5f00::1"),
    *("::ffff:127.0.0.1", "::ffff:7f00:1", "::ffff:10.0.0.1", "::ffff:169.254.169.254", "::127.0.0.1", "::8.8.8.8"),
    *("::ffff:0:127.0.0.1", "64:ff9b::127.0.0.1", "64:ff9b::a9fe:a9fe", "64:ff9b:1::8.8.8.8"),
    *("2002:7f00:1::1", "2002:a9fe:a9fe::1", "2002:808:808::1"),
    *("2001:0:808:808::80ff:fffe", "2001:0:808:808::5601:5601"),  # Teredo; 127.0.0.1 and 169.254.169.254 inverted
    *("127.1", "0177.0.0.1", "2130706433", "0x7f000001", "localhost", "", "8.8.8.8 ", "8.8.8"),
]


@pytest.mark.parametrize("address", PUBLIC)
def test_is_allowed_public_unicast_address_is(address: str) -> None:
    assert is_allowed(address)


@pytest.mark.parametrize("address", CLOSED)
def test_is_allowed_any_other_address_is_not(address: str) -> None:
    assert not is_allowed(address)


@pytest.mark.parametrize(
    ("address", "network", "allowed"),
    [
        ("10.1.2.3", "10.1.0.0/16", True),
        ("10.2.0.0", "10.1.0.0/16", False),
        ("::ffff:10.1.2.3", "10.1.0.0/16", True),
        ("64:ff9b::10.1.2.3", "10.1.0.0/16", True),
        ("fd00::7", "fd00::/64", True),
        ("fd00:ec2::254", "fd00::/64", False),
        ("::1", "127.0.0.0/8", False),
        ("8.8.8.8", "10.1.0.0/16", True),
    ],
)
def test_is_allowed_opened_network_is_allowed_and_no_more(address: str, network: str, allowed: bool) -> None:
    assert is_allowed(address, [ipaddress.ip_network(network)]) is allowed


URLS = [
    ("file:///etc/passwd", "url_refused", "file"),
    ("ftp://example.com/a.png", "url_refused", "ftp"),
    ("s3://bucket/a.png", "url_refused", "s3"),
    ("data:image/png;base64,aHVudGVyMg==", "url_refused", "data"),
    ("gopher://example.com/", "url_refused", "gopher"),
    ("http://user:hunter2@example.com/a.png", "url_refused", "http://example.com/a.png"),
    ("https://hunter2@example.com/", "url_refused", "https://example.com/"),
    ("https://:@example.com/", "url_refused", "https://example.com/"),
    ("http://127.1/a.png", "url_refused", "http://127.1/a.png"),
    ("http://134744072/a.png", "url_refused", "http://134744072/a.png"),
    ("", "url_invalid", ""),
    ("a.png", "url_invalid", "a.png"),
    ("//example.com/a.png?k=hunter2", "url_invalid", "example.com"),
    ("http://", "url_invalid", "http://"),
    ("http:///a.png", "url_invalid", "http:///a.png"),
    ("http://example.com:99999/a.png?k=hunter2", "url_invalid", "http://example.com:99999/a.png"),
    ("http://user:hunter2@example.com:99999/", "url_invalid", "..."),
    ("http://user:hunter2/x@example.com/", "url_invalid", "..."),
    ("http://user:hunter2?x@example.com/", "url_invalid", "..."),
    ("http://a\\@hunter2/", "url_invalid", "..."),
    ("http://[::1/", "url_invalid", "http://[::1/"),
    ("http://\ud800/", "url_invalid", "http://\\ud800/"),
]


@pytest.mark.parametrize(("url", "error_type", "shown"), URLS)
def test_parse_url_bad_url_is_named_without_secrets(url: str, error_type: str, shown: str) -> None:
    with pytest.raises(SampleError) as caught:
        parse_url(url)
    assert caught.value.error_type == error_type
    assert shown in caught.value.message
    assert SECRET not in caught.value.message
    caught.value.message.encode("ascii")  # a lone surrogate could not be written to Parquet


@pytest.mark.parametrize(
    "url",
    [
        "http://example.com",
        " https://example.com/a b.png\n",
        "HTTPS://EXAMPLE.com:8443/é?x=1#f",
        "http://[2001:db8::1]/",
    ],
)
def test_parse_url_http_with_a_host_is_taken(url: str) -> None:
    assert parse_url(url).scheme in ("http", "https")


@pytest.mark.parametrize(
    ("url", "parsed"),
    [
        ("http://EXAMPLE.com:81/A%2fb?X=%7e+Y#Z", "http://example.com:81/A%2fb?X=%7e+Y#Z"),
        ("http://EXAMPLE.com./", "http://example.com./"),
        ("http://Bücher.DE/", "http://xn--bcher-kva.de/"),
        ("http://XN--bcher-KVA.de/", "http://xn--bcher-kva.de/"),
        ("http://[2001:4860:0::8888]/", "http://[2001:4860::8888]/"),
        ("http://A|b/", "http://A|b/"),
    ],
)
def test_parse_url_host_gets_its_one_spelling_and_the_rest_stays(url: str, parsed: str) -> None:
    assert str(parse_url(url)) == parsed


def test_parse_url_host_of_a_redirect_gets_its_one_spelling() -> None:
    assert str(parse_url("//OTHER.com/A", parse_url("http://EXAMPLE.com/"))) == "http://other.com/A"
    assert str(parse_url("A", parse_url("http://EXAMPLE.com/"))) == "http://example.com/A"
