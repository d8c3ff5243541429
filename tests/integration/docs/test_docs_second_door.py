"""README's second door, as it stands there: forty images of one's own, weights by pip, nothing else."""

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from test_docs_readme import ROOT, blocks

from pwcrf_jax.nets import WeightsError, pip_weights

CAMVID = Path(os.environ.get("PWCRF_DATA", ROOT.parent / "shared" / "data")) / "camvid"
CLASSES = "sky building pole road pavement tree sign fence car pedestrian bicyclist"


@pytest.fixture
def mine(tmp_path):
    if not CAMVID.is_dir():
        pytest.skip(f"no CamVid in {CAMVID} (PWCRF_DATA)")
    try:
        pip_weights.pip_path("pip:efficientnet_lite0")
    except WeightsError as error:
        pytest.skip(str(error))
    for name in ("images", "masks"):
        (tmp_path / "mine" / name).mkdir(parents=True)
    for mask in sorted((CAMVID / "trainannot").glob("*.png"))[::9][:40]:
        shutil.copy(mask, tmp_path / "mine/masks")
        shutil.copy(CAMVID / "train" / f"{mask.stem}.jpg", tmp_path / "mine/images")
    classes = [*CLASSES.split(), "void 11"]
    (tmp_path / "mine/classes.txt").write_text("\n".join(classes) + "\n")
    return tmp_path


@pytest.mark.slow
def test_forty_images_of_ones_own(mine):
    readme = "\n".join(blocks((ROOT / "README.md").read_text(), "bash"))
    door = [shlex.split(line) for line in readme.splitlines() if re.match(r"pwcrf .*\bmine\b", line)]
    assert [words[1] for words in door] == ["check", "train", "eval"]
    door.append(shlex.split("pwcrf predict --workdir runs/mine --images mine/images --output predictions"))
    plain = {name: text for name, text in os.environ.items() if not name.startswith(("JAX_", "XLA_"))}
    for words in door:
        done = subprocess.run(
            [sys.executable, "-m", "pwcrf_jax", *words[1:]], cwd=mine, capture_output=True, text=True,
            env=plain | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT), "XDG_CACHE_HOME": str(mine / "cache"),
                              "TFDS_DATA_DIR": str(mine / "prepared")},
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
    assert len(list((mine / "predictions/labels").iterdir())) == 40
    assert list((mine / "runs/mine").glob("report_*.html"))
