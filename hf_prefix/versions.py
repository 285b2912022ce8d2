"""Versions of the packages that a result depends on."""

import importlib.metadata

_PACKAGES = ("hf_prefix", "peft", "transformers", "torch")


def package_versions() -> dict[str, str]:
    """Return the versions of the packages that a result depends on, by name; those not installed are left out."""
    known = {name: _version(name) for name in _PACKAGES}
    return {name: version for name, version in known.items() if version is not None}


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None
