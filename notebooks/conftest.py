"""nbval runs the notebooks in the environment in which `make reproduce` runs them."""

import os

from geoclip.reproduce import notebooks

os.environ.update(notebooks.environment())
