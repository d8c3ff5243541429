"""Scores a trained run: the same as `pwcrf eval`, from a clone that is not installed.

python eval.py --workdir runs/demo
python eval.py --help
"""

from pwcrf_jax.cli.main import main

if __name__ == "__main__":
    main("eval")
