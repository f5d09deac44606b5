"""Compiles a config for TPUs without one, and reports what the program holds and costs."""
