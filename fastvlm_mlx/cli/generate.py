"""`fastvlm generate`: one question about one or several images, streamed to stdout."""

from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fastvlm_mlx.cli.inputs import load_named, read_stdin, shortened
from fastvlm_mlx.cli.options import (
    DEFAULT_MODEL,
    DEFAULT_PROMPT,
    Background,
    LoadDType,
    Model,
    Resolution,
    Revision,
    refuse,
)
from fastvlm_mlx.cli.terminal import ByteProgress, LiveLine, note, show, show_answer, show_json, warn_of_slow_blas
from fastvlm_mlx.cli.usage import is_given, usage_errors
from fastvlm_mlx.errors import FastVLMError
from fastvlm_mlx.formatting import as_text, readable_bytes

if TYPE_CHECKING:
    from fastvlm_mlx import Choice, FastVLM, FastVLMProcessor, GenerationResult


def generate(
    context: typer.Context,
    images: Annotated[
        list[str] | None, typer.Argument(metavar="IMAGE", help="Files, URLs or data: URLs; - reads one from stdin.")
    ] = None,
    prompt: Annotated[
        str | None,
        typer.Option(
            "--prompt", "-p", metavar="TEXT", help=f"The question; - reads it from stdin. [default: {DEFAULT_PROMPT}]"
        ),
    ] = None,
    model: Model = DEFAULT_MODEL,
    revision: Revision = None,
    max_tokens: Annotated[
        int,
        typer.Option(
            "--max-tokens",
            "-n",
            metavar="N",
            min=1,
            envvar="FASTVLM_MAX_TOKENS",
            help="Longest answer, in tokens.",
        ),
    ] = 256,
    temperature: Annotated[
        float,
        typer.Option("--temp", "-t", metavar="N", min=0.0, help="Sampling temperature; 0 takes the most likely token."),
    ] = 0.0,
    top_p: Annotated[
        float, typer.Option(metavar="N", min=0.0, max=1.0, help="Sample from this much of the probability.")
    ] = 1.0,
    top_k: Annotated[
        int, typer.Option(metavar="N", min=0, help="Sample from the k most likely tokens; 0 from all.")
    ] = 0,
    min_p: Annotated[
        float,
        typer.Option(metavar="N", min=0.0, max=1.0, help="Least probability, relative to the most likely token."),
    ] = 0.0,
    repetition_penalty: Annotated[
        float, typer.Option(metavar="N", min=0.0, help="Above 1 discourages repetition.")
    ] = 1.0,
    seed: Annotated[int | None, typer.Option(metavar="N", min=0, help="Makes sampling repeatable.")] = None,
    system: Annotated[str | None, typer.Option(metavar="TEXT", help="Replaces the system prompt.")] = None,
    stop: Annotated[
        list[str] | None, typer.Option(metavar="TEXT", help="Ends the answer before this text; may be repeated.")
    ] = None,
    choice: Annotated[
        list[str] | None,
        typer.Option(metavar="TEXT", help="Give the probability of this answer and of the other choices instead."),
    ] = None,
    resolution: Resolution = None,
    background: Background = None,
    dtype: LoadDType = None,
    as_json: Annotated[
        bool,
        typer.Option(
            "--json",
            help="Print one JSON object instead of streaming text; generated_tokens counts the end token, which "
            "token_ids leaves out, and prompt_tokens counts an image as its visual_tokens.",
        ),
    ] = False,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Token counts, speed and memory on stderr.")] = False,
) -> None:
    """Answer a question about images.

    The answer streams to stdout. Several images make one question about all of them; without images, --prompt is
    answered as plain text. With --choice yes --choice no, nothing is generated: the choices are listed, the most
    probable first.
    """
    if not images and prompt is None:
        raise typer.BadParameter("give an image, or a question with --prompt", param_hint="IMAGE")
    if not images:
        refuse(["--resolution"] if is_given(context, "resolution") else [], "without an image")
    if choice:
        from fastvlm_mlx.arguments import check_choices

        options = (
            "max_tokens",
            "temperature",
            "top_p",
            "top_k",
            "min_p",
            "repetition_penalty",
            "seed",
            "stop",
            "verbose",
        )
        names = {"temperature": "--temp"}
        given = [name for name in (*options, "verbose") if is_given(context, name)]
        refuse([names.get(name, f"--{name.replace('_', '-')}") for name in given], "with --choice")
        with usage_errors():
            check_choices(choice)
    elif not temperature:
        sampling = {"--top-p": top_p < 1, "--top-k": top_k > 0, "--min-p": min_p > 0, "--seed": seed is not None}
        refuse([option for option, given in sampling.items() if given], "at temperature 0; give --temp, too")

    from fastvlm_mlx.engine.options import GenerationConfig

    with usage_errors():
        config = GenerationConfig(
            max_tokens=max_tokens,
            temperature=temperature,
            top_p=top_p,
            min_p=min_p,
            top_k=top_k,
            repetition_penalty=repetition_penalty,
            seed=seed,
            stop=stop or (),
        )
    sources, question = read_stdin(images or [], DEFAULT_PROMPT if prompt is None else prompt)

    from concurrent.futures import ThreadPoolExecutor
    from functools import partial

    from fastvlm_mlx import choose, load, stream_generate
    from fastvlm_mlx.inputs.images import load_image
    from fastvlm_mlx.resolve import find, is_damaged, remake

    read = partial(load_image, background=background, notify=_note_transparency)
    with LiveLine() as line, ThreadPoolExecutor() as pool:  # images are decoded while weights are read
        loading = [pool.submit(load_named, read, source, prompt) for source in sources]

        def announce(message: str) -> None:
            """Notes a slow step, such as a download, once every image is known to be one."""
            for image in loading:
                image.result()
            note(message)

        if find(model, revision=revision) is None:  # the Hub will be asked
            for image in loading:
                image.result()

        def loaded() -> "tuple[FastVLM, FastVLMProcessor]":
            line.wait_for(f"loading {model}")
            with ByteProgress() as progress:
                return load(
                    model,
                    dtype=dtype.value if dtype else None,
                    revision=revision,
                    notify=announce,
                    progress=progress,
                    lazy=True,
                )

        def ask(network: "FastVLM", processor: "FastVLMProcessor") -> None:
            """Writes the answer, piece by piece."""
            shown = [image.result() for image in loading]
            warn_of_slow_blas()
            line.wait_for(_activity(len(shown)))
            if choice:
                chosen.extend(
                    choose(
                        network,
                        processor,
                        choice,
                        image=shown or None,
                        prompt=question,
                        system=system,
                        resolution=resolution,
                    )
                )
                return
            for piece in stream_generate(
                network,
                processor,
                image=shown or None,
                prompt=question,
                system=system,
                resolution=resolution,
                config=config,
                free_tower=True,
            ):
                pieces.append(piece)
                if as_json:
                    line.show(f"answering: token {piece.generated_tokens}")
                else:
                    line.clear()
                    show_answer(piece.text)

        pieces: list[GenerationResult] = []
        chosen: list[Choice] = []
        network, processor = loaded()
        try:
            ask(network, processor)
        except FastVLMError as error:
            if pieces or not is_damaged(model, error, revision=revision):
                raise
            with ByteProgress() as progress:
                remake(model, error, revision=revision, notify=announce, progress=progress)
            ask(*loaded())
    asked = {
        "model": model,
        "images": ["<stdin>" if name == "-" else shortened(name) for name in images or []],
        "prompt": question,
    }
    if choice:
        _show_choices(chosen, asked if as_json else None)
        return
    text = "".join(piece.text for piece in pieces)
    last = pieces[-1]
    if as_json:
        show_json(
            {
                **asked,
                "text": text,
                "token_ids": [token for piece in pieces for token in piece.token_ids],
                **_statistics(last),
            }
        )
    else:
        if not text.endswith("\n"):
            show_answer("\n")
        if last.finish_reason == "length":
            more = "--max-tokens allows more" if last.generated_tokens >= max_tokens else "the context is full"
            note(f"the answer was cut after {last.generated_tokens} tokens; {more}")
    if verbose:
        _summarize(last)


