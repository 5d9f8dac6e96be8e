"""Trains the demo checkpoint: a tiny FastVLM that answers questions about the scenes of `scenes.py`.

    python demo/train.py --run build/demo --minutes 6 --batch 256 --lr 2e-3 --workers 15     # on a GPU
    torchrun --nproc-per-node 2 demo/train.py --run build/demo --compile                     # on two cores
    python demo/train.py --run build/demo --export fastvlm_mlx/demo_model

If it is started again, it continues from the last saved state. There are three stages, as in FastVLM's own training.
First the tower is trained alone, with extra heads that name the shape or character in every cell of crowded images.
Then projector and decoder are trained to answer from the frozen tower. Finally everything is trained together. Several
questions about an image are answered at once: they share the visual tokens and cannot see each other. The export drops
the extra heads. It has the train-time form and Apple's names (see `model.py`), so the converter treats it like any
other checkpoint.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from data import RESOLUTION, SPECIAL, Batch, Clock, Scenes, Schedule, load_tokenizer
from safetensors.torch import save_file
from scenes import KINDS
from torch import Tensor, nn
from torch.utils.data import DataLoader
from trainee import DECODER, TOWER, Trainee

VALIDATION = "-1"
"""Seed of the held-out scenes in the log; nothing is selected on them."""


# Evaluation


@torch.no_grad()
def accuracy(model: Trainee, batches: list[Batch]) -> dict[str, float]:
    """Returns the share of exactly right answers of each kind.

    If every token of the right answer is the most likely one after the tokens before it, greedy decoding gives this
    answer.
    """
    model.eval()
    right: dict[str, list[bool]] = defaultdict(list)
    for batch in batches:
        hidden = model.answer(model.see(batch)[-1], batch)[-1]
        miss = (model.answer_logits(hidden).argmax(-1) != batch.labels) & (batch.labels >= 0)
        for segments, kinds, misses in zip(*(x.tolist() for x in (batch.segments, batch.kinds, miss)), strict=True):
            wrong = {segment for segment, missed in zip(segments, misses, strict=True) if missed}
            for segment, kind in {(s, k) for s, k in zip(segments, kinds, strict=True) if s}:
                right[KINDS[kind]].append(segment not in wrong)
    return {kind: sum(right[kind]) / len(right[kind]) for kind in KINDS if right[kind]}


@torch.no_grad()
def sight(model: Trainee, batches: list[Batch]) -> dict[str, float]:
    """Returns the losses of the extra heads on held-out images."""
    model.eval()
    losses = [model.heads(model.see(batch), batch) for batch in batches]
    return {name: sum(float(loss[name]) for loss in losses) / len(losses) for name in losses[0]}


# Data


def stream(loader: Iterable[Batch], seeing: Callable[[], bool]) -> Iterator[Batch]:
    """Yields the batches, without those that were drawn in advance for the previous stage."""
    for batch in loader:
        if seeing() == (batch.ids.shape[1] == 0):
            yield batch


def worker_init(_: int) -> None:
    """Lets a process that draws stand back behind the trainer."""
    os.nice(10)
    torch.set_num_threads(1)


# Training


def losses_of(model: Trainee, batch: Batch, *, seeing: bool, frozen: bool) -> dict[str, Tensor]:
    """Returns the losses of a training step.

    Args:
        model: in training mode.
        batch: images and questions.
        seeing: train the tower alone.
        frozen: leave the tower as it is.
    """
    model.train()
    if not seeing:
        model.vlm.tower.eval()
    with torch.set_grad_enabled(not frozen):
        maps = model.see(batch)
        losses = {} if frozen else model.heads(maps, batch)
    if not seeing:
        states = model.answer(maps[-1], batch)
        labels = batch.labels.flatten()
        logits = model.answer_logits(states[-1]).flatten(0, 1)
        answers = F.cross_entropy(logits, labels, ignore_index=-1, reduction="none")
        weights = batch.weights.flatten() * (labels >= 0)
        losses["answers"] = 4 * (answers * weights).sum() / weights.sum()
        losses["naming"] = model.naming_loss(maps[-1], batch)
        losses["referents"] = model.referents(states, batch.referents)
        losses["upcoming"] = model.upcoming(states, batch.upcoming)
    return losses


def share_gradients(model: nn.Module, ranks: int) -> None:
    """Replaces the gradients by their mean over all processes."""
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    flat = torch.cat([gradient.flatten() for gradient in gradients])
    dist.all_reduce(flat)
    flat /= ranks
    for gradient, mean in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
        gradient.copy_(mean.view_as(gradient))


def floats(model: nn.Module) -> list[Tensor]:
    """Returns the weights and the statistics of a model, which can be averaged."""
    return [value.detach() for value in (*model.parameters(), *model.buffers()) if value.is_floating_point()]


def train(arguments: argparse.Namespace) -> None:
    """Trains to the end of the schedule, from the last saved state if there is one."""
    run: Path = arguments.run
    run.mkdir(parents=True, exist_ok=True)
    rank, ranks = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if ranks > 1:
        dist.init_process_group("gloo")
    torch.manual_seed(arguments.seed)
    torch.set_num_threads(arguments.threads)
    torch.set_float32_matmul_precision("high")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    see, answer, _ = (share / sum(arguments.stages) for share in arguments.stages)
    schedule, clock = Schedule(see=see, answer=answer), Clock(arguments.steps, arguments.minutes)
    tokenizer = load_tokenizer(run)
    model = Trainee(tokenizer).to(device)
    if device.type == "cpu":
        model.to(memory_format=torch.channels_last)
    averaged = copy.deepcopy(model).requires_grad_(False)
    means, values = floats(averaged), floats(model)
    parameters = [*model.parameters()]
    if arguments.compile:
        model.native_tower = torch.compile(model.vlm.tower.forward, dynamic=False)
        model.vlm.decode = torch.compile(model.vlm.decode, dynamic=False)
    decayed = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim <= 1]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": 0.05}, {"params": others, "weight_decay": 0.0}],
        betas=(0.9, 0.98),
        fused=device.type == "cuda",
    )
    step, seconds = 0, 0.0
    if (run / "state.pt").exists():
        state = torch.load(run / "state.pt", map_location=device)
        model.load_state_dict(state["model"])
        averaged.load_state_dict(state["averaged"])
        optimizer.load_state_dict(state["optimizer"])
        step, seconds = state["step"], state["seconds"]
    progress = clock.update(step, seconds)
    data = Scenes(
        tokenizer,
        schedule,
        clock,
        seed=f"{arguments.seed}" if rank == 0 else f"{arguments.seed}/{rank}",
        batch=arguments.batch,
        first=step,
    )
    loader = DataLoader(
        data,
        batch_size=None,
        num_workers=arguments.workers,
        prefetch_factor=2 if arguments.workers else None,
        worker_init_fn=worker_init,
    )
    validation = Scenes(tokenizer, schedule, clock, seed=VALIDATION, batch=32)
    batches = [validation.held_out(number).to(device) for number in range(arguments.eval_batches)]
    sums: dict[str, Tensor] = {}
    since, started = step, time.monotonic() - seconds
    drawn = stream(loader, lambda: schedule.seeing(clock.shared.value))
    while progress < 1:
        batch = next(drawn).to(device)
        seeing, tuning = schedule.seeing(progress), schedule.tuning(progress)
        for group in optimizer.param_groups:
            group["lr"] = schedule.rate(progress, arguments.lr)
        losses = losses_of(model, batch, seeing=seeing, frozen=not seeing and not tuning)
        optimizer.zero_grad()
        sum(losses.values()).backward()
        if ranks > 1:
            share_gradients(model, ranks)
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        step += 1
        torch._foreach_lerp_(means, values, 1 - min(0.998, step / (step + 100)))
        for name, value in losses.items():
            sums[name] = sums.get(name, 0) + value.detach()
        seconds = time.monotonic() - started
        progress = clock.update(step, seconds)
        if schedule.seeing(progress) != seeing:  # freeze the averaged tower
            model.vlm.tower.load_state_dict(averaged.vlm.tower.state_dict())
        last = progress >= 1
        if rank == 0 and (step % arguments.log_every == 0 or last):
            row: dict[str, object] = {"step": step, "seconds": round(seconds, 1), "progress": round(progress, 4)}
            row |= {name: round(float(value) / (step - since), 4) for name, value in sums.items()}
            since, sums = step, {}
            if step % arguments.eval_every == 0 or last:
                results = sight(averaged, batches) if seeing else accuracy(averaged, batches)
                row["held_out"] = {name: round(value, 3) for name, value in results.items()}
                state = {
                    "model": model.state_dict(),
                    "averaged": averaged.state_dict(),
                    "optimizer": optimizer.state_dict(),
                    "step": step,
                    "seconds": seconds,
                }
                torch.save(state, run / "state.tmp")
                (run / "state.tmp").replace(run / "state.pt")
            with (run / "log.jsonl").open("a") as log:
                log.write(json.dumps(row) + "\n")


# Files


def export(run: Path, out: Path) -> None:
    """Writes the averaged weights in Apple's train-time layout, float16, with the tokenizer's files."""
    out.mkdir(parents=True, exist_ok=True)
    state = torch.load(run / "state.pt", map_location="cpu")["averaged"]
    weights = {name.removeprefix("vlm."): value for name, value in state.items() if name.startswith("vlm.")}
    half = {
        name: value.half().contiguous() if value.is_floating_point() else value.clone()
        for name, value in weights.items()
    }
    save_file(half, out / "model.safetensors", {"format": "pt"})
    (out / "model.safetensors").chmod(0o644)  # safetensors makes it readable by its owner only
    tokenizer = load_tokenizer(run)
    tokenizer.model.save(str(out))
    added = {token: tokenizer.token_to_id(token) for token in SPECIAL}
    for name, content in (
        ("added_tokens.json", added),
        ("tokenizer_config.json", tokenizer_config(added)),
        ("config.json", checkpoint_config(added)),
    ):
        (out / name).write_text(json.dumps(content, indent=2) + "\n")


def tokenizer_config(added: dict[str, int]) -> dict[str, object]:
    """Returns `tokenizer_config.json` with the fields of Qwen2's."""
    flags = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False, "special": True}
    return {
        "add_prefix_space": False,
        "added_tokens_decoder": {str(index): {"content": token, **flags} for token, index in added.items()},
        "additional_special_tokens": [SPECIAL[1], SPECIAL[2]],
        "bos_token": None,
        "eos_token": SPECIAL[2],
        "model_max_length": 2048,
        "pad_token": SPECIAL[0],
        "tokenizer_class": "Qwen2Tokenizer",
        "unk_token": None,
    }


