"""The pass prune: budgets, refitting and files."""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pruned import Named, answers, context, images, plain, prune
from torch import Tensor, nn

import deploykit as dk
from deploykit import targets
from deploykit.core.context import Context
from deploykit.core.data import DataSet
from deploykit.core.errors import DeploykitError
from deploykit.core.manifest import Finding
from deploykit.core.request import Gate
from deploykit.cost import cost
from deploykit.hub.structure import attach_mask
from deploykit.layerwise.channels import mixes, width
from deploykit.passes.prune import Prune
from deploykit.pruning.budget import Ranked, fit
from deploykit.pruning.compensation import compensated
from deploykit.pruning.crop import Port
from deploykit.pruning.groups import Channel, find_groups, together
from deploykit.pruning.surgery import without

Inputs = Mapping[str, Tensor]
X86 = targets.load("x86")


# ------------------------------------------------------------------ the pass


@pytest.mark.parametrize("of", ["macs", "params", "bytes", "channels"])
@pytest.mark.parametrize("amount", [0.3, 0.5])
def test_a_budget_is_met_within_a_point(of: str, amount: float) -> None:
    net, data = Named(plain(64)).eval(), images()
    here = context(net, data)
    pruned = prune(amount, of=of, criterion="l2", multiple=1)(net, here)
    if of == "channels":
        left, whole = (sum(width(m, "out") for m in n.modules() if mixes(m)) for n in (pruned, net))
    else:
        left, whole = (getattr(cost(n, here.example), of) for n in (pruned, net))
    assert amount <= 1 - left / whole <= amount + 0.01 + 0.005 * (of == "channels")


def prepared_for(target: str, net: nn.Module, data: DataSet, **settings: Any) -> Context:
    """The context that the pipeline makes."""
    from deploykit import pipeline
    from deploykit.core.request import Settings
    from deploykit.models import accept_module
    from deploykit.pipeline.steps import step_context

    prepared = pipeline.prepare(accept_module(net), {"calibration": data}, None)
    return step_context(prepared, Settings(**settings), targets.load(target))


@pytest.mark.parametrize("target", ["x86", "cortex-m7"])
def test_a_draft_takes_the_bytes_of_the_file_that_an_export_writes(target: str, tmp_path: Path) -> None:
    net, data = Named(plain()).eval(), images(40)
    here = prepared_for(target, net, data)
    assert here.file_bytes is not None
    assert here.file_bytes(net) == pytest.approx(exported(net, target, data, tmp_path), rel=0.02)


@pytest.mark.slow
@pytest.mark.parametrize("target", ["x86", "cortex-m7"])
def test_the_file_of_a_pruned_network_takes_at_most_the_bytes_that_were_asked_for(target: str, tmp_path: Path) -> None:
    net, data = Named(plain(64)).eval(), images(40)
    here = prepared_for(target, net, data)
    assert here.file_bytes is not None
    bound = 0.6 * here.file_bytes(net)
    step = Prune(at_most=bound, of="artifact", criterion="l2", multiple=1, refit=False)
    assert 0.9 * bound < exported(step(net, here), target, data, tmp_path) <= 1.01 * bound


@pytest.mark.slow
def test_a_network_that_is_too_large_for_a_board_is_pruned_until_it_fits() -> None:
    net, data = Named(plain(64)).eval(), images(40)
    here = prepared_for("cortex-m4", net, data)
    tight = replace(here.target, options={**here.target.options, "flash_bytes": 60_000})
    small = prepared_for("cortex-m4", net, data)
    assert small.file_bytes is not None
    assert small.file_bytes(net) > 60_000  # a draft is written all the same
    step = Prune(at_most=60_000, of="artifact", criterion="l2", multiple=1, refit=False)
    pruned = step(net, replace(here, target=tight))
    assert small.file_bytes(pruned) <= 60_000


def test_a_budget_of_milliseconds_is_met_with_few_and_noisy_measurements() -> None:
    """A device whose time is 1 ms and what its MACs take, known to five percent."""
    net, data = Named(plain(64)).eval(), images()
    here = context(net, data)
    random, looks = np.random.default_rng(0), []

    def times(modules: Any) -> list[float]:
        looks.append(len(modules))
        return [(1.0 + cost(m, here.example).macs / 1e5) * random.uniform(0.975, 1.025) for m in modules]

    whole = 1.0 + cost(net, here.example).macs / 1e5
    step = Prune(0.4, of="ms", criterion="l2", multiple=1, refit=False)
    left = 1.0 + cost(step(net, replace(here, times=times)), here.example).macs / 1e5
    assert 1 - left / whole == pytest.approx(0.4, abs=0.06)
    assert len(looks) <= 9 and set(looks) == {2}
    looks.clear()
    step = Prune(at_most=0.7 * whole, of="ms", criterion="l2", multiple=1, refit=False)
    left = 1.0 + cost(step(net, replace(here, times=times)), here.example).macs / 1e5
    assert left == pytest.approx(0.7 * whole, rel=0.1)


