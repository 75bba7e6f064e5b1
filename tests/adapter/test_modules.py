"""Adapters, transcoders and SAEs against modules written by hand, and as modules of PyTorch."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call

from fastadapt import SAE, AdapterConfig, Transcoder, TranscoderAdapter
from fastadapt.errors import UserError
from fastadapt.kernels.transcoder import plan_for

D, E, F = 12, 10, 40
CONFIGS = {
    "relu": AdapterConfig(F),
    "topk": AdapterConfig(F, "topk", k=4),
    "batch_topk": AdapterConfig(F, "batch_topk", k=1.5),
    "jumprelu": AdapterConfig(F, "jumprelu", bandwidth=0.1, initial_threshold=0.3),
}
UNBIASED = AdapterConfig(F, bias=False)
#: The module of a configuration, by the name of what it is.
KINDS: dict[str, Callable[..., Any]] = {
    "adapter": lambda config, **kind: TranscoderAdapter(D, config, d_out=E, **kind),
    "transcoder": lambda config, **kind: Transcoder(D, config, E, **kind),
    "skip": lambda config, **kind: Transcoder(D, config, E, skip=True, **kind),
    "sae": lambda config, **kind: SAE(D, config, **kind),
    "centred": lambda config, **kind: SAE(D, config, subtract_b_dec=True, **kind),
}


def random_module(kind: str, config: AdapterConfig, dtype: torch.dtype = torch.float64) -> Any:
    """Return a module none of whose parameters is 0."""
    draw = torch.Generator().manual_seed(3)
    module = KINDS[kind](config, dtype=dtype)
    with torch.no_grad():
        for name, p in module.named_parameters():
            if name == "threshold":
                p.copy_(0.1 + torch.rand(p.shape, generator=draw))
            else:
                p.copy_(torch.randn(p.shape, generator=draw) / p.shape[-1] ** 0.5)
    return module


def inputs(*lead: int, dtype: torch.dtype = torch.float64) -> Tensor:
    x = torch.randn(*(lead or (3, 7)), D, generator=torch.Generator().manual_seed(4))
    return x.to(dtype).requires_grad_()


def outputs(module: nn.Module, x: Tensor) -> Any:
    """Return output and aux of a module's call, whichever class it has."""
    return module(x) if isinstance(module, TranscoderAdapter) else module(x, return_aux=True)


class ByHand(nn.Module):
    """The same network in dense PyTorch; ``threshold`` is a constant."""

    W_enc: Any
    b_enc: Any
    W_dec: Any
    b_dec: Any
    W_skip: Any
    threshold: Any

    def __init__(self, module: Any, *, subtracts: bool) -> None:
        super().__init__()
        self.subtracts = subtracts
        self.config = module.config
        for name in ("W_enc", "b_enc", "W_dec", "b_dec", "W_skip", "threshold"):
            value = getattr(module, name, None)
            self.register_parameter(name, None if value is None else nn.Parameter(value.clone()))

    def activations(self, x: Tensor) -> Tensor:
        x = x - self.b_dec if self.subtracts else x
        z = torch.einsum("...d,fd->...f", x, self.W_enc) + self.b_enc
        a = z.clamp(min=0)
        if self.config.activation == "topk":
            return a * (a >= a.topk(self.config.k).values[..., -1:])
        if self.config.activation == "batch_topk":
            rows = a.flatten(-2)
            cut = rows.topk(int(self.config.k * x.shape[-2])).values[..., -1:]
            return a * (a >= cut[..., None])
        if self.config.activation == "jumprelu":
            return a * (a > self.threshold.detach())
        return a

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        a = self.activations(x)
        out = torch.einsum("...f,fe->...e", a, self.W_dec)
        out = out if self.b_dec is None else out + self.b_dec
        if self.W_skip is not None:
            out = out + torch.einsum("...d,ed->...e", x, self.W_skip)
        return out, (a * self.W_dec.square().sum(1).sqrt()).sum()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("activation", CONFIGS)
