"""The PathGen road at the size of a desk: slides, patches, captions, a CLIP, its scores."""
