"""`python -m service bench`: requests a second and latency of a model that is served, over HTTP."""
