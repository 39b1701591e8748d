"""Checks whether a process listens at an address, by connecting to it."""

from __future__ import annotations

import trio

from mesh.ids import Address

CONNECT_CHECK_TIMEOUT_S = 1.0  # a host that is up refuses within a round trip; no answer proves nothing


async def is_refused(to: Address) -> bool | None:
    """Returns True when the host refused the connection, False when it was accepted, None without an answer or a route."""
    refused = None
    with trio.move_on_after(CONNECT_CHECK_TIMEOUT_S):
        try:
            stream = await trio.open_tcp_stream(*to)
        except OSError as error:
            refused = True if _all_refused(error) else None
        else:
            refused = False
            await trio.aclose_forcefully(stream)
    return refused


def _all_refused(error: BaseException) -> bool:
    """Returns whether all addresses of the host refused: one that did not refuse may be the peer's."""
    if isinstance(error, BaseExceptionGroup):
        return all(map(_all_refused, error.exceptions))
    return isinstance(error, ConnectionRefusedError) or (error.__cause__ is not None and _all_refused(error.__cause__))
