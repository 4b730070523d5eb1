"""The delta bank on models in memory: what is written, what comes back, and what is refused."""

from __future__ import annotations

import copy
import subprocess
import sys
from collections.abc import Callable

import pytest
import torch

from guda_fast.deltas import DeltaBank, Dense
from guda_fast.errors import CheckpointError

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


class Net(torch.nn.Module):
    """Something of everything: 4-d weights, tied weights, buffers that float, count, or are not saved."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = torch.nn.Conv2d(3, 4, 3)
        self.norm = torch.nn.BatchNorm2d(4)
        self.embed = torch.nn.Linear(4, 5, bias=False)
        self.head = torch.nn.Linear(4, 5)
        self.head.weight = self.embed.weight
        self.scale = torch.nn.Parameter(torch.tensor(1.5))
        self.register_buffer("grid", torch.arange(3.0), persistent=False)


@pytest.fixture
def base() -> Net:
    torch.manual_seed(0)
    return Net()


def changed(model: torch.nn.Module, names: tuple[str, ...], seed: int = 1) -> torch.nn.Module:
    """A copy in which the tensors whose name starts with one of ``names`` are perturbed."""
    model = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in tensors(model).items():
            if name.startswith(names) and tensor.is_floating_point():
                tensor.add_(0.1 * torch.randn(tensor.shape, generator=generator).to(tensor.dtype))
    return model


def tensors(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return dict(model.named_parameters()) | dict(model.named_buffers())


def snapshot(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().clone() for name, tensor in tensors(model).items()}


def assert_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name].dtype == value.dtype, name
        assert torch.equal(found[name], value), name


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("dtype", DTYPES)
def test_apply_and_restore_are_bit_exact_in_place(
    base: Net, dtype: torch.dtype, memory_format: torch.memory_format
) -> None:
    groups = {"a": changed(base, ("conv", "norm")), "b": changed(base, ("norm", "embed", "scale"), seed=2)}
    bank = DeltaBank.load(base, groups).to(dtype=dtype, memory_format=memory_format)
    start = snapshot(bank.model)
    pointers = {name: tensor.data_ptr() for name, tensor in tensors(bank.model).items()}
    wide = torch.promote_types(dtype, torch.float32)
    for group in ("a", "b", "a"):
        assert bank.apply(group) is bank.model
        assert bank.applied_group == group
        expected = {}
        for name, theta_0 in tensors(base).items():
            if not theta_0.is_floating_point():
                expected[name] = theta_0
                continue
            delta = tensors(groups[group])[name] - theta_0
            expected[name] = (theta_0.to(wide) + delta.to(wide)).detach().to(dtype)
        assert_same(snapshot(bank.model), expected)
    bank.restore()
    assert bank.applied_group is None
    assert_same(snapshot(bank.model), start)
    assert {name: tensor.data_ptr() for name, tensor in tensors(bank.model).items()} == pointers


def test_only_tensors_that_differ_are_written(base: Net) -> None:
    bank = DeltaBank.load(base, {"a": changed(base, ("conv",)), "b": changed(base, ("scale",))})

    def written(action: Callable[[], object]) -> set[str]:
        before = {name: tensor._version for name, tensor in tensors(bank.model).items()}
        action()
        return {name for name, tensor in tensors(bank.model).items() if tensor._version != before[name]}

    conv = {"conv.weight", "conv.bias"}
    assert written(lambda: bank.apply("a")) == conv
    assert written(lambda: bank.apply("a")) == set()
    assert written(lambda: bank.apply("b")) == conv | {"scale"}
    assert written(bank.restore) == {"scale"}
    assert written(bank.restore) == set()
    assert set(bank.deltas[0].parts) == conv


def test_applied_restores_after_an_exception(base: Net) -> None:
    bank = DeltaBank.load(base, {"a": changed(base, ("conv",))})
    with pytest.raises(KeyboardInterrupt), bank.applied("a") as model:
        assert not torch.equal(model.conv.weight, base.conv.weight)
        raise KeyboardInterrupt
    assert bank.applied_group is None
    assert_same(snapshot(bank.model), snapshot(base))


def test_applied_nests(base: Net) -> None:
    groups = {"a": changed(base, ("conv",)), "b": changed(base, ("scale",))}
    bank = DeltaBank.load(base, groups)
    with bank.applied(0):
        as_a = snapshot(bank.model)
        with bank.applied(1):
            assert bank.applied_group == "b"
        assert bank.applied_group == "a"
        assert_same(snapshot(bank.model), as_a)
    assert bank.applied_group is None


def test_interrupted_apply_restores_the_base(base: Net, monkeypatch: pytest.MonkeyPatch) -> None:
    bank = DeltaBank.load(base, {"a": changed(base, ("conv", "norm", "scale"))})
    added_to, calls = Dense.added_to, []

    def interrupted(self: Dense, value: torch.Tensor, dtype: torch.dtype, out: torch.Tensor) -> torch.Tensor:
        calls.append(dtype)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return added_to(self, value, dtype, out)

    monkeypatch.setattr(Dense, "added_to", interrupted)
    with pytest.raises(KeyboardInterrupt):
        bank.apply("a")
    assert len(calls) == 3 and bank.applied_group is None
    assert_same(snapshot(bank.model), snapshot(base))


def test_tied_parameters_are_one(base: Net) -> None:
    other = changed(base, ("embed",))
    bank = DeltaBank.load(base, {"a": other})
    assert set(bank.deltas[0].parts) == {"embed.weight"}
    before = bank.model.embed.weight._version
    bank.apply("a")
    assert bank.model.head.weight is bank.model.embed.weight
    assert bank.model.embed.weight._version == before + 1
    assert torch.equal(bank.model.head.weight, base.embed.weight + (other.embed.weight - base.embed.weight))

    state = other.state_dict()
    del state["embed.weight"]
    assert DeltaBank.load(base, {"a": state}).delta_hashes == bank.delta_hashes
    untied = dict(other.state_dict(), **{"head.weight": base.head.weight})
    with pytest.raises(CheckpointError, match=r"'head.weight' must equal key 'embed.weight'"):
        DeltaBank.load(base, {"a": untied})


def test_tied_parameters_that_a_cast_separates_stay_equal(base: Net) -> None:
    bank = DeltaBank.load(base, {"a": changed(base, ("embed",))})
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    try:
        bank.to(dtype=torch.float64)
    finally:
        torch.__future__.set_overwrite_module_params_on_conversion(False)
    assert bank.model.head.weight.data_ptr() != bank.model.embed.weight.data_ptr()
    bank.apply("a")
    assert not torch.equal(bank.model.head.weight, base.head.weight.double())
    assert torch.equal(bank.model.head.weight, bank.model.embed.weight)
    bank.restore()
    assert torch.equal(bank.model.head.weight, base.head.weight.double())


def test_buffers(base: Net) -> None:
    other = changed(base, ("norm.running_mean", "grid"))
    bank = DeltaBank.load(base, {"a": other, "b": changed(base, ("conv",)).state_dict()})
    assert set(bank.deltas[0].parts) == {"norm.running_mean", "grid"}
    assert "grid" not in bank.deltas[1].parts  # a state dict lacks what is not persistent
    other.norm.num_batches_tracked += 1
    with pytest.raises(CheckpointError, match=r"'norm.num_batches_tracked' must equal the base's value"):
        DeltaBank.load(base, {"a": other})


def test_given_objects_are_left_alone(base: Net) -> None:
    other = changed(base, ("conv",))
    kept, kept_other = snapshot(base), snapshot(other)
    bank = DeltaBank.load(base, {"a": other})
    bank.to(dtype=torch.bfloat16).apply("a")
    assert_same(snapshot(base), kept)
    assert_same(snapshot(other), kept_other)
    assert base.training and base.conv.weight.requires_grad
    assert not bank.model.training
    assert not any(parameter.requires_grad for parameter in bank.model.parameters())
    with torch.no_grad():
        other.conv.weight.zero_()
        base.conv.weight.zero_()
    bank.to(dtype=torch.float32).restore()
    assert torch.equal(bank.model.conv.weight, kept["conv.weight"])


def test_narrow_and_wide_again_gives_the_base_back(base: Net) -> None:
    bank = DeltaBank.load(base, {"a": changed(base, ("conv",))})
    names = bank.base_hash, bank.hash
    bank.apply("a")
    as_a = snapshot(bank.model)
    bank.to(dtype=torch.bfloat16)
    assert bank.applied_group == "a"
    assert torch.equal(bank.model.conv.weight, as_a["conv.weight"].bfloat16())
    assert bank.to(dtype=torch.float32) is bank
    assert_same(snapshot(bank.model), as_a)
    assert_same(snapshot(bank.restore()), snapshot(base))
    narrow = DeltaBank.load(base, {"a": changed(base, ("conv",))}).to("cpu", dtype=torch.float16)
    narrow.apply("a")
    assert (narrow.base_hash, narrow.hash) == names


def test_deltas_are_formed_before_rounding(base: Net) -> None:
    half = copy.deepcopy(base).half()
    other = copy.deepcopy(half).float()
    tiny = 2.0**-20  # far below float16's spacing at these weights
    with torch.no_grad():
        other.conv.weight.add_(tiny)
    (delta,) = DeltaBank.load(half, {"a": other}).deltas
    assert set(delta.parts) == {"conv.weight"}
    value = delta.parts["conv.weight"].value
    assert value.dtype == torch.float32
    assert torch.equal(value, other.conv.weight - half.conv.weight.float())
    assert value.abs().min() > 0

    double = copy.deepcopy(base).double()
    with torch.no_grad():
        (other := copy.deepcopy(double)).conv.weight.add_(1e-14)
    bank = DeltaBank.load(double, {"a": other})
    assert set(bank.deltas[0].parts) == {"conv.weight"}
    bank.apply("a")
    assert not torch.equal(bank.model.conv.weight, double.conv.weight)
    assert_same(snapshot(bank.restore()), snapshot(double))


def test_hashes_follow_content(base: Net) -> None:
    a, b = changed(base, ("conv",)), changed(base, ("scale",))
    bank = DeltaBank.load(base, {"a": a, "b": b})
    again = DeltaBank.load(copy.deepcopy(base), {"a": copy.deepcopy(a).state_dict(), "b": b})
    assert bank.hash == again.hash
    assert list(bank.delta_hashes) == ["a", "b"] and bank.delta_hashes["a"] != bank.delta_hashes["b"]
    assert len({bank.hash, bank.base_hash, *bank.delta_hashes.values()}) == 4
    swapped = DeltaBank.load(base, {"b": b, "a": a})
    assert swapped.hash != bank.hash and swapped.base_hash == bank.base_hash
    assert DeltaBank.load(base, {"c": a, "b": b}).hash != bank.hash
    assert DeltaBank.load(b, {"a": a}).base_hash != bank.base_hash
    with bank.applied("b"):
        assert bank.base_hash == again.base_hash


def test_groups_keep_their_order_and_are_found_by_name_or_position(base: Net) -> None:
    bank = DeltaBank.load(base, {name: changed(base, ("conv",), seed=i) for i, name in enumerate("zam")})
    assert bank.groups == ("z", "a", "m") and len(bank) == 3
    bank.apply(2)
    assert bank.applied_group == "m" and "'m' applied" in repr(bank)
    with pytest.raises(ValueError, match=r"group must be one of 'z', 'a', 'm', got 'dog'"):
        bank.apply("dog")
    with pytest.raises(ValueError, match="group must be between 0 and 2, got -1"):
        bank.apply(-1)
    with pytest.raises(TypeError, match="group must be an integer, got None"):
        bank.apply(None)  # type: ignore[arg-type]
    assert bank.applied_group == "m"


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")  # torch.compile's own import
@pytest.mark.parametrize("wrap", [torch.compile, torch.nn.DataParallel], ids=["compile", "data_parallel"])
def test_wrapped_modules(base: Net, wrap: Callable[[torch.nn.Module], torch.nn.Module]) -> None:
    other = changed(base, ("conv",))
    bank = DeltaBank.load(wrap(base), {"a": wrap(other), "b": wrap(other).state_dict()})
    assert type(bank.model) is Net
    assert bank.delta_hashes["a"] == bank.delta_hashes["b"]


def test_prefixes_that_the_base_has_itself_stay(base: Net) -> None:
    wrapped, other = (
        torch.nn.ModuleDict({"unet": base}),
        torch.nn.ModuleDict({"unet": changed(base, ("conv",))}),
    )
    bank = DeltaBank.load(
        wrapped, {"a": other.state_dict(), "b": {"module." + k: v for k, v in other.state_dict().items()}}
    )
    assert set(bank.deltas[0].parts) == {"unet.conv.weight", "unet.conv.bias"}
    assert bank.delta_hashes["a"] == bank.delta_hashes["b"]


def test_loading_under_inference_mode_gives_a_bank_that_can_be_written(base: Net) -> None:
    with torch.inference_mode():
        bank = DeltaBank.load(base, {"a": changed(base, ("conv",))})
    bank.apply("a")
    with torch.inference_mode():
        bank.restore()
    assert_same(snapshot(bank.model), snapshot(base))


def test_scheduler_is_what_was_given(base: Net) -> None:
    groups = {"a": changed(base, ("conv",))}
    assert DeltaBank.load(base, groups).scheduler is None
    config = {"num_train_timesteps": 10}
    bank = DeltaBank.load(base, groups, scheduler=config)
    assert bank.scheduler == config and bank.scheduler is not config
    with pytest.raises(TypeError, match="scheduler must be a configuration"):
        DeltaBank.load(base, groups, scheduler=7)


def test_arguments_are_checked(base: Net) -> None:
    other = changed(base, ("conv",))
    with pytest.raises(CheckpointError, match="must name at least one group, got an empty mapping"):
        DeltaBank.load(base, {})
    with pytest.raises(TypeError, match="counterfactuals must be a mapping"):
        DeltaBank.load(base, [other])  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"group names must be strings, got 3 \(int\)"):
        DeltaBank.load(base, {3: other})  # type: ignore[dict-item]
    with pytest.raises(ValueError, match="group names must not be empty"):
        DeltaBank.load(base, {"": other})
    with pytest.raises(TypeError, match=r"counterfactuals\['a'\] must be a path, a state dict, a torch.nn.Mod"):
        DeltaBank.load(base, {"a": 3})  # type: ignore[dict-item]
    with pytest.raises(TypeError, match="base must be the path of a diffusers folder or a torch.nn.Module"):
        DeltaBank.load(base.state_dict(), {"a": other})  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="dtype must be float32, float64, bfloat16 or float16"):
        DeltaBank.load(base, {"a": other}).to(dtype=torch.int64)


def test_identical_models_are_refused_unless_meant(base: Net) -> None:
    with pytest.raises(CheckpointError, match=r"counterfactuals\['a'\]: equals the base .* allow_identical=True"):
        DeltaBank.load(base, {"a": copy.deepcopy(base)})
    bank = DeltaBank.load(base, {"a": copy.deepcopy(base)}, allow_identical=True)
    assert bank.deltas[0].parts == {} and bank.deltas[0].bytes == 0
    assert_same(snapshot(bank.apply("a")), snapshot(base))


def test_a_base_that_cannot_be_used_is_refused(base: Net) -> None:
    other = changed(base, ("conv",))
    with torch.no_grad():
        base.conv.weight[1, 2, 0, 1] = float("nan")
    with pytest.raises(CheckpointError, match=r"base: key 'conv.weight' must be finite.* at \(1, 2, 0, 1\)"):
        DeltaBank.load(base, {"a": other})
    with pytest.raises(CheckpointError, match=r"base: key '.*' must be a floating .*\(meta\)"):
        DeltaBank.load(copy.deepcopy(base).to("meta"), {"a": other})
    base.scale = torch.nn.Parameter(torch.tensor(1j))
    with pytest.raises(CheckpointError, match="key 'scale' must be a floating or integer tensor, found complex64"):
        DeltaBank.load(changed(base, ()), {"a": other})


def test_import_does_not_import_diffusers() -> None:
    code = "import sys, guda_fast.deltas; sys.exit(any(m in sys.modules for m in ('diffusers', 'transformers')))"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
