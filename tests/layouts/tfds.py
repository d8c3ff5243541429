"""Oxford-IIIT Pet as TFDS prepares it in array_record, and the archives it is prepared from."""

import io
import pathlib
import tarfile
import tempfile

import numpy as np
import tensorflow_datasets
from PIL import Image

OPTIONS = dict(dataset="oxford_iiit_pet", label_key="segmentation_mask", label_offset=-1, num_classes=3)
NAMES = {"trainval": ("Abyssinian_1", "Bengal_2", "pug_3"), "test": ("basset_hound_4", "Sphynx_5")}
XML = "<annotation><size><width>96</width><height>64</height></size><object><bndbox><xmin>9</xmin><ymin>8</ymin><xmax>50</xmax><ymax>40</ymax></bndbox></object></annotation>"  # noqa: E501


def make(root: pathlib.Path, rng: np.random.Generator, archives: bool = False) -> dict[str, int]:
    """The folder oxford_iiit_pet/4.0.0, by TFDS' own code for Pet; archives: no difference, TFDS unpacks them itself."""
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


def prepare(downloads, data_dir, file_format="array_record", **replaced):
    """TFDS' builder for Pet, but for the unpacking, for which it needs TensorFlow."""
    pet = tensorflow_datasets.builder("oxford_iiit_pet", data_dir=str(data_dir), file_format=file_format)

    def split_generators(dl_manager):
        lists = {"train": "trainval", "test": "test"}
        folders = str(downloads / "images"), str(downloads / "annotations")
        return {s: pet._generate_examples(*folders, str(downloads / f"annotations/{x}.txt")) for s, x in lists.items()}

    pet._split_generators = split_generators
    pet.download_and_prepare()
    return pathlib.Path(pet.data_dir)


def custom(data_dir, name, features, splits, config=None, version="1.0.0"):
    """Prepares a set of any features; splits: {split: records}, images as PNG bytes."""
    configs = [tensorflow_datasets.core.BuilderConfig(name=config)] if config else []

    class Custom(tensorflow_datasets.core.GeneratorBasedBuilder, skip_registration=True):
        VERSION = tensorflow_datasets.core.Version(version)
        BUILDER_CONFIGS = configs

        def _info(self):
            return tensorflow_datasets.core.DatasetInfo(
                builder=self, features=tensorflow_datasets.features.FeaturesDict(features)
            )

        def _split_generators(self, dl_manager):
            return {split: self._generate_examples(records) for split, records in splits.items()}

        def _generate_examples(self, records):
            yield from enumerate(records)

    Custom.name = name
    builder = Custom(data_dir=str(data_dir), file_format="array_record")
    builder.download_and_prepare()
    return pathlib.Path(builder.data_dir)


def png(array):
    """A file object of a PNG."""
    out = io.BytesIO()
    Image.fromarray(array).save(out, format="PNG")
    out.seek(0)
    return out
