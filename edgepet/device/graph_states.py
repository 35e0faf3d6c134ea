"""What a generation keeps of a graph, and how it is spelled there."""

from __future__ import annotations

import re
from dataclasses import dataclass

from edgepet.graphs.base import BaseGraph
from edgepet.graphs.int8 import Int8Graph
from edgepet.graphs.manifest import SHA256
from edgepet.strict import ObjectReader

_GRAPH = re.compile(r"[0-9a-f]{16}/graph-[A-Za-z0-9_-]+\.json")


@dataclass(frozen=True, slots=True, kw_only=True)
class GraphState:
    """A graph: the digest of its description, which has those of its files.

    Of an int8 one also those of its ``codes``, and of its own ``ranges``, None where it has none. ``coming`` is the
    digest of a description that is just taking the place of this one: until it has, either may be there.
    """

    sha256: str
    codes: str | None = None
    ranges: str | None = None
    coming: str | None = None

    @property
    def digests(self) -> tuple[str, ...]:
        """Those that its description may have."""
        return (self.sha256,) if self.coming is None else (self.sha256, self.coming)


def state_of(graph: BaseGraph | Int8Graph, sha256: str) -> GraphState:
    """What a generation keeps of a graph whose description has this digest."""
    if isinstance(graph, Int8Graph):
        return GraphState(sha256=sha256, codes=graph.codes_sha256, ranges=graph.ranges_sha256)
    return GraphState(sha256=sha256)


def graph_json(graph: GraphState) -> dict[str, object]:
    """A graph as canonical JSON takes it; what few graphs have is there where they have it."""
    seldom = {"ranges": graph.ranges, "coming": graph.coming}
    given = {key: digest for key, digest in seldom.items() if digest is not None}
    return {"codes": graph.codes, "sha256": graph.sha256, **given}


def read_graph(table: ObjectReader, name: str) -> GraphState:
    """What ``graph_json`` made of a graph whose description has this name.

    Raises:
        InputError: it is none.
    """
    if _GRAPH.fullmatch(name) is None:
        raise table.refusal("", "needs the name of a graph's description", got=repr(name[:80]))
    made = GraphState(
        sha256=read_digest(table),
        codes=None if table.absent("codes") else table.text("codes"),
        ranges=read_digest(table, "ranges") if table.has("ranges") else None,
        coming=read_digest(table, "coming") if table.has("coming") else None,
    )
    table.end()
    return made


def read_digest(table: ObjectReader, key: str = "sha256") -> str:
    """The hex sha256 under ``key``.

    Raises:
        InputError: it is none.
    """
    text = table.text(key)
    if SHA256.fullmatch(text) is None:
        raise table.refusal(key, "needs 64 hex digits", got=repr(text[:80]))
    return text
