"""FoLoRA in PEFT's public benchmark, method_comparison/MetaMathQA: Llama-3.2-3B, 5,000 steps of 4.

The benchmark needs a CUDA GPU and the hub. This has not been run in full. Eight steps were tried on
a CPU in the benchmark's own training loop (of August 2026), with tiny's model and data.

    git clone https://github.com/huggingface/peft && cd peft/method_comparison/MetaMathQA
    python FOLORA/assets/metamathqa.py -v experiments/lora/llama-3.2-3B-rank32-folora

writes the experiment's configuration where it is missing: rank 32 and all linear layers, as in
rank32, or with "mlp" in the name rank 10 on the MLP alone, as in the benchmark's best LoRA. Then it
runs the benchmark's run.py, which gets its optimiser from folora.prepare. Everything else, such as
the accuracy on GSM8K and the forgetting, the rise of the loss on 100 articles, is the benchmark's.
"""
import json
import os
import runpy
import sys
from pathlib import Path

import datasets
import transformers

sys.path[:0] = [os.getcwd(), str(Path(__file__).resolve().parent.parent)]
import folora  # noqa: E402

LR, TEXTS, TASK_SAMPLES = 3e-3, 256, 256
QUERY = "Question: {} Think step by step.\nAnswer:{}"       # the benchmark's query_template
RANK_32 = {"r": 32, "lora_alpha": 32, "target_modules": "all-linear"}
RANK_10 = {"r": 10, "lora_alpha": 10, "target_modules": ["gate_proj", "up_proj", "down_proj"]}


def get_optimizer_and_scheduler(model, *, max_steps, lr, **others):
    """In place of the function of this name in the benchmark's utils.py."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(model.config._name_or_path)
    texts = folora.sample_calibration(model, tokenizer, TEXTS)
    pretrain = [{"input_ids": text[None], "logits_to_keep": 1} for text in texts]
    rows = datasets.load_dataset("meta-math/MetaMathQA", split="train").select(range(TASK_SAMPLES))
    task = [tokenizer(QUERY.format(row["query"], row["response"]), return_tensors="pt")
            for row in rows]
    optimizer = folora.prepare(model, pretrain, task, lr)
    warmup = int(0.1 * max_steps)                            # the benchmark's share
    return optimizer, transformers.get_cosine_schedule_with_warmup(optimizer, warmup, max_steps)


def write_experiment(folder):
    """adapter_config.json and training_params.json, unless they are there."""
    adapter = {"peft_type": "LORA", "task_type": "CAUSAL_LM",
               **(RANK_10 if "mlp" in folder.name else RANK_32)}
    training = {"optimizer_kwargs": {"lr": LR, "weight_decay": 0.0}}
    folder.mkdir(parents=True, exist_ok=True)
    for name, values in (("adapter_config", adapter), ("training_params", training)):
        path = folder / f"{name}.json"
        if not path.exists():
            path.write_text(json.dumps(values, indent=1))


if __name__ == "__main__":
    import utils  # the benchmark's
    write_experiment(Path(sys.argv[-1]))
    utils.get_optimizer_and_scheduler = get_optimizer_and_scheduler
    runpy.run_path("run.py", run_name="__main__")
