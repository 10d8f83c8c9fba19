"""Train a small Mamba-2-Hybrid on the CPU through megatron-core, on the Python standard library's own sources.

    python examples/train_hybrid.py --out demo-out

The model is megatron-core's hybrid stack of tensor-parallel layers from `oxiscan.megatron`, in float32, over bytes.
It leaves in the output folder:

    metrics.json    first and last training loss, held-out bits per byte, speed, and the first losses of the same run
                    with the plain-torch reference ops
    loss.png        both curves
    sample.txt      text generated token by token through the decode ops
    checkpoint.pt   model, optimizer, step, random-number state and losses

Interrupted (Ctrl-C, SIGTERM), it writes the checkpoint, and the same command goes on from there.
"""

import argparse
import hashlib
import json
import math
import os
import platform
import signal
import sys
import sysconfig
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

# megatron-core says at import which optional packages it does without.
warnings.filterwarnings("ignore", module=r"megatron\.")

from megatron.core import parallel_state  # noqa: E402
from megatron.core.inference.contexts import StaticInferenceContext  # noqa: E402
from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed  # noqa: E402
from megatron.core.transformer import TransformerConfig  # noqa: E402

import oxiscan  # noqa: E402
import oxiscan.megatron as oxm  # noqa: E402
import oxiscan.reference  # noqa: E402

VOCAB_SIZE = 256
DOCUMENT_END = 0  # between files: a byte that no source holds
PLAN_EVERY = 25  # steps between looks at the clock
PROMPT = b"import os\n\n\ndef "


@dataclass(frozen=True)
class RunConfig:
    """What a run's losses depend on; a checkpoint goes on only under the same."""

    text: str
    seed: int
    steps: int
    batch_size: int
    seqlen: int
    learning_rate: float
    warmup_steps: int
    layer_pattern: str
    hidden_size: int
    ffn_hidden_size: int
    attention_heads: int
    dstate: int
    headdim: int


class Interrupted(Exception):
    """SIGINT or SIGTERM came; `signum` is which."""

    def __init__(self, signum: int) -> None:
        super().__init__(signal.Signals(signum).name)
        self.signum = signum


class StopRequest:
    """Notes SIGINT and SIGTERM, so that a step is never cut in half; a second one ends the process at once."""

    def __init__(self) -> None:
        self.signum: int | None = None
        for signum in (signal.SIGINT, signal.SIGTERM):
            signal.signal(signum, self._note)

    def _note(self, signum: int, _frame: Any) -> None:
        self.signum = signum
        signal.signal(signum, signal.SIG_DFL)

    def check(self) -> None:
        """Raises `Interrupted` if a signal came since the last call."""
        if self.signum is not None:
            raise Interrupted(self.signum)


# Data


def read_text(folder: Path) -> tuple[np.ndarray, np.ndarray]:
    """Training and held-out bytes, whole files apart: the .py files below `folder`.

    Left out are tests, installed packages and what is generated: character tables, and one text that is larger than
    all held-out files together. A file is held out when the hash of its relative path says so (about one in twenty),
    on every machine alike.
    """
    skipped = {"site-packages", "dist-packages", "test", "tests", "__pycache__", "encodings", "pydoc_data"}
    parts: dict[bool, list[bytes]] = {False: [], True: []}
    for path in sorted(folder.rglob("*.py")):
        relative = path.relative_to(folder)
        if skipped.isdisjoint(relative.parts):
            held_out = hashlib.sha256(relative.as_posix().encode()).digest()[0] < 13
            parts[held_out].append(path.read_bytes() + bytes([DOCUMENT_END]))
    train, heldout = (np.frombuffer(b"".join(parts[held_out]), dtype=np.uint8) for held_out in (False, True))
    return train, heldout


def windows(text: np.ndarray, starts: np.ndarray, seqlen: int) -> Tensor:
    """The (len(starts), seqlen + 1) tokens from each start on: inputs and, one to the right, targets."""
    return torch.from_numpy(text[starts[:, None] + np.arange(seqlen + 1)].astype(np.int64))


