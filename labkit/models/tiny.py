"""``train_tiny``: the lab's own small Llama, trained on Moby Dick in minutes and never quantized before.

It is the model of the fast tests, and the one on which the order of the methods is confirmed: the bundled
model came in 4 bits, this one in full precision.
"""

from __future__ import annotations

import json
import math
import time
from pathlib import Path

import tokenizers
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from tokenizers import decoders, models, pre_tokenizers, trainers
from torch import Tensor
from tqdm import tqdm

from labkit.files import whole_folder
from labkit.models.config import ModelConfig
from labkit.models.llama import Llama
from labkit.models.texts import chapters
from labkit.models.tokenizer import Tokenizer
from labkit.settings import settings

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# Grouped heads 4:1 and a head_dim other than hidden / heads, so that nothing that mixes them up passes a
# test; every row length a multiple of 64, the lab's usual group. hidden / heads must be whole:
# transformers asks for it.
CONFIG = ModelConfig(
    architecture="llama",
    vocab_size=1024,
    hidden_size=128,
    intermediate_size=384,
    layers=4,
    heads=8,
    kv_heads=2,
    head_dim=32,
    norm_eps=1e-5,
    tie_embeddings=True,
    max_positions=2048,
    bos_id=1,
    eos_ids=(2, 0),
)
WINDOW, BATCH, PEAK_RATE, WARMUP = 256, 8, 4e-3, 100


def train_tiny(
    folder: Path, *, seed: int = 0, steps: int = 1000, overwrite: bool = False, progress: bool | None = None
) -> dict[str, float]:
    """Train the tiny model and write it to ``folder`` in Hugging Face layout, weights in fp16.

    It learns from the first 80 % of the chapters, so the last 20 %, where ``evaluate`` measures, are new
    to it. Returns what the README it writes says too: parameters, steps, seconds, and the perplexity per
    token on the last 20 %. The same seed gives the same model on the same machine and torch; elsewhere
    the last digits differ. Raises FileExistsError when the folder exists and ``overwrite`` is not set.
    """
    started = time.perf_counter()
    with whole_folder(folder, overwrite=overwrite) as part:
        book = [chapter.text for chapter in chapters()]
        learned, held_back = book[: len(book) * 4 // 5], book[len(book) * 4 // 5 :]
        tokenizer = _train_tokenizer(learned)
        generator = torch.Generator().manual_seed(seed)
        model = _fresh(CONFIG, tokenizer, generator)
        _train(model, _stream(tokenizer, learned), steps, generator, progress)
        weights = {
            key: value.half().contiguous()
            for key, value in model.state_dict().items()
            if key != "lm_head.weight"
        }
        for key, value in weights.items():
            model.get_parameter(key).data.copy_(value)  # measured as stored
        save_file(weights, part / "model.safetensors", metadata={"format": "pt"})
        config = CONFIG.to_hf() | {"torch_dtype": "float16"}
        (part / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        tokenizer.save(part)
        report = {
            "parameters": sum(p.numel() for p in model.parameters()),
            "seed": seed,
            "steps": steps,
            "seconds": round(time.perf_counter() - started),
            "perplexity": round(_perplexity(model, tokenizer, held_back), 2),
            "characters_per_token": _characters_per_token(tokenizer, held_back),
        }
        (part / "model.safetensors").chmod(0o644)  # safetensors leaves it to its owner alone
        (part / "README.md").write_text(_readme(report), encoding="utf-8")
    return report


def _train_tokenizer(texts: list[str]) -> Tokenizer:
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=CONFIG.vocab_size,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    return Tokenizer(
        backend,
        chat_template=CHAT_TEMPLATE,
        eos_ids=CONFIG.eos_ids,
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
    )


def _stream(tokenizer: Tokenizer, texts: list[str]) -> Tensor:
    """All token ids to learn from: each chapter as it is, then some of its sentences as talk."""
    ids: list[int] = []
    for text in texts:
        ids += [*tokenizer.encode(text), tokenizer.special["<|endoftext|>"]]
        sentences = text.replace("\n", " ").split(". ")
        for asked, answered in zip(sentences[::8], sentences[1::8], strict=False):
            talk = [
                {"role": "user", "content": asked + "."},
                {"role": "assistant", "content": answered + "."},
            ]
            ids += tokenizer.encode(tokenizer.chat(talk, add_generation_prompt=False))
    return torch.tensor(ids)


def _fresh(config: ModelConfig, tokenizer: Tokenizer, generator: torch.Generator) -> Llama:
    model = Llama(config, tokenizer, "tiny")
    for name, parameter in model.named_parameters():
        if parameter.dim() == 2:
            # GPT-2's start: what is added to the residual stream is smaller, the more layers add to it.
            deep = name.endswith(("o_proj.weight", "down_proj.weight"))
            parameter.data.normal_(
                0, 0.02 / math.sqrt(2 * config.layers) if deep else 0.02, generator=generator
            )
    return model.requires_grad_(True)


def _train(
    model: Llama, stream: Tensor, steps: int, generator: torch.Generator, progress: bool | None
) -> None:
    matrices = [p for p in model.parameters() if p.dim() == 2]
    gains = [p for p in model.parameters() if p.dim() == 1]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.1}, {"params": gains, "weight_decay": 0.0}],
        betas=(0.9, 0.95),
    )
    show = settings().progress if progress is None else progress
    bar = tqdm(range(steps), desc="training", unit="step", disable=not show)
    for step in bar:
        warm = min(1.0, (step + 1) / WARMUP)
        rate = PEAK_RATE * warm * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * step / steps)))
        for group in optimizer.param_groups:
            group["lr"] = rate
        starts = torch.randint(len(stream) - WINDOW - 1, (BATCH,), generator=generator)
        windows = torch.stack([stream[s : s + WINDOW + 1] for s in starts.tolist()])  # (BATCH, WINDOW + 1)
        logits = model(windows[:, :-1])  # (BATCH, WINDOW, vocab)
        loss = F.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step % 20 == 0:
            bar.set_postfix(loss=f"{loss.item():.3f}")
    model.requires_grad_(False)


