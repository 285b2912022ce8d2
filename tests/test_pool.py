"""PrefixPool: which prefixes are on the model, in memory or on disk, and that each stays what it is."""

import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor

from adapters import GPT2, LLAMA, attach, edited_weights, hook_count, logits, one_step, prefix_config
from families import build
from hf_prefix import PrefixError, PrefixFileError, PrefixMismatchError, PrefixPool, hotswap_prefix
from hf_prefix.serving.adapter_files import AdapterFiles

USERS = ["ann", "bob", "cid", "dan", "eve"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A saved prefix of each user, each of another length."""
    root = tmp_path_factory.mktemp("users")
    for index, user in enumerate(USERS):
        attach(prefix_init_seed=index + 1, num_virtual_tokens=index + 2).save_pretrained(root / user)
    return {user: str(root / user) for user in USERS}


@pytest.fixture(scope="module")
def wanted(folders: dict[str, str]) -> dict[str, Tensor]:
    """The logits of each user's prefix alone."""
    return {user: logits(PeftModel.from_pretrained(build(LLAMA), folder).eval()) for user, folder in folders.items()}


def pool_of(folders: dict[str, str], model: PeftModel | None = None, **sizes: int) -> tuple[PeftModel, PrefixPool]:
    """Return a model whose own prefix is none of the users', and a pool on it."""
    model = model or attach(prefix_init_seed=77)
    pool = PrefixPool(model, **sizes)
    for user, folder in folders.items():
        pool.register(user, folder)
    return model, pool


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The users whose weights were read from disk."""
    read: list[str] = []
    original = AdapterFiles.read
    monkeypatch.setattr(AdapterFiles, "read", lambda source: read.append(Path(source).name) or original(source))
    return read


def test_those_used_last_stay(folders: dict[str, str], wanted: dict[str, Tensor], reads: list[str]) -> None:
    model, pool = pool_of(folders, on_device=2, in_memory=1)
    own, hooks = logits(model), hook_count(model)
    assert not reads
    assert [pool.residency(user) for user in USERS] == ["disk"] * 5
    assert pool.ready(["bob", "ann", "bob"]) == ["bob", "ann", "bob"]
    assert [pool.residency(user) for user in USERS] == ["device", "device", "disk", "disk", "disk"]
    pool.ready(["bob"])
    pool.ready(["cid"])
    assert [pool.residency(user) for user in USERS] == ["memory", "device", "device", "disk", "disk"]
    pool.ready(["dan"])
    assert [pool.residency(user) for user in USERS] == ["disk", "memory", "device", "device", "disk"]
    assert reads == ["bob", "ann", "cid", "dan"]
    pool.ready(["bob"])
    assert reads == ["bob", "ann", "cid", "dan"]
    pool.ready(["ann"])
    assert reads == ["bob", "ann", "cid", "dan", "ann"]
    assert set(model.peft_config) == {"default", "ann", "bob"}
    assert model.active_adapter == "default"
    assert torch.equal(logits(model), own)
    assert hook_count(model) == hooks
    for user in [*USERS, *reversed(USERS)]:
        pool.ready([user])
        model.set_adapter(user)
        assert torch.equal(logits(model), wanted[user])
        model.set_adapter("default")
    assert torch.equal(logits(model), own)


def test_a_batch_of_rows_of_several_users(folders: dict[str, str], wanted: dict[str, Tensor]) -> None:
    model, pool = pool_of(folders, on_device=2)
    for pair in (["ann", "eve"], ["bob", "eve"], ["ann", "__base__"]):
        mixed = logits(model, adapter_names=pool.ready(pair))
        for row, user in enumerate(pair):
            alone = logits(build(LLAMA)) if user == "__base__" else wanted[user]
            torch.testing.assert_close(mixed[row], alone[row], atol=2e-5, rtol=0)
    with pytest.raises(PrefixError, match="Row 0 asks for the prefix 'dan'"):
        logits(model, adapter_names=["dan", "ann"])


def test_nothing_of_those_that_left_is_in_the_model(folders: dict[str, str]) -> None:
    model, pool = pool_of(folders, on_device=1, in_memory=0)
    before = list(model.state_dict())
    pool.ready(["ann"])
    assert len(model.state_dict()) == len(before) + 4
    pool.ready(["bob"])
    assert pool.residency("ann") == "disk"
    assert {name.split(".")[-2] for name in model.state_dict() if name not in before} == {"bob"}
    pool.forget("bob")
    assert list(model.state_dict()) == before
    assert "bob" not in pool
    assert "ann" in pool
    assert len(pool) == 4
    with pytest.raises(PrefixError, match="no prefix named 'bob'"):
        pool.residency("bob")


def test_it_says_how_many_bytes_a_prefix_takes(folders: dict[str, str]) -> None:
    model, pool = pool_of(folders, on_device=1)
    heads, size = 2, 8
    expected = 2 * 2 * heads * size * 3 * 4
    assert pool.bytes("bob") == expected
    pool.ready(["bob"])
    assert pool.bytes("bob") == expected
    pool.ready(["ann"])
    assert (pool.residency("bob"), pool.bytes("bob")) == ("memory", expected)
    held = sum(p.nbytes for name, p in model.named_parameters() if ".ann." in name)
    assert pool.bytes("ann") == held == expected * 2 // 3


def test_nothing_moves_where_not_all_have_room(folders: dict[str, str]) -> None:
    _, pool = pool_of(folders, on_device=2)
    pool.ready(["ann"])
    with pytest.raises(PrefixError, match=r"3 different prefixes are asked for at once, but on_device=2"):
        pool.ready(["bob", "cid", "dan", "bob"])
    with pytest.raises(PrefixError, match=r"no prefix named 'zoe'; register\(name, folder\)"):
        pool.ready(["bob", "zoe"])
    assert [pool.residency(user) for user in USERS] == ["device", "disk", "disk", "disk", "disk"]
    assert pool.ready(["__base__", "ann", "bob"]) == ["__base__", "ann", "bob"]


def test_a_folder_that_is_gone_or_damaged(folders: dict[str, str], tmp_path: Path) -> None:
    lost, damaged = (shutil.copytree(folders["ann"], tmp_path / name) for name in ("lost", "damaged"))
    model, pool = pool_of(folders, on_device=1)
    pool.register("lost", str(lost))
    pool.register("damaged", str(damaged))
    pool.ready(["ann"])
    (lost / "adapter_model.safetensors").unlink()
    with pytest.raises(PrefixFileError, match="holds a configuration, but no adapter_model"):
        pool.ready(["lost"])
    assert pool.residency("ann") == "device"
    with edited_weights(damaged) as weights:
        weights[sorted(weights)[0]][0, 0, 0] = float("nan")
    with pytest.raises(PrefixMismatchError, match="no finite numbers"):
        pool.ready(["damaged"])
    assert pool.residency("damaged") == "disk"
    assert set(model.peft_config) <= {"default", "ann"}
    pool.ready(["ann"])


def test_an_active_prefix_is_not_pulled_away(folders: dict[str, str], wanted: dict[str, Tensor]) -> None:
    model, pool = pool_of(folders, on_device=2)
    pool.ready(["ann"])
    model.set_adapter("ann", inference_mode=True)
    pool.ready(["bob"])
    pool.ready(["cid"])
    assert [pool.residency(user) for user in USERS] == ["device", "memory", "device", "disk", "disk"]
    with pytest.raises(PrefixError, match=r"on_device=2 leaves no room for 2 prefixes .*: 'ann' is active\. Activate"):
        pool.ready(["bob", "cid"])
    with pytest.raises(PrefixError, match="'ann' is active"):
        pool.forget("ann")
    assert torch.equal(logits(model), wanted["ann"])


def test_what_was_learned_is_not_thrown_away(folders: dict[str, str], tmp_path: Path) -> None:
    model, pool = pool_of(folders, on_device=1)
    pool.ready(["ann"])
    model.set_adapter("ann")
    one_step(model)
    learned = logits(model)
    model.set_adapter("default")
    with pytest.raises(PrefixError, match=r"'ann' was changed since it was loaded\. .*save_pretrained"):
        pool.ready(["bob"])
    model.save_pretrained(tmp_path, selected_adapters=["ann"])
    pool.forget("ann")
    pool.register("ann", str(tmp_path / "ann"))
    pool.ready(["bob"])
    pool.ready(["ann"])
    model.set_adapter("ann")
    assert torch.equal(logits(model), learned)
    model.set_adapter("default")
    hotswap_prefix(model, folders["ann"], adapter_name="ann")
    with pytest.raises(PrefixError, match="'ann' was changed since it was loaded"):
        pool.ready(["bob"])


def test_a_cast_or_a_visit_to_training_mode_is_no_change(folders: dict[str, str]) -> None:
    model, pool = pool_of(folders, on_device=1)
    pool.ready(["ann"])
    model.set_adapter("ann")
    model.train()
    model.set_adapter("default")
    model.to(torch.bfloat16)
    pool.ready(["bob"])
    assert pool.residency("ann") == "memory"


def test_a_prefix_that_was_deleted_from_the_model_comes_back(
    folders: dict[str, str], wanted: dict[str, Tensor]
) -> None:
    model, pool = pool_of(folders, on_device=2)
    pool.ready(["ann"])
    model.delete_adapter("ann")
    assert pool.residency("ann") == "disk"
    pool.ready(["ann"])
    model.set_adapter("ann")
    assert torch.equal(logits(model), wanted["ann"])


def test_prefixes_with_a_projection_share_nothing(tmp_path: Path) -> None:
    folders = {}
    for index, user in enumerate(["ann", "bob"]):
        folders[user] = str(tmp_path / f"checkpoint-{index}")
        attach(projection=True, prefix_init_seed=index).save_pretrained(folders[user])
    model, pool = pool_of(folders, on_device=1)
    for user in ("ann", "bob", "ann"):
        pool.ready([user])
        model.set_adapter(user)
        assert torch.equal(logits(model), logits(PeftModel.from_pretrained(build(LLAMA), folders[user]).eval()))
        model.set_adapter("default")


@pytest.mark.parametrize("name", ["", "a.b", "__base__", "keys", "default", "ann", 7])
def test_names_that_cannot_be_used(folders: dict[str, str], name: Any) -> None:
    _, pool = pool_of({"ann": folders["ann"]})
    with pytest.raises(PrefixError, match=r"cannot be named|There is an adapter named"):
        pool.register(name, folders["bob"])
    assert len(pool) == 1


def test_what_cannot_be_registered(folders: dict[str, str], tmp_path: Path) -> None:
    _, pool = pool_of({})
    attach(GPT2).save_pretrained(tmp_path / "gpt2")
    with pytest.raises(PrefixMismatchError, match="The saved prefix is for another model"):
        pool.register("gpt2", str(tmp_path / "gpt2"))
    lora = get_peft_model(build(LLAMA), LoraConfig(target_modules=["q_proj"]))
    lora.save_pretrained(tmp_path / "lora")
    with pytest.raises(PrefixError, match="not a prefix"):
        pool.register("lora", str(tmp_path / "lora"))
    whole = get_peft_model(build(LLAMA), prefix_config(modules_to_save=["lm_head"]))
    whole.save_pretrained(tmp_path / "whole")
    with pytest.raises(PrefixError, match=re.escape("modules_to_save=['lm_head'] changes more than the prefix")):
        pool.register("whole", str(tmp_path / "whole"))
    assert len(pool) == 0
    with pytest.raises(PrefixError, match="A pool needs a PeftModel that carries a prefix, got PeftModel"):
        PrefixPool(lora)
    with pytest.raises(PrefixError, match="got LlamaForCausalLM"):
        PrefixPool(build(LLAMA))
    with pytest.raises(PrefixError, match="on_device must be a whole number of at least 1, got 0"):
        PrefixPool(attach(), on_device=0)
    with pytest.raises(PrefixError, match="in_memory must be a whole number of at least 0, got -1"):
        PrefixPool(attach(), in_memory=-1)