def _show_choices(choices: "list[Choice]", asked: dict[str, Any] | None) -> None:
    """Writes the choices, the most probable first: as JSON behind what was asked, or as a table."""
    ranked = sorted(choices, key=lambda choice: -choice.probability)
    if asked is not None:
        show_json({**asked, "choices": [asdict(choice) for choice in ranked]})
        return
    rows = [(choice.text, f"{choice.probability:.1%}", f"{choice.corrected:.1%}") for choice in ranked]
    show(as_text([("choice", "probability", "length-corrected"), *rows]))


def _activity(images: int) -> str:
    """What the model does before it answers."""
    return "looking at the image" if images == 1 else "looking at the images" if images else "reading"


def _note_transparency(name: str) -> None:
    note(f"{name}: shows the colours stored in its transparent pixels; --background white shows white there")


def _statistics(result: "GenerationResult") -> dict[str, Any]:
    """The statistics of a finished answer: tokens, seconds by part, tokens per second, bytes."""
    from fastvlm_mlx.backend import mx

    return {
        "prompt_tokens": result.prompt_tokens,
        "visual_tokens": result.visual_tokens,
        "generated_tokens": result.generated_tokens,
        "finish_reason": result.finish_reason,
        "timings": asdict(result.timings),
        "tokens_per_second": result.tokens_per_second,
        "peak_memory_bytes": mx.get_peak_memory(),
    }


def _summarize(result: "GenerationResult") -> None:
    """Writes the statistics of a finished answer for the reader."""
    from fastvlm_mlx.backend import mx

    note(f"prompt: {result.prompt_tokens} tokens, {result.visual_tokens} of them visual")
    note(f"answer: {result.generated_tokens} tokens, ended by {result.finish_reason}")
    timings = ", ".join(f"{stage} {seconds:.3f} s" for stage, seconds in asdict(result.timings).items())
    note(f"time:   {timings}; {result.tokens_per_second:.1f} tokens/s")
    note(f"memory: {readable_bytes(mx.get_peak_memory())} at the peak")
