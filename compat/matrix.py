"""matrix.toml, read and checked: peers, and the cells that they make."""

from __future__ import annotations

import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping

FILE = Path(__file__).parent / "matrix.toml"

#: Kinds of peers whose story needs no app: it is told to their drivers directly.
ALONE = {"database", "service", "suite"}

#: A version that is not pinned.
LATEST = "latest"


@dataclass(frozen=True)
class Limit:
    """A step that cannot be told to a peer, and why."""

    step: str
    reason: str
    link: str


@dataclass(frozen=True)
class Deviation:
    """Tests of somebody else's that fail with tokenscope in between, and why that is right."""

    tests: tuple[str, ...]
    reason: str


@dataclass(frozen=True)
class Peer:
    """Other people's software.

    Each of its `runs` has versions (package -> exact version or `LATEST`) and the Pythons to run them under.
    """

    name: str
    kind: str
    driver: tuple[str, ...]
    runs: tuple[tuple[dict[str, str], tuple[str, ...]], ...]
    limits: tuple[Limit, ...] = ()
    needs: tuple[str, ...] = ()
    service: str = ""
    beside: tuple[str, ...] = ()
    deviations: tuple[Deviation, ...] = ()

    @property
    def quick(self) -> bool:
        """Whether its cells are for every day: pip can install all of it, and it takes seconds."""
        return not self.needs and self.kind != "suite"

    @property
    def packages(self) -> tuple[str, ...]:
        """What pip installs for it."""
        return tuple(dict.fromkeys(package for versions, _pythons in self.runs for package in versions))


@dataclass(frozen=True)
class Cell:
    """One peer, in one set of versions, under one Python. `requirements`: all that its environment holds."""

    peer: Peer
    versions: Mapping[str, str]
    python: str
    requirements: Mapping[str, str]

    @property
    def key(self) -> str:
        """Its name, which no other cell has."""
        pins = "".join(f" {package}={version}" for package, version in self.versions.items())
        return f"{self.peer.name}{pins} on {self.python}"

    def answers_to(self, name: str) -> bool:
        """Whether `--only name` means this cell."""
        return name in {self.peer.name, self.peer.driver[0], *self.versions}


@dataclass(frozen=True)
class Matrix:
    """The whole file."""

    server: Peer
    client: Peer
    packages: tuple[str, ...]
    peers: tuple[Peer, ...]

    @property
    def cells(self) -> list[Cell]:
        """All cells, in the order of the file."""
        return [
            Cell(peer, versions, python, self._requirements(peer, versions))
            for peer in self.peers
            for versions, pythons in peer.runs
            for python in pythons
        ]

    def _requirements(self, peer: Peer, versions: Mapping[str, str]) -> dict[str, str]:
        """A server's cell also holds the client in its latest version, and the other way round."""
        if peer.kind in ALONE:
            return {**versions, **dict.fromkeys(peer.beside, LATEST)}
        other = self.client if peer.kind == "server" else self.server
        return {
            **dict.fromkeys(self.packages, LATEST),
            **dict.fromkeys(other.packages, LATEST),
            **versions,
        }

    def played(self, cell: Cell) -> tuple[Peer, Peer]:
        """Return who serves and who is the client in this cell."""
        return (cell.peer, self.client) if cell.peer.kind == "server" else (self.server, cell.peer)


def load(path: Path = FILE) -> Matrix:
    """Read the file.

    Raises:
        ValueError: It contradicts itself; the message says where.
    """
    data = tomllib.loads(path.read_text(encoding="utf-8"))
    peers = {peer.name: peer for peer in map(_peer, data["peer"])}
    if len(peers) != len(data["peer"]):
        raise ValueError("two peers have the same name")
    bench = data["bench"]
    matrix = Matrix(peers[bench["server"]], peers[bench["client"]], tuple(bench["packages"]), tuple(peers.values()))
    keys = [cell.key for cell in matrix.cells]
    if twice := {key for key in keys if keys.count(key) > 1}:
        raise ValueError(f"cells that are there twice: {', '.join(sorted(twice))}")
    return matrix


def _peer(row: dict[str, Any]) -> Peer:
    kinds = {"server", "client", *ALONE}
    if row["kind"] not in kinds:
        raise ValueError(f"{row['name']}: a peer's kind is one of {', '.join(sorted(kinds))}, not {row['kind']}")
    return Peer(
        name=row["name"],
        kind=row["kind"],
        driver=tuple(row["driver"]),
        runs=tuple((dict(run["versions"]), tuple(run["python"])) for run in row["runs"]),
        limits=tuple(Limit(**limit) for limit in row.get("limit", ())),
        needs=tuple(row.get("needs", ())),
        service=row.get("service", ""),
        beside=tuple(row.get("beside", ())),
        deviations=tuple(Deviation(tuple(found["tests"]), found["reason"]) for found in row.get("deviation", ())),
    )
