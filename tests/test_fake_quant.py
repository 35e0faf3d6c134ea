"""A delta tuned on a rounded backbone: what is computed, what is kept, and that the backbone stays what it is."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

import edgepet
from edgepet.calibration.layers import Graph, Layer, find_layers
from edgepet.calibration.observe import Activations, observe
from edgepet.calibration.qdq import Int8Recipe, choose_ranges, quantize
from edgepet.calibration.rewriting import folded
from edgepet.calibration.slot_graphs import backbone_layers, coded_backbone
from edgepet.deltas.codes import CodedWeight, Range, coded
from edgepet.deltas.merge import fold_all
from edgepet.deltas.updates import Scale
from edgepet.errors import InputError
from edgepet.exporters.trace import base_graph
from edgepet.graphs.base import INPUT
from edgepet.images.preprocess import normalize
from edgepet.measuring.parity import ALGEBRA
from edgepet.methods import IA3, SSF, ConvAdapter, Full, KronA, LinearProbe, LoRA, Method, ParallelAdapter
from edgepet.methods.method import unflatten
from edgepet.networks.backbone import Backbone
from edgepet.reports.progress import Step
from edgepet.spec import NpArray, Preprocess
from edgepet.tuning.fake_quant import FakeQuant, range_of, rounded
from edgepet.tuning.fit import Fit, Judge, LabelledPixels, Plan, fit, top1_and_loss
from edgepet.tuning.model import TunedModel, algebra_error, logits_of
from edgepet.tuning.processes import Processes
from tests.fits import StopError, images, keeper, stepping
from tests.flow import Tasks, refused, train_arguments
from tests.flow import edgepet as command
from tests.tiny import perturb, random_images, random_pixels, same_bits, seeded, tiny_vit

PLAN = Plan(epochs=3, lr=1e-2, head_lr=1e-2, batch_size=4, seed=5)


class Small(nn.Module):
    """Every kind of reader: of images, behind ReLU with and without padding, behind a layer norm and behind GELU."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 8, stride=8)
        self.gate, self.value = nn.Conv2d(16, 16, 3, padding=1), nn.Conv2d(16, 16, 1)
        self.norm, self.fc1, self.fc2 = nn.LayerNorm(16), nn.Linear(16, 32), nn.Linear(32, 24)
        self.out = nn.Linear(24, 24, bias=False)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.stem(images))
        x = self.value(x) * torch.sigmoid(self.gate(x)) + x
        x = self.fc2(functional.gelu(self.fc1(self.norm(x.flatten(2).transpose(1, 2)))))
        return self.out(x.mean(1))


@pytest.fixture(scope="module")
def small() -> Backbone:
    return Backbone.from_module(seeded(Small(), 3), name="small", preprocess=Preprocess(image_size=(32, 32)))


def tuned(backbone: Backbone, method: Method, precision: str, *, seed: int = 1) -> TunedModel:
    return TunedModel(backbone, method, 3, seed=seed, fake_quant=FakeQuant(base_graph(backbone), precision))


# ------------------------------------------------------------------------------------------------------- one tensor


@pytest.mark.parametrize("of", [Range(scale=0.0625), Range(scale=0.0078125, shift=0.75)], ids=["symmetric", "shifted"])
def test_values_round_in_torch_as_in_numpy(of: Range) -> None:
    values = np.random.default_rng(1).normal(0, 5, 20_000).astype(np.float32)
    values[:512] = of.shift + of.scale * (np.arange(512) - 256) / 2  # codes and the ties between them

    got = rounded(torch.from_numpy(values), torch.tensor(of.scale), torch.tensor(of.shift))

    assert got.numpy().tobytes() == of.rounded(values).tobytes()
    assert len(np.unique(got.numpy())) == 256


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize(
    ("least", "most"), [(-2.0, 3.0), (-0.1, 3.0), (-0.74, 3.0), (-0.76, 3.0), (0.5, 3.0), (-3.0, -1.0), (0.0, 0.0)]
)
def test_ranges_are_those_of_the_int8_pass(least: float, most: float, padded: bool) -> None:
    low, high = np.array([least], np.float32), np.array([most], np.float32)
    layer = Layer(name="fc", kind="linear", reads="x", weight="fc.weight", bias=None, puts_out="y", padded=padded)
    seen = {"x": Activations(rows=np.stack([low, high]), least=low, most=high)}
    expected = choose_ranges([layer], seen, "min-max", {})["x"]

    scale, shift = range_of(torch.tensor(least), torch.tensor(most), may_shift=not padded)

    assert [scale.item(), shift.item()] == pytest.approx([expected.scale, expected.shift], rel=1e-6)  # float32


