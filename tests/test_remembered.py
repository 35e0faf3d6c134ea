"""What lies before the first tuned block is computed once: the same bits, and the blocks before are not run again."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import edgepet
from edgepet.errors import InputError
from edgepet.exporters.trace import base_graph
from edgepet.images.held import Turn, features_folder
from edgepet.methods import SSF, LinearProbe, LoRA, Method, configure
from edgepet.methods.depth import in_blocks
from edgepet.networks.backbone import Backbone
from edgepet.networks.split import begun, entering, split_at
from edgepet.reports.progress import Step
from edgepet.spec import NpArray, Preprocess
from edgepet.tuning.fake_quant import FakeQuant
from edgepet.tuning.fit import Fit, LabelledPixels, Plan, fit
from edgepet.tuning.model import TunedModel
from edgepet.tuning.remembered import Place, Remembered, remember
from tests.architectures import swin
from tests.fits import images
from tests.flow import Tasks
from tests.tiny import random_images, same_bits, seeded, tiny_vit

PLAN = Plan(epochs=3, lr=1e-2, head_lr=1e-2, batch_size=4, seed=5)
TRAIN, VAL = images(1, 18), images(2, 7)


@pytest.fixture(scope="module")
def network(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Backbone]:
    folder = tmp_path_factory.mktemp("networks")
    return lambda architecture: tiny_vit(folder, seed=7, architecture=architecture)


class Told(list[str]):
    """Lines and stages, as they were told."""

    def tell(self, line: str, details: object) -> None:
        self.append(line)


def place(folder: Path, told: Told, *, budget_bytes: int = 10**9, turn: Turn | None = None, of: str = "x") -> Place:
    return Place(
        folder=folder / "t.features", budget_bytes=budget_bytes, identity={"of": of}, turn=turn or Turn(),
        tell=told.tell, stage=told.append,
    )  # fmt: skip


def run(
    backbone: Backbone, method: Method, plan: Plan = PLAN, *, where: Place | None = None
) -> tuple[dict[str, NpArray], Fit, Remembered | None]:
    """Fit, remembering as ``where`` says; returns all tensors of the model but the backbone's."""
    model = TunedModel(backbone, method, 3, seed=1)
    known = None if where is None else remember(model, backbone, TRAIN, VAL, plan, where)
    given = (TRAIN, VAL) if known is None else (known.train, known.val)
    with model.beginning(None if known is None else known.front):
        fitted = fit(model, *given, backbone.preprocess, plan, lambda step: None)
    state = {n: t.detach().numpy().copy() for n, t in model.state_dict().items() if not n.startswith("backbone.")}
    return state, fitted, known


class Calls:
    """How often modules ran, whatever forwards stand in for them."""

    def __init__(self, module: nn.Module, *names: str) -> None:
        self.counts = dict.fromkeys(names, 0)
        for name in names:
            module.get_submodule(name).register_forward_hook(self.counting(name))

    def counting(self, name: str) -> Callable[..., None]:
        def count(module: nn.Module, inputs: object, output: object) -> None:
            self.counts[name] += 1

        return count


# ------------------------------------------------------------------------------------------------------ the same bits


@pytest.mark.parametrize(
    "autocast", [pytest.param(False, id="fp32"), pytest.param(True, id="bf16", marks=pytest.mark.slow)]
)
@pytest.mark.parametrize("name", ["ssf", "lora", "full", "bi-lora", "adaptformer", "vpt-shallow", "prefix", "convpass"])
def test_a_fit_on_what_is_remembered_ends_with_the_same_bits(
    name: str, autocast: bool, backbone: Backbone, tmp_path: Path
) -> None:
    method, plan = configure(name, {"blocks": "3-5"}), replace(PLAN, autocast=autocast)
    expected, whole, _ = run(backbone, method, plan)

    got, fitted, known = run(backbone, method, plan, where=place(tmp_path, Told()))

    assert known is not None
    assert known.train.pixels.shape == (18, 5, 64)
    assert same_bits(got, expected)
    assert (fitted.val, fitted.probe, fitted.best_epoch) == (whole.val, whole.probe, whole.best_epoch)


