"""Train the embedded base model from scratch, from source text that is on this machine.

    python tools/pretrain_base.py                 # resumes by itself if it was interrupted
    python tools/pretrain_base.py --steps 6000 --device cuda

In order: build the corpus (`tools/corpus.py` drops whatever overlaps the held-out text), train a
byte-level BPE tokenizer of 4096 tokens on it, pack every pool into rows of 513 tokens, train a
4.3M-parameter Llama, measure bits per byte on the held-out modules and complete the 20 prompts of
`tools/prompts.json`, then export a checkpoint that plain `AutoModelForCausalLM` loads.

Two choices buy most of the quality that a CPU can afford:

* Muon (orthogonalised momentum) for the weight matrices, AdamW for the embedding and the norms.
* A constant learning rate that falls linearly to zero over the last part of the run, while the
  mix turns to nearly all standard library: the text nearest to the held-out modules comes
  last, when the rate is low and is remembered best.

A last stage (`--endings`, `tools/endings.py`) trains it on its own text, so that it ends what it
begins and does not write one line for ever.

Everything is under `--out` (default `runs/pretrain`): corpus cache, tokenizer, `checkpoint.pt`
(replaced atomically), `curve.jsonl`. The export goes to `--export` at the end only.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
import pickle
import subprocess
import sys
import time
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from tqdm import tqdm
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

sys.path.insert(0, str(Path(__file__).resolve().parent))
import corpus  # noqa: E402
import endings  # noqa: E402

CONTEXT = 512
VOCAB = 4096
SPECIAL = ["<|pad|>", "<|bos|>", "<|eos|>"]
# A line break and the indentation after it are one piece: code is then a fifth shorter.
# Words carry one leading space, dot or underscore; digits stand alone, as quantities must copy.
SPLIT = r"(?:[ \t]*\n)+[ \t]*|[ ._]?\p{L}+| ?\p{N}| ?[^\s\p{L}\p{N}]+|\s+"
ROWS = 16  # rows of a step, mixed from (core, tests, packages, definitions)


def train_tokenizer(pools: dict[str, list[str]]) -> Tokenizer:
    """Byte-level BPE on all of core and tests and as much again of the packages."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    texts = pools["core"] + pools["tests"][::2] + pools["packages"][::10]
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def pack(texts: list[str], tokenizer: Tokenizer, seed: int) -> np.ndarray:
    """Documents in seeded order, `<|bos|> text <|eos|>` each, cut into rows.

    Returns:
        uint16 array of shape (rows, CONTEXT + 1); a row shares no token with the next.
    """
    order = np.random.default_rng(seed).permutation(len(texts))
    stream: list[int] = []
    for start in range(0, len(order), 256):
        batch = [texts[i] for i in order[start : start + 256]]
        for encoding in tokenizer.encode_batch(batch, add_special_tokens=False):
            stream += [1, *encoding.ids, 2]
    rows = len(stream) // (CONTEXT + 1)
    return np.asarray(stream[: rows * (CONTEXT + 1)], dtype=np.uint16).reshape(rows, -1)


def prepare(out: Path, seed: int) -> tuple[dict[str, np.ndarray], Tokenizer, dict]:
    """Corpus, tokenizer and packed rows; cached in `out` so that a resume starts at once."""
    cache = out / "corpus.pkl"
    if not cache.exists():
        pools, report = corpus.build()
        tokenizer = train_tokenizer(pools)
        cut = corpus.definitions([text for texts in pools.values() for text in texts])
        report["definitions"] = {"texts": len(cut), "bytes": sum(len(t.encode()) for t in cut)}
        pools["definitions"] = cut
        rows = {name: pack(texts, tokenizer, seed) for name, texts in pools.items()}
        report["rows"] = {name: len(r) for name, r in rows.items()}
        report["tokens"] = {name: int(r.size) for name, r in rows.items()}
        partial = cache.with_suffix(".part")
        with open(partial, "wb") as handle:
            pickle.dump((rows, tokenizer.to_str(), report), handle)
        os.replace(partial, cache)
    with open(cache, "rb") as handle:
        rows, text, report = pickle.load(handle)
    return rows, Tokenizer.from_str(text), report


