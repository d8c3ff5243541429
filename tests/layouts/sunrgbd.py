"""SUNRGBD and SUNRGBDtoolbox: a folder an image, labels of all images in one .mat file of version 7.3."""

import shutil

import numpy as np
import scipy.io
from layouts.nyudv2 import cells, mat73
from PIL import Image

TRAIN = {  # folder -> name and size of the image
    "kv2/kinect2data/000065_2014-05-16_20-14-38_260595134347_rgbf000121-resize": ("0000121.jpg", (53, 73)),
    "kv1/NYUdata/NYU0003": ("NYU0003.jpg", (42, 56)),
    "xtion/sun3ddata/brown_bm_1/brown_bm_1/0000001-000000000000": ("0000001-000000000000.jpg", (48, 64)),
}
TEST = {
    "realsense/lg/2014_10_21-18_16_30-1311000073": ("0000063.jpg", (53, 68)),
    "kv1/b3dodata/img_0063": ("img_0063.jpg", (42, 56)),
}
ELSEWHERE = "/n/fs/sun3d/data/"


def make(root, rng, archives=False):
    """3 train and 2 test images. The order of the labels is neither that of the lists nor of the names."""
    folders = {**TRAIN, **TEST}
    order = [list(folders)[i] for i in (4, 1, 3, 0, 2)]
    labels = {}
    for folder, (name, (height, width)) in folders.items():
        path = root / "SUNRGBD" / folder / "image" / name
        path.parent.mkdir(parents=True)
        Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8)).save(path)
        labels[folder] = rng.integers(0, 38, (height, width)).astype(np.uint8)
        own = {"seglabel": np.ones((height, width), np.uint8), "names": np.array([["chair"]], object)}
        scipy.io.savemat(root / "SUNRGBD" / folder / "seg.mat", own)
    toolbox = root / "SUNRGBDtoolbox"
    for folder in ("traintestSUNRGBD", "Metadata"):
        (toolbox / folder).mkdir(parents=True)
    paths = [f"{ELSEWHERE}SUNRGBD/{folder}" for folder in folders]
    paths[1] += "/"  # as some are
    lists = {"alltrain": np.array([paths[:3]], object), "alltest": np.array([paths[3:]], object)}
    scipy.io.savemat(toolbox / "traintestSUNRGBD/allsplit.mat", lists)
    fields = ("sequenceName", "groundtruth3DBB", "rgbpath", "rgbname", "K", "valid")
    meta = np.zeros((1, len(order)), [(field, object) for field in fields])
    for i, folder in enumerate(order):
        name = folders[folder][0]
        rgb = f"{ELSEWHERE}SUNRGBD/{folder}/image/{name}"
        meta[0, i] = (f"SUNRGBD/{folder}", {"classname": "chair"}, rgb, name, np.eye(3), 1.0)
    scipy.io.savemat(toolbox / "Metadata/SUNRGBDMeta.mat", {"SUNRGBDMeta": meta})
    with mat73(toolbox / "Metadata/SUNRGBD2Dseg.mat") as file:
        file["SUNRGBD2Dseg/seglabel"] = cells(file, [labels[folder].T for folder in order])
        file["SUNRGBD2Dseg/seglabelall"] = cells(file, [labels[folder].T.astype(np.uint16) for folder in order])
    if archives:
        for name in ("SUNRGBD", "SUNRGBDtoolbox"):
            shutil.make_archive(str(root / name), "zip", root, name)
            shutil.rmtree(root / name)
    return {"train": len(TRAIN), "test": len(TEST)}
