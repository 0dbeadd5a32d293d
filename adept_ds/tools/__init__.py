"""What is done once: a model for the demo, adapters of other projects."""