def checkpoint_config(added: dict[str, int]) -> dict[str, object]:
    """Returns `config.json` with the fields of Apple's checkpoints."""
    return {
        "architectures": ["LlavaQwen2ForCausalLM"],
        "bos_token_id": added[SPECIAL[0]],
        "eos_token_id": added[SPECIAL[2]],
        "hidden_act": "silu",
        "hidden_size": DECODER.hidden_size,
        "image_aspect_ratio": "pad",
        "intermediate_size": DECODER.intermediate_size,
        "max_position_embeddings": 2048,
        "mm_hidden_size": 2 * TOWER.embed_dims[-1],
        "mm_patch_merge_type": "flat",
        "mm_projector_type": "mlp2x_gelu",
        "mm_use_im_patch_token": False,
        "mm_use_im_start_end": False,
        "mm_vision_tower": f"mobileclip_l_{RESOLUTION}",
        "model_type": "llava_qwen2",
        "num_attention_heads": DECODER.num_attention_heads,
        "num_hidden_layers": DECODER.num_hidden_layers,
        "num_key_value_heads": DECODER.num_key_value_heads,
        "rms_norm_eps": DECODER.rms_norm_eps,
        "rope_theta": DECODER.rope_theta,
        "tie_word_embeddings": DECODER.tie_word_embeddings,
        "tokenizer_model_max_length": 2048,
        "torch_dtype": "float16",
        "use_sliding_window": False,
        "vocab_size": DECODER.vocab_size,
    }


