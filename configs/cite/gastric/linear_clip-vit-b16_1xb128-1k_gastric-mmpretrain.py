_base_ = "linear_clip-vit-b16_1xb128-1k_gastric.py"

default_scope = "mmpretrain"
visualizer = dict(type="UniversalVisualizer")
