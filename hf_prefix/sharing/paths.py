"""Tells names that everyone can use from places on one machine, which must not be shared."""

import json
import re
from dataclasses import dataclass
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

_HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")


@dataclass(frozen=True)
class NamedBase:
    """A base model as others can know it.

    Args:
        given: What `from_pretrained` was given; None: unknown.
        revision: The branch, tag or commit that was asked for.
        commit: The commit that its weights are of.
    """

    given: str | None
    revision: str | None
    commit: str | None

    @property
    def hub_name(self) -> str | None:
        """Its name on the Hub; None where it has none."""
        return self.given if self.given and is_on_the_hub(self.given) else None

    @property
    def shown(self) -> str:
        """A name without folders."""
        return self.hub_name or (last_part(self.given) if self.given else "unnamed-base-model")

    def line(self, gguf_file: str | None) -> str:
        """Return in Markdown which model it is.

        Args:
            gguf_file: Which of its files was trained on.
        """
        if self.given is None or not self.given:
            return "not recorded: the model had no name when the prefix was attached"
        if self.hub_name is None:
            place = ", a local folder when the prefix was saved; only its name is given here"
        else:
            place = f", revision `{self.revision}`" if self.revision else ""
            place += f", commit `{self.commit}`" if self.commit else ""
        return f"`{self.shown}`{place}" + (f", trained on its file `{gguf_file}`" if gguf_file else "")

    def load_arguments(self) -> str:
        """Return the arguments of `from_pretrained` as Python code."""
        revision = (self.revision or self.commit) if self.hub_name else None
        return json.dumps(self.shown) + (f", revision={json.dumps(revision)}" if revision else "")


def is_on_the_hub(name: str) -> bool:
    """Whether a base model's name can be one of the Hub: `name` or `owner/name`, and no folder that exists here.

    Args:
        name: What `from_pretrained` was given.
    """
    return _HUB_NAME.fullmatch(name) is not None and not name.startswith(".") and not Path(name).is_dir()


def last_part(name: str) -> str:
    """Return the name of a folder or file without the folders that it is in.

    Args:
        name: A path of any system.
    """
    return PureWindowsPath(name).name or "?"


def without_folders(value: Any) -> Any:
    """Return a JSON value whose strings that are absolute paths are cut to their last part.

    Args:
        value: The value.
    """
    if isinstance(value, dict):
        return {name: without_folders(one) for name, one in value.items()}
    if isinstance(value, list):
        return [without_folders(one) for one in value]
    return last_part(value) if isinstance(value, str) and _is_absolute(value) else value


def _is_absolute(text: str) -> bool:
    return text.startswith("~") or PurePosixPath(text).is_absolute() or PureWindowsPath(text).is_absolute()
