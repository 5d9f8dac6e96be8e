"""An engine that has no model at work: it answers one question after another, each after a while."""

import os
import queue
import threading
import time
from typing import Any

from fastvlm_mlx.generation.request import Handle, Request
from fastvlm_mlx.generation.result import GenerationResult, Timings


def put_to_sleep(engine: type[Any]) -> None:
    """Replaces how a class such as `Engine` answers; `FASTVLM_SLEEP` says after how many seconds."""
    seconds = float(os.environ["FASTVLM_SLEEP"])
    waiting: queue.SimpleQueue[Handle] = queue.SimpleQueue()
    room = threading.Semaphore(48)

    def submit(_: Any, request: Request, *, wait: bool = True, on_change: Any = None) -> Handle:
        del wait
        room.acquire()
        handle = Handle(request, on_change)
        waiting.put(handle)
        return handle

    def answer() -> None:
        while True:
            handle = waiting.get()
            time.sleep(seconds)
            timings = Timings(preprocess=0.0, ttft=seconds, decode=0.0, total=seconds, queue=0.0)
            handle.add(
                [
                    GenerationResult(
                        text="a picture",
                        token_ids=(1, 2),
                        prompt_tokens=20,
                        visual_tokens=16,
                        generated_tokens=2,
                        finish_reason="stop",
                        timings=timings,
                    )
                ]
            )
            handle.end()
            room.release()

    engine.submit = submit
    threading.Thread(target=answer, daemon=True).start()
