"""`BatchedModel`: each row as its own model gives it, whatever the mixture, and the bank's model untouched."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pytest
import torch
from diffusers import DiTTransformer2DModel, UNet2DConditionModel, UNet2DModel
from torch import Tensor, nn

from guda_fast.deltas import DeltaBank
from guda_fast.deltas.delta import Delta, Dense, LowRank, Part
from guda_fast.errors import BatchedUnavailableError
from guda_fast.forward import fuse
from guda_fast.forward._batched_layers import StackedLayer
from guda_fast.forward._routing import RowModels
from guda_fast.forward.batched import BatchedModel

MODELS = [2, 0, 1, 3, 3, 0, 2, 1]  # of the rows, unsorted; model 4 has none
SAMPLES = [0, 1, 2, 0, 1, 0, 2, 1]
CONDITIONS = [0, 1, 0, 1, 0, 0, 1, 1]
TIMES = [5, 5, 30]  # of the samples


def unet(**options: Any) -> nn.Module:
    sizes: dict[str, Any] = {"block_out_channels": (8, 16), "layers_per_block": 1, "sample_size": 8}
    blocks = {"down_block_types": ("DownBlock2D", "AttnDownBlock2D"), "up_block_types": ("AttnUpBlock2D", "UpBlock2D")}
    return UNet2DModel(**{**sizes, **blocks, "norm_num_groups": 4, "attention_head_dim": 4, **options})


def conditional(**options: Any) -> nn.Module:
    return UNet2DConditionModel(
        block_out_channels=(8, 16), layers_per_block=1, sample_size=8, norm_num_groups=4, cross_attention_dim=12,
        attention_head_dim=4, down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"), **options,
    )  # fmt: skip


def added() -> nn.Module:
    return conditional(
        addition_embed_type="text_time",
        addition_time_embed_dim=4,
        projection_class_embeddings_input_dim=6 * 4 + 10,
        use_linear_projection=True,
        transformer_layers_per_block=2,
    )


def dit() -> nn.Module:
    return DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=4, num_layers=2, sample_size=8, patch_size=2,
        num_embeds_ada_norm=3, norm_num_groups=4,
    )  # fmt: skip


SKIP = {
    "down_block_types": ("SkipDownBlock2D", "AttnSkipDownBlock2D"),
    "up_block_types": ("AttnSkipUpBlock2D", "SkipUpBlock2D"),
    "block_out_channels": (32, 64),
}
RESNET = {
    "down_block_types": ("ResnetDownsampleBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "ResnetUpsampleBlock2D"),
    "downsample_type": "resnet",
    "upsample_type": "resnet",
}
NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "attention": unet,
    "classes, scale and shift": lambda: unet(num_class_embeds=3, resnet_time_scale_shift="scale_shift"),
    "resnet resampling": lambda: unet(**RESNET),
    "skip": lambda: unet(**SKIP),
    "prompts": conditional,
    "prompts, added": added,
    "transformer": dit,
}


def randomised(make: Callable[[], nn.Module]) -> nn.Module:
    """Without the zeros and ones that layers begin with, which hide what is not used."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = make()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval().double()


def conditions(model: nn.Module, numbers: Sequence[int], dtype: torch.dtype) -> dict[str, Any]:
    """What the model takes beside x and the timestep, for rows of these conditions."""
    chosen = torch.tensor(numbers, dtype=torch.int64)
    random = torch.Generator().manual_seed(3)
    found: dict[str, Any] = {}
    if getattr(model, "class_embedding", None) is not None or isinstance(model, DiTTransformer2DModel):
        found["class_labels"] = chosen + 1
    if isinstance(model, UNet2DConditionModel):
        found["encoder_hidden_states"] = torch.randn(2, 5, 12, generator=random).to(dtype)[chosen]
        if model.config.addition_embed_type is not None:
            texts, times = torch.randn(2, 10, generator=random).to(dtype), torch.arange(12).view(2, 6)
            found["added_cond_kwargs"] = {"text_embeds": texts[chosen], "time_ids": times[chosen].to(dtype)}
    return found


