"""Delta packs: what goes in comes out, one group at a time."""

from __future__ import annotations

import copy
import os
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from guda_fast import DeltaBank, Pack, Source, append_pack, build_pack
from guda_fast.deltas import Delta, Dense, LowRank
from guda_fast.deltas.survey import survey
from guda_fast.errors import CheckpointError
from pack_cases import Net, assert_same_models, changed, deltas, edit, factors, net, normal
from tiny import perturbed, tiny_unet


@pytest.fixture
def base() -> Net:
    return net()


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """base/, and the counterfactuals a/, b/ (whose output layer is the base's) and half/ (saved in float16)."""
    folder = tmp_path_factory.mktemp("models")
    base = tiny_unet()
    base.save_pretrained(folder / "base")
    perturbed(base).save_pretrained(folder / "a")
    b = perturbed(base, seed=2)
    b.conv_out = copy.deepcopy(base.conv_out)
    b.save_pretrained(folder / "b")
    perturbed(base, seed=3).half().save_pretrained(folder / "half")
    return folder


@pytest.mark.parametrize("dtype", ["float32", "stored"])
@pytest.mark.parametrize("rank", ["off", "auto"])
def test_a_pack_gives_the_models_of_its_sources_bit_for_bit(
    folders: Path, tmp_path: Path, dtype: str, rank: str
) -> None:
    """Whose differences have full rank, so that looking for factors changes nothing."""
    sources = {group: folders / group for group in ("a", "b", "half")}
    pack = build_pack(folders / "base", sources, tmp_path / "bank.safetensors", dtype=dtype, rank=rank)
    expected = DeltaBank.load(folders / "base", sources)
    bank = DeltaBank.load(folders / "base", tmp_path / "bank.safetensors")
    assert bank.groups == pack.groups == ("a", "b", "half")
    assert bank.hash == expected.hash
    assert all(pack[group].rounding.relative_error == 0 for group in pack.groups)
    for how in ({}, {"dtype": torch.bfloat16, "memory_format": torch.channels_last}, {"dtype": torch.float64}):
        assert_same_models(bank.to(**how), expected.to(**how))
    before = DeltaBank.load(folders / "base", {"a": folders / "a"}).model.state_dict()
    for name, tensor in bank.to(dtype=torch.float32).restore().state_dict().items():
        assert torch.equal(tensor, before[name])