def test_outputs_and_gradients_are_those_of_plain_pytorch(kind: str, activation: str) -> None:
    module = random_module(kind, CONFIGS[activation])
    hand = ByHand(module, subtracts=kind == "centred")
    results = []
    for net in (module, hand):
        x = inputs()
        if net is hand:
            out, penalty = net(x)
        else:
            out, (penalty, stats, codes) = outputs(net, x)
            assert codes is None
            assert 0 < stats.n_active < 3 * 7 * F
        cotangent = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out)
        ((out * cotangent).sum() + 0.3 * penalty).backward()
        named = {name: p.grad for name, p in net.named_parameters() if name != "threshold"}
        results.append({"out": out, "penalty": penalty, "x": x.grad, **named})
    assert results[0].keys() == results[1].keys()
    for name, actual in results[0].items():
        assert actual.abs().sum() > 0, name
        torch.testing.assert_close(actual, results[1][name], rtol=1e-12, atol=1e-12, msg=name)


def test_what_is_subtracted_is_visible() -> None:
    """The control of the comparison above: the two conventions are two networks."""
    x, plain, centred = inputs(), *(random_module(k, CONFIGS["relu"]) for k in ("sae", "centred"))
    weights = plain.parameters(), centred.parameters()
    assert all(torch.equal(a, b) for a, b in zip(*weights, strict=True))
    assert (plain(x) - centred(x)).abs().max() > 0.1
    torch.testing.assert_close(centred.encode(x), plain.encode(x - centred.b_dec))


@pytest.mark.parametrize("kind", ["transcoder", "skip", "sae", "centred"])
@pytest.mark.parametrize("activation", CONFIGS)
def test_a_call_without_aux_is_the_same(kind: str, activation: str) -> None:
    module, x = random_module(kind, CONFIGS[activation]), inputs(2, 5)
    out, aux = module(x, return_aux=True, return_codes=True)
    plan = plan_for(F, n_tokens=10, n_features=F, dtype=x.dtype, device_type="cpu")
    with torch.no_grad():
        quiet = module(x)
    a = module.encode(x)
    linear = 0 if module.W_skip is None else x @ module.W_skip.T
    for other in (module(x), module(x, plan=plan), quiet, module.decode(a) + linear):
        torch.testing.assert_close(other, out)
    torch.testing.assert_close(aux.codes.values, a[a != 0])
    padding = torch.zeros(2, 5, dtype=torch.bool)
    padding[1, 3:] = True
    padded, aux = module(x, padding=padding, return_aux=True)
    assert aux.stats.n_tokens == 8
    with torch.no_grad():
        torch.testing.assert_close(module(x, padding=padding), padded)
    _, aux = module(x, mask=~padding, return_aux=True)
    assert aux.stats.n_tokens == 8
    assert (aux.stats.feature_counts <= 8).all()


@pytest.mark.parametrize(
    ("kind", "config", "expected"),
    [
        ("adapter", CONFIGS["relu"], {"b_dec": (E,)}),
        ("transcoder", CONFIGS["relu"], {"b_dec": (E,)}),
        ("transcoder", UNBIASED, {}),
        ("skip", CONFIGS["batch_topk"], {"b_dec": (E,), "W_skip": (E, D), "threshold": ()}),
        ("sae", CONFIGS["jumprelu"], {"b_dec": (D,), "threshold": (F,)}),
        ("centred", CONFIGS["topk"], {"b_dec": (D,)}),
    ],
)
def test_the_state_dict_has_the_names_of_the_field(
    kind: str, config: AdapterConfig, expected: dict[str, tuple[int, ...]]
) -> None:
    module = KINDS[kind](config)
    shapes = {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}
    d_out = D if kind in ("sae", "centred") else E
    common = {"W_enc": (F, D), "b_enc": (F,), "W_dec": (F, d_out)}
    assert shapes == common | expected
    trained = {name for name, _ in module.named_parameters()}
    assert shapes.keys() - trained == (
        {"threshold"} if config.activation == "batch_topk" else set()
    )
    assert f"activation={config.activation}" in repr(module)


