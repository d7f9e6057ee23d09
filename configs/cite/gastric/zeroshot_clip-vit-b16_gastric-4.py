# Completes the matrix of methods and numbers of slides. Nothing is trained, so the number of slides
# does not affect the result.
_base_ = "zeroshot_clip-vit-b16_gastric.py"
