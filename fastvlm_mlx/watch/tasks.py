"""What to tell of a picture: ready-made questions, and those of a user's own."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from fastvlm_mlx.jobs.captions import remove_opening

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from fastvlm_mlx.generation.request import Request
    from fastvlm_mlx.inputs.resolution import Resolution


@dataclass(frozen=True, kw_only=True)
class Task:
    """A question that is asked about picture after picture.

    Attributes:
        name: As the command line has it.
        prompt: The question.
        sentence: Whether the first sentence of the answer is all that is told.
        max_tokens: The longest answer.
        thing: What to find, if that is the question.
    """

    name: str
    prompt: str
    sentence: bool = True
    max_tokens: int = 80
    thing: str | None = None

    def clean(self, sentence: str) -> str:
        """A sentence as it is told: without a phrase such as "The image shows"; before a bare yes, the thing."""
        if self.thing is not None and sentence.strip(".! ").casefold() in ("yes", "no"):
            return f"{self.thing}: {sentence}"
        return remove_opening(sentence) if self.sentence else sentence


# The first three begin with words of the app that Apple published with FastVLM.
TASKS = {
    task.name: task
    for task in (
        Task(
            name="describe",
            prompt="Describe the image in English. Output should be brief, about 15 words or less.",
        ),
        Task(
            name="read",
            prompt="What is written in this image? Output only the text in the image.",
            sentence=False,
            max_tokens=300,
        ),
        Task(
            name="people",
            prompt="Describe the people in the image: how many there are, where they are, what they do and their "
            "facial expressions. Output should be brief, about 20 words or less. If there is nobody, say only: nobody.",
        ),
        Task(
            name="hazards",
            prompt="Name what could hurt or block a person who walks here, such as vehicles, steps, edges and "
            "obstacles, and where it is. Begin with the most dangerous. Output should be brief, about 15 words or "
            "less. If there is nothing, say only: no hazards seen.",
        ),
    )
}
FIND = "find"


def task_of(name: str, *, thing: str | None = None, prompt: str | None = None) -> Task:
    """A task by its name; `thing` is what to find, and `prompt` a question that takes the place of the task's own."""
    finding = Task(name=FIND, prompt=f"Is there {thing} in the picture?", thing=thing)
    task = finding if name == FIND else TASKS[name]
    if prompt is not None:
        return Task(name=task.name, prompt=prompt, sentence=False, max_tokens=max(task.max_tokens, 120))
    return task


def request_of(task: Task, pixels: NDArray[Any], *, resolution: Resolution, question: str | None = None) -> Request:
    """The request for a picture (H, W, 3); a question takes the place of the task's."""
    from fastvlm_mlx.engine.options import GenerationConfig
    from fastvlm_mlx.generation.request import Request

    return Request(
        image=pixels,
        prompt=task.prompt if question is None else question,
        resolution=resolution,
        sentence=question is None and task.sentence,
        config=GenerationConfig(max_tokens=task.max_tokens if question is None else 300),
    )
