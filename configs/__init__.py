"""Configuration files: each has a `get_config()`; `default.py` holds every key."""
