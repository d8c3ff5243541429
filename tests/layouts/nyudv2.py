"""nyu_depth_v2_labeled.mat (version 7.3), splits.mat and classMapping40.mat with four images of full size."""

import h5py
import numpy as np
import scipy.io

from pwcrf_jax.data.sets.nyudv2 import NyuDv2

MAPPING = (np.arange(894) * 7 % 40 + 1).astype(np.float64)  # class, 1..40, of labels 1..894


def mat73(path):
    """An HDF5 file as MATLAB writes it: behind 512 bytes of its own."""
    with h5py.File(path, "w", userblock_size=512):
        pass
    head = b"MATLAB 7.3 MAT-file, Platform: GLNXA64, Created on: Tue Jun  5 2012 HDF5 schema 1.00 ."
    with open(path, "r+b") as file:
        file.write(head.ljust(124) + b"\0\2IM")
    return h5py.File(path, "r+")


def cells(file, values):
    """References of a cell array [1, n], which lies in HDF5 as [n, 1]."""
    refs = file.require_group("#refs#")
    first = len(refs)
    out = np.empty((len(values), 1), h5py.ref_dtype)
    for i, value in enumerate(values):
        value = np.array([[ord(c)] for c in value], np.uint16) if isinstance(value, str) else value
        out[i, 0] = refs.create_dataset(f"x{first + i}", data=value).ref
    return out


def make(root, rng, archives=False):
    """2 train and 2 test images; there are no archives, the .mat files are what is downloaded."""
    del archives
    root.mkdir(parents=True, exist_ok=True)
    images = np.full((4, 3, 640, 480), 255, np.uint8)  # [image, channel, x, y], white border
    images[:, :, 40:600, 45:470] = rng.integers(0, 201, (4, 3, 560, 425), dtype=np.uint8)
    labels = np.zeros((4, 640, 480), np.uint16)
    labels[:, 40:600, 45:470] = rng.integers(0, 895, (4, 56, 85)).repeat(10, 1).repeat(5, 2)
    with mat73(root / "nyu_depth_v2_labeled.mat") as file:
        file.create_dataset("images", data=images, chunks=(1, 3, 640, 480), compression="gzip", compression_opts=1)
        file.create_dataset("labels", data=labels, chunks=(1, 640, 480), compression="gzip", compression_opts=1)
        file["names"] = cells(file, [f"thing {i}" for i in range(894)]).T
    splits = {"trainNdxs": np.array([[3.0], [4.0]]), "testNdxs": np.array([[1.0], [2.0]])}
    scipy.io.savemat(root / "splits.mat", splits)
    names = {
        "allClassName": np.array([[f"thing {i}" for i in range(894)]], object),
        "className": np.array([NyuDv2.class_names], object),
        "mapClass": MAPPING[None],
    }
    scipy.io.savemat(root / "classMapping40.mat", names)
    return {"train": 2, "test": 2}
