"""The heart alone: model.py, rewards.py, grpo.py and distill.py must work if nothing of engine/ can be imported."""
import copy
import re
import subprocess
import sys

import pytest
import torch

from data.arithmetic import Arithmetic, parse
from distill import DistillConfig, distill_step
from grpo import GRPOConfig, grpo_step
from model import GPT, GPTConfig
from tests.conftest import ROOT

TASK = Arithmetic()
PROBLEMS = [parse(question) for question in ("1+2", "3*4", "20-7", "8*7-19")]
OF_ENGINE = "import sys; print([name for name in sys.modules if name.split('.')[0] == 'engine'])"


def python(code):
    """Run the code in a new process, in the repository's folder -> the lines that it prints."""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_the_heart_imports_nothing_of_engine():
    """If the heart, or a module that it imports, imported engine/, a fork could not take these files alone. Other tests
    cannot see this bug, because they have imported engine/ already."""
    assert python(f"import model, rewards, grpo, distill; {OF_ENGINE}") == ["[]"]
    assert (ROOT / "engine" / "optimizer.py").exists(), "the name that is looked for should be a folder's here"


@pytest.fixture
def alone(monkeypatch):
    """Every import from engine/ is an error, also inside a function."""
    for name in ("engine", *sys.modules):
        if name.split(".")[0] == "engine":
            monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ImportError):
        import engine.optimizer


class Adam(torch.optim.Adam):
    """An optimizer with only the method that a step uses."""

    def step(self, lr_scale, share=1.0, has_gradient=True):
        norm = torch.nn.utils.clip_grad_norm_(self.param_groups[0]["params"], 1.0)
        super().step()
        self.zero_grad()
        return norm


def tiny(seed):
    """A model with random weights and the default block_size, which has room for the longest completion of a step."""
    torch.manual_seed(seed)
    return GPT(GPTConfig(TASK.encoding.n_vocab, n_layer=1, n_head=1, n_embd=16))


def digits(text, problem):
    """A reward that differs among random answers: the number of digits."""
    return {"reward": sum(map(str.isdigit, text)), "accuracy": 1.0}


def state(*models):
    """A copy of all weights, and of the state of torch's global generator."""
    return copy.deepcopy([model.state_dict() for model in models]), torch.get_rng_state()


def assert_unchanged(before, after):
    (weights, rng), (other_weights, other_rng) = before, after
    assert torch.equal(rng, other_rng), "a step draws from the generator that it is given, and from no other"
    for model, other in zip(weights, other_weights, strict=True):
        assert model.keys() == other.keys() and all(torch.equal(model[name], other[name]) for name in model)


def assert_trained(before, model):
    assert all(not torch.equal(before[name], value) for name, value in model.named_parameters())
    assert all(value.isfinite().all() and value.dtype == torch.float32 for value in model.parameters())
    assert all(value.grad is None and value.requires_grad for value in model.parameters())


def test_grpo_alone(alone):
    """A step must not need a setting that only the command line fills in, or a method that only engine/ has. With
    torch, the plain `generate` and the default settings, it must train the policy and change nothing else."""
    policy, reference = tiny(seed=0), tiny(seed=1)
    policy_before, before = copy.deepcopy(policy.state_dict()), state(reference)
    metrics, rollout = grpo_step(policy, reference, Adam(policy.parameters(), lr=1e-3), PROBLEMS, digits, TASK,
                                 GRPOConfig(), torch.Generator().manual_seed(0))
    means = metrics.means()
    assert len(rollout.texts) == 4 * GRPOConfig().rl_samples and means["length"] > 40
    assert means["kl"] > 0 and means["grad_norm"] > 0 and means["sampler_gap"] < 1e-4
    assert_trained(policy_before, policy)
    assert_unchanged(before, state(reference))
    assert all(value.grad is None for value in reference.parameters())


def test_distillation_alone(alone):
    """The same for distillation: a step must train the student, and change nothing else."""
    student, teacher = tiny(seed=0), tiny(seed=1)
    student_before, before = copy.deepcopy(student.state_dict()), state(teacher)
    metrics = distill_step(student, teacher, Adam(student.parameters(), lr=1e-3), PROBLEMS * 4, digits, TASK,
                           DistillConfig(), torch.Generator().manual_seed(0))
    means = metrics.means()
    assert means["accepted"] == 1 and means["loss"] > 0 and means["grad_norm"] > 0
    assert_trained(student_before, student)
    assert_unchanged(before, state(teacher))
    assert all(value.grad is None for value in teacher.parameters())


def test_the_task_of_the_docs_has_sums_alone():
    """The program with a task of its own in docs/own.md must run as it is."""
    section = (ROOT / "docs" / "own.md").read_text().split("`python train.py` on sums alone.")[1]
    code = re.search(r"```python\n(.*?)```", section, re.DOTALL)[1]
    ask = "import random\ntask = make_task(Config())\nprint(task.make_problem(random.Random(0), n_ops=(3, 3)).question)"
    question, = python(f"{code.partition('if __name__')[0]}\n{ask}")
    assert re.fullmatch(r"\d+(\+\d+){3}", question)


def test_the_script_of_the_docs_learns():
    """The script in docs/own.md must run as it is, without engine/, and its reward must rise."""
    section = (ROOT / "docs" / "own.md").read_text().split("## GRPO in your own script\n")[1]
    code = re.search(r"```python\n(.*?)```", section, re.DOTALL)[1]
    *lines, of_engine = python(f"{code}\n{OF_ENGINE}")
    rewards = [float(re.search(r"reward (\d\.\d+)", line)[1]) for line in lines]
    assert len(rewards) == 20 and rewards[0] < 0.2 and rewards[-1] > 0.8, rewards
    assert of_engine == "[]"
