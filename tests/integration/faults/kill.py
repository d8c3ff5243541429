"""Kills real training at random moments, starts it again, and compares what comes out with a run nobody killed.

    python tests/integration/faults/kill.py [--kills 100] [--signal kill|term] [--seed 0] [--devices 2] [--workers 0]
        [--folder DIR] [--bucket]

Each life of `train.py` ends at a moment drawn from one of: the time before its first step, the time after it, a save
(that is: a temporary checkpoint is there). After each kill every visible checkpoint is read and verified, the best one
must still be there, no process may be left, and nothing new in shared memory. A run that gets to its end must be equal
to the undisturbed one bit for bit: parameters, optimizer state, best parameters, and each line of metrics.jsonl but for
the speed; then a new one begins, until there were as many kills as asked for.

With --bucket the workdir lies in an emulator of Google Cloud Storage, and what a kill left there must be gone when the
next life trains.

With --signal=term the lives end by SIGTERM, half of them by two of it: the exit code must be 143, and the step that was
stopped at saved. With --workers so many processes read the images, where threads read those of the undisturbed run.
Prints one line a kill and a last line of JSON; exit code 1 if anything was not as it should be.
"""

import argparse
import collections
import contextlib
import json
import os
import pathlib
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time

ROOT = pathlib.Path(__file__).resolve().parents[3]
os.environ.setdefault("JAX_PLATFORMS", "cpu")
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "tests/integration")]

import commands  # noqa: E402
import emulator  # noqa: E402
import small  # noqa: E402
from faults import states  # noqa: E402

from pwcrf_jax import config as configs  # noqa: E402
from pwcrf_jax.runtime import checkpoint  # noqa: E402

KEYS = {
    "data.synthetic.num_val": 8,
    "loss.sampled_offsets": 3,  # drawn with a key of each step
    "optimizer.warmup_steps": 5,
    "train.batch_size": 4,
    "train.steps": 40,
    "train.eval_every": 8,
    "train.checkpoint_every": 2,
    "eval.batch_size": 4,
}
"""Beside those of small.KEYS."""
SHM = pathlib.Path("/dev/shm")
HANGS = 300  # seconds after which a life is taken for hanging


class Folder:
    """A workdir on the disk. log: where its lives write theirs."""

    def __init__(self, base):
        self.path, self.log = base / "work", base / "log.txt"
        self.path.mkdir(parents=True)

    def temporary(self):
        """{path: when it was begun} of saves that are not through."""
        found = [x for name in ("checkpoints", "best") for x in (self.path / name).glob("*orbax-checkpoint-tmp*")]
        return {x: x.stat().st_mtime for x in found if x.exists()}

    @contextlib.contextmanager
    def on_disk(self):
        yield self.path

    def left_over(self, life, before):
        """What an earlier life left that this one, which trains, should have deleted."""
        return [f"{x} is older than this start" for x, began in self.temporary().items() if began < life.began]

    def state(self):
        return None


class Bucket:
    """The same in the bucket of an `emulator.Service`."""

    def __init__(self, base, service):
        self._service, self._name, self.log = service, f"{base.name}/work", base / "log.txt"
        self.path = f"gs://bucket/{self._name}"
        base.mkdir(parents=True, exist_ok=True)

    def _unfinished(self):
        """{step: {object: version}}"""
        found, whole = collections.defaultdict(dict), set()
        for name, version in self._service.versions.items():
            kind, _, rest = name.removeprefix(f"{self._name}/").partition("/")
            step = f"{kind}/{rest.partition('/')[0]}"
            if name.startswith(f"{self._name}/") and kind in ("checkpoints", "best"):
                found[step][name] = version
                whole |= {step} if name.endswith("/commit_success.txt") else set()
        return {step: objects for step, objects in found.items() if step not in whole}

    def temporary(self):
        return {step: None for step in self._unfinished()}

    @contextlib.contextmanager
    def on_disk(self):
        with tempfile.TemporaryDirectory() as copy:
            cut = {name for objects in self._unfinished().values() for name in objects}
            for name, content in self._service.objects.items():
                if name.startswith(f"{self._name}/") and name not in cut:
                    path = pathlib.Path(copy, name.removeprefix(f"{self._name}/"))
                    path.parent.mkdir(parents=True, exist_ok=True)
                    path.write_bytes(content)
            yield pathlib.Path(copy)

    def left_over(self, life, before):
        now = {item for objects in self._unfinished().values() for item in objects.items()}
        return [f"left of an earlier life: {sorted(now & before)}"] if before and now & before else []

    def state(self):
        return {item for objects in self._unfinished().values() for item in objects.items()}


