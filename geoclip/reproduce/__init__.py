"""Running and accepting the notebooks, and reporting their results."""
