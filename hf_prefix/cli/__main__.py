"""`python -m hf_prefix.cli` is the same as `hf-prefix`."""

from hf_prefix.cli import main

main()
