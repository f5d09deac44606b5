"""Attacks on real processes; each must end with the exit code that docs/usage.md gives it."""
