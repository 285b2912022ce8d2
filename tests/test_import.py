"""Importing the package registers the method with PEFT, changes nothing else, and stays light."""

import json
import subprocess
import sys

import pytest

SNAPSHOT = """
import json, logging, os, sys, threading, warnings
import peft

modules = set(sys.modules)
import peft.mapping as mapping
import torch, transformers
from transformers import PreTrainedModel, cache_utils, masking_utils
from transformers.generation import GenerationMixin
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

CLASSES = [torch.nn.Module, PreTrainedModel, GenerationMixin, peft.PeftModel, peft.PeftConfig, torch.Tensor]
CLASSES += [item for item in vars(cache_utils).values() if isinstance(item, type)]
TABLES = [name for name in dir(mapping) if name.isupper() and isinstance(getattr(mapping, name), dict)]

def loggers():
    named = {name: logging.getLogger(name) for name in list(logging.root.manager.loggerDict)}
    return {name: (logger.level, len(logger.handlers)) for name, logger in (named | {"": logging.root}).items()}

def snapshot():
    return {
        "attention functions": {name: id(item) for name, item in ALL_ATTENTION_FUNCTIONS.items()},
        "mask functions": {name: id(item) for name, item in masking_utils.ALL_MASK_ATTENTION_FUNCTIONS.items()},
        "classes": {str(c): {name: id(item) for name, item in vars(c).items()} for c in CLASSES},
        "peft tables": {name: {str(k): str(v) for k, v in getattr(mapping, name).items()} for name in TABLES},
        "peft types": sorted(item.value for item in peft.PeftType),
        "transformers": {name: id(item) for name, item in vars(transformers).items() if callable(item)},
        "environment": dict(os.environ),
        "warnings": [str(entry) for entry in warnings.filters],
        "hooks": [len(getattr(torch.nn.modules.module, name)) for name in dir(torch.nn.modules.module)
                  if name.startswith("_global") and hasattr(getattr(torch.nn.modules.module, name), "__len__")],
        "torch": [str(torch.get_default_dtype()), torch.get_num_threads(), torch.is_grad_enabled(),
                  torch.initial_seed(), torch.get_rng_state().tolist()],
        "path": list(sys.path),
        "excepthook": id(sys.excepthook),
        "threads": threading.active_count(),
    }

before, levels = snapshot(), loggers()
import hf_prefix
after = snapshot()
# transformers looks its names up when they are first used, so there may be more of them, but none may differ.
after["transformers"] = {name: after["transformers"].get(name) for name in before["transformers"]}
changed = {name: [before[name], after[name]] for name in before if before[name] != after[name]}
new_levels = {name: level for name, level in loggers().items() if levels.get(name, level) != level}
print(json.dumps({"changed": changed, "levels": new_levels, "modules": sorted(set(sys.modules) - modules)}))
"""


@pytest.fixture(scope="module")
def effects() -> dict[str, object]:
    """What one import of the package changes in a fresh process."""
    result = subprocess.run([sys.executable, "-c", SNAPSHOT], check=True, capture_output=True, text=True)
    return json.loads(result.stdout)


def test_import_changes_only_the_method_tables_of_peft(effects: dict[str, object]) -> None:
    assert set(effects["changed"]) == {"peft tables"}
    before, after = effects["changed"]["peft tables"]
    added = {
        table: {name: entry for name, entry in after[table].items() if name not in before[table]} for table in after
    }
    assert {table for table in added if added[table]} == {
        "PEFT_TYPE_TO_CONFIG_MAPPING",
        "PEFT_TYPE_TO_PREFIX_MAPPING",
        "PEFT_TYPE_TO_TUNER_MAPPING",
    }
    for table, entries in before.items():
        assert {name: after[table][name] for name in entries} == entries
        assert list(added[table]) in ([], ["PrefixPeftType.HF_PREFIX"])
    assert effects["levels"] == {}


def test_import_loads_nothing_heavy(effects: dict[str, object]) -> None:
    """Everything that `import hf_prefix` needs beyond its own modules, `import peft` has loaded already."""
    assert {name for name in effects["modules"] if name.partition(".")[0] != "hf_prefix"} == set()
    own = {".".join(name.split(".")[:2]) for name in effects["modules"]}
    assert not own & {"hf_prefix.cli", "hf_prefix.demo", "hf_prefix.metrics", "hf_prefix.tasks", "hf_prefix.training"}


def test_registering_again_changes_nothing() -> None:
    from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING

    from hf_prefix import PrefixModel
    from hf_prefix.peft_type import PrefixPeftType
    from hf_prefix.registration import register_with_peft

    before = dict(PEFT_TYPE_TO_TUNER_MAPPING)
    register_with_peft()
    assert before == PEFT_TYPE_TO_TUNER_MAPPING
    assert PEFT_TYPE_TO_TUNER_MAPPING[PrefixPeftType.HF_PREFIX] is PrefixModel


def test_public_names_exist() -> None:
    import hf_prefix

    assert all(hasattr(hf_prefix, name) for name in hf_prefix.__all__)
    assert hf_prefix.__all__ == sorted(hf_prefix.__all__)


def test_errors_are_value_errors_with_one_base() -> None:
    import hf_prefix

    errors = [getattr(hf_prefix, name) for name in hf_prefix.__all__ if name.endswith("Error")]
    assert all(issubclass(error, hf_prefix.PrefixError) for error in errors)
    assert issubclass(hf_prefix.PrefixError, ValueError)
