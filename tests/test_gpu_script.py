"""experiments/gpu.sh: a minute of a GPU must not be lost on a slip, so the script is tried here without one."""
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PARTS = ("tests", "default", "bench", "smollm2", "ranks")


def run(*arguments, python=sys.executable, **environment):
    """Run the script -> the finished process."""
    environment = {**os.environ, "PYTHON": str(python), "OMP_NUM_THREADS": "1", **environment}
    return subprocess.run(["bash", "experiments/gpu.sh", *arguments], cwd=ROOT, env=environment, capture_output=True,
                          text=True, timeout=300)


@pytest.fixture
def fake(tmp_path):
    """A program in place of python. It writes down its arguments, and makes the folder that --out names."""
    program = tmp_path / "python"
    program.write_text(f"""#!/usr/bin/env bash
echo "$*" >> {tmp_path}/calls
for argument in "$@"; do
    case $argument in --out=*)
        mkdir -p "${{argument#*=}}" && cd "${{argument#*=}}"
        echo report > report.md && echo results > results.json ;;
    esac
done
case "$*" in *smollm2.py*) exit 2 ;; esac
""")
    program.chmod(0o755)
    return program


def test_the_parts_run_with_tiny_sizes(tmp_path):
    """A flag that train.py does not have must be noticed here."""
    done = run("--tiny", "--minutes=20", f"--out={tmp_path}", "bench", "default")
    assert done.returncode == 0, done.stderr
    lines = (tmp_path / "summary.txt").read_text().splitlines()
    assert [line.partition(" after")[0] for line in lines[1:]] == [
        f"{part}: exit code 0" for part in ("bench", "default")], done.stdout
    text = (tmp_path / "default.txt").read_text()
    assert "from the command to the report:" in text and '"models"' in text and "|problems|" in text


def test_all_parts_in_order_of_worth(tmp_path, fake):
    """Without names all parts must run, and each part's output must be there when it ends."""
    out = tmp_path / "out"
    assert run("--minutes=20", f"--out={out}", python=fake).returncode == 0
    assert {path.name for path in out.iterdir()} == {"summary.txt", *(f"{part}.txt" for part in PARTS)}
    calls = (tmp_path / "calls").read_text().splitlines()
    wanted = ("-m pytest -q tests/test_gpu.py", "train.py", "experiments/bench.py --only=sampling, 512 x 48",
              "experiments/bench.py --only=grpo --dtype=bfloat16", "experiments/smollm2.py",
              "-m torch.distributed.run --standalone --nproc_per_node=2 train.py --preset=tiny")
    assert [call.startswith(start) for call, start in zip(calls[1:], wanted)] == [True] * len(wanted)
    assert "report\nresults" in (out / "default.txt").read_text()
    assert "smollm2: exit code 2" in (out / "summary.txt").read_text()


def test_the_memory_of_the_gpu_is_shown(tmp_path, fake):
    """nvidia-smi prints the memory in use each second, and the largest value counts."""
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/usr/bin/env bash\nprintf '%s\\n' 900 failed 1200 1100\nexec sleep 60\n")
    tool.chmod(0o755)
    fake.write_text(fake.read_text() + "sleep 1\n")  # the tool needs a moment
    path = f"{tmp_path}:{os.environ['PATH']}"
    assert run("--minutes=20", f"--out={tmp_path}/out", "default", python=fake, PATH=path).returncode == 0
    assert "most memory of the GPU in use, MiB: 1200\n" in (tmp_path / "out" / "default.txt").read_text()


def test_a_part_that_does_not_fit_is_left_out(tmp_path, fake):
    """A long part must not be begun and cut off, and shorter parts after it must still run."""
    out = tmp_path / "out"
    assert run("--minutes=2", f"--out={out}", "smollm2", "ranks", python=fake).returncode == 0
    smollm2, ranks = (out / "summary.txt").read_text().splitlines()
    assert smollm2.startswith("smollm2: left out; it needs 5 minutes, and 1") and ranks.startswith("ranks: exit code 0")
    assert not (out / "smollm2.txt").exists()


def test_a_wheel_in_pieces_is_put_together(tmp_path, fake):
    """The model's wheel is too large to be carried whole."""
    wheels = tmp_path / "wheels"
    wheels.mkdir()
    for name, text in (("model-1.whl.partaa", "one "), ("model-1.whl.partab", "two"), ("other.whl", "three")):
        (wheels / name).write_text(text)
    assert run("--minutes=20", f"--out={tmp_path}/out", "bench", python=fake, WHEELS=str(wheels)).returncode == 0
    assert (wheels / "model-1.whl").read_text() == "one two"
    assert f"--find-links={wheels} {wheels}/model-1.whl {wheels}/other.whl" in (tmp_path / "calls").read_text()


def test_bad_input(tmp_path, fake):
    """A misspelt flag or part must not use up the time."""
    for argument in ("--minute=3", "defualt"):
        done = run(argument, f"--out={tmp_path}/out", python=fake)
        assert done.returncode == 2 and done.stderr.startswith("gpu.sh: ") and done.stderr.count("\n") == 1
