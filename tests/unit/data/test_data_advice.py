"""Warnings of an own folder: a split to score on of few images, crops larger than most images."""

import re

import numpy as np
import pytest
from layouts import image_folder as layout

from pwcrf_jax.cli import check
from pwcrf_jax.configs import image_folder_mobilenet_v2
from pwcrf_jax.data import advice
from pwcrf_jax.training import checks


class Sizes:
    """As much of a data set as is asked for: images of the sizes given."""

    def __init__(self, name="image_folder", **splits):
        self.name, self._sizes = name, splits
        self.splits = {split: len(sizes) for split, sizes in splits.items()}

    def source(self, split):
        sizes = self._sizes[split.split("[")[0]]

        class Source:
            __len__ = lambda self: len(sizes)
            image_size = lambda self, i: sizes[i]

        return Source()


@pytest.mark.parametrize(
    ("train", "val", "says"),
    [(36, 4, "split 'val' has 4 images, below 20: .*val_fraction=0.3 "), (181, 19, "has 19 images.*val_fraction=0.1 "),
     (1, 1, "has 1 image, below 20"), (80, 20, None)],
)  # fmt: skip
def test_few_images_to_score_on(train, val, says):
    found = list(advice.of_split(Sizes(train=[(9, 9)] * train, val=[(9, 9)] * val), "val"))
    if says is None:
        assert not found
    else:
        (line,) = found
        assert re.search(says, line) and "\n" not in line
    assert not list(advice.of_split(Sizes("voc", train=[(9, 9)] * train, val=[(9, 9)] * val), "val"))


@pytest.mark.parametrize(
    ("sizes", "says"),
    [
        ([(500, 500)] * 3 + [(240, 500)] * 4, r"data\.crop_size \(320, 300\) is larger than 4 of 7 images of split "
         r"'train' \(the median is 240x500, height x width\).*crop_size=\"\(240, 280\)\"$"),
        ([(500, 500)] * 4 + [(240, 500)] * 4, None),
        ([(320, 300)] * 4, None),
        ([(30, 20)], r"1 of 1 images.*crop_size=\"\(40, 40\)\"$"),
        ([(100, 900)] * 2000, r"larger than 500 of 500 images"),
    ],
)  # fmt: skip
def test_crops_larger_than_most_images(sizes, says):
    found = list(advice.of_crops(Sizes(train=sizes), "train", (320, 300)))
    assert len(found) == (says is not None) and (not says or re.search(says, found[0]))
    assert not list(advice.of_crops(Sizes("voc", train=sizes), "train", (320, 300)))


def test_check_and_training_say_so(tmp_path, capsys, caplog):
    layout.make(tmp_path / "own", np.random.default_rng(0))  # 24 x 36, two of them in val
    arguments = ["image_folder", "--source_dir", str(tmp_path / "own"), "--data_dir", str(tmp_path / "p")]
    assert check.main(arguments) == 0
    out = capsys.readouterr().out
    assert "\nwarning: split 'val' has 2 images, below 20: " in out and "no warnings" not in out
    config = image_folder_mobilenet_v2.get_config()
    config.data.source_dir, config.data.data_dir = str(tmp_path / "own"), str(tmp_path / "p")
    config.data.num_classes, config.data.crop_size = 3, (80, 80)
    config.model.mobilenet_v2.freeze_until = ""
    config.eval.batch_size = config.train.batch_size = 8
    checks.load_and_validate(config)
    assert "split 'val' has 2 images, below 20: " in caplog.text
    assert "data.crop_size (80, 80) is larger than 6 of 6 images of split 'train'" in caplog.text
