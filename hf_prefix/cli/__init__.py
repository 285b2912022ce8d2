"""The `hf-prefix` command line."""

import sys

_EXTRA = ("typer", "rich", "sacrebleu", "matplotlib")


def main() -> None:
    """Run the command line; the entry point of the console script `hf-prefix`."""
    try:
        from hf_prefix.cli.app import app
    except ModuleNotFoundError as error:
        if error.name not in _EXTRA:
            raise
        sys.exit(f"Error: hf-prefix needs the package {error.name!r}; install it with: pip install 'hf_prefix[cli]'")
    app()
