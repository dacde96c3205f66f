"""CPU linear layers: the same result whatever the way, no trace after removal, measured once, safe when weights change.

Tolerance: RMS(error)/RMS(reference) ≤ 1e-6. The ways add the same fp32 products in another order; over 96 terms that
moves a result by about 1e-7 of its size.
"""

from __future__ import annotations

import copy
from types import SimpleNamespace

import psutil
import pytest
import torch
from compiler import COMPILED, needs_compiler
from torch import Tensor, nn
from torch.nn import functional as F

from accel.errors import OptionError
from accel.kernels import row_step
from accel.models import cpu_linear
from accel.models.cpu_linear import MEASURED_ROWS, WAYS, install

TOLERANCE = 1e-6
IN, OUT = 96, 80


class Wrapped(nn.Linear):
    """Somebody's own layer, which computes something else."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + 1.0


def model(bias: bool = True) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(IN, OUT, bias), nn.ReLU(), nn.Linear(OUT, IN, bias)).requires_grad_(False)


def error(got: Tensor, expected: Tensor) -> float:
    return float((got - expected).square().mean().sqrt() / expected.square().mean().sqrt())


def name_of(function) -> str:
    if isinstance(function, cpu_linear._Compiled):
        return "compiled" if function.panels().scales is None else "int8"
    return function.__qualname__.split(".")[0].strip("_")


@pytest.fixture
def timings(monkeypatch):
    """Scripted seconds for (way, rows) instead of a clock; counts how often a choice was measured."""
    cpu_linear._fastest.cache_clear()
    script = SimpleNamespace(seconds={}, calls=0)

    def fake(functions, inputs):
        script.calls += 1
        inputs, functions = list(inputs), list(functions)
        (way,) = {name_of(f) for f in functions}
        return script.seconds.get((way, len(inputs[0])), 1.0)

    monkeypatch.setattr(cpu_linear, "_time", fake)
    yield script
    cpu_linear._fastest.cache_clear()


@pytest.fixture
def memory(monkeypatch):
    """Sets the free memory that psutil reports."""

    def pretend(free: int) -> None:
        monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=free))

    return pretend


@pytest.mark.parametrize("way", ["linear", COMPILED, "packed", "transposed"])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("shape", [(1,), (2,), (3,), (5,), (16,), (17,), (300,), (2, 7), (1, 1), (4, 1), (2, 3, 2), ()])
@torch.no_grad()
def test_every_way_equals_f_linear(way: str, bias: bool, shape: tuple[int, ...]) -> None:
    layer = model(bias)[0]
    x = torch.randn(*shape, IN)
    got = cpu_linear._FUNCTIONS[way](layer)(x)
    expected = F.linear(x, layer.weight, layer.bias)
    assert got.shape == expected.shape
    assert error(got, expected) <= TOLERANCE
    assert error(torch.zeros_like(got), expected) > 0.5


@pytest.mark.parametrize("way", [COMPILED if way == "compiled" else way for way in WAYS])
@torch.no_grad()
def test_an_installed_model_computes_the_same(way: str, timings, memory) -> None:
    memory(1 << 40)
    timings.seconds = {("packed", 1): 0.1, ("transposed", 4): 0.1, ("linear", 16): 0.1}
    net = model()
    inputs = [torch.randn(rows, IN) for rows in (1, 2, 3, 5, 16, 17, 300)]
    expected = [net(x) for x in inputs]
    installed = install(net, way)
    assert all(error(net(x), y) <= TOLERANCE for x, y in zip(inputs, expected, strict=True))
    installed.remove()
    assert all(torch.equal(net(x), y) for x, y in zip(inputs, expected, strict=True))


@pytest.mark.parametrize("way", [COMPILED, "packed", "transposed"])
@torch.no_grad()
def test_the_way_is_taken_and_an_empty_input_works(way: str, monkeypatch) -> None:
    calls: list[int] = []
    plain = cpu_linear._FUNCTIONS[way]

    def counting(module):
        run = plain(module)
        return lambda x: calls.append(x.shape[0]) or run(x)

    monkeypatch.setitem(cpu_linear._FUNCTIONS, way, counting)
    net = model()
    install(net, way)
    assert net(torch.randn(3, IN)).shape == (3, IN)
    assert net(torch.randn(0, IN)).shape == (0, IN)
    assert calls == [3, 3, 0, 0]


@pytest.mark.parametrize("way", [COMPILED, "packed", "transposed"])
def test_remove_leaves_no_trace(way: str) -> None:
    net = model()
    before = [dict(m.__dict__) for m in net.modules()]
    installed = install(net, way)
    assert all("forward" in m.__dict__ for m in (net[0], net[2]))
    installed.remove()
    assert [dict(m.__dict__) for m in net.modules()] == before


def test_layers_that_are_not_plain_fp32_are_left_alone() -> None:
    net = nn.ModuleDict(
        {
            "mine": nn.Linear(IN, OUT),
            "subclass": Wrapped(IN, OUT),
            "bf16": nn.Linear(IN, OUT).bfloat16(),
            "meta": nn.Linear(IN, OUT, device="meta"),
            "hooked": nn.Linear(IN, OUT),
        }
    )
    with torch.inference_mode():
        net["inference"] = nn.Linear(IN, OUT)
    hook = net["hooked"].forward
    net["hooked"].forward = hook
    installed = install(net, "transposed")
    assert installed.modules == (net["mine"],)
    assert [name for name, m in net.items() if "forward" in m.__dict__] == ["mine", "hooked"]
    installed.remove()
    assert net["hooked"].__dict__["forward"] is hook


def test_a_second_install_changes_nothing() -> None:
    net = model()
    first, second = install(net, "transposed"), install(net, "packed")
    assert second.modules == ()
    second.remove()
    assert "forward" in net[0].__dict__
    first.remove()


def _in_place(layer: nn.Linear) -> None:
    layer.weight.mul_(2.0)


def _load(layer: nn.Linear) -> None:
    layer.load_state_dict({"weight": torch.ones(OUT, IN), "bias": torch.ones(OUT)})


def _replace(layer: nn.Linear) -> None:
    layer.weight = nn.Parameter(torch.randn(OUT, IN))


def _replace_data(layer: nn.Linear) -> None:
    layer.weight.data = torch.randn(OUT, IN)


def _bias(layer: nn.Linear) -> None:
    layer.bias.add_(3.0)


def _cast(layer: nn.Linear) -> None:
    layer.bfloat16()


CHANGES = [_in_place, _load, _replace, _replace_data, _bias, _cast]


@pytest.mark.parametrize("way", [COMPILED, "packed", "transposed"])
@pytest.mark.parametrize("change", CHANGES, ids=lambda f: f.__name__)
@torch.no_grad()
def test_a_weight_that_changes_while_installed_is_seen(way: str, change) -> None:
    layer = model()[0]
    net = nn.Sequential(layer)
    install(net, way)
    x = torch.randn(3, IN)
    old = net(x)
    change(layer)
    x = x.to(layer.weight.dtype)
    expected = F.linear(x, layer.weight, layer.bias)
    assert error(net(x).float(), expected.float()) <= TOLERANCE
    assert error(net(x).float(), old) > 1e-4


def test_an_unchanged_weight_is_packed_once(monkeypatch) -> None:
    packs: list[int] = []
    pack = cpu_linear._pack
    net = model()
    monkeypatch.setattr(cpu_linear, "_pack", lambda weight: packs.append(weight.shape[0]) or pack(weight))
    install(net, "packed")
    packs_at_install = [p for p in packs if p in (OUT, IN)]
    assert packs_at_install == [OUT, IN]
    with torch.no_grad():
        for _ in range(3):
            net(torch.randn(2, IN))
        assert len(packs) == len(packs_at_install) + 1  # the probe's
        net[0].weight.mul_(1.5)
        net(torch.randn(2, IN))
        net(torch.randn(2, IN))
    assert packs[-1] == OUT
    assert len(packs) == len(packs_at_install) + 2


@pytest.mark.parametrize("way", [COMPILED, "packed", "transposed"])
def test_gradients_flow_while_installed(way: str) -> None:
    net = model().requires_grad_(True)
    x = torch.randn(3, IN)
    net(x).square().sum().backward()
    expected = [p.grad.clone() for p in net.parameters()]
    net.zero_grad()
    install(net, way)
    net(x).square().sum().backward()
    assert all(torch.equal(p.grad, g) for p, g in zip(net.parameters(), expected, strict=True))


@pytest.mark.parametrize("way", [COMPILED, "packed", "transposed"])
@torch.no_grad()
def test_autocast_is_torchs_own(way: str) -> None:
    net, x = model(), torch.randn(3, IN)
    with torch.autocast("cpu", torch.bfloat16):
        expected = net(x)
    install(net, way)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(net(x), expected)
        assert expected.dtype == torch.bfloat16


def test_auto_takes_the_fastest_per_number_of_rows(timings, memory) -> None:
    memory(1 << 40)
    timings.seconds = {
        ("transposed", 1): 0.5,
        ("packed", 2): 0.5,
        ("packed", 4): 0.2,
        ("transposed", 4): 0.3,
        ("linear", 16): 0.9,
    }
    installed = install(model(), "auto")
    assert installed.way_by_rows == {
        1: "transposed",
        2: "packed",
        4: "packed",
        6: "linear",
        8: "linear",
        16: "linear",
    }
    assert installed.extra_bytes == 2 * IN * OUT * 4


@needs_compiler
def test_a_model_that_may_round_does_so_for_any_number_of_rows_whatever_is_fastest(timings, memory) -> None:
    memory(1 << 40)
    timings.seconds = {("int8", rows): 0.1 for rows in MEASURED_ROWS} | {("packed", 8): 0.05}
    net = nn.Sequential(nn.Linear(IN, 64), nn.ReLU(), nn.Linear(64, IN)).requires_grad_(False)
    exact = install(net, "auto")
    exact.remove()
    assert "int8" not in exact.way_by_rows.values()
    inputs = [torch.randn(rows, IN) for rows in (1, 3, 4, 7, 16, 17, 300)]
    with torch.no_grad():
        expected = [net(x) for x in inputs]
        installed = install(net, "auto", may_round=True)
        found = [net(x) for x in inputs]
        # a row's result is that of the row alone, up to the order of sums
        alone = torch.cat([net(row[None]) for row in inputs[-1]])
    assert set(installed.way_by_rows.values()) == {"int8"}
    assert installed.extra_bytes == 2 * IN * 64
    assert all(TOLERANCE < error(y, z) < 0.01 for y, z in zip(found, expected, strict=True))
    assert error(found[-1], alone) <= TOLERANCE


def rounding(got: Tensor, layer: nn.Linear, x: Tensor) -> float:
    """Error over what an output of such inputs and weights is usually: one whose sum cancels may be near zero."""
    inputs, weights = x.square().mean().sqrt(), layer.weight.square().mean().sqrt()
    usual = inputs * weights * x.shape[-1] ** 0.5
    return float((got - layer(x)).square().mean().sqrt() / usual.clamp_min(1e-30))


@needs_compiler
@torch.no_grad()
@pytest.mark.parametrize(("inputs", "outputs"), [(32, 1), (64, 7), (96, 80), (33, 40), (8, 8)])
def test_8_bits_of_any_shape_and_of_misaligned_rows(inputs: int, outputs: int) -> None:
    layer = nn.Linear(inputs, outputs)
    run = cpu_linear._FUNCTIONS["int8"](layer)
    assert run(torch.zeros(2, 0, inputs)).shape == (2, 0, outputs)
    for rows in (1, 2, 3, 5):
        # rows of another tensor begin where they may
        x = torch.randn(rows * inputs + 3)[3:].reshape(rows, inputs)
        assert rounding(run(x), layer, x) < 0.01
    layer.weight.mul_(3.0)
    assert rounding(run(x), layer, x) < 0.01
    # a row's own size does not make its neighbour coarse
    sizes = torch.tensor([1e-6, 1.0, 1e6, 0.0, 1e15])[:, None]
    rows = [(x * sizes)[i : i + 1] for i in range(5)]
    assert all(rounding(got[None], layer, row) < 0.01 for got, row in zip(run(x * sizes), rows, strict=True))
    layer.weight.zero_()
    assert error(run(x), layer(x)) < 0.01


@needs_compiler
@torch.no_grad()
def test_who_multiplies_by_many_layers_at_once_gets_their_panels_where_that_is_all() -> None:
    net = nn.Sequential(nn.Linear(IN, OUT, False), nn.Linear(OUT, IN)).requires_grad_(False)
    layer, biased = net
    assert cpu_linear.panels_of(layer, 1) is None
    installed = install(net, "compiled")
    panels = cpu_linear.panels_of(layer, 3)
    x = torch.randn(3, IN)
    assert panels is not None and error(row_step.reference.linear(x, panels), layer(x)) <= TOLERANCE
    assert cpu_linear.panels_of(layer, 300) is panels
    assert cpu_linear.panels_of(biased, 3) is None
    # a hook sees what goes in and out; a changed weight has other panels; another type is torch's business
    hook = layer.register_forward_hook(lambda *_: None)
    assert cpu_linear.panels_of(layer, 3) is None
    hook.remove()
    layer.weight.mul_(2)
    changed = cpu_linear.panels_of(layer, 3)
    assert changed is not panels and torch.equal(changed.weights, 2 * panels.weights)
    layer.bfloat16()
    assert cpu_linear.panels_of(layer, 3) is None
    installed.remove()
    assert cpu_linear.panels_of(layer.float(), 3) is None
    ways = dict.fromkeys(MEASURED_ROWS, "compiled") | {2: "transposed"}
    layer.forward = cpu_linear._FastForward(layer, ways)
    assert [cpu_linear.panels_of(layer, n) is None for n in (1, 2, 3, 300)] == [False, True, False, False]


def test_a_count_in_between_takes_the_way_of_the_next_one_up(monkeypatch) -> None:
    taken: list[str] = []
    for way in ("linear", "transposed", "packed"):
        monkeypatch.setitem(
            cpu_linear._FUNCTIONS, way, lambda m, way=way: lambda x: taken.append(way) or x.new_zeros(x.shape[0], OUT)
        )
    ways = dict(zip(MEASURED_ROWS, ["linear", "packed", "transposed", "transposed", "linear", "packed"], strict=True))
    forward = cpu_linear._FastForward(model()[0], ways)
    with torch.no_grad():
        for rows in (1, 2, 3, 4, 5, 7, 9, 16, 17, 300):
            forward(torch.zeros(rows, IN))
    assert taken == "linear packed transposed transposed transposed linear packed packed packed packed".split()


@pytest.mark.parametrize(("spare", "packs"), [(1, False), (-1, True)])
def test_packing_needs_twice_its_memory_free(timings, memory, monkeypatch, spare: int, packs: bool) -> None:
    memory(2 * 2 * IN * OUT * 4 - spare)
    # without a C compiler; with one, what it makes comes first
    monkeypatch.setattr(cpu_linear.row_step, "compiled", lambda folder: None)
    timings.seconds = {("packed", rows): 0.1 for rows in MEASURED_ROWS}
    installed = install(model(), "auto")
    assert set(installed.way_by_rows.values()) == ({"packed"} if packs else {"linear"})
    assert installed.extra_bytes == (2 * IN * OUT * 4 if packs else 0)


@needs_compiler
@pytest.mark.parametrize(("copies", "taken"), [(0, "linear"), (1, "compiled"), (2, "packed")])
def test_as_many_copies_are_considered_as_fit(timings, memory, copies: int, taken: str) -> None:
    memory(copies * 2 * 2 * IN * OUT * 4)
    timings.seconds = {("compiled", rows): 0.2 for rows in MEASURED_ROWS}
    timings.seconds |= {("packed", rows): 0.1 for rows in MEASURED_ROWS}
    assert set(install(model(), "auto").way_by_rows.values()) == {taken}


def test_shapes_are_measured_once_a_process(timings, memory) -> None:
    memory(1 << 40)
    first = install(model(), "auto")
    measured = timings.calls
    assert measured > 0
    again = install(model(), "auto")
    assert (again.way_by_rows, timings.calls) == (first.way_by_rows, measured)
    assert again.way_by_rows is not first.way_by_rows
    install(model(bias=False), "auto")
    assert timings.calls == 2 * measured
    torch.set_num_threads(torch.get_num_threads() + 1)
    try:
        install(model(), "auto")
    finally:
        torch.set_num_threads(torch.get_num_threads() - 1)
    assert timings.calls == 3 * measured


def test_the_sample_ends_where_it_has_left_the_cache(monkeypatch) -> None:
    monkeypatch.setattr(cpu_linear, "SAMPLE_BYTES", 3 * IN * OUT * 4)
    layers = [nn.Linear(IN, OUT) for _ in range(10)]
    assert cpu_linear._sample(layers) == ((IN, OUT, True),) * 3


def test_measuring_draws_no_random_numbers(memory) -> None:
    memory(1 << 40)
    cpu_linear._fastest.cache_clear()
    net = model()
    torch.manual_seed(5)
    install(net, "auto")
    drawn = torch.rand(1)
    torch.manual_seed(5)
    assert torch.equal(drawn, torch.rand(1))


def test_no_layers_and_linear_install_nothing() -> None:
    for installed in (install(nn.ReLU(), "auto"), install(model(), "linear")):
        assert (installed.modules, installed.way_by_rows, installed.extra_bytes) == ((), {}, 0)


def test_an_unknown_way_is_refused() -> None:
    known = "auto, compiled, linear, packed, transposed"
    with pytest.raises(OptionError, match=rf"^unknown cpu_linear 'fast': choose from {known}$"):
        install(model(), "fast")


def test_a_torch_that_cannot_pack_says_so_and_auto_does_without(monkeypatch, timings, memory) -> None:
    memory(1 << 40)

    def broken(module):
        raise NotImplementedError("no oneDNN")

    monkeypatch.setitem(cpu_linear._FUNCTIONS, "packed", broken)
    monkeypatch.setattr(cpu_linear, "_packed", broken)
    with pytest.raises(OptionError, match="needs a torch built with oneDNN: use 'transposed' or 'auto'"):
        install(model(), "packed")
    assert "packed" not in install(model(), "auto").way_by_rows.values()


def test_a_copied_model_computes_with_its_own_weights() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(8, 8))
    installed = cpu_linear.install(model, "transposed")
    twin = copy.deepcopy(model)
    x = torch.ones(3, 8)
    with torch.no_grad():
        twin[0].weight.zero_()
        twin[0].bias.zero_()
        assert twin(x).abs().max() == 0
        assert model(x).abs().max() > 0
    installed.remove()
