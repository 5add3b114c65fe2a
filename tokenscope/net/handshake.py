"""What a TLS handshake leaves behind when the connection ends just before it."""

from __future__ import annotations

import ssl
from typing import Any

__all__ = ["close_half_made"]


def close_half_made(error: BaseException) -> None:
    """Close the `ssl.SSLSocket` whose making ``error`` ended.

    Up to Python 3.12 ``wrap_socket`` closes what it has begun only if the handshake itself fails. When the
    connection is shut down a moment earlier, the half-made socket is open, and reachable through the frames
    of the exception alone; the peer would see no end, and the collector would warn. (Fixed in 3.13.)
    """
    trace = error.__traceback__
    while trace is not None:
        if trace.tb_frame.f_code is _making:
            made = trace.tb_frame.f_locals.get("self")
            if isinstance(made, ssl.SSLSocket):
                made.close()
        trace = trace.tb_next


_create: Any = ssl.SSLSocket._create  # type: ignore[attr-defined]  # noqa: SLF001 - compared, not called
_making = _create.__code__
