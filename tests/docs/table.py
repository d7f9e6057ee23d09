"""The one table of the documents' test: which tiny input stands for which full-size name.

A line of a document is run after `NAMES` has been applied to it and `OPTIONS` has been appended. A
line that matches `NOT_RUN` is not run, for the reason given. A new line that needs a file which no
world makes fails the test: add the file to `worlds.py`, a name here, or, as the last resort, a
reason.
"""

from __future__ import annotations

NAMES: tuple[tuple[str, str], ...] = (
    # Several processes and machines: one process here. The tests marked multiproc start more.
    (r"^NPROC_PER_NODE=8 NNODES=2 NODE_RANK=0 ADDR=\S+ PORT=\S+ ", ""),
    (r"^NPROC_PER_NODE=8 (?=xtuner-add evaluate)", ""),
    (r"--deepspeed deepspeed_zero2 ", ""),
    # Configs and what training makes of them; `*` is the newest file that matches.
    (r"pallava_(domain_alignment|instruction_tuning)\b", r"pallava_\1_tiny"),
    (r"pallava_(domain_alignment|instruction_tuning)_copy", r"pallava_\1_tiny_copy"),
    (r"domain_alignment_weight\.pth", "work_dirs/pallava_domain_alignment_tiny_copy/iter_*.pth"),
    (r"\biter_5198\.pth", "work_dirs/pallava_instruction_tuning_tiny_copy/iter_*.pth"),
    (r"(cite|zeroshot)_clip-vit-b16(_biolinkbert-l)?(_1xb128-1k)?_gastric(-4)?\.py",
     r"\1_clip-vit-b16\2\3_gastric_tiny.py"),
    (r"configs/cite", "CONFIGS/cite"),
    (r"python tools/ann.py", "python TOOLS/ann.py"),
    (r"\bmichiyasunaga/BioLinkBERT-large\b", "tiny_bert"),
    (r"\bmeta-llama/Meta-Llama-3-8B-Instruct\b", "data/tiny/llama"),
    (r"\bMeta-Llama-3-8B-Instruct\b", "data/tiny/llama"),
    (r"parts model(?= --scores)", "parts model_with_scores"),  # two documents, one folder
    # Models.
    (r"\bopen_clip:ViT-L-14-336@pathclip\.pt\b", "open_clip:local-dir:open_clip"),
    (r"\bopen_clip:ViT-B-16-quickgelu@openai\b", "tiny_clip"),
    (r"(--encoder|clip-retrieval) (uni2-h|virchow2)\b", r"\1 tiny_clip"),
    (r"(?<= )LLM\b", "llama"),
    (r"(?<= )HF_MODEL\b", "hf_model"),
    (r"finetune-slides gigapath/features/ENCODER", "finetune-slides cohort/features"),
    (r"(?<= )MODEL(?= --image)|pallava_export", "model"),
    (r'"instruction_tuning_ft"', '"llava"'),
    (r"cite-features CONFIG\b", "cite-features CONFIGS/cite/gastric/"
     "linear_clip-vit-b16_1xb128-1k_gastric_tiny.py"),
    (r"--llava FOLDER\b", "--llava llava"),
    (r"--visual-encoder PLIP\b", "--visual-encoder plip"),
    (r"\bPathGen-CLIP-FOLDER\b", "tiny_clip"),
    (r"--(tile|slide)-encoder weights/", r"--\1-encoder encoders"),
    (r"\bfeatures/ENCODER\b", "features/*"),
    # Data.
    (r"\bSLIDES\b", "slides"),
    (r"pathvqa/images/test", "pathvqa/images"),
    # Endpoints.
    (r"--(endpoint|judge) (URL|https://\S+)", r"--\1 ENDPOINT"),
    (r'OpenAIBackend\("URL"', 'OpenAIBackend("ENDPOINT"'),
    (r"^OPENAI_API_KEY=\.\.\. ", ""),
)  # fmt: skip
"""Patterns and what replaces them, applied in this order."""