def test_how_new_modules_start() -> None:
    draw = torch.Generator
    transcoder = KINDS["skip"](CONFIGS["relu"], generator=draw().manual_seed(1))
    assert not any(p.any() for n, p in transcoder.named_parameters() if n != "W_enc")
    adapter = KINDS["adapter"](CONFIGS["relu"], generator=draw().manual_seed(1))
    assert torch.equal(adapter.W_enc, transcoder.W_enc)
    sae = KINDS["sae"](CONFIGS["jumprelu"], dtype=torch.bfloat16, generator=draw().manual_seed(1))
    assert torch.equal(sae.W_enc, sae.W_dec)
    torch.testing.assert_close(sae.W_dec.float().norm(dim=1), torch.ones(F), rtol=4e-3, atol=0)
    assert (sae.threshold == torch.tensor(0.3).bfloat16()).all()
    assert not sae.b_enc.any()
    assert not sae.b_dec.any()


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("activation", ["jumprelu", "batch_topk"])
def test_modules_from_the_meta_device(kind: str, activation: str) -> None:
    """``to_empty`` leaves NaN in memory here, which a parameter that is not reset would keep."""
    config = CONFIGS[activation]
    fresh = KINDS[kind](config, generator=torch.Generator().manual_seed(7))
    bare = KINDS[kind](config, device="meta")
    assert all(tensor.is_meta for tensor in bare.state_dict().values())
    bare.to_empty(device="cpu")
    assert all(p.isnan().all() for p in bare.parameters())
    bare.reset_parameters(torch.Generator().manual_seed(7))
    given = KINDS[kind](config, device="meta")
    given.load_state_dict(fresh.state_dict(), assign=True)
    x = inputs(dtype=torch.float32)
    for module in (bare, given):
        for name, tensor in fresh.state_dict().items():
            assert torch.equal(module.state_dict()[name], tensor), name
        assert torch.equal(outputs(module, x)[0], outputs(fresh, x)[0])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("activation", ["jumprelu", "batch_topk"])
def test_copies_are_equal_and_independent(kind: str, activation: str) -> None:
    module = random_module(kind, CONFIGS[activation]).eval()
    if activation == "batch_topk":
        module.update_threshold(torch.tensor(0.2))
    x = inputs()
    before = outputs(module, x)[0]
    for twin in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert type(twin) is type(module)
        assert repr(twin) == repr(module)
        assert torch.equal(outputs(twin, x)[0], before)
        with torch.no_grad():
            for parameter in twin.parameters():
                parameter.zero_()
    assert torch.equal(outputs(module, x)[0], before)


@pytest.mark.parametrize(
    "cast",
    [
        lambda module: module.to(torch.bfloat16),
        lambda module: module.half(),
        lambda module: nn.Sequential(module).bfloat16()[0],
        lambda module: module.double(),
        lambda module: copy.deepcopy(module).to("cpu", torch.bfloat16),
        lambda module: module.bfloat16().share_memory(),
    ],
    ids=["to", "half", "parent", "double", "copy", "shared"],
)
@pytest.mark.parametrize("kind", KINDS)
def test_a_running_threshold_keeps_its_dtype(kind: str, cast: Callable[[Any], Any]) -> None:
    """In 16 bits, no update of the default decay would change it."""
    module = random_module(kind, CONFIGS["batch_topk"], torch.float32)
    module.update_threshold(torch.tensor(0.3))
    held = module.threshold
    module = cast(module)
    assert module.W_enc.dtype != torch.float32
    assert module.threshold.dtype == torch.float32
    if cast.__code__.co_names[0] != "copy":
        assert module.threshold is held
    assert dict(module.named_buffers()).keys() == {"threshold"}
    for _ in range(2000):
        module.update_threshold(torch.tensor(0.5))
    assert 0.45 < module.threshold.item() < 0.5


def test_a_running_threshold_keeps_its_dtype_on_the_meta_device() -> None:
    sae: Any = SAE(12, CONFIGS["batch_topk"], device="meta").bfloat16()
    assert (sae.threshold.dtype, sae.threshold.is_meta) == (torch.float32, True)
    sae._apply(lambda t: torch.empty_like(t, dtype=torch.float64, device="cpu"))
    assert (sae.threshold.dtype, sae.threshold.device.type) == (torch.float32, "cpu")
    assert sae.to("meta", torch.bfloat16).threshold.dtype == torch.float32


@pytest.mark.parametrize("kind", KINDS)
def test_hooks_see_and_change_a_call(kind: str) -> None:
    module, seen = random_module(kind, CONFIGS["topk"]), []
    x = inputs()
    module.register_forward_pre_hook(lambda _, given: (2 * given[0], *given[1:]))
    module.register_forward_hook(lambda _, given, out: seen.append(given[0]))
    module.register_full_backward_hook(lambda _, into, out: seen.append(into[0]))
    out, _ = outputs(module, x)
    out.sum().backward()
    assert torch.equal(seen[0], 2 * x)
    assert x.grad is not None
    assert torch.equal(2 * seen[1], x.grad)  # the gradient of the doubled input
    quiet = random_module(kind, CONFIGS["topk"])
    assert torch.equal(out, outputs(quiet, 2 * x)[0])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("activation", CONFIGS)
