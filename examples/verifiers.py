"""Verifiers of your own, for task.name=text: task.verifier=examples.verifiers:short_and_right"""

import asyncio


def short_and_right(prompt, response, answer):
    """One response: 1 where it contains the answer, less for every character beyond 200."""
    return float(answer in response) * min(1.0, 200 / max(1, len(response)))


async def judged(prompt, response, answer):
    """Many at the same time; here is where a model would be asked."""
    await asyncio.sleep(0.01)
    return float(response.strip().endswith(answer))


def ranked(prompts, responses, answers):
    """A batch; None is the default reward, which is counted."""
    pairs = zip(responses, answers, strict=True)
    return [float(answer in response) if response.strip() else None for response, answer in pairs]