def exported(model: nn.Module, target: str, data: DataSet, folder: Path) -> int:
    """Bytes of the int8 file."""
    x = next(data.batches(len(data))).inputs["x"]
    made = dk.export(model, target, x, out=folder / "out", benchmark=False, gate=Gate(min_agreement=0.0))
    return made.file("int8").size(made.folder)


def test_files_of_networks_are_timed_in_turns_where_times_here_are_the_targets() -> None:
    net, data = Named(plain(64)).eval(), images(40)
    here = prepared_for("x86", net, data)
    narrow = prune(0.7, criterion="l2", multiple=16)(net, here)
    assert here.times is not None
    before, after = here.times([net, narrow])
    assert 0 < after < before


def test_milliseconds_of_a_target_that_is_not_timed_here_are_refused_before_any_work() -> None:
    net, data = Named(plain()).eval(), images()
    with pytest.raises(DeploykitError, match=r"'jetson'.*not timed on this machine\. The nearest is of = 'macs'"):
        Prune(0.3, of="ms")(net, prepared_for("jetson", net, images(64)))
    with pytest.raises(DeploykitError, match="the context writes no files"):
        prune(0.3, of="artifact", criterion="l2")(net, context(net, data))


@pytest.mark.parametrize("of", ["macs", "params", "channels"])
def test_a_budget_may_be_absolute(of: str) -> None:
    net, data = Named(plain(64)).eval(), images()
    here = context(net, data)

    def size(model: nn.Module) -> float:
        if of == "channels":
            return sum(width(m, "out") for m in model.modules() if mixes(m))
        return float(getattr(cost(model, here.example), of))

    bound = 0.62 * size(net)
    pruned = Prune(at_most=bound, of=of, criterion="l2", multiple=1, refit=False)(net, here)  # type: ignore[arg-type]
    assert 0.97 * bound < size(pruned) <= bound
    roomy = Prune(at_most=2 * size(net), of=of, criterion="l2", refit=False)(net, here)  # type: ignore[arg-type]
    assert size(roomy) == size(net)


def test_what_went_from_where_is_noted_for_the_report() -> None:
    net, data = Named(plain(64)).eval(), images()
    found: list[Finding] = []
    pruned = prune(0.5, criterion="l2", multiple=1)(net, replace(context(net, data), note=found.append))
    (finding,) = found
    assert finding.columns == ("layer", "channels", "left")
    for name, before, left in finding.rows:
        assert before == width(net.get_submodule(str(name)), "out")
        assert left == width(pruned.get_submodule(str(name)), "out")
    assert "of the macs saved" in finding.title


def test_the_least_important_channels_go() -> None:
    """Weights of channel c are c + 1 times as large, so that of 8 channels the first three go."""
    net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)).eval()
    with torch.no_grad():
        net[0].weight.copy_(torch.arange(1.0, 9.0)[:, None].expand(8, 4))
    data = DataSet.of({"input": np.ones((4, 4), np.float32)})
    pruned = prune(0.3, of="params", criterion="l2", multiple=1)(net, context(net, data))
    assert pruned[0].weight[:, 0].tolist() == [4.0, 5.0, 6.0, 7.0, 8.0]


def test_what_is_left_of_a_layer_is_a_multiple_of_what_the_target_wants() -> None:
    net, data = Named(plain()).eval(), images()
    here = context(net, data)
    for multiple, wanted in ((0, 16), (8, 8)):
        pruned = prune(0.3, criterion="l1", multiple=multiple)(net, here)
        assert {m.out_channels % wanted for m in pruned.modules() if isinstance(m, nn.Conv2d)} == {0}
    assert X86.channel_multiple == 16


def test_what_a_budget_does_not_need_is_put_back() -> None:
    """Three groups that lose channels by the dozen; a channel of the first saves 1 %, of the others 2 % and 3 %."""
    groups = [Ranked(tuple({Port(f"{g}", "out"): (i,)} for i in range(36)), tuple(float(3 * i + g) for i in range(36)),
                     (0, 12, 24)) for g in range(3)]  # fmt: skip

    def removed(channels: list[Channel]) -> float:
        return sum((1 + int(port.layer)) / 100 for channel in channels for port in channel)

    for amount in (0.1, 0.3, 0.5, 0.7):
        gone = together(fit(groups, amount, "global", removed))
        saved = {port.layer: len(own) for port, own in gone.items()}
        total = sum((1 + int(g)) * n / 100 for g, n in saved.items())
        assert total >= amount
        assert all(total - 12 * (1 + int(g)) / 100 < amount for g in saved), "no dozen too many"


