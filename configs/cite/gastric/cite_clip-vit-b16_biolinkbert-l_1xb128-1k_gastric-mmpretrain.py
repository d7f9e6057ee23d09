_base_ = "cite_clip-vit-b16_biolinkbert-l_1xb128-1k_gastric.py"

default_scope = "mmpretrain"
visualizer = dict(type="UniversalVisualizer")
