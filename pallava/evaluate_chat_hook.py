"""Sample questions during training. Published configs import this module; the path is public."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from xtuner.dataset.utils import load_image as load_image_or_url
from xtuner.engine.hooks import EvaluateChatHook as XTunerEvaluateChatHook

from pallava.anyres import AnyRes, GridTies
from pallava.engine.recipe import trained_preparation
from pallava.text.chat_template import render_chat, template_of_tokenizer
from pallava.text.encoding import IMAGE_TOKEN, encode_prompt
from pallava.text.templates import TOKENIZER_TEMPLATE, PromptTemplate
from pathcore.files import StrPath
from pathcore.images import load_image


class EvaluateChatHook(XTunerEvaluateChatHook):
    """Asks the model sample questions during training and logs the answers.

    The original hook showed the connector the thumbnail alone; this one also passes the sub-images,
    as training does.

    Args:
        tokenizer: Config of the tokenizer.
        evaluation_inputs: Questions to ask.
        evaluation_images: One image for all questions or one per question: files or URLs. Without
            images, the questions are asked as text.
        image_processor: Config of a Hugging Face image processor; required with images.
        anyres_image: Whether to add sub-images. Defaults to what the training data set does, as do
            the two below.
        projector_type: Unused; published configs pass it.
        grid_ties: See `pallava.anyres.choose_grid`.
        pad_image_to_square: See `pallava.dataset.LLaVADataset`.
        kwargs: Arguments of XTuner's hook: `system`, `prompt_template`, `every_n_iters`, ...
            `prompt_template="tokenizer"` is the tokenizer's own chat template.

    Raises:
        FileNotFoundError: If an evaluation image does not exist; raised before training starts.
        ValueError: If images are given without an image processor, or their number does not match.
    """

    def __init__(
        self,
        tokenizer: Any,
        evaluation_inputs: str | Sequence[str],
        evaluation_images: str | Sequence[str] | None = None,
        image_processor: Any = None,
        anyres_image: bool | None = None,
        projector_type: str | None = None,
        grid_ties: GridTies | None = None,
        pad_image_to_square: bool | None = None,
        **kwargs: Any,
    ) -> None:
        del projector_type
        # XTuner's hook appends to its mutable default, which all instances would then share.
        kwargs["stop_words"] = list(kwargs.get("stop_words") or ())
        from_tokenizer = kwargs.get("prompt_template") == TOKENIZER_TEMPLATE
        if from_tokenizer:
            kwargs["prompt_template"] = None  # XTuner's hook knows only its own templates
        super().__init__(
            tokenizer=tokenizer,
            evaluation_inputs=evaluation_inputs,
            image_processor=image_processor,
            **kwargs,
        )
        self._template: PromptTemplate | None = None
        if from_tokenizer:
            self._template = template_of_tokenizer(self.tokenizer)
            self.gen_config.eos_token_id = _stop_ids(self.tokenizer, self._template)
        self._pictures: list[Any] = []
        if evaluation_images is None:
            return
        if image_processor is None:
            raise ValueError("EvaluateChatHook: evaluation_images need an image_processor")
        names = [evaluation_images] if isinstance(evaluation_images, str) else evaluation_images
        if len(names) == 1:
            names = list(names) * len(self.evaluation_inputs)
        if len(names) != len(self.evaluation_inputs):
            raise ValueError(
                f"EvaluateChatHook: {len(names)} evaluation_images for "
                f"{len(self.evaluation_inputs)} evaluation_inputs; give one image, or one each"
            )
        stated = {
            "sub_images": anyres_image,
            "ties": grid_ties,
            "pad_to_square": pad_image_to_square,
        }
        self._stated = {name: value for name, value in stated.items() if value is not None}
        self._pictures = [_load(name) for name in names]
        self.evaluation_images = self._prepared({})

    def before_train(self, runner: Any) -> None:
        """Prepares the images as the training data set does, and asks for the first time.

        Raises:
            ValueError: If the training data sets prepare images differently.
        """
        if self._pictures:
            self.evaluation_images = self._prepared(runner.cfg)
        super().before_train(runner)

    def _prepared(self, cfg: Mapping[str, Any]) -> list[Any]:
        """Returns the inputs of the model; `cfg` is the training config, whose defaults hold."""
        anyres = AnyRes.from_image_processor(
            self.image_processor, **{**trained_preparation(cfg), **self._stated}
        )
        return [anyres(picture) for picture in self._pictures]

    def _eval_images(self, *arguments: Any, **named: Any) -> None:
        """See XTuner's hook; passes sub-images as well."""
        images = self.evaluation_images
        questions = [f"{IMAGE_TOKEN}\n{question}" for question in self.evaluation_inputs]
        asked = [(question, [image]) for question, image in zip(questions, images, strict=True)]
        self._ask(asked, *arguments, **named)

    def _eval_language(self, *arguments: Any, **named: Any) -> None:
        """See XTuner's hook, whose own version calls a method that LLaVA models lack."""
        asked: list[tuple[str, list[torch.Tensor]]] = [(q, []) for q in self.evaluation_inputs]
        self._ask(asked, *arguments, **named)

    def _ask(
        self,
        asked: Sequence[tuple[str, list[torch.Tensor]]],
        runner: Any,
        model: Any,
        device: torch.device,
        max_new_tokens: int | None,
        save_eval_output: bool,
    ) -> None:
        outputs = []
        for question, images in asked:
            prompt = self._prompt(question)
            rendered = self._template is not None and self._template.chat_template is not None
            ids = encode_prompt(self.tokenizer, prompt, rendered=rendered)
            answer = model.generate_answer(
                torch.tensor([ids], device=device),
                [image.to(device) for image in images],
                max_new_tokens=max_new_tokens,
                generation_config=self.gen_config,
                stopping_criteria=self.stop_criteria,
            )
            text = prompt + self.tokenizer.decode(answer[0])
            runner.logger.info(f"Sample output:\n{text}\n")
            outputs.append(f"{text}\n")
        if save_eval_output:
            self._save_eval_output(runner, outputs)

    def _prompt(self, question: str) -> str:
        if self._template is None:
            return str((self.system + self.instruction).format(input=question, round=1))
        if self._template.chat_template is None:
            return self._template.render(question, self.system)
        messages = [{"role": "system", "content": self.system}] if self.system else []
        messages.append({"role": "user", "content": question})
        return render_chat(self.tokenizer, self._template, messages)


def _stop_ids(tokenizer: Any, template: PromptTemplate) -> list[int]:
    words = [tokenizer.eos_token, *template.stop_words]
    return sorted({tokenizer.convert_tokens_to_ids(word) for word in words if word})


def _load(name: StrPath) -> Any:
    name = os.fspath(name)
    if name.startswith(("http://", "https://")):
        return load_image_or_url(name)
    if not os.path.isfile(name):
        raise FileNotFoundError(f"evaluation image {name}: no such file")
    return load_image(name)