def test_what_is_left_of_the_budget_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    net, data = Named(plain()).eval(), images()
    Prune(0.1, criterion="l2", multiple=16, refit=False)(net, context(net, data))
    assert re.search(r"where 10\.0% was asked for, since layers keep multiples of 16", capsys.readouterr().err)
    with pytest.raises(DeploykitError, match=r"the least possible is [\d,.e+]+ params\. Layers keep a multiple of 16"):
        Prune(at_most=10, of="params", criterion="l2", multiple=16, refit=False)(net, context(net, data))


def test_scope_layer_takes_the_same_share_of_every_layer() -> None:
    net, data = Named(plain()).eval(), images()
    pruned = prune(0.5, of="channels", criterion="l1", scope="layer", multiple=1)(net, context(net, data))
    shares = [m.out_channels / w for m, w in zip([m for m in pruned.modules() if isinstance(m, nn.Conv2d)],
                                                 (32, 64, 64), strict=True)]  # fmt: skip
    assert max(shares) - min(shares) < 0.04


def test_layers_that_are_skipped_keep_their_channels_and_no_layer_loses_more_than_most() -> None:
    net, data = Named(plain()).eval(), images()
    pruned = prune(0.5, criterion="l1", multiple=1, skip=("body.0",), most=0.75)(net, context(net, data))
    widths = [m.out_channels for m in pruned.modules() if isinstance(m, nn.Conv2d)]
    assert widths[0] == 32 and min(widths[1:]) >= 16


def test_nothing_to_save_is_nothing_removed() -> None:
    net, data = Named(plain()).eval(), images()
    pruned = prune(0.0, criterion="l1")(net, context(net, data))
    assert cost(pruned, context(net, data).example) == cost(net, context(net, data).example)


@pytest.mark.parametrize("training", [False, True])
def test_the_users_model_is_left_as_it_is_and_the_copy_is_in_its_mode(training: bool) -> None:
    net, data = Named(plain()).train(training), images()
    net.body[0].weight.requires_grad_(False)
    before, modes = copy.deepcopy(net.state_dict()), [m.training for m in net.modules()]
    pruned = prune(0.4, criterion="taylor", multiple=1)(net, context(net, data))
    assert [m.training for m in net.modules()] == modes == [m.training for m in pruned.modules()]
    assert all(torch.equal(a, b) for a, b in zip(net.state_dict().values(), before.values(), strict=True))
    assert not pruned.body[0].weight.requires_grad and pruned.body[4].weight.requires_grad


def test_zeros_of_an_earlier_step_stay_zero() -> None:
    net, data = Named(plain()).eval(), images()
    here = context(net, data)
    sparse = copy.deepcopy(net)
    attach_mask(sparse.body[4], "weight", sparse.body[4].weight > 0)
    pruned = prune(0.4, criterion="l1", multiple=1)(sparse, here)
    weight = pruned.body[4].weight
    assert weight.shape[1] == pruned.body[0].out_channels < 32
    held = weight == 0
    assert 0.1 < held.float().mean() < 0.9
    with torch.no_grad():
        pruned.body[4].weight = torch.ones_like(weight)
    assert torch.equal(pruned.body[4].weight == 0, held)


