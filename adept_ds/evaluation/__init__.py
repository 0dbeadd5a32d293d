"""Decoding, scoring, and what follows from scores."""
