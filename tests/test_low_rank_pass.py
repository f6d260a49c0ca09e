"""The pass low_rank: budgets, what it leaves alone, what it refuses, folders, files of the decomposed network."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pruned import answers, relative_error, settled
from torch import Tensor, nn

import deploykit as dk
from deploykit import passes, targets
from deploykit.core.context import Context
from deploykit.core.data import DataSet
from deploykit.core.errors import DeploykitError
from deploykit.core.manifest import Finding, load_manifest
from deploykit.core.recipe import Recipe, Step
from deploykit.cost import cost
from deploykit.hub.structure import attach_mask
from deploykit.low_rank.factored import Factored
from deploykit.low_rank.forms import decomposed, merged
from deploykit.low_rank.surgery import factors_of
from deploykit.models import load_model, save_compressed

NET = """
import torch
from torch import nn


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 12, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(12)
        self.conv = nn.Conv2d(12, 16, 3, stride=2, padding=1)
        self.deep = nn.Conv2d(16, 16, 3, padding=1, groups=16)
        self.head = nn.Linear(16, 10)

    def forward(self, x):
        x = torch.relu(self.norm(self.stem(x)))
        x = torch.relu(self.deep(torch.relu(self.conv(x))))
        return self.head(x.mean((2, 3)))


def build():
    torch.manual_seed(0)
    return Net()
