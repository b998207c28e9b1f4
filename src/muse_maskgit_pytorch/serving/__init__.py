"""A model for many clients at once: the engine, and HTTP in front of it."""