def test_surveys_come_from_the_header_and_are_those_of_the_values(
    folders: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sources = {group: folders / group for group in ("a", "half")}
    for dtype in ("float32", "float16"):
        pack = build_pack(folders / "base", sources, tmp_path / dtype, dtype=dtype)
        bank = DeltaBank.load(folders / "base", pack)
        for group, delta in zip(bank.groups, bank.deltas, strict=True):
            again = survey(bank.survey(group).origin, sorted(delta.parts.items()), bank.theta_0)
            assert bank.survey(group) == again
            assert delta.hash == again.hash == bank.delta_hashes[group]
    monkeypatch.setattr(os, "preadv", None)
    assert DeltaBank.load(tiny_unet(), tmp_path / "float32").survey().keys() == sources.keys()


def test_parts_of_every_form(base: Net, tmp_path: Path) -> None:
    given = deltas()
    pack = build_pack(base, given, tmp_path / "bank", dtype="float32")
    expected = DeltaBank.load(base, given)
    assert pack.groups == tuple(given)
    for group, delta in given.items():
        parts = dict(pack.parts(group))
        assert parts.keys() == delta.parts.keys() and list(parts) == sorted(parts)
        for name, part in delta.parts.items():
            for (role, found), (wanted_role, wanted) in zip(parts[name].tensors(), part.tensors(), strict=True):
                assert role == wanted_role and torch.equal(found, wanted)
        assert pack[group].survey.hash == expected.delta_hashes[group] == pack.delta(group).hash
        pack.verify(group)
    assert pack["rank 1"].survey.kind == "mixed" and pack["rank 1"].ranks == {"conv.weight": 1}
    assert pack["rank 2"].survey.kind == "low-rank" and pack["dense"].survey.kind == "dense"
    assert pack["dense"].survey.bytes == expected.survey("dense").bytes
    assert pack["rank 1"].survey.values == expected.survey("rank 1").values
    assert_same_models(DeltaBank.load(base, pack), expected)


def test_stacks_can_be_read_by_others(base: Net, tmp_path: Path) -> None:
    """It is a safetensors file with one tensor for each parameter and form, over the groups that have it."""
    given = deltas()
    build_pack(base, given, tmp_path / "bank")
    tensors = safetensors.torch.load_file(tmp_path / "bank")
    dense = torch.stack([given[group].parts["conv.weight"].value for group in ("dense", "also dense")])
    assert torch.equal(tensors["conv.weight:dense.float32"], dense)
    up = torch.stack([given[group].parts["conv.weight"].up for group in ("rank 2", "again")])
    assert torch.equal(tensors["conv.weight:up.2.float32"], up)
    assert tensors["scale:dense.float32"].shape == (1,)


def test_applying_a_group_reads_its_bytes_and_no_others(
    base: Net, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    build_pack(base, deltas(), tmp_path / "bank")
    read: list[int] = []
    preadv = os.preadv

    def counted(descriptor: int, buffers: list[memoryview], offset: int) -> int:
        read.append(preadv(descriptor, buffers, offset))
        return read[-1]

    monkeypatch.setattr(os, "preadv", counted)
    bank = DeltaBank.load(base, tmp_path / "bank")
    bank.survey()
    assert read == []
    bank.apply("rank 1")
    assert sorted(read) == sorted([4 * 8 * 1, 4 * 1 * 27, 4 * 6])
    assert sum(read) == bank.survey("rank 1").bytes


def test_a_row_that_is_read_in_pieces(base: Net, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pack = build_pack(base, deltas(), tmp_path / "bank")
    preadv = os.preadv
    monkeypatch.setattr(os, "preadv", lambda file, buffers, start: preadv(file, [buffers[0][:13]], start))
    pack.verify("also dense")


def test_half_precision_states_its_rounding(base: Net, tmp_path: Path) -> None:
    given = {"dense": Delta({"conv.weight": Dense(normal(8, 3, 3, 3))}), "rank 2": Delta({"conv.weight": factors()})}
    pack = build_pack(base, given, tmp_path / "bank", dtype="float16")
    for group, delta in given.items():
        true = delta.parts["conv.weight"].full((8, 3, 3, 3)).double().flatten()
        part = dict(pack.parts(group))["conv.weight"]
        found = part.full((8, 3, 3, 3)).double().flatten()
        assert part.dtype == torch.float32
        for _, tensor in part.tensors():
            assert torch.equal(tensor, tensor.half().float())
        error, rounding = float((found - true).norm() / true.norm()), pack[group].rounding
        assert rounding.relative_error == pytest.approx(error, rel=1e-9)
        assert rounding.cosine == pytest.approx(float(found @ true / found.norm() / true.norm()), abs=1e-12)
        # Half a unit in the last of 11 bits, of a value or of each of two factors.
        assert 0 < error < (2**-11 if group == "dense" else 2**-10)
    size = (tmp_path / "bank").stat().st_size
    build_pack(base, given, tmp_path / "wide")
    values = 2 * (8 * 27 + 8 * 2 + 2 * 27)
    assert abs((tmp_path / "wide").stat().st_size - size - values) <= 128  # but for the length of the header


def test_stored_is_the_narrowest_dtype_that_loses_nothing(base: Net, tmp_path: Path) -> None:
    half = LowRank(normal(8, 2).half().float(), normal(2, 3, 3, 3).half().float())
    brain = Dense(normal(6).bfloat16().float() * 2.0**-40)
    given = Delta(
        {
            "conv.weight": half,
            "linear.bias": brain,
            "norm.weight": Dense(normal(8)),
            "norm.bias": Dense(normal(8).double() / 3),
        }
    )
    pack = build_pack(base, {"g": given}, tmp_path / "bank", dtype="stored")
    keys = safetensors.torch.load_file(tmp_path / "bank").keys()
    assert keys == {
        "conv.weight:up.2.float16",
        "conv.weight:down.2.float16",
        "linear.bias:dense.bfloat16",
        "norm.weight:dense.float32",
        "norm.bias:dense.float64",
    }
    assert pack.delta("g").hash == DeltaBank.load(base, {"g": given}).delta_hashes["g"]
    narrow = build_pack(base, {"g": given}, tmp_path / "narrow")
    assert dict(narrow.parts("g"))["norm.bias"].dtype == torch.float32
    assert 0 < narrow["g"].rounding.relative_error < 2**-24


def test_values_that_half_precision_cannot_hold(base: Net, tmp_path: Path) -> None:
    large = Delta({"linear.bias": Dense(torch.full((6,), 1e5))})
    with pytest.raises(CheckpointError, match=r"counterfactuals\['g'\]: key 'linear.bias' must .* float16 can hold"):
        build_pack(base, {"g": large}, tmp_path / "bank", dtype="float16")
    small = Delta({"linear.bias": Dense(torch.full((6,), 1e-9))})
    with pytest.raises(CheckpointError, match=r"counterfactuals\['g'\]: float16 keeps nothing of it"):
        build_pack(base, {"g": small}, tmp_path / "bank", dtype="float16")
    assert list(tmp_path.iterdir()) == []
    both = Delta({**small.parts, "conv.weight": factors()})
    pack = build_pack(base, {"g": both}, tmp_path / "bank", dtype="float16")
    assert pack["g"].survey.support == {"conv.weight": "low-rank"}


def test_factors_of_dense_differences_are_found_on_request(folders: Path, tmp_path: Path) -> None:
    """A merged adapter, in a layer where it has its rank, and in one that it does not touch."""
    base = tiny_unet()
    merged = copy.deepcopy(base)
    weight = merged.get_parameter("mid_block.attentions.0.to_q.weight")
    with torch.no_grad():
        weight += normal(16, 2) @ normal(2, 16, seed=1)
    dense = build_pack(base, {"g": merged}, tmp_path / "dense")
    pack = build_pack(base, {"g": merged}, tmp_path / "bank", rank="auto", tolerance=1e-3)
    assert dense["g"].survey.kind == "dense" and dense["g"].survey.attention_only
    assert pack["g"].survey.kind == "low-rank" and pack["g"].ranks == {"mid_block.attentions.0.to_q.weight": 2}
    assert 0 < pack["g"].rounding.relative_error <= 1e-3
    assert pack.settings == (("float32", "auto", 1e-3),)
    for name, tensor in DeltaBank.load(base, pack).apply("g").state_dict().items():
        torch.testing.assert_close(tensor, merged.state_dict()[name], rtol=0, atol=1e-3 * float(normal(16, 2).norm()))


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["down_blocks.1.attentions.0.to_q.weight", "mid_block.attentions.0.to_out.0.bias"], True),
        (["down_blocks.0.attentions.1.transformer_blocks.0.attn2.to_k.weight"], True),
        (["transformer_blocks.0.attn.norm_added_q.weight"], True),
        (["down_blocks.0.attentions.1.transformer_blocks.0.ff.net.2.weight"], False),
        (["down_blocks.0.attentions.1.proj_in.weight"], False),
        (["mid_block.attentions.0.to_q.weight", "conv_in.weight"], False),
        (["attnorm.weight"], False),
        ([], False),
    ],
)
def test_attention_only(names: list[str], expected: bool) -> None:
    from guda_fast.deltas import Survey

    assert Survey("x", dict.fromkeys(names, "dense"), "", 0, 0, 0.0, {}).attention_only is expected


