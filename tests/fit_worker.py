"""Small trainings of every kind, which tests/test_processes.py runs in its own process and under torchrun.

    torchrun ... tests/fit_worker.py OUT CACHE

Each process draws its own dropout and router noise and counts capacities by itself: these trainings have none of them.
"""

import os
import sys
from pathlib import Path

import torch

from ones_lib import Distillation
from ones_lib.data.files import model_tensors, save_tensors
from ones_lib.data.images import image_data
from ones_lib.data.text import text_corpus, text_tasks
from ones_lib.study.image_task import ImageClassification, classification_model
from ones_lib.study.language_task import LanguageModelling, language_model
from ones_lib.study.processes import is_main, join, whole_tensors, world_size
from ones_lib.study.text_tasks import MaskedLanguageModelling, finetuning_model, finetuning_task, pretraining_model
from ones_lib.study.training import Training, fit

RECIPE = Training(steps=8, batch_size=16, learning_rate=0.1, evaluations=2, label_smoothing=0.1, optimizer="sgd")
IMAGES = {"name": "glyphs", "image_size": 16, "num_classes": 4, "train_per_class": 20, "val_per_class": 70}
WIDENET = {"name": "widenet_tiny_patch16_224", "patch_size": 4, "embed_dim": 12, "depth": 2, "num_heads": 2, "d_ff": 8}
WIDENET |= {"num_experts": 4, "capacity_factor": 100.0}
TEXT = {"embedding_size": 8, "hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 8}
TEXT |= {"num_experts": 4, "num_experts_per_tok": 2, "capacity_factor": None, "hidden_dropout_prob": 0.0}
MISTRAL = {"model_type": "mixtral", "hidden_size": 16, "intermediate_size": 8, "num_hidden_layers": 2}
MISTRAL |= {"num_attention_heads": 2, "num_key_value_heads": 2, "num_experts": 4, "num_experts_per_tok": 2}


class Stop(Exception):
    pass


def cases(cache):
    images = ImageClassification(image_data(**IMAGES, cache_dir=cache))
    yield "moe", classification_model(WIDENET, images.data, 0), images, {}
    dense = {**WIDENET, "num_experts": 1, "share_depth": False}
    yield "dense", classification_model(dense, images.data, 1), images, {}
    student = classification_model({**WIDENET, "num_experts": 1}, images.data, 2)
    yield (
        "student",
        student,
        images,
        {"teacher": classification_model(WIDENET, images.data, 5), "distillation": Distillation()},
    )
    sizes = {"vocab_size": 300, "sequence_length": 32, "max_corpus": 400, "validation_sequences": 100}
    text = text_corpus("names", **sizes, cache_dir=cache)
    tasks = text_tasks("names", tokenizer=text.tokenizer, max_train=100, max_validation=40, cache_dir=cache)
    yield "masked_lm", pretraining_model(TEXT, text, 0), MaskedLanguageModelling(text), {}
    answering = finetuning_model(pretraining_model(TEXT, text, 1), "answer", 0)
    yield "answers", answering, finetuning_task("answer", tasks), {}
    yield "causal", language_model(MISTRAL, text, 0, dense=True), LanguageModelling(text), {}


def train(out, cache, device_batch=0, shard=False, interrupt=False):
    """Weights, predictions and history of all cases, by name, into the folder ``out``."""
    out.mkdir(exist_ok=True)
    torch.randn_like, drawn = torch.zeros_like, torch.randn_like  # of the router's noise
    for name, model, task, teaching in cases(cache):
        how = {"seed": 3, "device_batch": device_batch, "shard": shard}

        def stop(step, *_):
            if step >= 5:
                raise Stop

        if interrupt:
            how |= {"checkpoint": out / f"{name}.checkpoint.safetensors", "checkpoint_every": 4}
            try:
                fit(model, task, RECIPE, progress=stop, **how, **teaching)
            except Stop:
                model, _, teaching = next(rest for again, *rest in cases(cache) if again == name)
        trained, history = fit(model, task, RECIPE, **how, **teaching)
        predictions = task.predict(trained, torch.device("cpu"))
        tensors = whole_tensors(model_tensors(trained))
        if is_main():
            save_tensors(out / f"{name}.safetensors", tensors)
            save_tensors(out / f"{name}.predictions.safetensors", {m: predictions[m] for m in task.metrics})
            history.drop(columns="seconds").to_csv(out / f"{name}.csv", index=False)
    torch.randn_like = drawn


def main(out, cache):
    state = join()
    train(Path(out, "two"), cache)
    train(Path(out, "shards"), cache, device_batch=4, shard=True, interrupt=True)
    Path(out, f"processes-{world_size()}").touch()
    state.destroy_process_group()
    os._exit(0)  # threads that libraries leave behind can abort the interpreter's own exit


if __name__ == "__main__":
    main(*sys.argv[1:])
