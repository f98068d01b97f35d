"""The workflow that users copy: what it runs must be there."""

import re
import shlex
from pathlib import Path

import pytest
import yaml

from deepkd_plugin.commands.apply import KNOWN

ROOT = Path(__file__).parents[1]
JOBS = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text())["jobs"]


def commands(job):
    return [step["run"] for step in JOBS[job]["steps"] if "run" in step]


def test_python_and_torch_versions_are_those_that_setup_names():
    matrix = JOBS["tests"]["strategy"]["matrix"]
    setup = (ROOT / "setup.py").read_text()
    assert matrix["python"][0] == re.search(r'python_requires=">=([\d.]+)"', setup).group(1)
    oldest = re.search(r'"torch>=([\d.]+)"', setup).group(1)
    assert matrix["torch"][0].startswith(f"torch=={oldest}.* ")
    assert len(matrix["torch"]) == 2


@pytest.mark.parametrize("job", JOBS)
def test_the_slow_tests_run_too(job):
    (command,) = (command for command in commands(job) if command.startswith("pytest"))
    assert shlex.split(command)[1:3] == ["-m", ""]


def test_the_contract_job_pins_the_mdistiller_that_apply_knows():
    (checkout,) = (step["with"] for step in JOBS["mdistiller"]["steps"] if "repository" in step.get("with", {}))
    assert any(checkout["ref"].startswith(commit) for commit in KNOWN["tools/train.py"].values())
    (command,) = (command for command in commands("mdistiller") if command.startswith("pytest"))
    tests = [word for word in shlex.split(command) if word.startswith("tests/")]
    assert tests
    assert all((ROOT / path).exists() for path in tests)
    assert f"-e ./{checkout['path']}" in " ".join(commands("mdistiller"))
