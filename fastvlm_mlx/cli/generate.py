"""`fastvlm generate`: one question about one or several images, streamed to stdout."""

import json
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fastvlm_mlx.cli.options import DEFAULT_MODEL, DEFAULT_PROMPT, DType, Model, parse_resolution
from fastvlm_mlx.cli.terminal import ByteProgress, note
from fastvlm_mlx.formatting import readable_bytes

if TYPE_CHECKING:
    from fastvlm_mlx import GenerationResult


def generate(
    images: Annotated[
        list[str] | None, typer.Argument(metavar="IMAGE", help="Files, URLs or data: URLs; - reads one from stdin.")
    ] = None,
    prompt: Annotated[
        str | None,
        typer.Option("--prompt", "-p", help=f"The question; - reads it from stdin. [default: {DEFAULT_PROMPT}]"),
    ] = None,
    model: Model = DEFAULT_MODEL,
    max_tokens: Annotated[
        int, typer.Option("--max-tokens", "-n", min=1, envvar="FASTVLM_MAX_TOKENS", help="Longest answer, in tokens.")
    ] = 256,
    temperature: Annotated[
        float, typer.Option("--temp", "-t", min=0.0, help="Sampling temperature; 0 takes the most likely token.")
    ] = 0.0,
    top_p: Annotated[float, typer.Option(min=0.0, max=1.0, help="Sample from this much of the probability.")] = 1.0,
    top_k: Annotated[int, typer.Option(min=0, help="Sample from the k most likely tokens; 0 from all.")] = 0,
    min_p: Annotated[
        float, typer.Option(min=0.0, max=1.0, help="Least probability, relative to the most likely token.")
    ] = 0.0,
    repetition_penalty: Annotated[float, typer.Option(min=0.0, help="Above 1 discourages repetition.")] = 1.0,
    seed: Annotated[int | None, typer.Option(min=0, help="Makes sampling repeatable.")] = None,
    system: Annotated[str | None, typer.Option(help="Replaces the system prompt.")] = None,
    stop: Annotated[list[str] | None, typer.Option(help="Ends the answer before this text; may be repeated.")] = None,
    resolution: Annotated[
        Any,
        typer.Option(
            parser=parse_resolution,
            metavar="INT|auto",
            envvar="FASTVLM_RESOLUTION",
            help="Pixels per side, a multiple of 64 (by default the model's own), or auto: as few as keep the details.",
        ),
    ] = None,
    dtype: Annotated[DType | None, typer.Option(help="Load the weights as this type.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of streaming text.")] = False,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Token counts, speed and memory on stderr.")] = False,
) -> None:
    """Answer a question about images.

    The answer streams to stdout. Several images make one question about all of them; without images, --prompt is
    answered as plain text.
    """
    if not images and prompt is None:
        raise typer.BadParameter("give an image, or a question with --prompt", param_hint="IMAGE")
    sources, question = _read_stdin(images or [], DEFAULT_PROMPT if prompt is None else prompt)

    from fastvlm_mlx import GenerationConfig, load, stream_generate
    from fastvlm_mlx.inputs.images import load_image

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
    with ThreadPoolExecutor() as pool:  # images are decoded while weights are read
        loading = [pool.submit(load_image, source) for source in sources]

        def announce(message: str) -> None:
            """Notes a slow step, such as a download, once every image is known to be one."""
            for image in loading:
                image.result()
            note(message)

        with ByteProgress() as progress:
            network, processor = load(
                model, dtype=dtype.value if dtype else None, notify=announce, progress=progress, lazy=True
            )
        loaded = [image.result() for image in loading]
    stream = stream_generate(
        network,
        processor,
        image=loaded or None,
        prompt=question,
        system=system,
        resolution=resolution,
        config=config,
        free_tower=True,
    )
    pieces: list[GenerationResult] = []
    for piece in stream:
        pieces.append(piece)
        if not as_json:
            typer.echo(piece.text, nl=False)
    text = "".join(piece.text for piece in pieces)
    if as_json:
        record = {
            "model": model,
            "images": ["<stdin>" if name == "-" else name for name in images or []],
            "prompt": question,
            "text": text,
            "token_ids": [token for piece in pieces for token in piece.token_ids],
            **_statistics(pieces[-1]),
        }
        typer.echo(json.dumps(record, ensure_ascii=False))
    elif not text.endswith("\n"):
        typer.echo()
    if verbose:
        _summarize(pieces[-1])


def _read_stdin(images: list[str], prompt: str) -> tuple[list[str | bytes], str]:
    """The images and the prompt with `-` replaced by what stdin holds; only one of them can have it."""
    if images.count("-") + (prompt == "-") > 1:
        raise typer.BadParameter("- can stand for one image or for the prompt, once", param_hint="IMAGE")
    sources = [sys.stdin.buffer.read() if name == "-" else name for name in images]
    return sources, sys.stdin.buffer.read().decode(errors="replace").strip() if prompt == "-" else prompt


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
