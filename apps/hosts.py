"""Under which names a server answers.

A page of another site can give its own name the address of this machine (DNS rebinding): to the browser, what answers
there is then that site. The name stands in `Host`, and the site that asks in `Origin`; a page can forge neither.
Gradio's CORS says which sites may read an answer. It does not look at `Host`, and what a request does is then done.
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
"""Stands for every name: the check is off."""
_NAME = re.compile(r"[a-z0-9_]([a-z0-9_.-]{0,252}[a-z0-9_])?")
_HOST = re.compile(r"(\[[0-9a-f:.]{2,45}\]|[^\s:/?#@\[\]\\]{1,253})(:[0-9]{1,5})?")
_REFUSED = "this server does not answer under that name: use its address, or start it with --allow-host NAME"
_OTHER_SITE = "a page of another site may not use this server"


def is_own(host: str) -> bool:
    """Whether an address, or a name, is the loopback of this machine."""
    address = _address(host)
    return host.lower() == "localhost" if address is None else address.is_loopback


@dataclass(frozen=True, kw_only=True, slots=True)
class Names:
    """The names of a server."""

    host: str
    """Address at which it listens."""
    allowed: Sequence[str] = ()
    """Further names, as of a proxy or a Space before it; `ANY` among them allows every one."""

    def refused(self, headers: Iterable[tuple[bytes, bytes]]) -> str | None:
        """Return why a request goes no further, as its head tells; None where it may go on.

        - `Host` is localhost or a loopback address, `host`, or one of `allowed`. Of a server that other machines reach
          also any address and the name of this machine: an address cannot be made to lead elsewhere.
        - `Origin`, where there is one, is what `Host` says, its port included, or one of `allowed`.

        The port of `Host` is free, as behind a forwarded one it is another.

        Args:
            headers: of ASGI, names in lower case.
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
    """Hold names to what a browser can send as a host.

    Raises:
        UserError: the first that is none.
    """
    for name in names:
        if name != ANY and _address(name) is None and not _NAME.fullmatch(name.lower()):
            raise UserError(
                f"allow_host takes a name or an address without scheme, port or path, as app.example.org, or {ANY}"
                f" for all, got {shown(name)}"
            )


def _address(host: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    try:
        return ipaddress.ip_address(host.strip("[]"))
    except ValueError:
        return None
