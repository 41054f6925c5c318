"""One module a subcommand of `python -m geoclip`: parser() and run(options)."""
