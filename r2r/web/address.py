"""Where the page may be served."""

from __future__ import annotations

import ipaddress
import socket

from r2r.errors import InputError


def check_address(host: str, port: int, password: str | None) -> None:
    """Raises InputError where others could reach the page without a password, and for an address that is not free."""
    try:
        found = {ipaddress.ip_address(one[4][0]) for one in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)}
    except (OSError, ValueError) as error:
        raise InputError(f"--host {host}: no address of this machine") from error
    if not password and not all(address.is_loopback for address in found):
        raise InputError(f"--host {host} lets others reach the page: give --password too")
    family = socket.AF_INET6 if all(address.version == 6 for address in found) else socket.AF_INET
    with socket.socket(family) as listening:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listening.bind((host, port))
        except (OSError, OverflowError) as error:
            reason = getattr(error, "strerror", None) or str(error)
            raise InputError(
                f"port {port} of {host} cannot be had ({reason}); choose another one with --port"
            ) from error
