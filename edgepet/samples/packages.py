"""Files that ordinary packages carry: read out of what is installed, known by their digest."""

from __future__ import annotations

import hashlib
import io
import os
import shutil
import subprocess
import tarfile
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import ClassVar

from edgepet.errors import InputError, MissingError
from edgepet.files import read_file


@dataclass(frozen=True, slots=True)
class PackageFile:
    """``path`` as the wheel's RECORD has it; ``digest`` is 16 hex digits of its sha256, to know another release by.

    ``extra`` is the one of edgepet that installs the package; empty where it is to be installed without what it needs:
    no code of it is run.
    """

    package: str
    version: str
    path: str
    digest: str
    extra: str = "demo"
    registry: ClassVar[str] = "pypi"

    @property
    def requirement(self) -> str:
        """The release, as pip is asked for it."""
        return f"{self.package}=={self.version}"

    def read(self, *, purpose: str) -> bytes:
        """The installed bytes; MissingError without the package, InputError where they are not this release's."""
        try:
            found = metadata.distribution(self.package)
        except metadata.PackageNotFoundError as error:
            alone = f"pip install --no-deps '{self.requirement}'"
            fix = f"pip install 'edgepet[{self.extra}]'" if self.extra else alone
            raise MissingError(purpose, f"needs the package {self.package!r}", got=str(error), fix=fix) from error
        content = read_file(Path(str(found.locate_file(self.path))))
        digest = _digest(content)
        if digest != self.digest:
            what = f"needs {self.path} of {self.package} {self.version}, sha256:{self.digest}"
            fix = f"pip install --force-reinstall '{self.requirement}'"
            raise InputError(purpose, what, got=f"sha256:{digest} of {found.version}", fix=fix)
        return content


@dataclass(frozen=True, slots=True)
class DebianFile:
    """A file of an installed Debian package; ``digest`` as of a ``PackageFile``.

    ``DPKG_ROOT`` names another root than ``/``, as it does to dpkg: a folder that packages were unpacked into.
    """

    package: str
    version: str
    path: str
    digest: str
    registry: ClassVar[str] = "deb"

    @property
    def requirement(self) -> str:
        """The release, as apt-get is asked for it."""
        return f"{self.package}={self.version}"

    def read(self, *, purpose: str) -> bytes:
        """The installed bytes; MissingError without the package, InputError where they are not this release's."""
        path = Path(os.environ.get("DPKG_ROOT") or "/", self.path.lstrip("/"))
        fix = f"apt-get install {self.package}"
        if not path.is_file():
            raise MissingError(purpose, f"needs the Debian package {self.package!r}", got=f"no {path}", fix=fix)
        content = read_file(path)
        digest = _digest(content)
        if digest != self.digest:
            what = f"needs {path} of {self.package} {self.version}, sha256:{self.digest}"
            raise InputError(purpose, what, got=f"sha256:{digest}", fix=f"apt-get install {self.requirement}")
        return content


@dataclass(frozen=True, slots=True)
class DebianFolder:
    """Files of an installed Debian package, all that are called by ``pattern`` in ``folders`` of ``path`` and below.

    ``digest`` is of their paths in ``path`` and their contents; ``DPKG_ROOT`` is as of a ``DebianFile``.
    """

    package: str
    version: str
    path: str
    folders: tuple[str, ...]
    pattern: str
    digest: str
    registry: ClassVar[str] = "deb"

    @property
    def requirement(self) -> str:
        """The release, as apt-get is asked for it."""
        return f"{self.package}={self.version}"

    def read(self, *, purpose: str) -> bytes:
        """A tar of the files, folder by folder, sorted; MissingError without the package, InputError where they are not
        this release's.
        """
        root = Path(os.environ.get("DPKG_ROOT") or "/", self.path.lstrip("/"))
        if not root.is_dir():
            fix = f"apt-get install {self.package}"
            raise MissingError(purpose, f"needs the Debian package {self.package!r}", got=f"no {root}", fix=fix)
        made, digest = io.BytesIO(), hashlib.sha256()
        with tarfile.open(fileobj=made, mode="w") as archive:
            for file in (each for folder in self.folders for each in sorted((root / folder).rglob(self.pattern))):
                content = read_file(file)
                member = tarfile.TarInfo(file.relative_to(root).as_posix())
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))
                digest.update(f"{member.name} {len(content)} ".encode() + content)
        found = digest.hexdigest()[:16]
        if found != self.digest:
            what = f"needs {', '.join(self.folders[:2])}, … of {self.package} {self.version}, sha256:{self.digest}"
            raise InputError(purpose, what, got=f"sha256:{found}", fix=f"apt-get install {self.requirement}")
        return made.getvalue()


@dataclass(frozen=True, slots=True)
class NpmFile:
    """A file of a globally installed npm package; ``path`` in its folder, ``digest`` as of a ``PackageFile``."""

    package: str
    version: str
    path: str
    digest: str
    registry: ClassVar[str] = "npm"

    @property
    def requirement(self) -> str:
        """The release, as npm is asked for it."""
        return f"{self.package}@{self.version}"

    def read(self, *, purpose: str) -> bytes:
        """The installed bytes; MissingError without npm or the package, InputError where they are not this release's.

        The folder is asked of npm: the user's own settings, ``NPM_CONFIG_PREFIX`` and others, decide where it is.
        """
        missing, fix = f"needs the npm package {self.package!r}", f"npm install -g {self.requirement}"
        if (npm := shutil.which("npm")) is None:
            raise MissingError(purpose, missing, got="no npm", fix=f"install Node.js, then {fix}")
        asked = subprocess.run([npm, "root", "-g"], capture_output=True, text=True, check=False)
        path = Path(asked.stdout.strip(), self.package, self.path)
        if not path.is_file():
            raise MissingError(purpose, missing, got=f"no {path}", fix=fix)
        content = read_file(path)
        digest = _digest(content)
        if digest != self.digest:
            what = f"needs {path} of {self.package} {self.version}, sha256:{self.digest}"
            raise InputError(purpose, what, got=f"sha256:{digest}", fix=fix)
        return content


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]