@pytest.mark.parametrize(
    "changes",
    [{"balance": "weights"}, {"balance": "sampling"}, {"patience": 1}, {"schedule": "step"}],
    ids=str,
)
def test_so_does_one_of_any_recipe(changes: dict[str, object], backbone: Backbone, tmp_path: Path) -> None:
    method, plan = in_blocks(SSF(), "4"), replace(PLAN, **changes)  # type: ignore[arg-type]
    expected, whole, _ = run(backbone, method, plan)

    got, fitted, known = run(backbone, method, plan, where=place(tmp_path, Told()))

    assert known is not None
    assert same_bits(got, expected)
    assert fitted.epochs == whole.epochs


def test_a_part_of_one_image_is_the_same_up_to_rounding(backbone: Backbone, tmp_path: Path) -> None:
    """Features come of 64 images at a time; of one or two by themselves torch adds up in another order."""
    method, plan = in_blocks(SSF(), "4"), replace(PLAN, accumulate=3)
    expected, _, _ = run(backbone, method, plan)

    got, _, known = run(backbone, method, plan, where=place(tmp_path, Told()))

    assert known is not None
    # AdamW's steps of lr where a gradient is rounding alone
    assert np.median([np.median(np.abs(got[name] - expected[name])) for name in got]) < 1e-6
    assert max(float(np.abs(got[name] - expected[name]).max()) for name in got) < 1e-2


@pytest.mark.parametrize("architecture", ["test_convnext", "test_resnet", "test_efficientnet", "test_vit4"])
def test_so_does_one_on_another_network(architecture: str, network: Callable[[str], Backbone], tmp_path: Path) -> None:
    backbone = network(architecture)
    method = in_blocks(SSF(), "3")
    expected, _, _ = run(backbone, method)

    got, _, known = run(backbone, method, where=place(tmp_path, Told()))

    assert known is not None
    assert same_bits(got, expected)


def test_clips_are_remembered_frame_by_frame(network: Callable[[str], Backbone], tmp_path: Path) -> None:
    images_of = network("test_vit")
    clips = Backbone.from_module(images_of.module, name="clips", preprocess=replace(images_of.preprocess, frames=2))
    pixels = TRAIN.pixels.reshape(9, 2, 32, 32, 3)
    data = LabelledPixels(pixels, TRAIN.labels[:9])
    fitted = []
    for remembers in (False, True):
        model = TunedModel(clips, in_blocks(SSF(), "4-5"), 3, seed=1)
        known = remember(model, clips, data, data, PLAN, place(tmp_path, Told())) if remembers else None
        with model.beginning(known.front if known else None):
            fit(
                model, *([known.train, known.val] if known else [data, data]), clips.preprocess, PLAN, lambda step: None
            )
        fitted.append(model.arrays())
    assert known is not None
    assert known.train.pixels.shape == (9, 2, 5, 64)
    assert same_bits(*fitted)


# --------------------------------------------------------------------------------------------- what is not run again


def test_the_blocks_before_run_once_for_every_image_however_many_epochs(backbone: Backbone, tmp_path: Path) -> None:
    counts = []
    for epochs in (1, 4):
        own = Backbone.from_module(backbone.module, name="own", preprocess=backbone.preprocess)
        calls = Calls(own.module, "patch_embed.proj", "blocks.2.attn.qkv", "blocks.3.attn.qkv")
        run(own, in_blocks(LoRA(), "3-5"), replace(PLAN, epochs=epochs), where=place(tmp_path, Told()))
        counts.append(calls.counts)

    few, many = counts
    # Watching the network twice, a batch whole and the same batch up to the block, train and val
    assert few["patch_embed.proj"] == few["blocks.2.attn.qkv"] == 2 + 2 + 2
    assert {name: many[name] - few[name] for name in many} == {
        "patch_embed.proj": 0,
        "blocks.2.attn.qkv": 0,
        "blocks.3.attn.qkv": 3 * (5 + 1),  # three epochs more of five steps, and val
    }


