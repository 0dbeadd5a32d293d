"""The part of the sandbox that runs inside the isolation, beside the untrusted program.

Started as `python -s -S -B -P -c ...` with this folder's parent as the only extra import path, so nothing here imports
anything but the standard library, and nothing here ever sees an expected value.
"""
