"""Fetching in a caller's stead: from public addresses only, to the address that was looked at, within bounds."""

import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from ipaddress import ip_address
from time import monotonic
from typing import Any

import pytest

from common.errors import RequestError
from webapp.fetching import MAX_REDIRECTS, Fetcher, is_public
from webapp.image_admission import fetch_images
from webapp.wire.bodies import ImageFile, Item

PRIVATE = [
    "127.0.0.1", "127.8.8.8", "10.1.2.3", "172.16.0.1", "192.168.0.1", "169.254.169.254", "100.64.0.1", "0.0.0.0",  # noqa: S104 - it is refused
    "224.0.0.1", "255.255.255.255", "198.18.0.1", "240.0.0.1", "::1", "::", "fe80::1", "fc00::1", "fd00:ec2::254",
    "ff02::1", "::ffff:127.0.0.1", "::ffff:169.254.169.254", "64:ff9b::7f00:1", "2002:7f00:1::1", "2001:0:7f00:1::",
]  # fmt: skip


class Place:
    """A web server on this machine that answers as the test says; counts what it was asked."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, str | None]] = []
        self.answer: Callable[[Any], None] = lambda handler: say(handler, 200, b"content")
        place = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                place.asked.append((self.path, self.headers["Host"]))
                place.answer(self)

            def log_message(self, *_: Any) -> None:
                """Quiet."""

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.port = self._server.server_port
        self.url = f"http://127.0.0.1:{self.port}"
        threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


def say(handler: Any, status: int, body: bytes = b"", **headers: str) -> None:
    handler.send_response(status)
    for name, value in {"Content-Length": str(len(body)), **headers}.items():
        handler.send_header(name, value)
    handler.end_headers()
    handler.wfile.write(body)


@pytest.fixture
def place() -> Iterator[Place]:
    place = Place()
    yield place
    place.close()


def open_to(place: Place, *, seconds: float = 10) -> Fetcher:
    """As the real one, but this machine's own address counts as public, and the server's port as usual."""
    return Fetcher(
        deadline=monotonic() + seconds,
        may_reach=lambda address: str(address) == "127.0.0.1" or is_public(address),
        ports={"http": place.port},
    )


def fetch(fetcher: Fetcher, url: str, max_bytes: int = 1000) -> bytes:
    return fetcher.fetch(url, max_bytes=max_bytes, param="url")


@pytest.mark.parametrize("address", PRIVATE)
def test_a_private_address_is_none_of_the_internet(address: str) -> None:
    assert not is_public(ip_address(address))


@pytest.mark.parametrize("address", ["8.8.8.8", "1.1.1.1", "2606:4700::1111", "::ffff:8.8.8.8"])
def test_a_public_address_is(address: str) -> None:
    assert is_public(ip_address(address))


@pytest.mark.parametrize(
    "host", ["127.0.0.1", "localhost", "2130706433", "0x7f.1", "127.1", "[::1]", "[::ffff:127.0.0.1]"]
)
def test_a_private_address_is_never_reached(place: Place, host: str) -> None:
    """However it is written."""
    fetcher = Fetcher(deadline=monotonic() + 10, ports={"http": place.port})
    with pytest.raises(RequestError, match=r"not public|does not answer|no address"):
        fetch(fetcher, f"http://{host}:{place.port}/secret")
    assert place.asked == []


def test_what_is_allowed_is_fetched_under_its_name(place: Place) -> None:
    assert fetch(open_to(place), f"{place.url}/a.png?x=1#part") == b"content"
    assert place.asked == [("/a.png?x=1", f"127.0.0.1:{place.port}")]


def test_a_name_is_resolved_once_and_the_connection_goes_where_that_led(place: Place) -> None:
    """A name that leads elsewhere the second time (rebinding) wins nothing."""
    asked: list[str] = []

    def resolve(host: str, port: int, **_: Any) -> list[Any]:
        asked.append(host)
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", ("127.0.0.1" if len(asked) == 1 else "10.0.0.1", port))]

    url = f"http://images.example:{place.port}/a"
    fetcher = replace(open_to(place), resolve=resolve)
    assert fetch(fetcher, url) == b"content"
    assert (asked, place.asked) == (["images.example"], [("/a", f"images.example:{place.port}")])
    with pytest.raises(RequestError, match="not public"):
        fetch(fetcher, url)


def test_one_address_that_is_not_public_forbids_them_all(place: Place) -> None:
    def resolve(host: str, port: int, **_: Any) -> list[Any]:
        del host
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (one, port)) for one in ("127.0.0.1", "10.0.0.1")]

    with pytest.raises(RequestError, match="not public"):
        fetch(replace(open_to(place), resolve=resolve), f"http://images.example:{place.port}/")


def test_a_redirect_is_looked_at_like_the_first_address(place: Place) -> None:
    for location in (
        "http://169.254.169.254/latest",
        "http://localhost:1/",
        "file:///etc/passwd",
        "http://[::1]/",
        "//10.0.0.1/",
    ):
        place.answer = lambda handler, location=location: say(handler, 302, Location=location)
        with pytest.raises(RequestError, match=r"public|http or https"):
            fetch(open_to(place), place.url)


def test_redirects_are_followed_and_counted(place: Place) -> None:
    def onwards(handler: Any) -> None:
        left = int(handler.path.strip("/"))
        say(handler, 200, b"there") if left == 0 else say(handler, 302, Location=f"/{left - 1}")

    place.answer = onwards
    assert fetch(open_to(place), f"{place.url}/{MAX_REDIRECTS}") == b"there"
    with pytest.raises(RequestError, match="redirects"):
        fetch(open_to(place), f"{place.url}/{MAX_REDIRECTS + 1}")


@pytest.mark.parametrize(
    "url",
    [
        "", "x", "//host/", "ftp://example.org/a", "file:///etc/passwd", "http://", "http://example.org:22/", "http://[",
        "https://example.org:80/", "http://example.org:99999/", "http://user:word@example.org/", "http://@example.org/",
        "http://example.org/" + "x" * 3000, "data:image/png;base64,aGk=", "http://exa mple.org/", "http://a\r\nb/",
        "gopher://127.0.0.1/", "http://\udcff/",
    ],
)  # fmt: skip
def test_what_is_no_plain_address_is_refused(url: str) -> None:
    with pytest.raises(RequestError):
        fetch(Fetcher(deadline=monotonic() + 5), url)


def test_size_and_time_are_bounded(place: Place) -> None:
    place.answer = lambda handler: say(handler, 200, b"x" * 1001)
    with pytest.raises(RequestError, match="larger"):
        fetch(open_to(place), place.url)
    place.answer = lambda handler: say(handler, 404, b"x")
    with pytest.raises(RequestError, match="404"):
        fetch(open_to(place), place.url)

    def drip(handler: Any) -> None:
        handler.send_response(200)
        handler.end_headers()
        with suppress(OSError):
            while not gone.wait(0.05):
                handler.wfile.write(b"x")

    gone, place.answer, began_at = threading.Event(), drip, monotonic()
    with pytest.raises(RequestError, match="longer"):
        fetch(open_to(place, seconds=0.5), place.url)
    assert monotonic() - began_at < 4
    gone.set()


def test_a_farm_that_fetches_none_asks_for_the_bytes() -> None:
    items = [Item(images=[ImageFile(b"GIF89a")]), Item(images=[ImageFile(url="http://127.0.0.1/a.png")])]
    with pytest.raises(RequestError, match="send their bytes") as refused:
        fetch_images(items, is_allowed=False)
    assert refused.value.param == "items[1].images[0].url"
    with pytest.raises(RequestError, match="not public"):
        fetch_images(items, is_allowed=True)
    both = [Item(images=[ImageFile(b"GIF89a", url="http://example.org/")])]
    with pytest.raises(RequestError, match="not both"):
        fetch_images(both, is_allowed=True)
    many = [Item(images=[ImageFile(url="http://example.org/")]) for _ in range(17)]
    with pytest.raises(RequestError, match="more than"):
        fetch_images(many, is_allowed=True)
