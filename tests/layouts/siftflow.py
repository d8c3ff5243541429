"""SiftFlowDataset: images of 256 x 256, label files of MATLAB 5, TestSet1.txt as Windows wrote it."""

import shutil

import numpy as np
import scipy.io
from PIL import Image

from pwcrf_jax.data.sets.siftflow import SiftFlow

SCENES = "spatial_envelope_256x256_static_8outdoorcategories"
TRAIN = ("coast_n1", "forest_bost2", "highway_bost181")  # the last was never annotated
TEST = ("street_par4", "mountain_sharp5")


def make(root, rng, archives=False):
    """3 train and 2 test images; `archives`: the zip instead, which has no folder around its contents."""
    for folder in ("Images", "SemanticLabels"):
        (root / folder / SCENES).mkdir(parents=True)
    for name in TRAIN + TEST:
        pixels = rng.integers(0, 256, (32, 32, 3), dtype=np.uint8).repeat(8, 0).repeat(8, 1)
        Image.fromarray(pixels).save(root / "Images" / SCENES / f"{name}.jpg")
        labels = rng.integers(0, 34, (32, 64)).repeat(8, 0).repeat(4, 1).astype(np.uint8)
        names = np.array(SiftFlow.class_names, object)[:, None]
        content = {"S": labels * (name != "highway_bost181"), "names": names}
        scipy.io.savemat(root / "SemanticLabels" / SCENES / f"{name}.mat", content, do_compression=True)
    (root / "TestSet1.txt").write_bytes("".join(f"{SCENES}\\{name}.jpg\r\n" for name in TEST).encode())
    if archives:
        zipped = shutil.make_archive(str(root.parent / "SiftFlowDataset"), "zip", root)
        shutil.rmtree(root)
        root.mkdir()
        shutil.move(zipped, root)
    return {"train": len(TRAIN), "test": len(TEST)}
