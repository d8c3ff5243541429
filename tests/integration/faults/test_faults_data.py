"""Damaged images, masks and shards: each a clear error or the pixels there were before, and none hangs.

A file is damaged before the set is prepared (then what reads it must notice, as PNG can and the others can only where
something is missing), behind the back of a prepared set (bytes rot without a new date), or in the prepared set itself.
"""

import concurrent.futures
import hashlib
import multiprocessing
import os
import random
import shutil

import numpy as np
import pytest
from layouts import image_folder as layout

from pwcrf_jax.data import DataError, load_dataset

SECONDS = 120  # after which a case is taken for hanging; they take a fraction of one
MISSING = ("cut", "emptied", "zeroed head")  # what every format must notice
DAMAGES = ("bit", "bytes", "zeroed block", "doubled tail", *MISSING)


def damage(data, kind, rng):
    """The bytes, damaged."""
    out, at = bytearray(data), rng.randrange(len(data))
    match kind:
        case "bit":
            out[at] ^= 1 << rng.randrange(8)
        case "bytes":
            for _ in range(3):
                out[rng.randrange(len(out))] = rng.randrange(256)
        case "zeroed block":
            out[at : at + 64] = bytes(len(out[at : at + 64]))
        case "doubled tail":
            out += out[-rng.randrange(1, 50) :]
        case "cut":
            del out[at:]
        case "emptied":
            out.clear()
        case "zeroed head":
            out[:16] = bytes(16)
    return bytes(out)


def content(source, prepared):
    """{(split, id): hash of image and label}"""
    data, found = load_dataset("image_folder", source_dir=str(source), data_dir=str(prepared)), {}
    for split in data.splits:
        records = data.source(split)
        for i in range(len(records)):
            record = records[i]
            pixels = [record[key].shape.__repr__().encode() + record[key].tobytes() for key in ("image", "label")]
            found[split, record["id"]] = hashlib.sha256(b"|".join(pixels)).hexdigest()
    return found


def prepare(root):
    layout.make(root / "source", np.random.default_rng(3))
    return content(root / "source", root / "prepared")


def files(folder):
    return sorted(path for path in folder.rglob("*") if path.is_file() and path.name != "prepare.lock")


def targets(root):
    """{case: [(file, kinds of damage)]}"""
    source = files(root / "source")
    pictures = [path for path in source if path.suffix != ".txt"]
    own = lambda path: DAMAGES if path.suffix == ".png" else MISSING
    return {
        "before": [(path, own(path)) for path in pictures],
        "behind": [(path, DAMAGES) for path in pictures],
        "prepared": [(path, DAMAGES) for path in files(root / "prepared")],
    }


def try_one(root, case, path, kind, seed, sound):
    """ "error", "equal" or what is wrong; everything is as it was afterwards."""
    rng, (path, data, stat) = random.Random(seed), (path, path.read_bytes(), path.stat())
    prepared = root / "fresh" if case == "before" else root / "prepared"
    path.write_bytes(damage(data, kind, rng))
    if case == "behind":
        path.write_bytes(path.read_bytes()[: len(data)].ljust(len(data), b"\0"))
        os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    try:
        return "equal" if content(root / "source", prepared) == sound else "other pixels without an error"
    except DataError as error:
        folder = root / "prepared" if case == "prepared" else path
        text = str(error)
        named = str(folder) in text or path.stem in text
        return "error" if named else f"an error that does not name {folder.name}: {text}"
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    finally:
        path.write_bytes(data)
        os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
        shutil.rmtree(root / "fresh", ignore_errors=True)


def hunt(root, number, seed):
    """Counts of outcomes of so many cases, in a process of its own that may not hang; fails at the first wrong one."""
    rng, counts = random.Random(seed), {}
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(1, mp_context=context) as pool:
        sound = pool.submit(prepare, root).result(SECONDS)
        assert len(sound) == 9
        groups = targets(root)
        for _ in range(number):
            case = rng.choice(list(groups))
            path, kinds = rng.choice(groups[case])
            kind, one = rng.choice(kinds), rng.randrange(2**32)
            outcome = pool.submit(try_one, root, case, path, kind, one, sound).result(SECONDS)
            assert outcome in ("error", "equal"), f"{case}, {path.relative_to(root)}, {kind}, seed {one}: {outcome}"
            counts[case, outcome] = counts.get((case, outcome), 0) + 1
    return counts


def test_some_damaged_files(tmp_path):
    counts = hunt(tmp_path, 40, 0)
    assert counts["before", "error"] > 5 and counts["prepared", "error"] > 3 and ("behind", "error") not in counts


@pytest.mark.slow
def test_five_hundred_damaged_files(tmp_path):
    counts = hunt(tmp_path, 500, 1)
    print("\n500 damaged files:", ", ".join(f"{case} {outcome} {n}" for (case, outcome), n in sorted(counts.items())))
    assert counts["before", "error"] > 50 and counts["prepared", "error"] > 50 and ("behind", "error") not in counts