def test_the_gradient_is_one_within_the_range_and_zero_beyond_it() -> None:
    values = torch.tensor([-130.0, -128.4, -3.3, 0.0, 126.6, 127.4, 127.6, 1e9], requires_grad=True)

    rounded(values, torch.tensor(1.0), torch.tensor(0.0)).sum().backward()

    assert values.grad is not None
    assert values.grad.tolist() == [0, 1, 1, 1, 1, 1, 0, 0]


# ------------------------------------------------------------------------------------------------------ the network


def as_read(x: torch.Tensor, layer: Layer, code: CodedWeight, padded: bool) -> torch.Tensor:
    """What a layer reads, by the NumPy code of the int8 pass."""
    values = x.numpy() if code.divisors is None else x.numpy() / code.divisors
    channels = np.moveaxis(values, layer.channel_axis, -1).reshape(-1, values.shape[layer.channel_axis])
    seen = Activations(rows=channels, least=channels.min(0), most=channels.max(0))
    of = choose_ranges([replace(layer, padded=padded)], {layer.reads: seen}, "min-max", {})[layer.reads]
    made = of.rounded(values)
    return torch.from_numpy(made if code.divisors is None else made * code.divisors)


@pytest.mark.parametrize(("precision", "bits"), [("int8", 8), ("int4", 4)])
def test_the_network_computes_with_coded_weights_and_rounded_activations(
    precision: str, bits: int, small: Backbone
) -> None:
    batch, graph = torch.from_numpy(random_images(4, 8)), base_graph(small)
    codes, layers = coded_backbone(graph, bits), {layer.name: layer for layer in backbone_layers(graph)}
    net: Any = small.module
    assert [name for name, code in codes.items() if code.divisors is not None] == ["fc1.weight"]

    def weight_and_input(name: str, x: torch.Tensor, *, padded: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
        code = codes[f"{name}.weight"]
        return as_read(x, layers[name], code, padded), torch.from_numpy(code.dense)

    with torch.no_grad():
        x = torch.relu(functional.conv2d(*weight_and_input("stem", batch), net.stem.bias, stride=8))
        # the two read one tensor, and one of them pads it: neither range is shifted
        gate = functional.conv2d(*weight_and_input("gate", x, padded=True), net.gate.bias, padding=1)
        x = functional.conv2d(*weight_and_input("value", x, padded=True), net.value.bias) * torch.sigmoid(gate) + x
        x = functional.linear(*weight_and_input("fc1", net.norm(x.flatten(2).transpose(1, 2))), net.fc1.bias)
        x = functional.linear(*weight_and_input("fc2", functional.gelu(x)), net.fc2.bias)
        expected = functional.linear(*weight_and_input("out", x.mean(1)))
        got = tuned(small, LinearProbe(), precision).features(batch)
        float_features = net(batch)

    # float32; where a value lies between two codes a scale's last bit decides, which one image in eight may meet
    assert ((got - expected).abs().amax(1) < 1e-5).sum() >= 7
    assert (got - expected).abs().max() < 1e-2
    assert (got - float_features).abs().max() > (1e-2 if bits == 8 else 1e-1)


@pytest.mark.parametrize("architecture", ["test_vit", "test_convnext", "test_resnet"])
def test_the_network_answers_as_the_int8_graph_does(architecture: str, tmp_path: Path) -> None:
    network = tiny_vit(tmp_path, seed=7, architecture=architecture, image_size=64)
    base, batch = base_graph(network), random_images(4, 8, 64)
    fake_quant, codes = FakeQuant(base, "int8"), coded_backbone(base)
    graph = Graph(folded(onnx.load(str(base.model_path))))
    layers = find_layers(graph, base.places)
    seen = observe(graph.model, layers, batch, where=architecture)
    smooth = {
        layer.reads: divisors for layer in layers if (divisors := codes[layer.weight].divisors) is not None
    }  # fmt: skip
    for index, layer in enumerate(layers):  # the ranges that the graph gets, which float values flow through
        of = seen[layer.reads].divided(smooth.get(layer.reads, np.ones(1, np.float32)))
        fake_quant.least[index], fake_quant.most[index] = float(of.least.min()), float(of.most.max())
    fake_quant.batches.fill_(1)

    exact = ort.SessionOptions()
    exact.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    model = quantize(graph, layers, seen, Int8Recipe(), smooth=smooth).model.SerializeToString()
    (expected,) = ort.InferenceSession(model, exact, providers=["CPUExecutionProvider"]).run(None, {INPUT: batch})
    images = torch.from_numpy(batch)
    with torch.no_grad(), fake_quant.eval().reading(network.module):
        got = torch.func.functional_call(network.module, fake_quant.weights, (images,)).numpy()

    # float32 sums in another order, and batch norms that are folded, move a value now and then to the code beside it
    assert np.abs(got - expected).mean() < 0.2 * np.abs(logits_of(network.module, batch) - expected).mean()


@pytest.mark.parametrize(
    ("method", "recodes", "within"),
    [(SSF(), True, 1e-2), (IA3(), True, 1e-5), (Full(), True, 1e-5), (KronA(), True, 1e-5), (LoRA(), False, 1e-5)],
    ids=lambda value: getattr(value, "name", ""),
)
def test_a_tuned_network_is_the_folded_one_on_codes(
    method: Method, recodes: bool, within: float, backbone: Backbone
) -> None:
    """LoRA's addition is float beside its layer, and reads what the layer reads: as if the fold were not coded anew."""
    model = perturb(tuned(backbone, method, "int4"), seed=2)
    batch, codes = torch.from_numpy(random_images(4, 8)), coded_backbone(base_graph(backbone), 4)
    updates = method.lower(backbone.tensors, model.sites, unflatten(model.arrays(), model.sites))
    on_codes = {**backbone.tensors, **{name: code.dense for name, code in codes.items()}}
    folded = fold_all(on_codes, updates)
    moved = {
        u.target.tensor for u in updates if not (isinstance(u.update, Scale) and u.update.axis == "out")
    } & codes.keys()  # fmt: skip
    anew = {name: coded(folded[name], codes[name].divisors, 4).dense for name in moved}
    assert bool(moved) == (method.name != "ssf")

    def features(tensors: dict[str, NpArray]) -> torch.Tensor:
        state = {name: torch.from_numpy(np.array(tensor)) for name, tensor in tensors.items()}
        fake_quant = FakeQuant(base_graph(backbone), "int4")
        with torch.no_grad(), fake_quant.reading(backbone.module):
            return torch.func.functional_call(backbone.module, state, (batch,))

    with torch.no_grad():
        got = model.features(batch)

    expected, other = features(folded | (anew if recodes else {})), features(folded if recodes else folded | anew)
    far = (got - expected).abs().mean()
    # SSF scales outputs here and weights there: the last bits differ, and move some activations to the code beside
    assert far < within * expected.abs().mean()
    if moved:
        assert (got - other).abs().mean() > 10 * far
    assert (got - features(fold_all(backbone.tensors, updates))).abs().mean() > 10 * far


def test_the_gradient_goes_straight_through_a_coded_weight(small: Backbone) -> None:
    fake_quant = FakeQuant(base_graph(small), "int4")
    weight = torch.from_numpy(np.array(small.tensors["fc1.weight"])).requires_grad_()

    made = fake_quant.recoded("fc1.weight", weight)
    (2 * made).sum().backward()

    divisors = coded_backbone(base_graph(small), 4)["fc1.weight"].divisors
    assert made.detach().numpy().tobytes() == coded(small.tensors["fc1.weight"], divisors, 4).dense.tobytes()
    assert weight.grad is not None
    assert (weight.grad == 2).all()


def test_ranges_are_means_over_batches_and_rest_in_eval_mode(small: Backbone) -> None:
    fake_quant = FakeQuant(base_graph(small), "int8")
    batches = [torch.from_numpy(random_images(seed, 4)) for seed in (1, 2, 3)]

    with torch.no_grad(), fake_quant.reading(small.module):
        for batch in batches:
            small.module(batch)
        fake_quant.eval()
        small.module(10 * batches[0])

    assert fake_quant.batches.tolist() == [3] * 6
    assert fake_quant.least[0].item() == pytest.approx(np.mean([batch.min().item() for batch in batches]), rel=1e-6)
    assert fake_quant.most[0].item() == pytest.approx(np.mean([batch.max().item() for batch in batches]), rel=1e-6)


def test_the_newest_batch_never_weighs_less_than_a_hundredth(small: Backbone) -> None:
    fake_quant, batch = FakeQuant(base_graph(small), "int8"), torch.from_numpy(random_images(1, 4))
    fake_quant.batches.fill_(5000)

    with torch.no_grad(), fake_quant.reading(small.module):
        small.module(batch)

    assert fake_quant.most[0].item() == pytest.approx(0.01 * batch.max().item(), rel=1e-6)


class Noting(TorchFunctionMode):
    """Notes how many different values a convolution reads, where its kernel is one of ``kernels``."""

    def __init__(self, kernels: Iterable[torch.Tensor]) -> None:
        super().__init__()
        self.kernels, self.read = {kernel.data_ptr() for kernel in kernels}, list[int]()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is functional.conv2d and args[1].data_ptr() in self.kernels:
            self.read.append(len(torch.unique(args[0])))
        return func(*args, **(kwargs or {}))


def test_a_branch_reads_what_is_not_rounded(tmp_path: Path) -> None:
    network = tiny_vit(tmp_path, seed=7, architecture="test_resnet", image_size=64)
    model = tuned(network, ConvAdapter(), "int8")
    branches = model.branches(model.tuned())

    with torch.no_grad(), Noting(branch.tensors["conv.weight"] for branch in branches) as noted:
        model(torch.from_numpy(random_images(4, 8, 64)))

    taps = [network.module.get_submodule(branch.tap.removesuffix(":in")) for branch in branches]
    assert all(isinstance(tap, nn.Conv2d) for tap in taps)  # a layer whose own input is rounded to 256 values
    assert len(noted.read) == len(branches)
    assert min(noted.read) > 256


def test_a_network_without_a_layer_for_int8_is_refused() -> None:
    class Waves(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.filter = nn.Conv1d(3, 8, 5)

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return self.filter(images.flatten(2)).mean(2)

    waves = Backbone.from_module(seeded(Waves(), 1), name="waves", preprocess=Preprocess(image_size=(32, 32)))

    with pytest.raises(InputError) as refusal:
        FakeQuant(base_graph(waves), "int8")

    assert str(refusal.value) == (
        "module:waves: has no linear layer or convolution that int8 is for\n"
        "  fix: tune it with `backbone_precision=fp32`"
    )


# -------------------------------------------------------------------------------------------------------- a training


def run(
    backbone: Backbone,
    method: Method,
    plan: Plan,
    kept: Any = None,
    *,
    after: int | None = None,
    judge: Judge = top1_and_loss,
) -> tuple[TunedModel, Fit]:
    """Fit on a backbone in int8, with ``after`` only so many steps."""
    model = tuned(backbone, method, "int8")
    return model, stepping(model, backbone, plan, kept, after=after, judge=judge)


def own(model: TunedModel) -> dict[str, NpArray]:
    return {n: t.detach().numpy().copy() for n, t in model.state_dict().items() if not n.startswith("backbone.")}


@pytest.mark.parametrize("method", [SSF(), LoRA(), KronA(), ParallelAdapter(), LinearProbe()], ids=lambda m: m.name)
def test_a_training_leaves_the_backbone_and_the_algebra_as_they_were(method: Method, backbone: Backbone) -> None:
    batch, module = random_images(6, 4), backbone.module
    tensors, answers = {name: tensor.copy() for name, tensor in backbone.tensors.items()}, logits_of(module, batch)

    model, _ = run(backbone, method, PLAN)

    error, largest = algebra_error(model, backbone, batch)
    assert error <= ALGEBRA * largest
    assert model.fake_quant is not None
    assert {
        name: tensor.dtype for name, tensor in model.fake_quant.named_buffers() if tensor.dtype != torch.float32
    } == {}
    assert same_bits({n: t.detach().numpy() for n, t in module.state_dict().items()}, tensors)
    assert logits_of(module, batch).tobytes() == answers.tobytes()
    assert [name for name, part in module.named_modules() if part._forward_pre_hooks or part._forward_hooks] == []


@pytest.mark.parametrize("autocast", [False, True], ids=["fp32", "bf16"])
@pytest.mark.parametrize("after", [1, 4])
def test_a_fit_that_was_stopped_ends_with_the_same_bits(
    after: int, autocast: bool, backbone: Backbone, tmp_path: Path
) -> None:
    plan = replace(PLAN, autocast=autocast, augment=("flip", "crop"))
    expected, whole = run(backbone, SSF(), plan)
    with pytest.raises(StopError):
        run(backbone, SSF(), plan, keeper(tmp_path), after=after)

    got, resumed = run(backbone, SSF(), plan, keeper(tmp_path))

    assert {"fake_quant.least", "fake_quant.most", "fake_quant.batches"} < own(expected).keys()
    assert same_bits(own(got), own(expected))
    assert (resumed.best_epoch, resumed.val) == (whole.best_epoch, whole.val)


def test_the_ranges_that_stay_are_those_of_the_best_epoch(backbone: Backbone) -> None:
    worse = iter([0.9, 0.5, 0.1])

    model, fitted = run(backbone, SSF(), PLAN, judge=lambda *given: (next(worse), 1.0))

    assert fitted.best_epoch == 1
    assert model.fake_quant is not None
    assert set(model.fake_quant.batches.tolist()) == {1 + 3}  # one of 12 images before training, three of 4 in an epoch


def test_ranges_begin_with_all_training_images(backbone: Backbone) -> None:
    model = tuned(backbone, LinearProbe(), "int8")  # nothing but the head is trained: no other pass sees them
    seen, plan = images(1, 130), replace(PLAN, epochs=1, batch_size=64)

    fit(model, seen, images(2, 6), backbone.preprocess, plan, lambda step: None)

    assert model.fake_quant is not None
    assert set(model.fake_quant.batches.tolist()) == {3}
    first = [normalize(seen.pixels[start : start + 64], backbone.preprocess).min() for start in (0, 64, 128)]
    assert model.fake_quant.least[0].item() == pytest.approx(np.mean(first), rel=1e-6)


def test_processes_go_on_with_the_mean_of_their_ranges(backbone: Backbone, monkeypatch: pytest.MonkeyPatch) -> None:
    kept, batches = torch.tensor([1.0, 5.0]), list[float]()
    Processes(0, 2, object(), sum_of=lambda tensor: tensor + 3).average([kept])  # in the other process they are 3
    assert kept.tolist() == [2, 4]

    monkeypatch.setattr(Processes, "average", lambda processes, tensors: batches.append(float(tensors[2][0])))
    run(backbone, SSF(), PLAN)
    assert batches == [1 + step for step in range(1, 10)]


@pytest.mark.slow
def test_a_delta_tuned_on_int4_is_better_there_than_one_tuned_in_float(backbone: Backbone) -> None:
    plan, labels = replace(PLAN, epochs=12, batch_size=12), np.arange(24, dtype=np.int64) % 3

    def loss(seed: int, *, on_codes: bool) -> float:
        """Of the images that it was tuned on, with the backbone in int4."""
        data = LabelledPixels(pixels=random_pixels(seed, 24), labels=labels)
        model = tuned(backbone, SSF(), "int4", seed=seed) if on_codes else TunedModel(backbone, SSF(), 3, seed=seed)
        fit(model, data, data, backbone.preprocess, plan, lambda step: None)
        judged = tuned(backbone, SSF(), "int4")
        judged.load(model.arrays(), model.head())
        logits = logits_of(judged.eval(), normalize(data.pixels, backbone.preprocess))
        return float(functional.cross_entropy(torch.from_numpy(logits), torch.from_numpy(labels)))

    losses = [(loss(seed, on_codes=True), loss(seed, on_codes=False)) for seed in (1, 2, 3)]

    assert all(repaired < lost for repaired, lost in losses), losses
    assert sum(repaired for repaired, _ in losses) < 0.95 * sum(lost for _, lost in losses), losses


# -------------------------------------------------------------------------------------------------------- the command


def test_a_resumed_training_on_int8_writes_the_same_pack(tasks: Tasks, backbone: Backbone, tmp_path: Path) -> None:
    seen = 0

    def stop(step: Step) -> None:
        nonlocal seen
        seen += 1
        if seen > 4:
            raise StopError

    def train(pack: Path, precision: str, **more: Any) -> None:
        pack.parent.mkdir(exist_ok=True)
        edgepet.train(
            tasks.data, backbone, "ssf", pack, epochs=2, batch_size=8, precision="fp32", checkpoint_s=0,
            backbone_precision=precision, **more,
        )  # fmt: skip

    whole, pack = tmp_path / "whole" / "flowers.pet", tmp_path / "stopped" / "flowers.pet"
    train(whole, "int8")
    with pytest.raises(StopError):
        train(pack, "int8", say=stop)
    with pytest.raises(InputError, match="other settings, got backbone_precision int8, now fp32\n"):
        train(pack, "fp32", resume=True)
    train(pack, "int8", resume=True)

    assert pack.read_bytes() == whole.read_bytes()
    train(pack, "fp32")
    assert pack.read_bytes() != whole.read_bytes()


@pytest.mark.parametrize("precision", ["int8", "int4"])
def test_the_command_tunes_on_codes_and_says_so(precision: str, tasks: Tasks, tmp_path: Path) -> None:
    pack = tmp_path / "shapes.pet"
    arguments = [*train_arguments(tasks.spec, tasks.data, "ssf", pack), "--backbone-precision", precision]

    said, told = command(*arguments, "--json"), command(*arguments)

    assert said.code == told.code == 0, said.err
    assert said.json["backbone_precision"] == precision
    assert said.json["val_rounded"].keys() == said.json["val"].keys()
    assert said.json["val_rounded"]["n"] == 12
    assert said.json["algebra_max_abs"] <= said.json["algebra_limit"]
    top1 = f"{100 * said.json['val_rounded']['top1']:.1f} %"
    assert f"  val {top1} with the backbone rounded to {precision}, as it was tuned\n" in told.out
    assert edgepet.read_pack(pack).delta.training["backbone_precision"] == precision


def test_a_training_in_float_says_that_nothing_was_rounded(tasks: Tasks) -> None:
    report = tasks.reports["shapes"]

    assert (report["backbone_precision"], report["val_rounded"]) == ("fp32", None)


def test_an_unknown_precision_of_the_backbone_is_refused(tasks: Tasks, backbone: Backbone, tmp_path: Path) -> None:
    pack = tmp_path / "shapes.pet"

    message = refused(2, *train_arguments(tasks.spec, tasks.data, "ssf", pack), "--backbone-precision", "int2")
    with pytest.raises(InputError) as refusal:
        edgepet.train(tasks.data, backbone, "ssf", pack, backbone_precision="int2")

    assert "argument --backbone-precision: invalid choice: 'int2'" in message
    assert str(refusal.value) == "`backbone_precision`: is fp32, int8 or int4, got 'int2'"
