"""A training that is stopped, killed or out of disk goes on where it was, to the same bits."""

from __future__ import annotations

import errno
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
import torch

from edgepet.errors import InputError
from edgepet.exporters.trace import base_graph
from edgepet.measuring.parity import Accuracy, accuracy, interval
from edgepet.methods import SSF, Consolidator, LinearProbe, Method
from edgepet.networks.backbone import Backbone
from edgepet.reports.progress import Step
from edgepet.spec import NpArray
from edgepet.tuning.checkpoint import Checkpoint, Keeper, checkpoint_file, ends_when_asked
from edgepet.tuning.fake_quant import FakeQuant
from edgepet.tuning.fit import Fit, Judge, Plan, fit, top1_and_loss
from edgepet.tuning.model import TunedModel
from edgepet.tuning.parts import Parts
from tests.fits import StopError, images, keeper, stepping
from tests.flow import Tasks, draw_shapes, edgepet, refused
from tests.tiny import same_bits

# Drop path, flips and crops draw random numbers at every step.
PLAN = Plan(epochs=3, lr=1e-2, head_lr=1e-2, batch_size=4, augment=("flip", "crop"), seed=5)
METHOD = Consolidator(groups=(16,), drop_path=0.5)
STEPS = 9


def run(
    backbone: Backbone,
    kept: Keeper | None,
    *,
    plan: Plan = PLAN,
    method: Method = METHOD,
    after: int | None = None,
    judge: Judge = top1_and_loss,
) -> tuple[dict[str, NpArray], Fit]:
    """Fit, with ``after`` only so many steps; returns all tensors of the model but the backbone's."""
    model = TunedModel(backbone, method, 3, seed=1)
    fitted = stepping(model, backbone, plan, kept, after=after, judge=judge)
    state = {n: t.detach().numpy().copy() for n, t in model.state_dict().items() if not n.startswith("backbone.")}
    return state, fitted


@pytest.mark.parametrize("autocast", [False, True], ids=["fp32", "bf16"])
@pytest.mark.parametrize("after", [1, 2, 3, 4, 8])
def test_a_fit_that_was_stopped_ends_with_the_same_bits(
    after: int, autocast: bool, backbone: Backbone, tmp_path: Path
) -> None:
    plan = replace(PLAN, autocast=autocast)
    expected, whole = run(backbone, None, plan=plan)
    with pytest.raises(StopError):
        run(backbone, keeper(tmp_path), plan=plan, after=after)

    got, resumed = run(backbone, keeper(tmp_path), plan=plan)

    assert same_bits(got, expected)
    assert (resumed.best_epoch, resumed.val) == (whole.best_epoch, whole.val)


def test_a_fit_that_was_stopped_between_an_epochs_last_step_and_its_end_goes_on(
    backbone: Backbone, tmp_path: Path
) -> None:
    expected, _ = run(backbone, None)
    model = TunedModel(backbone, METHOD, 3, seed=1)

    def say(step: Step) -> None:
        if step.val_top1 is not None:
            raise StopError

    with pytest.raises(StopError):
        fit(model, images(1, 12), images(2, 6), backbone.preprocess, PLAN, say, keeper=keeper(tmp_path))
    saved = keeper(tmp_path).load()
    assert saved is not None
    assert (saved.progress["epoch"], saved.progress["position"]) == (1, 3)

    assert same_bits(run(backbone, keeper(tmp_path))[0], expected)


