"""Configuration files: each has a `get_config()`, which starts from that of `default.py`."""
