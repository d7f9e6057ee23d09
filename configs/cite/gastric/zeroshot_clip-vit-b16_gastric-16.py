# The matrix is whole; nothing is trained, so the result is that of any number of slides.
_base_ = "zeroshot_clip-vit-b16_gastric.py"
