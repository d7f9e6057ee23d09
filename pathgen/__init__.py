"""PathGen: from slides to image-caption pairs, and from pairs to CLIP models."""
