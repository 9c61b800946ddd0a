"""A DSPy program whose model is fine-tuned at a gateway: bootstrapped, failed and cancelled.

Run by test_orchestrators.py, in an environment of DSPy's; prints what became of each as JSON.
"""

import json
import os
import time

import dspy
from dspy.utils import DummyLM

from training_backends.integrations.dspy import TrainingProvider

gateway = {"api_base": os.environ["GATEWAY"], "api_key": os.environ["GATEWAY_KEY"]}
student_lm = dspy.LM(
    "openai/tiny-mistral",
    provider=TrainingProvider("openai"),
    train_kwargs={"hyperparameters": {"epochs": 1}},
    max_tokens=8,
    cache=False,
    **gateway,
)
rows = [{"prompt": f"{n} + 1?", "completion": f"{n + 1}"} for n in range(12)]


def bootstrapped() -> str:
    """Let a teacher answer, and train the student's model on its answers."""
    examples = [
        dspy.Example(question=f"{n} + 1?", answer=str(n + 1)).with_inputs("question")
        for n in range(12)
    ]
    teacher = dspy.Predict("question -> answer")
    teacher.set_lm(DummyLM([{"answer": example.answer} for example in examples]))
    student = dspy.Predict("question -> answer")
    student.set_lm(student_lm)
    optimizer = dspy.BootstrapFinetune(
        num_threads=1, train_kwargs={student_lm: {"hyperparameters": {"epochs": 1}}}
    )
    tuned = optimizer.compile(student, trainset=examples, teacher=teacher)
    answer = tuned.lm("4 + 1?")
    assert isinstance(answer[0], str)
    return str(tuned.lm.model)


def failed() -> str:
    """Too few rows are no training."""
    found = student_lm.finetune(rows[:3], "completion").result()
    return f"{type(found).__name__}: {found}"


def cancelled() -> list[str]:
    """Stop a run that has been launched."""
    job = student_lm.finetune(rows, "completion", {"hyperparameters": {"epochs": 50}})
    while job.status() == "not_started":
        time.sleep(0.2)
    job.cancel()
    job.thread.join()
    return [job.status().value, str(job.cancelled())]


if __name__ == "__main__":
    print(json.dumps({"tuned": bootstrapped(), "failed": failed(), "cancelled": cancelled()}))