class Life:
    """One process of train.py; its log is on disk, so that nothing of it is lost with it.

    forked: for tests; it need not import anything first, and compiles quickly and once for all.
    """

    def __init__(self, workdir, devices, data_dir, workers=0, forked=False):
        self.workdir, self.log_path = workdir, workdir.log
        keys = KEYS | {"data.num_workers": workers}
        command = [sys.executable, "train.py", f"--workdir={workdir.path}", *small.flags(data_dir, **keys)]
        flags = f"--xla_force_host_platform_device_count={devices} {small.FAST_COMPILATION}"
        environment = os.environ | {"XLA_FLAGS": flags}
        self.began = time.time()
        if forked:
            environment |= {
                "JAX_COMPILATION_CACHE_DIR": str(data_dir.parent / "compiled"),
                "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.1",
                "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
            }
            self.process = commands.start(command[1:], self.log_path, self.log_path, env=environment)
            return
        with open(self.log_path, "w") as log:
            self.process = subprocess.Popen(
                command, stdout=log, stderr=log, cwd=ROOT, env=environment, start_new_session=True
            )

    def log(self):
        return self.log_path.read_text()

    def wait_for(self, condition):
        """Until condition() or the end of the process; seconds since its start."""
        while self.process.poll() is None and not condition():
            if time.time() - self.began > HANGS:
                raise AssertionError(f"no progress in {HANGS} s:\n{self.log()}")
            time.sleep(0.002)
        return time.time() - self.began

    def trains(self):
        return "first step after" in self.log()

    def temporary(self):
        return self.workdir.temporary()

    def relatives(self):
        """Living processes of its session: itself and all it started, unless they made a session of their own."""
        found = []
        for stat in pathlib.Path("/proc").glob("[0-9]*/stat"):
            try:
                state, _, _, session = stat.read_text().rpartition(")")[2].split()[:4]
            except OSError:
                continue
            if int(session) == self.process.pid and state != "Z":
                found.append(stat.parent.name)
        return found

    def survivors(self):
        """`relatives` that do not end by themselves: one that reads images first ends the sample it is at."""
        until = time.time() + HANGS
        while (found := self.relatives()) and time.time() < until:
            time.sleep(0.01)
        return found


def checkpoints(workdir):
    """{("checkpoints", step): meta, ("best", step): meta}, each read by itself and verified."""
    if not (workdir / "config.json").exists():
        return {}
    config, found = configs.load(workdir / "config.json"), {}
    for kind, trees in states.abstract_of(config).items():
        for path in sorted((workdir / kind).glob("*")):
            if path.name.isdecimal():
                with tempfile.TemporaryDirectory() as alone:
                    shutil.copytree(path, pathlib.Path(alone, path.name), copy_function=os.link)
                    _, meta = checkpoint.Store(alone, configs.identity(config)).restore(trees)
                found[kind, meta["step"]] = meta
    return found


def moment(life, kind, rng, start_up):
    """Waits for the moment to kill; says whether the process still lives."""
    if kind == "start":
        until = rng.uniform(0, start_up)
        life.wait_for(lambda: time.time() - life.began > until)
    else:
        life.wait_for(life.trains)
        if kind == "save":
            skipped = rng.randrange(4)  # not always the first save
            for _ in range(skipped):
                life.wait_for(life.temporary)
                life.wait_for(lambda: not life.temporary())
            life.wait_for(life.temporary)
            time.sleep(rng.choice([0, rng.uniform(0, 0.03)]))
        else:
            until = time.time() + rng.uniform(0, 4)
            life.wait_for(lambda: time.time() > until)
    return life.process.poll() is None


def phase(life):
    """What a life that is about to be killed is doing: start, save, evaluation or training."""
    log = life.log()
    if life.temporary():
        return "save"
    if not life.trains():
        return "start"
    lines = [line for line in log.splitlines() if line.startswith("step ")]
    last = lines[-1].split()[1] if lines else ""  # "8/40" of training, "8," of an evaluation that is through
    done = int(last.partition("/")[0]) if "/" in last else 0
    return "evaluation" if done and done % KEYS["train.eval_every"] == 0 else "training"


def stop(life, kill, rng):
    """Ends a life; returns (exit code, seconds it took)."""
    began = time.time()
    if kill:
        os.kill(life.process.pid, signal.SIGKILL)
    else:
        os.kill(life.process.pid, signal.SIGTERM)
        if rng.random() < 0.5:
            time.sleep(rng.uniform(0, 0.1))
            if life.process.poll() is None:
                os.kill(life.process.pid, signal.SIGTERM)
    code = life.process.wait(HANGS)
    return code, time.time() - began