def test_the_networks_modules_come_back_as_they_were(backbone: Backbone, tmp_path: Path) -> None:
    before = {name: dict(part.__dict__) for name, part in backbone.module.named_modules()}
    hooks = {name: len(part._forward_hooks) + len(part._forward_pre_hooks) for name, part in _modules(backbone)}

    run(backbone, in_blocks(SSF(), "3"), where=place(tmp_path, Told()))

    assert {name: part.__dict__.keys() for name, part in _modules(backbone)} == {n: d.keys() for n, d in before.items()}
    assert {n: len(part._forward_hooks) + len(part._forward_pre_hooks) for n, part in _modules(backbone)} == hooks


def _modules(backbone: Backbone) -> list[tuple[str, nn.Module]]:
    return list(backbone.module.named_modules())


# --------------------------------------------------------------------------------------------------- files and memory


def test_what_memory_does_not_hold_lies_in_files_that_are_made_once(backbone: Backbone, tmp_path: Path) -> None:
    told, method, size = Told(), in_blocks(SSF(), "3-5"), (18 + 7) * 5 * 64 * 4
    expected, _, _ = run(backbone, method)

    for budget, of in ((size, "x"), (size - 1, "x"), (0, "x"), (0, "another training")):
        got, _, known = run(backbone, method, where=place(tmp_path, told, budget_bytes=budget, of=of))
        assert known is not None
        assert isinstance(known.train.pixels, np.memmap) is (budget < size)
        assert same_bits(got, expected)

    assert told == ["compute once what enters blocks.3 of 25 images, 32.0 kB"] * 3
    assert {path.name for path in (tmp_path / "t.features").iterdir()} == {"features.json", "train.npy", "val.npy"}


def test_a_process_that_does_not_write_waits_for_the_one_that_does(backbone: Backbone, tmp_path: Path) -> None:
    told, method, asked = Told(), in_blocks(SSF(), "3-5"), list[bool]()

    def anywhere(here: bool) -> bool:
        asked.append(here)
        return len(asked) != 2  # too large in the other process, and there is room on its disk

    def wait() -> None:
        other = TunedModel(backbone, method, 3, seed=1)
        remember(other, backbone, TRAIN, VAL, PLAN, place(tmp_path, told, budget_bytes=0))

    turn = Turn(anywhere=anywhere, makes=False, wait=wait)
    _, _, known = run(backbone, method, where=place(tmp_path, told, turn=turn))

    assert asked == [False] * 3
    assert told == ["compute once what enters blocks.3 of 25 images, 32.0 kB"]
    assert known is not None
    assert isinstance(known.train.pixels, np.memmap)


def test_without_room_the_whole_network_is_run_and_that_is_said(
    backbone: Backbone, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told = Told()
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))

    _, _, known = run(backbone, in_blocks(SSF(), "3-5"), where=place(tmp_path, told, budget_bytes=0))

    why = "there is no room for 32.0 kB in memory or on the disk"
    assert (known, told) == (None, [f"every step runs what lies before blocks.3: {why}"])


def test_a_training_finds_its_features_again_and_they_go_when_the_pack_is_there(tasks: Tasks, tmp_path: Path) -> None:
    told, packs = list[str](), [tmp_path / name / "t.pet" for name in ("whole", "stopped")]
    settings = {"blocks": "3-5"}

    def trained(pack: Path, say: Callable[[Step], None] = lambda step: None, *, resume: bool = False) -> None:
        pack.parent.mkdir(exist_ok=True)
        edgepet.train(
            tasks.data, tasks.spec, "lora", pack, image_size=32, epochs=2, batch_size=8, precision="fp32", memory=0,
            checkpoint_s=0.0, settings=settings, say=say, stage=told.append, resume=resume,
        )  # fmt: skip

    def stop(step: Step) -> None:
        if step.images >= 32:
            raise KeyboardInterrupt

    trained(packs[0])
    with pytest.raises(KeyboardInterrupt):
        trained(packs[1], stop)
    assert (features_folder(packs[1]) / "train.npy").stat().st_size > 24 * 5 * 64 * 4
    trained(packs[1], resume=True)

    assert told.count("compute once what enters blocks.3 of 36 images, 46.1 kB") == 2  # and not a third time
    assert packs[0].read_bytes() == packs[1].read_bytes()
    for pack in packs:
        assert {path.name for path in pack.parent.iterdir()} == {"t.pet", "t.work"}


