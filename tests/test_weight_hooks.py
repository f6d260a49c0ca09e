"""Models whose weights torch's old weight_norm and spectral_norm compute go the same way as all others."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from commands import enter
from torch import nn

from deploykit.hub.weight_hooks import without_weight_hooks
from deploykit.models import accept_module, load_model

NET = """
import warnings

import torch
from torch import nn

warnings.simplefilter("ignore", FutureWarning)

def build():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.utils.weight_norm(nn.Conv1d(8, 32, 3)), nn.ReLU(), nn.utils.spectral_norm(nn.Conv1d(32, 32, 3)),
        nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.utils.weight_norm(nn.Linear(32, 10), dim=None),
    )
"""


@pytest.fixture
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    Path("hooked_net.py").write_text(NET)
    Path("half.toml").write_text('[[step]]\nname = "low_rank"\namount = 0.3\nmultiple = 1\n')
    return tmp_path


def built() -> nn.Module:
    made: dict[str, object] = {}
    exec(NET, made)
    net = made["build"]()  # type: ignore[operator]
    assert isinstance(net, nn.Module)
    return net.eval()


def test_hooks_become_plain_parameters_that_answer_the_same_and_the_user_keeps_the_module() -> None:
    net, x = built(), torch.randn(2, 8, 20)
    before = net(x)
    made = copy.deepcopy(without_weight_hooks(net))  # a module with such hooks cannot be copied
    assert torch.allclose(made(x), before, atol=1e-6)
    assert {name for name, _ in made.named_parameters()} == {
        f"{i}.{kind}" for i in (0, 2, 5) for kind in ("weight", "bias")
    }
    assert "0.weight_g" in dict(net.named_parameters()) and torch.equal(net(x), before)
    model = accept_module(net)
    assert model.module is not net and accept_module(made).module is made


def test_such_a_model_is_exported(workplace: Path) -> None:
    said = enter("export hooked_net.py:build --target x86 --precision fp32 --input input=1x8x20 --no-benchmark -o out")
    assert said.code == 0, said.err


def test_such_a_model_is_decomposed_and_read_back(workplace: Path) -> None:
    said = enter("compress hooked_net.py:build --input input=1x8x20 --recipe half.toml -o small")
    assert said.code == 0, said.err
    module, whole = load_model("small").module, built()
    assert module is not None
    count = [sum(p.numel() for p in net.parameters()) for net in (module, without_weight_hooks(whole))]
    assert count[0] < 0.71 * count[1]
    assert enter("compress small --input input=1x8x20 --recipe half.toml -o smaller").code == 0


def test_weights_are_loaded_under_their_old_names(workplace: Path) -> None:
    net, x = built(), torch.randn(2, 8, 20)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.mul_(1.5)
    torch.save(net.state_dict(), "weights.pt")
    module = load_model("hooked_net.py:build", Path("weights.pt")).module
    assert module is not None and torch.allclose(module(x), net(x), atol=1e-5)
