"""Say where runs stand, as `adept-ds status` does.

    python launchers/status.py runs/llama3_8b

Everything is in `adept_ds.cli.status`.
"""

from adept_ds.cli.status import main
from adept_ds.entry_point import run_entry_point

if __name__ == "__main__":
    run_entry_point(main)