class Redundant(nn.Module):
    """Every hidden unit is there twice."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.norm, self.head = nn.Linear(6, 12), nn.BatchNorm1d(12), nn.Linear(12, 5)
        with torch.no_grad():
            self.first.weight[6:] = self.first.weight[:6]
            self.first.bias[6:] = self.first.bias[:6]

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(self.norm(self.first(x))))


def test_what_left_weights_can_make_good_they_make_good() -> None:
    net = Redundant().eval()
    x = np.random.default_rng(0).normal(size=(200, 6)).astype(np.float32)
    data = DataSet.of({"x": x}, np.arange(200) % 5)
    (group,) = find_groups(net, {"x": torch.zeros(1, 6)})
    removed = together(group.channels[:6])
    (whole,) = answers(net, {"x": torch.from_numpy(x)})
    (cut,) = answers(without(net, removed), {"x": torch.from_numpy(x)})
    (fitted,) = answers(without(compensated(net, removed, data), removed), {"x": torch.from_numpy(x)})
    assert float((cut - whole).square().mean()) > 1e-3
    assert float((fitted - whole).square().mean()) < 1e-2 * float((cut - whole).square().mean())


def test_the_pass_fits_what_is_left_and_keeps_zeros_modes_and_the_users_model() -> None:
    net, data = Named(plain()).train(), images(48)
    attach_mask(net.body[4], "weight", net.body[4].weight > 0)
    before = copy.deepcopy(net.state_dict())
    here = context(net, data)
    step = Prune(0.4, criterion="l1", multiple=1)
    fitted, cut = step(net, here), replace(step, refit=False)(net, here)
    shapes = [[p.shape for p in module.parameters()] for module in (fitted, cut)]
    assert shapes[0] == shapes[1]
    assert fitted.training and all(torch.equal(a, before[k]) for k, a in net.state_dict().items())
    assert torch.equal(fitted.body[4].weight == 0, cut.body[4].weight == 0)
    x = {"x": torch.from_numpy(next(data.batches(48)).inputs["x"])}
    (whole,), (one,), (other,) = (answers(copy.deepcopy(module).eval(), x) for module in (net, fitted, cut))
    assert float((one - whole).square().mean()) < 0.5 * float((other - whole).square().mean())


def test_too_few_samples_to_fit_weights_to_are_refused() -> None:
    net = Named(plain()).eval()
    with pytest.raises(DeploykitError, match="at least 32 calibration samples; there are 31"):
        Prune(0.5, criterion="l1")(net, context(net, images(31)))


def test_without_labels_the_models_own_answers_stand_for_them() -> None:
    net, data = Named(plain()).eval(), images(labels=False)
    own = answers(net, {"x": torch.from_numpy(next(data.batches(32)).inputs["x"])})[0].argmax(1).numpy()
    for criterion in ("taylor", "hessian", "fisher"):
        step = prune(0.4, criterion=criterion, multiple=1)
        one, two = step(net, context(net, data)), step(net, context(net, replace(data, labels=own)))
        assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))


NET = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16)
        self.conv2, self.bn2 = nn.Conv2d(16, 16, 3, padding=1, groups=16, bias=False), nn.BatchNorm2d(16)
        self.conv3, self.head = nn.Conv2d(16, 16, 1), nn.Linear(16, 4)
    def forward(self, x):
        x = torch.relu(self.bn2(self.conv2(torch.relu(self.bn1(self.conv1(x))))))
        return self.head(torch.relu(self.conv3(x)).mean((2, 3)))

def build():
    torch.manual_seed(1)
    return Net()
"""


def test_a_pruned_model_is_written_read_pruned_once_more_and_exported(tmp_path: Path) -> None:
    from deploykit.cli import main

    (tmp_path / "net.py").write_text(NET)
    np.save(tmp_path / "calib.npy", next(images(40).batches(40)).inputs["x"])
    (tmp_path / "prune.toml").write_text(
        '[[step]]\nname = "prune"\namount = 0.3\ncriterion = "l1"\nmultiple = 2\n'
        '[[step]]\nname = "reestimate_bn"\n[[step]]\nname = "sparsify"\nsparsity = 0.3\n'
    )
    source, calib = f"{tmp_path}/net.py:build", f"--calib {tmp_path}/calib.npy"

    def run(command: str) -> None:
        with pytest.raises(SystemExit) as end:
            main(command.split())
        assert not end.value.code

    run(f"compress {source} --recipe {tmp_path}/prune.toml {calib} --force -o {tmp_path}/small")
    small = dk.load(str(tmp_path / "small"))
    assert 2 <= small.conv1.out_channels < 16 and small.conv2.groups == small.conv1.out_channels
    run(f"compress {tmp_path}/small --recipe {tmp_path}/prune.toml {calib} --force -o {tmp_path}/smaller")
    smaller = dk.load(str(tmp_path / "smaller"))
    assert sum(p.numel() for p in smaller.parameters()) < sum(p.numel() for p in small.parameters())
    run(f"export {tmp_path}/smaller --target x86 {calib} --precision fp32 --no-benchmark -o {tmp_path}/out")
    x = next(images(40).batches(8)).inputs["x"]
    found = dk.open_artifact(tmp_path / "out")(x, precision="fp32")
    np.testing.assert_allclose(
        next(iter(found.values())), answers(smaller, {"x": torch.from_numpy(x)})[0].numpy(), atol=1e-4
    )


@pytest.mark.parametrize(
    "sizes", ['{"conv9": {"out_channels": 3}}', '{"conv1": {"depth": 3}}', '{"head": {"out_channels": 3}}']
)
def test_sizes_that_the_factory_does_not_know_are_refused(tmp_path: Path, sizes: str) -> None:
    from deploykit.models import load_model, save_compressed

    (tmp_path / "net.py").write_text(NET)
    (tmp_path / "small").mkdir()
    module = load_model(f"{tmp_path}/net.py:build").module
    assert module is not None
    save_compressed(module, tmp_path / "small", f"{tmp_path}/net.py:build")
    file = tmp_path / "small" / "structure.json"
    file.write_text(file.read_text().replace('"sizes": {}', f'"sizes": {sizes}'))
    with pytest.raises(DeploykitError, match=r"structure\.json does not fit"):
        load_model(str(tmp_path / "small"))
