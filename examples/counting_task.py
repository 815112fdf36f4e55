"""A task of your own: count on from a number, `7:` → `8,9,10.`; run it with

opo train recipes/quickstart.yaml task.name=examples.counting_task:CountingTask run.dir=runs/counting \\
    task.max_prompt_tokens=8 task.options.longest=5 warm_start.steps=100 train.steps=10
"""

from opo_megatron.tasks.base import PerResponseTask, Prompt

SYMBOLS = "0123456789:,."


class CountingTask(PerResponseTask):
    vocab_size = len(SYMBOLS)
    stop_tokens = (SYMBOLS.index("."),)

    def __init__(self, config):
        """config is the recipe's section `task`; `task.options` is yours."""
        self.length = config.options.get("longest", 3)
        self.notes = [f"counts on by {self.length}"]

    def size(self, split):
        return 800 if split == "train" else 100

    def prompt(self, split, index):
        """The same on every rank and in every attempt."""
        start = index if split == "train" else 800 + index
        text = f"{start}:"
        answer = ",".join(str(start + step) for step in range(1, self.length + 1))
        return Prompt(id=start, text=text, tokens=tuple(map(SYMBOLS.index, text)), answer=answer)

    def reward(self, prompt, response):
        """The share of numbers that are right."""
        given = self.decode(response).split(",")
        expected = prompt.answer.split(",")
        return sum(pair[0] == pair[1] for pair in zip(given, expected, strict=False)) / max(
            len(given), len(expected)
        )

    def demonstration(self, prompt, rng):
        """For the warm start; leave it out, and set warm_start.steps=0."""
        return [*map(SYMBOLS.index, prompt.answer), *self.stop_tokens]

    def decode(self, tokens):
        return "".join(SYMBOLS[token] for token in tokens if token not in self.stop_tokens)

    raw_text = decode
