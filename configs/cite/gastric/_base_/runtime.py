# cite.mm.launching opens the process group of torchrun on CPUs, which MMEngine cannot.
custom_imports = dict(imports=["cite.mm", "cite.mm.launching"], allow_failed_imports=False)
default_scope = "mmcls"

default_hooks = dict(
    timer=dict(type="IterTimerHook"),
    logger=dict(type="LoggerHook", interval=10),
    param_scheduler=dict(type="ParamSchedulerHook"),
    # Two checkpoints, because the hook deletes the older one before the new one is complete.
    checkpoint=dict(type="CheckpointHook", by_epoch=False, interval=500, max_keep_ckpts=2),
    sampler_seed=dict(type="DistSamplerSeedHook"),
    visualization=dict(type="VisualizationHook", enable=False),
)
custom_hooks = [
    dict(type="PortableCheckpointHook"),
    dict(type="ResumeDataHook"),
    dict(type="MissingPatchesHook"),
    dict(type="ZeroShotHook"),
    dict(type="CheckpointFitsHook"),
    dict(type="ClassesAgreeHook"),
    dict(type="FeaturesAgreeHook"),
]

env_cfg = dict(
    cudnn_benchmark=False,
    mp_cfg=dict(mp_start_method="fork", opencv_num_threads=0),
    dist_cfg=dict(backend="nccl"),
)
model_wrapper_cfg = dict(type="AnyDeviceDataParallel", broadcast_buffers=False)

visualizer = dict(type="ClsVisualizer", vis_backends=[dict(type="LocalVisBackend")])
log_processor = dict(by_epoch=False)
log_level = "INFO"
load_from = None
resume = False
randomness = dict(seed=0)
