"""Distribution metadata of xtuner-add; build and tool settings stand in pyproject.toml."""

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).resolve().parent
PACKAGES = ("xtuner_add", "pallava", "cite", "wsi", "pathgen", "gigapath", "pathcore")
EXTRAS = ("train", "evaluate", "convert", "cite", "demo", "serve", "pathgen", "gigapath")


def read_requirements(name: str) -> list[str]:
    """Return the requirement lines of ``requirements/<name>.txt`` without comments."""
    lines = (ROOT / "requirements" / f"{name}.txt").read_text(encoding="utf-8").splitlines()
    return [line for line in (raw.split("#")[0].strip() for raw in lines) if line]


def read_version() -> str:
    """Return the version that ``xtuner_add/__init__.py`` states, without importing it."""
    source = (ROOT / "xtuner_add" / "__init__.py").read_text(encoding="utf-8")
    return re.search(r'^__version__ = "(.+)"', source, flags=re.MULTILINE)[1]


models = read_requirements("models")
extras = {name: [*models, *read_requirements(name)] for name in EXTRAS}
extras["ray"] = read_requirements("ray")
extras["all"] = sorted({line for lines in extras.values() for line in lines})
extras["dev"] = read_requirements("dev")
extras["docs"] = read_requirements("docs")

setup(
    name="xtuner-add",
    version=read_version(),
    description="Pathology vision-language models that train inside XTuner",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    author="The xtuner-add maintainers",
    license_expression="Apache-2.0",
    license_files=["LICENSE"],
    keywords=["pathology", "histology", "vision-language model", "LLaVA", "XTuner", "MMEngine"],
    classifiers=[
        "Development Status :: 3 - Alpha",
        "Intended Audience :: Science/Research",
        "Programming Language :: Python :: 3 :: Only",
        "Programming Language :: Python :: 3.10",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Typing :: Typed",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Topic :: Scientific/Engineering :: Medical Science Apps.",
    ],
    python_requires=">=3.10,<3.13",  # xtuner 0.2.0 stops below 3.13
    packages=[
        *find_packages(
            include=[f"{package}{suffix}" for package in PACKAGES for suffix in ("", ".*")]
        ),
        "xtuner_add.configs",
        "xtuner_add.scripts",
    ],
    # The top level of the checkout has `configs/`, as users of XTuner and MMEngine expect, and the
    # `scripts/` that Prov-GigaPath's instructions name. In an installation they lie inside
    # `xtuner_add`: packages called `configs` and `scripts` would collide.
    package_dir={"xtuner_add.configs": "configs", "xtuner_add.scripts": "scripts"},
    package_data={
        "": ["*.css", "*.html", "*.j2", "*.json", "*.txt", "py.typed"],
        "pathcore.encoders": ["presets/*.json"],
        "pallava.serving": ["viewer/*"],
        "gigapath.embed": ["slide_presets/*.json"],
        "gigapath.finetune": ["protocol_presets/*.json"],
        "xtuner_add": ["reproduction_cards/*.yml"],
        "xtuner_add.scripts": ["*.sh"],
        "xtuner_add.configs": ["**/*.py", "**/*.json", "**/*.md", "**/*.yml"],
    },
    include_package_data=False,
    install_requires=read_requirements("runtime"),
    extras_require=extras,
    entry_points={
        "console_scripts": ["xtuner-add = xtuner_add.cli:main"],
        "pathcore.encoders": ["gigapath = gigapath.presets:folder"],
    },
)
