"""`fastvlm generate`: one question about one or several images, streamed to stdout."""

from typing import Annotated

import typer

from fastvlm_mlx.cli.answering import Asked, answer
from fastvlm_mlx.cli.inputs import expand, read_schema, read_stdin
from fastvlm_mlx.cli.options import (
    DEFAULT_MODEL,
    DEFAULT_PROMPT,
    Background,
    Detail,
    Frames,
    LoadDType,
    Model,
    Resolution,
    Revision,
    Warm,
    refuse,
    with_detail,
)
from fastvlm_mlx.cli.showing import Showing
from fastvlm_mlx.cli.terminal import LiveLine
from fastvlm_mlx.cli.usage import CHECK_FAILED, is_given, usage_errors


def generate(
    context: typer.Context,
    images: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="IMAGE",
            help="Files, URLs or data: URLs; - reads one from stdin. Also film.mp4#t=2.5, paper.pdf#1-3, @screen, "
            "@clipboard, @camera.",
        ),
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
    schema: Annotated[
        str | None,
        typer.Option(
            metavar="FILE", help="Answer with JSON of the JSON schema in a file; json stands for any JSON object."
        ),
    ] = None,
    choice: Annotated[
        list[str] | None,
        typer.Option(metavar="TEXT", help="Give the probability of this answer and of the other choices instead."),
    ] = None,
    frames: Frames = None,
    resolution: Resolution = None,
    detail: Detail = None,
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
    warm: Warm = True,
) -> None:
    """Answer a question about images.

    The answer streams to stdout. Several images make one question about all of them, and so do the frames of a film and
    the pages of a PDF; without images, --prompt is answered as plain text. With --choice yes --choice no, nothing is
    generated: the choices are listed, the most probable first. With --schema, an answer that is cut off is no JSON, and
    makes the exit code 3.
    """
    if not images and prompt is None:
        raise typer.BadParameter("give an image, or a question with --prompt", param_hint="IMAGE")
    if not images:
        refuse({"--resolution": is_given(context, "resolution")}, "without an image")
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
            "schema",
            "verbose",
        )
        names = {"temperature": "--temp"}
        given = [name for name in options if is_given(context, name)]
        refuse([names.get(name, f"--{name.replace('_', '-')}") for name in given], "with --choice")
        with usage_errors():
            check_choices(choice)
    elif not temperature:
        sampling = {"--top-p": top_p < 1, "--top-k": top_k > 0, "--min-p": min_p > 0, "--seed": seed is not None}
        refuse(sampling, "at temperature 0; give --temp, too")

    from fastvlm_mlx.cli.ranks import answer_together, launched
    from fastvlm_mlx.engine.options import GenerationConfig
    from fastvlm_mlx.warm.client import Holding
    from fastvlm_mlx.warm.wire import Question

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
    first = launched()
    followed = None if schema is None else read_schema(schema)
    sources, text = read_stdin(images or [], DEFAULT_PROMPT if prompt is None else prompt)
    seen = [] if first is False else expand(sources, frames=frames, resolution=resolution)
    question = Question(
        prompt=text,
        system=system,
        resolution=with_detail(resolution, detail),
        background=background,
        config=config,
        choices=choice or (),
        schema=followed,
    )
    asked = {
        "model": model,
        "images": [name for _, name in seen],
        "prompt": text,
    }
    with LiveLine() as line:
        showing = Showing(
            line, asked if as_json else None, verbose=verbose, max_tokens=max_tokens, is_json=schema is not None
        )
        asking = Asked(sources=[source for source, _ in seen], question=question, has_prompt=prompt is not None)
        holding = Holding(model=model, revision=revision, dtype=dtype.value if dtype else None)
        if first is None:
            answer(asking, holding, showing, warm=warm)
        else:
            answer_together(asking, holding, showing)
    if not showing.end():
        raise typer.Exit(CHECK_FAILED)
