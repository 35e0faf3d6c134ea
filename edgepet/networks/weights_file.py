"""Files of weights as tools write them, as tensors by name. Needs the ``train`` extra.

What a file is, its first bytes say and not its suffix: ``.pth``, ``.pth.tar``, ``.ckpt`` and ``.bin`` hold the same.
Nothing of it is executed: torch's restricted unpickler knows tensors, and what tools leave beside them is forgotten.
"""

from __future__ import annotations

import pickle
import struct
import warnings
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Collection, Mapping, Set
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias, cast

from edgepet.errors import InputError
from edgepet.files import require_regular
from edgepet.networks.weight_names import of_transformers, unwrapped

if TYPE_CHECKING:
    from torch import Tensor, nn

_Loaded: TypeAlias = Any  # what the unpickler made of a file from outside
_Allowed: TypeAlias = Callable[..., Any] | tuple[Callable[..., Any], str]  # as torch's ``safe_globals`` takes them

# Where tools keep the tensors: an average of the optimisation first, as timm chooses.
ENTRIES = (
    *("state_dict_ema", "model_ema", "ema_state_dict", "model_ema_state_dict", "ema_model", "params_ema", "ema"),
    *("teacher", "state_dict", "model_state_dict", "model_state", "model", "net", "network", "module"),
    *("weights", "params", "encoder"),
)
_DEEPEST = 4  # an entry in an entry, as {"ema": {"shadow": {...}}}
_MAGICS: tuple[tuple[bytes, str, str], ...] = (
    (b"version https://git-lfs", "is a Git LFS pointer, not the file", "git lfs pull"),
    (b"\x89HDF", "is an HDF5 file", "convert it to timm's names with torch, and save the state dict"),
    (b"\x1f\x8b", "is compressed with gzip", "unpack it, and pass the file inside"),
    (b"{", "is JSON, not weights", "pass the file that holds the tensors; join one that lies in several parts"),
    (b"<", "is a web page, not weights", "download the file itself"),
)
_TENSORS_ALONE = 'where it was made, write the tensors alone: torch.save(model.state_dict(), "weights.pth")'
_AGAIN = "download or copy it again, whole"
# What tools leave beside tensors, by package; of Python's own the types alone, which configurations name. None of it is
# imported or called: each becomes an empty stand-in.
_BESIDE = (
    *("argparse", "collections", "datetime", "numpy", "pathlib", "typing", "omegaconf", "yacs", "easydict"),
    *("lightning", "lightning_fabric", "pytorch_lightning", "mmengine", "ml_collections"),
)
_TYPES = frozenset(
    f"builtins.{kind.__name__}" for kind in (bool, int, float, str, bytes, list, tuple, dict, frozenset, object)
)
_USUAL = (  # of files that cannot be looked through
    *("argparse.Namespace", "numpy.core.multiarray.scalar", "numpy._core.multiarray.scalar", "numpy.dtype"),
    *("pathlib.PosixPath", "collections.defaultdict", "builtins.dict"),
)
_DICTS = ("AttributeDict", "EasyDict", "CfgNode", "ConfigDict")  # subclasses of dict: their keys are set one by one
# The unpickler's stack machine meets bytes from outside: a cut or foreign file ends in any of these.
_UNREADABLE = (
    pickle.UnpicklingError, RuntimeError, EOFError, OSError, ValueError, LookupError, TypeError, AttributeError,
    AssertionError, OverflowError, struct.error, ImportError,
)  # fmt: skip


class _StandIn:
    """Stands where a file names an object beside its tensors, and forgets all that it is given."""

    def __new__(cls, *_: object) -> _StandIn:
        return super().__new__(cls)

    def __init__(self, *_: object) -> None: ...

    def __setstate__(self, state: object) -> None: ...


def read_weights(file: Path, names: Set[str]) -> dict[str, Tensor]:
    """The tensors of a file as a network with these ``names`` calls them, as far as that is known; others keep theirs.

    Raises:
        InputError: as ``read_state``; or several networks of these names are in the file.
    """
    import torch

    state = read_state(file)
    respelled = of_transformers(state, names)
    if respelled is None:
        return unwrapped(state, names, str(file))
    for name, parts in respelled.items():
        if len({tuple(part.shape) for part in parts}) > 1:
            got = ", ".join(str(tuple(part.shape)) for part in parts)
            raise InputError(f"{file}: {name}", "needs query, key and value of one shape", got=got)
    return {name: torch.cat(parts) if len(parts) > 1 else parts[0] for name, parts in respelled.items()}


def pooling_of(state: Collection[str], names: Collection[str]) -> dict[str, object]:
    """What ``create_model`` needs for weights that were tuned with average pooling, where the network has none.

    timm's ViTs then have their last norm behind the pooling, as ``fc_norm``; so have those of MAE and BEiT.
    """
    behind, before = "fc_norm.weight", "norm.weight"
    pooled = behind in state and before not in state and before in names and behind not in names
    return {"global_pool": "avg"} if pooled else {}


