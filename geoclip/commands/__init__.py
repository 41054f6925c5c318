"""The commands of `python -m geoclip`, one module each with `parser()` and `run(options)`."""
