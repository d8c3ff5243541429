"""Data sets and input pipelines: NumPy in, NumPy out, nothing here imports jax.

`load_dataset` prepares a data set once (TFDS, array_record) and gives random access to its records;
`train_batches` and `eval_batches` turn a split into batches (Grain, threads).
"""

from pwcrf_jax.data.pipeline import check_sizes, eval_batches, train_batches
from pwcrf_jax.data.prepare import DATASETS, Dataset, load_dataset
from pwcrf_jax.data.readers.image_io import VOID, DataError

__all__ = ["DATASETS", "VOID", "DataError", "Dataset", "check_sizes", "eval_batches", "load_dataset", "train_batches"]
