"""`python -m pwcrf_jax COMMAND ...`: the same as `pwcrf COMMAND ...`."""

from pwcrf_jax.cli.main import main

if __name__ == "__main__":
    main()
