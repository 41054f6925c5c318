"""nbval runs the notebooks in the environment in which `make reproduce` runs them."""

import os

from geoclip import notebooks

os.environ.update(notebooks.environment())
