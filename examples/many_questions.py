"""Compress a long context once, then ask many questions about it: `python examples/many_questions.py [MODEL]`."""

from __future__ import annotations

import sys

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import keepkv
from keepkv.embedded import embedded_model
from keepkv.tasks import demo_document


def main(path: str) -> None:
    model = AutoModelForCausalLM.from_pretrained(path)
    tokenizer = AutoTokenizer.from_pretrained(path)
    document, questions = demo_document()
    context = tokenizer(document, return_tensors="pt")

    cache = keepkv.Cache(model, method="keepkv", budget=0.25)
    with torch.inference_mode():
        model(**context, cache=cache, logits_to_keep=1)
    cache.compressing = False  # questions and answers stay whole
    print(cache.report(), end="\n\n")

    for question in questions:
        whole = tokenizer(document + question.prompt, return_tensors="pt")
        output = model.generate(**whole, cache=cache.copy(), max_new_tokens=4, do_sample=False)
        reply = tokenizer.decode(output[0, whole["input_ids"].shape[1] :], skip_special_tokens=True)
        print(f"{question.prompt.strip()}  {reply.strip()}  (is: {question.answer.strip()})")


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else embedded_model())