# ----------------------------------------------------------------------------------------- where nothing is remembered


class Around(nn.Module):
    """Three blocks of two layers, and what enters the network goes around them, to the end."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.blocks = nn.ModuleList(
            [nn.Sequential(nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 3, padding=1)) for _ in range(3)]
        )

    def forward(self, images: Tensor) -> Tensor:
        x = first = self.stem(images)
        for block in self.blocks:
            x = x + block(x)
        return (x + first).mean((2, 3))


@pytest.mark.parametrize(("blocks", "augment"), [("0-5", ()), ("2-5", ("flip",))], ids=["none before", "augmented"])
def test_where_there_is_nothing_to_remember_nothing_changes(
    blocks: str, augment: tuple[str, ...], backbone: Backbone, tmp_path: Path
) -> None:
    told, plan = Told(), replace(PLAN, augment=augment)

    _, _, known = run(backbone, in_blocks(SSF(), blocks), plan, where=place(tmp_path, told))

    assert (known, told) == (None, [])


def test_a_linear_probe_remembers_its_features_as_ever(backbone: Backbone, tmp_path: Path) -> None:
    told = Told()

    _, _, known = run(backbone, in_blocks(LinearProbe(), "3-5"), where=place(tmp_path, told))

    assert (known, told) == (None, [])


def test_a_network_that_cannot_be_cut_is_run_whole_and_that_is_said(tmp_path: Path) -> None:
    around = Backbone.from_module(seeded(Around(), 3), name="around", preprocess=Preprocess(image_size=(32, 32)))
    told = Told()
    expected, _, _ = run(around, in_blocks(SSF(), "1-2"))

    got, _, known = run(around, in_blocks(SSF(), "1-2"), where=place(tmp_path, told))

    why = "the network cannot be cut there: something goes around them"
    assert (known, told) == (None, [f"every step runs what lies before blocks.1: {why}"])
    assert same_bits(got, expected)


def test_a_backbone_that_is_rounded_is_run_whole_and_that_is_said(backbone: Backbone, tmp_path: Path) -> None:
    told = Told()
    model = TunedModel(backbone, in_blocks(SSF(), "3"), 3, fake_quant=FakeQuant(base_graph(backbone), "int8"))

    assert remember(model, backbone, TRAIN, VAL, PLAN, place(tmp_path, told)) is None

    why = "with `backbone_precision=int8` their ranges move while tuning"
    assert told == [f"every step runs what lies before blocks.3: {why}"]


def test_a_block_that_more_than_one_tensor_enters_is_refused() -> None:
    network = seeded(Around(), 3)
    network.blocks.append(network.blocks[0])  # type: ignore[union-attr]

    with pytest.raises(InputError, match=r"^blocks\.0: must be entered once, by one tensor of every image$"):
        split_at(network.eval(), "blocks.0", torch.zeros(2, 3, 8, 8))


# -------------------------------------------------------------------------------------------------------- the split


def test_a_network_of_windows_goes_on_from_any_of_its_blocks() -> None:
    module, pictures = seeded(swin(), 5).eval(), torch.from_numpy(random_images(4, 3))
    with torch.no_grad():
        expected = module(pictures)
        for block in ("layers.0.blocks.1", "layers.1.blocks.0"):
            split = split_at(module, block, pictures[:2])
            rows = entering(module, split, pictures)
            with begun(module, split, rows) as given:
                assert given.shape == pictures.shape
                assert given.isnan().all()
                assert torch.equal(module(given), expected)
    assert torch.equal(module(pictures).detach(), expected)
