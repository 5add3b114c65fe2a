"""boto3's transfers of files, whose threads work under the token of the thread that asked for the transfer.

s3transfer works on threads of its own, which know no token, and takes a `BaseException` in one of them for nothing
at all: the transfer would look like a success. So each transfer gets a client of its own, a twin whose calls and
bodies run under the caller's token, and raise ``concurrent.futures.CancelledError``, s3transfer's own word. With it
s3transfer stops its other threads, gives up the parts that were uploaded, removes the half file, and joins; then
the caller raises what its token says.
"""

from __future__ import annotations

import contextlib
import functools
from concurrent.futures import CancelledError
from typing import TYPE_CHECKING, Any

from botocore.response import StreamingBody

from tokenscope._core import token as tokens
from tokenscope._core.current import current_token, shield, use_token
from tokenscope._core.errors import Cancelled
from tokenscope.integrations._binding import decide

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from tokenscope._core.token import CancellationToken

__all__ = ["make_transfers_cancellable"]

# What boto3 adds to its S3 clients.
_TRANSFERS = ("upload_file", "upload_fileobj", "download_file", "download_fileobj", "copy")


def make_transfers_cancellable(client: Any) -> None:
    """Have a client's transfers end with the token that is current where they are asked for. Idempotent."""
    for name in _TRANSFERS:
        plain = getattr(type(client), name, None)  # a client of botocore alone has none
        if plain is not None and name not in vars(client):
            setattr(client, name, _cancellable(client, plain))


def _cancellable(client: Any, plain: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(plain)
    def transfer(*args: Any, **kwargs: Any) -> Any:
        token = current_token()
        if token is tokens.NEVER:
            return plain(client, *args, **kwargs)
        token.check()
        try:
            return plain(_twin(client, token), *args, **kwargs)
        except Exception as error:
            decide(token, error)
            raise

    return transfer


def _twin(client: Any, token: CancellationToken) -> Any:
    """The same client, but that its calls work for this token on whatever thread they are made."""
    twin = object.__new__(type(client))
    vars(twin).update(vars(client))
    call = client._make_api_call  # noqa: SLF001 - one of the hooks

    def make_api_call(operation_name: str, api_params: Any) -> Any:
        with _in_words_of_futures(), use_token(token):
            if operation_name == "AbortMultipartUpload":  # s3transfer's cleanup, which is not to be cut with the rest
                with shield():
                    return call(operation_name, api_params)
            answer = call(operation_name, api_params)
        body = answer.get("Body")
        if isinstance(body, StreamingBody):
            body.read = _read(body.read)
        return answer

    twin._make_api_call = make_api_call
    return twin


def _read(read: Callable[..., bytes]) -> Callable[..., bytes]:
    def read_or_end(amt: int | None = None) -> bytes:
        with _in_words_of_futures():
            return read(amt)

    return read_or_end


@contextlib.contextmanager
def _in_words_of_futures() -> Iterator[None]:
    try:
        yield
    except Cancelled as error:
        raise CancelledError(str(error)) from error
