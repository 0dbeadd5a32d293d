"""The command line: one module a command, each with its flags and its `main`."""
