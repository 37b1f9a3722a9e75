"""Keeps web pages from spending money: a browser sends their requests to loopback addresses, too."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import lru_cache
from http import HTTPStatus
from ipaddress import ip_address
from urllib.parse import urlsplit

from cacheserver.http.status import HttpError

_MOST_KNOWN = 256


class Guard:
    """Which requests may be served at all.

    With callers a token is needed, which no page of others can know. Without, whoever reaches the port may spend: then
    only requests to a name of ours are taken (a page could have its own name resolve to our address), and none that a
    page of another origin sends.
    """

    def __init__(self, *, has_callers: bool, is_open: bool, hosts: Iterable[str]) -> None:
        """`is_open`: the operator wants everybody who can connect to be served. `hosts` are further names of ours."""
        self._lets_all_in = has_callers or is_open
        self._hosts = {host.lower() for host in hosts}
        self._is_ours = lru_cache(_MOST_KNOWN)(self._leads_here)  # few are asked often

    def check(self, metadata: Mapping[str, str]) -> None:
        """Return if the request may be served.

        Raises:
            HttpError: 403.
        """
        if self._lets_all_in:
            return
        if not self._is_ours(f"//{metadata.get('host', '')}"):
            text = "This name is not one of server.http_hosts; set it there, or use the address itself."
            raise HttpError(HTTPStatus.FORBIDDEN, text, code="host_not_allowed")
        origin = metadata.get("origin")
        if origin is not None and not self._is_ours(origin):
            text = "Pages of other origins may not ask a service without callers; add [[callers]] and send a token."
            raise HttpError(HTTPStatus.FORBIDDEN, text, code="origin_not_allowed")

    def _leads_here(self, origin: str) -> bool:
        """Whether `origin` leads to this machine by an address or name of ours."""
        host = _host_of(origin)
        if host is None:
            return False
        try:
            return ip_address(host).is_loopback or host in self._hosts
        except ValueError:
            return host == "localhost" or host in self._hosts


def _host_of(origin: str) -> str | None:
    try:
        return urlsplit(origin).hostname
    except ValueError:
        return None
