"""What the network that PEFT adapted calls a backbone's tensors: by timm's names, below a prefix, or by transformers'.

An adapter is lowered under the names of its own network, and its updates are moved to the backbone's after that: what
was done to transformers' ``query`` happens to the first third of the rows of timm's ``qkv``.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from edgepet.deltas.updates import Push, Targeted
from edgepet.errors import InputError, option
from edgepet.networks.weight_names import Part, prefixes, transformers_names
from edgepet.peft.adapter import Adapter
from edgepet.peft.reading import Lowered, by_module
from edgepet.spec import NpArray, Site, Target, Tensors

_THIRDS = 3  # of a fused weight: query, key and value
_FOREIGN = re.compile(r"(?:^|\.)(?:encoder\.)?layers?\.\d+\.|(?:^|\.)(?:query|key|value|[qkvo]_proj)$")


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Naming:
    """A backbone as another network names it: what ``lower`` takes, and the way back.

    ``parts`` are the tensors' names there -> here, of transformers' the classifier's too; ``tensors`` has their values,
    ``layers`` and ``classifiers`` its layers. ``prefix`` stands before timm's own names, None where they are others.
    """

    parts: Mapping[str, Part]
    tensors: Tensors
    layers: Sequence[Site]
    classifiers: Sequence[str]
    prefix: str | None

    def moved(self, lowered: Lowered) -> Lowered:
        """``lowered`` with its updates on the backbone's tensors, or on their thirds."""
        return replace(lowered, updates=tuple(self._moved(targeted) for targeted in lowered.updates))

    def _moved(self, targeted: Targeted) -> Targeted:
        update = targeted.update
        if isinstance(update, Push):
            update = replace(update, reads=self._place(update.reads))
        return Targeted(self._place(targeted.target), update)

    def _place(self, target: Target) -> Target:
        part = self.parts[target.tensor]
        if part.part is None:
            return replace(target, tensor=part.name)
        rows = len(self.tensors[target.tensor])
        first, last = target.rows or (0, rows)
        begin = part.part * rows
        return replace(target, tensor=part.name, rows=(begin + first, begin + last))


def naming_of(adapter: Adapter, base: Tensors, layers: Sequence[Site], classifiers: Sequence[str]) -> Naming:
    """How the network that ``adapter`` was tuned on names the backbone.

    Args:
        base: the backbone's tensors; they are not modified.
        layers: of the backbone, as ``Backbone.layers``.
        classifiers: the layers behind it.

    Raises:
        InputError: it is another library's network, of names that are not known here.
    """
    modules, saved = by_module(adapter)
    ours = {site.name for site in layers}
    prefix = _prefix(modules, ours | set(classifiers))
    if prefix is not None:
        return _below(prefix, base, layers, classifiers)
    if len(classifiers) == 1:
        theirs = [*(f"{name}.weight" for name in modules), *saved]
        parts = transformers_names(theirs, [*base], classifiers[0])
        if parts:
            return _respelled(parts, base, layers, classifiers[0])
    strangers = sorted(name for name in modules if name not in ours and _FOREIGN.search(name))
    if strangers:
        what = "is no layer of the backbone by timm's names, by transformers' of a ViT or DINOv2, or below one prefix"
        fix = f"pass the {option('backbone')} that it was tuned on; or tune timm's model, or transformers' TimmWrapper"
        raise InputError(f"{adapter.where}: {strangers[0]}", what, fix=fix)
    return _below("", base, layers, classifiers)


def _prefix(modules: Mapping[str, object], ours: set[str]) -> str | None:
    """What stands before a layer's name in all ``modules``; "" where it is nothing, None where there is no such."""
    common: set[str] | None = None
    for module in modules:
        found = set(prefixes(module, ours))
        common = found if common is None else common & found
    return min(common, key=len) if common else None


def _below(prefix: str, base: Tensors, layers: Sequence[Site], classifiers: Sequence[str]) -> Naming:
    def there(name: str | None) -> str | None:
        return None if name is None else f"{prefix}{name}"

    return Naming(
        parts={f"{prefix}{name}": Part(name) for name in base},
        tensors={f"{prefix}{name}": tensor for name, tensor in base.items()},
        layers=[
            replace(
                site, name=f"{prefix}{site.name}", weight=f"{prefix}{site.weight}",
                bias=there(site.bias), mean=there(site.mean),
            )
            for site in layers
        ],
        classifiers=[f"{prefix}{name}" for name in classifiers],
        prefix=prefix,
    )  # fmt: skip


def _respelled(parts: Mapping[str, Part], base: Tensors, layers: Sequence[Site], head: str) -> Naming:
    tensors = {theirs: _values(part, base) for theirs, part in parts.items() if part.name in base}
    return Naming(
        parts=parts,
        tensors=tensors,
        layers=[site for given in layers for site in _as_parts(given, parts, tensors)],
        classifiers=[theirs.removesuffix(".weight") for theirs, part in parts.items() if part.name == f"{head}.weight"],
        prefix=None,
    )


def _values(part: Part, base: Tensors) -> NpArray:
    whole = base[part.name]
    rows = len(whole) // _THIRDS
    return whole if part.part is None else whole[part.part * rows : (part.part + 1) * rows]


def _as_parts(site: Site, parts: Mapping[str, Part], tensors: Tensors) -> Iterator[Site]:
    """A layer as one or three of the other network's."""
    for theirs, part in parts.items():
        if part.name == site.weight and theirs in tensors:
            module = theirs.removesuffix(".weight")
            bias = f"{module}.bias" if f"{module}.bias" in tensors else None
            rows = len(tensors[theirs])
            yield replace(site, name=module, weight=theirs, bias=bias, out_features=rows, blocks=())
