"""Settings of a run: declared, loaded, checked, and what follows from them."""
