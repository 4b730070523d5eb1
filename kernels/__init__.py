"""Device code and the noise contract (NOISE.md) that all of it obeys."""
