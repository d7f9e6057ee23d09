"""Ground floor of the project: files, jobs, statistics and weights that every package shares.

`pathcore` imports none of the other packages, so that everything may build on it.
"""
