"""Addresses that a server listens at. No torch."""

from __future__ import annotations

import ipaddress
import socket

from tell.errors import TellError

LOCAL = frozenset({"127.0.0.1", "localhost", "::1"})


def is_local(host: str) -> bool:
    """Whether an address can be reached from this machine alone."""
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host == "localhost"


def bind(host: str, port: int) -> socket.socket:
    """A socket that listens at an address.

    Raises:
        TellError: it is no address of this machine, or in use.
    """
    try:
        family, *_, address = socket.getaddrinfo(host.strip("[]"), port, type=socket.SOCK_STREAM)[0]
        made = socket.socket(family)
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        # Connections inherit it: without it the body of an answer, and each event of a stream, waits 40 ms until the
        # client has acknowledged what came before. Event loops set it only on sockets that they make themselves.
        made.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        made.bind(address)
    except OSError as error:
        what = f"cannot listen at {host} port {port} ({error.strerror or error})"
        raise TellError(what, where="--port", remedy="Choose another port or host.") from error
    return made
