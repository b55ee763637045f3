"""`qlora-lab`: the course's run from one command line.

    qlora-lab finetune                      the QLoRA run, with a before/after table
    qlora-lab ask "two lattes for Anna"     an answer from the newest adapter
    qlora-lab evaluate runs/finetune-1      measure a saved adapter again
    qlora-lab memory --method qlora         the bytes of a run, before starting it

On two devices: python -m torch.distributed.run --nproc_per_node 2 -m qlora_lab finetune

Bad input ends with one line on stderr and exit code 2; Ctrl-C with 130. Nothing that exists is
overwritten. Heavy imports happen inside the commands, so that `--help` is instant.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
from pathlib import Path

from qlora_lab._version import __version__
from qlora_lab.errors import InputError, needs

RUNS = Path("runs")


def main(argv: list[str] | None = None) -> int:
    """Run a command.

    Args:
        argv: Arguments without the program's name; those of the process by default.

    Returns:
        The exit code: 0, 2 for bad input, 130 after Ctrl-C.
    """
    arguments = _parser().parse_args(argv)
    os.environ.pop("FAST", None)  # for chapters: who types a command wants it to be carried out
    try:
        arguments.run(arguments)
    except InputError as error:
        if os.environ.get("RANK", "0") == "0":  # of several processes one speaks
            print(f"qlora-lab: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nqlora-lab: stopped; what was saved before is still there", file=sys.stderr)
        return 130
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="qlora-lab", description="QLoRA, measured: fine-tune, ask, evaluate, predict memory."
    )
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(required=True, metavar="command")

    add = commands.add_parser("finetune", help="fine-tune a model and show what it learnt")
    add.set_defaults(run=_finetune)
    _model_options(add, bits=False)  # the method says how many
    add.add_argument("--method", default="qlora", help="qlora (default), 8bit, lora or full")
    add.add_argument(  # torchrun reads --r as the beginning of an option of its own
        "--r", "--rank", type=int, default=16, help="rank of the adapters (default 16)"
    )
    add.add_argument(
        "--alpha",
        type=float,
        help="scale of the adapters (default: 16 r on the embedded model, else 16)",
    )
    add.add_argument("--dropout", type=float, default=0.0, help="of the adapters (default 0)")
    add.add_argument("--lr", type=float, help="learning rate (default: the method's)")
    add.add_argument("--steps", type=int, help="optimizer steps (default: enough for the orders)")
    add.add_argument("--batch-size", type=int, default=8, help="rows a forward pass (default 8)")
    add.add_argument("--accumulation", type=int, default=1, help="forward passes a step")
    add.add_argument("--optim", help="a Trainer optimizer, e.g. paged_adamw_8bit")
    add.add_argument("--checkpointing", action="store_true", help="recompute activations")
    add.add_argument("--seed", type=int, default=0)
    add.add_argument("--data", type=Path, help='your rows: JSONL with "text" and "answer"')
    add.add_argument("--test", type=Path, help="orders of the same form, to measure on")
    add.add_argument("--output", type=Path, help="new folder (default: runs/finetune-N)")
    add.add_argument("--save-every", type=int, help="steps between checkpoints")
    add.add_argument("--resume", action="store_true", help="go on with an unfinished --output")
    add.add_argument(
        "--shard", action="store_true", help="of several processes, each keeps a share (FSDP)"
    )
    add.add_argument("--no-before", action="store_true", help="do not measure before training")

    add = commands.add_parser("ask", help="answer one order with an adapter")
    add.set_defaults(run=_ask)
    add.add_argument("text", help='for example "two large lattes with honey for Anna"')
    add.add_argument("--adapter", type=Path, help="folder of a run (default: the newest)")
    _model_options(add)

    add = commands.add_parser("evaluate", help="measure an adapter, or a base, on the six grades")
    add.set_defaults(run=_evaluate)
    add.add_argument("adapter", type=Path, nargs="?", help="folder of a run (default: the base)")
    add.add_argument("--test", type=Path, help="your own orders instead of the six grades")
    _model_options(add)

    add = commands.add_parser("memory", help="predict the bytes of a run")
    add.set_defaults(run=_memory)
    add.add_argument("--model", default=None, help="hub name or folder (default: embedded)")
    add.add_argument("--method", default="qlora", help="qlora (default), lora or full")
    add.add_argument("--r", type=int, default=16, help="rank of the adapters (default 16)")
    add.add_argument("--batch-size", type=int, default=1)
    add.add_argument("--sequence", type=int, default=512, help="tokens in a row (default 512)")
    add.add_argument("--checkpointing", action="store_true")
    add.add_argument("--no-double-quant", action="store_true")
    return parser


def _model_options(parser: argparse.ArgumentParser, bits: bool = True) -> None:
    parser.add_argument("--model", default=None, help="hub name or folder (default: embedded)")
    parser.add_argument("--device", default=None, help="cpu or cuda (default: cuda if present)")
    if bits:
        parser.add_argument("--bits", type=int, default=4, help="4 (default), 8 or 16")


def _finetune(arguments: argparse.Namespace) -> None:
    rows = tests = None
    if arguments.data or arguments.test:
        if not arguments.data:
            raise InputError("--test without --data would train on the orders; give both")
        rows = read_rows(arguments.data)
        tests = _own_tests(arguments.test) or {}
    if arguments.resume and not arguments.output:
        raise InputError("--resume needs --output, the folder of the unfinished run")

    from qlora_lab import distributed
    from qlora_lab.finetuning import finetune
    from qlora_lab.loading import default_device
    from qlora_lab.training import STEPS

    distributed.start(arguments.device or default_device())
    output = arguments.output or distributed.first(lambda: next_folder(RUNS, "finetune"))
    result = finetune(
        arguments.model,
        arguments.method,
        rows=rows,
        tests=tests,
        r=arguments.r,
        alpha=arguments.alpha,
        dropout=arguments.dropout,
        lr=arguments.lr,
        steps=STEPS if arguments.steps is None else arguments.steps,
        batch_size=arguments.batch_size,
        accumulation=arguments.accumulation,
        optim=arguments.optim,
        checkpointing=arguments.checkpointing,
        seed=arguments.seed,
        device=arguments.device,
        before=not arguments.no_before,
        output=output,
        save_every=arguments.save_every,
        resume=arguments.resume,
        shard=arguments.shard,
        progress=sys.stderr.isatty(),
        say=lambda line: print(line, flush=True) if distributed.is_first() else None,
    )
    if distributed.is_first():
        _show(result, asked=tests is None)
    distributed.stop()


def _show(result, asked: bool) -> None:
    """Print what was learnt, three answers, where it is, and what to do next."""
    run = result.run
    trained = f"{run.trainable:,} of {result.report.parameters:,} parameters"
    if result.method != "full":
        trained = f"{run.trainable:,} adapter parameters beside {result.report.parameters:,}"
    print(f"\ntrained {trained} for {len(run.losses)} steps in {run.seconds:.0f} s")
    print(f"loss {run.losses[0]:.3f} -> {run.losses[-1]:.3f} nats per token")
    if run.peak_bytes:
        print(f"peak CUDA memory {run.peak_bytes / 1e9:.2f} GB")
    if result.after:
        print(f"measured in {result.evaluation_seconds:.0f} s; exact match:\n\n{result.table()}")
    if asked:
        from qlora_lab.data import load_orders
        from qlora_lab.scoring import exact_match

        print("\nthree answers to orders it never saw")
        for grade in ("pairs", "copying", "corrections"):
            row = load_orders([grade])[grade][0]
            answer = result.after[grade].predictions[0]
            mark = "right" if exact_match(answer, row["answer"]) else "WRONG"
            print(f"  {row['text']}\n    {answer}   [{mark}]")
    what = "model" if result.method == "full" else "adapter"
    folder = result.folder / what
    size = sum(p.stat().st_size for p in folder.glob("*.safetensors"))
    print(f"\nthe {what} is in {folder.as_posix()} ({size / 1e6:.2f} MB)")
    if what == "adapter" and asked:
        called = typed()
        print("what to do next")
        print(f'  {called} ask "three small teas for Zoe" --adapter {folder.as_posix()}')
        print(f"  {called} finetune --method full    # what does training every weight add?")
        print(f"  {called} finetune --r 1            # how little is enough?")


def typed() -> str:
    """Return how this command is typed here: by its name, or where `make run` has put it."""
    if shutil.which("qlora-lab"):
        return "qlora-lab"
    python = Path(sys.executable)
    here = Path.cwd()
    return f"{python.relative_to(here) if python.is_relative_to(here) else python} -m qlora_lab"


def _ask(arguments: argparse.Namespace) -> None:
    folder = arguments.adapter or newest_adapter(RUNS)
    from qlora_lab.data import prompt

    asked = prompt(arguments.text)  # an empty one is refused before the heavy imports

    from qlora_lab.evaluation import generate
    from qlora_lab.finetuning import load_adapter
    from qlora_lab.loading import quiet

    loaded = load_adapter(folder, arguments.model, bits=arguments.bits, device=arguments.device)
    with quiet():
        print(generate(loaded.model, loaded.tokenizer, [asked])[0])


def _evaluate(arguments: argparse.Namespace) -> None:
    tests = _own_tests(arguments.test)
    from qlora_lab.data import load_orders
    from qlora_lab.evaluation import evaluate_orders
    from qlora_lab.finetuning import load_adapter
    from qlora_lab.loading import load_model, quiet
    from qlora_lab.orders import GRADES

    how = {"bits": arguments.bits, "device": arguments.device}
    if arguments.adapter:
        loaded = load_adapter(arguments.adapter, arguments.model, **how)
    else:
        loaded = load_model(arguments.model, **how)
    print(loaded.report)
    with quiet():
        scores = evaluate_orders(loaded.model, loaded.tokenizer, tests or load_orders(GRADES))
    for name, score in scores.items():
        print(f"{name:<12} {score}")


def _memory(arguments: argparse.Namespace) -> None:
    from qlora_lab.loading import find
    from qlora_lab.memory import ledger

    print(
        ledger(
            find(arguments.model),
            method=arguments.method,
            r=arguments.r,
            batch=arguments.batch_size,
            sequence=arguments.sequence,
            checkpointing=arguments.checkpointing,
            double_quant=not arguments.no_double_quant,
            # as `finetune` does it on a card with bfloat16
            dtype="float32" if arguments.method == "full" else "bfloat16",
            kbit_prep=arguments.method == "qlora",
            autocast=arguments.method != "full",
        )
    )


def _own_tests(path: Path | None) -> dict[str, list[dict]] | None:
    return {path.stem: read_rows(path, orders=True)} if path else None


def read_rows(path: Path, orders: bool = False) -> list[dict]:
    """Read JSONL rows with "text" and "answer".

    Args:
        path: The file, UTF-8, one JSON object a line.
        orders: Whether the answers must be orders, as the evaluation compares their fields.

    Returns:
        The rows as dictionaries.

    Raises:
        InputError: If the file cannot be read, is empty, or a line is not such a row; the message
            names the line.
    """
    needs("path", path)
    try:
        content = Path(path).read_text("utf-8-sig")  # Windows editors put a mark at the beginning
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise InputError(f"{path} is not UTF-8 text; save it as UTF-8") from None
    rows = []
    # Not splitlines(): it also breaks at U+2028, which may stand inside a JSON string.
    for number, line in enumerate(content.split("\n"), 1):
        if line.strip():
            try:
                rows.append(_read_row(line, orders))
            except InputError as error:
                raise InputError(f"{path} line {number}: {error}") from None
    if not rows:
        raise InputError(f"{path} holds no rows; write one JSON object a line")
    return rows


def _read_row(line: str, orders: bool) -> dict:
    from qlora_lab.data import prompt
    from qlora_lab.orders import is_order

    try:
        row = json.loads(line)
    except ValueError:
        raise InputError("this is not JSON; write one object a line") from None
    fields = [row.get(key) for key in ("text", "answer")] if isinstance(row, dict) else [None]
    if not all(isinstance(value, str) and value.strip() for value in fields):
        raise InputError('an object needs the strings "text" and "answer", neither empty')
    prompt(row["text"])  # refuses what the template cannot hold
    if orders and not is_order(row["answer"]):
        raise InputError("this answer is no order; see qlora_lab/assets/orders/pairs.jsonl")
    return row


def next_folder(root: Path, stem: str) -> Path:
    """The first of root/stem-1, root/stem-2, ... that does not exist yet."""
    number = 1
    while (root / f"{stem}-{number}").exists():
        number += 1
    return root / f"{stem}-{number}"


def newest_adapter(root: Path) -> Path:
    """The adapter of the run that finished last.

    Args:
        root: Where the runs are.

    Returns:
        Its adapter folder.

    Raises:
        InputError: If there is none.
    """
    finished = [path for path in root.glob("*/result.json") if (path.parent / "adapter").is_dir()]
    if not finished:
        raise InputError(f"no adapter in {root}/ yet; run qlora-lab finetune, or give --adapter")
    return max(finished, key=lambda path: path.stat().st_mtime).parent / "adapter"


if __name__ == "__main__":
    sys.exit(main())