def part(parameter: Tensor, form: str, random: torch.Generator) -> Part | None:
    """A difference of a tenth of the parameter's size."""
    scale = 0.1 * float(parameter.detach().square().mean().sqrt())

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=random, dtype=torch.float64)

    if form == "low-rank" and parameter.dim() > 1:
        rank = 1 + int(torch.randint(3, (), generator=random))
        return LowRank(scale * rank**-0.5 * normal(parameter.shape[0], rank), normal(rank, *parameter.shape[1:]))
    return None if form == "absent" else Dense(scale * normal(*parameter.shape))


def some_delta(model: nn.Module, forms: Sequence[str], seed: int) -> Delta:
    """Differences in one of the forms for each parameter, in turn at random."""
    random = torch.Generator().manual_seed(seed)
    parts = {}
    for name, parameter in model.named_parameters():
        found = part(parameter, forms[int(torch.randint(len(forms), (), generator=random))], random)
        if found is not None:
            parts[name] = found
    return Delta(parts)


def exact(model: nn.Module, delta: Delta | None) -> nn.Module:
    """The counterfactual in float64."""
    other = copy.deepcopy(model).double()
    with torch.no_grad():
        for name, found in (delta.parts if delta is not None else {}).items():
            parameter = other.get_parameter(name)
            parameter.copy_(found.added_to(parameter, torch.float64))
    return other


class Case:
    """A network, four deltas, and rows; the exact prediction of each row by its own model."""

    def __init__(self, network: str, forms: Sequence[str], models: Sequence[int] = MODELS) -> None:
        self.base = randomised(NETWORKS[network])
        self.deltas = [some_delta(self.base, forms, seed) for seed in range(4)]
        self.models, self.samples, self.conditions = models, SAMPLES[: len(models)], CONDITIONS[: len(models)]
        self.timestep = torch.tensor([TIMES[sample] for sample in self.samples], dtype=torch.int64)
        x = torch.randn(3, self.base.config.in_channels, 8, 8, generator=torch.Generator().manual_seed(1))
        self.x = x.double()[self.samples]
        self.rows = RowModels(models, self.samples, self.timestep, self.conditions)

    def bank(self, dtype: torch.dtype = torch.float64, fused: bool = False, channels_last: bool = False) -> DeltaBank:
        base = fuse(copy.deepcopy(self.base)) if fused else self.base
        bank = DeltaBank.load(base, {f"g{k}": delta for k, delta in enumerate(self.deltas)})
        memory_format = torch.channels_last if channels_last else torch.contiguous_format
        return bank.to(dtype=dtype, memory_format=memory_format)

    def inputs(self, dtype: torch.dtype, channels_last: bool) -> tuple[Tensor, Tensor, Mapping[str, Any]]:
        memory_format = torch.channels_last if channels_last else torch.contiguous_format
        x = self.x.to(dtype).contiguous(memory_format=memory_format)
        return x, self.timestep, conditions(self.base, self.conditions, dtype)

    def expected(self, dtype: torch.dtype = torch.float64) -> Tensor:
        """Row by row, with inputs of a dtype and everything else in float64."""
        networks = [exact(self.base, delta) for delta in (None, *self.deltas)]
        x, timestep, given = self.inputs(dtype, False)
        given = mapped(lambda tensor: tensor.double() if tensor.is_floating_point() else tensor, given)
        rows = []
        with torch.no_grad():
            for r, number in enumerate(self.models):
                own = mapped(lambda tensor, r=r: tensor[r : r + 1], given)
                rows.append(networks[number](x[r : r + 1].double(), timestep[r : r + 1], **own, return_dict=False)[0])
        return torch.cat(rows)

    def found(self, batched: BatchedModel, dtype: torch.dtype, channels_last: bool) -> Tensor:
        x, timestep, given = self.inputs(dtype, channels_last)
        return batched(x, timestep, self.rows, **given)


def mapped(change: Callable[[Tensor], Tensor], given: Any) -> Any:
    if isinstance(given, Mapping):
        return {name: mapped(change, value) for name, value in given.items()}
    return change(given)


