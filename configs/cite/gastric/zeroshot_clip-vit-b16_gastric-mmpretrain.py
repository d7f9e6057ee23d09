_base_ = "zeroshot_clip-vit-b16_gastric.py"

default_scope = "mmpretrain"
visualizer = dict(type="UniversalVisualizer")