def training_batch(text: np.ndarray, config: RunConfig, step: int) -> Tensor:
    """The tokens of one step: a function of seed and step alone, so the step is the whole data position."""
    random = np.random.default_rng((config.seed, step))
    return windows(text, random.integers(0, len(text) - config.seqlen, config.batch_size), config.seqlen)


# Model


@contextmanager
def megatron(seed: int) -> Iterator[None]:
    """Megatron's process groups of one process and its random-number tracker."""
    oxm.enable_cpu()
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # one process: nothing needs to leave the machine
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    parallel_state.initialize_model_parallel()
    model_parallel_cuda_manual_seed(seed)
    try:
        yield
    finally:
        parallel_state.destroy_model_parallel()
        torch.distributed.destroy_process_group()


def build_model(config: RunConfig) -> torch.nn.Module:
    """The hybrid model with freshly drawn parameters, the same ones for the same seed."""
    torch.manual_seed(config.seed)
    model_parallel_cuda_manual_seed(config.seed)
    transformer = TransformerConfig(
        num_layers=len(config.layer_pattern),
        hidden_size=config.hidden_size,
        ffn_hidden_size=config.ffn_hidden_size,
        num_attention_heads=config.attention_heads,
        mamba_state_dim=config.dstate,
        mamba_head_dim=config.headdim,
        mamba_num_groups=1,
        normalization="RMSNorm",
        add_bias_linear=False,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        use_cpu_initialization=True,
        # Fused kernels are for GPUs.
        bias_dropout_fusion=False,
        masked_softmax_fusion=False,
        persist_layer_norm=False,
        gradient_accumulation_fusion=False,
    )
    return oxm.build_hybrid_model(transformer, VOCAB_SIZE, config.seqlen, config.layer_pattern)


def token_losses(model: torch.nn.Module, tokens: Tensor) -> Tensor:
    """Cross entropy in nats of every target, (batch, seqlen)."""
    inputs, labels = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
    positions = torch.arange(inputs.shape[1]).expand_as(inputs)
    return model(inputs, positions, None, labels=labels)


# Training


class Trainer:
    """Model, optimizer and what has happened so far; `state` is all that a checkpoint needs."""

    def __init__(self, config: RunConfig, text: np.ndarray) -> None:
        self.config = config
        self.text = text
        self.model = build_model(config)
        matrices = [p for p in self.model.parameters() if p.dim() >= 2]
        vectors = [p for p in self.model.parameters() if p.dim() < 2]
        groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
        self.optimizer = torch.optim.AdamW(groups, lr=config.learning_rate, betas=(0.9, 0.95))
        self.losses: list[float] = []
        self.seconds = 0.0
        self.last_step = config.steps  # fewer where `plan` finds the machine too slow

    def learning_rate(self, step: int) -> float:
        """Linear warm-up, then a cosine down to a twentieth at the last step."""
        config = self.config
        if step < config.warmup_steps:
            return config.learning_rate * (step + 1) / config.warmup_steps
        done = (step - config.warmup_steps) / max(1, self.last_step - config.warmup_steps)
        return config.learning_rate * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * min(1.0, done))))

    def train_step(self) -> float:
        """One optimizer step on the next batch; returns and records its loss, the mean in nats a byte."""
        start = time.perf_counter()
        step = len(self.losses)
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate(step)
        loss = token_losses(self.model, training_batch(self.text, self.config, step)).mean()
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.losses.append(loss.item())
        self.seconds += time.perf_counter() - start
        return self.losses[-1]

    def plan(self, max_seconds: float) -> None:
        """Sets the last step: the configured one, or as far as the speed so far gets in `max_seconds`."""
        affordable = int(max_seconds / (self.seconds / len(self.losses)))
        self.last_step = max(len(self.losses), min(self.config.steps, affordable))

    def state(self) -> dict[str, Any]:
        return {
            "config": asdict(self.config),
            "model": {name: value for name, value in self.model.state_dict().items() if isinstance(value, Tensor)},
            "optimizer": self.optimizer.state_dict(),
            "losses": self.losses,
            "seconds": self.seconds,
            "last_step": self.last_step,
            "random": torch.get_rng_state(),
        }

    def load_state(self, state: dict[str, Any]) -> None:
        missing, unexpected = self.model.load_state_dict(state["model"], strict=False)
        absent = [name for name in missing if not name.endswith("_extra_state")]  # Megatron's, empty here
        if absent or unexpected:
            raise ValueError(f"checkpoint: lacks {absent}, has {unexpected} too many")
        self.optimizer.load_state_dict(state["optimizer"])
        self.losses = list(state["losses"])
        self.seconds = state["seconds"]
        self.last_step = state["last_step"]
        torch.set_rng_state(state["random"])


