"""One small driver for each peer; all that the bench knows about it that is not data.

A server's driver is run as a program, `python -m compat.peers.NAME [ARGUMENT] FD`, and serves
`compat.app.build()` on the listening socket FD until SIGTERM. It also says which threads are its own:

    THREADS: str                          a regular expression for their names

A client's driver is imported by the app and says how to wait for somebody else with that client:

    fetch(url) -> bytes                   one whole answer
    stream(url) -> Iterator[bytes]        an answer, as it comes
    CALLS: Mapping[str, Callable]         by name, calls that block in different places
    close_idle() -> None                  close pooled connections that nobody uses
"""
