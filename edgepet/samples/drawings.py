"""Drawings of Debian packages as pictures: librsvg draws them, with the letters that are listed here and no others."""

from __future__ import annotations

import gzip
import os
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

from edgepet.errors import InputError, MissingError
from edgepet.samples.packages import DebianFile

FONTS: tuple[DebianFile, ...] = tuple(
    DebianFile("fonts-dejavu-core", "2.37-6", f"/usr/share/fonts/truetype/dejavu/{name}.ttf", digest)
    for name, digest in (
        ("DejaVuSans", "abdc775b21b1bc47"),
        ("DejaVuSans-Bold", "0d977336a6d5fba3"),
        ("DejaVuSerif", "13e61509f5c81d7c"),
        ("DejaVuSerif-Bold", "e2fd85eba2de65ac"),
    )
)
# Drawings that ask for other letters get the first; whatever else is installed must not change a pixel.
_FONTCONFIG = """<fontconfig>
<dir>{folder}</dir>
<alias><family>Serif</family><prefer><family>DejaVu Serif</family></prefer></alias>
<match target="pattern"><edit name="family" mode="append_last"><string>DejaVu Sans</string></edit></match>
</fontconfig>
"""


@dataclass(frozen=True, slots=True)
class DebianDrawing(DebianFile):
    """A gzipped SVG of an installed Debian package, read as a PNG that is ``width`` pixels wide."""

    width: int

    def read(self, *, purpose: str) -> bytes:
        """The PNG, whose edges are smoothed by the librsvg that is installed: another version's may differ a little.

        Raises:
            InputError: the drawing or a font is not this release's, or librsvg cannot draw it.
            MissingError: the package, the fonts' or librsvg's is not installed.
        """
        drawing = gzip.decompress(DebianFile.read(self, purpose=purpose))
        if (program := shutil.which("rsvg-convert")) is None:
            fix = "apt-get install librsvg2-bin"
            raise MissingError(purpose, "needs the Debian package 'librsvg2-bin'", got="no rsvg-convert", fix=fix)
        with tempfile.TemporaryDirectory() as scratch:
            for font in FONTS:
                Path(scratch, Path(font.path).name).write_bytes(font.read(purpose=purpose))
            settings = Path(scratch, "fonts.conf")
            settings.write_text(_FONTCONFIG.format(folder=scratch), encoding="utf-8")
            drawn = subprocess.run(
                [program, "-w", str(self.width), "-u"],  # some drawings are beyond XML's usual limits
                input=drawing,
                env={**os.environ, "FONTCONFIG_FILE": str(settings)},
                capture_output=True,
                check=False,
            )
        if drawn.returncode:
            told = drawn.stderr.decode(errors="replace").strip().partition("\n")[0]
            raise InputError(purpose, f"could not draw {self.path}", got=told, fix="apt-get install librsvg2-bin")
        return drawn.stdout
