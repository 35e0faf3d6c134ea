"""Fitting heads for masks: losses, augmentation of images and masks alike, what is learnt, and what it lowers to."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from torch import Tensor, nn

from edgepet.deltas.heads import mask_of
from edgepet.errors import InputError
from edgepet.images.mask_folders import open_masks
from edgepet.images.masks import MaskSet, read_masks, squashed
from edgepet.images.preprocess import normalize
from edgepet.images.sets import load_sets
from edgepet.measuring.overlap import confusion, mean_iou
from edgepet.methods import SSF, ConvAdapter, Full, LinearProbe, Method, SemanticPrompt, VPTShallow
from edgepet.networks.backbone import Backbone
from edgepet.networks.head_settings import Form
from edgepet.networks.separation import Separated
from edgepet.packs.pack import EVERY, encode_pack, read_pack
from edgepet.spec import NpArray, Preprocess
from edgepet.tuning.dense import DenseModel, MergedHead, dense_algebra_error, extract_dense
from edgepet.tuning.dense_fit import DensePixels, fill_rows, fit_dense, judged_by, standardize
from edgepet.tuning.fit import Fit, Plan
from edgepet.tuning.joint import JointAugmenter, joint_augmentations, moved_masks
from edgepet.tuning.mask_fit import Losses, MaskObjective, quarter
from edgepet.tuning.mask_losses import cross_entropy, dice_loss, interim_loss, separation_loss
from tests.mask_folders import NAMES, index_folder, scene
from tests.tiny import seeded, tiny_vit

SIZE = (32, 32)
PLAIN = Losses()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return index_folder(tmp_path_factory.mktemp("masks"), train=12, val=6)


def held(images: MaskSet, preprocess: Preprocess) -> DensePixels:
    ((pixels, labels),) = load_sets([images.images], preprocess)
    return DensePixels(pixels, labels, truths={"mask": images.masks})


def backbone(size: int = 32) -> Backbone:
    """ConvNet of four stages."""
    preprocess = squashed(Preprocess(image_size=(size, size), mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25)))
    module = timm.create_model("test_resnet", pretrained=False, num_classes=0)
    return Backbone.from_module(seeded(module, 5), name="resnet", preprocess=preprocess)


@pytest.fixture(scope="module")
def convnet() -> Backbone:
    return backbone()


def plan(**changes: object) -> Plan:
    given = {"epochs": 6, "lr": 1e-3, "head_lr": 1e-2, "batch_size": 4, "seed": 3, "label_smoothing": 0.0}
    return Plan(**{**given, **changes})  # type: ignore[arg-type]


def fitted(
    model: DenseModel, given: Backbone, folder: Path, losses: Losses = PLAIN, **changes: object
) -> tuple[Fit, list[float]]:
    told = list[float]()
    sets = [held(open_masks(folder, split), given.preprocess) for split in ("train", "val")]

    def say(step: object) -> None:
        loss = getattr(step, "val_loss", None)
        told.extend([] if loss is None else [loss])

    asked = plan(**changes)
    objectives = [MaskObjective(model.form, given.preprocess, asked, losses=losses)]
    return fit_dense(model, *sets, given.preprocess, asked, say, objectives=objectives), told


# -------------------------------------------------------------------------------------------------------------- losses


def test_the_loss_is_a_mean_over_all_pixels_in_which_255_counts_for_nothing() -> None:
    rng = np.random.default_rng(1)
    logits, truth = torch.from_numpy(rng.standard_normal((2, 3, 4, 4))), torch.from_numpy(rng.integers(0, 3, (2, 4, 4)))
    truth[0, :2] = 255

    got = cross_entropy(logits, truth)

    rows = torch.log_softmax(logits.float(), dim=1)
    expected = 0.0
    for n, y, x in np.ndindex(2, 4, 4):
        if truth[n, y, x] != 255:
            expected -= float(rows[n, truth[n, y, x], y, x])
    assert float(got) == pytest.approx(expected / 16, rel=1e-5)
    assert float(cross_entropy(logits, torch.full_like(truth, 255))) == 0


def test_the_loss_weighs_classes_and_resizes_logits_to_the_truth() -> None:
    logits, truth = torch.zeros(1, 2, 2, 2), torch.zeros(1, 8, 8, dtype=torch.int64)
    truth[:, 4:] = 1

    assert float(cross_entropy(logits, truth)) == pytest.approx(np.log(2))
    assert float(cross_entropy(logits, truth, torch.tensor([1.0, 3.0]))) == pytest.approx(2 * np.log(2))


def test_dice_is_one_less_the_overlap_of_the_classes_that_are_there() -> None:
    truth = torch.tensor([[[0, 0], [1, 255]]])
    sure = 50.0 * nn.functional.one_hot(torch.tensor([[[0, 0], [1, 1]]]), 3).movedim(-1, 1).float()

    assert float(dice_loss(sure, truth)) == pytest.approx(0, abs=1e-6)
    wrong = sure.flip(2)  # the first row for the second
    first = 1 - 1 / (1 + 2 + 1)  # one of three pixels is answered as class 0, none of them rightly
    second = 1 - 1 / (2 + 1 + 1)
    assert float(dice_loss(wrong, truth)) == pytest.approx((first + second) / 2, abs=1e-6)
    assert float(dice_loss(sure, torch.full((1, 2, 2), 255))) == 0


def test_losses_are_taken_at_a_quarter_of_the_input() -> None:
    assert quarter(Preprocess(image_size=(224, 96))) == (56, 24)
    assert quarter(Preprocess(image_size=(2, 32))) == (1, 8)


def test_interim_maps_are_judged_as_the_mask_is_at_two_fifths() -> None:
    rng = np.random.default_rng(1)
    truth = torch.from_numpy(rng.integers(0, 3, (2, 8, 8)))
    truth[0, :2] = 255
    coarse, fine = (torch.from_numpy(rng.standard_normal((2, 3, side, side))) for side in (2, 4))

    got = interim_loss([coarse, fine], truth, torch.tensor([1.0, 2.0, 3.0]))

    both = [cross_entropy(logits, truth, torch.tensor([1.0, 2.0, 3.0])) for logits in (coarse, fine)]
    assert float(got) == pytest.approx(0.4 * float(sum(both)) / 2)


def test_a_separation_is_judged_by_pixels_of_each_class_and_by_regions_of_those_that_are_there() -> None:
    """Two images: one of classes 0 and 2, half of it not counted, and one of class 1."""
    rng = np.random.default_rng(1)
    truth = torch.tensor([[[0, 2], [255, 255]], [[1, 1], [1, 1]]])
    affinities, regions = (torch.from_numpy(rng.standard_normal(shape)).float() for shape in ((2, 3, 2, 2), (2, 3, 3)))
    separated = Separated(maps=affinities, logits=affinities, affinities=affinities, regions=regions)

    got = separation_loss(separated, truth)

    binary, told = 0.0, 0.0
    for n, k, y, x in np.ndindex(2, 3, 2, 2):
        if truth[n, y, x] != 255:
            s = float(affinities[n, k, y, x])
            binary += np.log1p(np.exp(-s if truth[n, y, x] == k else s)) / (3 * 4)
    for n, there in ((0, (0, 2)), (1, (1,))):
        told -= sum(float(torch.log_softmax(regions[n, k], dim=0)[k]) for k in there) / len(there)
    assert float(got) == pytest.approx(0.4 * binary + 0.1 * told, rel=1e-5)
    blank = torch.full_like(truth, 255)
    assert float(separation_loss(separated, blank)) == 0


# -------------------------------------------------------------------------------------------------------- augmentation


def coloured(mask: NpArray) -> NpArray:
    return np.array([(250, 0, 0), (0, 250, 0), (0, 0, 250)], np.uint8)[mask]


@pytest.mark.parametrize("names", [("flip",), ("crop",), ("flip", "crop")])
def test_a_mask_moves_as_its_image_does(names: tuple[str, ...]) -> None:
    """Where an image is its mask in colours, it still is behind flips and crops, but for the pixels at borders."""
    preprocess = Preprocess(image_size=(64, 48), mean=(0, 0, 0), std=(1, 1, 1))
    masks = np.stack([scene(seed, (64, 48))[1] for seed in range(24)])

    augment = JointAugmenter(names, preprocess, batch_size=24, seed=1)
    moves = augment.moves(torch.arange(24), (1, 0))
    moved, truth = augment.images(coloured(masks), moves), moved_masks(masks, moves, (64, 48))

    agree = (moved.argmax(1) == truth).float().mean((1, 2))
    assert float(agree.min()) > 0.95
    assert not torch.equal(truth, torch.from_numpy(masks.astype(np.int64)))


def test_an_image_moves_the_same_whatever_part_it_is_in() -> None:
    preprocess = Preprocess(image_size=SIZE)
    pixels, masks = (np.stack([scene(seed)[kind] for seed in range(6)]) for kind in (0, 1))
    augment = JointAugmenter(("flip", "crop"), preprocess, batch_size=6, seed=1)
    state = torch.get_rng_state()

    def moved(chosen: slice, part: Tensor, epoch: int) -> tuple[Tensor, Tensor]:
        moves = augment.moves(part, (epoch, 1))
        return augment.images(pixels[chosen], moves), moved_masks(masks[chosen], moves, (8, 8))

    whole = moved(slice(6), torch.arange(6), 2)
    part = moved(slice(3, 5), torch.tensor([3, 4]), 2)
    other = moved(slice(3, 5), torch.tensor([3, 4]), 3)

    assert all(torch.equal(a[3:5], b) for a, b in zip(whole, part, strict=True))
    assert not torch.equal(part[0], other[0])
    assert torch.equal(torch.get_rng_state(), state)


def test_what_would_not_move_the_mask_is_refused() -> None:
    assert joint_augmentations(("flip", "crop")).crop
    with pytest.raises(InputError) as error:
        joint_augmentations(("flip", "mixup"))
    assert str(error.value) == (
        "`augment`: moves masks and boxes by flip and crop alone, got 'mixup'\n  fix: train with `augment=flip,crop`"
    )


# ----------------------------------------------------------------------------------------------------------------- fits

METHODS: dict[str, Method] = {"ssf": SSF(), "full": Full()}


@pytest.mark.parametrize(
    "form", [Form(name="linear", maps=(0,)), Form(width=8, maps=(0, 1, 2)), Form(width=8, depthwise=True)]
)
def test_a_head_learns_colours_from_a_frozen_network(form: Form, convnet: Backbone, folder: Path) -> None:
    model = DenseModel(convnet, LinearProbe(), form, 3, seed=1)

    reached, losses = fitted(model, convnet, folder, epochs=12)

    assert reached.val.top1 > 0.4  # chance is about 0.2
    assert losses[-1] < losses[0]
    assert reached.val.n == 6


@pytest.mark.parametrize("name", ["ssf", "full"])
def test_methods_are_tuned_under_a_head_and_proved_with_it(name: str, convnet: Backbone, folder: Path) -> None:
    model = DenseModel(convnet, METHODS[name], Form(width=8, maps=(0, 1)), 3, seed=1)
    start = model.arrays()

    fitted(model, convnet, folder, epochs=1)

    moved = [key for key, array in model.arrays().items() if not np.array_equal(array, start[key])]
    assert moved
    images = normalize(np.stack([scene(seed)[0] for seed in range(2)]), convnet.preprocess)
    apart, largest = dense_algebra_error(model, convnet, images)
    assert largest > 0
    assert apart <= 1e-9 * largest  # float64: rounding alone


@pytest.mark.parametrize("architecture", ["test_vit", "test_resnet"])
def test_prompts_are_guided_by_interim_masks_that_no_pack_has(
    architecture: str, convnet: Backbone, folder: Path, tmp_path: Path
) -> None:
    given = convnet if architecture == "test_resnet" else tiny_vit(tmp_path, 5)
    method = SemanticPrompt(width=4, slots=3, recurrences=2)
    model = DenseModel(given, method, Form(width=8, maps=(0, 1)), 3, seed=1)
    places = len(model.sites)

    fitted(model, given, folder, epochs=1)

    assert len(model.tellers) == places == 3
    assert all(p.any() for p in model.tellers.parameters())
    assert model.interim is None
    images = normalize(np.stack([scene(seed)[0] for seed in range(2)]), given.preprocess)
    apart, largest = dense_algebra_error(model, given, images)
    assert apart <= 1e-9 * largest
    delta = extract_dense(model, given, task="scene", labels=NAMES)
    assert delta.stored_values == sum(x.size for x in model.arrays().values())
    judged = model.train().judged(model.maps(torch.from_numpy(images)))
    assert [tuple(x.shape[:2]) for x in judged.interim] == [(2, 3)] * (2 * places)  # each place, each recurrence
    with torch.no_grad():
        assert not model.eval().judged(model.maps(torch.from_numpy(images))).interim


def test_a_separation_is_tuned_over_a_method_and_proved_with_it(convnet: Backbone, folder: Path) -> None:
    model = DenseModel(convnet, SSF(), Form(width=8, maps=(0, 1), separation=True), 3, seed=1)

    reached, losses = fitted(model, convnet, folder, epochs=6)

    assert reached.val.top1 > 0.4  # chance is about 0.2
    assert losses[-1] < losses[0]
    images = normalize(np.stack([scene(seed)[0] for seed in range(2)]), convnet.preprocess)
    apart, largest = dense_algebra_error(model, convnet, images)
    assert 0 < apart <= 1e-9 * largest
    assert model.form.separation is not None
    assert model.form.separation.teller.weight.any()


def test_a_pack_answers_as_the_network_that_was_trained(convnet: Backbone, folder: Path) -> None:
    model = DenseModel(convnet, SSF(), Form(width=8, maps=(0, 1)), 3, seed=1)
    fitted(model, convnet, folder, epochs=2)
    images = normalize(np.stack([scene(seed)[0] for seed in range(3)]), convnet.preprocess)

    delta = read_pack(
        encode_pack(extract_dense(model, convnet, task="scene", labels=NAMES), codec="fp32"), answers=EVERY
    ).delta
    got = MergedHead(convnet, delta)(images)

    with torch.no_grad():
        expected = model(torch.from_numpy(images)).numpy()
    assert np.abs(got - expected).max() <= 1e-4 * np.abs(expected).max()  # fp32's limit
    assert (mask_of(got, SIZE) == mask_of(expected, SIZE)).mean() > 0.999


def test_prompts_of_a_transformer_pass_by_its_maps(tmp_path: Path, folder: Path) -> None:
    vit = tiny_vit(tmp_path, 5)
    model = perturbed(DenseModel(vit, VPTShallow(length=3), Form(width=8), 3, seed=1))
    images = normalize(np.stack([scene(seed)[0] for seed in range(2)]), vit.preprocess)

    apart, largest = dense_algebra_error(model, vit, images)

    assert largest > 0
    assert apart <= 1e-9 * largest
    assert len(extract_dense(model, vit, task="scene", labels=NAMES).branches) == 1


def perturbed(model: DenseModel) -> DenseModel:
    rng = np.random.default_rng(3)
    model.take({key: (x + 0.05 * rng.standard_normal(x.shape)).astype(np.float32) for key, x in model.arrays().items()})
    nn.init.normal_(model.form.last.weight)
    return model.eval()


def test_branches_stay_beside_a_head(convnet: Backbone) -> None:
    model = perturbed(DenseModel(convnet, ConvAdapter(), Form(width=8, maps=(1, 2)), 3, seed=1))
    images = normalize(np.stack([scene(seed)[0] for seed in range(2)]), convnet.preprocess)

    apart, largest = dense_algebra_error(model, convnet, images)

    assert apart <= 1e-9 * largest


def test_remembered_maps_give_the_same_numbers_as_running_the_network(convnet: Backbone, folder: Path) -> None:
    sets = [held(open_masks(folder, split), convnet.preprocess) for split in ("train", "val")]
    models = [DenseModel(convnet, LinearProbe(), Form(width=8, maps=(0, 1)), 3, seed=1) for _ in range(2)]
    kept = []
    for images in sets:
        rows = np.empty((len(images), models[1].row_values), np.float32)
        fill_rows(rows, models[1], images, convnet.preprocess, plan())
        kept.append(replace(images, rows=rows))

    asked = plan(epochs=2)
    ran, remembered = (
        fit_dense(
            model, *given, convnet.preprocess, asked, lambda step: None,
            objectives=[MaskObjective(model.form, convnet.preprocess, asked)],
        )
        for model, given in zip(models, (sets, kept), strict=True)
    )  # fmt: skip

    assert ran.val.top1 == pytest.approx(remembered.val.top1, abs=0.02)  # of other batches, in the last bits
    for name, value in models[0].form.state_dict().items():
        assert torch.allclose(value.float(), models[1].form.state_dict()[name].float(), atol=1e-3), name


def test_a_fit_gives_the_same_bits_again_and_in_parts(convnet: Backbone, folder: Path) -> None:
    def run(**changes: object) -> DenseModel:
        model = DenseModel(convnet, SSF(), Form(name="linear", maps=(1,)), 3, seed=1)
        fitted(model, convnet, folder, epochs=1, augment=("flip", "crop"), **changes)
        return model

    one, same, parts = run(), run(), run(accumulate=2)

    for name, value in one.form.state_dict().items():
        assert torch.equal(value, same.form.state_dict()[name])
        assert torch.allclose(value, parts.form.state_dict()[name], atol=1e-5)


def test_maps_are_standardised_by_all_places_of_all_images(convnet: Backbone, folder: Path) -> None:
    model = DenseModel(convnet, LinearProbe(), Form(name="linear", maps=(1,)), 3)
    images = held(open_masks(folder, "train"), convnet.preprocess)

    standardize(model, images, convnet.preprocess, plan())

    with torch.no_grad():
        x = model.maps(torch.from_numpy(normalize(images.pixels, convnet.preprocess)))["map.1"].double()
    torch.testing.assert_close(model.form.get_buffer("mean0").double(), x.mean((0, 2, 3)), rtol=1e-4, atol=1e-5)
    deviations = x.std((0, 2, 3), correction=0)
    least = 0.3 * deviations.square().mean().sqrt()
    torch.testing.assert_close(
        model.form.get_buffer("std0").double(), deviations.clamp_min(least), rtol=1e-4, atol=1e-5
    )


def test_epochs_are_judged_by_one_matrix_over_all_images(convnet: Backbone, folder: Path) -> None:
    model = DenseModel(convnet, LinearProbe(), Form(width=8, maps=(0, 1)), 3)
    fitted(model, convnet, folder, epochs=2)
    images = held(open_masks(folder, "val"), convnet.preprocess)

    judge = judged_by([MaskObjective(model.form, convnet.preprocess, plan())])
    miou, loss = judge(model, images, convnet.preprocess, plan(), None)

    with torch.no_grad():
        logits = model(torch.from_numpy(normalize(images.pixels, convnet.preprocess))).numpy()
    matrix = confusion(mask_of(logits, SIZE), read_masks(images.truths["mask"], SIZE), 3)
    assert miou == pytest.approx(mean_iou(matrix), abs=1e-3)  # ties of resized logits
    assert 0 < loss < 5


def test_dice_and_weights_take_part(convnet: Backbone, folder: Path) -> None:
    given = Form(name="linear", maps=(1,))
    plain, other = (DenseModel(convnet, LinearProbe(), given, 3, seed=1) for _ in range(2))

    fitted(plain, convnet, folder, epochs=1)
    fitted(other, convnet, folder, Losses(weights=(0.5, 1.0, 2.0), dice=1.0), epochs=1)

    assert not torch.equal(plain.form.shift, other.form.shift)
