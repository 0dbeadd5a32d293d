"""Write an adapter in the form that other programs load, as `adept-ds export` does.

    python launchers/export.py --adapter runs/my/best --to folded --out exports/my

Everything is in `adept_ds.cli.export`.
"""

from adept_ds.cli.export import main
from adept_ds.entry_point import run_entry_point

if __name__ == "__main__":
    run_entry_point(main)