def size(values: Tensor) -> float:
    return float(values.abs().max())


def rms(values: Tensor) -> float:
    return float(values.double().square().mean().sqrt())


def as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Layers go through the delta ops wherever those can compute them."""
    takes = StackedLayer.takes
    monkeypatch.setattr(StackedLayer, "takes", lambda module, forms, _: takes(module, forms, torch.device("cuda")))


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize(
    ("fused", "stacked", "forms"),
    [
        (False, False, ["absent", "dense", "low-rank"]),
        (True, False, ["absent", "dense", "low-rank"]),
        (False, True, ["absent", "low-rank"]),
        (True, True, ["absent", "dense"]),
    ],
)
def test_every_row_is_that_of_its_own_model(
    monkeypatch: pytest.MonkeyPatch, network: str, fused: bool, stacked: bool, forms: list[str]
) -> None:
    if stacked:
        as_on_a_gpu(monkeypatch)
    case = Case(network, forms)
    expected = case.expected()
    assert size(case.found(base_alone(case), torch.float64, False) - expected) > 1e-2 * size(expected)
    for channels_last in (False, True):
        bank = case.bank(fused=fused, channels_last=channels_last)
        before = state(bank.model)
        batched = BatchedModel(bank, example=case.inputs(torch.float64, channels_last))
        found = case.found(batched, torch.float64, channels_last)
        # Some 60 layers, each of which loses a few units; networks compute time embeddings and such in float32, from
        # the same bits.
        assert size(found - expected) <= 1e-12 * size(expected)
        assert torch.equal(case.found(batched, torch.float64, channels_last), found)
        unchanged(bank.model, before)
        kinds = {type(layer) for layer in batched._skeleton.layers.values()}
        assert (StackedLayer in kinds) == stacked
        assert batched.bytes > 0


def base_alone(case: Case) -> BatchedModel:
    """All rows by the base: what a batched model that ignores its deltas would give."""
    bank = DeltaBank.load(case.base, {f"g{k}": Delta({}) for k in range(4)}, allow_identical=True)
    return BatchedModel(bank, example=case.inputs(torch.float64, False))


def state(model: nn.Module) -> Any:
    """All that a batched model might change: values, types, and what modules have."""
    tensors = {name: (id(tensor), tensor.clone()) for name, tensor in model.state_dict(keep_vars=True).items()}
    return tensors, {name: (type(module), set(vars(module))) for name, module in model.named_modules()}


def unchanged(model: nn.Module, before: Any) -> None:
    tensors, modules = before
    now = state(model)
    assert now[1] == modules
    assert now[0].keys() == tensors.keys()
    assert all(now[0][name][0] == number for name, (number, _) in tensors.items())
    assert all(torch.equal(now[0][name][1], value) for name, (_, value) in tensors.items())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


@pytest.mark.parametrize("models", [[1] * 4, [0], [3, 2, 1, 0], [4, 0, 4]])
def test_any_models_in_any_order(models: list[int]) -> None:
    case = Case("prompts", ["absent", "dense", "low-rank"], models)
    batched = BatchedModel(case.bank(), example=Case("prompts", ["dense"]).inputs(torch.float64, False))
    found = case.found(batched, torch.float64, False)
    assert found.shape == case.x.shape
    expected = case.expected()
    assert size(found - expected) <= 1e-12 * size(expected)


@pytest.mark.parametrize("forms", [["dense"], ["low-rank"], ["absent", "dense", "low-rank"]])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("network", ["attention", "prompts, added", "transformer"])
def test_rounding_is_that_of_separate_models(network: str, dtype: torch.dtype, forms: list[str]) -> None:
    case = Case(network, forms)
    bank = case.bank(dtype, fused=True, channels_last=True)
    expected = case.expected(dtype)
    batched = BatchedModel(bank, example=case.inputs(dtype, True))
    found = case.found(batched, dtype, True)
    assert found.dtype == dtype
    x, timestep, given = case.inputs(dtype, True)
    rival = torch.empty_like(found)
    with torch.no_grad():
        for number in set(case.models):
            mine = [r for r, model in enumerate(case.models) if model == number]
            model = bank.model if number == 0 else bank.apply(number - 1)
            own = mapped(lambda tensor, mine=mine: tensor[mine], given)
            rival[mine] = model(x[mine], timestep[mine], **own, return_dict=False)[0]
            bank.restore()
    # Twice the error of the same models run one by one, as for the ops.
    assert rms(found - expected) <= 2 * rms(rival - expected)


def test_low_rank_deltas_below_a_unit_of_the_weight_are_kept_in_bfloat16() -> None:
    """Merging rounds them away."""
    base = randomised(unet).float()
    weight = base.get_parameter("conv_in.weight")
    with torch.no_grad():
        # Sums to zero over constant images, but for what the delta adds.
        weight.copy_(torch.tensor([0.1] * 13 + [-0.1] * 13 + [0.0]).view(1, 3, 3, 3))
    tiny = Delta({"conv_in.weight": LowRank(torch.full((8, 1), 1e-5), torch.ones(1, 3, 3, 3))})
    dense = Delta({"conv_in.weight": Dense(torch.full((8, 3, 3, 3), 0.5))})
    for deltas in ({"tiny": tiny}, {"tiny": tiny, "dense": dense}):
        bank = DeltaBank.load(base, deltas).to(dtype=torch.bfloat16)
        changed: list[Tensor] = []
        batched = BatchedModel(bank)
        leaf = batched._skeleton.model.get_submodule("conv_in")
        leaf.register_forward_hook(lambda _module, _args, out, changed=changed: changed.append(out[1] - out[0]))
        batched(torch.full((2, 3, 8, 8), 1e4).bfloat16(), torch.tensor([3, 3]), RowModels([0, 1], [0, 0], [3, 3]))
        # 27 products of 1e4 and 1e-5, rounded to eight bits a few times; merged one of them would be left.
        torch.testing.assert_close(changed[0][:, 1:-1, 1:-1].float(), torch.full((8, 6, 6), 2.7), rtol=0.02, atol=0)


@pytest.mark.slow
@pytest.mark.parametrize(("network", "every"), [("prompts, added", 16), ("transformer", 4)])
def test_a_delta_in_any_single_tensor_is_seen_or_refused(network: str, every: int) -> None:
    case = Case(network, ["dense"], models=[0, 1])
    names = [name for name, _ in case.base.named_parameters()][::every]
    names += [name for name, buffer in case.base.named_buffers() if buffer.is_floating_point()]
    random = torch.Generator().manual_seed(7)
    tensors = {**dict(case.base.named_parameters()), **dict(case.base.named_buffers())}
    deltas = {
        name: Delta({name: Dense(0.1 * torch.randn(tensors[name].shape, generator=random, dtype=torch.float64))})
        for name in names
    }
    bank = DeltaBank.load(case.base, deltas)
    x, timestep, given = case.inputs(torch.float64, False)
    x, timestep = x[[0, 0]], timestep[[0, 0]]
    given = mapped(lambda tensor: tensor[[0, 0]], given)
    refused = {}
    for name in names:
        try:
            batched = BatchedModel(bank, [name], example=(x, timestep, given))
        except BatchedUnavailableError as error:
            refused[name] = str(error)
            continue
        found = batched(x, timestep, RowModels([0, 1], [0, 0], [5, 5], [0, 0]), **given)
        with torch.no_grad():
            base = bank.model(x[:1], timestep[:1], **mapped(lambda tensor: tensor[:1], given), return_dict=False)[0]
            with bank.applied(name) as model:
                own = model(x[:1], timestep[:1], **mapped(lambda tensor: tensor[:1], given), return_dict=False)[0]
        expected = torch.cat([base, own])
        assert size(found - expected) <= 1e-12 * size(expected), name
        # Layers of whose results only the mean over a row remains: biases of keys, which softmax cancels.
        assert size(own - base) > 1e-6 * size(base) or name.endswith("to_k.bias"), name
    assert list(refused) == (["pos_embed.pos_embed"] if network == "transformer" else [])
    assert all(repr(name) in message for name, message in refused.items())
