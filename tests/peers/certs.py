"""Certificates for ``localhost`` and ``127.0.0.1``, from an authority made for this run."""

from __future__ import annotations

import functools
import ssl
import tempfile
from pathlib import Path

import trustme


class Authority:
    """A certificate authority and a server certificate of it.

    Attributes:
        ca_file: What a client passes as ``verify=``.
        server_context: For the server's side of a handshake.
    """

    def __init__(self) -> None:
        ca = trustme.CA()
        self._folder = tempfile.TemporaryDirectory(prefix="peers-", ignore_cleanup_errors=True)
        self.ca_file = str(Path(self._folder.name) / "ca.pem")
        ca.cert_pem.write_to_path(self.ca_file)
        self.server_context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        ca.issue_cert("localhost", "127.0.0.1").configure_cert(self.server_context)

    def close(self) -> None:
        """Delete the file."""
        self._folder.cleanup()


@functools.cache
def authority() -> Authority:
    """Return the authority of this process; keys take a while to make."""
    return Authority()
