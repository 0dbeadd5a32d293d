"""What leaves the toolkit: adapters in the forms that other programs load."""
