"""What a seed stands for: numbers that others have published, and a second writing of the spec in plain integers."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from edgepet.deltas.expressions import Gather, Seeded, Window, value
from edgepet.deltas.generator import SEEDS, balanced, below, outputs, uniform
from tests import splitmix
from tests.tiny import SETTINGS

VECTORS = Path(__file__).parent.parent / "docs" / "spec" / "generator-v1.json"
seeds = st.integers(0, SEEDS - 1)


def vectors() -> Any:
    return json.loads(VECTORS.read_text())


def test_the_outputs_are_those_that_others_publish_for_splitmix64() -> None:
    # https://rosettacode.org/wiki/Pseudo-random_numbers/Splitmix64, and Vigna's splitmix64.c seeded with 0
    published = [
        6457827717110365317,
        3203168211198807973,
        9817491932198370423,
        4593380528125082431,
        16408922859458223821,
    ]
    assert outputs(1234567, 0, 5).tolist() == published
    assert outputs(0, 0, 3).tolist() == [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F]


def test_the_first_thousand_outputs_are_those_of_the_spec() -> None:
    written = vectors()["outputs"]

    assert len(written["values"]) == 1000
    assert [f"{z:016x}" for z in outputs(written["seed"], 0, 1000).tolist()] == written["values"]
    assert [splitmix.output(written["seed"], i) for i in range(1000)] == [int(z, 16) for z in written["values"]]


def test_evenly_drawn_values_and_shuffles_are_those_of_the_spec() -> None:
    evenly, shuffled, small = (vectors()[name] for name in ("uniform", "balanced", "below"))

    assert uniform(evenly["seed"], 0, len(evenly["values"])).tolist() == evenly["values"]
    assert [splitmix.uniform(evenly["seed"], i) for i in range(len(evenly["values"]))] == evenly["values"]
    made = balanced(shuffled["seed"], shuffled["total"], shuffled["count"]).tolist()
    assert made == splitmix.balanced(shuffled["seed"], shuffled["total"], shuffled["count"]) == shuffled["values"]
    sizes = [int(size, 16) for size in small["sizes"]]
    assert [f"{n:016x}" for n in below(small["seed"], sizes).tolist()] == small["values"]


@given(seed=seeds, start=st.integers(0, 2**60), count=st.integers(1, 9))
@SETTINGS
def test_an_output_is_a_function_of_seed_and_number(seed: int, start: int, count: int) -> None:
    drawn = outputs(seed, start, count)

    assert drawn.tolist() == [splitmix.output(seed, start + i) for i in range(count)]
    assert uniform(seed, start, count).tolist() == [splitmix.uniform(seed, start + i) for i in range(count)]


@given(seed=seeds, sizes=st.lists(st.integers(1, 2**64 - 1), max_size=9))
@SETTINGS
def test_numbers_below_a_size_pass_over_what_would_make_some_likelier(seed: int, sizes: list[int]) -> None:
    drawn = below(seed, sizes).tolist()

    assert drawn == list(splitmix.below(seed, iter(sizes)))
    assert all(number < size for number, size in zip(drawn, sizes, strict=True))


def test_every_other_output_is_passed_over_for_a_size_that_allows_half_of_them() -> None:
    size = 2**63 + 1  # outputs from there on are one short of half of all

    drawn = below(5, [size] * 100).tolist()

    assert drawn == [z for z in outputs(5, 0, 400).tolist() if z < size][:100]
    assert drawn != outputs(5, 0, 100).tolist()


@given(seed=seeds, total=st.integers(1, 60), data=st.data())
@SETTINGS
def test_a_balanced_order_names_everything_equally_often_or_once_more(
    seed: int, total: int, data: st.DataObject
) -> None:
    count = data.draw(st.integers(1, total))

    order = balanced(seed, total, count)

    assert order.tolist() == splitmix.balanced(seed, total, count)
    times = np.bincount(order, minlength=count)
    assert times.tolist() == [total // count + (i < total % count) for i in range(count)]


def test_shuffles_are_even() -> None:
    first = np.array([balanced(seed, 5, 5)[0] for seed in range(5000)])

    # a count of 5000 tries of a fifth is within 5 deviations
    assert (abs(np.bincount(first, minlength=5) - 1000) < 5 * np.sqrt(5000 * 0.2 * 0.8)).all()


def test_evenly_drawn_values_have_the_moments_of_even_ones() -> None:
    values = uniform(9, 0, 100_000)

    assert abs(values.mean()) < 5 * np.sqrt(1 / 3 / values.size)  # five standard errors
    assert abs((values**2).mean() - 1 / 3) < 5 * np.sqrt(4 / 45 / values.size)
    assert abs(np.corrcoef(values[:-1], values[1:])[0, 1]) < 5 / np.sqrt(values.size)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_a_seeded_factor_has_the_same_bits_in_numpy_and_torch(dtype: type) -> None:
    factor, like = Seeded(seed=7, bound=0.3, draws=Window(2, (3, 4))), np.zeros(1, dtype)

    made, in_torch = value(factor, like), value(factor, torch.from_numpy(like)).numpy()

    expected = np.array([0.3 * splitmix.uniform(7, 2 + i) for i in range(12)]).reshape(3, 4).astype(dtype)
    assert made.dtype == in_torch.dtype == dtype
    assert made.tobytes() == in_torch.tobytes() == expected.tobytes()


def test_windows_of_one_sequence_are_parts_of_it() -> None:
    like = np.zeros(1)
    whole = value(Seeded(3, 1.0, Window(0, (20,))), like)

    assert value(Seeded(3, 1.0, Window(5, (3, 4))), like).reshape(-1).tolist() == whole[5:17].tolist()


def test_all_factors_are_a_rotation_of_few_values() -> None:
    """Uni-LoRA: the gathered D values are P v with P^T P = I, so lengths and angles stay."""
    rng, like = np.random.default_rng(0), np.zeros(1)
    left, right = rng.standard_normal((2, 30))

    one, two = (value(Gather(v, seed=4, total=500, index=Window(0, (500,))), like) for v in (left, right))

    assert one @ two == pytest.approx(left @ right, rel=1e-12)  # float64
    assert one @ one == pytest.approx(left @ left, rel=1e-12)


def test_javascript_draws_the_same_numbers() -> None:
    node = shutil.which("node")
    if node is None:
        pytest.skip("needs node")
    code = """
    const M = (1n << 64n) - 1n, seed = BigInt(process.argv[1]);
    const output = i => {
      let z = (seed + BigInt(i + 1) * 0x9E3779B97F4A7C15n) & M;
      z = ((z ^ (z >> 30n)) * 0xBF58476D1CE4E5B9n) & M;
      z = ((z ^ (z >> 27n)) * 0x94D049BB133111EBn) & M;
      return z ^ (z >> 31n);
    };
    const values = [...Array(200).keys()].map(i => Number(output(i) >> 11n) / 2 ** 53 * 2 - 1);
    const order = [...Array(100).keys()].map(i => i % 7);
    for (let i = 99, n = 0; i > 0; i--) {
      const size = BigInt(i + 1), whole = (1n << 64n) / size * size;
      let z = output(n++);
      while (z >= whole) z = output(n++);
      const j = Number(z % size);
      [order[i], order[j]] = [order[j], order[i]];
    }
    console.log(JSON.stringify([values, order]));
    """

    done = subprocess.run([node, "-e", code, "8675309"], capture_output=True, text=True, check=True)

    values, order = json.loads(done.stdout)
    assert values == uniform(8675309, 0, 200).tolist()
    assert order == balanced(8675309, 100, 7).tolist()