def save(path: Path, write: Callable[[Path], Any]) -> None:
    """`write(temporary)` and then rename: readers see the old file or the new one, never a part."""
    temporary = path.with_name(f".{path.name}.tmp")
    write(temporary)
    os.replace(temporary, path)


def save_checkpoint(trainer: Trainer, path: Path) -> None:
    save(path, lambda temporary: torch.save(trainer.state(), temporary))


def run_steps(
    trainer: Trainer, last_step: Callable[[], int], label: str, stop: StopRequest, after_step: Callable[[], None]
) -> None:
    """Train up to `last_step()` steps in all under a progress bar; a signal ends it between two steps."""
    step_tokens = trainer.config.batch_size * trainer.config.seqlen
    interval = 0.5 if sys.stderr.isatty() else 20.0
    with tqdm(total=last_step(), initial=len(trainer.losses), desc=label, unit="step", mininterval=interval) as bar:
        while len(trainer.losses) < last_step():
            loss = trainer.train_step()
            speed = step_tokens * len(trainer.losses) / trainer.seconds
            bar.set_postfix_str(f"loss {loss:.3f}, {speed:,.0f} tokens/s", refresh=False)
            bar.update()
            after_step()
            bar.total = last_step()
            stop.check()


def train(trainer: Trainer, path: Path, arguments: argparse.Namespace, stop: StopRequest) -> None:
    """Train to the end, with a checkpoint every so often, on interruption, and at the end."""

    def after_step() -> None:
        step = len(trainer.losses)
        # Not before the run with the reference ops ends, so that both have the same learning rates.
        if step >= arguments.compare_steps and step % PLAN_EVERY == 0:
            trainer.plan(60.0 * arguments.max_minutes)
        if step % arguments.checkpoint_every == 0 or step == trainer.last_step:
            save_checkpoint(trainer, path)

    try:
        run_steps(trainer, lambda: trainer.last_step, "training", stop, after_step)
    except Interrupted:
        save_checkpoint(trainer, path)
        raise


def reference_losses(config: RunConfig, text: np.ndarray, steps: int, stop: StopRequest) -> list[float]:
    """The first losses of the same run with every op replaced by its plain-torch reference."""
    with oxm.use_ops(oxiscan.reference):
        trainer = Trainer(config, text)
        run_steps(trainer, lambda: steps, "the same with the reference ops", stop, lambda: None)
    return trainer.losses


# What the trained model can do


@torch.no_grad()
def bits_per_byte(model: torch.nn.Module, text: np.ndarray, config: RunConfig, count: int, stop: StopRequest) -> float:
    """Mean bits of a held-out byte over `count` windows spread evenly, each read from its own start."""
    last_start = len(text) - config.seqlen - 1
    starts = np.unique(np.linspace(0, last_start, count).astype(np.int64))
    total = 0.0
    for chunk in np.array_split(starts, math.ceil(len(starts) / config.batch_size)):
        stop.check()
        total += token_losses(model, windows(text, chunk, config.seqlen)).mean(1).sum().item()
    return total / len(starts) / math.log(2)


