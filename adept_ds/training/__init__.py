"""From settings to a tuned adapter: the recipe, the loop, the engine, sweeps."""