def test_another_base_is_refused(base: Net, tmp_path: Path) -> None:
    pack = build_pack(base, deltas(), tmp_path / "bank")
    message = f"^{tmp_path / 'bank'}: key 'base.hash' must be that of the base, .* found {pack.base_hash}"
    with pytest.raises(CheckpointError, match=message):
        DeltaBank.load(changed(base, "scale", 1e-6), tmp_path / "bank")
    # The same values in another dtype and layout are the same base.
    moved = DeltaBank.load(base, pack).to(dtype=torch.bfloat16, memory_format=torch.channels_last)
    assert moved.weights_hash == pack.base_hash


def test_what_a_group_came_from_is_kept(folders: Path, tmp_path: Path) -> None:
    pack = build_pack(folders / "base", {"a": folders / "a"}, tmp_path / "bank")
    assert pack.base_origin == str(folders / "base")
    group = pack["a"]
    assert group.origin == str(folders / "a" / "diffusion_pytorch_model.safetensors")
    assert {Path(source.path).name for source in group.sources} == {
        "config.json",
        "diffusion_pytorch_model.safetensors",
    }
    for source in group.sources:
        assert Path(source.path).stat().st_size == source.bytes and len(source.hash) == 32
    assert len({source.hash for source in group.sources}) == 2


def test_a_pack_of_one_group_is_a_source_like_others(base: Net, tmp_path: Path) -> None:
    given = deltas()
    build_pack(base, {"x": given["rank 1"]}, tmp_path / "one")
    build_pack(base, given, tmp_path / "all")
    bank = DeltaBank.load(base, {"mine": tmp_path / "one", "dense": given["dense"], "s": Source(tmp_path / "one")})
    assert bank.groups == ("mine", "dense", "s")
    assert bank.delta_hashes["mine"] == DeltaBank.load(base, {"x": given["rank 1"]}).delta_hashes["x"]
    with pytest.raises(CheckpointError, match=r"all: must hold one group to be counterfactuals\['g'\], found 5"):
        DeltaBank.load(base, {"g": tmp_path / "all"})
    pack = Pack.open(tmp_path / "one")
    ways = {
        "named": Source(tmp_path / "one", format="pack"),
        "object": pack,
        "source of an object": Source(pack, format="pack"),
        "called": lambda: tmp_path / "one",
        "called for an object": Source(lambda: pack),
    }
    assert set(DeltaBank.load(base, ways).delta_hashes.values()) == {pack["x"].survey.hash}


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"scale": -3.0}, "must be a LoRA for scale=-3, found format 'pack'"),
        ({"weights": "ema"}, "must have a moving average for weights='ema', found format 'pack'"),
        ({"variant": "fp16"}, "must be a diffusers folder for variant='fp16', found 'pack'"),
        ({"format": "lora"}, "must be of format 'lora', found 'pack'"),
    ],
)
def test_a_pack_leaves_no_choices(base: Net, tmp_path: Path, how: dict[str, Any], message: str) -> None:
    pack = build_pack(base, {"x": deltas()["rank 1"]}, tmp_path / "one")
    for what in (pack.path, pack, lambda: pack.path):
        with pytest.raises(CheckpointError, match=f"^{pack.path}: {message}"):
            DeltaBank.load(base, {"g": Source(what, **how)})