@torch.no_grad()
def generate(
    model: torch.nn.Module, prompt: bytes, count: int, temperature: float, seed: int, stop: StopRequest
) -> bytes:
    """`prompt` and `count` sampled bytes: one prefill, then steps of one token that update the layers' states."""
    random = torch.Generator().manual_seed(seed)
    context = StaticInferenceContext(max_batch_size=1, max_sequence_length=len(prompt) + count)
    tokens, fed = list(prompt), 0
    with oxm.inference_mode():
        for _ in range(count):
            stop.check()
            inputs = torch.tensor([tokens[fed:]])
            positions = torch.arange(fed, len(tokens)).unsqueeze(0)
            logits = model(inputs, positions, None, inference_context=context, runtime_gather_output=True)
            context.sequence_len_offset = fed = len(tokens)
            weights = torch.softmax(logits[0, -1] / temperature, dim=-1)
            tokens.append(int(torch.multinomial(weights, 1, generator=random)))
    return bytes(tokens)


def plot_losses(path: Path, losses: list[float], reference: list[float]) -> None:
    """Left the whole run, right its start with the reference ops over it."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.2), layout="constrained")
    whole, start = figure.subplots(1, 2, width_ratios=(1.6, 1))
    width = min(25, len(losses))
    smooth = np.convolve(losses, np.full(width, 1 / width), mode="valid")
    whole.plot(range(1, len(losses) + 1), losses, color="C0", alpha=0.3, linewidth=0.8, label="oxiscan.ops")
    whole.plot(
        range(len(losses) - len(smooth) + 1, len(losses) + 1), smooth, color="C0", label=f"mean of the last {width}"
    )
    whole.set(title="training loss", xlabel="step", ylabel="nats per byte")
    start.plot(range(1, len(reference) + 1), losses[: len(reference)], color="C0", label="oxiscan.ops")
    start.set(title=f"the first {len(reference)} steps", xlabel="step")
    for axes in (whole, start):
        axes.plot(range(1, len(reference) + 1), reference, color="C1", linestyle="--", label="oxiscan.reference")
        axes.legend()
        axes.grid(alpha=0.3)
    save(path, lambda temporary: figure.savefig(temporary, format="png", dpi=120))


# The command


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--out", type=Path, default=Path("demo-out"), help="output folder")
    add("--restart", action="store_true", help="forget what the output folder has and train anew")
    add("--text", default=sysconfig.get_path("stdlib"), help="folder with .py files")
    add("--seed", type=int, default=1234)
    add("--steps", type=int, default=1800)
    add("--max-minutes", type=float, default=4.0, help="of training; a slower machine makes fewer steps")
    add("--batch-size", type=int, default=4)
    add("--seqlen", type=int, default=256)
    add("--learning-rate", type=float, default=5e-3)
    add("--warmup-steps", type=int, default=50)
    add("--layer-pattern", default="M-M*-M-", help="M: Mamba-2, *: attention, -: MLP")
    add("--hidden-size", type=int, default=128)
    add("--ffn-hidden-size", type=int, default=384)
    add("--attention-heads", type=int, default=4)
    add("--dstate", type=int, default=64)
    add("--headdim", type=int, default=64)
    add("--compare-steps", type=int, default=50, help="of the run with the reference ops")
    add("--heldout-windows", type=int, default=1000)
    add("--sample-bytes", type=int, default=800)
    add("--temperature", type=float, default=0.7)
    add("--checkpoint-every", type=int, default=100, help="steps")
    arguments = parser.parse_args(argv)
    for name, value in vars(arguments).items():
        if isinstance(value, int) and not isinstance(value, bool) and name != "seed" and value < 1:
            parser.error(f"--{name.replace('_', '-')}: got {value}; allowed: 1 or more")
    if arguments.compare_steps > arguments.steps:
        parser.error(f"--compare-steps: got {arguments.compare_steps}; allowed: up to --steps, {arguments.steps}")
    return arguments


def load_checkpoint(path: Path, config: RunConfig) -> dict[str, Any] | None:
    """The checkpoint at `path`, None where there is none; exits where it is another run's."""
    if not path.exists():
        return None
    state = torch.load(path, weights_only=True)
    theirs, ours = state["config"], asdict(config)
    different = [f"{name} {theirs.get(name)} (now {ours[name]})" for name in ours if theirs.get(name) != ours[name]]
    if different:
        sys.exit(f"{path} is of a run with {', '.join(different)}: --restart trains anew, another --out keeps both")
    return state