def test_a_fit_that_was_stopped_again_and_again_ends_with_the_same_bits(backbone: Backbone, tmp_path: Path) -> None:
    expected, _ = run(backbone, None)
    for _ in range(STEPS // 2):
        with pytest.raises(StopError):
            run(backbone, keeper(tmp_path), after=2)

    assert same_bits(run(backbone, keeper(tmp_path))[0], expected)


def test_a_linear_probe_goes_on_as_well(backbone: Backbone, tmp_path: Path) -> None:
    plan = replace(PLAN, augment=())
    expected, _ = run(backbone, None, plan=plan, method=LinearProbe())
    with pytest.raises(StopError):
        run(backbone, keeper(tmp_path), plan=plan, method=LinearProbe(), after=4)

    assert same_bits(run(backbone, keeper(tmp_path), plan=plan, method=LinearProbe())[0], expected)


def test_within_an_epoch_a_checkpoint_waits_for_its_time(backbone: Backbone, tmp_path: Path) -> None:
    with pytest.raises(StopError):
        run(backbone, keeper(tmp_path, every_s=3600), after=2)
    assert list(tmp_path.iterdir()) == []

    with pytest.raises(StopError):
        run(backbone, keeper(tmp_path, every_s=3600), after=4)
    saved = keeper(tmp_path).load()
    assert saved is not None
    assert (saved.progress["epoch"], saved.progress["position"]) == (2, 0)


# ------------------------------------------------------------------------------------------------------ the file


def test_a_checkpoint_of_other_settings_is_refused_by_what_differs(tmp_path: Path) -> None:
    keeper(tmp_path, lr=0.1, method="ssf").save(Checkpoint(progress={}, tensors={}))

    with pytest.raises(InputError) as refusal:
        keeper(tmp_path, lr=0.2, method="ssf", seed=1).load()

    path = tmp_path / "flowers.checkpoint"
    assert str(refusal.value) == (
        f"{path}: belongs to a training with other settings, got lr 0.1, now 0.2; seed None, now 1\n"
        "  fix: resume with the options that it began with, or delete it to begin again"
    )


@pytest.mark.parametrize("damage", [lambda data: data[:-1], lambda data: b"", lambda data: data[:8] + b"x" + data[9:]])
def test_a_damaged_checkpoint_is_refused(damage: Callable[[bytes], bytes], tmp_path: Path) -> None:
    kept = keeper(tmp_path)
    kept.save(Checkpoint(progress={"epoch": 1}, tensors={"x": np.ones(3)}))
    kept.path.write_bytes(damage(kept.path.read_bytes()))

    with pytest.raises(InputError) as refusal:
        kept.load()

    assert str(refusal.value).startswith(f"{kept.path}: is no whole checkpoint, got ")
    assert str(refusal.value).endswith("\n  fix: delete it to begin again")


def test_a_full_disk_leaves_the_last_checkpoint_whole(
    backbone: Backbone, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected, _ = run(backbone, None)
    with pytest.raises(StopError):
        run(backbone, keeper(tmp_path), after=3)
    before = (tmp_path / "flowers.checkpoint").read_bytes()

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(InputError) as refusal:
            run(backbone, keeper(tmp_path))

    assert str(refusal.value) == (
        f"{tmp_path / 'flowers.checkpoint'}: could not be written, got No space left on device\n"
        "  fix: make room, then go on with `resume=True`"
    )
    assert [(path.name, path.read_bytes()) for path in tmp_path.iterdir()] == [("flowers.checkpoint", before)]
    assert same_bits(run(backbone, keeper(tmp_path))[0], expected)


def test_a_loss_that_is_no_number_leaves_the_last_checkpoint_whole(backbone: Backbone, tmp_path: Path) -> None:
    with pytest.raises(InputError) as refusal:
        run(backbone, keeper(tmp_path), method=SSF(), plan=replace(PLAN, lr=1e30, warmup=0.5))

    path = tmp_path / "flowers.checkpoint"
    assert str(refusal.value).startswith("epoch 1: the loss must stay finite, got nan")
    assert str(refusal.value).endswith(f"\n  fix: delete {path} and begin again with `lr=3e+29` or less")
    saved = keeper(tmp_path).load()
    assert saved is not None
    assert saved.progress["epoch"] == 1


def test_a_gradient_that_is_no_number_moves_nothing(
    backbone: Backbone, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    model = TunedModel(backbone, SSF(), 3, seed=1)
    start, steps = model.arrays(), []

    def broken(*given: object) -> torch.Tensor:
        steps.append(1)
        return torch.tensor(float("nan"))

    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", broken)
    with pytest.raises(InputError, match="the loss must stay finite, got nan"):
        fit(model, images(1, 12), images(2, 6), backbone.preprocess, PLAN, lambda step: None, keeper=keeper(tmp_path))

    assert (steps, same_bits(model.arrays(), start)) == ([1], True)


def test_a_val_loss_that_is_no_number_is_refused(backbone: Backbone, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="epoch 1: the loss must stay finite, got inf"):
        run(backbone, keeper(tmp_path), judge=lambda *given: (0.5, float("inf")))


def test_half_a_checkpoint_that_a_killed_process_left_is_removed(tmp_path: Path) -> None:
    (tmp_path / ".flowers.checkpoint.a1b2c3d4.part").write_bytes(b"half")
    (tmp_path / ".other.checkpoint.a1b2c3d4.part").write_bytes(b"another task's")

    assert keeper(tmp_path).load() is None

    assert [path.name for path in tmp_path.iterdir()] == [".other.checkpoint.a1b2c3d4.part"]


# ------------------------------------------------------------------------------------------------------ being asked


@pytest.fixture
def interrupts() -> Iterator[None]:
    """SIGINT as Python starts with it: a suite that runs behind a shell ignores it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_a_signal_that_is_ignored_stays_so(interrupts: None, tmp_path: Path) -> None:
    kept = keeper(tmp_path)
    signal.signal(signal.SIGINT, signal.SIG_IGN)

    with ends_when_asked(kept):
        os.kill(os.getpid(), signal.SIGINT)

    assert not kept.stop
    assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN


@pytest.mark.parametrize("first", [signal.SIGINT, signal.SIGTERM])
def test_the_first_signal_asks_and_the_second_acts(first: signal.Signals, interrupts: None, tmp_path: Path) -> None:
    kept, before = keeper(tmp_path), signal.getsignal(signal.SIGINT)

    def twice() -> None:
        with ends_when_asked(kept):
            os.kill(os.getpid(), first)
            assert kept.stop
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(1)

    with pytest.raises(KeyboardInterrupt):
        twice()

    assert signal.getsignal(signal.SIGINT) is before


def test_a_fit_that_is_asked_to_end_says_how_to_go_on(backbone: Backbone, tmp_path: Path) -> None:
    expected, _ = run(backbone, None)
    kept = keeper(tmp_path, every_s=3600)
    kept.stop = True

    with pytest.raises(KeyboardInterrupt) as stopped:
        run(backbone, kept)

    assert str(stopped.value) == f"{kept.path} is written, the same command with `resume=True` goes on from there"
    assert same_bits(run(backbone, keeper(tmp_path))[0], expected)


# --------------------------------------------------------------------------------------------------------- in parts


@pytest.mark.parametrize("parts", [2, 3, 4])
def test_a_batch_in_parts_is_the_whole_batch_up_to_rounding(parts: int, backbone: Backbone) -> None:
    plan = replace(PLAN, augment=(), batch_size=5, epochs=1)  # steps of 5, 5 and 2 images
    whole, _ = run(backbone, None, plan=plan, method=SSF())

    got, _ = run(backbone, None, plan=replace(plan, accumulate=parts), method=SSF())

    # AdamW divides by the gradient's own size: where a gradient is rounding alone, a step of lr may point anywhere
    far = {name: float(np.abs(got[name] - whole[name]).max()) for name in whole}
    assert max(far.values()) <= 3 * plan.lr
    assert np.median([np.median(np.abs(got[name] - whole[name])) for name in whole]) < 1e-5


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize(("most", "parts"), [(4000 * 12, 1), (4000 * 12 - 1, 2), (4000 * 3, 4), (1, 12)])
def test_a_step_has_as_few_parts_as_keep_within_what_memory_bears(
    most: int, parts: int, device: str, backbone: Backbone, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("edgepet.tuning.parts.MOST_KEPT", most)
    found, values = Parts(TunedModel(backbone, SSF(), 3), replace(PLAN, device=device)), torch.ones(12, 1000)
    shared = torch.ones(1000, requires_grad=True)  # is kept once, however many images there are

    def there_and_back(part: torch.Tensor) -> None:
        torch.autograd.backward((values[part] * shared).sum())

    assert found.of(torch.arange(12), there_and_back) == (parts if device == "cpu" else 1)
    assert found.each == (4000 if device == "cpu" else 0)
    assert found.of(torch.arange(1), there_and_back) == 1  # a part has an image at least


@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_measuring_what_an_image_keeps_moves_no_bit(precision: str, backbone: Backbone) -> None:
    def trained(accumulate: int | None) -> dict[str, NpArray]:
        rounding = None if precision == "fp32" else FakeQuant(base_graph(backbone), precision)
        model = TunedModel(backbone, METHOD, 3, seed=1, fake_quant=rounding)
        stepping(model, backbone, replace(PLAN, accumulate=accumulate), None, after=None)
        return {name: tensor.detach().numpy().copy() for name, tensor in model.state_dict().items()}

    assert same_bits(trained(None), trained(1))


def test_parts_that_were_measured_stand_when_a_training_is_resumed(
    backbone: Backbone, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("edgepet.tuning.parts.MOST_KEPT", 1)
    expected, _ = run(backbone, None)
    assert same_bits(expected, run(backbone, None, plan=replace(PLAN, accumulate=PLAN.batch_size))[0])
    with pytest.raises(StopError):
        run(backbone, keeper(tmp_path), after=2)
    monkeypatch.setattr(torch.autograd.graph, "saved_tensors_hooks", lambda *asked: pytest.fail("measured again"))

    assert same_bits(run(backbone, keeper(tmp_path))[0], expected)


# ----------------------------------------------------------------------------------------------------- the command


def command(tasks: Tasks, data: Path, pack: Path, *more: object) -> list[object]:
    return [
        "train", data, "--backbone", tasks.spec, "--method", "consolidator", "--set", "groups=16", "--img-size", 32,
        "--epochs", 2, "--batch-size", 2, "--train-precision", "fp32", "--augment", "flip,crop", "-o", pack, *more,
    ]  # fmt: skip


def test_a_checkpoint_that_is_left_is_not_overwritten(tasks: Tasks, tmp_path: Path) -> None:
    pack = tmp_path / "flowers.pet"
    checkpoint_file(pack).write_bytes(b"an hour's work")

    message = refused(3, *command(tasks, tasks.data, pack))

    path = tmp_path / "flowers.checkpoint"
    assert message == (
        f"{path}: is left of a training that was interrupted\n"
        f"  fix: go on with --resume, or delete {path} to begin again\n"
    )
    assert path.read_bytes() == b"an hour's work"


def test_resume_begins_where_nothing_is_left_and_leaves_nothing(tasks: Tasks, tmp_path: Path) -> None:
    said = edgepet(*command(tasks, tasks.data, tmp_path / "flowers.pet", "--resume", "--json"))

    assert said.code == 0, said.err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["flowers.pet", "flowers.work"]
    assert said.json["images_per_class"] == [8, 8]
    val = said.json["val"]
    assert (val["low"], val["high"]) == interval(round(val["top1"] * 12), 12)


def test_an_earlier_pack_stays_until_the_new_one_is_there(
    tasks: Tasks, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pack = tmp_path / "flowers.pet"
    assert edgepet(*command(tasks, tasks.data, pack, "--json")).code == 0
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}

    def stopped(*given: object) -> bool:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("edgepet.tuning.training.algebra_error", stopped)
        said = edgepet(*command(tasks, tasks.data, pack))

    assert said.code == 130
    assert {path: path.read_bytes() for path in before} == before
    assert checkpoint_file(pack).exists()
    assert edgepet(*command(tasks, tasks.data, pack, "--resume", "--json")).code == 0
    assert pack.read_bytes() == before[pack]


# ------------------------------------------------------------------------------------------ in processes of their own

ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}


def spawn(arguments: list[object], *launcher: str) -> subprocess.Popen[str]:
    line = [sys.executable, "-m", *launcher, "edgepet", *map(str, arguments)]
    return subprocess.Popen(line, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def finished(arguments: list[object], *launcher: str) -> None:
    process = spawn(arguments, *launcher)
    _, err = process.communicate(timeout=900)  # of a busy machine
    assert process.returncode == 0, err


@pytest.fixture(scope="module")
def many_shapes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images enough for a training of some seconds: the drawn ones, ten times."""
    folder = tmp_path_factory.mktemp("shapes")
    draw_shapes(folder)
    for image in list((folder / "train").rglob("*.png")):
        for number in range(9):
            image.with_stem(f"{image.stem}-{number}").write_bytes(image.read_bytes())
    return folder


# timm's own transforms, optimiser and schedule, in place of what ``command`` asks for.
BY_TIMM = (
    "--augment", "rand-m9-mstd0.5,flip,crop,erasing,mixup,cutmix", "--optimizer", "adan", "--schedule", "tanh",
    "--balance", "sampling",
)  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("more", [(), BY_TIMM], ids=["plain", "by timm"])
def test_a_training_killed_at_ten_random_moments_ends_with_the_same_bits(
    more: tuple[str, ...], tasks: Tasks, many_shapes: Path, tmp_path: Path
) -> None:
    longer = ("--epochs", 5, "--checkpoint-every", 0.2, *more)
    whole = tmp_path / "whole" / "flowers.pet"
    whole.parent.mkdir()
    began = time.monotonic()
    finished(command(tasks, many_shapes, whole, *longer))
    lasts, moments, left = time.monotonic() - began, random.Random(11), list[bool]()

    for number in range(10):
        pack = tmp_path / str(number) / "flowers.pet"
        pack.parent.mkdir()
        process = spawn(command(tasks, many_shapes, pack, *longer))
        time.sleep(lasts * moments.uniform(0.2, 0.95))  # from before the first step to after the last
        process.send_signal(signal.SIGKILL)
        process.communicate()
        left.append(checkpoint_file(pack).exists())
        finished(command(tasks, many_shapes, pack, *longer, "--resume"))

        assert pack.read_bytes() == whole.read_bytes()
        method = "flowers.work/method.safetensors"
        assert (pack.parent / method).read_bytes() == (whole.parent / method).read_bytes()

    assert any(left)  # else nothing was resumed


@pytest.mark.slow
def test_a_training_that_is_terminated_ends_with_130_and_goes_on(
    tasks: Tasks, many_shapes: Path, tmp_path: Path
) -> None:
    pack = tmp_path / "flowers.pet"
    arguments = command(tasks, many_shapes, pack, "--checkpoint-every", 0)
    process = spawn(arguments)
    while not checkpoint_file(pack).exists() and process.poll() is None:
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=60)

    assert process.returncode == 130, err
    told = f"interrupted: {checkpoint_file(pack)} is written, the same command with --resume goes on from there"
    assert told in err
    finished([*arguments, "--resume"])
    assert not checkpoint_file(pack).exists()


@pytest.mark.slow
def test_two_processes_end_with_the_tensors_of_one(tasks: Tasks, tmp_path: Path) -> None:
    pytest.importorskip("accelerate", reason="needs the package accelerate")
    packs = [tmp_path / name / "flowers.pet" for name in ("one", "two")]
    for pack in packs:
        pack.parent.mkdir()
    arguments = [command(tasks, tasks.data, pack, "--batch-size", 5, "--augment", "") for pack in packs]
    for each in arguments:
        each[each.index("consolidator")] = "ssf"  # no random numbers: the processes would draw others than one does
        del each[each.index("--set") : each.index("--set") + 2]

    finished(arguments[0])
    finished(arguments[1], "accelerate.commands.launch", "--cpu", "--num_processes", "2", "-m")

    one, two = (safetensors.numpy.load_file(pack.parent / "flowers.work" / "method.safetensors") for pack in packs)
    assert one.keys() == two.keys()
    # as for a batch in parts: sums in another order, and AdamW's steps of lr where a gradient is rounding alone
    assert np.median([np.median(np.abs(one[name] - two[name])) for name in one]) < 1e-5
    assert max(float(np.abs(one[name] - two[name]).max()) for name in one) < 0.05


# ------------------------------------------------------------------------------------------------------- intervals


@pytest.mark.parametrize(
    ("right", "n", "low", "high"),
    [(0, 10, 0.0, 0.2775), (10, 10, 0.7225, 1.0), (5, 10, 0.2366, 0.7634), (81, 263, 0.2553, 0.3662)],
)
def test_the_interval_of_a_proportion_is_wilsons(right: int, n: int, low: float, high: float) -> None:
    # the last row: Newcombe 1998, Statistics in Medicine 17:857, table I, method 3
    assert interval(right, n) == pytest.approx((low, high), abs=5e-5)


def test_the_mean_over_classes_does_not_know_how_frequent_they_are() -> None:
    labels = np.array([0] * 8 + [1] * 2)
    low, high = interval(8, 10)

    assert accuracy(np.zeros(10, np.int64), labels, 3) == Accuracy(
        top1=0.8, n=10, low=low, high=high, balanced=0.5, fewest=0, most=8
    )


def test_uneven_classes_and_few_val_images_are_said(tasks: Tasks, tmp_path: Path) -> None:
    data = tmp_path / "data"
    draw_shapes(data)
    for image in sorted((data / "train" / "circle").iterdir())[2:]:
        image.unlink()

    told = edgepet(*command(tasks, data, tmp_path / "flowers.pet"))

    assert told.code == 0, told.err
    assert "12 val images tell epochs apart poorly: the best one is partly luck" in told.out
    assert "classes are uneven, 2 to 8 training images: the mean over classes is" in told.out
    assert "  95 % interval " in told.out


def test_checkpoints_are_cheap_beside_what_they_save(backbone: Backbone, tmp_path: Path) -> None:
    with pytest.raises(StopError):
        run(backbone, keeper(tmp_path), after=4)

    values = sum(array.size for array in TunedModel(backbone, METHOD, 3).arrays().values())
    assert (tmp_path / "flowers.checkpoint").stat().st_size < 4 * 4 * values + 60_000  # tensor, best, two moments
