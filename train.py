"""Trains a model: the same as `pwcrf train`, from a clone that is not installed.

python train.py --config configs/demo.py --workdir runs/demo
python train.py --help
"""

from pwcrf_jax.cli.main import main

if __name__ == "__main__":
    main("train")