"""


def net() -> Any:
    space: dict[str, Any] = {}
    exec(NET, space)
    return settled(space["build"]())


def pictures(n: int = 64, seed: int = 0) -> DataSet:
    """Neighbouring pixels and channels are alike."""
    random = np.random.default_rng(seed)
    x = random.normal(size=(n, 3, 10, 10)).cumsum(2).cumsum(3) / 4
    x = np.einsum("dc,nchw->ndhw", [[1, 0.2, 0], [0.9, 0.3, 0.1], [0.8, 0.1, 0.3]], x)
    return DataSet.of({"x": x.astype(np.float32)})


def context(model: nn.Module, data: DataSet | None = None, **more: Any) -> Context:
    data = data or pictures()
    example = next(data.batches(2)).inputs
    target = replace(targets.load("x86"), channel_multiple=1)
    return Context(
        target, {"calibration": data}, example, original=model, cost=lambda m: cost(m, example), **more
    )  # fmt: skip


def run(model: nn.Module, here: Context | None = None, **options: Any) -> nn.Module:
    made: nn.Module = passes.build(Step("low_rank", options))(model, here or context(model))
    return made


# ------------------------------------------------------------------ budgets


@pytest.mark.parametrize("method", ["data", "weights", "alds", "equal_error", "constant", "energy", "pca", "l_rank"])
@pytest.mark.parametrize("of", ["params", "macs", "bytes"])
def test_at_least_the_share_goes_and_the_model_is_not_changed(method: str, of: str) -> None:
    model = net()
    before, here = copy.deepcopy(model.state_dict()), context(net())
    assert here.cost is not None
    made = run(model, here, amount=0.2, of=of, method=method)
    assert getattr(here.cost(made), of) <= 0.8 * getattr(here.cost(model), of)
    assert getattr(here.cost(made), of) >= 0.6 * getattr(here.cost(model), of)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


@pytest.mark.parametrize("form", ["channel", "spatial", "tucker", "cp"])
@pytest.mark.parametrize("method", ["data", "equal_error"])
def test_every_form_meets_the_budget_with_and_without_data(form: str, method: str) -> None:
    model, notes = net(), list[Finding]()
    here = context(model, note=notes.append)
    assert here.cost is not None
    made = run(model, here, amount=0.2, form=form, method=method)
    assert here.cost(made).params <= 0.8 * here.cost(model).params
    assert {m.form for m in made.modules() if isinstance(m, Factored)} == {form}
    assert "of the parameters removed (CR-P)" in notes[0].summary


def test_what_may_be_left_can_be_said_too() -> None:
    model = net()
    here = context(model)
    assert here.cost is not None
    assert here.cost(run(model, here, at_most=1800)).params <= 1800
    assert not any(isinstance(m, Factored) for m in run(model, here, at_most=10**6).modules())


def test_a_budget_that_cannot_be_met_says_what_can_be() -> None:
    with pytest.raises(DeploykitError, match=r"90.0% cannot be saved; at most \d\d.\d% can"):
        run(net(), amount=0.9)
    with pytest.raises(DeploykitError, match=r"cannot be saved; at most 0.0% can"):
        run(net(), context(net(), times=lambda modules: [1.0 + i for i in range(len(modules))]), amount=0.1, of="ms")


def test_milliseconds_and_bytes_of_files_are_measured() -> None:
    model = net()

    def size(module: nn.Module) -> int:
        return 1000 + sum(p.numel() for p in module.parameters())

    here = context(model, file_bytes=size, times=lambda modules: [float(size(m)) for m in modules])
    for of in ("artifact", "ms"):
        made = run(model, here, amount=0.15, of=of)
        assert 0.7 * size(model) < size(made) <= 0.85 * size(model)


def test_layers_whose_factors_take_longer_stay_whole() -> None:
    """Here a decomposed stem is slow, and everything else is as slow as it is large."""
    model = net()

    def time(module: Any) -> float:
        return sum(p.numel() for p in module.parameters()) + 1e4 * isinstance(module.stem, Factored)

    made = run(model, context(model, times=lambda modules: [time(m) for m in modules]), amount=0.2, of="ms")
    assert not isinstance(made.stem, Factored) and isinstance(made.conv, Factored)


def test_channels_between_factors_are_a_multiple_of_the_targets() -> None:
    model = net()
    here = replace(context(model), target=replace(targets.load("x86"), channel_multiple=4))
    for made in (run(model, here, amount=0.3), run(model, amount=0.3, multiple=4)):
        factored: Any = [m for m in made.modules() if isinstance(m, Factored)]
        assert factored and all(m[0].weight.shape[0] % 4 == 0 for m in factored)


# ------------------------------------------------------------------ what comes out


def test_on_data_never_seen_data_answer_better_than_weights_alone() -> None:
    model, unseen = net(), pictures(seed=9)
    made = {method: run(model, amount=0.4, method=method) for method in ("data", "alds")}
    found = {method: relative_error(each, model, unseen) for method, each in made.items()}
    assert found["data"] < 0.3 * found["alds"]


def test_the_ranks_of_every_layer_are_noted_with_the_reason_where_there_are_none() -> None:
    notes: list[Finding] = []
    model = net()
    made = run(model, context(model, note=notes.append), amount=0.3, method="alds", skip=("head",))
    ranks, decay = notes
    rows = {row[0]: dict(zip(ranks.columns, row, strict=True)) for row in ranks.rows}
    assert rows.keys() == {"stem", "conv", "deep", "head"}
    assert "depthwise" in str(rows["deep"]["whole because"])
    assert rows["head"]["form"] == "whole"
    for name, row in rows.items():
        layer = made.get_submodule(name)
        if isinstance(layer, Factored):
            assert (row["slices k"], row["rank j"]) == (layer.ranks[0], str(layer.ranks[1]))
            factors = sum(p.numel() for n, p in layer.named_parameters() if "weight" in n)
            weight: Any = model.get_submodule(name).weight
            assert row["weights left (%)"] == pytest.approx(100 * factors / weight.numel())
            assert row["error"] <= row["bound"]  # type: ignore[operator]
    assert decay.heat == decay.columns
    cut = {str(row[0]): row[2] for row in decay.rows if row[1] == 0.0}  # the largest value, and where the layer is cut
    for name, row in rows.items():
        if row["form"] != "whole":
            assert any(c.startswith(f"{name} (k = {row['slices k']}, j = {row['rank j']} of") for c in cut)
    assert set(cut.values()) == {100.0}
    assert "CR-P" in ranks.summary and "CR-F" in ranks.summary


def test_the_same_seed_gives_the_same_ranks_and_weights() -> None:
    model = net()
    first, second = (run(model, amount=0.3).state_dict() for _ in range(2))
    assert all(torch.equal(v, second[k]) for k, v in first.items())


def test_without_32_samples_weights_alone_decide() -> None:
    model, notes = net(), list[Finding]()
    here = context(model, pictures(31), note=notes.append)
    automatic, weights = (run(model, here, amount=0.3, method=m).state_dict() for m in ("auto", "weights"))
    assert all(torch.equal(v, weights[k]) for k, v in automatic.items())


# ------------------------------------------------------------------ what it leaves alone


class SameStem(nn.Module):
    """A class that pads in forward, as TensorFlow does, and one that scales its weight."""

    class Pads(nn.Conv2d):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(nn.functional.pad(x, (0, 1, 0, 1)))

    class Scales(nn.Conv2d):
        def forward(self, x: Tensor) -> Tensor:
            return self._conv_forward(x, self.weight / self.weight.std(), self.bias)

    def __init__(self) -> None:
        super().__init__()
        self.pads, self.scales, self.last = self.Pads(3, 12, 3), self.Scales(12, 12, 3), nn.Conv2d(12, 24, 3)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.last(torch.relu(self.scales(torch.relu(self.pads(x))))).mean((2, 3))
        return y


def test_classes_with_a_forward_of_their_own_keep_it_or_stay_whole() -> None:
    model = SameStem().eval()
    made: Any = run(model, amount=0.3)
    assert isinstance(made.last, Factored) and not isinstance(made.scales, Factored)
    assert torch.equal(made.scales.weight, model.scales.weight)
    made = run(model, amount=0.02, layers=("pads",))
    assert isinstance(made.pads, Factored) and type(made.pads[0]) is SameStem.Pads
    with pytest.raises(DeploykitError, match="'scales' cannot be decomposed: its class computes more"):
        run(model, amount=0.1, layers=("scales",))


def frozen(model: Any) -> None:
    model.conv.weight.requires_grad_(False)


def tied(model: Any) -> None:
    model.other = nn.Conv2d(12, 16, 3)
    model.other.weight = model.conv.weight


def pruned(model: Any) -> None:
    attach_mask(model.conv, "weight", model.conv.weight > 0)


def normed(model: Any) -> None:
    nn.utils.parametrizations.weight_norm(model.conv)


@pytest.mark.parametrize(
    ("change", "why"),
    [(frozen, "frozen"), (tied, "shared with other"), (pruned, "zeros would be lost"), (normed, "parametrized")],
)
def test_weights_that_belong_to_others_are_left_alone_and_refused_by_name(change: Any, why: str) -> None:
    model = net()
    change(model)
    made: Any = run(model, amount=0.05)
    assert not isinstance(made.conv, Factored)
    if change is not pruned:
        assert torch.equal(made.conv.weight, model.conv.weight)
    assert bool((made.conv.weight[model.conv.weight == 0] == 0).all())
    with pytest.raises(DeploykitError, match=f"'conv' cannot be decomposed: .*{why}"):
        run(model, amount=0.05, layers=("conv",))


def test_what_another_form_made_is_left_as_it_is() -> None:
    model = net()
    first: Any = run(model, amount=0.05, layers=("conv",), form="tucker")
    again: Any = run(first, context(first), amount=0.02)
    assert again.conv.form == "tucker" and again.conv.ranks == first.conv.ranks
    assert isinstance(again.stem, Factored) or isinstance(again.head, Factored)


@pytest.mark.parametrize("form", ["channel", "tucker"])
@pytest.mark.parametrize("method", ["data", "equal_error"])
def test_layers_are_taken_up_again_and_the_share_counts_from_what_came(form: Any, method: str) -> None:
    def params(network: nn.Module) -> int:
        return sum(p.numel() for p in network.parameters())

    model = net()
    first = run(model, amount=0.1, form=form, method=method)
    again = run(first, context(first), amount=0.1, form=form, method=method)
    assert params(again) <= 0.9 * params(first) and factors_of(again) != factors_of(first)
    kept = run(first, context(first), amount=0.05, form=form, method=method, skip=tuple(factors_of(first)))
    assert all(factors_of(kept)[name] == own for name, own in factors_of(first).items())


@pytest.mark.parametrize("form", ["channel", "tucker"])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("groups", [1, 2])
def test_factors_made_whole_again_compute_what_they_did(form: str, bias: bool, groups: int) -> None:
    if form == "tucker" and groups > 1:
        return
    layer = nn.Conv2d(4, 6, 3, stride=2, padding=1, groups=groups, bias=bias)
    for one, ranks, x in (
        (layer, (2, 1) if form == "channel" else (3, 2), torch.randn(2, 4, 7, 7)),
        *([(nn.Linear(5, 4, bias=bias), (1, 2), torch.randn(3, 5))] if form == "channel" else []),
    ):
        factors: Any = decomposed(one, form, ranks)
        back: Any = merged(factors)
        assert type(back) is type(one) and back.weight.shape == one.weight.shape
        torch.testing.assert_close(back(x), factors(x), rtol=1e-5, atol=1e-5)


# ------------------------------------------------------------------ what it refuses


@pytest.mark.parametrize(
    "options",
    [{}, {"amount": 0.5, "at_most": 3.0}, {"at_most": 0.0}, {"amount": 1.0}, {"amount": -0.1},
     {"amount": 0.5, "multiple": -1}, {"amount": 0.5, "slices": -1}, {"amount": 0.5, "seeds": 0},
     {"amount": 0.5, "form": "cp", "method": "alds"}, {"amount": 0.5, "form": "tucker", "slices": 2},
     {"amount": 0.5, "form": "butterfly"}, {"amount": 0.5, "method": "luck"}],
)  # fmt: skip
def test_options_out_of_range_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(DeploykitError, match="step 'low_rank'"):
        passes.build(Step("low_rank", options))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused(value: float) -> None:
    model = net()
    with torch.no_grad():
        model.conv.weight[3, 2, 1, 0] = value
    with pytest.raises(DeploykitError, match="layer 'conv' are not all finite"):
        run(model, amount=0.1)


def test_layers_that_nobody_knows_and_networks_without_any_are_refused() -> None:
    with pytest.raises(DeploykitError, match="no layer 'convv'"):
        run(net(), amount=0.1, layers=("convv",))
    with pytest.raises(DeploykitError, match="no layer of this model can be decomposed"):
        run(net(), amount=0.1, skip=("*",))
    with pytest.raises(DeploykitError, match="'deep' cannot be decomposed: it is depthwise"):
        run(net(), amount=0.1, layers=("deep",))


def test_methods_that_look_at_data_need_it() -> None:
    model = net()
    with pytest.raises(DeploykitError, match="at least 32 calibration samples; there are 31"):
        run(model, context(model, pictures(31)), amount=0.1, method="data")
    with pytest.raises(DeploykitError, match="needs calibration data"):
        run(model, replace(context(model), data={}), amount=0.1, method="pca")


# ------------------------------------------------------------------ folders and files


@pytest.fixture
def factory(tmp_path: Path) -> str:
    (tmp_path / "net.py").write_text(NET)
    (tmp_path / "small").mkdir()
    return f"{tmp_path}/net.py:build"


@pytest.mark.parametrize(
    "steps",
    [
        [Step("low_rank", {"amount": 0.3})],
        [Step("low_rank", {"amount": 0.2, "form": "tucker"}), Step("sparsify", {"sparsity": 0.2})],
        [Step("prune", {"amount": 0.2, "refit": False, "criterion": "l1", "multiple": 1}),
         Step("low_rank", {"amount": 0.1})],
        [Step("low_rank", {"amount": 0.2, "form": "cp"}),
         Step("prune", {"amount": 0.1, "refit": False, "criterion": "l1", "multiple": 1})],
    ],
)  # fmt: skip
def test_a_folder_gives_the_decomposed_network_back(factory: str, tmp_path: Path, steps: list[Step]) -> None:
    module: Any = settled(load_model(factory).module)  # type: ignore[arg-type]
    for step in steps:
        module = passes.build(step)(module, context(module))
    save_compressed(module, tmp_path / "small", factory)
    again = load_model(str(tmp_path / "small")).module
    assert again is not None
    x = {"x": torch.randn(2, 3, 10, 10)}
    assert torch.equal(answers(module, x)[0], answers(again, x)[0])
    assert [m.ranks for m in again.modules() if isinstance(m, Factored)]
    (tmp_path / "twice").mkdir()
    save_compressed(again, tmp_path / "twice", str(tmp_path / "small"))
    for name in ("structure.json", "model.safetensors"):
        assert (tmp_path / "twice" / name).read_bytes() == (tmp_path / "small" / name).read_bytes()


@pytest.mark.parametrize(
    "factors",
    ['{"norm": {"form": "channel", "ranks": [1, 2]}}', '{"nobody": {"form": "channel", "ranks": [1, 2]}}',
     '{"conv": {"form": "magic", "ranks": [1]}}', '{"conv": {"form": "channel", "ranks": [1, 99]}}',
     '{"deep": {"form": "channel", "ranks": [1, 2]}}'],
)  # fmt: skip
def test_factors_that_do_not_fit_the_factory_are_refused(factory: str, tmp_path: Path, factors: str) -> None:
    module = run(net(), amount=0.3, layers=("conv",))
    save_compressed(module, tmp_path / "small", factory)
    file = tmp_path / "small" / "structure.json"
    text = file.read_text()
    file.write_text(text[: text.index('"factors"')] + f'"factors": {factors}}}')
    with pytest.raises(DeploykitError, match=r"structure\.json does not fit"):
        load_model(str(tmp_path / "small"))


SLOW = [pytest.param(t, marks=pytest.mark.slow) for t in ("mobile-arm", "jetson-orin-nano", "fpga-int8")]


@pytest.mark.parametrize("target", ["x86", "x86-openvino", *SLOW])
def test_every_exporter_takes_the_factors_and_integers_come_after_them(tmp_path: Path, target: str) -> None:
    for runtime in {"x86-openvino": ["openvino"], "mobile-arm": ["ai_edge_litert"]}.get(target, []):
        pytest.importorskip(runtime, reason=f"{target} is tried with {runtime}")
    model, data = net(), next(pictures(64).batches(64)).inputs["x"]
    recipe = Recipe(steps=(Step("low_rank", {"amount": 0.3, "multiple": 1}),))
    artifact = dk.export(model, target, data, recipe=recipe, out=tmp_path / "out", benchmark=False, seed=0)
    manifest = load_manifest(tmp_path / "out")
    assert manifest.passed
    assert {layer.name for layer in manifest.layers} >= {"conv.0", "conv.1"}
    if target.startswith("jetson"):
        return  # its runtime is not here
    x = next(pictures(16, seed=5).batches(16)).inputs["x"]
    whole = model(torch.from_numpy(x)).detach().numpy()
    found = next(iter(artifact(x, precision="int8").values()))
    assert float(np.square(found - whole).mean()) < 0.1 * float(whole.var())


def test_the_command_line_writes_a_folder_that_is_exported(factory: str, tmp_path: Path) -> None:
    from deploykit.cli import main

    np.save(tmp_path / "calib.npy", next(pictures(40).batches(40)).inputs["x"])
    (tmp_path / "lr.toml").write_text('[[step]]\nname = "low_rank"\namount = 0.3\nmultiple = 1\n')
    calib = f"--calib {tmp_path}/calib.npy"
    for command in (
        f"compress {factory} --recipe {tmp_path}/lr.toml {calib} --overwrite -o {tmp_path}/small",
        f"export {tmp_path}/small --target x86 {calib} --precision fp32 --no-benchmark -o {tmp_path}/out",
    ):
        with pytest.raises(SystemExit) as end:
            main(command.split())
        assert not end.value.code
    x = next(pictures(8).batches(8)).inputs["x"]
    expected = answers(dk.load(str(tmp_path / "small")), {"x": torch.from_numpy(x)})[0].numpy()
    found = dk.open_artifact(tmp_path / "out")(x, precision="fp32")
    np.testing.assert_allclose(next(iter(found.values())), expected, atol=1e-4)
    assert "How singular values fall" in (tmp_path / "small" / "report.html").read_text()
