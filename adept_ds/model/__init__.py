"""A backbone with a method on it, and its loss."""
