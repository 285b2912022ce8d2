"""Saved prefixes that are damaged in every way that comes to mind, and what becomes of loading them.

    python tests/fuzz_loader.py --inputs 10000

Each input is a saved prefix with its weights, its configuration, or both changed at random. It must be refused with
an error of hf_prefix, or load bit for bit what was saved. Whatever else happens is a failure: another error, a hang, a
file opened for writing outside of the folder, a process started, anything unpickled, or a model left with a part of a
prefix.
"""

import argparse
import contextlib
import copy
import json
import os
import pickle
import random
import re
import signal
import struct
import sys
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from hf_prefix import PrefixConfig, PrefixError, PrefixNotLoadedError

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"

SECONDS = 10
"""After which an input counts as a hang."""

NASTY: list[Any] = [
    None, True, False, 0, 1, -1, 3, 7, 2**31, 2**63, 2**64, -(2**63), 10**30, 0.5, -0.0, 1e300, "", "a", "x" * 5000,
    "../../../etc/passwd", "/etc/passwd", "..\\..\\x", "\x00", "(a+)+$", ".*", "[", "F32", "I64", "F8_E4M3", "BF16",
    "decoder", "encoder", "self_attn", "HF_PREFIX", "LORA", "org/other", [], [0], [-1], [2**62], [2**62, 2**62],
    [0, 0], [0, 96], ["decoder"], ["self_attn"], [[[]]], {}, {"a": 1}, {"dtype": "F32"}, {"": {}},
]  # fmt: skip
"""Values that stand in for others in JSON."""


_NEVER = ("pickle.find_class", "subprocess.Popen", "os.system", "os.exec", "os.fork", "socket.connect")
_CHANGES = ("os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.link", "os.symlink")
"""Events of the interpreter that must not come at all, and those that must not come for other folders."""


class Touched:
    """What was done outside of the folder while a prefix was loaded; an audit hook of the interpreter tells it."""

    def __init__(self) -> None:
        self.folder: Path | None = None
        self.found: list[str] = []
        sys.addaudithook(self._hear)

    def _hear(self, event: str, arguments: tuple[Any, ...]) -> None:
        if self.folder is None:
            return
        if event in _NEVER:
            self.found.append(f"{event} {arguments}"[:200])
        elif event in _CHANGES or (event == "open" and _writes(arguments[2])):
            path = arguments[0]
            inside = isinstance(path, str | os.PathLike) and Path(path).resolve().is_relative_to(self.folder)
            if not inside and path != os.devnull:
                self.found.append(f"{event} {path}"[:200])


def _writes(flags: Any) -> bool:
    return isinstance(flags, int) and bool(flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT))


