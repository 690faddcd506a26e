"""The same as a pipeline of transformers: ``pipeline("keepkv-ask", model=…)(text, questions=[…], budget=0.2)``."""

from __future__ import annotations

from typing import Any

from transformers import AutoModelForCausalLM, Pipeline
from transformers.pipelines import PIPELINE_REGISTRY

from keepkv.asking.ask import Answers, ask
from keepkv.errors import KeepKVError

NAME = "keepkv-ask"


class AskPipeline(Pipeline):
    """Answers ``questions`` about a text that is read once and compressed; see ``keepkv.ask`` for every option.

    Options may be given when the pipeline is made, as defaults, and in each call. A list of texts gives a list of
    ``Answers``; each text is asked all questions.
    """

    _load_tokenizer: Any = True  # the base class declares these as None
    _load_processor: Any = False
    _load_image_processor: Any = False
    _load_feature_extractor: Any = False

    def _sanitize_parameters(self, **options: Any) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
        return {}, options, {}

    def preprocess(self, input_: Any, **options: Any) -> dict[str, Any]:
        return {"context": input_}

    def _forward(self, input_tensors: dict[str, Any], **options: Any) -> Any:
        if "questions" not in options:
            raise KeepKVError(f"{NAME}: no questions; call it as ask(text, questions=['…'], budget=0.25)")
        return {"answers": ask(self.model, self.tokenizer, input_tensors["context"], **options)}

    def postprocess(self, model_outputs: Any, **options: Any) -> Answers:
        answers: Answers = model_outputs["answers"]
        return answers


PIPELINE_REGISTRY.register_pipeline(NAME, pipeline_class=AskPipeline, pt_model=AutoModelForCausalLM)
