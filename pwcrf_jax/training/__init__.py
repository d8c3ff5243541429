"""Training and evaluation: the only place with optax, orbax and pmap."""