def undisturbed(base, devices, forked=False):
    """(base, devices, forked, seconds to the first step, `states.final`) of a run that nobody kills, on the disk."""
    workdir = Folder(base / "whole")
    life = Life(workdir, devices, base / "data", forked=forked)
    start_up = life.wait_for(life.trains)
    life.wait_for(lambda: False)
    if life.process.returncode:
        raise AssertionError(f"the undisturbed run failed:\n{life.log()}")
    return base, devices, forked, start_up, states.final(workdir.path)


def campaign(whole, kills, kill=True, seed=0, kinds=("start", "step", "save"), workers=0, say=print, service=None):
    """Returns the summary; summary["violations"] lists what was not as it should be. whole: of `undisturbed`.

    service: of `emulator.started`, in whose bucket the workdirs lie.
    """
    base, devices, forked, start_up, expected = whole
    rng, began, shared_before = random.Random(seed), time.time(), set(os.listdir(SHM))
    counts, violations, slowest = collections.Counter(), [], 0.0
    done, runs, finished = 0, 0, True
    while done < kills or not finished:
        if finished:
            runs += 1
            home = pathlib.Path(tempfile.mkdtemp(prefix=f"run{runs}-", dir=base))
            workdir = Bucket(home, service) if service else Folder(home)
            best, finished, before = None, False, None
        life = Life(workdir, devices, base / "data", workers, forked)
        if done < kills and moment(life, kind := rng.choice(kinds), rng, start_up):
            where = phase(life)
            code, seconds = stop(life, kill, rng)
        else:  # it came to its end first, or there were kills enough
            life.wait_for(lambda: False)
            code, kind = life.process.returncode, None
        log, wrong = life.log(), []
        if life.trains():
            wrong += workdir.left_over(life, before)
        before = workdir.state()
        if relatives := life.survivors():
            wrong.append(f"processes {relatives} are left")
        if new := set(os.listdir(SHM)) - shared_before:
            wrong.append(f"new in shared memory: {sorted(new)}")
        found = {}
        try:
            with workdir.on_disk() as folder:
                found = checkpoints(folder)
        except Exception as error:
            wrong.append(f"unreadable: {error}")
        bests = [meta["miou_all"] for (which, _), meta in found.items() if which == "best"]
        if best is not None and (not bests or max(bests) < best):
            wrong.append(f"best {best} is lost, there is {bests}")
        best = max(bests, default=best)
        if "cannot be read" in log or "Traceback" in log:
            wrong.append(log)
        if kind:
            done += 1
            if not kill:
                slowest = max(slowest, seconds)
                ended = log.strip().endswith("the same command goes on from there")
                saved = int(log.rpartition("stopped by SIGTERM; step ")[2].split()[0]) if ended else None
                # Before main() installs the handler, the system ends it by the signal itself.
                if code != 143 and not (code == -signal.SIGTERM and where == "start") and code != 0:
                    wrong.append(f"exit code {code}:\n{log}")
                if ended and ("checkpoints", saved) not in found:
                    wrong.append(f"step {saved} is said to be saved, there are {sorted(found)}")
                counts[f"code {code}"] += 1
            counts[where] += 1
            newest = max((step for which, step in found if which == "checkpoints"), default=None)
            say(f"{done}: {where}, {time.time() - life.began:.1f} s old, newest step {newest}", flush=True)
        elif code:
            wrong.append(f"ended by itself with {code}:\n{log}")
        if code == 0:
            finished = True
            counts["finished runs"] += 1
            with workdir.on_disk() as folder:
                if states.final(folder) != expected:
                    wrong.append(f"{workdir.path} is not what the undisturbed run is")
            if life.temporary():
                wrong.append(f"left: {list(life.temporary())}")
        violations += wrong
        for text in wrong:
            say(f"VIOLATION {text}", flush=True)
    return dict(
        signal="kill" if kill else "term",
        kills=done,
        **counts,
        start_up_seconds=round(start_up, 1),
        slowest_stop_seconds=round(slowest, 1),
        wall_minutes=round((time.time() - began) / 60, 1),
        violations=violations,
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--signal", choices=("kill", "term"), default="kill")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--devices", type=int, choices=(1, 2, 4), default=2)
    parser.add_argument("--workers", type=int, default=0, help="config.data.num_workers")
    parser.add_argument("--folder", help="kept, to look into; default: a temporary one")
    parser.add_argument("--bucket", action="store_true", help="workdirs in an emulator of Google Cloud Storage")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary, contextlib.ExitStack() as stack:
        service = stack.enter_context(emulator.started()) if args.bucket else None
        whole = undisturbed(pathlib.Path(args.folder or temporary), args.devices)
        summary = campaign(whole, args.kills, args.signal == "kill", args.seed, workers=args.workers, service=service)
    print(json.dumps(summary))
    sys.exit(bool(summary["violations"]))


if __name__ == "__main__":
    main()
