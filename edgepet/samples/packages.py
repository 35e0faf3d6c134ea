"""Files that ordinary packages carry: read out of what is installed, known by their digest."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from edgepet.errors import InputError, MissingError
from edgepet.files import read_file


@dataclass(frozen=True, slots=True)
class PackageFile:
    """``path`` as the wheel's RECORD has it; ``digest`` is 16 hex digits of its sha256, to know another release by."""

    package: str
    version: str
    path: str
    digest: str

    def read(self, *, purpose: str) -> bytes:
        """The installed bytes; MissingError without the package, InputError where they are not this release's."""
        try:
            found = metadata.distribution(self.package)
        except metadata.PackageNotFoundError as error:
            fix = "pip install 'edgepet[demo]'"
            raise MissingError(purpose, f"needs the package {self.package!r}", got=str(error), fix=fix) from error
        content = read_file(Path(str(found.locate_file(self.path))))
        digest = hashlib.sha256(content).hexdigest()[:16]
        if digest != self.digest:
            what = f"needs {self.path} of {self.package} {self.version}, sha256:{self.digest}"
            fix = f"pip install --force-reinstall '{self.package}=={self.version}'"
            raise InputError(purpose, what, got=f"sha256:{digest} of {found.version}", fix=fix)
        return content


@dataclass(frozen=True, slots=True)
class DebianFile:
    """A file of an installed Debian package; ``digest`` as of a ``PackageFile``."""

    package: str
    version: str
    path: str
    digest: str

    def read(self, *, purpose: str) -> bytes:
        """The installed bytes; MissingError without the package, InputError where they are not this release's."""
        path, fix = Path(self.path), f"apt-get install {self.package}"
        if not path.is_file():
            raise MissingError(purpose, f"needs the Debian package {self.package!r}", got=f"no {path}", fix=fix)
        content = read_file(path)
        digest = hashlib.sha256(content).hexdigest()[:16]
        if digest != self.digest:
            what = f"needs {path} of {self.package} {self.version}, sha256:{self.digest}"
            raise InputError(purpose, what, got=f"sha256:{digest}", fix=f"{fix}={self.version}")
        return content
