"""Parity with the package mixture-of-experts 0.2.3: same parameters in; same dispatch, combine, output, loss and
gradients out, for every policy, in training and evaluation."""

import inspect

import mixture_of_experts
import mixture_of_experts.mixture_of_experts as package
import pytest
import torch
from naive import assert_close
from torch import nn

from turnout import compat

POLICIES = ("all", "none", "threshold", "random")
DTYPES = (torch.float64, torch.float32)
DIM, EXPERTS, BATCH, TOKENS = 12, 4, 3, 16

# The package's threshold line lacks a dimension; and it keeps masks in float32, whose means limit float64 to 1e-8.
_SOURCE = inspect.getsource(package.Top2Gating.forward)
_FIXED = _SOURCE.replace("(gate_2 > threshold).float()", "(gate_2 > threshold).float().unsqueeze(-1)")
assert _FIXED != _SOURCE


def correct(monkeypatch: pytest.MonkeyPatch, policy: str, dtype: torch.dtype) -> None:
    """Leaves the package as it is published, except where it cannot answer: threshold, and float64 to its last digit."""
    if policy != "threshold" and dtype != torch.float64:
        return
    names = vars(package)
    made: dict[str, object] = {}
    source = inspect.cleandoc("\n" + _FIXED).replace(".float()", ".to(raw_gates.dtype)")
    exec(compile(source, "corrected", "exec"), names, made)
    monkeypatch.setattr(package.Top2Gating, "forward", made["forward"])


def pair(theirs: nn.Module, ours: nn.Module, dtype: torch.dtype, training: bool) -> tuple[nn.Module, nn.Module]:
    """Both with their parameters, which must have the same names, shapes and values already."""
    theirs, ours = theirs.to(dtype).train(training), ours.to(dtype).train(training)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    return theirs, ours


def seeded(make) -> nn.Module:
    torch.manual_seed(7)
    return make()


def run(module: nn.Module, x: torch.Tensor, seed: int = 3) -> dict[str, torch.Tensor]:
    """Output, loss and every gradient of a scalar that weighs both."""
    x = x.clone().requires_grad_()
    torch.manual_seed(seed)
    y, loss = module(x)
    probe = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view(y.shape)
    ((y * probe).sum() + 100 * loss).backward()
    grads = {name: p.grad for name, p in module.named_parameters()}
    return {"output": y, "loss": loss, "inputs": x.grad, **grads}


def compare(theirs: nn.Module, ours: nn.Module, x: torch.Tensor) -> None:
    expected, actual = run(theirs, x), run(ours, x)
    assert expected.keys() == actual.keys()
    # Longest sums: over the tokens of a batch in weight gradients, over hidden units and slots in the output.
    for name in expected:
        assert_close(actual[name], expected[name], terms=BATCH * TOKENS + 4 * DIM + 16)


def options(policy: str, training: bool, **more: object) -> dict[str, object]:
    """The policy under test in the mode under test, another one in the other mode."""
    other = "none" if policy != "none" else "all"
    here, there = ("train", "eval") if training else ("eval", "train")
    return {f"second_policy_{here}": policy, f"second_policy_{there}": other,
            f"second_threshold_{here}": 0.3, **more}  # fmt: skip


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_moe(monkeypatch, dtype, policy, training) -> None:
    correct(monkeypatch, policy, dtype)
    how = options(policy, training)
    theirs = seeded(lambda: mixture_of_experts.MoE(DIM, EXPERTS, **how))
    ours = seeded(lambda: compat.MoE(DIM, EXPERTS, **how))
    compare(*pair(theirs, ours, dtype, training), torch.randn(BATCH, TOKENS, DIM, dtype=dtype))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_hierarchical(monkeypatch, dtype, policy, training) -> None:
    correct(monkeypatch, policy, dtype)
    how = options(policy, training, num_experts=(3, 4), activation=nn.GELU)
    theirs = seeded(lambda: mixture_of_experts.HeirarchicalMoE(DIM, **how))
    ours = seeded(lambda: compat.HeirarchicalMoE(DIM, **how))
    compare(*pair(theirs, ours, dtype, training), torch.randn(BATCH, TOKENS, DIM, dtype=dtype))