class Loader:
    """Loads changed copies of one saved prefix on one small base model.

    Args:
        folder: Where the copies are written.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._base = base_model()
        self._names = [name for name, _ in self._base.named_modules()]
        self._touched = Touched()
        original = get_peft_model(base_model(), PrefixConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"))
        original.save_pretrained(folder)
        self._saved = prefix_tensors(original)
        self.files = {name: (folder / name).read_bytes() for name in (WEIGHTS, CONFIG)}

    def outcome(self, files: dict[str, bytes]) -> str:
        """Load a folder of these files and return what became of it, the name of an error or "loaded".

        Raises:
            AssertionError: It is nothing that may become of it.
        """
        for name in os.listdir(self._folder):
            (self._folder / name).unlink()
        for name, content in files.items():
            (self._folder / name).write_bytes(content)
        with self._watched():
            refused = self._refused(PrefixConfig.from_pretrained)
            if _method(files[CONFIG]) not in (None, "HF_PREFIX"):
                assert refused is not None, "another method was taken for ours"
                return f"{refused} (another method's, PEFT's to load)"
            outcome = self._refused(lambda folder: PeftModel.from_pretrained(self._base, folder), before_us=refused)
        if outcome is None:
            return self._check_loaded(files)
        if [name for name, _ in self._base.named_modules()] != self._names:
            self._check_unusable()
        return outcome

    def _refused(self, load: Callable[[str], Any], before_us: str | None = None) -> str | None:
        """Return the name of the error by which loading is refused, or None where it is not."""
        try:
            load(str(self._folder))
        except PrefixError as error:
            return type(error).__name__
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            # PEFT reads the configuration first, to find whose it is; our class would have refused it.
            if before_us is None:
                raise AssertionError(f"{type(error).__name__}: {error}") from error
            return f"{before_us} (PEFT: {type(error).__name__})"
        assert before_us is None, f"{before_us} did not keep PEFT from loading"
        return None

    @contextlib.contextmanager
    def _watched(self) -> Iterator[None]:
        def hang(*_: Any) -> None:
            raise AssertionError(f"no end after {SECONDS} seconds")

        before = signal.signal(signal.SIGALRM, hang)
        signal.alarm(SECONDS)
        self._touched.folder, self._touched.found = self._folder.resolve(), []
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                yield
        finally:
            self._touched.folder = None
            signal.alarm(0)
            signal.signal(signal.SIGALRM, before)
        assert not self._touched.found, self._touched.found

    def _check_loaded(self, files: dict[str, bytes]) -> str:
        """Check that what was loaded is what was saved, or, in a folder without a digest, what the file holds."""
        found, outcome = prefix_tensors(self._base), "loaded"
        wanted = self._saved
        if b"weights_sha256" not in files[CONFIG] and files[WEIGHTS] != self.files[WEIGHTS]:
            stored, outcome = load(files[WEIGHTS]), "loaded, no digest"
            wanted = {name.removeprefix("base_model.model."): tensor for name, tensor in stored.items()}
            wanted = {re.sub(r"(key|value)$", r"default.\1", name): tensor for name, tensor in wanted.items()}
        self.renew()
        assert found.keys() == wanted.keys(), found.keys() ^ wanted.keys()
        assert all(torch.equal(tensor, wanted[name].float()) for name, tensor in found.items()), "other numbers"
        return outcome

    def _check_unusable(self) -> None:
        """Check that a prefix whose weights were refused after it was attached cannot be used."""
        model = self._base
        self.renew()
        try:
            model(input_ids=torch.tensor([[5, 6]]))
        except PrefixNotLoadedError:
            return
        raise AssertionError("a prefix that was refused can be used")

    def renew(self) -> None:
        """Go on with a new base model."""
        self._base = base_model()


def _method(config: bytes) -> Any:
    """Return the method of a configuration as PEFT reads it, or None."""
    try:
        return json.loads(config)["peft_type"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return None


def base_model() -> PreTrainedModel:
    """Return a model of one layer, always the same."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2, "num_hidden_layers": 1}
    return LlamaForCausalLM(LlamaConfig(vocab_size=32, **sizes)).eval()


def prefix_tensors(model: torch.nn.Module) -> dict[str, Tensor]:
    """Return the tensors of the prefix on a model, by the end of their names."""
    state = model.state_dict()
    return {name.removeprefix("base_model.model."): tensor for name, tensor in state.items() if "hf_prefix" in name}


# --- Changes ---------------------------------------------------------------------------------------------------


def flip_bits(content: bytes, draw: random.Random) -> bytes:
    """Flip one bit or some."""
    changed = bytearray(content)
    for _ in range(draw.choice((1, 1, 2, 8, 64)) if changed else 0):
        changed[draw.randrange(len(changed))] ^= 1 << draw.randrange(8)
    return bytes(changed)


def cut(content: bytes, draw: random.Random) -> bytes:
    """Leave out the end, the beginning, or something between."""
    first, second = sorted(draw.randrange(len(content) + 1) for _ in range(2))
    return draw.choice((content[:first], content[first:], content[:first] + content[second:]))


def insert(content: bytes, draw: random.Random) -> bytes:
    """Put something in."""
    place = draw.randrange(len(content) + 1)
    return content[:place] + draw.randbytes(draw.choice((1, 8, 100))) + content[place:]


def replace_all(_: bytes, draw: random.Random) -> bytes:
    """Put something else in its place: a pickle, another format, random bytes, nothing."""
    nested = b"[" * 100_000
    pickled = pickle.dumps({"a": print})
    others = (b"", b"{}", b"[]", b"null", b"\xff\xfe", b"PK\x03\x04", pickled, nested, struct.pack("<Q", 2) + b"{}")
    return draw.choice((*others, draw.randbytes(draw.choice((1, 7, 8, 9, 500)))))


