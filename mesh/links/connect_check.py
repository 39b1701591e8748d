"""Checks whether a process listens at an address, by its host's answer to a connection."""

from __future__ import annotations

import trio

from mesh.ids import Address

KNOCK_TIMEOUT_S = 1.0  # a host that is up refuses within a round trip; more is silence, which proves nothing


async def is_refused(to: Address) -> bool | None:
    """True: the host at `to` refused the connection. False: it was accepted. None: silence, or no route."""
    refused = None
    with trio.move_on_after(KNOCK_TIMEOUT_S):
        try:
            stream = await trio.open_tcp_stream(*to)
        except OSError as error:
            refused = True if _all_refused(error) else None
        else:
            refused = False
            await trio.aclose_forcefully(stream)
    return refused


def _all_refused(error: BaseException) -> bool:
    """A host name may stand for several addresses: one that did not refuse may be the peer's."""
    if isinstance(error, BaseExceptionGroup):
        return all(map(_all_refused, error.exceptions))
    return isinstance(error, ConnectionRefusedError) or (error.__cause__ is not None and _all_refused(error.__cause__))
