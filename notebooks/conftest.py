"""nbval runs the notebooks in the environment in which `make reproduce` runs them."""

import os

from geoclip.reproduce import notebooks

collect_ignore = ["try"]  # a page with widgets, whose outputs are not kept; tests/test_try.py runs it
os.environ.update(notebooks.environment())
