# Expects PatchGastric's captions.csv and patches_captions/ in data_root; tools/ann.py writes the
# annotation files.
data_root = "data/"
image_size = 224

model = dict(
    type="ImageClassifier",
    # Mean and std of ImageNet, as published. Those of CLIP are cite.mm.transforms.CLIP_NORM.
    data_preprocessor=dict(
        mean=[123.675, 116.28, 103.53], std=[58.395, 57.12, 57.375], to_rgb=False
    ),
)

# For the published pipeline, replace the first three steps by dict(type="PatchGastricPipeline"). It
# draws the saturation from 0 to 0.2, which makes images nearly grey; here it is 0.8 to 1.2.
train_pipeline = [
    dict(type="LoadPatch"),
    dict(type="ResizePatch", size=image_size),
    dict(type="AugmentPatch", brightness=0.2, saturation=0.2, hue=0.1),
    dict(type="PackPatch"),
]
test_pipeline = [
    dict(type="LoadPatch"),
    dict(type="ResizePatch", size=image_size),
    dict(type="PackPatch"),
]

train_dataloader = dict(
    batch_size=128,
    num_workers=8,
    sampler=dict(type="ShuffledPatchSampler", seed=0),
    dataset=dict(
        type="PatchGastric",
        data_root=data_root,
        data_prefix="patches_captions",
        ann_file="gastric_cls3_ann/train_all_0.2.txt",
        pipeline=train_pipeline,
    ),
)
val_dataloader = dict(
    batch_size=128,
    num_workers=8,
    sampler=dict(type="DefaultSampler", shuffle=False),
    dataset=dict(
        type="PatchGastric",
        data_root=data_root,
        data_prefix="patches_captions",
        ann_file="gastric_cls3_ann/val_0.8.txt",
        test_mode=True,
        pipeline=test_pipeline,
    ),
)
test_dataloader = val_dataloader

val_evaluator = dict(type="SlideMetric")
test_evaluator = dict(type="SlideMetric", items="all", num_resamples=1000, picture=True)