def main() -> None:
    """Runs the command line."""
    parser = argparse.ArgumentParser(description="Train or export the demo checkpoint.")
    parser.add_argument("--run", type=Path, required=True, help="folder of the run: state, tokenizer, log")
    parser.add_argument("--export", type=Path, help="write the checkpoint into this folder instead of training")
    parser.add_argument("--steps", type=int, default=14600, help="number of steps")
    parser.add_argument("--minutes", type=float, help="train for this long instead")
    parser.add_argument(
        "--stages",
        type=float,
        nargs=3,
        default=(28, 32, 40),
        metavar=("SEE", "ANSWER", "BOTH"),
        help="shares of the tower alone, of projector and decoder, and of everything together",
    )
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--lr", type=float, default=1.5e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1, help="threads of each process")
    parser.add_argument("--compile", action="store_true", help="compile the model: some minutes, then a quarter faster")
    parser.add_argument("--workers", type=int, default=1, help="processes that draw scenes")
    parser.add_argument("--log-every", type=int, default=20)
    parser.add_argument("--eval-every", type=int, default=200)
    parser.add_argument("--eval-batches", type=int, default=4)
    arguments = parser.parse_args()
    if arguments.minutes is not None and "WORLD_SIZE" in os.environ:
        parser.error("several processes have to count in steps, not in minutes")
    if arguments.export:
        export(arguments.run, arguments.export)
    else:
        train(arguments)


if __name__ == "__main__":
    main()
