"""Signatures: whose key, over which bytes; and a store that takes only what a trusted key has signed."""

from __future__ import annotations

import stat
import sys
from pathlib import Path

import pytest

from edgepet import Device, inspect, keygen, pack, read_pack
from edgepet.device.store import Store
from edgepet.errors import CheckError, EdgepetError, InputError, MissingError, PackError
from edgepet.graphs.base import BaseGraph
from edgepet.packs.container import signature_of, with_signature
from edgepet.packs.pack import encode_pack
from edgepet.packs.signatures import sign, signer
from tests.flow import Tasks, edgepet, refused
from tests.packs import changed
from tests.tiny import make_delta

pytest.importorskip("cryptography", reason="needs the package cryptography")


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The private keys ``ours`` and ``theirs``, and the folder ``trusted`` with the public part of ours."""
    folder = tmp_path_factory.mktemp("keys")
    for name in ("ours", "theirs"):
        keygen(folder / name)
    (folder / "trusted").mkdir()
    (folder / "trusted" / "line-1.pub").write_bytes((folder / "ours.pub").read_bytes())
    return folder


def test_a_signed_pack_says_who_signed_it(keys: Path) -> None:
    plain = encode_pack(make_delta())
    data = sign(plain, keys / "ours")

    assert len(data) == len(plain)
    assert signer(data, keys / "trusted", "a.pet") == "line-1"
    assert signer(plain, keys / "trusted", "a.pet") is None
    assert read_pack(data).signature == signature_of(data) != read_pack(plain).signature
    assert sign(sign(plain, keys / "theirs"), keys / "ours") == data  # one replaces the other
    assert sign(data, keys / "ours") == data  # Ed25519 draws nothing


def test_openssl_reads_the_keys(keys: Path) -> None:
    from cryptography.hazmat.primitives.serialization import load_pem_private_key, load_pem_public_key

    private = load_pem_private_key((keys / "ours").read_bytes(), None)
    assert load_pem_public_key((keys / "ours.pub").read_bytes()) == private.public_key()
    if sys.platform != "win32":
        assert stat.S_IMODE((keys / "ours").stat().st_mode) == 0o600


NOBODY = "must be signed by a key that is trusted here, and be as it was then"


def test_another_key_and_a_changed_file_are_refused(keys: Path) -> None:
    data = sign(encode_pack(make_delta()), keys / "ours")
    others = {
        "another key": sign(data, keys / "theirs"),
        "another task": changed(data, lambda m, t: m.update(task="weeds")),
        "another sequence": changed(data, lambda m, t: m.update(sequence=9)),
        "another signature's digits": with_signature(data, "0" * 127 + "1"),
        "a byte more": data + b"\0",
    }
    for name, other in others.items():
        with pytest.raises(CheckError) as refusal:
            signer(other, keys / "trusted", "a.pet")
        assert str(refusal.value) == f"a.pet: {NOBODY}, got a signature of none of 1 keys in {keys / 'trusted'}", name


def test_no_json_is_parsed_before_the_signature_is_checked(keys: Path) -> None:
    data = bytearray(sign(encode_pack(make_delta()), keys / "ours"))
    data[400:420] = b"[" * 20

    with pytest.raises(CheckError):
        signer(bytes(data), keys / "trusted", "a.pet")


def test_every_bit_of_a_small_signed_pack_counts(keys: Path) -> None:
    data = sign(encode_pack(make_delta(classes=2, width=2)), keys / "ours")
    trusted = keys / "trusted"

    def takes(changed: bytes) -> bool:
        try:
            return signer(changed, trusted, "a.pet") is not None
        except EdgepetError:
            return False

    assert takes(data)
    for place in range(len(data)):
        for bit in range(8):
            flipped = bytearray(data)
            flipped[place] ^= 1 << bit
            assert not takes(bytes(flipped)), (place, bit)
    assert not any(takes(data[:length]) for length in range(len(data)))


def test_a_signature_in_another_spelling_is_none(keys: Path) -> None:
    data = sign(encode_pack(make_delta()), keys / "ours")

    with pytest.raises(PackError, match="needs a signature of 128 digits from 0 to f"):
        signer(with_signature(data, signature_of(data).upper()), keys / "trusted", "a.pet")


@pytest.mark.parametrize(("name", "content", "said"), [
    ("empty.pub", b"", "needs a public key in PEM, got "),
    ("long.pub", b"x" * 20_000, "needs a public key in PEM, got 20000 bytes"),
    ("text.pub", b"hello", "needs a public key in PEM, got "),
])  # fmt: skip
def test_a_file_that_is_no_key_is_named(name: str, content: bytes, said: str, keys: Path, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)

    with pytest.raises(InputError) as refusal:
        signer(sign(encode_pack(make_delta()), keys / "ours"), tmp_path, "a.pet")

    assert str(refusal.value).startswith(f"{tmp_path / name}: {said}")


def test_a_key_of_another_kind_signs_nothing(tmp_path: Path) -> None:
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric.ec import SECP256R1, generate_private_key

    pem = generate_private_key(SECP256R1()).private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    (tmp_path / "EC").write_bytes(pem)

    with pytest.raises(InputError) as refusal:
        sign(encode_pack(make_delta()), tmp_path / "EC")

    said = str(refusal.value)
    assert said.startswith(f"{tmp_path / 'EC'}: needs an Ed25519 key, got ")
    assert said.endswith("\n  fix: make one with edgepet keygen")


def test_a_key_is_never_written_over(keys: Path, tmp_path: Path) -> None:
    (tmp_path / "KEY.pub").write_text("mine")

    message = refused(3, "keygen", "-o", tmp_path / "KEY")

    assert message == (
        f"{tmp_path / 'KEY.pub'}: is there already\n  fix: name another file: a key that is lost cannot be made again\n"
    )
    assert [path.name for path in tmp_path.iterdir()] == ["KEY.pub"]


def test_without_cryptography_a_signature_is_not_passed_over(keys: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data, plain = sign(encode_pack(make_delta()), keys / "ours"), encode_pack(make_delta())
    monkeypatch.setitem(sys.modules, "cryptography", None)

    with pytest.raises(MissingError) as missing:
        signer(data, keys / "trusted", "a.pet")

    assert "checking who signed a.pet: needs the package 'cryptography'" in str(missing.value)
    assert str(missing.value).endswith("fix: pip install 'edgepet[sign]'")
    assert signer(plain, keys / "trusted", "a.pet") is None
    assert missing.value.exit_code == 5


# -------------------------------------------------------------------------------------------------------- verbs, store


def test_pack_signs_and_numbers_and_inspect_says_so(tasks: Tasks, keys: Path, tmp_path: Path) -> None:
    made = edgepet(
        "pack", tasks.shapes, "--sign", keys / "ours", "--sequence", 7, "-o", tmp_path / "s.pet", "--json"
    ).json

    assert (made["signed"], made["sequence"], made["max_abs_diff"], made["n"], made["top1_drop"]) == (
        True,
        7,
        0.0,
        0,
        None,
    )
    said = edgepet("inspect", tmp_path / "s.pet", "--trusted", keys / "trusted", "--json").json
    assert (said["signed_by"], said["signed"], said["sequence"]) == ("line-1", True, 7)
    said = edgepet("inspect", tmp_path / "s.pet", "--json").json
    assert (said["signed_by"], said["signed"]) == (None, True)
    said = edgepet("inspect", tasks.shapes, "--trusted", keys / "trusted", "--json").json
    assert (said["signed_by"], said["signed"], said["sequence"]) == (None, False, 0)
    (tmp_path / "others").mkdir()
    message = refused(4, "inspect", tmp_path / "s.pet", "--trusted", tmp_path / "others")
    assert message == f"s.pet: {NOBODY}, got a signature of none of 0 keys in {tmp_path / 'others'}\n"
    assert inspect(tmp_path / "s.pet", trusted=keys / "trusted").signed_by == "line-1"


@pytest.fixture
def store(graph: BaseGraph, keys: Path, tmp_path: Path) -> Path:
    """A store with the backbone, which trusts our key."""
    Store(tmp_path / "store").add_graph(graph)
    (tmp_path / "store" / "trusted").mkdir()
    (tmp_path / "store" / "trusted" / "ours.pub").write_bytes((keys / "ours.pub").read_bytes())
    return tmp_path / "store"


def signed(tasks: Tasks, keys: Path, folder: Path, sequence: int, key: str = "ours") -> Path:
    output = folder / f"{key}-{sequence}.pet"
    pack(tasks.shapes, output, key=keys / key, sequence=sequence)
    return output


def test_a_store_that_trusts_keys_takes_what_they_signed_and_nothing_else(
    store: Path, tasks: Tasks, keys: Path, tmp_path: Path
) -> None:
    device = Device(store)

    assert device.install(signed(tasks, keys, tmp_path, 3)).sequence == 3
    with pytest.raises(CheckError) as refusal:
        device.install(tasks.shapes)
    assert str(refusal.value) == (
        f"shapes.pet: must be signed by a key in {store / 'trusted'}, got no signature\n  fix: edgepet pack --sign"
    )
    with pytest.raises(CheckError, match="signature of none of 1 keys"):
        device.install(signed(tasks, keys, tmp_path, 9, "theirs"))
    assert Store(store).pack("shapes").sequence == 3


def test_an_older_pack_of_the_same_signer_is_refused_unless_told(
    store: Path, tasks: Tasks, keys: Path, tmp_path: Path
) -> None:
    device = Device(store)
    device.install(signed(tasks, keys, tmp_path, 5))
    device.install(signed(tasks, keys, tmp_path, 6))
    older = signed(tasks, keys, tmp_path, 4)

    with pytest.raises(CheckError) as refusal:
        device.install(older)

    assert str(refusal.value) == (
        "task 'shapes': must not be older than what was installed before, which had the sequence number 6, got 4\n"
        "  fix: install it with `older=True` if that is meant"
    )
    assert device.install(older, older=True).sequence == 4
    assert Store(store).pack("shapes").sequence == 4
