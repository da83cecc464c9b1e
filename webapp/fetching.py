"""Images that a request names by their address, fetched in its caller's stead where the operator allows it.

How no private place is reached: a name is resolved once, every address that it has must be public, the connection goes
to the address that was looked at and not to the name again, and each redirect is a new address. Nothing of the
environment takes part: no proxy, no cookie, no credentials. Bounded in bytes, redirects and time.
"""

import socket
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from ipaddress import IPv4Address, IPv6Address, ip_address, ip_network
from time import monotonic
from typing import Any, Final, TypeAlias
from urllib.parse import SplitResult, urljoin, urlsplit

import httpx

from common.errors import RequestError

Address: TypeAlias = IPv4Address | IPv6Address

TIMEOUT_S: Final = 10.0
"""For all addresses of one request together."""
SILENCE_S: Final = 3.0
MAX_REDIRECTS: Final = 3
MAX_LENGTH: Final = 2000
PORTS: Final[Mapping[str, int]] = {"http": 80, "https": 443}
"""And no others: a caller shall not learn what else listens where."""
_HIDING: Final = tuple(map(ip_network, ("64:ff9b::/96", "64:ff9b:1::/48", "2002::/16", "2001::/32")))
"""IPv6 addresses that stand for IPv4 ones, public or not."""


def is_public(address: Address) -> bool:
    """Whether an address belongs to the internet at large."""
    if isinstance(address, IPv6Address):
        if address.ipv4_mapped is not None:
            return is_public(address.ipv4_mapped)
        if any(address in network for network in _HIDING):
            return False
    return address.is_global and not address.is_multicast and not address.is_reserved


@dataclass(frozen=True, slots=True)
class Fetcher:
    """Fetches for one request, until ``deadline`` (monotonic).

    ``may_reach`` says which addresses may be connected to, ``ports`` at which port for which scheme, and ``resolve``
    finds the addresses of a name.
    """

    deadline: float
    may_reach: Callable[[Address], bool] = is_public
    ports: Mapping[str, int] = field(default_factory=lambda: PORTS)
    resolve: Callable[..., Sequence[Any]] = socket.getaddrinfo

    def fetch(self, url: str, *, max_bytes: int, param: str) -> bytes:
        """What stands under an address.

        Raises:
            RequestError: the address may not be fetched, does not answer in time, or gives more than ``max_bytes``.
        """
        try:
            # trust_env: proxies and credentials of this process are not the caller's
            with httpx.Client(trust_env=False, follow_redirects=False) as client:
                for _ in range(MAX_REDIRECTS + 1):
                    found = self._get(client, url, max_bytes, param)
                    if isinstance(found, bytes):
                        return found
                    url = urljoin(url, found)
        except (httpx.HTTPError, httpx.InvalidURL, OSError, UnicodeError) as error:
            raise RequestError(f"the address does not answer ({type(error).__name__})", param=param) from error
        raise RequestError(f"the address redirects more than {MAX_REDIRECTS} times", param=param)

    def _get(self, client: httpx.Client, url: str, max_bytes: int, param: str) -> bytes | str:
        """What stands there, or the place it redirects to."""
        parts = self._parts(url, param)
        host = parts.hostname or ""
        address = self._resolve(host, parts.port or PORTS[parts.scheme], param)
        place = f"[{address}]" if isinstance(address, IPv6Address) else str(address)
        port = f":{parts.port}" if parts.port else ""
        target = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
        request = client.build_request(
            "GET",
            f"{parts.scheme}://{place}{port}{target}",
            headers={"Host": f"{host}{port}", "Accept-Encoding": "identity", "User-Agent": "farmhand"},
            extensions={"sni_hostname": host},  # TLS checks the certificate against the name
            timeout=min(SILENCE_S, self._left_s(param)),
        )
        response = client.send(request, stream=True)
        try:
            if response.has_redirect_location:
                return response.headers["Location"]
            if response.status_code != httpx.codes.OK:
                raise RequestError(f"the address answers with status {response.status_code}", param=param)
            return self._read(response, max_bytes, param)
        finally:
            response.close()

    def _read(self, response: httpx.Response, max_bytes: int, param: str) -> bytes:
        content = bytearray()
        for chunk in response.iter_raw():
            content += chunk
            if len(content) > max_bytes:
                raise RequestError(f"what stands there is larger than {max_bytes} bytes", param=param)
            self._left_s(param)
        return bytes(content)

    def _parts(self, url: str, param: str) -> SplitResult:
        try:
            parts = urlsplit(url)
            is_right = parts.port in (None, self.ports.get(parts.scheme))
        except ValueError as error:
            raise RequestError("this is no address", param=param) from error
        if len(url) > MAX_LENGTH or parts.scheme not in PORTS or not parts.hostname or not is_right:
            raise RequestError("an address is http or https, at the usual port, and not too long", param=param)
        if parts.username is not None or parts.password is not None:
            raise RequestError("an address holds no credentials", param=param)
        return parts

    def _resolve(self, host: str, port: int, param: str) -> Address:
        """The address of a host; one that is not public forbids them all."""
        found = {entry[4][0] for entry in self.resolve(host, port, type=socket.SOCK_STREAM)}
        addresses = [ip_address(str(one).partition("%")[0]) for one in sorted(map(str, found))]
        if not addresses or not all(map(self.may_reach, addresses)):
            raise RequestError("the address leads to a place that is not public", param=param)
        return addresses[0]

    def _left_s(self, param: str) -> float:
        left_s = self.deadline - monotonic()
        if left_s <= 0:
            raise RequestError(f"fetching takes longer than {TIMEOUT_S:g} s", param=param)
        return left_s