def build_model(seed: int) -> LlamaForCausalLM:
    """A Llama whose every layer dimension is a multiple of 64 (see FACTS of 4-bit layers)."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=256,
        intermediate_size=704,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=True,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        initializer_range=0.02,
        attn_implementation="sdpa",
    )
    model = LlamaForCausalLM(config)
    # Residual branches start small, as in GPT-2: the first steps see an identity network.
    for layer in model.model.layers:
        for linear in (layer.self_attn.o_proj, layer.mlp.down_proj):
            torch.nn.init.normal_(linear.weight, std=0.02 / math.sqrt(2 * 4))
    return model


class Muon(torch.optim.Optimizer):
    """Momentum, orthogonalised by five Newton-Schulz steps (Jordan et al., 2024).

    `torch.optim.Muon` does the same in bfloat16, which a CPU without bf16 units emulates several
    times slower than float32; this is its float32 form, batched over equal shapes.
    """

    def __init__(self, params, lr: float, momentum: float = 0.95, weight_decay: float = 0.01):
        super().__init__(params, dict(lr=lr, momentum=momentum, weight_decay=weight_decay))

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            by_shape: dict[tuple, list] = {}
            for p in group["params"]:
                state = self.state[p]
                if "momentum" not in state:
                    state["momentum"] = torch.zeros_like(p)
                state["momentum"].lerp_(p.grad, 1 - group["momentum"])
                by_shape.setdefault(tuple(p.shape), []).append(p)
            for shape, params in by_shape.items():
                update = torch.stack(
                    [p.grad.lerp(self.state[p]["momentum"], group["momentum"]) for p in params]
                )
                update = orthogonalise(update)
                scale = group["lr"] * max(1.0, shape[0] / shape[1]) ** 0.5
                for p, u in zip(params, update, strict=True):
                    p.mul_(1 - group["lr"] * group["weight_decay"]).add_(u, alpha=-scale)


def orthogonalise(x: torch.Tensor, steps: int = 5) -> torch.Tensor:
    """Nearest semi-orthogonal matrices of a batch (b, m, n), roughly (singular values .7-1.2)."""
    transposed = x.size(1) > x.size(2)
    x = x.mT if transposed else x
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(steps):
        a = x @ x.mT
        x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
    return x.mT if transposed else x


class Rows:
    """Endless seeded epochs over each pool; its place is a pair of counters, hence resumable."""

    def __init__(self, pools: dict[str, np.ndarray], seed: int):
        self.pools, self.seed = list(pools.values()), seed
        self.place = [0] * len(self.pools)

    def take(self, counts: tuple[int, ...]) -> torch.Tensor:
        batch = []
        for i, count in enumerate(counts):
            rows = self.pools[i]
            for _ in range(count):
                epoch, at = divmod(self.place[i], len(rows))
                order = self._order(i, epoch)
                batch.append(rows[order[at]])
                self.place[i] += 1
        return torch.from_numpy(np.stack(batch).astype(np.int64))

    def _order(self, pool: int, epoch: int) -> np.ndarray:
        key = (pool, epoch)
        if getattr(self, "_cached", {}).get(pool, (None,))[0] != key:
            rng = np.random.default_rng([self.seed, pool, epoch])
            self._cached = {**getattr(self, "_cached", {})}
            self._cached[pool] = (key, rng.permutation(len(self.pools[pool])))
        return self._cached[pool][1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=2000, help="optimizer steps of 8192 tokens")
    parser.add_argument("--decay", type=float, default=0.4, help="last share of the run")
    parser.add_argument("--lr", type=float, default=0.02, help="Muon's rate; AdamW takes a fifth")
    parser.add_argument("--mix", type=int, nargs=4, default=(6, 1, 2, 7), help="while constant")
    parser.add_argument(
        "--decay-mix", type=int, nargs=4, default=(7, 0, 1, 8), help="while it falls"
    )
    parser.add_argument(
        "--endings", type=int, default=100, help="steps on its own text, at the end"
    )
    parser.add_argument("--endings-lr", type=float, default=3e-4, help="AdamW's rate in them")
    parser.add_argument("--micro", type=int, default=4, help="rows a forward pass, of 16 a step")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--out", type=Path, default=Path("runs/pretrain"))
    parser.add_argument("--export", type=Path, default=Path("qlora_lab/assets/model"))
    parser.add_argument("--minutes", type=float, default=None, help="stop here, to resume later")
    parser.add_argument("--export-now", action="store_true", help="export the checkpoint as it is")
    args = parser.parse_args()
    if sum(args.mix) != ROWS or sum(args.decay_mix) != ROWS:
        parser.error(f"a mix must have {ROWS} rows in all, got {args.mix} and {args.decay_mix}")
    args.out.mkdir(parents=True, exist_ok=True)

    pools, tokenizer, report = prepare(args.out, args.seed)
    print({name: f"{r.size / 1e6:.2f}M tokens" for name, r in pools.items()}, flush=True)
    rows = Rows(pools, args.seed)
    model = build_model(args.seed).to(args.device)
    embedding = model.model.embed_tokens.weight
    matrices = [p for p in model.parameters() if p.ndim == 2 and p is not embedding]
    others = [p for p in model.parameters() if p.ndim < 2]
    muon = Muon(matrices, lr=args.lr)
    adamw = torch.optim.AdamW(
        [{"params": [embedding]}, {"params": others}],
        lr=args.lr / 5,
        betas=(0.9, 0.95),
        weight_decay=0.0,
        fused=True,
    )
    optimizers = [muon, adamw]
    base_rates = [args.lr, args.lr / 5]
    checkpoint = args.out / "checkpoint.pt"
    step, seconds, history = 0, 0.0, []
    if checkpoint.exists():
        saved = torch.load(checkpoint, map_location=args.device, weights_only=True)
        model.load_state_dict(saved["model"])
        for optimizer, state in zip(optimizers, saved["optimizers"], strict=True):
            optimizer.load_state_dict(state)
        step, seconds = saved["step"], saved["seconds"]
        rows.place[: len(saved["place"])] = saved["place"]  # a pool may have come since
        history = saved.get("history", [])
        print(f"resumed at step {step}", flush=True)
    if args.export_now:
        return export(model, tokenizer, report, args, step, seconds, history, None)
    # A run may be resumed with other settings (a longer plan, another rate): say which, and when.
    history.append([step, "python tools/pretrain_base.py " + " ".join(sys.argv[1:])])

    def loss_of(batch: torch.Tensor) -> torch.Tensor:
        logits = model(input_ids=batch[:, :-1], use_cache=False).logits
        return torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())

    fast_loss = torch.compile(loss_of, dynamic=False) if args.compile else loss_of

    def save() -> None:
        partial = checkpoint.with_suffix(".part")
        torch.save(
            {
                "model": model.state_dict(),
                "optimizers": [o.state_dict() for o in optimizers],
                "step": step,
                "seconds": seconds,
                "place": rows.place,
                "history": history,
            },
            partial,
        )
        os.replace(partial, checkpoint)

    decay_from = int(args.steps * (1 - args.decay))
    begun = time.perf_counter()
    bar = tqdm(total=args.steps, initial=step, mininterval=10, file=sys.stderr)
    while step < args.steps:
        tick = time.perf_counter()
        factor = min(1.0, (step + 1) / 50, (args.steps - step) / (args.steps - decay_from))
        for optimizer, rate in zip(optimizers, base_rates, strict=True):
            for group in optimizer.param_groups:
                group["lr"] = rate * factor
        batch = rows.take(args.decay_mix if step >= decay_from else args.mix).to(args.device)
        batch = batch[torch.randperm(len(batch), generator=torch.Generator().manual_seed(step))]
        parts = batch.split(args.micro)
        total = 0.0
        for part in parts:
            loss = fast_loss(part) / len(parts)
            loss.backward()
            total += loss.item()
        torch.nn.utils.clip_grad_norm_([embedding, *others], 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        step += 1
        seconds += time.perf_counter() - tick
        bar.update()
        bar.set_postfix(loss=f"{total:.3f}", refresh=False)
        if step % 10 == 0:
            record = {"step": step, "loss": round(total, 4), "lr": round(args.lr * factor, 6)}
            record["seconds"] = round(seconds, 1)
            with open(args.out / "curve.jsonl", "a") as handle:
                handle.write(json.dumps(record) + "\n")
        if step % 50 == 0 or step == args.steps:
            save()
        if args.minutes and time.perf_counter() - begun > args.minutes * 60:
            save()
            print(f"stopped at step {step} of {args.steps}; the same command goes on", flush=True)
            return
    bar.close()
    own = None
    if args.endings:
        own = endings.teach(
            model,
            fast(tokenizer),
            pools,
            rows,
            steps=args.endings,
            lr=args.endings_lr,
            seed=args.seed,
            checkpoint=args.out / "endings.pt",
        )
    export(model, tokenizer, report, args, step, seconds, history, own)


def fast(tokenizer: Tokenizer) -> PreTrainedTokenizerFast:
    """The tokenizer as `transformers` knows it."""
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=SPECIAL[0],
        bos_token=SPECIAL[1],
        eos_token=SPECIAL[2],
        model_max_length=CONTEXT,
        clean_up_tokenization_spaces=False,
        padding_side="right",
    )


def export(model, tokenizer, report, args, step, seconds, history, own) -> None:
    """Write the checkpoint in bfloat16, its tokenizer, and how it was made."""
    args.export.mkdir(parents=True, exist_ok=True)
    model.to(torch.bfloat16).save_pretrained(args.export)
    fast(tokenizer).save_pretrained(args.export)
    curve = {}
    path = args.out / "curve.jsonl"
    if path.exists():  # a resumed run repeats the steps after its last checkpoint: keep the last
        for line in path.read_text().splitlines():
            record = json.loads(line)
            curve[record["step"]] = record
    weights = (args.export / "model.safetensors").read_bytes()
    training = {
        "commands": [{"from_step": at, "command": command} for at, command in history],
        "commit": _git("rev-parse", "HEAD"),
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "device": args.device,
        "seed": args.seed,
        "steps": step,
        "planned_steps": args.steps,
        "tokens": step * ROWS * CONTEXT,
        "hours": round(seconds / 3600, 2),
        "parameters": sum(p.numel() for p in model.parameters()),
        "weights_sha256": hashlib.sha256(weights).hexdigest(),
        "versions": _versions(),
        **({"endings": own} if own else {}),
        "corpus": report,
        "curve": [curve[s] for s in sorted(curve) if s <= step and s % 20 == 0],
    }
    (args.export / "training.json").write_text(json.dumps(training, indent=1) + "\n")
    print(f"exported step {step} to {args.export}; measure it: python tools/measure_base.py")


def _git(*words: str) -> str:
    done = subprocess.run(["git", *words], capture_output=True, text=True)
    return done.stdout.strip() or "unknown"


def _versions() -> dict[str, str]:
    from importlib.metadata import version

    names = ("torch", "transformers", "tokenizers", "numpy")
    return {"python": sys.version.split()[0], **{n: version(n) for n in names}}


if __name__ == "__main__":
    main()
