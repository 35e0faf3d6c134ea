"""Who signed a pack: Ed25519 (RFC 8032) over the bytes of the file, with keys from a folder that its owner trusts.

docs/spec/pack-v1.md, "Signature", in code. A pack brings no key of its own: who can write a pack can write that
as well. Keys are PEM files, a private one PKCS #8 and a public one SubjectPublicKeyInfo, as openssl writes them.
"""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from edgepet.errors import CheckError, InputError, refusing, require
from edgepet.files import read_file, write_file
from edgepet.packs.container import UNSIGNED, signature_of, signed_bytes, with_signature

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

PUBLIC = ".pub"
MOST_KEYS, MOST_KEY_BYTES = 1024, 1 << 14  # of a trusted folder, and of one file of it


def make_keys(path: Path) -> Path:
    """Write a new private key to ``path``, for its owner alone to read, and its public key beside it as ``path``.pub.

    Returns:
        Where the public key is.

    Raises:
        InputError: one of them is there already, or cannot be written.
        MissingError: cryptography is not installed.
    """
    require("cryptography", extra="sign", purpose="making a key")
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    public = path.with_name(path.name + PUBLIC)
    for place in (path, public):
        if place.exists() or place.is_symlink():
            raise InputError(
                str(place), "is there already", fix="name another file: a key that is lost cannot be made again"
            )
    key = Ed25519PrivateKey.generate()
    private = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    with refusing(path, "could not be written"), open(path, "xb", opener=_for_its_owner) as file:
        file.write(private)
        file.flush()
        os.fsync(file.fileno())
    write_file(
        public,
        key.public_key().public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo),
    )
    return public


def sign(data: bytes, key: Path) -> bytes:
    """The pack ``data`` with the signature of the private key in the file ``key``; one that it had is replaced.

    Raises:
        PackError: it does not begin as a pack does.
        InputError: the file is no Ed25519 private key without a password.
        MissingError: cryptography is not installed.
    """
    require("cryptography", extra="sign", purpose="signing a pack")
    signature_of(data)
    return with_signature(data, _private(key).sign(signed_bytes(data)).hex())


@dataclass(frozen=True, slots=True)
class Signer:
    """Who signed a pack: the name of the key, its file's without .pub, and digits of the key itself."""

    name: str
    key: str


def signer(data: bytes, trusted: Path, where: str) -> str | None:
    """The name of the key in the folder ``trusted`` that signed the pack ``data``; as ``signed_with``."""
    found = signed_with(data, trusted, where)
    return None if found is None else found.name


def signed_with(data: bytes, trusted: Path, where: str) -> Signer | None:
    """The key in the folder ``trusted`` that signed the pack ``data``.

    Nothing of the pack but these bytes is looked at: no JSON is parsed.

    Returns:
        None where nobody has signed it.

    Raises:
        CheckError: none of these keys has signed what is there now.
        InputError: the folder or a key in it cannot be read.
        MissingError: it is signed, and cryptography is not installed.
    """
    digits = signature_of(data, where)
    if digits == UNSIGNED:
        return None
    require("cryptography", extra="sign", purpose=f"checking who signed {where}")
    from cryptography.exceptions import InvalidSignature

    keys = _keys(trusted)
    message, signature = signed_bytes(data), bytes.fromhex(digits)
    for name, key in keys.items():
        try:
            key.verify(signature, message)
        except InvalidSignature:
            continue
        return Signer(name, hashlib.sha256(key.public_bytes_raw()).hexdigest()[:16])
    what = "must be signed by a key that is trusted here, and be as it was then"
    raise CheckError(where, what, got=f"a signature of none of {len(keys)} keys in {trusted}")


def _for_its_owner(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)


def require_key(path: Path) -> None:
    """Refuse a file that is no key to sign with, before there is anything to sign; raises as ``sign`` does."""
    require("cryptography", extra="sign", purpose="signing a pack")
    _private(path)


def _keys(folder: Path) -> dict[str, Ed25519PublicKey]:
    with refusing(folder, "could not be read"):
        files = sorted(path for path in folder.iterdir() if path.suffix == PUBLIC)
    odd = [path for path in files if not path.name.isprintable()]
    if odd:
        raise InputError(str(folder), "needs keys whose names can be printed", got=repr(odd[0].name))
    if len(files) > MOST_KEYS:
        raise InputError(str(folder), f"may hold at most {MOST_KEYS} keys", got=len(files))
    return {path.stem: public_key(read_file(path), str(path)) for path in files}


def _private(path: Path) -> Ed25519PrivateKey:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
    from cryptography.hazmat.primitives.serialization import load_pem_private_key

    data = read_file(path)
    try:
        key = load_pem_private_key(data, password=None)
    except (ValueError, TypeError) as error:  # TypeError: it has a password
        fix = "make one with edgepet keygen"
        raise InputError(str(path), "needs a private key in PEM without a password", got=error, fix=fix) from error
    if not isinstance(key, Ed25519PrivateKey):
        raise InputError(str(path), "needs an Ed25519 key", got=type(key).__name__, fix="make one with edgepet keygen")
    return key


def public_key(data: bytes, where: str) -> Ed25519PublicKey:
    """The key in a PEM file's bytes.

    Raises:
        InputError: they are no Ed25519 public key.
        MissingError: cryptography is not installed.
    """
    require("cryptography", extra="sign", purpose="reading a key")
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
    from cryptography.hazmat.primitives.serialization import load_pem_public_key

    if len(data) > MOST_KEY_BYTES:
        raise InputError(where, "needs a public key in PEM", got=f"{len(data)} bytes")
    try:
        key = load_pem_public_key(data)
    except ValueError as error:
        raise InputError(where, "needs a public key in PEM", got=error) from error
    if not isinstance(key, Ed25519PublicKey):
        raise InputError(where, "needs an Ed25519 key", got=type(key).__name__)
    return key
