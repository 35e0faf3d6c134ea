"""Recipes from libraries: timm's augmentation, optimisers and schedules, balance, an early end. All go on exactly."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm.optim
import torch
from timm.data import create_transform
from torch import Tensor

import edgepet as package
from edgepet.errors import InputError
from edgepet.images.preprocess import normalize
from edgepet.networks import merged
from edgepet.networks.backbone import Backbone
from edgepet.packs.pack import read_pack
from edgepet.reports.progress import Step
from edgepet.spec import NpArray, Preprocess
from edgepet.tuning.augmenting import Augmenter, require_augmentations
from edgepet.tuning.balance import class_weights, epoch_order
from edgepet.tuning.checkpoint import checkpoint_file
from edgepet.tuning.fit import Fit, Judge, LabelledPixels, Plan, fit, top1_and_loss
from edgepet.tuning.model import TunedModel
from edgepet.tuning.optimizers import optimizer_of, schedule_of, set_state, state_of
from edgepet.tuning.recipes import Augmentations, augmentations, named
from edgepet.tuning.training import fast_bfloat16
from edgepet.verbs.train import TrainReport
from tests.fits import StopError, keeper, stepping
from tests.flow import Tasks, edgepet
from tests.methods import SSF
from tests.tiny import random_pixels, same_bits

PREPROCESS = Preprocess(image_size=(32, 32))
EVERYTHING = ("rand-m9-mstd0.5", "flip", "crop", "erasing-p0.5", "mixup", "cutmix")
PLAN = Plan(epochs=2, lr=1e-2, head_lr=1e-2, batch_size=5, seed=5)  # steps of 5, 5 and 2 images
PLANS = {
    "augmented": replace(PLAN, augment=EVERYTHING),
    "by timm": replace(PLAN, optimizer="lamb", schedule="step,decay_epochs=1,decay_rate=0.5"),
    "sampled": replace(PLAN, balance="sampling"),
    "weighed": replace(PLAN, balance="weights", augment=("mixup-a0.2",)),
}


def run(
    backbone: Backbone, plan: Plan, folder: Path | None = None, after: int | None = None, judge: Judge = top1_and_loss
) -> tuple[dict[str, NpArray], Fit]:
    """Fit, with ``after`` only so many steps; returns what was tuned."""
    model = TunedModel(backbone, SSF(), 3, seed=1)
    fitted = stepping(model, backbone, plan, keeper(folder) if folder else None, after=after, judge=judge)
    return model.arrays() | {"head": model.linear.weight.detach().numpy().copy()}, fitted


# ------------------------------------------------------------------------------------------------------- a training


@pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS)
def test_a_fit_of_any_recipe_that_was_stopped_ends_with_the_same_bits(
    plan: Plan, backbone: Backbone, tmp_path: Path
) -> None:
    expected, _ = run(backbone, plan)
    for after in (1, 3):
        with pytest.raises(StopError):
            run(backbone, plan, tmp_path, after)

    assert same_bits(run(backbone, plan, tmp_path)[0], expected)
    assert not same_bits(run(backbone, PLAN)[0], expected)


def test_a_pack_trained_with_timms_randaugment_and_mixup_and_stopped_equals_the_uninterrupted_one(
    tasks: Tasks, tmp_path: Path
) -> None:
    def train(folder: str, after: int = 1000, *, resume: bool = False) -> TrainReport:
        def say(step: Step) -> None:
            if step.step > after:
                raise StopError

        (tmp_path / folder).mkdir(exist_ok=True)
        return package.train(
            tasks.data, tasks.spec, "ssf", tmp_path / folder / "flowers.pet", image_size=32, epochs=2, batch_size=5,
            precision="fp32", checkpoint_s=0, augment=("randaugment", "mixup"), say=say, resume=resume, log=("csv",),
        )  # fmt: skip

    train("whole")
    with pytest.raises(StopError):
        train("stopped", after=7)
    assert checkpoint_file(tmp_path / "stopped" / "flowers.pet").exists()
    train("stopped", resume=True)

    whole, stopped = (tmp_path / folder for folder in ("whole", "stopped"))
    for file in ("flowers.pet", "flowers.work/method.safetensors"):
        assert (stopped / file).read_bytes() == (whole / file).read_bytes()
    logs = [
        [line.split(",")[:5] + line.split(",")[6:] for line in (folder / "logs/flowers.csv").read_text().splitlines()]
        for folder in (whole, stopped)
    ]
    assert logs[0] == logs[1]  # all but how fast it was
    assert len(logs[0]) == 1 + 2 * (5 + 1)


def test_a_training_ends_when_its_patience_does(backbone: Backbone, tmp_path: Path) -> None:
    plan, told = replace(PLAN, epochs=6, patience=2), [0.2, 0.5, 0.5, 0.4, 0.9, 0.9]

    def judge(*given: object) -> tuple[float, float]:
        judged.append(1)
        return told[len(judged) - 1], 1.0

    judged = list[int]()
    expected, fitted = run(backbone, plan, judge=judge)
    assert (fitted.epochs, fitted.best_epoch, fitted.val.top1) == (4, 2, 0.5)

    judged = []
    with pytest.raises(StopError):
        run(backbone, plan, tmp_path, after=10, judge=judge)
    state, resumed = run(backbone, plan, tmp_path, judge=judge)
    assert (resumed.epochs, resumed.best_epoch) == (4, 2)
    assert same_bits(state, expected)


def test_a_training_judges_its_val_images_once_for_its_pack_and_its_report(
    tasks: Tasks, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    judge, judged = merged.merged_answers, list[int]()

    def counted(*given: Any) -> NpArray:
        answers = judge(*given)
        judged.append(len(answers))
        return answers

    monkeypatch.setattr(merged, "merged_answers", counted)
    pack = tmp_path / "flowers.pet"
    report = package.train(tasks.data, tasks.spec, "linear-probe", pack, image_size=32, epochs=1, precision="fp32")
    stored = read_pack(pack).delta.val

    assert (report.val.top1, report.val.n) == (stored.top1, stored.n)
    assert judged.count(stored.n) == 1


def test_what_was_asked_of_a_training_is_in_its_pack_and_its_report(tasks: Tasks, tmp_path: Path) -> None:
    pack = tmp_path / "flowers.pet"
    said = edgepet(
        "train", tasks.data, "--backbone", tasks.spec, "--method", "linear-probe", "--img-size", 32, "--epochs", 9,
        "--train-precision", "fp32", "--optimizer", "sgd,momentum=0.5", "--schedule", "constant", "--head-lr", 0.01,
        "--weight-decay", 0.01, "--balance", "weights", "--patience", 1, "--log", "csv", "-o", pack, "--json",
    )  # fmt: skip

    assert said.code == 0, said.err
    report, facts = said.json, read_pack(pack).delta.training
    asked = {"optimizer": "sgd,momentum=0.5", "schedule": "constant", "balance": "weights", "patience": 1}
    assert {key: facts[key] for key in asked} == asked
    assert (facts["head_lr"], facts["weight_decay"], facts["epochs_run"]) == (0.01, 0.01, report["epochs_run"])
    assert report["log_dir"] == str(tmp_path / "logs")
    assert not {*asked, "head_lr", "epochs_run"} & {*read_pack(tasks.shapes).delta.training}  # as packs of before


def test_a_pack_is_not_resumed_with_another_recipe(tasks: Tasks, tmp_path: Path) -> None:
    def stop(step: Step) -> None:
        raise StopError

    given = {"image_size": 32, "epochs": 1, "precision": "fp32"}
    with pytest.raises(StopError):
        package.train(
            tasks.data, tasks.spec, "ssf", tmp_path / "a.pet", say=_second(stop), batch_size=8, checkpoint_s=0, **given
        )

    with pytest.raises(InputError, match=r"got balance None, now sampling; optimizer None, now lamb\n"):
        package.train(
            tasks.data, tasks.spec, "ssf", tmp_path / "a.pet", resume=True, balance="sampling", optimizer="lamb",
            batch_size=8, **given,
        )  # fmt: skip


def _second(say: object) -> object:
    return lambda step: say(step) if step.step > 1 else None  # type: ignore[operator]


# ------------------------------------------------------------------------------------------------------ augmentation


def batch(names: Sequence[str], part: Sequence[int], *, n: int = 5, epoch: int = 1, frames: int = 0) -> Tensor:
    """Images of the first step of an epoch: the places ``part`` of ``n``."""
    still = random_pixels(3, n)
    pixels = torch.from_numpy(np.repeat(still[:, None], frames, axis=1) if frames else still)
    made = Augmenter(names, PREPROCESS, batch_size=n, seed=9)
    index, places = torch.arange(n), torch.tensor(part)
    if made.mixes:
        images, targets = made.mixed(lambda i: pixels[i], index, places, (epoch, 0), torch.arange(n) % 3, 3, 0.1)
        assert torch.allclose(targets.sum(1), torch.ones(len(part)))
        return torch.cat([images.flatten(1), targets], 1)
    return made.images(lambda i: pixels[i], index, places, (epoch, 0)).flatten(1)


SEEDED = [
    ("rand-m9-mstd0.5",),
    ("augmix-m5",),
    ("3a",),
    ("erasing-p1",),
    ("mixup",),
    ("cutmix",),
    ("randaugment", "mixup"),
]


@pytest.mark.parametrize("names", SEEDED, ids="+".join)
def test_an_image_becomes_the_same_in_any_part_of_its_batch(names: Sequence[str]) -> None:
    whole = batch(names, range(5))

    torch.rand(3), random.random(), np.random.rand()
    parts = torch.cat([batch(names, [0, 1]), batch(names, [2]), batch(names, [3, 4])])

    assert torch.equal(parts, whole)
    plain = batch((), range(5))
    assert not torch.equal(whole[:, : plain.shape[1]], plain)
    assert not torch.equal(batch(names, range(5), epoch=2), whole)


def test_the_generators_of_the_process_are_left_as_they_were() -> None:
    before = random.getstate(), np.random.get_state()[1].tobytes(), torch.get_rng_state().numpy().tobytes()

    batch(("randaugment", "erasing", "mixup", "cutmix"), range(4), n=4)

    after = random.getstate(), np.random.get_state()[1].tobytes(), torch.get_rng_state().numpy().tobytes()
    assert after == before


@pytest.mark.parametrize("names", [("rand-m9-n3",), ("erasing-p1",), ("mixup",), ("cutmix",)], ids="+".join)
def test_frames_of_a_clip_become_the_same(names: Sequence[str]) -> None:
    made = batch(names, range(4), n=4, frames=2)[:, : 2 * 3 * 32 * 32].reshape(4, 2, -1)

    assert torch.equal(made[:, 0], made[:, 1])


@pytest.mark.parametrize("text", ["rand-m7-n3-mstd0.5-inc1", "augmix-m4-w2", "original-mstd0.5"])
def test_a_policy_is_the_one_that_timms_own_transform_has(text: str) -> None:
    timms = create_transform(32, is_training=True, auto_augment=text, interpolation="bicubic", mean=PREPROCESS.mean)
    own = Augmenter([text], PREPROCESS, batch_size=1, seed=0).policy

    (expected,) = (each for each in timms.transforms if type(each) is type(own))
    assert repr(own) == repr(expected)
    ops = [getattr(made, "ops", None) or [op for ops in made.policy for op in ops] for made in (own, expected)]
    assert [(op.hparams, op.kwargs) for op in ops[0]] == [(op.hparams, op.kwargs) for op in ops[1]]


def test_the_ends_of_a_batch_are_mixed_as_timm_mixes_them() -> None:
    images = batch((), range(6), n=6)
    made = batch(("mixup-a1",), range(6), n=6)
    targets = made[:, -3:]

    # images 0 and 5 are of the classes 0 and 2: what they are then says how far they were mixed
    share = float((targets[0, 0] - 0.1 / 3) / 0.9)
    assert 0 < share < 1
    assert torch.allclose(made[0, :-3], share * images[0] + (1 - share) * images[5], atol=1e-5)
    parts = [batch(("mixup-a1",), part, n=6) for part in ([0, 1, 2, 3], [4, 5])]
    assert torch.equal(torch.cat(parts), made)


def test_names_of_augmentations_mean_strengths() -> None:
    expected = Augmentations(policy="rand-m9-mstd0.5", flip=True, erasing=0.1, mixup=0.2, cutmix=1.0)
    assert augmentations(["rand-m9-mstd0.5", "flip", "erasing-p0.1", "mixup-a0.2", "cutmix"]) == expected
    assert augmentations(["randaugment"]).policy == "rand-m9-mstd0.5-inc1"


MALFORMED = {
    (
        "blur",
    ): "`augment`: knows flip, crop, randaugment, erasing, mixup, cutmix and the like of rand-m9-n2, got 'blur'",
    ("rand-x9",): "`augment`: knows flip, crop, randaugment, erasing, mixup, cutmix and the like of rand-m9-n2,"
    " got 'rand-x9'",
    ("randaugment", "3a"): "`augment`: takes one of each kind, got '3a' as well",
    ("flip", "flip"): "`augment`: takes one of each kind, got 'flip' as well",
    ("erasing-p1.5",): "`augment`: erasing needs a probability above 0 and at most 1, got 'erasing-p1.5'",
    ("mixup-a0",): "`augment`: mixup needs an alpha above 0, got 'mixup-a0'",
}


@pytest.mark.parametrize(("names", "message"), MALFORMED.items(), ids="+".join)
def test_an_augmentation_that_is_none_is_refused(names: Sequence[str], message: str) -> None:
    with pytest.raises(InputError) as refusal:
        augmentations(names)
    assert str(refusal.value) == message


def test_a_policy_that_cannot_be_drawn_is_refused() -> None:
    with pytest.raises(InputError, match=r"^`augment`: timm takes no 'rand-n20-tweights', got "):
        require_augmentations(["rand-n20-tweights"], PREPROCESS)


# ------------------------------------------------------------------------------------------- optimisers and schedules

ELSEWHERE = ("bnb", "fused")  # names of optimisers that need a GPU and another package
NAMES = [name for name in timm.optim.list_optimizers() if not name.startswith(ELSEWHERE) and name != "adahessian"]
FEW = ("adan", "lamb", "lookahead_lion", "muon", "sgd,momentum=0.5,nesterov=true")


def stepped(optimizer: torch.optim.Optimizer, tensors: Sequence[Tensor], steps: range) -> list[Tensor]:
    for step in steps:
        draw = torch.Generator().manual_seed(step)
        for tensor in tensors:
            tensor.grad = torch.randn(tensor.shape, generator=draw)
        optimizer.step()
    return [tensor.detach().clone() for tensor in tensors]


def opened(name: str, values: Sequence[Tensor]) -> tuple[torch.optim.Optimizer, list[Tensor]]:
    tensors = [value.clone().requires_grad_() for value in values]
    groups = [{"params": [tensor], "initial_lr": 0.01} for tensor in tensors]
    return optimizer_of(groups, name, 0.01, 1e-4), tensors


@pytest.mark.filterwarnings("ignore:It is highly recommended:UserWarning")  # kron's, of a package that makes it faster
@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=[] if name in FEW else pytest.mark.slow) for name in dict.fromkeys([*FEW, *NAMES])],
)
def test_an_optimiser_goes_on_from_its_state_to_the_same_bits(name: str) -> None:
    torch.manual_seed(1)
    start = [torch.randn(6, 8), torch.randn(8)]
    optimizer, tensors = opened(name, start)
    between = stepped(optimizer, tensors, range(7))
    state, drawn = {key: value.clone() for key, value in state_of(optimizer).items()}, torch.get_rng_state()
    expected = stepped(optimizer, tensors, range(7, 14))

    again, tensors = opened(name, between)
    set_state(again, state)
    torch.set_rng_state(drawn)
    got = stepped(again, tensors, range(7, 14))

    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(got, start, strict=True))


def rates(text: str, steps: Sequence[int]) -> list[float]:
    """Learning rates of 1 and half of it at ``steps``, of 10 epochs of 4 steps, rising over 4."""
    groups = [{"params": [torch.zeros(1)], "lr": rate, "initial_lr": rate} for rate in (1.0, 0.5)]
    optimizer = torch.optim.SGD(groups)
    schedule, made = schedule_of(optimizer, text, epochs=10, updates=4, rising=4), []
    for step in steps:
        schedule(step)
        first, second = (float(group["lr"]) for group in optimizer.param_groups)
        assert first > second >= 0 or first == second < 0.2  # while they rise from one start
        made.append(first)
    return made


@pytest.mark.parametrize("name", ["cosine", "cosine,k_decay=1.5", "tanh", "poly,decay_rate=1", "wsd", "rsqrt"])
def test_a_schedule_rises_and_falls_and_depends_on_the_step_alone(name: str) -> None:
    try:
        forth = rates(name, range(40))
    except InputError as error:  # an older timm has fewer
        pytest.skip(f"needs a newer timm: {error}")

    assert forth[0] < forth[3] <= forth[4]
    assert forth[-1] < 0.2 * max(forth)
    assert rates(name, range(39, -1, -1)) == forth[::-1]


def test_a_schedule_counts_its_settings_in_epochs() -> None:
    assert rates("step,decay_epochs=2,decay_rate=0.5", [7, 8, 15, 16]) == [1.0, 0.5, 0.5, 0.25]
    assert rates("step", [11, 12]) == [1.0, 0.1]  # three tenths of all, as timm's 90 epochs are of its 300
    # timm asks which milestones the next step has reached
    assert rates("multistep,decay_milestones=2/3,decay_rate=0.5", [6, 7, 11]) == [1.0, 0.5, 0.25]
    assert rates("multistep,decay_rate=0.5", [10, 11, 23]) == [1.0, 0.5, 0.25]
    assert rates("none", [0, 30]) == [1.0, 1.0]


@pytest.mark.parametrize(
    ("field", "text", "message"),
    [
        ("optimizer", "adam w", "`optimizer`: needs NAME or NAME,KEY=VALUE,..., got 'adam w'"),
        ("optimizer", "sgd,x", "`optimizer`: needs settings as KEY=NUMBER, with / between several, got 'x'"),
        ("schedule", "step,x=a", "`schedule`: needs settings as KEY=NUMBER, with / between several, got 'x=a'"),
    ],
)
def test_a_text_of_another_form_is_refused(field: str, text: str, message: str) -> None:
    with pytest.raises(InputError) as refusal:
        named(field, text)
    assert str(refusal.value) == message


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("adamx", "`optimizer`: is adamw or another of timm's, got 'adamx'\n"),
        ("adahessian", "`optimizer`: must not need second derivatives, got 'adahessian'"),
        ("sgd,beta=1", "`optimizer`: timm takes no 'sgd,beta=1', got "),
        ("sgd,momentum=-1", "`optimizer`: timm takes no 'sgd,momentum=-1', got "),
    ],
)
def test_an_optimiser_that_timm_does_not_make_is_refused(text: str, message: str) -> None:
    with pytest.raises(InputError) as refusal:
        opened(text, [torch.zeros(2)])
    assert str(refusal.value).startswith(message)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("plateau", "`schedule`: knows cosine, tanh, step, multistep, poly, wsd, rsqrt, constant, none, got 'plateau'"),
        (
            "step,cycles=2",
            "`schedule`: knows the settings decay_epochs, decay_milestones, stable_timescale, warmup_epochs,"
            " decay_rate, k_decay, min_lr, warmup_lr, got 'cycles'",
        ),
    ],
)
def test_a_schedule_that_there_is_not_is_refused(text: str, message: str) -> None:
    with pytest.raises(InputError) as refusal:
        rates(text, [0])
    assert str(refusal.value) == message


# ----------------------------------------------------------------------------------------------------------- balance


def test_classes_are_weighed_by_how_few_their_images_are() -> None:
    labels = torch.tensor([0] * 6 + [1] * 2 + [2] * 4)

    weights = class_weights(labels, 3, "weights")

    assert weights is not None
    assert weights.tolist() == pytest.approx([12 / 18, 12 / 6, 12 / 12])
    assert float(weights[labels].mean()) == pytest.approx(1)
    assert class_weights(labels, 3, None) is None


def test_a_balanced_epoch_sees_all_classes_alike_often() -> None:
    labels = torch.tensor([0] * 900 + [1] * 100)

    drawn = epoch_order(labels, "sampling", torch.Generator().manual_seed(1))

    assert len(drawn) == 1000
    assert 450 < int(labels[drawn].sum()) < 550
    again = epoch_order(labels, "sampling", torch.Generator().manual_seed(1))
    assert torch.equal(drawn, again)
    plain = epoch_order(labels, None, torch.Generator().manual_seed(1))
    assert torch.equal(plain, torch.randperm(1000, generator=torch.Generator().manual_seed(1)))


def test_uneven_classes_are_trained_otherwise_when_they_are_weighed(backbone: Backbone) -> None:
    train = LabelledPixels(pixels=random_pixels(1, 12), labels=np.array([0] * 10 + [1, 2]))
    found = []
    for balance in (None, "weights"):
        model, plan = TunedModel(backbone, SSF(), 3, seed=1), replace(PLAN, epochs=1, balance=balance)
        fit(model, train, train, backbone.preprocess, plan, lambda step: None)
        found.append(model.linear.bias.detach().clone())
    assert found[0].argmax() == 0  # the frequent class
    assert found[1][0] < found[0][0]


@pytest.mark.parametrize("computes", [True, False])
def test_a_gpu_trains_in_bfloat16_where_it_has_it_not_where_a_race_says_so(
    computes: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On an H200 two runs of one command were timed apart, and ended in different packs."""
    asked = list[bool]()

    def supported(*, including_emulation: bool) -> bool:
        asked.append(including_emulation)
        return computes

    monkeypatch.setattr(torch.cuda, "is_bf16_supported", supported)

    assert fast_bfloat16("cuda:1") is computes
    assert asked == [False]


def test_the_strongest_policy_takes_every_image() -> None:
    """Of its posterised ones it keeps no bit at all, which Pillow refuses: they are black, as they were before that."""
    made = Augmenter(["rand-m10-inc1"], PREPROCESS, batch_size=64, seed=0)
    pixels = torch.full((64, *PREPROCESS.image_size, 3), 200, dtype=torch.uint8)

    images = made.images(lambda index: pixels[index], torch.arange(64), torch.arange(64), (0, 0))

    black = torch.from_numpy(normalize(np.zeros((1, *PREPROCESS.image_size, 3), np.uint8), PREPROCESS))
    same = (images == black).flatten(1).all(dim=1)
    assert 0 < same.sum() < 16


@pytest.mark.parametrize("policy", ["rand-m10-mstd0.5-inc1", "original-mstd0.5", "augmix-m10-w3"])
def test_a_policy_that_timm_knows_is_never_refused(policy: str) -> None:
    for _ in range(30):
        require_augmentations([policy], PREPROCESS)