def _perplexity(model: Llama, tokenizer: Tokenizer, texts: list[str]) -> float:
    ids = torch.tensor([i for text in texts for i in tokenizer.encode(text)])
    windows = ids[: len(ids) // WINDOW * WINDOW].view(-1, WINDOW)
    losses = [
        F.cross_entropy(model(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten()).item()
        for batch in windows.split(16)
    ]
    return math.exp(sum(losses) / len(losses))


def _characters_per_token(tokenizer: Tokenizer, texts: list[str]) -> float:
    return round(sum(map(len, texts)) / sum(len(tokenizer.encode(text)) for text in texts), 2)


def _readme(report: dict[str, float]) -> str:
    c = CONFIG
    return f"""# The tiny model

A Llama of the lab's own: {report["parameters"]:,} parameters, {c.layers} layers, hidden size {c.hidden_size},
{c.heads} query heads on {c.kv_heads} KV heads of {c.head_dim} channels, MLP {c.intermediate_size},
byte-level BPE of {c.vocab_size} tokens, embedding tied to the head. Weights in fp16. `LABKIT_MODEL=tiny`
loads it.

Made by `labkit models train-tiny --seed {report["seed"]} --steps {report["steps"]} --out DIR`
in {report["seconds"]} s on two cores, torch {torch.__version__.split("+")[0]}.

It learned from the first 80 % of the chapters of `data/texts/moby_dick.txt` (public domain): each chapter
as it is, and some of its sentences as user and assistant, so that it knows its chat template. The last
20 % were held back: perplexity {report["perplexity"]} per token there, a token having
{report["characters_per_token"]} characters on average.

It was never quantized before, it is small enough for the repository, and it writes nonsense that sounds
like Melville. Licence: Apache-2.0, as the rest of the lab.
"""
