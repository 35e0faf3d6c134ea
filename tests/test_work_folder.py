"""What training leaves beside a pack comes back as it was, or is refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from edgepet.errors import InputError
from edgepet.tuning.work_folder import HELD_OUT, read_work, work_folder, write_work
from tests.tiny import FINGERPRINT, make_delta, random_pixels, same_bits


def written(folder: Path, order: str = "C") -> dict[str, np.ndarray]:
    tensors = {"fc/a": np.array(np.arange(6, dtype=np.float32).reshape(2, 3), order=order)}
    write_work(folder, make_delta(), tensors, random_pixels(1, HELD_OUT + 3, 8), np.arange(HELD_OUT + 3))
    return tensors


@pytest.mark.parametrize("order", ["C", "F"])
def test_a_folder_comes_back_as_it_was(tmp_path: Path, order: str) -> None:
    folder = work_folder(tmp_path / "flowers.pet")
    tensors = written(folder, order)

    work = read_work(folder)

    assert folder == tmp_path / "flowers.work"
    assert (work.fingerprint, work.method, work.settings) == (FINGERPRINT, "lora", {"rank": 2})
    assert same_bits(work.tensors, tensors)
    assert work.head.weight.tolist() == make_delta().head.weight.tolist()
    assert work.pixels.tolist() == random_pixels(1, HELD_OUT + 3, 8)[:HELD_OUT].tolist()
    assert work.labels.tolist() == list(range(HELD_OUT))


@pytest.mark.parametrize("name", ["work.json", "method.safetensors", "images.safetensors"])
def test_a_missing_or_damaged_file_is_refused(tmp_path: Path, name: str) -> None:
    written(tmp_path / "a.work")
    file = tmp_path / "a.work" / name

    file.write_bytes(file.read_bytes()[:-5])
    with pytest.raises(InputError, match=f"^{file}: .*, got .*\n  fix: (train again, or|delete it and make it again)"):
        read_work(tmp_path / "a.work")
    file.unlink()
    with pytest.raises(InputError) as refused:
        read_work(tmp_path / "a.work")

    assert str(refused.value) == f"{file}: could not be read, got No such file or directory"