def test_what_is_asked_for_as_a_pack_must_be_one(base: Net) -> None:
    with pytest.raises(CheckpointError, match="must be of format 'pack', found 'state_dict'"):
        DeltaBank.load(base, {"g": Source(changed(base, "scale", 1.0), format="pack")})


def test_a_base_of_another_configuration_is_refused(tmp_path: Path) -> None:
    """Whose weights are the same; a setting that a pack does not know must have its default."""
    base = tiny_unet()
    pack = build_pack(base, {"g": perturbed(base)}, tmp_path / "bank")
    for key, value in (("norm_num_groups", 2), ("sample_size", 64), ("flip_sin_to_cos", False)):
        other = type(base)(**{k: v for k, v in base.config.items() if not k.startswith("_")} | {key: value})
        other.load_state_dict(base.state_dict())
        with pytest.raises(CheckpointError, match=f"^{pack.path}: key 'base.config': '{key}' must be {value} as in"):
            DeltaBank.load(other, pack)
        with pytest.raises(CheckpointError, match="key 'base.config'"):
            append_pack(pack.path, {"h": Delta({"conv_in.bias": Dense(normal(*base.conv_in.bias.shape))})}, base=other)
    edit(pack.path, lambda header: header["base"]["config"].pop("flip_sin_to_cos"))
    DeltaBank.load(base, pack.path)
    with pytest.raises(CheckpointError, match="'flip_sin_to_cos' must be False as in the base, found True"):
        DeltaBank.load(other, pack.path)
    edit(pack.path, lambda header: header["base"].pop("config"))
    DeltaBank.load(other, pack.path)


def test_repacking_keeps_what_is_known_of_the_sources(folders: Path, tmp_path: Path) -> None:
    half = build_pack(folders / "base", {"a": folders / "a"}, tmp_path / "half", dtype="float16")
    wide = build_pack(folders / "base", {"b": half.path}, tmp_path / "wide")
    assert half["a"].rounding.relative_error > 0
    for field in ("origin", "sources", "rounding"):
        assert getattr(wide["b"], field) == getattr(half["a"], field)
