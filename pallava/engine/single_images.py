"""Conversations about one whole image each, for XTuner's own `LLaVAModel`."""

from __future__ import annotations

from typing import Any

from PIL import Image

from pallava.dataset import LLaVADataset


class SingleImageDataset(LLaVADataset):
    """Replacement for XTuner's `LLaVADataset` that does not stop at the first missing image.

    A row with an unusable image, or with several, is recorded in the run's skip log and skipped.

    Args:
        options: Arguments of `pallava.dataset.LLaVADataset`; images are never split into
            sub-images.

    Raises:
        FileNotFoundError: If a folder or file does not exist.
        ValueError: If arguments conflict, or too many rows are unusable.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(**options, anyres_image=False)
        keep = []
        for index, number in enumerate(self.text_data["num_images"]):
            if number <= 1:
                keep.append(index)
                continue
            reason = f"{number} images: this model takes one, pallava.model.LLaVAModel several"
            self._record(self.text_data[index], reason)
        if len(keep) < len(self.text_data):
            self.text_data = self.text_data.select(keep)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Returns `input_ids`, `labels` and `pixel_values` `(3, H, W)`, zeros without an image."""
        sample = super().__getitem__(index)
        images = sample["pixel_values"]
        sample["pixel_values"] = images[0] if images else self._no_image()
        return sample

    def read_image(self, name: str) -> Any:
        """Reads an image and applies the image processor, `(3, H, W)`.

        Raises:
            ImageError: If the image cannot be read or is too large.
        """
        return self._process(self.load_image(name))

    def _process(self, image: Any) -> Any:
        return self.image_processor.preprocess(image, return_tensors="pt")["pixel_values"][0]

    def _no_image(self) -> Any:
        return self._process(Image.new("RGB", (64, 64))).zero_()