def edit_json(text: bytes, draw: random.Random) -> bytes:
    """Change values of a JSON object, take them out, or add some."""
    edited = json.loads(text)
    for _ in range(draw.choice((1, 1, 1, 2, 4))):
        edit_one(edited, draw)
    return json.dumps(edited).encode()


def nasty(draw: random.Random) -> Any:
    """Return one of the values that stand in for others."""
    return copy.deepcopy(draw.choice(NASTY))


def edit_one(holder: Any, draw: random.Random) -> None:
    """Change one value of an object, or of something that it holds."""
    places = list(holder) if isinstance(holder, dict) else list(range(len(holder)))
    if not places:
        return
    place = draw.choice(places)
    if isinstance(holder[place], dict | list) and draw.random() < 0.7:
        edit_one(holder[place], draw)
        return
    kind = draw.randrange(4)
    if kind == 0 and isinstance(holder, dict):
        del holder[place]
    elif kind == 1 and isinstance(holder, dict):
        holder[
            draw.choice(["new", "../x", "a/b", "auto_mapping", "runtime_config", "allow_other_base", str(place) + "x"])
        ] = holder.pop(place) if draw.random() < 0.5 else nasty(draw)
    else:
        holder[place] = nasty(draw)


def edit_header(content: bytes, draw: random.Random) -> bytes:
    """Change the header of safetensors, and perhaps its length."""
    size = struct.unpack("<Q", content[:8])[0]
    header = edit_json(content[8 : 8 + size], draw)
    length = (
        len(header) if draw.random() < 0.8 else draw.choice((0, 1, 2**20, 2**32, 2**63, 2**64 - 1, len(header) + 1))
    )
    return struct.pack("<Q", length) + header + content[8 + size :]


def edit_numbers(content: bytes, draw: random.Random) -> bytes:
    """Change numbers, to infinity and NaN above all."""
    size = struct.unpack("<Q", content[:8])[0]
    changed = bytearray(content)
    place = 8 + size + 4 * draw.randrange((len(content) - 8 - size) // 4)
    number = draw.choice((float("nan"), float("inf"), float("-inf"), 0.0, 1e38, draw.random()))
    changed[place : place + 4] = struct.pack("<f", number)
    return bytes(changed)


def without_digest(config: bytes) -> bytes:
    """Take out the digest, as older folders have none, so that other checks are reached."""
    return json.dumps({key: value for key, value in json.loads(config).items() if key != "weights_sha256"}).encode()


RAW = (flip_bits, cut, insert, replace_all)


def changed(files: dict[str, bytes], draw: random.Random) -> dict[str, bytes]:
    """Return the files of a folder, some of them changed."""
    weights, config = files[WEIGHTS], files[CONFIG]
    which = draw.choice(("weights", "config", "both"))
    if which != "config":
        weights = draw.choice((*RAW, edit_header, edit_header, edit_header, edit_numbers))(weights, draw)
    if which != "weights":
        config = draw.choice((*RAW, edit_json, edit_json, edit_json, edit_json))(config, draw)
    result = {WEIGHTS: weights, CONFIG: config}
    if draw.random() < 0.3:
        with contextlib.suppress(ValueError, AttributeError, RecursionError):
            result[CONFIG] = without_digest(config)
    if draw.random() < 0.03:
        result["adapter_model.bin"] = result.pop(WEIGHTS)
    return result


def main() -> None:
    """Try as many inputs as are asked for and print what became of them."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--inputs", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    outcomes: Counter[str] = Counter()
    failures = 0
    with tempfile.TemporaryDirectory() as folder:
        loader = Loader(Path(folder))
        for number in range(options.inputs):
            seed = f"{options.seed}-{number}"
            try:
                draw = random.Random(seed)  # noqa: S311 - nothing secret
                outcomes[loader.outcome(changed(loader.files, draw))] += 1
            except Exception as error:
                failures += 1
                sys.stdout.write(f"FAILED {seed}: {type(error).__name__}: {str(error)[:300]}\n")
                loader.renew()
    for name, count in outcomes.most_common():
        sys.stdout.write(f"{count:>7}  {name}\n")
    sys.stdout.write(f"{failures:>7}  failures\n")
    sys.exit(bool(failures))


if __name__ == "__main__":
    main()
