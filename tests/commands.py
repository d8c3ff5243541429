"""Python commands as processes of their own that need not import anything: forked from one that has.

    done = commands.run(["eval.py", "--workdir", workdir])  # subprocess.run([sys.executable, "eval.py", ...])

One process a test session imports the package, starts neither devices nor threads, and forks for each command.
"""

import ast
import atexit
import gc
import importlib
import json
import os
import pathlib
import pkgutil
import resource
import runpy
import shutil
import signal
import subprocess
import sys
import tempfile
import time

ROOT = pathlib.Path(__file__).resolve().parents[1]
_server = None


def run(words, cwd=ROOT, env=None, timeout=600) -> subprocess.CompletedProcess:
    """words: a script, -m and a module, or -c and code, with arguments. env: all variables; None: those of here."""
    with tempfile.TemporaryDirectory() as folder:
        out, err = (pathlib.Path(folder, name) for name in ("out", "err"))
        process = start(words, out, err, cwd, env)
        done = subprocess.CompletedProcess(words, process.wait(timeout), out.read_text(), err.read_text())
        done.seconds = process.seconds
        return done


def start(words, out, err, cwd=ROOT, env=None) -> "Process":
    """out, err: paths of files, which may be one."""
    global _server
    if _server is None:
        plain = {name: text for name, text in os.environ.items() if not name.startswith("JAX_")}
        _server = subprocess.Popen(
            [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT, env=plain
        )
        atexit.register(_server.stdin.close)
    for name in (out, err):
        open(name, "w").close()
    environment = dict(os.environ if env is None else env)
    asked = dict(words=list(map(str, words)), out=str(out), err=str(err), cwd=str(cwd), env=environment)
    print(json.dumps(asked), file=_server.stdin, flush=True)
    return Process(_server.stdout.readline().strip())


class Process:
    """What subprocess.Popen has, of a process in a session of its own; seconds: of CPU, once it has ended."""

    def __init__(self, folder):
        self._ended = pathlib.Path(folder, "ended")
        self.pid = int(pathlib.Path(folder, "pid").read_text())
        self.returncode = self.seconds = None

    def poll(self):
        if self.returncode is None and self._ended.exists():
            code, seconds = self._ended.read_text().split()
            self.returncode, self.seconds = int(code), float(seconds)
        return self.returncode

    def wait(self, timeout=600):
        until = time.monotonic() + timeout
        while self.poll() is None:
            if time.monotonic() > until:
                self.kill()
                raise subprocess.TimeoutExpired(str(self.pid), timeout)
            time.sleep(0.01)
        return self.returncode

    def send_signal(self, number):
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self):
        self.send_signal(signal.SIGKILL)


def _serve(folder):
    """For each line of standard input a process, and one that waits for it; comes back in the former alone."""
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    for number, line in enumerate(sys.stdin):
        place = pathlib.Path(folder, str(number))
        place.mkdir()
        told, tell = os.pipe()
        if not os.fork():
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            child = os.fork()
            if not child:
                os.close(told)
                os.close(tell)
                return json.loads(line)
            (place / "pid").write_text(str(child))
            os.close(tell)
            code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
            used = resource.getrusage(resource.RUSAGE_CHILDREN)
            (place / "code").write_text(f"{code} {used.ru_utime + used.ru_stime}")
            (place / "code").rename(place / "ended")
            os._exit(0)
        os.close(tell)
        os.read(told, 1)  # comes back once the other end is closed: the number is written
        os.close(told)
        print(place, flush=True)
    shutil.rmtree(folder, ignore_errors=True)
    os._exit(0)


def _become(asked):
    """What a process that is started so finds."""
    os.setsid()
    names = (os.devnull, os.O_RDONLY), (asked["out"], os.O_WRONLY), (asked["err"], os.O_WRONLY)
    for number, (name, how) in enumerate(names):
        file = os.open(name, how | os.O_CREAT | os.O_APPEND if number else how)
        os.dup2(file, number)
        os.close(file)
    os.chdir(asked["cwd"])
    import jax

    for name, text in asked["env"].items():
        if name.startswith("JAX_"):  # JAX has read its variables, of which the server has none
            jax.config.update(name.lower(), _value(text))
    os.environ.clear()
    os.environ.update(asked["env"])


def _value(text):
    try:
        return ast.literal_eval(text)
    except (SyntaxError, ValueError):
        return text


if __name__ == "__main__":
    sys.path[0] = str(ROOT)
    import pwcrf_jax

    for module in pkgutil.walk_packages(pwcrf_jax.__path__, "pwcrf_jax."):
        if not module.name.startswith("pwcrf_jax.cli.") and not module.name.endswith("__main__"):
            importlib.import_module(module.name)  # commands, which may define flags, are imported where they run
    gc.collect()
    gc.freeze()
    asked = _serve(tempfile.mkdtemp())
    _become(asked)
    form, *sys.argv = asked["words"] if asked["words"][0] in ("-c", "-m") else ["", *asked["words"]]
    sys.path[0] = os.path.dirname(os.path.abspath(sys.argv[0])) if not form else asked["cwd"]
    if form == "-m":
        if not hasattr(sys.modules.get(sys.argv[0]), "__path__"):
            sys.modules.pop(sys.argv[0], None)
        runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
    elif form == "-c":
        code, sys.argv[0] = sys.argv[0], "-c"
        exec(compile(code, "<string>", "exec"), {"__name__": "__main__"})
    else:
        runpy.run_path(sys.argv[0], run_name="__main__")