def require_numbers(state: Mapping[str, Tensor], own: Mapping[str, Tensor], where: str) -> None:
    """Refuse integers where a network has fractions: they are codes of a quantisation, and no weights.

    Raises:
        InputError: there are some.
    """
    for name in state.keys() & own.keys():
        if own[name].is_floating_point() and not state[name].is_floating_point():
            fix = "pass the weights before they were quantised"
            got = str(state[name].dtype).removeprefix("torch.")
            raise InputError(f"{where}: {name}", "needs floating-point numbers", got=got, fix=fix)


def require_finite(module: nn.Module, where: str) -> None:
    """Refuse weights that hold NaN or infinity, of which no answer can be trusted.

    A bound without axes may be infinite: timm's clipped layers start with such.

    Raises:
        InputError: they do.
    """
    for name, tensor in module.state_dict().items():
        if not tensor.is_floating_point() or bool(tensor.isfinite().all()):
            continue
        wrong = ~tensor.isfinite()
        if tensor.ndim == 0 and not bool(tensor.isnan()):
            continue
        first = [int(axis) for axis in wrong.nonzero()[0]]
        got = f"{float(tensor[tuple(first)])} at {first}, {int(wrong.sum())} of {tensor.numel()} values"
        fix = "the weights are damaged, or of a training that diverged: get them again"
        raise InputError(f"{where}: {name}", "must be finite", got=got, fix=fix)


def read_state(file: Path) -> dict[str, Tensor]:
    """The tensors of a file, under the file's own names, on the CPU and as they are stored.

    Of several entries that hold weights the average (EMA) is taken, as timm does. What is no tensor is left out.

    Raises:
        InputError: there is no such file, it is no file of weights, cut short, or needs more than tensors to be read.
    """
    if file.is_dir():
        inside = sorted(
            path.name for path in file.iterdir() if path.suffix in (".safetensors", ".bin", ".pth", ".ckpt")
        )
        fix = f"pass the file: {file / inside[0]}" if inside else "pass the file that holds the tensors"
        raise InputError(str(file), "is a folder", fix=fix)
    require_regular(file)
    with file.open("rb") as opened:
        head = opened.read(64)
    if not head:
        raise InputError(str(file), "is empty", fix=_AGAIN)
    if head[8:9] == b"{" and head[:2] != b"\x80\x02":  # eight bytes of length, then JSON
        return _of_safetensors(file)
    if head[:4] == b"PK\x03\x04":
        return _named_tensors(_entry(_of_zip(file), str(file)), str(file))
    if head[:1] == b"\x80":
        return _named_tensors(_entry(_unpickled(file, mapped=False), str(file)), str(file))
    for magic, what, fix in _MAGICS:
        if head.lstrip().startswith(magic):
            raise InputError(str(file), what, fix=fix)
    fix = "pass what torch.save or safetensors wrote"
    raise InputError(str(file), "is no weights file that is known here", got=f"{head[:8]!r} first", fix=fix)


