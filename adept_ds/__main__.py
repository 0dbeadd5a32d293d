"""`python -m adept_ds`, which is `adept-ds` where the command is not on the PATH."""

from adept_ds.cli.main import run

run()