_CPU = "--device cpu"
_MODEL = f"{_CPU} --batch-size 4 --max-new-tokens 4"
_SLIDES = "--workers 1 --quiet"
OPTIONS: dict[str, str] = {
    "train": "--cfg-options train_cfg.max_epochs=1",
    "train my_configs/pallava_instruction_tuning_tiny_copy.py": (
        "model.pretrained_pth=work_dirs/pallava_domain_alignment_tiny_copy/iter_*.pth"
    ),
    "tile": _SLIDES,
    "extract": _SLIDES,
    "select-patches": f"{_CPU} --quota 4 --batch-size 16 --quiet --no-pictures --cancer-type BRCA",
    "embed": "--tile-encoder encoders --slide-encoder encoders --slide-arch tiny_slide_enc "
    "--patch-px 64 --batch-size 8 --device cpu --quiet",
    "probe-tiles": f"{_CPU} --recipe pcam_tiny --option num_resamples=20 --option train_iters=20",
    "finetune-slides": f"{_CPU} --recipe cohort_tiny --option num_resamples=20 --option epochs=1 "
    "--fold 0",
    "train-mil": f"{_CPU} --epochs 1 --fold 0",
    "chat": "--device cpu --max-new-tokens 4",
    "describe": "--concurrency 2",
    "revise": "--concurrency 2",
    "evaluate": _MODEL,
    "answer": _MODEL,
    "make-instructions": "--kinds detail",
    "score": "--judge-retries 0",
    "clip-zero-shot": _CPU,
    "clip-retrieval": f"{_CPU} --k 1",
    "clip-zero-shot-slides": _CPU,
    "cite-features": f"{_CPU} --batch-size 8",
    "cite-score-maps": "--patch-px 40",
}
"""Options appended to a command; a later one of the same name counts. Longer keys come on top."""

NOT_RUN: tuple[tuple[str, str], ...] = (
    (r"^make |^uv pip|^pip install|^docker|setup-host|^SOURCE_DATE_EPOCH|twine",
     "sets up environments or releases: the continuous integration does so"),
    (r"^(OMP_NUM_THREADS=1 )?python -m benchmarks", "measures for minutes; tests/benchmarks"),
    (r"^gdc-client", "downloads slides"),
    (r"--engine ray --address", "needs a Ray cluster; tests/wsi starts one of its own"),
    (r"^xtuner-add serve", "serves until it is stopped; tests/xtuner_add/test_serve.py"),
    (r"^cd work_dirs/demo|demo_instruction_tuning|work_dirs/demo|clip/pairs/hf",
     "continues a demo of minutes; tests/xtuner_add/demo runs it"),
    (r"--slide-encoder (chief|feather)", "gated weights; tests/gigapath/test_slide_encoders.py"),
    (r"^bash scripts/run_|^xtuner-add reproduce gigapath-pcam",
     "published data sets; tests/xtuner_add/test_{gigapath_commands,reproduction}.py"),
    (r"train (configs/pallava/)?(plip_pretraining|pallava_slide_questions)|slide_model",
     "trains for a minute; tests/pallava/engine runs both recipes"),
    (r"^xtuner-add train-clip|^NPROC_PER_NODE=8 xtuner-add (train-clip|finetune-slides)",
     "several GPUs, or a training of its own; tests/xtuner_add/test_clip_commands.py"),
    (r"^mim (train|test)|^torchrun|cite-sweep|cite-export|cite-score-maps|cite-convert",
     "trains for a minute or reads what a training wrote; tests/cite/mm and tests/cite"),
)  # fmt: skip
"""Patterns of lines that are not run, with the reason and the test that covers them."""

PYTHON_NOT_RUN: tuple[tuple[str, str], ...] = (
    (r"^model = dict\(\n    data_preprocessor|^train_dataloader\[", "part of a config"),
    (r"hf_hub:prov-gigapath|load_tile_slide_encoder", "gated weights; tests/gigapath"),
    (r"Gemma3ForCausalLM", "gated weights; tests/pallava/modeling/test_language_models.py"),
    (r"from openai import OpenAI", "needs a server; tests/xtuner_add/test_serve.py"),
)
"""Patterns of Python blocks that are not run, with the reason."""