def _of_safetensors(file: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(file)
    except (SafetensorError, OSError, ValueError, KeyError, AttributeError) as error:
        got = str(error).partition("\n")[0]
        raise InputError(str(file), "is no whole safetensors file", got=got, fix=_AGAIN) from error


def _of_zip(file: Path) -> _Loaded:
    try:
        with zipfile.ZipFile(file) as archive:
            entries = archive.infolist()
    except (zipfile.BadZipFile, OSError, ValueError, RuntimeError) as error:  # RuntimeError: of no known version
        raise InputError(str(file), "is cut short or damaged", got=error, fix=_AGAIN) from error
    names = [entry.filename for entry in entries]
    if any(name.endswith("/constants.pkl") for name in names):
        fix = f'write its tensors alone: torch.save(torch.jit.load("{file.name}").state_dict(), "weights.pth")'
        raise InputError(str(file), "is a TorchScript program, which is not opened", fix=fix)
    if any(name.endswith(".npy") for name in names):
        fix = 'load it with timm\'s load_pretrained, then torch.save(model.state_dict(), "weights.pth")'
        raise InputError(str(file), "holds NumPy arrays, whose names are not those of torch", fix=fix)
    if not any(name.endswith("/data.pkl") for name in names):
        got = ", ".join(names[:3]) or "nothing"
        raise InputError(str(file), "is an archive of other files", got=got, fix="unpack it, and pass the file inside")
    return _unpickled(file, mapped=all(entry.compress_type == zipfile.ZIP_STORED for entry in entries))


def _unpickled(file: Path, *, mapped: bool) -> _Loaded:
    """What ``torch.save`` wrote; ``mapped`` reads tensors where they lie, which old and packed files do not allow."""
    import torch

    named, unknown = _stand_ins(file)
    if unknown:
        got = ", ".join(unknown[:3]) + (f" and {len(unknown) - 3} more" if len(unknown) > 3 else "")
        raise InputError(str(file), "needs classes to be read, and is not executed", got=got, fix=_TENSORS_ALONE)
    try:
        with warnings.catch_warnings(), torch.serialization.safe_globals(named), file.open("rb") as opened:
            warnings.simplefilter("ignore")  # of pickle protocols, and of storages that are typed
            mapped = mapped and file.suffix != ".safetensors"  # torch goes by this suffix, where it is given a name
            given = str(file) if mapped else opened
            return torch.load(given, map_location="cpu", weights_only=True, mmap=mapped)
    except _UNREADABLE as error:
        first = str(error).strip().partition("\n")[0]
        cut = isinstance(error, EOFError) or "unexpected EOF" in first or "ended" in first
        what, fix = ("is cut short", _AGAIN) if cut else ("cannot be read as weights alone", _TENSORS_ALONE)
        raise InputError(str(file), what, got=_reason(error), fix=fix) from error


def _reason(error: Exception) -> str:
    """What torch says was in the way, without its advice to switch the protection off."""
    text = " ".join(str(error).split())
    _, found, rest = text.partition("Unsupported global: GLOBAL ")
    if found:
        return rest.partition(" ")[0]
    _, found, rest = text.partition("WeightsUnpickler error: ")
    told = (rest if found else text).partition(" Check the documentation")[0]
    return told[:120].strip() or type(error).__name__


def _stand_ins(file: Path) -> tuple[list[_Allowed], list[str]]:
    """What the file names beside tensors: stand-ins for what tools leave there, and the names of all else."""
    import torch

    try:
        named = torch.serialization.get_unsafe_globals_in_checkpoint(str(file))
    except _UNREADABLE:  # files of the old format cannot be looked through: torch names what it meets
        named = list(_USUAL)
    known = [name for name in named if name.partition(".")[0] in _BESIDE or name in _TYPES]
    return [(_kind(name), name) for name in known], sorted(set(named) - set(known))


def _kind(name: str) -> Callable[..., Any]:
    """What stands for ``name``: something that keys can be set in, where it is a kind of dict."""
    if name == "collections.defaultdict":
        return lambda *_: {}
    return OrderedDict if name.rpartition(".")[2] in _DICTS else _StandIn


def _entry(loaded: _Loaded, where: str) -> Mapping[Any, Any]:
    """The innermost mapping that holds the weights."""
    for _ in range(_DEEPEST):
        if not isinstance(loaded, Mapping):
            kind = "one tensor" if _is_tensor(loaded) else f"a {type(loaded).__name__}"
            raise InputError(where, "must hold tensors by name", got=kind, fix=_TENSORS_ALONE)
        inner = {key: value for key, value in loaded.items() if isinstance(value, Mapping) and _holds(value)}
        chosen = next((key for key in ENTRIES if key in inner), None)
        if chosen is None and any(map(_is_tensor, loaded.values())):
            return loaded
        if chosen is None and len(inner) == 1:
            chosen = next(iter(inner))
        if chosen is None:
            held = ", ".join(map(str, [*inner] or [*loaded])) or "nothing"
            what = "holds several sets of tensors" if inner else "holds no tensors by name"
            raise InputError(where, what, got=held[:120], fix=_TENSORS_ALONE)
        loaded = inner[chosen]
    return cast("Mapping[Any, Any]", loaded)


def _holds(value: Mapping[Any, Any], deepest: int = _DEEPEST) -> bool:
    """Whether tensors lie in ``value`` under names; an optimiser has them under numbers."""
    named = [held for key, held in value.items() if isinstance(key, str)]
    return any(map(_is_tensor, named)) or (
        deepest > 0 and any(_holds(held, deepest - 1) for held in named if isinstance(held, Mapping))
    )


def _is_tensor(value: object) -> bool:
    import torch

    return isinstance(value, torch.Tensor)


def _named_tensors(entry: Mapping[Any, Any], where: str) -> dict[str, Tensor]:
    state: dict[str, Tensor] = {
        name: value.detach() for name, value in entry.items() if isinstance(name, str) and _is_tensor(value)
    }
    for name, tensor in state.items():
        if tensor.is_quantized or tensor.is_sparse or tensor.is_meta or str(tensor.layout) != "torch.strided":
            kind = "a quantised tensor" if tensor.is_quantized else "no values" if tensor.is_meta else "a sparse tensor"
            raise InputError(
                f"{where}: {name}", "needs a plain tensor", got=kind, fix="save the weights in fp32 or fp16"
            )
    return state
