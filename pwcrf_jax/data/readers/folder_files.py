"""Files of a user's own folder: images by their ids, lists of splits, and the draw of splits where there are none."""

import hashlib
import os
import re
import unicodedata
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from pwcrf_jax.data.readers.files import SUFFIXES, DataError, image_kind, present, read_lines, refuse_other_lists

LISTS = ("train", "val", "test")


def image_files(folder: Path) -> tuple[dict[str, Path], list[Path], list[Path]]:
    """Id -> file of all images below a folder; those of formats that are not read; and what is no image.

    Hidden files do not count.
    """
    found: dict[str, Path] = {}
    foreign: dict[Path, str] = {}
    others = []
    for path in walk(folder):
        kind = image_kind(path)
        if kind == "other":
            others.append(path)
            continue
        key = normal(path.relative_to(folder).as_posix())
        # Only what looks like a suffix is one: "frame.0001" has none.
        if path.suffix.lower() in SUFFIXES or re.fullmatch(r"\.[A-Za-z]\w{0,9}", path.suffix):
            key = key.removesuffix(normal(path.suffix))
        if any(unicodedata.category(c) in ("Cc", "Cs") for c in key):
            raise DataError(f"{str(path)!r}: its name is not UTF-8, or holds control characters; rename it")
        if kind == "foreign":
            foreign[path] = key
            continue
        if key in found:
            raise DataError(f"{path} and {found[key]} have the same name but for the suffix; rename or remove one")
        found[key] = path
    # Raw photographs lie beside theirs; the others are Windows' own.
    others = [path for path in others if path.name not in ("Thumbs.db", "desktop.ini")]
    return found, [path for path, key in foreign.items() if key not in found], others


def refuse_splits_by_folder(images: Path) -> None:
    """DataError where folders name splits, which no list says."""
    names = [entry.name for entry in os.scandir(images) if entry.is_dir()]
    like = sorted(name for name in names if re.fullmatch(r"train(ing)?|val(id|idation)?|test(ing)?", name.casefold()))
    if len(like) > 1:
        raise DataError(
            f"{images}: has the folders {', '.join(like)}, but no list says which images make which split, and they "
            "would be mixed; write train.txt, val.txt and test.txt beside images, such as 'train/NAME' a line"
        )


def walk(folder: Path, *, linked: bool = False, skip: bool = False) -> Iterator[Path]:
    """The files below a folder but hidden ones, in the order of names.

    Args:
      linked: folders in it may be links.
      skip: pass over other links to folders.

    Raises:
      DataError: a link to a folder that is not passed over.
    """
    with os.scandir(folder) as found:
        entries = sorted(found, key=lambda entry: entry.name)
    for entry in entries:
        if entry.name.startswith("."):
            continue
        if not entry.is_dir():
            yield Path(entry.path)
        elif entry.is_symlink() and not linked and skip:
            continue
        elif entry.is_symlink() and not linked:
            raise DataError(f"{entry.path}: is a link to a folder, which could lead in circles; link images/ or masks/ "
                            "themselves, or copy the folder")  # fmt: skip
        else:
            yield from walk(Path(entry.path), skip=skip)


def normal(name: str) -> str:
    """A name as lists and most systems write it: macOS writes "é" as two characters."""
    return unicodedata.normalize("NFC", name)


def listed(path: Path, images: Mapping[str, Path]) -> list[str]:
    """The ids that a list names."""
    by_file = {key + file.suffix: key for key, file in images.items()}
    keys = []
    for number, line in enumerate(read_lines(path), 1):
        name = normal(line.strip())
        if not name:
            continue
        for known in (name, name.replace("\\", "/")):  # the latter of a list written under Windows
            known = known.removeprefix("./").removeprefix("images/")
            if key := by_file.get(known) or (known if known in images else None):
                keys.append(key)
                break
        else:
            raise DataError(
                f"{path}, line {number}: {line.strip()!r} is no image in {path.parent / 'images'}; write ids or file "
                "names as they are below that folder, one a line, or add the image"
            )
    if not keys:
        raise DataError(f"{path}: the list is empty, split {path.stem!r} has no images; fill it or remove it")
    return keys


def drawn(keys: Iterable[str], fraction: float, seed: int) -> dict[str, list[str]]:
    """Two keys or more, dealt out to train and val."""
    order = sorted(keys, key=lambda key: hashlib.sha256(f"{seed}/{key}".encode()).digest())
    count = min(max(1, round(fraction * len(order))), len(order) - 1)
    return {"train": order[count:], "val": order[:count]}


def more(keys: Sequence[str]) -> str:
    """How many ids there are beside the first, and some of them."""
    return "nothing else" if len(keys) == 1 else f"and {len(keys) - 1} more: {', '.join(keys[1:6])}"


SPLIT_NAMES = {
    "train": "train", "training": "train", "val": "val", "valid": "val", "validation": "val", "test": "test",
    "testing": "test",
}  # fmt: skip
"""Names of folders and files -> the splits that they mean, in lower case."""


def split_in(name: str) -> str | None:
    """The split that the words of a name say, "instances_train2017"; None where they say none or several."""
    found = {SPLIT_NAMES[word] for word in re.findall("[a-z]+", name.casefold()) if word in SPLIT_NAMES}
    return found.pop() if len(found) == 1 else None


def by_folder(keys: Iterable[str], where: Path) -> dict[str, list[str]] | None:
    """Ids by the split that their first folder names; None where no folder does.

    Raises:
      DataError: some lie in such folders, and some do not.
    """
    found: dict[str, list[str]] = {}
    others: list[str] = []
    for key in keys:
        first, _, rest = key.partition("/")
        split = SPLIT_NAMES.get(first.casefold()) if rest else None
        (others if split is None else found.setdefault(split, [])).append(key)
    if found and others:
        named = ", ".join(sorted(found))
        raise DataError(f"{where}: has folders of splits ({named}), but {others[0]!r} lies in none of them "
                        f"({more(others)}); move it into one")  # fmt: skip
    return {split: found[split] for split in LISTS if split in found} or None


def with_val(chosen: dict[str, list[str]], where: Path, fraction: float, seed: int) -> dict[str, list[str]]:
    """Splits of folders or files; val is drawn from train where they have none."""
    if "val" in chosen or "train" not in chosen:
        return chosen
    if len(chosen["train"]) < 2:
        raise DataError(f"{where}: holds one image to train on; train and val need one each")
    return drawn(chosen["train"], fraction, seed) | {s: keys for s, keys in chosen.items() if s != "train"}


def choose(
    root: Path, images: Mapping[str, Path], fraction: float, seed: int, known: Sequence[str] = ()
) -> dict[str, list[str]]:
    """Splits of ids: those of train.txt, ..., else of folders of splits, else drawn.

    Args:
      images: id -> file.
      known: names of other files in the folder that look like lists.

    Raises:
      DataError: of a list or folder, or there is one image, from which nothing can be drawn.
    """
    lists = {split: root / f"{split}.txt" for split in LISTS if present(root / f"{split}.txt")}
    refuse_other_lists(root, [*(path.name for path in lists.values()), *known])
    if lists:
        return {split: listed(path, images) for split, path in lists.items()}
    if chosen := by_folder(images, root):
        return with_val(chosen, root, fraction, seed)
    if len(images) < 2:
        raise DataError(f"{root}: holds one image; train and val need one each, or write train.txt")
    return drawn(images, fraction, seed)
