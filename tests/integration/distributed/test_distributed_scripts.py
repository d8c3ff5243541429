"""Scripts of clusters, with commands of the cluster that only write down how they were called."""

import configparser
import os
import re
import subprocess

import pytest
import yaml
from absl import flags
from faults.kill import ROOT

from pwcrf_jax import config as configs
from pwcrf_jax.cli import command as cli
from pwcrf_jax.cli import train

GCLOUD = """#!/bin/sh
echo "$*" >> log
case "$*" in
*" describe "*) cat state 2>/dev/null || exit 1 ;;
*" create "*) sed 1d states > rest; head -n 1 states > state; mv rest states ;;
*" delete "*) rm -f state ;;
*"pwcrf train"*)
    code=$(head -n 1 codes); sed 1d codes > rest; mv rest codes
    [ "$code" != 255 ] || rm state
    exit "$code" ;;
esac
"""


@pytest.fixture
def gcloud(tmp_path):
    """gcloud(codes, *words): the script's end, and calls of gcloud. codes: of training; 255: its slice is gone."""
    (tmp_path / "gcloud").write_text(GCLOUD)
    (tmp_path / "gcloud").chmod(0o755)

    def run(codes, *words, states=("ACTIVE",) * 9):
        (tmp_path / "codes").write_text("".join(f"{code}\n" for code in codes))
        (tmp_path / "states").write_text("".join(f"{state}\n" for state in states))
        (tmp_path / "log").write_text("")
        environment = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}", "PWCRF_POLL": "0"}
        done = subprocess.run(
            ["bash", ROOT / "scripts/tpu_vm.sh", *words], cwd=tmp_path, env=environment, capture_output=True, text=True
        )
        return done, (tmp_path / "log").read_text().splitlines()

    return run


RUN = ("run", "pod", "us-a", "v5litepod-16", "image", "git+https://x@v1", "--spot", "--", "--config", "voc_vgg16")
RUN += ("--workdir", "gs://b/it's mine")


def test_a_slice_is_made_again_until_the_run_is_finished(gcloud):
    done, calls = gcloud([255, 143, 0], *RUN)
    assert done.returncode == 0, done.stderr
    kinds = [re.search(r" (create|describe|delete) |pwcrf train|pip install", call)[0].strip() for call in calls]
    once = ["create", "pip install", "pwcrf train"]
    assert [kind for kind in kinds if kind != "describe"] == [*once, *once, "pwcrf train"]
    assert "--spot" in calls[1] and "--accelerator-type=v5litepod-16 --runtime-version=image" in calls[1]
    remote = next(call for call in calls if "pwcrf train" in call).partition("--command=")[2]
    shown = subprocess.run(["bash", "-c", f"printf '%s\\n' {remote}"], capture_output=True, text=True).stdout
    assert shown.splitlines()[1:] == [
        "train",
        "--distributed",
        "--config",
        "voc_vgg16",
        "--workdir",
        "gs://b/it's mine",
    ]


def test_an_error_of_the_run_ends_the_script_with_its_code(gcloud):
    done, calls = gcloud([2], *RUN)
    assert done.returncode == 2 and sum("pwcrf train" in call for call in calls) == 1


def test_a_request_that_fails_is_one_line(gcloud):
    done, calls = gcloud([], "create", "pod", "us-a", "v5litepod-16", "image", states=["FAILED"])
    assert done.returncode == 1 and done.stderr == "error: the request pod is FAILED; delete it and try again\n"
    done, calls = gcloud([], *RUN, states=["SUSPENDED"])
    assert done.returncode == 1 and "pod is SUSPENDED" in done.stderr and "delete" in calls[1]


@pytest.mark.parametrize("words", [[], ["start"], ["train", "pod", "zone"], ["create", "pod"], [*RUN[:7], "--"]])
def test_other_words_show_how_it_is_called(gcloud, words):
    done, calls = gcloud([], *words)
    assert done.returncode == 2 and "scripts/tpu_vm.sh create" in done.stderr and not calls


@pytest.mark.parametrize(("code", "queued"), [(143, True), (0, False), (2, False)])
def test_a_job_of_slurm_is_queued_again_where_it_was_saved(tmp_path, code, queued):
    for name, text in {"srun": f'echo "$*" >> log; exit {code}', "scontrol": 'echo "scontrol $*" >> log'}.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{text}\n")
        (tmp_path / name).chmod(0o755)
    environment = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_JOB_ID": "7"}
    words = ["bash", ROOT / "scripts/slurm.sh", "--config", "voc_vgg16", "--workdir", "gs://bucket/run"]
    done = subprocess.run(words, cwd=tmp_path, env=environment | {"PWCRF_HOME": str(tmp_path)})
    calls = (tmp_path / "log").read_text().splitlines()
    assert done.returncode == code and calls[0].endswith("train.py --distributed " + " ".join(words[2:]))
    assert calls[1:] == (["scontrol requeue 7"] if queued else [])


def test_the_job_of_kubernetes_is_a_command_of_ours(monkeypatch, tmp_path):
    job = yaml.safe_load((ROOT / "scripts/jobset.yaml").read_text())["spec"]["replicatedJobs"][0]["template"]["spec"]
    pod = job["template"]["spec"]
    hosts, chips = job["parallelism"], pod["containers"][0]["resources"]["limits"]["google.com/tpu"]
    rows, cols = map(int, pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"].split("x"))
    assert hosts == job["completions"] and hosts * chips == rows * cols
    name, *words = pod["containers"][0]["args"]
    assert sum("=gs://my-bucket/" in word for word in words) == 3
    words = [word.replace("gs://my-bucket", str(tmp_path)) for word in words]  # gcsfs is not everywhere
    values = flags.FlagValues()
    cli.define(train.define_flags, values)
    monkeypatch.setattr("sys.argv", ["pwcrf", *words])  # where ml_collections looks for the overrides
    cli.parse(["pwcrf", *words], values)
    assert name == "train" and values["distributed"].value
    configs.validate(values["config"].value, num_devices=hosts * chips)


def test_the_image_has_extras_and_a_command_that_there_are():
    text, setup = (ROOT / "scripts/Dockerfile").read_text(), configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    wanted = re.search(r"/src\[([\w,]+)\]", text)[1].split(",")
    assert {"train", "gcs"} <= set(wanted) <= set(setup["options.extras_require"])
    entry = re.search(r'ENTRYPOINT \["(\w+)"\]', text)[1]
    assert f"{entry} = " in setup["options.entry_points"]["console_scripts"]
