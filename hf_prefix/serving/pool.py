"""Thousands of saved prefixes on one base model, of which those used last are on its device."""

from collections import OrderedDict
from collections.abc import Iterable
from typing import Literal

import torch
from peft import PeftModel
from torch import nn

from hf_prefix.attached_tensors import attached_tensors, saved_name
from hf_prefix.attention.rows import WITHOUT_PREFIX
from hf_prefix.errors import PrefixError
from hf_prefix.model import PrefixModel
from hf_prefix.prefix.encoders import version_of
from hf_prefix.serving.adapter_files import AdapterFiles
from hf_prefix.sharing.checkpoint import SAVED_PREFIX
from hf_prefix.sharing.saved_prefix import read_config

Residency = Literal["device", "memory", "disk"]


class PrefixPool:
    """Keeps saved prefixes where they are needed: on the model, in memory, or on disk only.

    A prefix on the device is an ordinary adapter of the model: its name is valid in `set_adapter` and in
    `adapter_names`. When others need its place, the one that was asked for longest ago moves to memory, and from there
    to disk. One that is active, or that was changed (by training, say), never moves. Prefixes of the pool may differ
    in length, and adapters that the model has besides are left alone.

    The time and memory of one prefix do not depend on how many there are. In memory and on the device it takes its
    parameters, in float32: 4 x tokens x kv_heads x (key_size + value_size) bytes per attention module. The pool itself
    is for one thread at a time.

    Args:
        model: A `PeftModel` with at least one prefix.
        on_device: How many prefixes of the pool are attached to the model at most.
        in_memory: How many more are kept in CPU memory at most.

    Raises:
        PrefixError: The model carries no prefix, or a size is impossible.
    """

    def __init__(self, model: nn.Module, on_device: int = 64, in_memory: int = 1000) -> None:
        self._tuner = _tuner_of(model)
        self._capacity = _checked_size("on_device", on_device, 1)
        self._in_memory_at_most = _checked_size("in_memory", in_memory, 0)
        self._sources: dict[str, str] = {}
        # The one that was used last is at the end. On the device: what its tensors were when it was attached.
        self._device: OrderedDict[str, list[tuple[int, int]]] = OrderedDict()
        self._memory: OrderedDict[str, AdapterFiles] = OrderedDict()

    def register(self, name: str, source: str) -> None:
        """Make a saved prefix known by a name. Its configuration is checked; its weights are not read yet.

        Args:
            name: Its name: not empty, without dots, and none that the model uses already.
            source: Folder or Hub id.

        Raises:
            PrefixError: The name cannot be used, or there is no prefix at the source.
            PrefixMismatchError: It is for another model.
            UnsupportedModelError: The model cannot carry it.
        """
        self._check_name(name)
        source = str(source)
        self._tuner.check_saved(read_config(source))
        self._sources[name] = source

    def ready(self, names: Iterable[str]) -> list[str]:
        """Bring prefixes onto the device, all at once, and return their names, for `adapter_names`.

        Nothing moves unless all of them can be read and have room together. Weights that do not fit the model are
        found when their turn comes: those before them are on the device then, and others have left.

        Args:
            names: Names of registered prefixes, one per row say; repeated ones count once, and `"__base__"`, a row
                without a prefix, not at all.

        Raises:
            PrefixError: A name is unknown, or more are asked for than have room beside those that must stay.
            PrefixMismatchError: The weights of one do not fit the model, or are damaged.
        """
        rows = list(names)
        wanted = [name for name in dict.fromkeys(rows) if name != WITHOUT_PREFIX]
        for name in wanted:
            self._source(name)
        if len(wanted) > self._capacity:
            raise PrefixError(
                f"{len(wanted)} different prefixes are asked for at once, but on_device={self._capacity}; ask for "
                "fewer rows at a time, or make the pool larger."
            )
        self._forget_deleted()
        missing = [name for name in wanted if name not in self._device]
        leaving = self._leaving(len(self._device) + len(missing) - self._capacity, wanted)
        # Read before anything moves, so that a folder that is gone changes nothing.
        arriving = {name: self._memory.get(name) or AdapterFiles.read(self._source(name)) for name in missing}
        for name in leaving:
            self._leave_device(name)
        for name, prefix in arriving.items():
            self._enter_device(name, prefix)
        for name in wanted:
            self._device.move_to_end(name)
        return rows

    def residency(self, name: str) -> Residency:
        """Return where a prefix is: "device", "memory" or "disk".

        Raises:
            PrefixError: The name is unknown.
        """
        self._source(name)
        self._forget_deleted()
        if name in self._device:
            return "device"
        return "memory" if name in self._memory else "disk"

    def bytes(self, name: str) -> int:
        """Return how many bytes the tensors of a prefix take; of one on disk only, what they will take.

        Raises:
            PrefixError: The name is unknown, or its folder is gone.
        """
        if self.residency(name) == "device":
            return sum(tensor.nbytes for tensor in attached_tensors(self._tuner.model, name).values())
        return (self._memory.get(name) or AdapterFiles.read(self._source(name))).size

    def forget(self, name: str) -> None:
        """Take a prefix out of the pool and off the model, also one that was changed; its folder stays.

        Raises:
            PrefixError: The name is unknown, or it is active.
        """
        if self.residency(name) == "device":
            self._tuner.detach_inactive(name)
            del self._device[name]
        self._memory.pop(name, None)
        del self._sources[name]

    def __len__(self) -> int:
        return len(self._sources)

    def __contains__(self, name: object) -> bool:
        return name in self._sources

    def _source(self, name: str) -> str:
        if name not in self._sources:
            raise PrefixError(f"The pool has no prefix named {name!r}; register(name, folder) makes one known.")
        return self._sources[name]

    def _check_name(self, name: str) -> None:
        if not _can_be_name(name):
            raise PrefixError(
                f"A prefix cannot be named {name!r}: a name is not empty, has no dots, and is neither "
                f"{WITHOUT_PREFIX!r} nor an attribute of torch's ModuleDict."
            )
        if name in self._sources or name in self._tuner.peft_config:
            raise PrefixError(
                f"There is an adapter named {name!r} already; forget(name) it first, or choose another name."
            )

    def _leaving(self, count: int, wanted: list[str]) -> list[str]:
        """Return as many prefixes as have to leave the device: of those that may, the ones used longest ago."""
        if count <= 0:
            return []
        leaving, staying = [], []
        for name in self._device:
            if name in wanted:
                continue
            reason = self._reason_to_stay(name)
            if reason is None:
                leaving.append(name)
            else:
                staying.append(f"{name!r} {reason}")
            if len(leaving) == count:
                return leaving
        raise PrefixError(
            f"on_device={self._capacity} leaves no room for {len(wanted)} prefixes beside those that must stay: "
            f"{', '.join(staying)}. Activate another adapter with model.set_adapter; keep what was learned with "
            "model.save_pretrained(folder, selected_adapters=[name]), then forget(name) and register it anew; or make "
            "the pool larger."
        )

    def _reason_to_stay(self, name: str) -> str | None:
        if name in self._tuner.active_adapters:
            return "is active"
        return "was changed since it was loaded" if self._is_changed(name) else None

    def _is_changed(self, name: str) -> bool:
        tensors = attached_tensors(self._tuner.model, name)
        if [version_of(tensor) for tensor in tensors.values()] == self._device[name]:
            return False
        # The model may only have been moved or cast.
        saved = AdapterFiles.read(self._source(name)).tensors
        return any(
            (known := saved.get(_file_name(place, name))) is None or not torch.equal(known.to(tensor), tensor)
            for place, tensor in tensors.items()
        )

    def _enter_device(self, name: str, prefix: AdapterFiles) -> None:
        self._tuner.attach_saved(name, prefix.config, prefix.tensors)
        self._memory.pop(name, None)
        tensors = attached_tensors(self._tuner.model, name)
        self._device[name] = [version_of(tensor) for tensor in tensors.values()]

    def _leave_device(self, name: str) -> None:
        tensors = {
            _file_name(place, name): tensor.detach().cpu()
            for place, tensor in attached_tensors(self._tuner.model, name).items()
        }
        config = self._tuner.peft_config[name]
        self._tuner.detach_inactive(name)
        del self._device[name]
        self._memory[name] = AdapterFiles(self._source(name), config, tensors)
        if len(self._memory) > self._in_memory_at_most:
            self._memory.popitem(last=False)

    def _forget_deleted(self) -> None:
        """Take note of prefixes that were deleted from the model behind the pool's back."""
        for name in [name for name in self._device if name not in self._tuner.peft_config]:
            del self._device[name]


def _tuner_of(model: nn.Module) -> PrefixModel:
    # A compiled model hides the one that it was made of.
    whole = getattr(model, "_orig_mod", model)
    tuner = whole.base_model if isinstance(whole, PeftModel) else None
    if not isinstance(tuner, PrefixModel):
        raise PrefixError(
            f"A pool needs a PeftModel that carries a prefix, got {type(whole).__name__}; make one with "
            "get_peft_model(model, PrefixConfig(...)) or PeftModel.from_pretrained(model, folder)."
        )
    return tuner


def _can_be_name(name: object) -> bool:
    # PyTorch allows no others for modules, and PEFT reserves one.
    if not isinstance(name, str) or name in ("", WITHOUT_PREFIX):
        return False
    return "." not in name and not hasattr(nn.ModuleDict(), name)


def _file_name(place: str, adapter_name: str) -> str:
    return SAVED_PREFIX + saved_name(place, adapter_name)


def _checked_size(option: str, size: int, least: int) -> int:
    if isinstance(size, bool) or not isinstance(size, int) or size < least:
        raise PrefixError(f"{option} must be a whole number of at least {least}, got {size!r}.")
    return size
