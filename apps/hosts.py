"""Check of the host name and the origin of requests, against DNS rebinding and requests from other sites.

With DNS rebinding another site points its own domain name to the address of this machine; the browser then treats this
server as a part of that site. The header `Host` contains the domain name, and `Origin` contains the site that sends a
request; a page in a browser can forge neither. Gradio's CORS rules are not enough: they do not check `Host`, and they
limit who may read the response, not what the request does.
"""

from __future__ import annotations

import ipaddress
import re
import socket
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from urllib.parse import urlsplit

from postgen.errors import UserError, shown

ANY = "*"
"""Value of `--allow-host` that accepts every name and disables the check."""
_NAME = re.compile(r"[a-z0-9_]([a-z0-9_.-]{0,252}[a-z0-9_])?")
_HOST = re.compile(r"(\[[0-9a-f:.]{2,45}\]|[^\s:/?#@\[\]\\]{1,253})(:[0-9]{1,5})?")
_REFUSED = "this server does not accept that host name: use its IP address, or start it with --allow-host NAME"
_OTHER_SITE = "a page of another site may not use this server: open the page of the server itself"


def is_own(host: str) -> bool:
    """Whether an address or a name is a loopback address of this machine."""
    address = _address(host)
    return host.lower() == "localhost" if address is None else address.is_loopback


@dataclass(frozen=True, kw_only=True, slots=True)
class Names:
    """The host names that a server accepts."""

    host: str
    """Address on which the server listens."""
    allowed: Sequence[str] = ()
    """Further names, such as the name of a reverse proxy or a Space; `ANY` accepts every name."""

    def refused(self, headers: Iterable[tuple[bytes, bytes]]) -> str | None:
        """Return the reason to refuse a request, or None to accept it.

        - `Host` must be localhost, a loopback address, `host`, or one of `allowed`. A server that other machines can
          reach also accepts any IP address and the name of this machine: DNS rebinding needs a domain name, so an IP
          address is safe.
        - `Origin`, if present, must equal `Host` including the port, or be one of `allowed`.

        `Host` may have any port, because a forwarded port differs from the port of the server.

        Args:
            headers: headers of the ASGI request, names in lower case.
        """
        if ANY in self.allowed:
            return None
        found: dict[bytes, list[str]] = {b"host": [], b"origin": []}
        for key, value in headers:
            if key in found:
                found[key].append(value.decode("latin-1").lower())
        hosts, origins = found.values()
        match = _HOST.fullmatch(hosts[0]) if len(hosts) == 1 else None
        if match is None or not self._known(match[1]):
            return _REFUSED
        if origins and (len(origins) > 1 or not self._same_site(origins[0], hosts[0])):
            return _OTHER_SITE
        return None

    def _known(self, name: str) -> bool:
        own = self.host.lower()
        if name.strip("[]") in {own.strip("[]"), *(each.lower().strip("[]") for each in self.allowed)}:
            return True
        if is_own(own):
            return is_own(name)
        return is_own(name) or _address(name) is not None or name == socket.gethostname().lower()

    def _same_site(self, origin: str, host: str) -> bool:
        try:
            parts = urlsplit(origin)
        except ValueError:
            return False
        if parts.netloc == host:
            return True
        match = _HOST.fullmatch(parts.netloc)
        return match is not None and match[1].strip("[]") in {each.lower().strip("[]") for each in self.allowed}


def check_names(names: Sequence[str]) -> None:
    """Check that a browser can send each name in the header `Host`.

    Raises:
        UserError: a name is not valid; the message is about the first one.
    """
    for name in names:
        if name != ANY and _address(name) is None and not _NAME.fullmatch(name.lower()):
            raise UserError(
                f"allow_host takes a name or an address without scheme, port or path, such as app.example.org, or"
                f" {ANY} for all names, got {shown(name)}"
            )


def _address(host: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    try:
        return ipaddress.ip_address(host.strip("[]"))
    except ValueError:
        return None
