"""Oxford-IIIT Pet as TFDS prepares it in array_record, and the archives it is prepared from."""

import pathlib
import tarfile
import tempfile

import numpy as np
import tensorflow_datasets
from PIL import Image

OPTIONS = dict(dataset="oxford_iiit_pet", label_key="segmentation_mask", label_offset=-1, num_classes=3)
NAMES = {"trainval": ("Abyssinian_1", "Bengal_2", "pug_3"), "test": ("basset_hound_4", "Sphynx_5")}
XML = """<annotation><size><width>96</width><height>64</height><depth>3</depth></size><object><name>cat</name>
<bndbox><xmin>9</xmin><ymin>8</ymin><xmax>50</xmax><ymax>40</ymax></bndbox></object></annotation>"""


def make(root: pathlib.Path, rng: np.random.Generator, archives: bool = False) -> dict[str, int]:
    """The folder oxford_iiit_pet/4.0.0, by TFDS' own code; with archives the same: there is none of a prepared set."""
    del archives
    with tempfile.TemporaryDirectory() as downloads:
        write_downloads(pathlib.Path(downloads), rng)
        prepare(pathlib.Path(downloads), root)
    return {"train": 3, "test": 2}


def write_downloads(root, rng, names=NAMES):
    """What images.tar.gz and annotations.tar.gz unpack to."""
    for folder in ("images", "annotations/trimaps", "annotations/xmls"):
        (root / folder).mkdir(parents=True)
    lines = {}
    for split, members in names.items():
        for number, name in enumerate(members, 1):
            image = rng.integers(0, 256, (64, 96, 3), dtype=np.uint8)
            Image.fromarray(image).save(root / f"images/{name}.jpg", quality=95)
            Image.fromarray(rng.integers(1, 4, (64, 96), dtype=np.uint8)).save(root / f"annotations/trimaps/{name}.png")
            if split == "trainval":
                (root / f"annotations/xmls/{name}.xml").write_text(XML)
            species = 1 if name[0].isupper() else 2
            lines.setdefault(split, []).append(f"{name} {number} {species} 1\n")
        (root / f"annotations/{split}.txt").write_text("".join(lines[split]))
    header = "#Image CLASS-ID SPECIES BREED ID\n"
    (root / "annotations/list.txt").write_text(header + "".join(lines["trainval"] + lines["test"]))


def pack(root):
    """Packs them. Despite their names the official archives are tar files without compression."""
    for folder in ("images", "annotations"):
        with tarfile.open(root / f"{folder}.tar.gz", "w") as archive:
            archive.add(root / folder, folder)


def prepare(downloads, data_dir):
    """TFDS' builder for Pet, but for the unpacking, for which it needs TensorFlow."""
    pet = tensorflow_datasets.builder("oxford_iiit_pet", data_dir=str(data_dir), file_format="array_record")

    def split_generators(dl_manager):
        lists = {"train": "trainval", "test": "test"}
        folders = str(downloads / "images"), str(downloads / "annotations")
        return {s: pet._generate_examples(*folders, str(downloads / f"annotations/{x}.txt")) for s, x in lists.items()}

    pet._split_generators = split_generators
    pet.download_and_prepare()