def relative_difference(losses: list[float], reference: list[float]) -> float:
    return max(abs(ours - theirs) / abs(theirs) for ours, theirs in zip(losses, reference, strict=True))


def write_results(trainer: Trainer, heldout: np.ndarray, arguments: argparse.Namespace, stop: StopRequest) -> None:
    """Evaluate, generate, run the reference, and write everything but the checkpoint; metrics.json is the last."""
    out, config, text = arguments.out, trainer.config, trainer.text
    trainer.model.eval()
    heldout_bits = bits_per_byte(trainer.model, heldout, config, arguments.heldout_windows, stop)
    print(f"held out: {heldout_bits:.3f} bits per byte")
    sample = generate(trainer.model, PROMPT, arguments.sample_bytes, arguments.temperature, config.seed, stop)
    save(out / "sample.txt", lambda temporary: temporary.write_text(sample.decode("utf-8", errors="replace")))
    compared = min(arguments.compare_steps, len(trainer.losses))
    reference = reference_losses(config, text, compared, stop)
    plot_losses(out / "loss.png", trainer.losses, reference)
    metrics = {
        "first_train_loss": trainer.losses[0],
        "last_train_loss": trainer.losses[-1],
        "heldout_bits_per_byte": heldout_bits,
        "tokens_per_s": config.batch_size * config.seqlen * len(trainer.losses) / trainer.seconds,
        "seconds": trainer.seconds,
        "steps": len(trainer.losses),
        f"losses_first_{arguments.compare_steps}": trainer.losses[:compared],
        f"reference_losses_first_{arguments.compare_steps}": reference,
        "max_relative_difference": relative_difference(trainer.losses[:compared], reference),
        "parameters": sum(parameter.numel() for parameter in trainer.model.parameters()),
        "train_bytes": len(text),
        "heldout_bytes": len(heldout),
        "threads": torch.get_num_threads(),
        "config": asdict(config),
        "versions": {
            "oxiscan": version("oxiscan"),
            "megatron_core": version("megatron-core"),
            "torch": torch.__version__,
            "python": platform.python_version(),
        },
    }
    save(out / "metrics.json", lambda temporary: temporary.write_text(json.dumps(metrics, indent=2) + "\n"))
    print(f"largest relative difference to the reference's losses: {metrics['max_relative_difference']:.1e}")


def main(argv: list[str] | None = None) -> int:
    """The exit status: 0, or 128 + the signal that interrupted the run."""
    arguments = parse_arguments(argv)
    config = RunConfig(**{field.name: getattr(arguments, field.name) for field in fields(RunConfig)})
    out = arguments.out
    checkpoint, metrics = out / "checkpoint.pt", out / "metrics.json"
    out.mkdir(parents=True, exist_ok=True)
    if arguments.restart:
        for path in (checkpoint, metrics):
            path.unlink(missing_ok=True)
    state = load_checkpoint(checkpoint, config)
    if state is not None and metrics.exists():
        print(f"{out} holds the finished run: see metrics.json, loss.png and sample.txt there. --restart trains anew.")
        return 0
    text, heldout = read_text(Path(config.text))
    if min(len(text), len(heldout)) <= config.seqlen + 1:
        sys.exit(
            f"--text: {config.text} has {len(text)} training and {len(heldout)} held-out bytes of .py files, too few"
        )
    stop = StopRequest()
    with megatron(config.seed):
        trainer = Trainer(config, text)
        if state is not None:
            trainer.load_state(state)
            print(f"going on from step {len(trainer.losses)} of {checkpoint}")
        try:
            train(trainer, checkpoint, arguments, stop)
            write_results(trainer, heldout, arguments, stop)
        except Interrupted as interrupted:
            print(f"\n{interrupted}: {checkpoint} has step {len(trainer.losses)}; the same command goes on from there")
            return 128 + interrupted.signum
    print(f"wrote metrics.json, loss.png, sample.txt and checkpoint.pt to {out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