@pytest.mark.parametrize("with_importance", [False, True])
@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("training", [True, False])
def test_gating_tensors(monkeypatch, training, policy, with_importance) -> None:
    """One place is as good as another only in MoE's output: here the places themselves must be the package's."""
    correct(monkeypatch, policy, torch.float64)
    how = options(policy, training, outer_expert_dims=(2,), capacity_factor_train=1.0, capacity_factor_eval=1.5)
    theirs = package.Top2Gating(DIM, EXPERTS, **how)
    theirs, ours = pair(theirs, compat.Top2Gating(DIM, EXPERTS, **how), torch.float64, training)
    x = torch.randn(2, BATCH, TOKENS, DIM, dtype=torch.float64)
    importance = torch.randint(0, 3, (2, BATCH, TOKENS)).double() / 2 if with_importance else None
    results = []
    for gate in (theirs, ours):
        torch.manual_seed(5)
        dispatch, combine, loss = gate(x, importance=importance)
        probe = torch.linspace(-1, 1, combine.numel(), dtype=combine.dtype).view(combine.shape)
        grad = torch.autograd.grad((combine * probe).sum() + loss, gate.w_gating)[0]
        results.append((dispatch, combine, loss, grad))
    assert torch.equal(results[0][0], results[1][0])
    for expected, actual in zip(results[0][1:], results[1][1:], strict=True):
        assert_close(actual, expected, terms=2 * BATCH * TOKENS)
    assert results[0][0].sum() < results[0][0].new_tensor(4 * BATCH * TOKENS)  # something was dropped


@pytest.mark.parametrize("name", ["MoE", "HeirarchicalMoE"])
def test_defaults_and_draws(name) -> None:
    """Same arguments in the same order with the same defaults; the same seed draws the same parameters, and the
    default policy, random, then the same numbers."""
    theirs_class, ours_class = getattr(mixture_of_experts, name), getattr(compat, name)
    theirs_signature, ours_signature = (inspect.signature(c.__init__) for c in (theirs_class, ours_class))
    assert [(p.name, p.default) for p in theirs_signature.parameters.values()] == [
        (p.name, p.default) for p in ours_signature.parameters.values()
    ]
    theirs, ours = (seeded(lambda c=c: c(DIM)) for c in (theirs_class, ours_class))
    for (name_1, p_1), (name_2, p_2) in zip(theirs.named_parameters(), ours.named_parameters(), strict=True):
        assert name_1 == name_2 and torch.equal(p_1, p_2)
    for training in (True, False):
        compare(theirs.train(training), ours.train(training), torch.randn(BATCH, TOKENS, DIM))
        theirs.zero_grad(), ours.zero_grad()


@pytest.mark.parametrize("name", ["Top2Gating", "Experts"])
def test_signatures(name) -> None:
    theirs, ours = (inspect.signature(getattr(m, name).__init__).parameters.values() for m in (package, compat))
    assert [(p.name, p.default) for p in theirs] == [(p.name, p.default) for p in ours]


@pytest.mark.parametrize("outer", [5, (5,), (2, 3), (2, 1, 3)])
def test_experts(outer) -> None:
    theirs = seeded(lambda: package.Experts(DIM, outer, hidden_dim=7))
    ours = seeded(lambda: compat.Experts(DIM, outer, hidden_dim=7))
    for p_1, p_2 in zip(theirs.parameters(), ours.parameters(), strict=True):
        assert torch.equal(p_1, p_2)
    x = torch.randn(*(outer if isinstance(outer, tuple) else (outer,)), 6, DIM)
    assert_close(ours(x), theirs(x), terms=DIM + 7)


class PlaceAware(nn.Module):
    """Experts whose answer depends on the slot that a token stands in."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.linspace(-1, 1, DIM))
        self.shapes: list[torch.Size] = []

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.shapes.append(x.shape)
        place = torch.arange(x.shape[:-1].numel(), dtype=x.dtype).view(*x.shape[:-1], 1)
        return x * self.w + place.cos()


@pytest.mark.parametrize("name", ["MoE", "HeirarchicalMoE"])
@pytest.mark.parametrize("custom", ["module", "activation"])
def test_experts_of_other_kinds_get_the_slots_of_the_package(name, custom) -> None:
    count = {"num_experts": 4} if name == "MoE" else {"num_experts": (3, 4)}

    def make(library):
        how = {"experts": PlaceAware()} if custom == "module" else {"activation": nn.Tanh}
        return getattr(library, name)(DIM, **count, **how)

    theirs, ours = make(mixture_of_experts), make(compat)
    ours.load_state_dict(theirs.state_dict())
    compare(theirs, ours, torch.randn(BATCH, TOKENS, DIM))
    if custom == "module":
        assert ours.experts.shapes == theirs.experts.shapes
