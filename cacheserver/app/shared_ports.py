"""Ports that several processes listen on, and how connections are spread over them.

Linux hands a connection to the process that a hash of its addresses names, as a coin would: of 64 connections one of
two processes gets more than 38 every tenth time. A socket filter (SO_ATTACH_REUSEPORT_CBPF, see socket(7)) may choose
instead. Ours goes by the port the caller comes from. Linux gives those out in ascending order, in random steps of 2 to
16: so each stretch of 16 ports goes to one process, the next one to the next, and what one machine opens in a row is
split so unevenly once in a hundred times. Where the callers are many machines it is as good as the hash.
"""

from __future__ import annotations

import ctypes
import os
import socket
import stat
import struct
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import structlog

from cacheserver.errors import ConfigError

_log = structlog.get_logger(__name__)

_SO_ATTACH_REUSEPORT_CBPF = 51
_SO_ACCEPTCONN = 30
_NETWORK_HEADER = 0xFFF0_0000
"""SKF_NET_OFF: an offset from here on is one into the IP header."""

_LOAD_BYTE, _LOAD_HALF, _SHIFT_RIGHT, _MODULO = 0x30, 0x28, 0x74, 0x94
_JUMP, _JUMP_IF_EQUAL, _RETURN_IT = 0x05, 0x15, 0x16
_V4_BYTES, _V6_BYTES = 20, 40
"""Of the IP headers; behind them is the port the caller comes from. One with options is read wrong, and no worse."""

_STRETCH_BITS = 4

_FDS = Path("/proc/self/fd")


def reserve(host: str, port: int, *, setting: str) -> socket.socket:
    """Take a TCP port, 0 being any free one, for processes of ours to share: it is theirs while the socket is open.

    The socket does not listen, so no connection comes to it.

    Raises:
        ConfigError: another process has the port, or the address is not of this machine.
    """
    try:
        family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind) as probe:  # who shares a port takes it beside another who does, without a word
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
        taken = socket.socket(family, kind)
        taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        taken.bind(address)
    except OSError as error:
        raise ConfigError(
            f"server.{setting}_port: cannot listen on {host}:{port}: {error.strerror}; end what has it, or set another"
        ) from error
    return taken


def spread_connections(ports: set[int], *, processes: int) -> None:
    """Have connections to these ports, on which this process listens, spread over so many processes."""
    if sys.platform != "linux":
        return
    program = b"".join(struct.pack("HBBI", *each) for each in _program(processes))
    code = ctypes.create_string_buffer(program)
    option = struct.pack("HP", len(program) // 8, ctypes.addressof(code))
    for listening in _listening(ports):
        try:
            listening.setsockopt(socket.SOL_SOCKET, _SO_ATTACH_REUSEPORT_CBPF, option)
        except OSError as error:  # the system's own way stays
            _log.info("connections_spread_by_hash", error=error.strerror)


def _program(processes: int) -> list[tuple[int, int, int, int]]:
    return [
        (_LOAD_BYTE, 0, 0, _NETWORK_HEADER),
        (_SHIFT_RIGHT, 0, 0, 4),
        (_JUMP_IF_EQUAL, 0, 2, 6),
        (_LOAD_HALF, 0, 0, _NETWORK_HEADER + _V6_BYTES),
        (_JUMP, 0, 0, 1),
        (_LOAD_HALF, 0, 0, _NETWORK_HEADER + _V4_BYTES),
        (_SHIFT_RIGHT, 0, 0, _STRETCH_BITS),
        (_MODULO, 0, 0, processes),
        (_RETURN_IT, 0, 0, 0),
    ]


def _listening(ports: set[int]) -> Iterator[socket.socket]:
    """The sockets of this process that listen on these ports: grpc does not tell which are its."""
    for fd in [int(each.name) for each in _FDS.iterdir()]:
        with suppress(OSError):  # it was that of this very list
            if not stat.S_ISSOCK(os.fstat(fd).st_mode):
                continue
            with socket.socket(fileno=os.dup(fd)) as found:
                is_tcp = found.family in {socket.AF_INET, socket.AF_INET6} and found.type == socket.SOCK_STREAM
                if is_tcp and found.getsockopt(socket.SOL_SOCKET, _SO_ACCEPTCONN) and found.getsockname()[1] in ports:
                    yield found