def test_dtypes_and_autocast(kind: str, activation: str) -> None:
    wide = random_module(kind, CONFIGS[activation], torch.float32)
    low: Any = copy.deepcopy(wide).to(torch.bfloat16)
    if activation == "jumprelu":  # autocast leaves thresholds as they are
        low.threshold.data = wide.threshold.detach().clone()
    x = inputs(dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        out, aux = outputs(wide, x)
        a = wide.encode(x)
        decoded = wide.decode(a)
    assert out.dtype == a.dtype == decoded.dtype == torch.bfloat16
    assert aux.penalty.dtype == torch.float32
    small = x.detach()
    if kind == "centred":  # the difference is taken in float32, before the cast
        small, low.subtract_b_dec = small - wide.b_dec.detach(), False
    expected, other = outputs(low, small.bfloat16())
    assert torch.equal(out, expected)
    assert torch.equal(aux.penalty, other.penalty)
    assert torch.equal(a, low.encode(small.bfloat16()))
    (out.float().sum() + aux.penalty).backward()
    for name, parameter in wide.named_parameters():
        assert parameter.grad.dtype == torch.float32, name
        assert parameter.grad.abs().sum() > 0, name


@pytest.mark.parametrize("kind", KINDS)
def test_functional_calls_use_the_given_parameters(kind: str) -> None:
    module, x = random_module(kind, CONFIGS["relu"]), inputs()
    given = {n: (1.5 * p).detach().requires_grad_() for n, p in module.named_parameters()}
    options = {} if kind == "adapter" else {"return_aux": True}
    out, aux = functional_call(module, given, (x,), options)
    gradients = torch.autograd.grad(out.sum() + aux.penalty, list(given.values()))
    assert all(p.grad is None for p in module.parameters())
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.mul_(1.5)
    expected, aux = outputs(module, x)
    assert torch.equal(out, expected)
    (expected.sum() + aux.penalty).backward()
    for gradient, parameter in zip(gradients, module.parameters(), strict=True):
        assert torch.equal(gradient, parameter.grad)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "activation"),
    [
        ("adapter", "jumprelu"),
        ("transcoder", "relu"),
        ("skip", "topk"),
        ("sae", "jumprelu"),
        ("centred", "batch_topk"),
    ],
)
def test_compiles_into_one_graph(kind: str, activation: str) -> None:
    torch._dynamo.reset()
    module = random_module(kind, CONFIGS[activation])
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True, dynamic=True)
    options: dict[str, Any] = {} if kind == "adapter" else {"return_aux": True}
    for tokens in (5, 9):
        results = []
        for net in (module, compiled):
            module.zero_grad()
            x = inputs(2, tokens)
            out, aux = net(x, **options)
            (out.square().sum() + aux.penalty).backward()
            results.append([out, *aux.stats, x.grad, *(p.grad for p in module.parameters())])
        for eager, result in zip(*results, strict=True):
            assert torch.equal(eager.nan_to_num(-1), result.nan_to_num(-1))
        if kind != "adapter":
            x = inputs(2, tokens)
            assert torch.equal(compiled(x), module(x))  # with gradients
            with torch.no_grad():
                assert torch.equal(compiled(x), module(x))
    torch._dynamo.reset()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: KINDS["centred"](CONFIGS["relu"])(torch.zeros(3, 1)), r"SAE: x must be .*d_in=12"),
        (lambda: KINDS["sae"](CONFIGS["relu"]).encode(torch.zeros(3, 1)), r"got \[3, 1\]"),
        (lambda: KINDS["skip"](CONFIGS["relu"])(torch.zeros(())), r"Transcoder: x must be .*\[\]"),
        (
            lambda: KINDS["centred"](CONFIGS["relu"])(torch.zeros(3, D).half()),
            "W_enc must be of x's dtype, torch.float16; got torch.float32",
        ),
        (
            lambda: KINDS["sae"](CONFIGS["relu"])(torch.zeros(3, D), return_codes=True),
            "return_codes=True needs return_aux=True",
        ),
        (lambda: KINDS["centred"](UNBIASED), "subtract_b_dec needs b_dec, .* set bias=True"),
    ],
)
def test_misuse_raises_one_clear_error(call: Callable[[], Any], message: str) -> None:
    """A width of 1 would broadcast against ``b_dec`` without a word."""
    with pytest.raises((ValueError, UserError), match=message):
        call()
