"""The progress of a stage: its rows in log.jsonl, its lines on the terminal, and its checkpoints."""
import dataclasses
import json
import math
import os
import time
from contextlib import contextmanager

from engine.files import load_checkpoint, log_rows, save_checkpoint, write_file
from engine.parallel import barrier, rank, sums_over_ranks
from engine.settings import refuse_changes, shaped_by
from engine.terminal import UsageError, example_line, step_line

PRETRAIN_PRINT = 20  # steps of pretraining between two lines on the terminal; log.jsonl has every step


class Progress:
    """Resumes, logs, prints and saves a stage. resume.pt is saved every save_every seconds, but less often if saving
    would take more than a twentieth of the time. NAME_best.pt is the model with the best heldout_accuracy so far,
    because RL may get worse again."""

    def __init__(self, run, n: int, parts: dict):
        self.run, self.n, self.parts, self.name = run, n, parts, run.stage
        self.step = 0              # the last step that is finished
        self.seconds = 0.0         # how long the stage has taken so far
        self.saved_step = 0        # the step in resume.pt
        self.save_seconds = 0.0    # how long saving it took
        self.best = 0.0            # the best heldout_accuracy

    def resume(self) -> None:
        """Resume from resume.pt if it belongs to this stage, and remove the rows of later steps from the log."""
        run, path = self.run, self.run.path("resume")
        saved = load_checkpoint(path) if path.exists() else {"stage": None}
        if saved["stage"] == self.name:
            refuse_changes(run.cfg, saved["config"], path, shaped_by(run.stages, self.name))
            self.step = self.saved_step = saved["step"]
            self.seconds = saved["seconds"]
            for name, part in self.parts.items():
                part.load_state_dict(saved["parts"][name])
            print(f"{self.name}: resuming after step {self.step}")
        elif not rank():
            run.path(f"{self.name}_best").unlink(missing_ok=True)  # left by an earlier attempt
        del saved  # it holds a copy of the model
        barrier()  # all ranks have read resume.pt, which rank 0 may now replace
        rows = [row for row in log_rows(run.out) if row["stage"] != self.name or row["step"] <= self.step]
        write_file(run.out / "log.jsonl", "".join(json.dumps(row) + "\n" for row in rows).encode())
        self.best = max([row.get("heldout_accuracy", 0.0) for row in rows if row["stage"] == self.name], default=0.0)
        self.began = run.began - self.seconds  # so that the seconds count on from the checkpoint's
        self.first = self.step + 1
        self.looping = self.saved_at = time.perf_counter()

    @contextmanager
    def open_log(self):
        with open(os.devnull if rank() else self.run.out / "log.jsonl", "a") as self.log:
            yield

    def begin_step(self) -> None:
        self.step_began = time.perf_counter()

    def measure(self, step) -> dict[str, float | None]:
        """The metrics of a step's row: means over all ranks. Raises UsageError if one of them is not finite."""
        sums = sums_over_ranks({name: (total, step.metrics.counts[name]) for name, total in step.metrics.sums.items()})
        tokens, _ = sums.pop("tokens", (0.0, 0.0))
        row = {name: total / count if count else None for name, (total, count) in sums.items()}
        row["tokens_per_s"] = tokens / (time.perf_counter() - self.step_began)
        for name, value in row.items():
            if value is not None and not math.isfinite(value):
                last = f"{self.run.path('resume')}, step {self.saved_step}" if self.saved_step else "the stage before's"
                raise UsageError(f"{self.name}: {name} is {value} at step {step.number}; "
                                 f"the last good checkpoint is {last}; try a lower learning rate")
        return row

    def end_step(self, step, row: dict) -> None:
        """Write a step's row, print its line, and save the checkpoints that are due."""
        self.step = step.number
        self.seconds = time.perf_counter() - self.began
        row = {"stage": self.name, "step": self.step, "seconds": round(self.seconds, 2), **row}
        self.log.write(json.dumps(row) + "\n")
        self.log.flush()
        self.show(step, row)
        if row.get("heldout_accuracy", 0.0) > self.best:
            self.best = row["heldout_accuracy"]
            self.save(self.run.path(f"{self.name}_best"))
        every = self.run.cfg.save_every
        pause = max(every, 19 * self.save_seconds) if every else 0.0  # 0 saves every step
        if time.perf_counter() - self.saved_at >= pause:
            began = time.perf_counter()
            self.save(self.run.path("resume"), parts={name: part.state_dict() for name, part in self.parts.items()})
            self.saved_at, self.saved_step = time.perf_counter(), self.step
            self.save_seconds = self.saved_at - began

    def show(self, step, row: dict) -> None:
        """Print the line of a step, and at some steps one of the sampled answers."""
        number = step.number
        if step.rollout and step.asked and (number in (1, 5, 10) or number % 20 == 0):
            print(example_line(step.asked[0].question, step.rollout.texts[0], step.rollout.scores[0]["reward"]))
        if "reward" in row or number % PRETRAIN_PRINT == 0 or number == 1 or step.last:
            seconds_left = (self.n - number) * (time.perf_counter() - self.looping) / (number + 1 - self.first)
            print(step_line(f"{self.name} {number}/{self.n}", row, seconds_left), flush=True)

    def save(self, path, **more) -> None:
        """Save the stage's model as it is now, together with `more`."""
        model = self.parts["model"]
        save_checkpoint(path, {"nanor1": 1, "stage": self.name, "step": self.step, "seconds": self.seconds,
                               "config": dataclasses.asdict(self.run.cfg), "shape": dataclasses.asdict(model.config),
                               "model": model.state_dict(), **more})

    def end(self) -> None:
        """Finish the stage: write NAME.pt and remove resume.pt."""
        self.save(self.run.path(self.name))
        if not rank():
            self.run.path("resume").unlink(missing_ok=True)
        barrier()  # no rank reads NAME.pt before rank 0 has written it
