"""Folders of checkpoints, WORKDIR/checkpoints/STEP: which are whole, and how one is deleted or set aside.

On a disk Orbax gives a folder its name when all is written, and we take the name away before we delete. In a bucket
there are no folders to rename: Orbax writes an object of its own at last, and a folder without it is none.
"""

import os
import shutil

from pwcrf_jax.runtime import buckets, files

_TEMPORARY, _DELETED, _DAMAGED = ".orbax-checkpoint-tmp", ".deleted", ".damaged"  # in names of folders beside STEP
_COMMITTED = "commit_success.txt"  # in STEP, Orbax' own


def steps(folder: str) -> list[int]:
    """Steps of the checkpoints in a folder, damaged ones too, oldest first; others have longer names.

    Raises FileError: the folder or one of a step is a link, so that to save or to delete would be done elsewhere.
    """
    files.check_folder(folder, os.path.dirname(folder))
    if files.is_url(folder):
        names = [name.partition("/")[0] for name in buckets.tree(folder) if name.endswith(f"/{_COMMITTED}")]
    else:
        names = files.names(folder)
    found = sorted(int(name) for name in names if _is_step(name))
    for step in found:
        files.check_folder(os.path.join(folder, str(step)), folder)
    return found


def _is_step(name: str) -> bool:
    return name.isdecimal() and str(int(name)) == name


def damaged(folder: str) -> list[str]:
    """Names of checkpoints that were set aside; another process may make the folder."""
    return sorted(name for name in files.names(folder) if _DAMAGED in name)


def delete(folder: str, step: int) -> None:
    """Deletes a checkpoint so that it is never half there; `clear` ends what a kill leaves of it."""
    path = os.path.join(folder, str(step))
    if files.is_url(path):
        buckets.delete(os.path.join(path, _COMMITTED))
    else:
        # Under another name first: a folder that is half deleted must not look like a checkpoint.
        os.replace(path, path + _DELETED)


def set_aside(folder: str, step: int) -> str:
    """Gives a checkpoint another name, STEP.damaged, and returns its path."""
    path = os.path.join(folder, str(step))
    target = path + _DAMAGED
    while files.exists(target):
        target += "+"
    if files.is_url(path):
        buckets.copy_tree(path, target)
        delete(folder, step)
        buckets.delete_tree(path)
    else:
        os.replace(path, target)
    return target


def clear(folder: str) -> None:
    """Deletes what a save or a deletion that was cut off left behind."""
    if files.is_url(folder):
        whole = set(map(str, steps(folder)))
        for name in files.names(folder):
            if _is_step(name) and name not in whole or _TEMPORARY in name:
                buckets.delete_tree(os.path.join(folder, name))
        return
    for name in os.listdir(folder):
        if _TEMPORARY in name or name.endswith(_DELETED):
            path = os.path.join(folder, name)
            if os.path.islink(path):
                os.unlink(path)
            else:
                shutil.rmtree(path, ignore_errors=True)
