"""`python -m adept_ds.import_adapter`, the command's documented address; see `adept_ds.tools.import_adapter`."""

from adept_ds.entry_point import run_entry_point
from adept_ds.tools.import_adapter import main

if __name__ == "__main__":
    run_entry_point(main)
